"""Threads and loader processes are counted by the cores that this process may use."""

import os

from kd_dist.dist.cores import available_cores


def test_cores_that_were_taken_away_do_not_count():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert available_cores() == len(allowed)
