"""Claim a run folder and keep it."""

import sys
import time
from pathlib import Path

from kd_dist.run.claim import claim
from kd_dist.run.folder import RunFolder

claim(RunFolder(Path(sys.argv[1])), "student", {}, set(), False)
print("mine", flush=True)
time.sleep(60)
