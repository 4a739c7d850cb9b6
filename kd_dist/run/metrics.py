"""What a run measures: metrics.jsonl with one row per epoch, costs.json, and a trace of some steps."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from kd_dist.errors import UserError
from kd_dist.files import read_json, write_atomically, write_json, writing
from kd_dist.run.folder import RunFolder

CACHE_SECONDS = "writing the cache"


def append_metrics(folder: RunFolder, row: Mapping[str, Any]) -> None:
    """Add one epoch's row, which has "step". It survives the process; `sync_metrics` makes it survive a power cut."""
    line = json.dumps(dict(row)) + "\n"
    with writing(folder.metrics), open(folder.metrics, "a", encoding="utf-8") as file:
        file.write(line)


def sync_metrics(folder: RunFolder) -> None:
    """Flush the rows to disk. Do so before publishing a later checkpoint: a resume from it does not compute them again,
    whereas it cuts the rows that come after it. So each epoch has one row, whatever reached the disk last.
    """
    with writing(folder.metrics), suppress(FileNotFoundError), open(folder.metrics, "rb") as file:
        os.fsync(file.fileno())


def truncate_metrics(folder: RunFolder, step: int) -> None:
    """Keep the rows up to `step`, the step of the checkpoint that a run resumes from (0: none)."""
    if folder.metrics.exists():
        kept = "".join(json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step)
        with writing(folder.metrics):
            write_atomically(folder.metrics, lambda file: file.write(kept.encode()))


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """All rows, oldest first; a last line without its end (a writer killed, or at work) is passed over."""
    try:
        lines = folder.metrics.read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{folder.metrics} is damaged ({error}); restore it or delete it.") from error


def head_of(row: Mapping[str, Any]) -> str:
    """What begins the names of an epoch's scores: "val", or "tune" where a part of train was scored instead."""
    return "tune" if "tune_top1" in row else "val"


def note_cost(folder: RunFolder, name: str, seconds: float) -> None:
    """Note what a kind of work, such as CACHE_SECONDS, took in all until now. Rank 0 only."""
    write_json(folder.costs, {**read_costs(folder), name: seconds})


def read_costs(folder: RunFolder) -> dict[str, float]:
    """Seconds by kind of work, as `note_cost` noted them; empty where nothing was noted."""
    return read_json(folder.costs, mend="delete it: only the costs are lost.") or {}


def write_trace(folder: RunFolder, export: Callable[[str], object]) -> None:
    """Let `export` write a trace to the path it is given, and put that in place. Raises OSError."""
    temporary = folder.path / f".{folder.trace.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    export(str(temporary))
    os.replace(temporary, folder.trace)
