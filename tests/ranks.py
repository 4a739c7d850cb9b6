"""Run a function, or a command of ours, on N gloo ranks, each a process of its own, and collect what it gives.

The processes are forks of one server that has imported torch and kd_dist already: importing them takes seconds in each
process otherwise, most of a test's time.
"""

import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 180.0
# torch.optim imports torch._dynamo when the first optimizer is made, which takes as long as all the rest.
PRELOADED = ("torch", "torch.distributed", "torch._dynamo", "torch.utils.tensorboard", "torchvision", "h5py")
ENTRIES = ("kd_dist.teacher", "kd_dist.distill", "kd_dist.label", "kd_dist.cache.__main__")


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *ENTRIES])
    return context


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(runtime, *arguments) of rank 0, of rank 1, ...]. The function lives at the top of a module; its result
    is pickled.

    An exception in a rank is raised here, as an AssertionError with that rank's traceback.
    """
    context = _server()
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


def run_command(module: str, *arguments: object, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """`python -m MODULE ARGUMENTS` on so many ranks, without a launcher: nobody ends the ranks that wait for one that
    failed, so only a command of one rank may be refused. Code of the first rank that has one, output of all.
    """
    context, port = _server(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        places = [_place(rank, ranks, port) if ranks > 1 else {} for rank in range(ranks)]
        words = [module, *map(str, arguments)]
        processes = [
            context.Process(target=_command, args=(folder, rank, places[rank], words)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=PATIENCE_SECONDS)
            process.kill()
            process.join()
        out, err = ("".join(Path(folder, f"{rank}.{name}").read_text() for rank in range(ranks)) for name in OUTPUTS)
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    assert not check or code == 0, out + err
    return subprocess.CompletedProcess(words, code, out, err)


OUTPUTS = ("out", "err")


def _command(folder: str, rank: int, place: dict[str, str], words: list[str]) -> None:
    for name, stream in zip(OUTPUTS, (sys.stdout, sys.stderr), strict=True):
        with open(Path(folder, f"{rank}.{name}"), "w") as file:
            os.dup2(file.fileno(), {"out": 1, "err": 2}[name])
        stream.reconfigure(line_buffering=True)
    os.environ.update(place, OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    sys.argv = words
    for name in (words[0], f"{words[0]}.__main__"):
        sys.modules.pop(name, None)  # else runpy warns that it is imported already
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _place(rank: int, world_size: int, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


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
    os.environ.update(_place(rank, world_size, port), OMP_NUM_THREADS="1")
    import torch

    from kd_dist.dist.runtime import joined

    torch.set_num_threads(1)
    try:
        with joined("cpu", timeout_seconds=60) as runtime:
            # Pickled here: the queue would pass tensors on as shared memory, which ends with its sender.
            results.put((rank, (pickle.dumps(function(runtime, *arguments)), None)))
    except BaseException:
        results.put((rank, (None, f"rank {rank}: {traceback.format_exc()}")))
