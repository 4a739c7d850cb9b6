"""A writer that hangs in its fourth block, to be killed there."""

import os
import sys
import time
from pathlib import Path

from test_cache_format import plan_of, put_all

from kd_dist.cache import BlockWriter

writer = BlockWriter(Path(sys.argv[1]), plan_of())
put_all(writer, writer.missing()[:3])


def hang(*paths):
    print("in the middle of the fourth", flush=True)
    time.sleep(60)


os.replace = hang
put_all(writer, writer.missing()[:1])
