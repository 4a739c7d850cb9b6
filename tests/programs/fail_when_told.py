"""Begin to make a folder, and fail as soon as the file `told` is there."""

import sys
import time
from pathlib import Path

from kd_dist.data.archives import make_folder
from kd_dist.data.layout import is_set
from kd_dist.errors import UserError

folder = Path(sys.argv[1])


def fails(making: Path) -> None:
    print("begun", flush=True)
    while not (folder / "told").exists():
        time.sleep(0.01)
    raise UserError("no network")


make_folder(folder / "it", is_set, fails)
