"""Row 7: what a cached soft label costs to read, and what memory that takes, from 10^4 to 10^7 rows."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.children import ROOT
from benchmarks.measure import Goal, Row, interleaved, medians, row
from benchmarks.setting import Bench
from kd_dist.errors import UserError

VIEWS = 10
IMAGES = (10**3, 10**4, 10**5, 10**6)
"""A larger set for the cost: an epoch reads one view of each image, so ten times the views alone put what is read ten
times as far apart.
"""

LONG = (10**5, 100)
"""More views of as many images for the memory: names and labels are loaded, so it grows with the images of a set."""

ALIKE = Goal(1.5, at_least=False)
FLAT = Goal(1.1, at_least=False)


def reading(bench: Bench) -> Iterator[Row]:
    """Each size in a process of its own, in turns: the dearest read over the cheapest, and a process's own memory at
    ten times the rows.
    """
    sizes = IMAGES[:2] if bench.quick else IMAGES
    arms = {str(images * VIEWS): Reading(stored(bench, images, VIEWS)) for images in sizes}
    taken = interleaved(arms, bench.effort(45, least=3))
    microseconds = {f"{rows} rows, us/sample": value for rows, value in medians(taken, 1e6).items()}
    costs = np.stack(list(taken.values()))
    dearest = costs.max(axis=0) / costs.min(axis=0)
    what = f"{sizes[0] * VIEWS:.0e} to {sizes[-1] * VIEWS:.0e} rows".replace("e+0", "e")
    yield row(f"7 dearest / cheapest read a sample, {what}", dearest, goal=ALIKE, facts=microseconds)
    yield _memory(bench, *((sizes[-1], 10 * VIEWS) if bench.quick else LONG))


def _memory(bench: Bench, images: int, views: int) -> Row:
    sizes = {images * v: Reading(stored(bench, images, v)) for v in (views // 10, views)}
    interleaved({str(rows): arm for rows, arm in sizes.items()}, bench.effort(20, least=3))
    (fewer_rows, fewer), (more_rows, more) = sizes.items()
    facts = {f"{rows} rows, own MB": float(np.median(arm.own)) for rows, arm in sizes.items()}
    name = f"7 own memory at {more_rows:.0e} rows / at {fewer_rows:.0e}".replace("e+0", "e")
    return row(name, np.array(more.own) / np.array(fewer.own), goal=FLAT, facts=facts)


def stored(bench: Bench, images: int, views: int) -> Path:
    """A generated cache of this size, written once."""
    path = bench.folder / f"generated-{images}x{views}.h5"
    if not path.exists():
        _run("benchmarks.generated_cache", [str(path), "--images", str(images), "--views", str(views)])
    return path


class Reading:
    """An arm: some epochs of soft labels out of a cache, in a fresh process; gives the seconds a sample took."""

    def __init__(self, path: Path):
        self.arguments = [str(path)]
        self.own: list[float] = []

    def __call__(self) -> float:
        found = json.loads(_run("benchmarks.cache_reads", self.arguments))
        self.own.append(found["private_mb"])
        return found["us_per_sample"] / 1e6


def _run(module: str, arguments: list[str]) -> str:
    result = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise UserError(f"{module} ended with code {result.returncode}; its own message stands above.")
    return result.stdout
