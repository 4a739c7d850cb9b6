"""Tests on a simulated GPU: torch's CUDA code runs; memory, launches, copies and waits are counted; no kernel runs.

KD_DIST_NULLGPU names the program that starts Python so; the tests are skipped where it is not set. Values are
meaningless there, so these tests are about devices, memory, launches and waits. Each test starts a program of
`programs/`, which prints one line of JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECONDS = 600


def pytest_collection_modifyitems(items) -> None:
    """Mark the tests here, and skip them where no simulator is named."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.nullgpu)
            if not os.environ.get("KD_DIST_NULLGPU"):
                item.add_marker(pytest.mark.skip(reason="KD_DIST_NULLGPU names no simulator"))


def start(arguments: list[str], devices: int = 1, memory_gib: int = 80, **environment: str):
    """Run Python with these arguments on simulated GPUs; gives the finished process, its output as text."""
    command = [os.environ["KD_DIST_NULLGPU"], "--devices", str(devices), "--memory-gib", str(memory_gib), "--"]
    paths = os.pathsep.join([str(HERE / "programs"), str(ROOT / "tests"), str(ROOT)])
    variables = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": paths, **environment}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=SECONDS
    )


@pytest.fixture(scope="session")
def simulated() -> Callable[..., dict[str, Any]]:
    """Runs programs/NAME.py on a simulated GPU and gives the JSON object that its last line is."""

    def run(program: str, *arguments: object, **how) -> dict[str, Any]:
        done = start([str(HERE / "programs" / f"{program}.py"), *map(str, arguments)], **how)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def simulated_job() -> Callable[..., subprocess.CompletedProcess]:
    """Runs a command of kd_dist whole on simulated GPUs, one rank each: job(module, arguments..., devices=2)."""

    def run(module: str, *arguments: object, devices: int = 1, **how) -> subprocess.CompletedProcess:
        job = [str(HERE / "programs" / "job.py"), module, *map(str, arguments)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
        return start([*torchrun, *job] if devices > 1 else job, devices=devices, **how)

    return run
