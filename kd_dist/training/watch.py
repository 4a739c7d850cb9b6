"""What training keeps an eye on: sums of its losses over an epoch, whether losses and weights are finite, and how fast
and how large everything is.

Everything stays on the device until the ranks synchronise, so that no step waits for the device.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class EpochSums:
    """Sums over the current epoch: of images and loss terms over all ranks, and of this rank's clock.

    The clock is read when the terms are fetched, because the device has then done what was counted.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        totals: Sequence[float] = (),
        seconds: float = 0.0,
        wait_seconds: float = 0.0,
        grad_norm: float | None = None,
    ):
        self.names, self.totals = list(names), list(totals)  # totals[0] counts images, the rest go with names
        self.seconds, self.wait_seconds, self.grad_norm = seconds, wait_seconds, grad_norm
        self.recent: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that an epoch cut in two reports the sums of the whole."""
        return {
            **{"names": self.names, "totals": self.totals, "seconds": self.seconds},
            **{"wait_seconds": self.wait_seconds, "grad_norm": self.grad_norm},
        }

    def start_clock(self) -> None:
        """Training continues from now; what came before, such as a save, does not count."""
        self._since = time.monotonic()

    def stop_clock(self) -> None:
        """Count the time since the clock was started or stopped."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now

    def waited_for(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; counts the time until each one comes as waiting for data."""
        while True:
            started = time.monotonic()
            item = next(items, None)
            self.wait_seconds += time.monotonic() - started
            if item is None:
                return
            yield item

    def add(self, names: list[str], sums: Tensor) -> None:
        """Add sums over all ranks, float64 [1 + terms] with the number of images first; `recent` becomes the mean of
        each term over these images alone.
        """
        self.names = names
        self.totals = [old + new for old, new in zip(self.totals or [0.0] * len(sums), sums.tolist(), strict=True)]
        self.recent = dict(zip(names, (sums[1:] / sums[0]).tolist(), strict=True))

    @property
    def images_per_second(self) -> float:
        return self.totals[0] / max(self.seconds, 1e-9)

    def mean(self, name: str) -> float:
        """The mean of a loss term over the epoch's images so far."""
        return self.totals[1 + self.names.index(name)] / max(self.totals[0], 1)

    def row(self) -> dict[str, float | None]:
        """The epoch's training metrics."""
        means = {f"train_{name}": self.mean(name) for name in self.names}
        return {**means, "images_per_s": self.images_per_second, "train_s": self.seconds, "grad_norm": self.grad_norm}


class LossWatch:
    """This rank's loss terms of the steps since the last fetch, and the first step whose total was not finite."""

    def __init__(self):
        self.names: list[str] = []
        self.first_bad: tuple[int, dict[str, float]] | None = None
        self._grad_norm: Tensor | None = None  # on the device
        self._steps: list[int] = []
        self._sums: list[Tensor] = []  # [terms] of each step, on the device
        self._images = 0

    def add(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Note the losses [B] of this rank's images in a step: two launches on a GPU."""
        self.names = sorted(losses)
        self._steps.append(step)
        self._sums.append(torch.stack([losses[name].detach() for name in self.names]).sum(dim=1))
        self._images += len(losses["total"])

    def note_gradient(self, model: nn.Module) -> None:
        """Note the norm of the gradient; its last value is kept."""
        self._grad_norm = norm_of([weight.grad for weight in model.parameters() if weight.grad is not None])

    def fetch_grad_norm(self) -> float | None:
        """The norm noted since the last call, if one was. Waits for the device."""
        norm, self._grad_norm = self._grad_norm, None
        return None if norm is None else float(norm)

    def fetch(self) -> Tensor:
        """The sums of images and terms since the last call, float64 [1 + terms] on the CPU. Waits for the device."""
        sums_ST = torch.stack(self._sums).cpu().double()
        total_S = sums_ST[:, self.names.index("total")]
        if self.first_bad is None and not is_finite(total_S):
            first = int((~torch.isfinite(total_S)).nonzero()[0])
            self.first_bad = self._steps[first], dict(zip(self.names, sums_ST[first].tolist(), strict=True))
        taken = torch.cat([torch.tensor([self._images], dtype=torch.float64), sums_ST.sum(dim=0)])
        self._steps, self._sums, self._images = [], [], 0
        return taken


class StepClock:
    """How long this rank's steps took in the epoch, and its forward passes, in which it waits for no other rank.

    On a GPU the device notes the times, and they are read when it has done the steps: no step waits. Steps before a
    resume are not included.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Begin an epoch."""
        self.steps_s: list[float] = []
        self.forward_s = 0.0
        self._marks: list[tuple[Any, Any, Any]] = []
        self.pause()

    def pause(self) -> None:
        """What happens until the next step, such as a save, is no part of it."""
        self._last: Any = None

    def mark(self) -> Any:
        """This moment in the device's work."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begin: Any, loss_known: Any, end: Any) -> None:
        """Note a step by three marks."""
        self._marks.append((begin, loss_known, end))

    def read(self) -> None:
        """Read the marks; the device has passed them."""
        for begin, loss_known, end in self._marks:
            self.steps_s.append(_between(begin if self._last is None else self._last, end))
            self.forward_s += _between(begin, loss_known)
            self._last = end
        self._marks = []


def _between(begin: Any, end: Any) -> float:
    """Seconds between two marks."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def norm_of(values: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all values together, on their device, in a few launches."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(values))))


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite."""
    return bool(torch.isfinite(values).all())


def weights_are_finite(model: nn.Module) -> bool:
    """Whether all weights and running statistics are finite, found in a few launches. Waits for the device."""
    values = [value.detach() for value in model.state_dict().values() if value.is_floating_point()]
    # A norm is infinite or not a number where one value is; a sum of squares can also overflow, a largest magnitude
    # cannot, but takes ten times as long on a CPU.
    return any(is_finite(torch.stack(torch._foreach_norm(values, order))) for order in (2, float("inf")))
