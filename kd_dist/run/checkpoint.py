"""A run's folder: the only place that spells the names of its files, and the only one that writes or removes them.

    runs/student/
        settings.json      what the run was asked to do; a resume is checked against it
        state.json         how it stands: running, finished, interrupted or failed
        metrics.jsonl      one line per epoch
        events.jsonl       what happened when, as codes (kd_dist/events.py)
        checkpoints/       step-00000141.pt ..., the last two
        model.pt           the final weights
        model-epoch-20.pt  those after 20 epochs, where they were asked for (teachers)
        val_logits.h5      the network's own logits on what it is scored on: val, or under --tune a part of train
        logits.h5          the cache of soft labels, with logits.h5.sha256 (teachers)
        costs.json         seconds of work that no epoch's row counts, such as writing the cache (teachers)
        trace.json         a profile of some steps, where one was asked for
        events.out.tfevents.*                TensorBoard

Files are replaced by one rename, so a reader never meets half of one; metrics.jsonl is appended to, and its readers
pass over a last line that was cut. Only rank 0 writes. torch and h5py are imported where they are used, so that a login
node can look at runs quickly.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import socket
import time
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_dist.errors import UserError
from kd_dist.files import read_json, write_atomically, write_json, writing
from kd_dist.run import events

if TYPE_CHECKING:
    import torch

CACHE_SECONDS = "writing the cache"
Completed = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Stored settings -> the same with what this version adds to them."""

STATUSES = ("running", "finished", "interrupted", "failed")
_VERSION = 1
_RUN, _CHECKPOINT, _MODEL, _VAL_LOGITS = "kd_dist.run", "kd_dist.checkpoint", "kd_dist.model", "kd_dist.val_logits"
_OUR_MARK = b"kd_dist."  # the format's name begins so, and torch.save does not compress it
_SEAL_LENGTH = 64  # hex digits of a SHA-256
_LOCK_PATIENCE_S = 20.0  # a killed launcher's ranks notice within seconds and let go


@dataclass(frozen=True)
class RunFolder:
    """The names inside one run's folder. Making one touches no disk."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "settings.json"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / events.NAME

    @property
    def model(self) -> Path:
        return self.path / "model.pt"

    def model_after(self, epochs: int) -> Path:
        """Where the weights after so many epochs are kept, if they are asked for."""
        return self.path / f"model-epoch-{epochs}.pt"

    @property
    def val_logits(self) -> Path:
        return self.path / "val_logits.h5"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    @property
    def cache(self) -> Path:
        return self.path / "logits.h5"

    @property
    def costs(self) -> Path:
        return self.path / "costs.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.pt"

    def saved_steps(self) -> list[int]:
        """Steps that have a checkpoint file, whole or not, oldest first."""
        names = (re.fullmatch(r"step-(\d{8,})\.pt", path.name) for path in self.checkpoints.glob("step-*.pt"))
        return sorted(int(name[1]) for name in names if name)

    def products(self) -> list[Path]:
        """The names of all that a run makes, but for settings.json and the lock, in the order in which to remove it.

        The state goes first: a removal that is cut short must not leave a run that calls itself finished.
        """
        cache_companions = [*self.path.glob(f"{self.cache.name}.*"), *self.path.glob(f".{self.cache.name}.*")]
        return [
            *(self.state, self.model, self.val_logits, self.trace, self.cache, self.costs, self.events),
            *cache_companions,  # its digest, and the parts of one that was not finished
            *(self.checkpoint(step) for step in self.saved_steps()),
            *self.path.glob("events.out.tfevents.*"),
            *(path for path in self.path.glob("model-epoch-*.pt") if re.fullmatch(r"model-epoch-\d+\.pt", path.name)),
            self.metrics,
        ]

    def left_overs(self) -> list[Path]:
        """Temporary files of writers that were killed; those of a cache are its own writer's business."""
        named = (self.settings, self.state, self.metrics, self.model, self.val_logits, self.trace, self.costs)
        names = [path.name for path in named]
        found = [path for name in names for path in self.path.glob(f".{name}.*.tmp")]
        found += self.path.glob(".model-epoch-*.tmp")
        return [*found, *self.checkpoints.glob(".step-*.tmp")]


# ---- settings: whose folder is it, and may this command go on in it


def claim(
    folder: RunFolder,
    kind: str,
    settings: Mapping[str, Any],
    may_change: Collection[str],
    start_over: bool,
    completed: Completed = dict,
) -> bool:
    """Take the folder for a run and write its settings.json; True where it goes on with an earlier one. Rank 0 only.

    `kind` is "teacher" or "student", `settings` anything json can hold; `may_change` names the settings that a resume
    may alter, and `completed` fills in what an older version's settings lack. `start_over` removes what the earlier run
    of the same kind made, never a file of a name that is not ours. The folder stays locked against other processes
    until this one ends. Nothing is touched before the checks have passed. Raises UserError: the folder holds something
    else, another kind of run or other settings, is in use, or cannot be written.
    """
    wanted = json.loads(json.dumps(settings))
    check = partial(_check_free, folder, kind, wanted, may_change, start_over, completed)
    check()
    _make_and_lock(folder)
    there = check()  # once more: until the lock was ours, another process may have begun a run here
    with writing(folder.path):
        for path in folder.left_overs() + (folder.products() if start_over else []):
            _remove(path)
    write_json(folder.settings, {"format": _RUN, "version": _VERSION, "kind": kind, "settings": wanted})
    return there and not start_over


def forget(folder: RunFolder) -> None:
    """Remove a run, and its folder if nothing else is in it. Raises UserError while another process uses it."""
    _make_and_lock(folder)
    with writing(folder.path):
        for path in (*folder.left_overs(), *folder.products(), folder.settings, folder.lock):
            _remove(path)
    for path in (folder.checkpoints, folder.path):
        with suppress(OSError):
            path.rmdir()


def is_finished(
    folder: RunFolder,
    kind: str,
    settings: Mapping[str, Any],
    may_change: Collection[str],
    completed: Completed = dict,
) -> bool:
    """Whether this very run was brought to its end here; the folder is not claimed.

    Raises UserError where it holds something else, as `claim` does.
    """
    there = _check_free(folder, kind, json.loads(json.dumps(settings)), may_change, False, completed)
    return there and folder.model.exists() and (read_state(folder) or {}).get("status") == "finished"


def read_settings(folder: RunFolder) -> tuple[str, dict[str, Any]]:
    """The kind of a run and its settings; UserError where the folder holds no run of ours."""
    try:
        document = json.loads(folder.settings.read_text(encoding="utf-8"))
        if document["format"] != _RUN or document["version"] != _VERSION:
            raise ValueError
        return document["kind"], document["settings"]
    except FileNotFoundError:
        raise UserError(
            f"{folder.path} holds no run ({folder.settings.name} is missing); name a run's folder."
        ) from None
    except OSError as error:
        raise UserError(f"{folder.settings} cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder.settings} is no run's settings as this version writes them; name another folder."
        ) from error


def _check_free(
    folder: RunFolder,
    kind: str,
    wanted: Mapping[str, Any],
    may_change: Collection[str],
    start_over: bool,
    completed: Completed,
) -> bool:
    """Whether an earlier run is there; UserError where this one may not have the folder."""
    if not os.path.lexists(folder.settings):
        _refuse_strangers(folder)
        return False
    there, old = read_settings(folder)
    if there != kind:
        raise UserError(f"--out {folder.path} holds a {there} run, not a {kind} run; choose another --out.")
    differing = [] if start_over else differences(completed(old), wanted, may_change)
    if differing:
        free = ", ".join(_flag(key) for key in sorted(may_change)) or "nothing"
        other = "choose another --out"
        if any(text.startswith("--epochs ") for text in differing):
            other += f" (there, --init {shlex.quote(str(folder.path))} trains on from this run's weights)"
        raise UserError(
            f"--out {folder.path} holds a run with other settings ({'; '.join(differing)}) and a resume may change "
            f"only {free}: type the old values, {other}, or add --start-over to delete that run."
        )
    return True


def _refuse_strangers(folder: RunFolder) -> None:
    try:
        # Hidden names are the business of file systems and editors, or our own lock; none of our files replaces one.
        names = sorted(name for name in os.listdir(folder.path) if not name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"--out {folder.path} is no folder to write in ({error.strerror or error}); choose another."
        ) from error
    if names:
        raise UserError(
            f"--out {folder.path} holds {len(names)} files or folders that are no run, such as {names[0]}; "
            "choose another --out."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str]) -> list[str]:
    """What two sets of settings disagree on but `may_change`, in words: "--seed was 0, now 1"."""

    def shown(settings: Mapping[str, Any], key: str) -> str:
        return json.dumps(settings[key]) if key in settings else "absent"

    keys = sorted((old.keys() | new.keys()) - set(may_change))
    pairs = [(key, shown(old, key), shown(new, key)) for key in keys]
    return [f"{_flag(key)} was {before}, now {after}" for key, before, after in pairs if before != after]


def _flag(key: str) -> str:
    """A setting as one types it; a name with a space ("train data") is a fact about the run, not a flag."""
    return key if " " in key else "--" + key.replace("_", "-")


def _make_and_lock(folder: RunFolder) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"--out {folder.path} cannot be written ({error.strerror or error}); choose another --out."
        ) from error
    if not _locked_in_time(descriptor):
        os.close(descriptor)
        raise UserError(f"--out {folder.path} is in use by another process; wait for it or choose another --out.")


def acquire(folder: RunFolder) -> bool:
    """Lock a run's folder, made where it is missing, for this process until it ends; False where another process has
    it. For a process that takes any run that is free: one that must have this run uses `claim`, which waits a while.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder.path} cannot be written ({error.strerror or error}).") from error
    if not (ours := _locked(descriptor)):
        os.close(descriptor)
    return ours


def in_use(folder: RunFolder) -> bool:
    """Whether another process has claimed the folder, and does not leave it soon. Not for one that this process has
    claimed: to look would free it.
    """
    try:
        descriptor = os.open(folder.lock, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _locked_in_time(descriptor)
    finally:
        os.close(descriptor)


def _locked_in_time(descriptor: int) -> bool:
    """Take the lock, waiting a while for an earlier attempt of this job that is on its way out."""
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while not _locked(descriptor):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _locked(descriptor: int) -> bool:
    """Try the lock once. The descriptor stays open: the lock goes when the process ends, however it ends.

    A POSIX lock, because children do not inherit it: loader workers that outlive a killed rank do not hold the folder.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: the user has to see to it
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- state and metrics


def write_state(folder: RunFolder, status: str, **facts: Any) -> None:
    """Note how the run stands: `status` is one of STATUSES, `facts` such as step=, epoch=, message=, code= (an
    events.Reason).

    time (UTC, ISO 8601), pid and host are added, so a reader can tell a silent run from a living one. Raises UserError
    when the disk is full: a caller that notes a failure suppresses it, to let the first failure be the one told.
    """
    if status not in STATUSES:
        raise ValueError(f"status {status!r} is none of {STATUSES}")
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    write_json(folder.state, {"status": status, **facts, "time": now, "pid": os.getpid(), "host": socket.gethostname()})


def read_state(folder: RunFolder) -> dict[str, Any] | None:
    """What `write_state` noted last, None where it never did."""
    try:
        return json.loads(folder.state.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.state} cannot be read ({error}).") from error


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
    """Keep the rows up to `step`, the step of the checkpoint that a run goes on from (0: none)."""
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


# ---- checkpoints and weights


def save_checkpoint(folder: RunFolder, step: int, payload: Mapping[str, Any]) -> Path:
    """Publish a checkpoint of `step` and keep it with the one before it; rank 0 only.

    `payload` holds tensors, numbers, strings and containers of them (what torch.load(weights_only=True) takes). Raises
    UserError when it cannot be written, with the older checkpoints untouched.
    """
    path = folder.checkpoint(step)
    older = [saved for saved in folder.saved_steps() if saved < step]
    last = f"from {folder.checkpoint(older[-1])}" if older else "from the start, for there is no checkpoint yet"
    with writing(path, goes_on=last):
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        _write_torch(path, {"format": _CHECKPOINT, "version": _VERSION, "step": step, "payload": dict(payload)})
    events.emit(folder.path, events.Code.CHECKPOINT_WRITTEN, step=step)
    # A later step than this one is a damaged file that was passed over on resuming: it does not count as one to keep.
    for saved in set(folder.saved_steps()) - {step, *older[-1:]}:
        folder.checkpoint(saved).unlink(missing_ok=True)
    return path


def newest_checkpoint(
    folder: RunFolder, warn: Callable[[str], None] | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint as (path, payload with "step"), on the CPU; None where there is no file at all.

    Damaged ones are passed over, and `warn` gets a sentence for each. Raises UserError when all are damaged.
    """
    damaged = []
    for step in reversed(folder.saved_steps()):
        path = folder.checkpoint(step)
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            damaged.append(str(path))
            if warn:
                warn(f"passing over a checkpoint: {error}")
    if damaged:
        names = ", ".join(damaged)
        raise UserError(f"no checkpoint can be read ({names}); restore one, or add --start-over to begin anew.")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The payload of one checkpoint and its "step", on the CPU. Raises UserError: missing, damaged, not ours."""
    document = _read_torch(path, _CHECKPOINT)
    return {**document["payload"], "step": document["step"]}


def save_model(path: Path, payload: Mapping[str, Any]) -> None:
    """Publish a run's weights and what is worth knowing of them; `payload` as in save_checkpoint."""
    with writing(path):
        _write_torch(path, {"format": _MODEL, "version": _VERSION, "payload": dict(payload)})


def load_model(path: Path) -> dict[str, Any]:
    """What save_model wrote, on the CPU. Raises UserError: missing, damaged, or not written by this program."""
    return _read_torch(path, _MODEL)["payload"]


def weights_digest(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over the weights in name order; it names a model, whatever file it is stored in.

    For each tensor, sorted by name: its name ("conv1.weight"), dtype ("float32") and shape ("64,3,7,7", "" for a
    scalar), each in UTF-8 after its length in bytes as 8 little-endian bytes, then the elements in C order,
    little-endian.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        plain = tensor.detach().cpu()
        for text in (name, str(plain.dtype).removeprefix("torch."), ",".join(map(str, plain.shape))):
            digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_torch(path: Path, document: dict[str, Any]) -> None:
    data = _sealed(document)
    write_atomically(path, lambda file: file.write(data.getbuffer()))


def _sealed(document: dict[str, Any]) -> io.BytesIO:
    """What torch.save writes, a zip archive, with the SHA-256 of all its bytes as the archive's comment at the end.

    torch.load reads it as ever. The records' own CRC-32 are not enough: torch.load does not look at them, and a flipped
    byte in the archive's directory leads it to other bytes of the file without an error.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(document, buffer)
    buffer.seek(-2, io.SEEK_END)
    buffer.write(_SEAL_LENGTH.to_bytes(2, "little"))  # an archive ends with its comment's length, then the comment
    buffer.write(_seal_of(buffer.getbuffer()))
    return buffer


def _seal_of(data: memoryview) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _read_torch(path: Path, format_name: str) -> dict[str, Any]:
    """A document of ours; UserError says in what way the file is none."""
    import torch

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no {path}; train first, or name the right file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    if data[-_SEAL_LENGTH:] != _seal_of(memoryview(data)[:-_SEAL_LENGTH]):
        if data.startswith(b"PK") and _OUR_MARK in data:
            raise UserError(
                f"{path} is cut short or damaged: the SHA-256 at its end is not its content's; copy it again, or train "
                "again."
            )
        raise UserError(
            f"{path} was not written by kd_dist: it is {_foreign_kind(data)}, and kd_dist reads only its own model.pt; "
            "name that of a run, or train this network with kd_dist.teacher (kd_dist/models.py takes new networks)."
        )
    try:
        document = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than weights and plain values, so it was not loaded.") from error
    if not isinstance(document, dict) or document.get("format") != format_name or document.get("version") != _VERSION:
        raise UserError(f"{path} was not written by this program as {format_name} version {_VERSION}.")
    return document


def _foreign_kind(data: bytes) -> str:
    """What another program's weights file is, in words; nothing in it is run."""
    if not data.strip():
        return "an empty file"
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file, such as a cache of logits"
    if data[8:10] == b'{"' and int.from_bytes(data[:8], "little") < len(data):
        return "a safetensors file of another program"
    if data.startswith(b"PK"):
        return _foreign_torch_kind(data)
    if data.startswith(b"\x80"):
        return "a pickle of another program, as older versions of torch.save write"
    return "a file of another kind"


def _foreign_torch_kind(data: bytes) -> str:
    import torch

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:
        return "a file of another program that is cut short or damaged"
    if "constants.pkl" in names:
        return "a TorchScript module of another program"
    if "data.pkl" not in names:
        return "a zip archive of another kind"
    try:
        document = torch.load(io.BytesIO(data), map_location="meta", weights_only=True)
    except Exception:  # torch raises almost anything on a file that it cannot read
        return "a whole pickled network or checkpoint of another program"
    if isinstance(document, dict) and document and all(isinstance(value, torch.Tensor) for value in document.values()):
        return "a PyTorch state dict of another program"
    return "a PyTorch checkpoint of another program"


# ---- a network's logits on what it is scored on


def write_val_logits(
    path: Path, logits_NK: np.ndarray, labels_N: np.ndarray, paths: Sequence[str], fingerprint: str, **attrs: Any
) -> None:
    """Publish a model's raw logits on val as HDF5: /logits [N, K] float32, /label [N] int64, /path [N] UTF-8.

    Rows stand in the order of the sample list that `fingerprint` names; `attrs`, such as top1= in [0, 1], become
    attributes. A run under --tune writes the logits of its part of train: of= says which, and is "val" otherwise.
    """
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs.update({"format": _VAL_LOGITS, "version": _VERSION, "fingerprint": fingerprint, **attrs})
        file.create_dataset("logits", data=np.asarray(logits_NK, np.float32), fletcher32=True)
        file.create_dataset("label", data=np.asarray(labels_N, np.int64), fletcher32=True)
        file.create_dataset("path", data=np.array([name.encode() for name in paths]))
    with writing(path):
        write_atomically(path, lambda target: target.write(buffer.getbuffer()))


@dataclass(frozen=True)
class ValLogits:
    """A val_logits.h5 in memory: logits_NK float32, labels_N int64, the sample list's fingerprint, all attributes."""

    logits_NK: np.ndarray
    labels_N: np.ndarray
    paths: tuple[str, ...]
    fingerprint: str
    attrs: dict[str, Any]

    @property
    def of(self) -> str:
        """ "val", or the part of train that a run under --tune is scored on."""
        return self.attrs.get("of", "val")


def read_val_logits(path: Path) -> ValLogits:
    """What write_val_logits wrote. Raises UserError: missing, damaged, or not written by this program."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            attrs = dict(file.attrs)
            if attrs.get("format") != _VAL_LOGITS or attrs.get("version") != _VERSION:
                raise UserError(f"{path} was not written by this program as {_VAL_LOGITS} version {_VERSION}.")
            paths = tuple(name.decode() for name in file["path"][()])
            return ValLogits(file["logits"][()], file["label"][()], paths, attrs["fingerprint"], attrs)
    except FileNotFoundError:
        raise UserError(f"there is no {path}; run it to its end first.") from None
    except (OSError, KeyError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise UserError(f"{path} is cut short, damaged or no file of ours.") from error
