"""Fetch a data set, and die before it gets its name."""

import os
import signal
import sys
from pathlib import Path

from kd_dist.data import fetch
from kd_dist.data.releases import locate

fetch.publish = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
locate(Path(sys.argv[1]), None, sys.argv[2], None, explicit=True)
