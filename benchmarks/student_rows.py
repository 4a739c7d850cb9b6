"""Rows 1, 2, 4 and 9: what soft labels, a teacher in the loop, the data and TensorBoard cost the student's step."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import Goal, Row, interleaved, medians, row
from benchmarks.setting import Bench
from benchmarks.steps import Steps, synchronise
from kd_dist.inference import autocast
from kd_dist.run.monitor import Monitor
from kd_dist.study.online import OnlineTeacher
from kd_dist.training import Trainer
from kd_dist.training.trainer import GPU_STEPS_BETWEEN_SYNCS

DISTILL_COST = Goal(1.02, at_least=False)
OF_THE_POSSIBLE = Goal(0.95)
FED = Goal(0.97)
WATCHED = Goal(0.01, at_least=False)


def steps_in_turn(bench: Bench) -> int:
    """Steps that an arm takes at a time: few on a CPU, so that both arms see the same machine; an epoch on a GPU."""
    if bench.quick:
        return 1
    return bench.student_trainer().steps_per_epoch if bench.on_gpu else 4


def distillation(bench: Bench) -> Iterator[Row]:
    """Row 1: the distilled step over the hard-label step, same student, same cached crops."""
    count = steps_in_turn(bench)
    arms = {
        "distilled": Steps(bench.student_trainer(), count),
        "hard labels only": Steps(bench.student_trainer(alpha=0.0), count),
    }
    yield step_ratio(bench, "1 distill step / hard-label step", arms, DISTILL_COST)


def step_ratio(bench: Bench, name: str, arms: dict[str, Steps], goal: Goal) -> Row:
    """What a step of the first of two arms takes over one of the second."""
    taken = interleaved(arms, bench.effort(60))
    over, under = taken.values()
    return row(f"{name}, {what(bench)}", over / under, goal=goal, facts=rates(bench, taken))


def teacher_in_the_loop(bench: Bench) -> Iterator[Row]:
    """Row 2: throughput with cached labels over throughput with the teacher's forward pass in every step."""
    count = steps_in_turn(bench)
    looped = bench.student_trainer()
    looped.loss_terms = online(bench)(bench.student, bench.classes)
    arms = {
        "cached": Steps(bench.student_trainer(), count),
        "teacher in the loop": Steps(looped, count),
        "teacher's forward alone": TeacherForward(bench, count),
        "student alone": Steps(bench.student_trainer(alpha=0.0), count, fixed=True),
    }
    taken = interleaved(arms, bench.effort(75))
    gain = taken["teacher in the loop"] / taken["cached"]
    student = taken["student alone"]
    possible = (taken["teacher's forward alone"] + student) / student
    sizes = f"{what(bench)}, {bench.teacher.labelling.teacher} at the same size"
    yield row(f"2 cached labels / teacher in the loop, {sizes}", gain, facts=rates(bench, taken))
    yield row(
        "2 the same as a share of (teacher + student) / student",
        gain / possible,
        goal=OF_THE_POSSIBLE,
        facts={"possible": float(possible.mean())},
    )


def feeding(bench: Bench) -> Iterator[Row]:
    """Row 4: throughput of the whole step over that of the same step on one batch in memory."""
    count = steps_in_turn(bench) * (1 if bench.on_gpu or bench.quick else 2)
    arms = {
        "batch in memory": Steps(bench.student_trainer(), count, fixed=True),
        "whole step": Steps(bench.student_trainer(), count),
    }
    yield step_ratio(bench, "4 whole step / step on a batch in memory", arms, FED)  # throughputs: seconds turned over


def monitoring(bench: Bench) -> Iterator[Row]:
    """Row 9: the host's time in TensorBoard's scalars, clocks and norms, as a share of its time in the steps."""
    trainer, shares = bench.student_trainer(), []
    with TemporaryDirectory() as folder, Monitor(Path(folder), enabled=True) as trainer.monitor:
        spent = Spent(trainer)
        steps = Steps(trainer, 1 if bench.quick else GPU_STEPS_BETWEEN_SYNCS)  # with a norm and a point on each curve
        for _ in range(2 if bench.quick else 5):
            before, started = spent.seconds, time.thread_time()
            steps()
            shares.append((spent.seconds - before) / (time.thread_time() - started))
    yield row(f"9 scalars, clocks and norms / step, {what(bench)}", shares, goal=WATCHED, unit="")


class Spent:
    """Sums up this thread's seconds in what a trainer does for TensorBoard alone."""

    def __init__(self, trainer: Trainer):
        self.seconds = 0.0
        parts = {trainer.clock: ("mark", "add", "read"), trainer.monitor: ("scalars",)}
        parts[trainer.losses] = ("note_gradient", "fetch_grad_norm")
        for owner, names in parts.items():
            for name in names:
                setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function):
        def timed(*arguments):
            started = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.thread_time() - started

        return timed


def what(bench: Bench) -> str:
    """Which student at which size: "cnn5 64 px"."""
    return f"{bench.student.distillation.student} {bench.student.augmentation.image_size} px"


def rates(bench: Bench, taken) -> dict[str, float]:
    """Median seconds of a step, and images a second, of each arm."""
    seconds = {f"{name}, s/step": round(value, 5) for name, value in medians(taken).items()}
    batch = bench.student.optimisation.batch_size
    return seconds | {f"{name}, images/s": round(batch / value, 1) for name, value in medians(taken).items()}


def online(bench: Bench) -> OnlineTeacher:
    """The study's teacher in the loop, which sees the very images that the student does."""
    teacher = bench.untrained
    row = replace(teacher.row, image_size=bench.student.augmentation.image_size)
    return OnlineTeacher(replace(teacher, row=row), bench.data.pixels["train"], bench.runtime.device)


class TeacherForward:
    """An arm: the teacher's forward pass on one batch in memory, in the trainer's precision."""

    def __init__(self, bench: Bench, count: int):
        trainer = bench.student_trainer()
        self.device, self.dtype = bench.runtime.device, trainer.compute_dtype
        batch = next(trainer.data.epoch(0, bench.runtime))
        self.images_BCHW = trainer.prepare(batch).images_BCHW
        self.model, self.count = bench.untrained.model, count

    @torch.no_grad()
    def __call__(self) -> float:
        synchronise(self.device)
        started = time.perf_counter()
        for _ in range(self.count):
            with autocast(self.device, self.dtype):
                self.model(self.images_BCHW)
        synchronise(self.device)
        return (time.perf_counter() - started) / self.count
