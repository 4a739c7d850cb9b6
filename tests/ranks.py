"""Run a function on N gloo ranks, each a process of its own, and collect what it gives."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

PATIENCE_SECONDS = 180.0


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(runtime, *arguments) of rank 0, of rank 1, ...]. The function lives at the top of a module; its result
    is pickled.

    An exception in a rank is raised here, as an AssertionError with that rank's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "h5py", "kd_dist.label", "kd_dist.objectives"])
    results = context.SimpleQueue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, results, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    outcomes = {}
    try:
        while len(outcomes) < world_size:
            rank, outcome = _collect(results, ranks, outcomes)
            outcomes[rank] = outcome
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()
    failed = [text for value, text in outcomes.values() if text]
    assert not failed, "\n".join(failed)
    return [pickle.loads(outcomes[rank][0]) for rank in range(world_size)]


def _collect(results, ranks, outcomes):
    waited = 0.0
    while results.empty():
        ranks[0].join(timeout=0.05)
        waited += 0.05
        gone = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        said = "\n".join(text for _, text in outcomes.values() if text)  # the others end when one has failed
        assert not gone or not results.empty(), f"ranks {gone} died\n{said}"
        assert waited < PATIENCE_SECONDS or any(process.is_alive() for process in ranks), "the ranks gave nothing"
    return results.get()


def _rank(rank, world_size, port, results, function, arguments):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import torch

    from kd_dist.runtime import joined

    torch.set_num_threads(1)
    try:
        with joined("cpu", timeout_seconds=60) as runtime:
            # Pickled here: the queue would pass tensors on as shared memory, which ends with its sender.
            results.put((rank, (pickle.dumps(function(runtime, *arguments)), None)))
    except BaseException:
        results.put((rank, (None, f"rank {rank}: {traceback.format_exc()}")))
