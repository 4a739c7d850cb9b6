"""Row 6: what a second rank, and a second thread, bring: the distilled student's steps in processes of their own."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.children import Child, serve, take_standard_output
from benchmarks.measure import Goal, Row, interleaved, medians, row
from benchmarks.setting import Bench
from benchmarks.steps import Steps
from kd_dist.config import DataConfig
from kd_dist.dist.runtime import joined
from kd_dist.job import open_data

TWO_RANKS = Goal(1.9)
GROUPS = {"1 rank x 1 thread": (1, 1), "2 ranks x 1 thread": (2, 1), "1 rank x 2 threads": (1, 2)}
STEPS = 4


def scaling(bench: Bench) -> Iterator[Row]:
    """Throughput at the same batch, over all ranks together. For CPUs: ranks on one GPU would share it."""
    if bench.on_gpu:
        return
    _ = bench.soft_labels  # made here once, not by all ranks of all groups at the same time
    with ExitStack() as stack:
        arms = {name: Group(bench, stack, *size) for name, size in GROUPS.items()}
        taken = interleaved(arms, bench.effort(75))
    one, two, threads = taken.values()
    what = f"{bench.student.distillation.student} {bench.student.augmentation.image_size} px"
    facts = {
        f"{name}, images/s": bench.student.optimisation.batch_size / value for name, value in medians(taken).items()
    }
    yield row(f"6 2 ranks x 1 thread / 1 rank x 1 thread, {what}", one / two, goal=TWO_RANKS, facts=facts)
    yield row(f"6 1 rank x 2 threads / 1 rank x 1 thread, {what}", one / threads)


class Group:
    """An arm: a job of some ranks, each a process, that take steps when asked; gives the slowest rank's seconds."""

    def __init__(self, bench: Bench, stack: ExitStack, ranks: int, threads: int):
        arguments = {"folder": str(bench.folder), "data": str(bench.data.samples.root), "quick": bench.quick}
        arguments |= {"threads": threads, "steps": 1 if bench.quick else STEPS}
        port = free_port()
        self.ranks = [
            stack.enter_context(
                Child("benchmarks.rank_rows", [json.dumps(arguments)], environment=_place(rank, ranks, port, threads))
            )
            for rank in range(ranks)
        ]

    def __call__(self) -> float:
        for rank in self.ranks:
            rank.tell()
        return max(rank.answer()["seconds"] for rank in self.ranks)


def free_port() -> int:
    """A TCP port that nothing listens on right now."""

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _place(rank: int, ranks: int, port: int, threads: int) -> dict[str, str]:
    """torch's own variables, as torchrun sets them."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    numbers |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def main() -> None:
    """One rank of a group."""
    answers = take_standard_output()
    told = json.loads(sys.argv[1])
    torch.set_num_threads(told["threads"])
    with joined("cpu") as runtime:
        data = open_data(DataConfig(data=told["data"]), runtime)
        bench = Bench(data, runtime, Path(told["folder"]), told["threads"], told["quick"])
        steps = Steps(bench.student_trainer(), told["steps"])
        serve(lambda _: {"seconds": steps()}, answers)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
