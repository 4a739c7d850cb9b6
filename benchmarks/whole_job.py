"""The whole job, from JPEGs to a student: by phases (row "job"), and beside torchdistill (row 8)."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.cache_writing import chosen
from benchmarks.children import ROOT, Child
from benchmarks.measure import Row, interleaved, medians, row
from benchmarks.setting import Bench
from benchmarks.steps import Steps
from kd_dist import distill, label
from kd_dist.cache import open_cache
from kd_dist.config import DistillConfig
from kd_dist.dist.endings import StopRequest
from kd_dist.errors import UserError
from kd_dist.images.store import build_pixels, open_pixels
from kd_dist.inference import compute_dtype
from kd_dist.job import Data
from kd_dist.run import events
from kd_dist.run.events import Code
from kd_dist.run.folder import RunFolder

EPOCHS = 3
IMAGES = {"train": 1024, "val": 64}
FEW_IMAGES = {"train": 48, "val": 16}

# ---- row 8: the same small whole job by torchdistill


def against_torchdistill(bench: Bench) -> Iterator[Row]:
    """Decode, label one view of each image, train some epochs from these labels: both systems in turns."""
    release = peers.version_of("torchdistill")
    name = f"8 torchdistill {release or '1.1.4'} / ours, seconds of the whole job, {EPOCHS} epochs"
    if release is None:
        yield Row(name, None, note=peers.HOW_TO_INSTALL)
        return
    ours = OurJob(bench)
    with peers.torchdistill_child() as child:
        theirs = TheirJob(child, told(bench, ours.data))
        taken = interleaved({"ours": ours, "torchdistill": theirs}, bench.effort(45, least=2))
    facts = {f"{arm}, s": seconds for arm, seconds in medians(taken).items()}
    facts |= {f"ours, {part}, s": seconds for part, seconds in ours.parts.items()}
    facts |= {f"torchdistill, {part}, s": seconds for part, seconds in theirs.parts.items()}
    own = bench.student
    note = (
        f"{len(ours.data.samples.train)} images, {bench.teacher.labelling.teacher} and {own.distillation.student} at "
        f"{own.augmentation.image_size} px; torchdistill caches one output an image, so all see the centre crop alone"
    )
    yield row(name, taken["torchdistill"] / taken["ours"], facts=facts, note=note)


def told(bench: Bench, data: Data) -> dict:
    """What torchdistill's process is told of the job."""
    return {
        "root": str(Path(data.samples.root).resolve()),
        "paths": list(data.samples.train.paths),
        "labels": data.samples.train.labels_N.tolist(),
        "classes": bench.classes,
        "cache": str((bench.folder / "torchdistill").resolve()),
        "teacher": bench.teacher.labelling.teacher,
        "student": bench.student.distillation.student,
        "size": bench.student.augmentation.image_size,
        "batch": bench.student.optimisation.batch_size,
        "lr": bench.student.optimisation.lr,
        "weight_decay": bench.student.optimisation.weight_decay,
        "alpha": bench.student.distillation.alpha,
        "temperature": bench.student.distillation.temperature,
        "epochs": EPOCHS,
        "threads": bench.threads,
        "workers": bench.threads,
        "device": bench.runtime.device.type,
    }


class TheirJob:
    """An arm: torchdistill's whole job; gives its seconds."""

    def __init__(self, child: Child, told: dict):
        self.child, self.told, self.parts = child, told, {}

    def __call__(self) -> float:
        self.parts = self.child.ask(**self.told)
        return sum(self.parts.values())


class OurJob:
    """An arm: decoding, cache and student's steps by the jobs' own code; gives its seconds."""

    def __init__(self, bench: Bench):
        counts = FEW_IMAGES if bench.quick else IMAGES
        self.bench, self.parts = bench, {}
        self.data = spread(bench.data, counts)
        self.folder = bench.folder / "whole-job"

    def __call__(self) -> float:
        shutil.rmtree(self.folder, ignore_errors=True)
        clock = [time.perf_counter()]
        steps = (self._decode, self._write_cache, self._train)
        for step in steps:
            step()
            clock.append(time.perf_counter())
        self.parts = dict(zip(("decode", "cache", "student"), np.diff(clock).tolist(), strict=True))
        return clock[-1] - clock[0]

    def _decode(self) -> None:
        for split in IMAGES:
            build_pixels(self.data.samples.split(split), self.folder, self.bench.threads, lambda done, total: None)
        pixels = {split: open_pixels(self.data.samples.split(split), self.folder) for split in IMAGES}
        self.data = replace(self.data, pixels=pixels)

    def _write_cache(self) -> None:
        bench, teacher = self.bench, self.bench.untrained
        teacher = replace(teacher, row=replace(teacher.row, image_size=bench.student.augmentation.image_size))
        dtype = compute_dtype(bench.runtime.device, bench.teacher.run.precision)
        rule = label.ViewRule(1, bench.teacher.augmentation.crop_scale, seed=0)
        plan = label.plan([teacher], self.data, rule, dtype)
        labeller = label.Labeller([teacher], self.data, plan.header, bench.runtime.device)
        with StopRequest() as stop:
            label.write_cache(self.folder / "logits.h5", plan, labeller, bench.runtime, stop, lambda done, total: None)

    def _train(self) -> None:
        bench = replace(self.bench, data=self.data)
        settings = bench.settings(DistillConfig, crops="cached")
        supervision = distill.supervision_of(settings, self.data, open_cache(self.folder / "logits.h5"))
        trainer = bench.trainer(settings, bench.network(settings.distillation.student), supervision)
        for _ in range(EPOCHS):
            Steps(trainer, trainer.steps_per_epoch)()


def spread(data: Data, counts: dict[str, int]) -> Data:
    """The same data cut down to so many images of each split, evenly over the list and so over the classes."""
    sizes = {split: len(data.samples.split(split)) for split in counts}
    rows = {split: np.linspace(0, n - 1, min(counts[split], n)).astype(int) for split, n in sizes.items()}
    return chosen(data, rows)


# ---- row "job": the real thing, by phases


def phases(bench: Bench) -> Iterator[Row]:
    """Seconds of each phase of both jobs as a user starts them, one process on one GPU, with the preset's full
    schedules; with --quick a short one on any machine.
    """
    if not (bench.on_gpu or bench.quick):
        return
    folder = bench.folder / "job"
    shutil.rmtree(folder, ignore_errors=True)
    short = ["--epochs", "1", "--image-size", "32", "--batch-size", "16"] if bench.quick else []
    common = ["--data", str(bench.data.samples.root), "--device", bench.runtime.device.type, *short]
    common += ["--pixels-dir", str(folder / "pixels")]
    cache = folder / "teacher" / "logits.h5"
    views = ["--views", "2"] if bench.quick else []
    teacher = seconds_of("kd_dist.teacher", [*common, *views], folder / "teacher")
    student = seconds_of("kd_dist.distill", [*common, "--cache", str(cache)], folder / "student")
    prepared, trained = teacher[Code.TRAINING_STARTED], teacher[Code.LABELLING_STARTED]
    parts = {
        "prepare": prepared,
        "teacher": trained - prepared,
        "cache": teacher[Code.CACHE_PUBLISHED] - trained,
        "student": student["end"],
        "all": teacher["end"] + student["end"],
    }
    for part, seconds in parts.items():
        yield Row(f"job {part}", seconds, unit="s")


def seconds_of(module: str, flags: list[str], out: Path) -> dict[str, float]:
    """Run a job in a new folder `out`; seconds from its start to the first event of each code, and to its "end".

    Raises UserError where it fails.
    """
    began, started = datetime.now(UTC), time.monotonic()
    code = subprocess.run(
        [sys.executable, "-m", module, *flags, "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL
    ).returncode
    seconds = time.monotonic() - started
    if code:
        raise UserError(f"{module} ended with code {code}; its own message stands above.")
    return {**moments(events.read(RunFolder(out).events), began), "end": seconds}


def moments(happened: Iterable[Mapping[str, Any]], began: datetime) -> dict[str, float]:
    """Seconds from `began` to the first event of each code."""
    seconds: dict[str, float] = {}
    for event in happened:
        seconds.setdefault(event["code"], (datetime.fromisoformat(event["time"]) - began).total_seconds())
    return seconds
