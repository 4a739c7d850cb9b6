"""Open a cache with bytes changed or cut off at random; count what was opened and what was refused."""

import random
import signal
import sys
from pathlib import Path

from test_cache_format import write_checksum

from kd_dist.cache import open_cache
from kd_dist.errors import UserError

source, path, rng = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), random.Random(0)
outcomes = {"opened": 0, "refused": 0}
for case in range(160):
    content = bytearray(source)
    position = rng.randrange(9, rng.choice([len(source), 6_000, 40_000]))
    if case % 4 == 0:
        del content[position:]
    elif case % 4 == 1:
        content[position : position + 8] = bytes([rng.choice([0, 255])]) * len(content[position : position + 8])
    else:
        content[position] = rng.randrange(256)
    path.write_bytes(content)
    write_checksum(path)
    print(case, position, flush=True)
    signal.alarm(60)
    try:
        open_cache(path)
        outcomes["opened"] += 1
    except UserError as error:
        assert "\n" not in str(error)
        outcomes["refused"] += 1
print(outcomes)
