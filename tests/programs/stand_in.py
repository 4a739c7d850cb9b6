"""In the place of a job: ends, fails, dies or waits as its first argument says."""

import os
import signal
import sys
import time

do = sys.argv[1]
print("stand-in", *sys.argv[1:], *(os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")))
print("colour", os.environ.get("COLOUR"), "job", os.environ["KD_DIST_JOB"])
print("patience", os.environ.get("KD_DIST_RENDEZVOUS_SECONDS"), "unbuffered", os.environ.get("PYTHONUNBUFFERED"))


def leave(number, frame):
    print("saved")
    os._exit(128 + number)


for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN if do == "deaf" else leave)
print("ready")
if do == "fail":
    sys.exit("kd_dist: wrong on purpose.")
if do == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if do == "lose":
    sys.exit(3)
while do != "finish":
    time.sleep(0.05)
