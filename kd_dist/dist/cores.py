"""How many CPU cores this process may use."""

import os


def available_cores() -> int:
    """The cores that the scheduler, taskset or a container's cpuset left to this process, which may be fewer than the
    machine has.
    """
    return len(os.sched_getaffinity(0))
