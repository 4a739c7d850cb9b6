"""Row 5: a cache written by the job's own code, over the teacher's bare forward pass on as many images."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks.measure import Goal, Row, images_per_second, interleaved, row
from benchmarks.setting import Bench
from benchmarks.steps import synchronise
from kd_dist import label
from kd_dist.dist.endings import StopRequest
from kd_dist.images import views
from kd_dist.inference import FORWARD_BATCH, autocast, compute_dtype
from kd_dist.job import Data

NEARLY_ALL = Goal(0.95)
VIEWS = 2
QUICK = {"train": 48, "val": 16}
FEW = {"train": 1024, "val": 256}  # enough for blocks that can overlap
KEPT_BATCHES = 8  # of images for the bare pass: it goes round them


def writing(bench: Bench) -> Iterator[Row]:
    """Images a second into a finished, checked, published cache, and through the network alone."""
    few = bench.quick or not bench.on_gpu
    counts = QUICK if bench.quick else FEW
    data = first_images(bench.data, counts) if few else bench.data
    writer = Writing(bench, data, VIEWS if few else 4 * VIEWS)
    arms = {"cache writing": writer, "bare forward pass": BareForward(bench, data, writer)}
    taken, own = interleaved(arms, bench.effort(60, least=3)), bench.teacher
    yield row(
        f"5 cache writing / bare forward pass, {own.labelling.teacher} {own.augmentation.image_size} px",
        taken["bare forward pass"] / taken["cache writing"],
        goal=NEARLY_ALL,
        facts={**images_per_second(taken), "rows": writer.rows},
    )


def first_images(data: Data, counts: dict[str, int]) -> Data:
    """The same data cut down to the first images of each split."""
    return chosen(data, {split: np.arange(min(count, len(data.pixels[split]))) for split, count in counts.items()})


def chosen(data: Data, rows: dict[str, np.ndarray]) -> Data:
    """The same data with these rows of its splits alone; their images stay where they are."""
    samples = {split: data.samples.split(split).at(rows_M, split) for split, rows_M in rows.items()}
    pixels = {split: data.pixels[split].at(rows_M) for split, rows_M in rows.items()}
    return replace(data, samples=replace(data.samples, **samples), pixels=pixels)


class Writing:
    """An arm: a cache from nothing to its published file; gives the seconds an image took."""

    def __init__(self, bench: Bench, data: Data, views_V: int):
        teacher = bench.untrained
        dtype = compute_dtype(bench.runtime.device, bench.teacher.run.precision)
        self.plan = label.plan(
            [teacher], data, label.ViewRule(views_V, bench.teacher.augmentation.crop_scale, seed=0), dtype
        )
        self.labeller = label.Labeller([teacher], data, self.plan.header, bench.runtime.device)
        self.target, self.runtime = bench.folder / "written.h5", bench.runtime
        self.rows = sum(table.flip_NV.size for table in self.plan.tables.values())

    def __call__(self) -> float:
        for left in self.target.parent.glob(f"{self.target.name}*"):
            left.unlink()
        started = time.perf_counter()
        with StopRequest() as stop:
            label.write_cache(self.target, self.plan, self.labeller, self.runtime, stop, lambda done, total: None)
        return (time.perf_counter() - started) / self.rows


class BareForward:
    """An arm: the network alone on as many images in the same batches, rendered and normalised beforehand."""

    def __init__(self, bench: Bench, data: Data, writer: Writing):
        header, tables = writer.plan.header, writer.plan.tables
        self.model, self.device, self.dtype = bench.untrained.model, bench.runtime.device, header.compute_dtype
        normalise = views.Normalise(header.mean, header.std, torch.float32, self.device)
        table, pixels = tables["train"], data.pixels["train"]
        self.batches = []
        for start in range(0, min(len(table), KEPT_BATCHES * FORWARD_BATCH), FORWARD_BATCH):
            rows_B = np.arange(start, min(len(table), start + FORWARD_BATCH))
            shown = views.Shown.plain(rows_B, table.box_NV4[rows_B, -1], table.flip_NV[rows_B, -1])
            self.batches.append(normalise(pixels.show(shown, header.image_size).to(self.device)))
        self.lengths = [
            min(FORWARD_BATCH, len(table) - start)
            for table in tables.values()
            for _ in range(table.flip_NV.shape[1])
            for start in range(0, len(table), FORWARD_BATCH)
        ]

    @torch.inference_mode()
    def __call__(self) -> float:
        synchronise(self.device)
        started, logits = time.perf_counter(), []
        for turn, length in enumerate(self.lengths):
            with autocast(self.device, self.dtype):
                logits.append(self.model(self.batches[turn % len(self.batches)][:length]))
        np.asarray(torch.cat(logits).float().cpu())
        return (time.perf_counter() - started) / sum(self.lengths)
