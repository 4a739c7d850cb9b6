"""What training keeps an eye on: sums of its losses over an epoch, and whether losses and weights are finite.

Everything stays on the device until the ranks synchronise, so that no step waits for the device.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class EpochSums:
    """Sums over the current epoch: of images and loss terms over all ranks, and of this rank's clock.

    The clock is read when the terms are fetched, because the device has then done what was counted.
    """

    def __init__(
        self, names: Sequence[str] = (), totals: Sequence[float] = (), seconds: float = 0.0, wait_seconds: float = 0.0
    ):
        self.names, self.totals = list(names), list(totals)  # totals[0] counts images, the rest go with names
        self.seconds, self.wait_seconds = seconds, wait_seconds
        self.recent: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that an epoch cut in two reports the sums of the whole."""
        return {"names": self.names, "totals": self.totals, "seconds": self.seconds, "wait_seconds": self.wait_seconds}

    def start_clock(self) -> None:
        """Training continues from now; what came before, such as a save, does not count."""
        self._since = time.monotonic()

    def stop_clock(self) -> None:
        """Count the time since the clock was started or stopped."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens within as waiting for data."""
        started = time.monotonic()
        yield
        self.wait_seconds += time.monotonic() - started

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

    def row(self) -> dict[str, float]:
        """The epoch's training metrics."""
        means = {f"train_{name}": self.mean(name) for name in self.names}
        return {**means, "images_per_s": self.images_per_second, "data_wait_s": self.wait_seconds}


class LossWatch:
    """This rank's loss terms of the steps since the last fetch, and the first step whose total was not finite."""

    def __init__(self):
        self.names: list[str] = []
        self.first_bad: tuple[int, dict[str, float]] | None = None
        self._steps: list[int] = []
        self._sums: list[Tensor] = []  # [terms] of each step, on the device
        self._images = 0

    def add(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Note the losses [B] of this rank's images in a step: two launches on a GPU."""
        self.names = sorted(losses)
        self._steps.append(step)
        self._sums.append(torch.stack([losses[name].detach() for name in self.names]).sum(dim=1))
        self._images += len(losses["total"])

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


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite."""
    return bool(torch.isfinite(values).all())


def weights_are_finite(model: nn.Module) -> bool:
    """Whether all weights and running statistics are finite, found in a few launches. Waits for the device."""
    values = [value.detach() for value in model.state_dict().values() if value.is_floating_point()]
    # A norm is infinite or not a number where one value is; a sum of squares can also overflow, a largest magnitude
    # cannot, but takes ten times as long on a CPU.
    return any(is_finite(torch.stack(torch._foreach_norm(values, order))) for order in (2, float("inf")))
