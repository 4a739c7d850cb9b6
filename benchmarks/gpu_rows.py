"""The rows that only a GPU has: rates of training, the share of the processor's peak, and memory."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Goal, Row, interleaved, row
from benchmarks.setting import Bench
from benchmarks.steps import Steps
from kd_dist import job
from kd_dist.config import TeacherConfig
from kd_dist.dist.endings import StopRequest
from kd_dist.training import Trainer, objectives

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP a second of the SXM models, from NVIDIA's data sheets, by a part of the device's name."""

RUN_EPOCHS = 5  # of a short run that is timed whole

ON_H100 = {("teacher", 160): Goal(16_000), ("student", 128): Goal(60_000)}


def rates(bench: Bench) -> Iterator[Row]:
    """Images a second of teacher and student: whole steps, and whole short runs with evaluation, metrics and
    checkpoints; with --quick one size on a CPU too.
    """
    if not (bench.on_gpu or bench.quick):
        return
    for size in (32,) if bench.quick else (160, 128):
        yield from _measured(bench, "teacher", size, lambda size=size: _teacher(bench, size))
    size = 32 if bench.quick else 128
    yield from _measured(bench, "student", size, lambda: bench.student_trainer(image_size=size, student="cnn5"))


def _teacher(bench: Bench, size: int) -> Trainer:
    settings = bench.settings(TeacherConfig, image_size=size)
    terms = objectives.hard(bench.classes, settings.optimisation.label_smoothing)
    crops = job.fresh_crops(settings.augmentation, settings.seed, bench.data)
    return bench.trainer(settings, bench.network(settings.labelling.teacher), job.Supervision(terms, crops))


def _measured(bench: Bench, who: str, size: int, make: Callable[[], Trainer]) -> Iterator[Row]:
    device, trainer = bench.runtime.device, make()
    batch = trainer.data.batch_size
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    count = 2 if bench.quick else trainer.steps_per_epoch
    taken = interleaved({"step": Steps(trainer, count)}, bench.effort(30))
    rate = batch / taken["step"]
    goal = ON_H100.get((who, size)) if bench.on_gpu and "H100" in torch.cuda.get_device_name(device) else None
    flops = flops_an_image(trainer)
    name = f"{who} training {size} px"
    facts = {"GFLOP an image": flops / 1e9, "batch": batch}
    yield row(f"gpu {name}", rate, unit="images/s", goal=goal, facts=facts)
    peak = peak_flops(device)
    if peak:
        yield row(f"gpu {name}, share of {peak / 1e12:.0f} TFLOP/s", rate * flops / peak)
    yield row(f"gpu {name}, seconds of a whole run / of its steps alone", np.median(rate) / whole_run_rate(bench, make))
    if bench.on_gpu:
        yield Row(f"gpu {name}, peak memory", torch.cuda.max_memory_allocated(device) / 2**30, unit="GiB")


def whole_run_rate(bench: Bench, make: Callable[[], Trainer]) -> np.ndarray:
    """Images a second of short runs from end to end: input, steps, evaluation, metrics, checkpoints; one a round."""
    rates, epochs = [], 1 if bench.quick else RUN_EPOCHS
    for _ in range(1 if bench.quick else 3):
        trainer = make()
        trainer.optimisation = replace(trainer.optimisation, epochs=epochs)
        trainer.total_steps = epochs * trainer.steps_per_epoch
        started = time.perf_counter()
        trainer.run(StopRequest())
        rates.append(epochs * len(trainer.data) / (time.perf_counter() - started))
    return np.array(rates)


def peak_flops(device: torch.device) -> float | None:
    """What the device can do in bfloat16 at best, None for one that is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def flops_an_image(trainer: Trainer) -> float:
    """FLOP that forward and backward of one image take, counted by torch (two for a multiplication and addition)."""
    model = trainer.model.train()
    side = trainer.data.image_size
    images_BCHW = torch.zeros(2, 3, side, side, device=trainer.runtime.device)
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")
        model(images_BCHW).sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(images_BCHW)
