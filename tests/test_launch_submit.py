"""What launch.submit would submit, and what it refuses, on a machine without Slurm."""

import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kd_dist.checkpoint import RunFolder, claim, write_state
from kd_dist.config import DistillSettings, StudySettings, TeacherSettings, resolve
from kd_dist.errors import UserError
from kd_dist.study.arms import ARMS
from kd_dist.study.folder import StudyFolder, run_settings
from launch import submit
from launch.code import snapshot
from launch.folders import Job, JobFolder, new_folder, write_json

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
export PYTHONPATH=HERE/runs/jobs/code/DIGEST
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
    assert text.count("--pixels-dir $TMPDIR/kd_dist-pixels --preset h100 --workers 7\n") == 2
    assert "#   preset = h100" in text
    assert not (here / "runs").exists()


def test_the_jobs_own_options_pass_through_and_paths_become_absolute(here, capsys):
    own = "--data pictures --epochs 7 --crop-scale 0.5 1 --start-over --archive '$TMPDIR/a.tgz'"
    text = said(capsys, f"teacher --gpus-per-node 0 --dry-run -- {own}")
    command = text.splitlines()[0].split("kd_dist.teacher ")[1]
    assert command == (
        f"--archive $TMPDIR/a.tgz --crop-scale 0.5 1.0 --data {here}/pictures --epochs 7 --out {here}/runs/teacher "
        "--preset cpu-64px --start-over"
    )
    assert "#SBATCH --gpus-per-node" not in text and "#   epochs = 7" in text


def test_a_pipelines_options_go_to_the_jobs_that_know_them(here, capsys):
    own = "--epochs 9 --alpha 0.5 --teacher resnet18_s1 --views 3"
    text = said(capsys, f"pipeline --dry-run --distill '--epochs 15' -- {own}")
    teacher, student = (line for line in text.splitlines() if "python -m kd_dist" in line)
    assert "--epochs 9" in teacher and "--teacher resnet18_s1" in teacher and "--alpha" not in teacher
    assert "--epochs 15" in student and "--alpha 0.5" in student and "--teacher " not in student
    assert "--views 3" in teacher and "--views 3" in student


def test_a_sweep_is_an_array_in_which_alpha_0_has_no_temperature(here, capsys):
    (here / "logits.h5").touch()
    grid = "--alpha 0 0.5 --temperature 2 4 --seed 0 1"
    text = said(capsys, f"sweep {grid} --at-once 3 --dry-run -- --cache logits.h5")
    cells = [line.split(":")[0][2:] for line in text.splitlines() if "python -m kd_dist" in line]
    assert cells == [
        *("alpha-0_seed-0", "alpha-0_seed-1", "alpha-0.5_temperature-2_seed-0", "alpha-0.5_temperature-2_seed-1"),
        *("alpha-0.5_temperature-4_seed-0", "alpha-0.5_temperature-4_seed-1"),
    ]
    assert "#SBATCH --array=0-5%3" in text and text.count("#!/bin/bash") == 1
    assert f"--out {here}/runs/sweep/alpha-0.5_temperature-4_seed-1" in text


def test_a_study_is_an_array_of_arms_and_seeds_in_one_folder(here, capsys):
    (here / "logits.h5").touch()
    own = "--cache logits.h5 --cutmix 0.5 --epochs 9"
    text = said(capsys, f"study --arms baseline distilled --seeds 4 7 --at-once 2 --dry-run --gpus-per-node 0 -- {own}")
    cells = [line.split(": python -m kd_dist.study ") for line in text.splitlines() if "python -m kd_dist" in line]
    assert [cell[0][2:] for cell in cells] == [
        *("baseline_seed-4", "baseline_seed-7", "distilled_seed-4", "distilled_seed-7"),
    ]
    assert cells[3][1] == (
        f"--arms distilled --cache {here}/logits.h5 --cutmix 0.5 --epochs 9 --out {here}/runs/study --preset cpu-64px "
        "--seeds 7"
    )
    assert "#SBATCH --array=0-3%2" in text and text.count("#!/bin/bash") == 1
    assert text.count(f"#   out = {here}/runs/study/distilled/seed-7\n") == 1  # where its state is looked for
    assert text.count("#   cutmix = 0.5\n") == text.count("#   crops = fresh\n") == 2


def test_a_variant_goes_to_its_jobs_as_it_was_made(here, capsys):
    (here / "logits.h5").touch()
    (here / "both.h5").touch()
    words = "study --arms ensemble=distilled,cache=both.h5,alpha=0.5 --seeds 4 --dry-run --gpus-per-node 0 -- --cache"
    text = said(capsys, f"{words} logits.h5")
    assert f"--arms ensemble=distilled,cache={here}/both.h5,alpha=0.5 --cache {here}/logits.h5" in text
    assert f"#   cache = {here}/both.h5\n" in text and f"#   out = {here}/runs/study/ensemble/seed-4\n" in text
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
    asked = resolve(StudySettings, {"out": str(here / "runs/study"), "cache": str(here / "logits.h5")}, False)
    settings = run_settings(asked, ARMS["baseline-cached"], 0)
    make_run(here / "runs/study/baseline-cached/seed-0", settings, "finished")
    words = "study --arms baseline-cached --seeds 0 --gpus-per-node 0 -- --cache logits.h5"
    assert "finished already in" in said(capsys, words)
    assert "--lr was 0.05, now 0.1" in refused(capsys, f"{words} --lr 0.1")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("study -- --seeds 1", "--seeds belongs before the --"),
        ("study --arms cashed-1", "arm cashed-1 is not known; choose from baseline, baseline-cached"),
        ("study --arms online", "arm online needs the teacher"),
        ("study --arms one-view", "there is no cache HERE/runs/teacher/logits.h5"),
        ("teacher", "no Slurm (srun) on this machine, so nothing was submitted; add --cluster local"),
        ("distill", "there is no cache HERE/runs/teacher/logits.h5"),
        ("teacher --time soon", "--time soon is no time; write 2h"),
        ("teacher --time 10:30", "--time 10:30 is no time"),
        ("teacher --cluster debug --nodes 2 --gpus-per-node 1", "make 2; use --cluster local, or one rank"),
        ("teacher --nodes 0", "--nodes 0 must be at least 1"),
        ("teacher --epochs 3", "unrecognized arguments: --epochs 3"),
        ("teacher -- --epoch 3", "unrecognized arguments: --epoch 3"),
        ("teacher -- --epochs 0", "--epochs 0 must be at least 1"),
        ("pipeline -- --epoch 3", "--epoch: neither job knows it"),
        ("pipeline -- --out x", "choose the folder of both runs by --runs DIR"),
        ("sweep --alpha 0 -- --seed 1", "--seed belongs before the --"),
        ("teacher --site nowhere.conf", "the site file nowhere.conf cannot be read"),
        ("teacher --time 1m --signal-before 60", "--signal-before 60 s is not before the end of --time 1m"),
        ("students", "invalid choice: 'students'"),
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


def put_job(runs: Path, run: str) -> JobFolder:
    """A job that was submitted for a run folder, and of which no queue knows any more."""
    folder = new_folder(runs, "distill")
    Job("distill", "distill", "slurm", run, 1, 1, (), "", id="7").write(folder)
    return folder


def test_what_is_finished_is_not_submitted_again(here, capsys):
    settings = resolve(TeacherSettings, {"out": str(here / "runs/teacher")}, False)
    run = make_run(here / "runs/teacher", settings, "finished")
    words = "teacher --gpus-per-node 0"
    assert "no Slurm" in refused(capsys, words)  # its cache is missing, so it is not finished
    run.cache.touch()
    document = json.loads(run.settings.read_text())
    del document["settings"]["weight_decay"]  # as if an older version, which had no such setting, had stored them
    run.settings.write_text(json.dumps(document))
    assert said(capsys, words) == f"teacher: finished already in {here}/runs/teacher, nothing to do\n"
    assert "no Slurm" in refused(capsys, f"{words} -- --start-over")
    assert "--seed was 0, now 1" in refused(capsys, f"{words} -- --seed 1")


def test_a_folder_that_gives_signs_of_life_is_refused_and_a_silent_one_is_not(here, capsys):
    settings = resolve(DistillSettings, {"out": str(here / "runs/student"), "alpha": 0.0}, False)
    run = make_run(here / "runs/student", settings, "running")
    words = "distill --gpus-per-node 0 -- --alpha 0"
    assert f"is in use: process {os.getpid()} on" in refused(capsys, words)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    old = put_job(here / "runs", str(run.path))
    assert "no Slurm" in refused(capsys, words)  # the sign of life may be the last one of a job that is over
    write_json(old.ended, {"status": "failed", "message": "", "time": "2001-01-01"})
    assert "is in use" in refused(capsys, words)
    text = run.state.read_text(encoding="utf-8")
    run.state.write_text(text.replace(now[:10], "2001-01-01"), encoding="utf-8")
    assert "no Slurm" in refused(capsys, words)


def test_the_snapshot_is_untouched_by_later_edits(tmp_path):
    root, runs = tmp_path / "tree", tmp_path / "runs"
    for package in ("kd_dist", "launch"):
        (root / package).mkdir(parents=True)
        (root / package / "a.py").write_text("first", encoding="utf-8")
    first = snapshot(runs, root)
    assert snapshot(runs, root) == first
    (root / "kd_dist/a.py").write_text("second", encoding="utf-8")
    (root / "kd_dist/new.py").touch()
    second = snapshot(runs, root)
    assert first != second and (first / "kd_dist/a.py").read_text(encoding="utf-8") == "first"
    assert (second / "kd_dist/new.py").exists() and not (first / "kd_dist/new.py").exists()


@pytest.mark.parametrize("make", [snapshot, lambda runs: new_folder(runs, "teacher")])
def test_runs_that_cannot_be_written_are_refused(tmp_path, make):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"runs/jobs.* cannot be written \(Not a directory\)"):
        make(tmp_path / "file" / "runs")


def test_two_submissions_get_two_folders_and_a_job_reads_back(tmp_path):
    first, second = new_folder(tmp_path, "teacher"), new_folder(tmp_path, "distill")
    assert [first.path.name, second.path.name] == ["0001-teacher", "0002-distill"]
    job = Job("teacher", "teacher", "slurm", "runs/teacher", 2, 4, ("python", "-m"), "code", ("0001-teacher",), id="7")
    job.write(first)
    assert Job.read(JobFolder(first.path)) == job
