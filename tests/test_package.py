"""The package as pip installs it, from a wheel and editable: its commands run from any folder, launch/ in kd_dist."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import kd_dist
from kd_dist.cache import open_cache

REPO = Path(__file__).parent.parent
SOURCES = ("kd_dist", "launch", "slurm", "pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE")
SIZES = ("--preset=demo", "--image-size=32", "--batch-size=7", "--warmup-epochs=0", "--epochs=1", "--lr=0.003")
Run = Callable[..., str]

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def call(*words: object, **how) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KD_DIST_DATA")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [str(word) for word in words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*words: object) -> str:
    """pip without a network: nothing but our own package is built and installed."""
    return call(sys.executable, "-m", "pip", "--disable-pip-version-check", *words)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the package is built from: building writes into the folder."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copyfile
        copy(REPO / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Callable[..., Path]:
    """Makes a new environment that has this one's packages and what pip installs: the path of its Python."""

    def install(*what: object) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        call(sys.executable, "-m", "venv", "--without-pip", folder)
        python = folder / "bin" / "python"
        site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        # A path alone: an editable kd_dist of this environment, which is a hook, is not taken over.
        Path(site, "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        pip("--python", python, "install", "--no-deps", "--no-index", "--no-build-isolation", *what)
        return python

    return install


def test_the_wheel_takes_one_name(wheel, checkout):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"kd_dist", f"kd_dist-{kd_dist.__version__}.dist-info"}
    sources = [path.relative_to(checkout) for path in checkout.glob("kd_dist/**/*.py")]
    beside = [path.relative_to(checkout) for folder in ("launch", "slurm") for path in checkout.glob(f"{folder}/*.*")]
    assert {str(path) for path in [*sources, *(Path("kd_dist", path) for path in beside)]} <= names
    assert {"kd_dist/launch/submit.py", "kd_dist/slurm/site.conf", "kd_dist/slurm/job.sh"} <= names


def test_an_installed_job_runs_from_any_folder(wheel, installed, tiny_root, tmp_path):
    python = installed(wheel)
    assert call(python, "-c", "import kd_dist; print(kd_dist.__file__)", cwd=tmp_path).startswith(
        str(python.parents[1])
    )
    assert "--alpha" in call(python, "-m", "kd_dist.distill", "--help", cwd=tmp_path)
    submit = [python, "-m", "kd_dist.launch.submit", "pipeline", "--cluster=local"]
    assert "python -m kd_dist.launch.status runs" in call(
        *submit, "--", f"--data={tiny_root}", *SIZES, "--views=2", cwd=tmp_path
    )
    shown = call(python, "-m", "kd_dist.launch.status", "--follow", "--every=0.5", cwd=tmp_path)
    assert [line.split()[2] for line in shown.rstrip().splitlines()[-2:]] == ["finished", "finished"], shown
    code = tmp_path / "runs/jobs/0001-teacher/code"
    assert [path.name for path in code.iterdir()] == ["kd_dist"] and (code / "kd_dist/launch/supervisor.py").exists()
    cache = open_cache(tmp_path / "runs/teacher/logits.h5")
    assert cache.header.software.startswith(f"kd_dist {kd_dist.__version__}, torch ")
    assert "student" in call(python, "-m", "kd_dist.report", "runs/teacher", "runs/student", cwd=tmp_path)


def test_an_editable_checkout_runs_from_any_folder(checkout, installed, tmp_path):
    python = installed("--editable", checkout)
    for cwd, module in ((tmp_path, "kd_dist.launch"), (checkout, "kd_dist.launch"), (checkout, "launch")):
        assert f"python -m {module}.submit JOB" in call(python, "-m", f"{module}.submit", "--help", cwd=cwd)
        where = call(python, "-c", f"import {module}.supervisor; print({module}.supervisor.__file__)", cwd=cwd).strip()
        assert where == str(checkout / "launch/supervisor.py")
        shown = call(python, "-m", f"{module}.submit", "teacher", "--dry-run", cwd=cwd)
        assert "#SBATCH --job-name=kd-teacher" in shown  # slurm/site.conf is found
