"""This process among its ranks: its device, its share of the work, reductions, and what one rank does for all.

Ranks come from torch's own variables (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), which
torchrun sets and our Slurm launcher too. With none of them set this is one process and no process group is made.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kd_dist.dist import endings
from kd_dist.dist.endings import Interrupted, StopRequest, ignore_stop_signals, launched_rank, run_entry
from kd_dist.errors import Failure, UserError
from kd_dist.dist.rendezvous import choose_device, open_store, refuse_shared_gpus, refuse_strays
from kd_dist.dist.watch import Watch

# How long a rank may wait for another one inside a collective. The watch ends a job whose rank is dead or silent long
# before. What is left is a rank that lives and is late: it reads a slow disk, compiles, or tries kernels. What takes
# rank 0 longer (a download, publishing a cache) is waited for outside of collectives.
COLLECTIVE_SECONDS = 600.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Runtime:
    """One process's place in the group, and what it can ask of the group."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    store: dist.Store | None
    watch: Watch | None = None
    _waits: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, count: int) -> range:
        """This rank's part of range(count): every number on exactly one rank."""
        return range(self.rank, count, self.world_size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a CPU tensor, on every rank, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def take_from_main(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite tensors by rank 0's, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Let rank 0 do something, and give its result, or raise its UserError, on every rank.

        The others wait outside any collective, so the work may take long.
        """
        outcome = self._outcome(work) if self.is_main else None
        self.wait_for_all()
        return self._result(self.gather(outcome)[0])

    def once_a_node(self, task: str, work: Callable[[], Any]) -> Any:
        """Let one process per node do something long while its peers wait outside any collective.

        Gives its result, which must be plain JSON, on every rank of the node, and raises its UserError there.
        """
        if self.store is None:
            return work()
        key = f"kd_dist/{task}/{self.rank - self.local_rank}"
        if self.local_rank == 0:
            self.store.set(key, json.dumps(self._outcome(work)))
        self._wait_for(self.store, key)
        return self._result(json.loads(self.store.get(key)))

    def wait_for_all(self) -> None:
        """Wait outside any collective until all ranks are here, however long the slowest takes. Raises Interrupted
        where a peer was stopped and has left.
        """
        if self.store is None:
            return
        key = f"kd_dist/wait/{next(self._waits)}"
        if self.store.add(key, 1) == self.world_size:
            self.store.set(f"{key}/all", "")
        self._wait_for(self.store, f"{key}/all")

    def _wait_for(self, store: dist.Store, key: str) -> None:
        """Wait for a key of the store in Python, where signals are handled; the store's own wait warns when it ends."""
        pause = 0.001
        while not store.check([key]):
            if self.watch and self.watch.stopped_by:
                raise Interrupted(self.watch.stopped_by)
            time.sleep(pause)
            pause = min(1.5 * pause, POLL_SECONDS)

    @property
    def failure(self) -> Failure | None:
        """Why some rank fails, None while none does."""
        return self.watch.failure if self.watch else None

    @staticmethod
    def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
        try:
            return {"result": work(), "error": None}
        except UserError as error:
            return {"result": None, "error": str(error)}

    @staticmethod
    def _result(outcome: dict[str, Any]) -> Any:
        if outcome["error"] is not None:
            raise UserError(outcome["error"])
        return outcome["result"]


def launched_world_size() -> int:
    """How many ranks the launcher started, 1 where there is none; needs no process group."""
    return endings.environment_number("WORLD_SIZE") or 1


@contextlib.contextmanager
def joined(device: str = "auto", timeout_seconds: float = COLLECTIVE_SECONDS) -> Iterator[Runtime]:
    """Join the process group that the environment describes, and leave it at the end.

    Raises UserError for a device that is not there, more ranks than GPUs, or a rendezvous that cannot be reached.
    """
    refuse_strays()
    number = endings.environment_number
    rank, world_size, local_rank = launched_rank(), launched_world_size(), number("LOCAL_RANK") or 0
    local_world_size = number("LOCAL_WORLD_SIZE") or 1
    chosen = choose_device(device, local_rank, local_world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    watch = Watch(rank, endings.end_after) if "RANK" in os.environ else None
    endings.watch_by(watch, None)
    store = None
    if world_size > 1:
        assert watch is not None  # who sets WORLD_SIZE sets RANK
        several_machines = local_world_size < world_size
        store = open_store(rank, world_size, several_machines, timeout_seconds)
        watch.connect(world_size, not several_machines, store, timeout_seconds)
        endings.watch_by(watch, store.clone())
        refuse_shared_gpus(chosen, rank, world_size, store)
        _make_group(chosen, rank, world_size, store, timeout_seconds)
    yield Runtime(rank, world_size, local_rank, local_world_size, chosen, store, watch)
    if watch is not None:
        watch.leave()
    endings.watch_by(None, None)
    if store is not None:
        dist.destroy_process_group()


def _make_group(device: torch.device, rank: int, world_size: int, store: dist.Store, timeout_seconds: float) -> None:
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("kd_dist/group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if on_gpu else None,  # NCCL starts here, where its errors are told from a step's
    )
