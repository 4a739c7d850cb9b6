"""Both jobs as a user starts them: torchrun and plain python, end to end, interrupted, resumed and watched."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_dist import teacher as teacher_entry
from kd_dist.cache import BlockWriter, CachePlan, open_cache
from kd_dist.cache import __main__ as cache_entry
from kd_dist.cache.format import shards_folder_of
from kd_dist.data.generated import generate
from kd_dist.job.pictures import is_pictured
from kd_dist.run.checkpoint import load_model, weights_digest
from kd_dist.run.curves import TAGS, curves_of
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import CACHE_SECONDS, read_costs, read_metrics
from kd_dist.run.results import read_val_logits
from kd_dist.run.state import read_state
from kd_dist.teacher import clocked
from tests.entries import call
from tests.ranks import run_command

REPO = Path(__file__).parent.parent
TINY = ["--image-size", "32", "--batch-size", "24", "--warmup-epochs", "0.5", "--lr", "0.02", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
OFTEN = ["--checkpoint-minutes", "0.0001"]
PATIENCE_SECONDS = 240


def torchrun(ranks: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    return launcher


def run(command: list[str], check: bool = True, **more) -> subprocess.CompletedProcess:
    how = {"env": ENVIRONMENT, "cwd": REPO, "capture_output": True, "text": True, "timeout": PATIENCE_SECONDS}
    result = subprocess.run(command, **{**how, **more})
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("jobs") / "tiny"
    generate(root, train_per_class=15, val_per_class=5, seed=0)
    return root


def teacher(data: Path, out: Path, *more: str) -> list[str]:
    return ["kd_dist.teacher", "--data", str(data), "--out", str(out), "--epochs", "2", "--views", "3", *TINY, *more]


def distill(data: Path, out: Path, cache: Path | None, *more: str) -> list[str]:
    named = ["--cache", str(cache)] if cache else []
    return ["kd_dist.distill", "--data", str(data), "--out", str(out), "--epochs", "2", *named, *TINY, *more]


@pytest.fixture(scope="module")
def teacher_run(data, tmp_path_factory) -> RunFolder:
    """A teacher trained by two ranks, with its cache."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    run_command(*teacher(data, out), ranks=2)
    return RunFolder(out)


def test_teacher_job_writes_a_cache_of_all_images(teacher_run):
    cache = open_cache(teacher_run.cache)
    assert cache.split("train").logits_NVK.shape == (150, 3, 10)
    assert cache.split("val").logits_NVK.shape == (50, 3, 10)
    saved = load_model(teacher_run.model)
    assert cache.val_top1 == saved["val_top1"] == read_metrics(teacher_run)[-1]["val_top1"]
    assert read_state(teacher_run)["status"] == "finished"
    assert not list(teacher_run.path.glob("logits.h5.shards*"))


def test_teacher_job_notes_what_it_cost(teacher_run):
    assert read_costs(teacher_run)[CACHE_SECONDS] > 0
    rows = read_metrics(teacher_run)
    assert all(row["epoch_s"] > 150 / row["images_per_s"] for row in rows), "steps and evaluation"


def test_interrupted_writing_adds_up_and_a_new_cache_starts_anew(tmp_path, one_process, monkeypatch):
    folder, now, noted = RunFolder(tmp_path), 0.0, []
    monkeypatch.setattr("kd_dist.teacher.time.monotonic", lambda: now)
    shards_folder_of(folder.cache).mkdir()
    for seconds in (30.0, 12.0):
        with pytest.raises(KeyboardInterrupt), clocked(folder, folder.cache, one_process, print) as progress:
            now += seconds
            progress(1, 2)
            noted.append(read_costs(folder)[CACHE_SECONDS])  # a kill would lose no more than what comes after
            now += 1
            raise KeyboardInterrupt
    assert noted == [30, 31 + 12] and read_costs(folder) == {CACHE_SECONDS: 31 + 13}
    shards_folder_of(folder.cache).rmdir()
    with clocked(folder, folder.cache, one_process, print):
        now += 5
    assert read_costs(folder) == {CACHE_SECONDS: 5}


@pytest.mark.slow
def test_the_two_lines_of_the_readme_as_they_stand(data, tmp_path):
    """Without arguments, four ranks, the usual folders: here a few images under the usual name, for two epochs."""
    for split, kept in (("train", 7), ("val", 2)):
        for class_folder in (data / split).iterdir():
            target = tmp_path / "data" / "imagewoof2-160" / split / class_folder.name
            target.mkdir(parents=True)
            for path in sorted(class_folder.iterdir())[:kept]:
                shutil.copy(path, target)
    lines = re.findall(
        r"^ +(torchrun --nproc_per_node=4 -m kd_dist\.\w+) ", (REPO / "README.md").read_text(), re.MULTILINE
    )
    assert [line.split(".")[-1] for line in lines] == ["teacher", "distill"]
    shorter = "from kd_dist.config import PRESETS\nfor jobs in PRESETS.values(): jobs.teacher['epochs'] = 2\n"
    (tmp_path / "sitecustomize.py").write_text(shorter + "for jobs in PRESETS.values(): jobs.distill['epochs'] = 2\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    for line in lines:
        run([sys.executable, "-m", "torch.distributed.run", *line.split()[1:]], cwd=tmp_path, env=environment)
    teacher, student = RunFolder(tmp_path / "runs/teacher"), RunFolder(tmp_path / "runs/student")
    assert load_model(student.model)["cache"]["sha256"] == open_cache(teacher.cache).digest
    assert len(read_metrics(teacher)) == len(read_metrics(student)) == 2  # else the schedule was not the one meant


def test_weights_of_middle_epochs_are_kept_and_can_label(data, tmp_path, capsys):
    folder = RunFolder(tmp_path / "teacher")
    command = [*teacher(data, folder.path)[1:], "--epochs", "3", "--views", "0", "--ema", "0.9"]
    call(teacher_entry.main, *command, "--keep-epochs", "1", "3")
    first, last, final = map(load_model, (folder.model_after(1), folder.model_after(3), folder.model))
    assert weights_digest(last["weights"]) == weights_digest(final["weights"]) != weights_digest(first["weights"])
    assert [one["val_top1"] for one in (first, last)] == [read_metrics(folder)[epoch]["val_top1"] for epoch in (0, 2)]
    assert not folder.model_after(2).exists()
    target = tmp_path / "middle.h5"
    source = ["--data", data, "--teacher", folder.model_after(1), "--views", "2", "--device", "cpu"]
    call(cache_entry.main, "write", *source, "-o", target)
    assert open_cache(target).header.teachers[0].sha256 == weights_digest(first["weights"])
    assert "--keep-epochs" not in capsys.readouterr().out
    call(teacher_entry.main, *command, "--keep-epochs", "2", "3")
    assert "--keep-epochs 2: training is already past these epochs (3 done)" in capsys.readouterr().out


def test_student_learns_from_the_cache_alone(data, teacher_run, tmp_path):
    """Two ranks, with nothing of the teacher at hand but its cache."""
    cache_file = tmp_path / "moved" / "logits.h5"
    cache_file.parent.mkdir()
    cache_file.write_bytes(teacher_run.cache.read_bytes())
    shown = run_command(*distill(data, tmp_path / "student", cache_file), ranks=2).stdout
    assert "has no .sha256 file next to it" in shown
    saved, cache = load_model(RunFolder(tmp_path / "student").model), open_cache(cache_file)
    assert saved["cache"]["sha256"] == cache.digest
    assert saved["cache"]["teachers"] == [row.sha256 for row in cache.header.teachers]
    assert saved["cache"]["fingerprints"]["train"] == cache.fingerprint("train")
    kept = read_val_logits(RunFolder(tmp_path / "student").val_logits)
    row = read_metrics(RunFolder(tmp_path / "student"))[-1]
    assert (kept.logits_NK.argmax(1) == kept.labels_N).mean() == row["val_top1"]
    agreement = (kept.logits_NK.argmax(1) == cache.split("val").logits_NVK[:, 0].argmax(1)).mean()
    assert row["val_agreement"] == agreement
    assert {"train_soft", "train_hard", "train_total"} <= row.keys()


def test_hard_twin_needs_no_cache_and_plain_python_is_one_process(data, tmp_path):
    run([sys.executable, "-m", *distill(data, tmp_path / "twin", None, "--alpha", "0")])
    folder = RunFolder(tmp_path / "twin")
    assert "cache" not in load_model(folder.model) and "train_soft" not in read_metrics(folder)[-1]
    curves = EventAccumulator(str(folder.path)).Reload()
    row = read_metrics(folder)[-1]
    points = {tag: curves.Scalars(tag)[-1] for tag in curves_of(row)}
    assert {tag: point.value for tag, point in points.items()} == pytest.approx(curves_of(row), rel=1e-6)
    assert {point.step for point in points.values()} == {2 * 150}, "the axis counts images"
    wanted = {TAGS["top1"], TAGS["train_hard"], TAGS["data_wait_share"], "2_health/grad_norm", "4_more/lr"}
    assert wanted <= points.keys()


def test_hard_labels_on_the_caches_own_crops(data, teacher_run, tmp_path):
    run_command(*distill(data, tmp_path / "run", teacher_run.cache, "--alpha", "0", "--crops", "cached"))
    saved = load_model(RunFolder(tmp_path / "run").model)
    assert saved["cache"]["sha256"] == open_cache(teacher_run.cache).digest
    assert "train_soft" not in read_metrics(RunFolder(tmp_path / "run"))[-1]


def test_same_command_again_says_it_is_done(data, teacher_run):
    before = teacher_run.cache.read_bytes()
    result = run_command(*teacher(data, teacher_run.path), ranks=2)
    assert "already exists" in result.stdout and teacher_run.cache.read_bytes() == before


def stop_after_step(process: subprocess.Popen, folder: RunFolder, number: int) -> int:
    """Send a signal to the launcher once the run has taken a step and saved; gives its exit code."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not folder.saved_steps() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    return process.wait(timeout=PATIENCE_SECONDS)


def test_sigterm_saves_on_all_ranks_and_the_same_command_ends_with_the_same_weights(data, teacher_run, tmp_path):
    command = [*torchrun(2), *distill(data, tmp_path / "cut", teacher_run.cache, *OFTEN)]
    command[command.index("--epochs") + 1] = "12"
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    cut, whole = RunFolder(tmp_path / "cut"), RunFolder(tmp_path / "whole")
    assert stop_after_step(process, cut, signal.SIGTERM) != 0
    stopped = read_state(cut)
    assert stopped["status"] == "interrupted" and "SIGTERM" in stopped["message"]
    assert cut.saved_steps()[-1] < 12 * 7
    run(command)
    run_command(*distill(data, whole.path, teacher_run.cache, "--epochs", "12"), ranks=2)
    resumed, uninterrupted = load_model(cut.model)["weights"], load_model(whole.model)["weights"]
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    assert [row["epoch"] for row in read_metrics(cut)] == list(range(1, 13))
    curves = EventAccumulator(str(cut.path), size_guidance={"images": 0}).Reload()
    per_epoch = list(range(150, 12 * 150 + 1, 150))
    assert [event.step for event in curves.Scalars(TAGS["top1"])] == per_epoch  # also after a resume
    pictured = [image.step for image in curves.Images("5_pictures/3_disagreements")]
    assert pictured == [at for at in per_epoch if is_pictured(at // 150, 12, 1)]
    attempts = [event.value for event in curves.Scalars("2_health/attempts")]
    assert attempts[-1] == 2 and set(attempts) <= {1, 2}
    table = curves.Tensors("attempts/text_summary")[-1].tensor_proto.string_val[0].decode().splitlines()
    assert "stopped on request, all saved: stopped by SIGTERM" in table[2] and len(table) == 4


def test_ranks_do_not_outlive_a_killed_launcher(data, tmp_path):
    command = [*torchrun(2), *distill(data, tmp_path / "run", None, "--alpha", "0", *OFTEN)]
    command[command.index("--epochs") + 1] = "5000"
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = RunFolder(tmp_path / "run")
    stop_after_step(process, folder, signal.SIGKILL)
    rank = read_state(folder)["pid"]
    deadline = time.monotonic() + 30
    while _alive(rank) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(rank)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("entry", ["kd_dist.teacher", "kd_dist.distill"])
def test_help_prints_once_however_many_ranks(entry):
    result = run_command(entry, "--help", ranks=2)
    assert result.stdout.count("usage:") == 1
    assert "--temperature" in result.stdout if entry == "kd_dist.distill" else "--views" in result.stdout


class TestCacheCommands:
    """python -m kd_dist.cache info | verify | write | extend."""

    def cache(self, *arguments, check=True):
        return run_command("kd_dist.cache", *arguments, check=check)

    def test_info_is_one_screen(self, teacher_run):
        shown = self.cache("info", teacher_run.cache).stdout
        assert "top-1" in shown and "entropy" in shown and len(shown.splitlines()) <= 32

    def test_verify_says_what_was_checked(self, data, teacher_run):
        shown = self.cache("verify", teacher_run.cache).stdout
        assert "all finite" in shown and "not checked" in shown
        shown = self.cache("verify", teacher_run.cache, "--data", data, "--teacher", teacher_run.model).stdout
        assert "soft labels recomputed" in shown and "not checked" not in shown

    def test_verify_refuses_another_teacher_and_other_data(self, data, teacher_run, tmp_path):
        run_command(*teacher(data, tmp_path / "other", "--seed", "1"))
        other = RunFolder(tmp_path / "other").model
        result = self.cache("verify", teacher_run.cache, "--data", data, "--teacher", other, check=False)
        assert result.returncode == 2 and "was labelled by" in result.stderr
        generate(tmp_path / "set", train_per_class=15, val_per_class=5, seed=1)
        result = self.cache("verify", teacher_run.cache, "--data", tmp_path / "set", check=False)
        assert result.returncode == 2 and "Traceback" not in result.stderr

    def test_verify_finds_rows_that_are_not_the_teachers(self, data, teacher_run, tmp_path):
        """A cache written with rows of other images: digest, completeness and data fit all hold."""
        cache = open_cache(teacher_run.cache)
        writer = BlockWriter(tmp_path / "shuffled.h5", CachePlan(cache.header, cache.splits))
        for block in writer.plan.blocks:
            rows_BK = cache.split(block.split).logits_NVK[block.start : block.stop, block.view]
            writer.put(block, rows_BK if block.split == "val" else np.ascontiguousarray(rows_BK[::-1]))
        writer.publish()
        result = self.cache(
            "verify", tmp_path / "shuffled.h5", "--data", data, "--teacher", teacher_run.model, check=False
        )
        assert result.returncode == 2 and "does not hold the logits" in result.stderr

    def test_write_from_a_checkpoint_gives_the_jobs_own_file(self, data, teacher_run, tmp_path):
        self.cache("write", "--teacher", teacher_run.model, "--data", data, "--views", 3, "-o", tmp_path / "again.h5")
        assert (tmp_path / "again.h5").read_bytes() == teacher_run.cache.read_bytes()

    def test_extend_keeps_the_views_it_has(self, data, teacher_run, tmp_path):
        more = tmp_path / "more.h5"
        self.cache(
            *("extend", teacher_run.cache, "--teacher", teacher_run.model, "--data", data, "--views", 5, "-o", more)
        )
        self.cache("write", "--teacher", teacher_run.model, "--data", data, "--views", 5, "-o", tmp_path / "five.h5")
        assert more.read_bytes() == (tmp_path / "five.h5").read_bytes()
        old, new = open_cache(teacher_run.cache), open_cache(more)
        assert np.array_equal(new.split("train").logits_NVK[:, :3], old.split("train").logits_NVK)
