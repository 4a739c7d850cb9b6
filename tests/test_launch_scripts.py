"""The sbatch scripts as texts: bash and shellcheck accept them, and no line only looks like a setting."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sbatch")), ROOT / "slurm/job.sh", ROOT / "tests/cluster/setup.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_accepts_it(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here; apt-get install shellcheck")
def test_shellcheck_accepts_them():
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS[:-2], ids=lambda script: script.name)
def test_every_setting_of_sbatch_is_one(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if re.match(r"\s*#\s*SBATCH", line)]
    assert len(settings) > 5 and all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in settings)
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert first_command > lines.index(settings[-1]), "sbatch reads settings only above the first command"
