"""What happened in a run, as codes for programs to compare: events.jsonl in the run's folder, one JSON object per line.

    {"time": "2026-01-31T12:00:00.250+00:00", "code": "checkpoint-written", "job": "0001-teacher", "step": 141}

`time` is UTC, `code` one of `Code`; `job` is there where a launcher named its job in KD_DIST_JOB; the rest are facts.
Only rank 0 appends, and its launcher when it has ended; each line with a single write. A reader passes over a line
that was cut.
"""

import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from kd_dist.errors import EXIT_PEER_LOST, EXIT_USER_ERROR

NAME = "events.jsonl"
JOB_VARIABLE = "KD_DIST_JOB"


class Code(StrEnum):
    """What can happen in a run. Facts in brackets."""

    DATA_READY = "data-ready"  # data and settings are checked, the folder belongs to this run
    TRAINING_STARTED = "training-started"  # [epochs, ranks]
    RESUMED = "resumed"  # from a checkpoint [step]
    EPOCH_FINISHED = "epoch-finished"  # [epoch, epochs, the scores such as val_top1]
    CHECKPOINT_WRITTEN = "checkpoint-written"  # [step]
    LABELLING_STARTED = "labelling-started"  # a teacher begins to write its cache [views]
    BLOCK_WRITTEN = "block-written"  # a piece of the cache, by rank 0 [done, total]
    CACHE_PUBLISHED = "cache-published"  # [path]
    RUN_FINISHED = "run-finished"
    RUN_INTERRUPTED = "run-interrupted"  # stopped on request, all saved [reason, message]
    RUN_FAILED = "run-failed"  # [reason, message]
    RUN_REQUEUED = "run-requeued"  # a launcher asked for another start [why]; written when rank 0 has ended


class Reason(StrEnum):
    """Why a run did not finish. state.json holds it as `code`, beside the sentence."""

    USER_ERROR = "user-error"  # something that the user can mend
    PEER_LOST = "peer-lost"  # another rank failed first
    STOPPED = "stopped"  # a signal asked for it
    DEFECT = "defect"  # an exception that nobody foresaw

    @classmethod
    def of_exit_code(cls, code: int) -> "Reason":
        """Why a rank ended with this code, which is not 0; minus a signal's number where that killed it."""
        if code in (EXIT_USER_ERROR, EXIT_PEER_LOST):
            return cls.USER_ERROR if code == EXIT_USER_ERROR else cls.PEER_LOST
        return cls.STOPPED if code == -signal.SIGTERM or code > 128 else cls.DEFECT


def emit(folder: Path, code: Code, **facts: Any) -> None:
    """Append an event to a run folder's events.jsonl. A failure to write is passed over: it must not end a run."""
    job = os.environ.get(JOB_VARIABLE)
    with contextlib.suppress(OSError):
        append(folder / NAME, {"code": code, **({"job": job} if job else {}), **facts})


def append(path: Path, event: Mapping[str, Any]) -> None:
    """Append one object, headed by the time, as a line. Raises OSError."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = (json.dumps({"time": time, **event}) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # an earlier writer was cut in its line
            line = b"\n" + line
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole events of a file, oldest first; none where there is no such file. Raises OSError."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and "code" in event:
                events.append(event)
    return events


def standing(events: Sequence[Mapping[str, Any]], trained_s: float) -> dict[str, float]:
    """How a run stands: attempts so far, and goodput, the share that training took, `trained_s`, of all the time since
    the first attempt had its data, waits in a queue included. Empty where nothing was noted.
    """
    begun = [event for event in events if event["code"] == Code.DATA_READY]
    if not begun:
        return {}
    passed = datetime.now(UTC) - datetime.fromisoformat(begun[0]["time"])
    return {"attempts": len(begun), "goodput": trained_s / max(passed.total_seconds(), 1e-9)}


_ENDS = {
    Code.RUN_FINISHED: "finished",
    Code.RUN_INTERRUPTED: "stopped on request, all saved",
    Code.RUN_FAILED: "failed",
    Code.RUN_REQUEUED: "requeued",
}


def history(events: Sequence[Mapping[str, Any]]) -> str:
    """The attempts of a run as a Markdown table: when each began, on how many ranks, from which step, how it ended."""
    rows: list[dict[str, str]] = []
    for event in events:
        code = event["code"]
        if code == Code.DATA_READY:
            rows.append({"began": event["time"][:19], "from step": "0", "ranks": "-", "ended": "-", "how": ""})
        elif rows and code in (Code.TRAINING_STARTED, Code.RESUMED):
            facts = {"ranks": "ranks", "step": "from step"}
            rows[-1] |= {facts[fact]: str(event[fact]) for fact in facts if fact in event}
        elif rows and code in _ENDS:
            how = [_ENDS[code], *(str(event[fact]) for fact in ("why", "message") if event.get(fact))]
            rows[-1] |= {"ended": event["time"][:19], "how": "; ".join(filter(None, [rows[-1]["how"], ": ".join(how)]))}
    for row in rows[:-1]:
        row["how"] = row["how"] or "killed: it noted no end"
    names = ("began", "ranks", "from step", "ended", "how")
    lines: list[tuple[str, ...]] = [("attempt", *names), ("---",) * (1 + len(names))]
    lines += [(str(number), *(attempt[name] for name in names)) for number, attempt in enumerate(rows, 1)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
