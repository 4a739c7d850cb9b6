"""Write a cache where no file may be larger than a limit."""

import resource
import sys
from pathlib import Path

from test_cache_format import plan_of, put_all

from kd_dist.cache import BlockWriter
from kd_dist.errors import UserError

writer = BlockWriter(Path(sys.argv[1]), plan_of())
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    put_all(writer, writer.missing())
    print("all put", flush=True)
    writer.publish()
except UserError as error:
    print(error)
    sys.exit(2)
