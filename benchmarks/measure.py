"""What a row of the benchmark is: arms measured in turns, a median with its spread, and a goal that it meets or misses.

A figure of one arm only means little on a machine that does other things too. So the arms of a row take turns (A B A B
...), the ratio is taken within each turn, and the row's value is the median of those ratios; its spread are their
quartiles.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arm = Callable[[], float]
"""Does a fixed amount of work and gives the seconds that one unit of it (a step, an image) took."""


@dataclass(frozen=True)
class Goal:
    """A bound that a value has to reach (at_least) or to stay below."""

    bound: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        """Whether a value is on the right side, the bound itself included."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:,g}"


@dataclass(frozen=True)
class Row:
    """One line of the table. `value` is None where it could not be measured; `note`: why, or what it is of."""

    name: str
    value: float | None
    spread: tuple[float, float] | None = None  # quartiles over rounds
    rounds: int = 1
    unit: str = "x"
    goal: Goal | None = None
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a value."""
        return None if self.goal is None or self.value is None else self.goal.met(self.value)


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds until `seconds` have passed, but no fewer than `least` and no more than `most`."""

    seconds: float
    least: int = 5
    most: int = 200


def interleaved(arms: Mapping[str, Arm], effort: Effort) -> dict[str, np.ndarray]:
    """Let the arms take turns: what each gave in each round, float64 [rounds] by name. One round before is thrown away:
    it pays for files that are not in memory yet and for kernels that are chosen at first use.
    """
    for arm in arms.values():
        arm()
    taken: dict[str, list[float]] = {name: [] for name in arms}
    started, rounds = time.perf_counter(), 0
    while rounds < effort.least or (rounds < effort.most and time.perf_counter() - started < effort.seconds):
        for name, arm in arms.items():
            taken[name].append(arm())
        rounds += 1
    return {name: np.array(values) for name, values in taken.items()}


def row(name: str, values: Sequence[float] | np.ndarray, **rest: Any) -> Row:
    """A row from one value a round: their median, and their quartiles as its spread."""
    low, median, high = np.percentile(np.asarray(values, float), [25, 50, 75])
    return Row(name, float(median), (float(low), float(high)), rounds=len(values), **rest)


def medians(taken: Mapping[str, np.ndarray], scale: float = 1.0) -> dict[str, float]:
    """The median of each arm times `scale`, to go beside a ratio as its facts."""
    return {name: float(np.median(values)) * scale for name, values in taken.items()}


def images_per_second(taken: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The median rate of each arm whose unit is an image."""
    return {f"{name}, images/s": round(float(np.median(1 / values)), 1) for name, values in taken.items()}
