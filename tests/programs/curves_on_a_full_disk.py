"""Write curves where no file may be larger than a limit."""

import resource
import sys
import time
from pathlib import Path

from kd_dist.run.monitor import Monitor

with Monitor(Path(sys.argv[1]), enabled=True) as curves:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    for step in range(300):
        curves.scalars(step, {"train/loss": 1.0})
        if step % 50 == 0:
            curves.flush()
    time.sleep(0.2)  # time for the thread to say what it should not
    curves.line("trained to the end")
