"""The code as it was at submission: a pending or requeued job runs this copy, whatever happens to the working tree
meanwhile.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import kd_dist
from kd_dist.files import writing

from .folders import CODE, JOBS

# The name that each package is imported by -> its folder. A checkout's launch/ is installed as kd_dist.launch.
PACKAGES = {"kd_dist": Path(kd_dist.__file__).resolve().parent, __package__: Path(__file__).resolve().parent}


def snapshot(runs: Path, packages: Mapping[str, Path] = PACKAGES) -> Path:
    """Copy the packages under runs/jobs/code, once for each content, and give the folder to put on PYTHONPATH.

    Raises UserError where it cannot be written.
    """
    files = _sources(packages)
    target = runs / JOBS / CODE / _digest(files)
    if not target.exists():
        with writing(target):
            _copy(files, target)
    return target


def _copy(files: Mapping[Path, Path], target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for name, file in files.items():
        copy = temporary / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    try:
        temporary.rename(target)
    except OSError:  # another submission of the same code was first
        shutil.rmtree(temporary)


def _sources(packages: Mapping[str, Path]) -> dict[Path, Path]:
    """Where each file goes in the copy -> where it is."""
    return {
        Path(*package.split("."), file.relative_to(folder)): file
        for package, folder in packages.items()
        for file in sorted(folder.rglob("*.py"))
    }


def _digest(files: Mapping[Path, Path]) -> str:
    digest = hashlib.sha256()
    for name, file in files.items():
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]
