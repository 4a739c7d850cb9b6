"""What a network draws at random in a step, for dropout and the like, as a function of (seed, step, rank)."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


class StepRandomness:
    """Seeds torch before each step, so that a resumed run draws what the uninterrupted one did.

    Seeding costs more than a small network's loss on the host. So the first step that a process takes decides: where it
    draws nothing, later steps are not seeded. A network that begins to draw in a later step is not resumed exactly.
    """

    def __init__(self, seed: int, rank: int, device: torch.device):
        self.seed, self.rank, self.device = seed, rank, device
        self._draws: bool | None = None

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """A step is taken within."""
        if self._draws is None:
            self._seed(step)
            before = self._state()
            yield
            self._draws = not torch.equal(before, self._state())
            return
        if self._draws:
            self._seed(step)
        yield

    def _seed(self, step: int) -> None:
        words = np.random.SeedSequence([self.seed, step, self.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))

    def _state(self) -> torch.Tensor:
        """The state of the generators of host and device: uint8, on the host."""
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return torch.cat(states)
