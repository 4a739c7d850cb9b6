"""How many CPU cores this process may use."""

import os

GPU_WORKERS = 8


def available_cores() -> int:
    """The cores that the scheduler, taskset or a container's cpuset left to this process, which may be fewer than the
    machine has.
    """
    return len(os.sched_getaffinity(0))


def spare_cores(device_type: str, ranks_here: int) -> int:
    """Cores that a rank may use besides its own: none on a CPU, up to 8 on a GPU."""
    if device_type == "cpu":
        return 0
    return min(GPU_WORKERS, max(1, available_cores() // ranks_here - 1))
