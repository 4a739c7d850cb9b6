"""Other systems, in an environment of their own beside ours (.venv-bench, made by setup_peers.sh): what is there of
them, and the processes they are measured in.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.children import ROOT, Child
from benchmarks.setting import Bench

PYTHON = ROOT / ".venv-bench" / "bin" / "python"
HOW_TO_INSTALL = "not installed here; benchmarks/setup_peers.sh installs it, then `make bench` again"


@cache
def version_of(package: str) -> str | None:
    """The release of a package in the peers' environment, None where it is not there."""
    if not PYTHON.exists():
        return None
    code = f"import importlib.metadata as m, {package}; print(m.version({package!r}))"
    found = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip().splitlines()[-1] if found.returncode == 0 else None


@contextlib.contextmanager
def ffcv_child(bench: Bench) -> Iterator[Child | None]:
    """FFCV on the training images, stored raw once: asked with size=PX it gives the seconds an image took.

    None where it is not installed.
    """
    if version_of("ffcv") is None:
        yield None
        return
    root = Path(bench.data.samples.root).resolve() / "train"
    stored = bench.folder.resolve() / f"train-{bench.data.samples.train.fingerprint[:12]}.beton"
    with Child("benchmarks.ffcv_child", [str(root), str(stored), str(bench.threads)], python=str(PYTHON)) as child:
        yield child


def torchdistill_child() -> Child:
    """torchdistill's own training with cached teacher outputs; asked with the job it gives the seconds of its parts."""
    return Child("benchmarks.torchdistill_child", python=str(PYTHON))
