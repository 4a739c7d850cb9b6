"""Curves stay single, progress stays quiet, and nothing that goes wrong with either ends a run."""

import io
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import record_writer
from tensorboard.summary.writer.record_writer import RecordWriter

from kd_dist.run import curves, events, monitor
from kd_dist.run.curves import CHARTS, TAGS, Description, curves_of
from kd_dist.run.monitor import Monitor


def curve(folder, name):
    """The points of a curve as TensorBoard shows them: [(step, value), ...]."""
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)] if name in events.scalars.Keys() else []


def log(folder, steps, value, resume_at=0):
    with Monitor(folder, enabled=True, resume_at=resume_at) as curves:
        for step in steps:
            curves.scalars(step, {"train/loss": value, "train/lr": torch.tensor(0.5)})


class Terminal(io.TextIOWrapper):
    """A screen that keeps what it was sent."""

    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def isatty(self):
        return True

    def shown(self):
        return self.buffer.getvalue().decode(self.encoding)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Loss:
    """Stands for a tensor on a device: reading it waits for the device."""

    def __init__(self):
        self.reads = 0

    def __float__(self):
        self.reads += 1
        return 0.25


# ---- curves


def test_a_curve_is_what_was_logged(tmp_path):
    log(tmp_path, [0, 1, 2], 1.5)
    assert curve(tmp_path, "train/loss") == [(0, 1.5), (1, 1.5), (2, 1.5)]
    assert curve(tmp_path, "train/lr")[-1] == (2, 0.5)


def test_steps_logged_again_after_a_resume_stand_once(tmp_path):
    log(tmp_path, range(7), 1.0)
    log(tmp_path, range(4, 9), 2.0, resume_at=3)
    assert curve(tmp_path, "train/loss") == [(step, 1.0 if step <= 3 else 2.0) for step in range(9)]


def test_a_run_that_starts_again_before_its_first_checkpoint_has_one_curve(tmp_path):
    log(tmp_path, [0, 10, 20], 1.0)
    log(tmp_path, [0, 5], 2.0)
    assert curve(tmp_path, "train/loss") == [(0, 2.0), (5, 2.0)]


def test_a_record_cut_by_a_kill_hides_nothing_of_the_next_attempt(tmp_path):
    log(tmp_path, range(7), 1.0)
    (first,) = tmp_path.iterdir()
    first.write_bytes(first.read_bytes()[:-9])
    log(tmp_path, [4, 5], 2.0, resume_at=3)
    assert curve(tmp_path, "train/loss") == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


def test_flushed_points_are_on_disk_while_the_run_goes_on(tmp_path):
    with Monitor(tmp_path, enabled=True) as curves:
        curves.scalars(1, {"top1": 0.5})
        curves.flush()
        assert curve(tmp_path, "top1") == [(1, 0.5)]


def test_a_rank_that_is_not_the_first_is_mute(tmp_path, capsys):
    loss = Loss()
    with Monitor(tmp_path / "run", enabled=False, lines_every_s=0) as mute, mute.epoch(1, 2, 3) as progress:
        mute.scalars(1, {"top1": 0.5})
        mute.flush()
        mute.line("hello")
        progress.update(1, loss, 5)
    assert capsys.readouterr().out == "" and loss.reads == 0
    assert not (tmp_path / "run").exists()


def test_without_a_folder_there_is_progress_but_no_curve(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Monitor(None, enabled=True) as curves:
        curves.scalars(1, {"top1": 0.5})
        curves.flush()
        curves.line("hello")
    assert "hello" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_curves_is_said_once_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with Monitor(tmp_path / "file", enabled=True) as curves:
        for step in range(5):
            curves.scalars(step, {"top1": 0.5})
        curves.flush()
        curves.line("still here")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "TensorBoard curves end here" in said[0] and "still here" in said[1]


def test_a_full_disk_ends_the_curves_in_one_line_and_not_the_run(tmp_path):
    """A limit on file sizes plays the full disk, in a process of its own; the writer's thread is what fails."""
    code = (Path(__file__).parent / "programs/curves_on_a_full_disk.py").read_text()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(monitor.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(said) == 2 and "TensorBoard curves end here" in said[0] and "File too large" in said[0]
    assert "trained to the end" in said[1]
    assert done.stderr == ""
    points = curve(tmp_path, "train/loss")
    assert 0 < len(points) < 300
    log(tmp_path, range(5, 9), 2.0, resume_at=4)
    assert curve(tmp_path, "train/loss") == [(step, 1.0 if step <= 4 else 2.0) for step in range(9)]


def test_a_disk_that_hangs_costs_points_and_not_the_run(tmp_path, capsys, monkeypatch):
    """The writer stays in its first write until the test lets it go; nothing that the run does waits for it long."""
    released, entered = threading.Event(), threading.Event()

    class Hanging(RecordWriter):
        def write(self, data):
            entered.set()
            released.wait()
            super().write(data)

    monkeypatch.setattr(record_writer, "RecordWriter", Hanging)
    monkeypatch.setattr(curves, "QUEUE_LENGTH", 10)
    monkeypatch.setattr(curves, "PATIENCE_SECONDS", 0.1)
    with Monitor(tmp_path, enabled=True) as shown:
        assert entered.wait(60)
        shown.flush()
        for step in range(50):
            shown.scalars(step, {"train/loss": 1.0})
        shown.flush()
        shown.line("trained to the end")
        thread = shown.curves._thread
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "is slow" in said[0] and "trained to the end" in said[1]
    assert thread.is_alive()
    released.set()
    thread.join(60)
    assert 0 < len(curve(tmp_path, "train/loss")) < 50


DESCRIPTION = Description({"run/1_command": "    python -m x"}, {"kind": "student", "alpha": 0.9, "temperature": None})


def described(folder) -> EventAccumulator:
    with Monitor(folder, enabled=True) as shown:
        shown.describe(0, DESCRIPTION)
        shown.scalars(64, dict.fromkeys(TAGS.values(), 0.5))
        shown.finished(64)
    return EventAccumulator(str(folder)).Reload()


def test_texts_are_read_back(tmp_path):
    events.emit(tmp_path, events.Code.DATA_READY)
    found = described(tmp_path)
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"][:2]}
    assert texts["run/1_command/text_summary"] == "    python -m x"
    assert texts["attempts/text_summary"].splitlines()[2].startswith("| 1 | 2")


def test_a_history_that_cannot_be_read_costs_its_text_alone(tmp_path):
    (tmp_path / events.NAME).mkdir()
    tags = described(tmp_path).Tags()
    assert "run/1_command/text_summary" in tags["tensors"] and "attempts/text_summary" not in tags["tensors"]
    assert tags["scalars"]


def test_the_layout_names_tags_that_are_written(tmp_path):
    found = described(tmp_path)
    layout = Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [chart.title for chart in layout.category[0].chart] == list(CHARTS)
    tags = [tag for chart in layout.category[0].chart for tag in chart.multiline.tag]
    assert sorted(tags) == sorted(TAGS.values()) and set(tags) <= set(found.Tags()["scalars"])


def test_hyperparameters_are_in_the_runs_own_file(tmp_path):
    found = described(tmp_path)
    content = {
        tag: HParamsPluginData.FromString(found.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)
        for tag in ("experiment", "session_start_info", "session_end_info")
    }
    assert {**content["session_start_info"].session_start_info.hparams}.keys() == {"kind", "alpha"}
    assert content["session_end_info"].session_end_info.status == Status.Value("STATUS_SUCCESS")
    metrics = {info.name.tag for info in content["experiment"].experiment.metric_infos}
    assert TAGS["top1"] in metrics and metrics <= set(found.Tags()["scalars"])
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("events.out")]) == 1


def test_pictures_are_read_back_and_an_error_in_drawing_ends_them_alone(tmp_path, capsys):
    calls = []

    def fails():
        calls.append(1)
        raise ZeroDivisionError("no area")

    with Monitor(tmp_path, enabled=True) as shown:
        shown.pictures(5, lambda: {"5_pictures/1": (b"\x89PNG", (7, 8))})
        shown.pictures(6, fails)
        shown.pictures(7, fails)
        shown.scalars(7, {"top1": 0.5})
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("5_pictures/1")
    assert (image.step, image.width, image.height, image.encoded_image_string) == (5, 7, 8, b"\x89PNG")
    assert calls == [1] and curve(tmp_path, "top1") == [(7, 0.5)]
    assert "no more pictures" in capsys.readouterr().out


def test_scores_of_a_part_of_train_have_tags_of_their_own():
    row = {"step": 3, "tune_top1": 0.5, "train_total": 1.0, "lr": 0.1, "grad_norm": None, "goodput": 0.9}
    assert curves_of(row) == {
        "1_overview/1_top1_tune": 0.5,
        "1_overview/5_loss_total": 1.0,
        "4_more/lr": 0.1,
        "2_health/goodput": 0.9,
    }


# ---- progress


def test_plain_lines_come_at_most_every_so_often(capsys):
    clock, loss = Clock(), Loss()
    shown = Monitor(None, enabled=True, lines_every_s=30, clock=clock)
    with shown.epoch(2, 5, steps=100) as progress:
        for step in range(1, 101):
            clock.now += 1
            progress.update(step, loss, 512.4)
        shown.line("epoch 2/5 done")
    said = capsys.readouterr().out.splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in said] == [
        "epoch 2/5, step 30/100, loss 0.2500, 512 images/s",
        "epoch 2/5, step 60/100, loss 0.2500, 512 images/s",
        "epoch 2/5, step 90/100, loss 0.2500, 512 images/s",
        "epoch 2/5 done",
    ]
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in said)
    assert loss.reads == 3


def test_short_epochs_do_not_print_more_often(capsys):
    clock = Clock()
    shown = Monitor(None, enabled=True, lines_every_s=30, clock=clock)
    for epoch in range(1, 11):
        with shown.epoch(epoch, 10, steps=10) as progress:
            for step in range(1, 11):
                clock.now += 1
                progress.update(step, 1.0, 1.0)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_terminal_gets_one_bar_and_lines_above_it():
    terminal, clock, loss = Terminal(), Clock(), Loss()
    shown = Monitor(None, enabled=True, stream=terminal, clock=clock)
    with shown.epoch(2, 5, steps=10, done=4) as progress:
        for step in range(5, 11):
            clock.now += 0.3
            progress.update(step, loss, 512.4)
            if step == 7:
                shown.line("saved")
    assert "epoch 2/5" in terminal.shown() and "4/10" in terminal.shown()
    assert "loss 0.2500, 512 images/s" in terminal.shown()
    lines = [line.rsplit("\r", 1)[-1] for line in terminal.shown().split("\n")]
    assert [line[9:] for line in lines if line.strip()] == ["saved"]
    assert loss.reads == 3


@pytest.mark.parametrize("stream", [Terminal("ascii"), io.TextIOWrapper(io.BytesIO(), encoding="latin-1")])
def test_an_old_encoding_ends_nothing(stream):
    shown = Monitor(None, enabled=True, stream=stream, lines_every_s=0)
    with shown.epoch(1, 1, steps=2) as progress:
        progress.update(1, 1.0, 1.0)
        shown.line("class Kínai \u4e2d")
        progress.update(2, 1.0, 1.0)
    stream.flush()
    assert b"nai \\u4e2d" in stream.buffer.getvalue()


class Broken:
    """An output that fails on every write: a log on a full disk, a pipe whose reader went, a closed file."""

    encoding = "utf-8"

    def __init__(self, error, on_terminal):
        self.error, self.isatty, self.writes = error, lambda: on_terminal, 0

    def write(self, text):
        self.writes += 1
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("on_terminal", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), BrokenPipeError(), ValueError("closed file")])
def test_an_output_that_fails_ends_nothing(error, on_terminal):
    stream = Broken(error, on_terminal)
    shown = Monitor(None, enabled=True, stream=stream, lines_every_s=0)
    with shown.epoch(1, 1, steps=2) as progress:
        progress.update(1, 1.0, 1.0)
        shown.line("lost")
    assert stream.writes > 0
