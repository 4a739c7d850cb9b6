"""Hold a lock; with "fork" as second argument have a child that outlives this process."""

import os
import sys
import time
from pathlib import Path

from kd_dist import lock

assert lock.take(Path(sys.argv[1])) is not None
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(30)
print(os.getpid(), flush=True)
time.sleep(30)
