"""The code as it was at submission: a pending or requeued job runs this copy, whatever happens to the working tree
meanwhile.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kd_dist.files import writing
from launch.folders import CODE, JOBS

PACKAGES = ("kd_dist", "launch")
_ROOT = Path(__file__).resolve().parent.parent


def snapshot(runs: Path, root: Path = _ROOT) -> Path:
    """Copy the packages under runs/jobs/code, once for each content, and give the folder to put on PYTHONPATH.

    Raises UserError where it cannot be written.
    """
    files = list(_sources(root))
    target = runs / JOBS / CODE / _digest(root, files)
    if not target.exists():
        with writing(target):
            _copy(root, files, target)
    return target


def _copy(root: Path, files: list[Path], target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for file in files:
        copy = temporary / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    try:
        temporary.rename(target)
    except OSError:  # another submission of the same code was first
        shutil.rmtree(temporary)


def _sources(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((root / package).rglob("*.py"))


def _digest(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]
