"""The table of runs: the numbers are those of the files, and what cannot be told is said."""

import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from kd_dist import cache
from kd_dist.report import COLUMNS, main, report
from kd_dist.run.claim import claim
from kd_dist.run.curves import CHARTS
from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import append_metrics
from kd_dist.run.results import write_val_logits
from kd_dist.run.state import write_state
from kd_dist.study import plots

N, K = 8, 3
LABELS_N = np.arange(N) % K


def one_hot(classes_N):
    """Logits [N, K] whose largest entry is the class."""
    return np.eye(K, dtype=np.float16)[np.asarray(classes_N) % K] * 4


def table(split, content):
    """One split of a cache with two views, so that a mistaken view shows."""
    return cache.Table(
        paths=tuple(f"{split}/c{label}/{i}.jpg" for i, label in enumerate(LABELS_N)),
        labels_N=LABELS_N.astype(np.int64),
        bytes_N=np.full(N, 100),
        sha256_N32=np.full((N, 32), content, np.uint8),
        teacher_N=np.zeros(N, np.int16),
        box_NV4=np.full((N, 2, 4), 8, np.int16),
        flip_NV=np.zeros((N, 2), np.uint8),
    )


def write_cache(path, teacher_classes_N, content=1):
    """A real cache whose teacher puts val image i in teacher_classes_N[i] (view 0) or another class (view 1)."""
    top1 = float(np.mean(np.asarray(teacher_classes_N) % K == LABELS_N))
    teacher = cache.TeacherRow(sha256="ab" * 32, arch="resnet18", seed=0, fold=-1, image_size=8, val_top1=top1)
    header = cache.Header(
        classes=tuple(f"c{label}" for label in range(K)),
        dataset="made-up",
        image_size=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        renderer="r",
        compute_dtype="float32",
        view_rule="s",
        crop_scale=(0.35, 1.0),
        seed=0,
        created="2025-01-01T00:00:00+00:00",
        software="test",
        teachers=(teacher,),
    )
    tables = {split: table(split, content) for split in ("train", "val")}
    writer = cache.BlockWriter(path, cache.CachePlan(header, tables))
    for block in writer.missing():
        rows = np.asarray(teacher_classes_N) + block.view
        writer.put(block, one_hot(rows)[block.start : block.stop])
    writer.publish()
    return tables["val"].fingerprint


def begin(path, kind, **settings):
    folder = RunFolder(path)
    claim(folder, kind, {"epochs": 2, "cache": None, **settings}, set(), False)
    return folder


def finish(folder, top1, agreement=None, rates=(100.0, 900.0, 110.0)):
    for epoch, rate in enumerate(rates, 1):
        row = {"step": epoch, "epoch": epoch, "val_top1": top1, "images_per_s": rate}
        append_metrics(folder, row if agreement is None else {**row, "val_agreement": agreement})
    write_state(folder, "finished", step=len(rates))


def save_classes(folder, classes_N, fingerprint):
    write_val_logits(folder.val_logits, one_hot(classes_N), LABELS_N, ["x"] * N, fingerprint, top1=0.5)


@pytest.fixture
def runs(tmp_path):
    """A teacher with its cache, a distilled student that agrees on 6 of 8 images and a hard-label baseline on 4."""
    folder = tmp_path / "runs"
    teacher = begin(folder / "teacher", "teacher", epochs=3)
    fingerprint = write_cache(teacher.cache, LABELS_N)
    finish(teacher, 0.75)
    distilled = begin(folder / "distilled", "student", alpha=0.9, temperature=4.0, cache=str(teacher.cache))
    finish(distilled, 0.5, agreement=0.111)
    save_classes(distilled, LABELS_N + np.array([0, 0, 0, 0, 0, 0, 1, 2]), fingerprint)
    hard = begin(folder / "hard", "student", alpha=0.0, temperature=4.0)
    finish(hard, 0.375)
    save_classes(hard, LABELS_N + np.array([0, 0, 0, 0, 1, 1, 1, 2]), fingerprint)
    return folder


def rows_of(text):
    """{run: {column: cell}} of a printed table."""
    lines = text.split("\n\n")[0].splitlines()
    starts = [lines[0].index(column) for column in COLUMNS]
    cut = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines[1:]]
    return {cells[0]: dict(zip(COLUMNS, cells, strict=True)) for cells in cut}


def test_a_table_of_teacher_and_students(runs, capsys):
    assert main([str(runs / name) for name in ("teacher", "hard", "distilled")]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["teacher", "hard", "distilled"]
    assert list(rows["teacher"].values()) == [
        "teacher",
        "teacher",
        "-",
        "-",
        "3/3",
        "75.0 %",
        "-",
        "110",
        "finished",
    ]
    assert rows["hard"]["alpha"] == "0" and rows["hard"]["agreement"] == "50.0 %" and rows["hard"]["top-1"] == "37.5 %"
    assert rows["distilled"]["alpha"] == "0.9" and rows["distilled"]["temperature"] == "4"
    assert rows["distilled"]["agreement"] == "75.0 %"


def test_the_last_line_opens_tensorboard_on_all_runs(runs, capsys, monkeypatch):
    assert report([runs / "teacher", runs / "hard"]).endswith(f"tensorboard --logdir {runs}")
    assert report([runs / "hard"]).endswith(f"tensorboard --logdir {runs}")
    begin(runs.parent / "with space" / "deep", "teacher")
    both = report([runs / "teacher", runs.parent / "with space" / "deep"])
    assert both.endswith(f"tensorboard --logdir {runs.parent}")
    assert list(rows_of(both)) == ["runs/teacher", "with space/deep"]
    assert report([runs.parent / "with space" / "deep"]).endswith(f"tensorboard --logdir '{runs.parent}/with space'")
    monkeypatch.chdir(runs.parent)
    assert report([runs / "hard"]).endswith("tensorboard --logdir runs")


def test_markdown(runs):
    lines = report([runs / "teacher", runs / "hard"], as_markdown=True).splitlines()
    assert lines[0] == "| " + " | ".join(COLUMNS) + " |"
    assert lines[1] == "|---|---|---|---|---|---|---|---|---|"
    assert lines[3] == "| hard | student | 0 | 4 | 3/2 | 37.5 % | 50.0 % | 110 | finished |"
    assert lines[-1].startswith("`") and lines[-1].endswith(f"tensorboard --logdir {runs}`")


def test_a_student_alone_is_compared_with_its_recorded_cache(runs):
    assert rows_of(report([runs / "distilled"]))["distilled"]["agreement"] == "75.0 %"
    assert rows_of(report([runs / "hard"]))["hard"]["agreement"] == "-"


def test_a_named_cache_replaces_the_recorded_one(runs, tmp_path):
    write_cache(tmp_path / "other.h5", LABELS_N + 1)
    rows = rows_of(report([runs / "distilled", runs / "hard"], cache=tmp_path / "other.h5"))
    assert (rows["distilled"]["agreement"], rows["hard"]["agreement"]) == ("12.5 %", "37.5 %")


def test_a_cache_of_other_images_is_said(runs, tmp_path, capsys):
    write_cache(tmp_path / "other.h5", LABELS_N, content=2)
    assert main([str(runs / "hard"), "--cache", str(tmp_path / "other.h5")]) == 2
    said = capsys.readouterr().err
    assert "other val images" in said and str(tmp_path / "other.h5") in said and len(said.splitlines()) == 1


def test_a_damaged_recorded_cache_costs_the_agreement_and_not_the_table(runs):
    (runs / "teacher" / "logits.h5").write_bytes(b"x")
    text = report([runs / "teacher", runs / "distilled"])
    assert rows_of(text)["distilled"]["agreement"] == "11.1 %", "the run's own last figure"
    assert re.search(r"^distilled: .*logits\.h5", text, re.MULTILINE)


def test_a_missing_cache_leaves_the_runs_own_figure(runs):
    (runs / "teacher" / "logits.h5").unlink()
    assert rows_of(report([runs / "distilled"]))["distilled"]["agreement"] == "11.1 %"


def test_a_run_that_only_began(runs):
    begin(runs / "new", "student", alpha=0.5, temperature=2.0)
    row = rows_of(report([runs / "new"]))["new"]
    assert (row["epochs"], row["top-1"], row["images/s"], row["status"]) == ("0/2", "-", "-", "not started")


def test_a_living_and_a_failed_run(runs, monkeypatch):
    write_state(RunFolder(runs / "hard"), "failed", message="the loss was not finite at step 7")
    write_state(RunFolder(runs / "distilled"), "running", step=2)
    state = RunFolder(runs / "distilled").state
    earlier = (datetime.now(UTC) - timedelta(minutes=30)).isoformat(timespec="seconds")
    state.write_text(re.sub(r'"time": "[^"]*"', f'"time": "{earlier}"', state.read_text()))
    text = report([runs / "hard", runs / "distilled"])
    assert rows_of(text)["hard"]["status"] == "failed"
    assert "hard: the loss was not finite at step 7" in text
    assert rows_of(text)["distilled"]["status"] == "running, last sign of life 30 min ago"


def study_of(folder):
    """A study's folder with one run of two arms each."""
    for arm in ("baseline", "distilled"):
        finish(begin(folder / arm / "seed-0", "student", alpha=0.5, temperature=2.0), 0.5)
    (folder / "study.json").write_text("{}")
    return folder


def test_other_entries_are_passed_over_and_studies_entered(runs, capsys):
    """As `python -m kd_dist.report runs/*` names them."""
    study_of(runs / "study")
    (runs / "jobs" / "0001").mkdir(parents=True)
    (runs / "mixed.h5").write_bytes(b"x")
    begin(runs / "broken", "student").settings.write_text("{")
    begin(runs / "cut", "student").state.write_text("{")
    assert main([str(path) for path in sorted(runs.iterdir())]) == 0
    said = capsys.readouterr().out
    assert list(rows_of(said)) == ["distilled", "hard", "study/baseline/seed-0", "study/distilled/seed-0", "teacher"]
    assert f"passed over: {runs}/broken (damaged), {runs}/cut (damaged), {runs}/jobs (not a run), " in said
    assert f"{runs}/mixed.h5 (not a run)\n" in said


def test_a_terminals_table_is_wrapped_and_a_pipes_is_whole(runs, monkeypatch, capsys):
    long = runs / ("student-" * 12)
    finish(begin(long, "student", alpha=0.5, temperature=2.0), 0.5)
    monkeypatch.setenv("COLUMNS", "90")
    assert main([str(long)]) == 0
    assert long.name in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main([str(long)]) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert len(table) > 2 and max(map(len, table)) <= 90
    assert "".join(line.split()[0] for line in table[1:] if line.startswith("student-")) == long.name


@pytest.mark.parametrize(("command", "code"), [("> /dev/full", 2), ("| true", 0)])
def test_an_output_that_cannot_be_written(runs, command, code):
    line = f"set -o pipefail; {sys.executable} -m kd_dist.report {runs / 'hard'} {command}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    said = "kd_dist.report: standard output cannot be written (No space left on device).\n" if code else ""
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("words", ["kd_dist.dataset --list", "kd_dist.cache info RUNS/teacher/logits.h5"])
def test_another_listing_that_cannot_be_written(runs, words):
    line = f"{sys.executable} -m {words.replace('RUNS', str(runs))} > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert re.fullmatch(r"kd_dist\S*: standard output cannot be written \(No space left on device\)\.\n", done.stderr)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_lone_entry_that_is_not_a_run_is_refused_in_one_sentence(tmp_path, capsys, name):
    (tmp_path / "file").write_text("x")
    assert main([str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and str(tmp_path / name) in said.err


def test_entries_without_a_run_are_refused_together(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main([str(tmp_path / "nothing"), str(tmp_path / "file")]) == 2
    assert f"no runs in {tmp_path}/nothing (not a run), {tmp_path}/file (not a run); pass" in capsys.readouterr().err


def test_the_plot_has_a_panel_a_chart_with_the_runs_values(runs, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.setdefault("figure", figure) and b"PNG")
    names = ("teacher", "distilled", "hard")
    assert main([*(str(runs / name) for name in names), "--plot", str(tmp_path / "first.png")]) == 0
    assert (tmp_path / "first.png").read_bytes() == b"PNG"
    panels = {axis.get_title().splitlines()[0]: axis for axis in drawn["figure"].axes}
    assert panels.keys() == CHARTS.keys()
    lines = [list(line.get_ydata()) for line in panels["top-1"].lines]
    assert [values for values in lines if values] == [[0.75] * 3, [0.5] * 3, [0.375] * 3]
    assert list(panels["agreement with the teacher"].lines[1].get_ydata()) == [0.111] * 3


def test_a_plot_that_cannot_be_written_is_refused_in_one_sentence(runs, tmp_path, capsys):
    assert main([str(runs / "teacher"), "--plot", str(tmp_path / "missing" / "first.png")]) != 0
    assert capsys.readouterr().err.count("\n") == 1
