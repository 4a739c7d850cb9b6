"""The TensorBoard file of a run: curves, pictures, texts, the settings as hyperparameters, and a layout of charts.

Everything is written by a thread of its own, and never waited for long. A full disk ends the curves, a slow one loses
points; neither ends or delays a run. The horizontal axis counts training images seen, so that runs with different batch
sizes, a teacher and a student for example, share it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

QUEUE_LENGTH = 4000  # events that may wait for a slow disk
PATIENCE_SECONDS = 5.0  # how long a run waits for a slow disk, once

OVERVIEW = "1_overview"  # TensorBoard sorts groups and tags by name, and opens the first groups
TAGS = {
    "top1": f"{OVERVIEW}/1_top1",
    "teacher_top1": f"{OVERVIEW}/2_teacher_top1",
    "agreement": f"{OVERVIEW}/3_agreement_with_teacher",
    "kl": f"{OVERVIEW}/4_kl_to_teacher",
    "train_total": f"{OVERVIEW}/5_loss_total",
    "train_soft": f"{OVERVIEW}/6_loss_soft",
    "train_hard": f"{OVERVIEW}/7_loss_hard",
    "images_per_s": f"{OVERVIEW}/8_images_per_s",
    "data_wait_share": f"{OVERVIEW}/9_data_wait_share",
}
"""The tags of the first screen by the names of metrics.jsonl, a score's without its "val_"."""

CHARTS = {
    "top-1": ("top1", "teacher_top1"),
    "agreement with the teacher": ("agreement",),
    "KL to the teacher, nats": ("kl",),
    "training loss": ("train_total", "train_soft", "train_hard"),
    "images/s": ("images_per_s",),
    "share of time waiting for data": ("data_wait_share",),
}
"""The charts of the first screen, each with its lines, by the names of metrics.jsonl."""

HEALTH = (
    *("step_median_s", "step_worst_s", "slowest_rank", "slowest_rank_extra_share", "data_wait_s"),
    *("host_memory_peak_bytes", "device_memory_peak_bytes", "grad_norm", "weight_norm"),
    *("model_flops_per_s", "model_flops_share", "goodput", "attempts"),
)
"""Names of metrics.jsonl that say how the hardware and the optimisation do."""


def tag_of(name: str) -> str:
    """The tag of a value of metrics.jsonl; a score of a part of train (tune_top1) does not pass for one of val."""
    head, _, score = name.partition("_")
    if head in ("val", "tune") and score in TAGS:
        return TAGS[score] + ("_tune" if head == "tune" else "")
    if name in HEALTH:
        return f"2_health/{name}"
    return TAGS.get(name, f"4_more/{name}")


def curves_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The points of an epoch's row by their tags."""
    return {tag_of(name): float(value) for name, value in row.items() if name != "step" and value is not None}


@dataclass(frozen=True)
class Description:
    """What a run is: Markdown texts by name, and the values by which runs are told apart (numbers, strings)."""

    texts: Mapping[str, str] = field(default_factory=dict)
    hparams: Mapping[str, Any] = field(default_factory=dict)


class Curves:
    """An event file in `folder`, written by a thread.

    `resume_at` is the position of the checkpoint that the run goes on from, 0 for none: TensorBoard drops what an
    earlier attempt logged after it, so that curves stay single. `say` gets the one sentence on a disk that fails.
    """

    _numbers = itertools.count()

    def __init__(self, folder: Path, resume_at: int, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._events: queue.Queue[Any] = queue.Queue(QUEUE_LENGTH)
        self._is_dead = self._is_slow = False
        self._start(resume_at)
        # Imported here, because two threads that import parts of one package can wait for each other.
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._records = RecordWriter
        self._thread = threading.Thread(target=self._write_all, name="curves", daemon=True)
        self._thread.start()

    def scalars(self, at: int, values: Mapping[str, SupportsFloat]) -> None:
        """One point at `at` images on each curve, by tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self.summary(at, Summary(value=points))

    def picture(self, at: int, tag: str, encoded: bytes, size: tuple[int, int]) -> None:
        """A picture as PNG or JPEG, with its width and height."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(width=size[0], height=size[1], colorspace=3, encoded_image_string=encoded)
        self.summary(at, Summary(value=[Summary.Value(tag=tag, image=image)]))

    def describe(self, at: int, description: Description) -> None:
        """Texts, hyperparameters, and the layout of the tab "Custom Scalars"."""
        from torch.utils.tensorboard import summary

        for name, text in description.texts.items():
            self.summary(at, summary.text(name, text))
        if description.hparams:
            self.summary(at, _hparams(description.hparams))
        charts = {title: ["Multiline", [tag_of(name) for name in names]] for title, names in CHARTS.items()}
        self.summary(at, summary.custom_scalars({"First screen": charts, "Health": _health_charts()}))

    def finished(self, at: int) -> None:
        """The run has come to its end: the HParams tab shows it as a success."""
        self.summary(at, _session_end())

    def summary(self, at: int, summary: Any) -> None:
        """Add a summary at `at` images."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._put(Event(wall_time=time.time(), step=at, summary=summary))

    def flush(self) -> None:
        """Bring all points to the disk, unless it is slow. Call it before saving a checkpoint: what is lost before it
        is not logged again.
        """
        written = threading.Event()
        if self._is_dead or not self._put(written) or self._is_slow:
            return
        if not written.wait(PATIENCE_SECONDS):
            self._report_slowness()

    def close(self) -> None:
        """Write what is left, and end the thread unless the disk keeps it."""
        self.flush()
        if self._events.full():  # the end must fit in
            with contextlib.suppress(queue.Empty):
                self._events.get_nowait()
        self._events.put_nowait(None)
        if not self._is_slow:
            self._thread.join(PATIENCE_SECONDS)

    def _start(self, resume_at: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        now = time.time()
        self._put(Event(wall_time=now, file_version="brain.Event:2"))
        begin = SessionLog(status=SessionLog.START)
        self._put(Event(wall_time=now, step=resume_at + 1 if resume_at else 0, session_log=begin))

    def _put(self, event: Any) -> bool:
        if self._is_dead:
            return False
        try:
            self._events.put_nowait(event)
            return True
        except queue.Full:
            self._report_slowness()
            return False

    def _report_slowness(self) -> None:
        if not self._is_slow:
            self._is_slow = True
            self._say(f"TensorBoard curves may have gaps, the run goes on: writing to {self._folder} is slow")

    def _write_all(self) -> None:
        try:
            self._write_until_closed()
        except Exception as error:
            self._is_dead = True
            self._say(f"TensorBoard curves end here, the run goes on: {error}")
            while (event := self._events.get()) is not None:
                if isinstance(event, threading.Event):
                    event.set()  # there is nothing to wait for any more

    def _write_until_closed(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Names are sorted by time: two attempts may begin within a second.
        name = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}"
        with open(self._folder / f"events.out.tfevents.{name}", "wb") as file:
            records = self._records(file)
            while (event := self._events.get()) is not None:
                if isinstance(event, threading.Event):
                    try:
                        file.flush()
                    finally:
                        event.set()
                    continue
                records.write(event.SerializeToString())
                if self._events.empty():  # show what there is
                    file.flush()


def _health_charts() -> dict[str, list[Any]]:
    together = {
        "step, seconds: median and worst": ("step_median_s", "step_worst_s"),
        "memory peaks, bytes: host and device": ("host_memory_peak_bytes", "device_memory_peak_bytes"),
        "norms of gradient and weights": ("grad_norm", "weight_norm"),
        "share of the wall time that trained, over restarts": ("goodput",),
    }
    return {title: ["Multiline", [tag_of(name) for name in names]] for title, names in together.items()}


# ---- hyperparameters: as SummaryWriter.add_hparams writes them, but into the run's own file and not a run beside it

_TEXTUAL = ("kind", "network", "loss", "crops", "data")
_SCORES = ("top1", "teacher_top1", "agreement", "kl", "train_total")


def _hparams(values: Mapping[str, Any]) -> Any:
    """The start of a session of the HParams tab. All runs of a folder should name the same values, None for one that
    does not apply: the tab takes its columns from the first run.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if name in _TEXTUAL:
            start.hparams[name].string_value = "-" if value is None else str(value)
        elif value is not None:
            start.hparams[name].number_value = value
    types = {name: "DATA_TYPE_STRING" if name in _TEXTUAL else "DATA_TYPE_FLOAT64" for name in values}
    experiment = api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=name, type=api_pb2.DataType.Value(types[name])) for name in values],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=TAGS[name]), display_name=name) for name in _SCORES
        ],
    )
    begin = _plugin_value(metadata.SESSION_START_INFO_TAG, session_start_info=start)
    return Summary(value=[_plugin_value(metadata.EXPERIMENT_TAG, experiment=experiment), begin])


def _session_end() -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value("STATUS_SUCCESS"), end_time_secs=time.time())
    return Summary(value=[_plugin_value(metadata.SESSION_END_INFO_TAG, session_end_info=end)])


def _plugin_value(tag: str, **content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    data = plugin_data_pb2.HParamsPluginData(**content)
    return Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
