"""What changes the weights: the learning rate's schedule, SGD, and the moving average of weights."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

MOMENTUM = 0.9


@dataclass(frozen=True)
class Optimisation:
    """How long and how fast to learn. Epochs are passes over the data, fractions allowed for the warm-up.

    `ema` is the decay of the moving average of weights, 0 for none.
    """

    epochs: int
    lr: float
    weight_decay: float
    warmup_epochs: float
    ema: float
    seed: int

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017)."""
        warmup, total = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weights of two and more dimensions decay, norms and biases do not."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, fused=True)


class Ema:
    """A moving average of a model's weights and running statistics, with a short memory at first: min(decay, (1 + t) /
    (10 + t)).

    Not torch's AveragedModel: its decay would have to be read from the device in each step, and it walks through all
    modules each time.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        # Listed once: both models keep their tensors, and a walk through the modules in every step would cost more than
        # the update.
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._averages, self._values = [own for own, _ in averaged], [new for _, new in averaged]
        self._counters, self._counts = [own for own, _ in counters], [new for _, new in counters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model after its update number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)
        if self._counters:
            torch._foreach_copy_(self._counters, self._counts)
