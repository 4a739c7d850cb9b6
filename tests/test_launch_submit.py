"""What launch.submit would submit, and what it refuses, on a machine without Slurm."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kd_dist.config import StudyConfig, TeacherConfig, resolve
from kd_dist.errors import UserError
from kd_dist.run import lock
from kd_dist.run.claim import claim
from kd_dist.run.folder import RunFolder
from kd_dist.run.state import write_state
from kd_dist.study.arms import ARMS
from kd_dist.study.folder import StudyFolder, run_settings
from launch import submit
from launch.submit import new_folder, snapshot

SITE = """
SBATCH_PARTITION="gpu"      # a comment
SBATCH_ACCOUNT="lab"
SITE_CPUS_PER_TASK="8"
SITE_INTERFACE="ib0"
SITE_SCRATCH="$TMPDIR"
SITE_ACTIVATE="module load cuda"
SITE_OPTIONS="--reservation=class --exclusive"
"""

GOLDEN = """#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --cpus-per-task=8
#SBATCH --dependency='afterok:<job of teacher>'
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --job-name=kd-distill
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=HERE/runs/jobs/NNNN-distill/submitit/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --reservation=class
#SBATCH --signal=USR2@90
#SBATCH --time=120
#SBATCH --wckey=submitit

# setup
module load cuda
export PYTHONPATH=HERE/runs/jobs/NNNN-distill/code
export PYTHONSAFEPATH=1
export SRUN_CPUS_PER_TASK=8
export GLOO_SOCKET_IFNAME=ib0
export NCCL_SOCKET_IFNAME=ib0

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output HERE/runs/jobs/NNNN-distill/submitit/%j_%t_log.out --kill-on-bad-exit=1 \
sh -c 'trap "" USR2; exec "$0" "$@"' PYTHON -u -m submitit.core._submit HERE/runs/jobs/NNNN-distill/submitit
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to type in, on a machine without Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    return tmp_path


def said(capsys, command: str) -> str:
    """What an accepted command prints."""
    assert submit.main(shlex.split(command)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, command: str) -> str:
    """The one sentence with which a command is refused."""
    assert submit.main(shlex.split(command)) == 2
    error = capsys.readouterr().err
    assert error.startswith("launch.submit: ") and error.count("\n") == 1
    return error


def test_the_sbatch_text_of_a_pipeline_with_every_site_setting(here, capsys):
    (here / "site.conf").write_text(SITE, encoding="utf-8")
    text = said(capsys, "pipeline --nodes 2 --gpus-per-node 4 --time 2h --dry-run --site site.conf")
    sheets = text.split("#!/bin/bash")[1:]
    distill = "#!/bin/bash" + sheets[1]
    assert distill.replace(str(here), "HERE").replace(sys.executable, "PYTHON").strip() == GOLDEN.strip()
    assert "dependency" not in sheets[0] and "kd-teacher" in sheets[0]
    assert (
        f"--out {here}/runs/teacher" in text
        and f"--cache {here}/runs/teacher/logits.h5 --out {here}/runs/student" in text
    )
    assert text.count("--pixels-dir '$TMPDIR/kd_dist-pixels' --preset gpu-128px --workers 7\n") == 2
    assert "#   preset = gpu-128px" in text
    assert not (here / "runs").exists()


def test_the_jobs_own_options_pass_through_and_paths_become_absolute(here, capsys):
    own = "--data images --epochs 7 --crop-scale 0.5 1 --start-over --archive '$TMPDIR/a.tgz'"
    text = said(capsys, f"teacher --gpus-per-node 0 --dry-run -- {own}")
    command = text.splitlines()[0].split("kd_dist.teacher ")[1]
    assert command == (
        f"--archive '$TMPDIR/a.tgz' --crop-scale 0.5 1.0 --data {here}/images --device cpu --epochs 7 "
        f"--out {here}/runs/teacher --preset cpu-64px --start-over"
    )
    assert "#SBATCH --gpus-per-node" not in text and "#   epochs = 7" in text


def test_a_pipelines_options_go_to_the_jobs_that_know_them(here, capsys):
    own = "--epochs 9 --alpha 0.5 --teacher resnet18_s1 --views 3"
    text = said(capsys, f"pipeline --dry-run --distill '--epochs 15' -- {own}")
    teacher, student = (line for line in text.splitlines() if "python -m kd_dist" in line)
    assert "--epochs 9" in teacher and "--teacher resnet18_s1" in teacher and "--alpha" not in teacher
    assert "--epochs 15" in student and "--alpha 0.5" in student and "--teacher " not in student
    assert "--views 3" in teacher and "--views 3" in student


def test_a_study_is_an_array_of_workers_with_the_same_command(here, capsys):
    (here / "logits.h5").touch()
    own = "--cache logits.h5 --cutmix 0.5 --epochs 9"
    words = "study --arms baseline distilled --seeds 4 7 --array 3 --dry-run --gpus-per-node 0"
    text = said(capsys, f"{words} -- {own}")
    (command,) = [line for line in text.splitlines() if "python -m kd_dist" in line]
    assert command == (
        f"# study: python -m kd_dist.study --arms baseline distilled --cache {here}/logits.h5 --cutmix 0.5 "
        f"--device cpu --epochs 9 --out {here}/runs/study --preset cpu-64px --seeds 4 7"
    )
    assert "#SBATCH --array=0-2%3" in text and text.count("#!/bin/bash") == 1


def test_an_arm_whose_cache_is_missing_or_whose_name_was_another_arm_is_refused(here, capsys):
    (here / "logits.h5").touch()
    (here / "both.h5").touch()
    words = "study --arms ensemble=distilled,cache=both.h5,alpha=0.5 --seeds 4 --dry-run --gpus-per-node 0 -- --cache"
    assert "--arms ensemble=distilled,cache=both.h5,alpha=0.5 " in said(capsys, f"{words} logits.h5")
    study = StudyFolder(here / "runs/study")
    study.path.mkdir(parents=True)
    study.study.write_text(json.dumps({"variants": {"ensemble": "distilled,alpha=0.5"}}))
    sentence = refused(capsys, f"{words} logits.h5")
    assert f"was distilled,alpha=0.5, now distilled,cache={here}/both.h5,alpha=0.5; give the new one" in sentence
    study.study.unlink()
    assert f"there is no cache {here}/none.h5" in refused(capsys, f"{words} none.h5")
    (here / "both.h5").unlink()
    assert f"there is no cache {here}/both.h5" in refused(capsys, f"{words} logits.h5")


def test_a_studys_finished_runs_are_not_submitted_again(here, capsys):
    (here / "logits.h5").touch()
    asked = resolve(StudyConfig, {"out": str(here / "runs/study"), "cache": str(here / "logits.h5")}, False)
    settings = run_settings(asked, ARMS["baseline-cached"], 0)
    make_run(here / "runs/study/baseline-cached/seed-0", settings, "finished").model.touch()
    words = "study --arms baseline-cached --seeds 0 --gpus-per-node 0 -- --cache logits.h5"
    assert "finished already in" in said(capsys, words)
    assert "--lr was 0.05, now 0.1" in refused(capsys, f"{words} --lr 0.1")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("study --array 0", "--array 0 must be at least 1"),
        ("study --arms cashed-1", "arm cashed-1 is not known; choose from baseline, baseline-cached"),
        ("study --arms online", "arm online needs the teacher"),
        ("study --arms one-view", "there is no cache HERE/runs/teacher/logits.h5"),
        ("teacher", "no Slurm (srun) on this machine, so nothing was submitted; add --cluster local"),
        ("distill", "there is no cache HERE/runs/teacher/logits.h5"),
        ("teacher --time soon", "Invalid --time soon; write 2h"),
        ("teacher --time 10:30", "Invalid --time 10:30;"),
        ("teacher --cluster debug --nodes 2 --gpus-per-node 1", "make 2; use --cluster local, or one rank"),
        ("teacher --nodes 0", "--nodes 0 must be at least 1"),
        ("teacher --epochs 3", "unrecognized arguments: --epochs 3"),
        ("teacher --runs x", "The folder of a single job is `-- --out DIR`"),
        ("teacher -- --epoch 3", "unrecognized arguments: --epoch 3"),
        ("teacher -- --epochs 0", "--epochs 0 must be at least 1"),
        ("pipeline -- --epoch 3", "--epoch: unknown to both jobs"),
        ("pipeline -- --out x", "choose the folder of both runs by --runs DIR"),
        ("teacher --site nowhere.conf", "the site file nowhere.conf cannot be read"),
        ("teacher --time 1m --signal-before 60", "--signal-before 60 s must be shorter than --time 1m"),
        ("sweep", "invalid choice: 'sweep'"),
        ("teacher --cluster local --gpus-per-node 2", "1 x 2 GPUs were requested, but this machine has 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(here, capsys, words, sentence):
    assert sentence in refused(capsys, words).replace(str(here), "HERE")
    assert not list(here.glob("runs/jobs/0*"))


def make_run(folder: Path, settings, status: str, **facts) -> RunFolder:
    run = RunFolder(folder)
    claim(run, settings.kind, settings.stored(), settings.may_change, False)
    write_state(run, status, **facts)
    return run


def test_what_is_finished_is_not_submitted_again(here, capsys):
    settings = resolve(TeacherConfig, {"out": str(here / "runs/teacher")}, False)
    run = make_run(here / "runs/teacher", settings, "finished")
    words = "teacher --gpus-per-node 0"
    assert "no Slurm" in refused(capsys, words)  # its cache is missing, so it is not finished
    run.cache.touch()
    run.model.touch()
    document = json.loads(run.settings.read_text())
    del document["settings"]["weight_decay"]  # as if an older version, which had no such setting, had stored them
    run.settings.write_text(json.dumps(document))
    assert said(capsys, words) == f"teacher: finished already in {here}/runs/teacher, nothing to do\n"
    assert "no Slurm" in refused(capsys, f"{words} -- --start-over")
    assert "--seed was 0, now 1" in refused(capsys, f"{words} -- --seed 1")


def test_a_folder_that_another_process_has_is_refused_and_one_that_was_left_is_not(here, capsys, monkeypatch):
    run = RunFolder(here / "runs/student")
    run.path.mkdir(parents=True)
    run.lock.touch()
    words = "distill --gpus-per-node 0 -- --alpha 0"
    monkeypatch.setattr(lock, "_LOCK_PATIENCE_S", 0.1)
    hold = f"import fcntl, sys; f = open({str(run.lock)!r}, 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True)"
    with subprocess.Popen([sys.executable, "-c", f"{hold}; sys.stdin.read()"], stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        assert f"{run.path} is in use by another process" in refused(capsys, words)
        other.communicate()
    assert "no Slurm" in refused(capsys, words)


def program(here: Path, name: str, text: str) -> None:
    folder = here / "no-programs"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def test_a_slurm_that_is_not_configured_is_named_in_its_words_and_local_is_offered(here, capsys):
    program(here, "srun", "")
    program(here, "sbatch", "echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1")
    sentence = refused(capsys, "teacher")
    assert "Slurm refused the job: Could not establish a configuration source. Change" in sentence
    assert "add --cluster local to run on this machine" in sentence and not list(here.glob("runs/jobs/0*"))


@pytest.mark.parametrize(
    ("visible", "words", "own"),
    [
        ("4,5,6", "--array 3", ["4", "5", "6"]),
        ("4,5,6,7", "--array 2", ["4,5", "6,7"]),
        ("4,5,6", "--array 2 --gpus-per-node 1", ["4", "5"]),
        ("4,5,6", "--array 2 --gpus-per-node 0", ["", ""]),
    ],
)
def test_jobs_of_an_array_on_this_machine_have_gpus_of_their_own(here, monkeypatch, visible, words, own):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (here / "logits.h5").touch()
    submitted = []
    monkeypatch.setattr(submit, "submit_local", lambda batch: submitted.extend(batch.jobs) or ["1"] * len(batch.jobs))
    assert submit.main(shlex.split(f"study --cluster local --seeds 0 {words} -- --cache logits.h5")) == 0
    assert [job.environment["CUDA_VISIBLE_DEVICES"] for job in submitted] == own
    assert [job.ranks for job in submitted] == [max(1, len(own[0].split(",")))] * len(own)
    assert all(("--device cpu" in " ".join(job.arguments)) == (not own[0]) for job in submitted)


def test_launch_can_be_imported_under_another_name(here):
    """Installed, the package is kd_dist.launch."""
    (here / "other").mkdir()
    shutil.copytree(Path(submit.__file__).parent, here / "other/moved", ignore=shutil.ignore_patterns("__pycache__"))
    (here / "other/__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": f"{here}:{Path(submit.__file__).parent.parent}"}
    command = [sys.executable, "-m", "other.moved.submit", "teacher", "--epochs", "3"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "`python -m other.moved.submit --help`" in done.stderr
    assert Path("other/moved/submit.py").exists()


def test_the_snapshot_is_untouched_by_later_edits(tmp_path):
    tree, code = tmp_path / "tree", tmp_path / "code"
    packages = {"kd_dist": tree / "kd_dist", "kd_dist.launch": tree / "launch"}
    for folder in packages.values():
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("first", encoding="utf-8")
    snapshot(code, packages)
    (tree / "kd_dist/a.py").write_text("second", encoding="utf-8")
    assert [(code / name).read_text(encoding="utf-8") for name in ("kd_dist/a.py", "kd_dist/launch/a.py")] == [
        "first"
    ] * 2


@pytest.mark.parametrize("make", [snapshot, lambda runs: new_folder(runs, "teacher")])
def test_runs_that_cannot_be_written_are_refused(tmp_path, make):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"runs.* cannot be written \(.*Not a directory"):
        make(tmp_path / "file" / "runs")


def test_two_submissions_get_two_folders(tmp_path):
    assert new_folder(tmp_path, "teacher") == tmp_path / "jobs/0001-teacher"
    assert new_folder(tmp_path, "distill") == tmp_path / "jobs/0002-distill"
