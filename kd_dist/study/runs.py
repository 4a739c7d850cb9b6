"""Trains the runs of a study: takes the next run that no other process has, until none is left.

All ranks together train one student after the other, or each rank trains students of its own, side by side with the
others. Several commands may share a study's folder, on one machine or on several: the lock of a run's folder decides
who trains it. Knows nothing of results.
"""

import contextlib
import io
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from kd_dist import distill, job
from kd_dist.cache import Cache
from kd_dist.config import StudentConfig, StudyConfig
from kd_dist.dist.endings import Interrupted, StopRequest
from kd_dist.dist.runtime import Runtime
from kd_dist.errors import UserError
from kd_dist.job import Data
from kd_dist.run.claim import is_finished
from kd_dist.run.folder import RunFolder
from kd_dist.run.lock import acquire
from kd_dist.run.state import read_state
from kd_dist.study.arms import Arm
from kd_dist.study.folder import BASE, run_settings
from kd_dist.study.online import OnlineTeacher

PATIENCE_S = 20.0  # for runs of a killed command, whose ranks let go within seconds
LOOK_AGAIN_S = 0.5


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One student of a study: an arm with a seed, and what it learns from."""

    arm: Arm
    seed: int
    settings: StudentConfig
    data: Data
    cache: Cache
    teacher: OnlineTeacher | None
    since: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.settings.out))

    @property
    def identity(self) -> dict[str, str]:
        """What binds the run's folder to this arm, besides its settings."""
        base = {BASE: self.arm.base} if self.arm.base else {}
        return {
            "study arm": self.arm.name,
            **base,
            **({"teacher weights": self.teacher.digest} if self.teacher else {}),
        }

    def is_finished(self) -> bool:
        """Whether this very run is finished. Raises UserError where its folder holds another one."""
        settings = self.settings
        if settings.run.start_over and not self._ended_now("finished"):
            return False
        learned_from = distill.learned_from(settings, self.cache)
        stored = job.stored_settings(settings, self.data, **learned_from, **self.identity)
        return is_finished(self.folder, settings.kind, stored, settings.may_change, settings.completed)

    def failure(self) -> str | None:
        """Why the run failed since this command began, in this process or another one; None where it did not."""
        return (read_state(self.folder) or {}).get("message", "") if self._ended_now("failed") else None

    def _ended_now(self, status: str) -> bool:
        state = read_state(self.folder) or {}
        return state.get("status") == status and datetime.fromisoformat(state["time"]) >= self.since

    def train(self, runtime: Runtime, stop: StopRequest) -> None:
        """Train the student, or resume it."""
        job.say(runtime, f"{self.name}: {self.arm.isolates}")
        distill.run(
            self.settings,
            self.data,
            self.cache,
            runtime,
            rows=self.arm.soft_labels,
            loss=self.teacher or self.arm.loss,
            stop=stop,
            **self.identity,
        )


def planned(
    settings: StudyConfig, arms: Sequence[Arm], data: Data, caches: Mapping[str, Cache], teacher: OnlineTeacher | None
) -> list[PlannedRun]:
    """All runs of a study, a seed's arms together."""
    return [
        PlannedRun(
            arm, seed, run_settings(settings, arm, seed), data, caches[arm.name], teacher if arm.needs_teacher else None
        )
        for seed in settings.seeds
        for arm in arms
    ]


# ---- one process, or ranks that work together


def train_all(runs: Sequence[PlannedRun], runtime: Runtime, stop: StopRequest) -> dict[str, str]:
    """Train runs until none is left that another process does not have.

    A run that fails is left, and the others are trained; where ranks work together the first failure ends all of them.
    Gives the reason of each failure that the run's folder does not have, such as a full disk, by the run's name.
    """
    tried: set[int] = set()
    failed: dict[str, str] = {}
    while True:
        if any(signals := runtime.gather(stop.signal or 0)):
            raise Interrupted(max(signals))
        number = runtime.on_main(lambda: _take(runs, tried))
        if number is None:
            return failed
        tried.add(number)
        run = runs[number]
        try:
            run.train(runtime, stop)
        except UserError as error:
            if runtime.world_size > 1:
                raise
            job.say(runtime, f"{run.name} failed: {error}")
            if run.failure() is None:
                failed[run.name] = str(error)


def _take(runs: Sequence[PlannedRun], tried: set[int]) -> int | None:
    """The number of the next run that is free, which is this process's from now on; None where there is none."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        left = [number for number, run in enumerate(runs) if number not in tried and not run.is_finished()]
        left = [number for number in left if runs[number].failure() is None]
        free = (number for number in left if acquire(runs[number].folder))
        if (number := next(free, None)) is not None or not left or time.monotonic() > deadline:
            return number
        time.sleep(LOOK_AGAIN_S)


def describe(runs: Sequence[PlannedRun], failed: Mapping[str, str], runtime: Runtime) -> bool:
    """Say which runs are left to other processes; True where none is. Raises UserError where runs failed."""
    failed = {**failed, **{run.name: reason for run in runs if (reason := run.failure()) is not None}}
    if failed:
        shown = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(runs)} runs failed ({shown}); the same command tries them again.")
    left = [run.name for run in runs if not run.is_finished()]
    if left:
        job.say(runtime, f"left to other processes: {'; '.join(left)}. The last of them writes the whole table.")
    return not left


# ---- ranks that work side by side


def is_side_by_side(how: str, left: int, runtime: Runtime) -> bool:
    """Whether each rank trains students of its own, as --side-by-side asks. `left`: runs that are not finished."""
    if runtime.world_size == 1 or how != "auto":
        return runtime.world_size > 1 and how == "yes"
    return runtime.device.type == "cuda" and left >= runtime.world_size


def alone(runtime: Runtime) -> Runtime:
    """The same rank on its own device as a world of one. It shares the machine's cores with the others as before."""
    return replace(runtime, rank=0, world_size=1, store=None)


def train_side_by_side(runs: Sequence[PlannedRun], runtime: Runtime, stop: StopRequest) -> tuple[dict[str, str], bool]:
    """`train_all` on each rank alone, then wait for the other ranks. Gives its failures, and whether all went well.

    A defect is printed and the rank takes no more runs (a GPU's error would fail them all); its peers train the rest.
    """
    failed, sound = {}, True
    if runtime.watch:
        runtime.watch.part()
    with contextlib.redirect_stdout(Prefixed(sys.stdout, f"rank {runtime.rank} | ")):
        try:
            failed = train_all(runs, alone(runtime), stop)
        except Exception as error:
            if isinstance(error, (UserError, Interrupted)):
                raise
            traceback.print_exc()
            sound = False
    _wait_for_peers(runtime, stop)
    return failed, sound and not failed


def _wait_for_peers(runtime: Runtime, stop: StopRequest) -> None:
    """Wait until all ranks are here, in no collective: an hour is no time-out. A signal ends it."""
    store, key = runtime.store, "kd_dist/study/done"
    assert store is not None  # runs are side by side where there are several ranks
    store.add(key, 1)
    while store.add(key, 0) < runtime.world_size:
        if stop.signal:
            raise Interrupted(stop.signal)
        time.sleep(LOOK_AGAIN_S)


class Prefixed(io.TextIOBase):
    """A stream that begins each line with a prefix and writes it at once: lines of several ranks do not mix."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self._stream, self._prefix, self._begun = stream, prefix, ""

    def write(self, text: str) -> int:
        """Whole lines are written, the rest is kept until its line ends."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._stream.write(f"{self._prefix}{line}\n")
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()
