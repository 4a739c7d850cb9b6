"""How the ranks of a job find each other, and what is refused before they compute: tasks without ranks, an address that
leads nowhere, more ranks than GPUs.
"""

import contextlib
import json
import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from kd_dist.dist.endings import environment_number, largest_number
from kd_dist.errors import MachineError, UnreachableError, UserError
from kd_dist.tables import counted

RENDEZVOUS_SECONDS = 10.0  # how long rank 0's port may stay closed; KD_DIST_RENDEZVOUS_SECONDS changes it
POLL_SECONDS = 0.2
# Endings of the names by which parallel starters of all kinds count their tasks.
TASK_COUNTS = ("_STEP_NUM_TASKS", "_COMM_WORLD_SIZE", "PMI_SIZE")


def refuse_strays() -> None:
    """Refuse to be one of several tasks without a rank: each would be a whole job in the same folder."""
    tasks = largest_number(TASK_COUNTS)
    if tasks > 1 and environment_number("WORLD_SIZE") is None:
        raise UserError(
            f"{tasks} tasks were started side by side without RANK and WORLD_SIZE, so each would train alone in the "
            "same folder; start them with `python -m launch.submit`, or one task per node with `srun torchrun` (see slurm/)."
        )


def choose_device(device: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of a rank: its own GPU, or the CPU. Raises UserError where the GPUs asked for are not there."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and visible == 0):
        return torch.device("cpu")
    if visible == 0:
        raise MachineError(
            "--device cuda, but no GPU is visible here; use --device cpu, or look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES."
        )
    if visible == 1:  # the machine's only one, or this rank's own of several: the ranks compare them later
        return torch.device("cuda", 0)
    if visible < local_world_size:
        raise MachineError(
            f"{local_world_size} ranks but only {counted(visible, 'visible GPU')} on this machine; use "
            f"--nproc_per_node={visible}, or --device cpu to run without GPUs."
        )
    return torch.device("cuda", local_rank)


def open_store(rank: int, world_size: int, several_machines: bool, seconds: float) -> dist.Store:
    """The store that all ranks share, at MASTER_ADDR and MASTER_PORT. Raises UserError where it cannot be reached."""
    check_master_address(rank, several_machines)
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=seconds)))
    except (dist.DistError, ValueError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise UserError(
                f"the port of {address} is in use; choose another by --master_port, or use torchrun --standalone."
            ) from error
        raise UserError(
            f"rendezvous failed at {address} (MASTER_ADDR:MASTER_PORT): {str(error).splitlines()[0]}; check that every "
            "node can reach this address."
        ) from error
    return store


def check_master_address(rank: int, several_machines: bool) -> None:
    """Raise UserError where rank 0's address does not resolve or its port stays closed, which torch takes half an hour
    to report. Under torchrun the launchers have met already.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4]
    except OSError as error:
        raise UnreachableError(
            f"MASTER_ADDR {host}:{port} does not resolve on {socket.gethostname()} ({error.strerror or error}); set "
            "MASTER_ADDR to a name of rank 0's machine that resolves on all nodes."
        ) from error
    if rank != 0 and not _opens(address):
        loopback = several_machines and str(address[0]).startswith(("127.", "::1"))
        hint = ", a loopback address, leads to this machine itself" if loopback else ""
        raise UnreachableError(
            f"nothing answers at MASTER_ADDR:MASTER_PORT {host}:{port} ({address[0]}{hint}) as seen from "
            f"{socket.gethostname()}; check that rank 0 runs there and that no firewall blocks the port."
        )


def _opens(address: tuple) -> bool:
    patience = float(os.environ.get("KD_DIST_RENDEZVOUS_SECONDS", RENDEZVOUS_SECONDS))
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(address[:2], timeout=min(5.0, patience)).close()
            return True
        time.sleep(POLL_SECONDS)
    return False


def refuse_shared_gpus(device: torch.device, rank: int, world_size: int, store: dist.Store) -> None:
    """Raise UserError on all ranks where two of them have the same GPU. Before NCCL starts: its own text names none."""
    if device.type != "cuda":
        return
    mine = [socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)]
    store.set(f"kd_dist/gpu/{rank}", json.dumps(mine))
    everyone = [json.loads(store.get(f"kd_dist/gpu/{other}")) for other in range(world_size)]
    here = [gpu for host, gpu in everyone if host == mine[0]]
    if len({tuple(gpu) for gpu in everyone}) < world_size:
        raise UserError(
            f"{len(here)} ranks but only {counted(len(set(here)), 'visible GPU')} on this machine; use "
            f"--nproc_per_node={len(set(here))}, or --device cpu to run without GPUs."
        )
