"""Whose folder is it, and may this command go on in it: settings.json, checked and written before a run begins."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from kd_dist.errors import UserError
from kd_dist.files import write_json, writing
from kd_dist.run.folder import RunFolder
from kd_dist.run.lock import make_and_lock
from kd_dist.run.state import read_state

Completed = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Stored settings -> the same with what this version adds to them."""

_VERSION = 1
_RUN = "kd_dist.run"


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
    make_and_lock(folder)
    there = check()  # once more: until the lock was ours, another process may have begun a run here
    with writing(folder.path):
        for path in folder.left_overs() + (folder.products() if start_over else []):
            _remove(path)
    write_json(folder.settings, {"format": _RUN, "version": _VERSION, "kind": kind, "settings": wanted})
    return there and not start_over


def forget(folder: RunFolder) -> None:
    """Remove a run, and its folder if nothing else is in it. Raises UserError while another process uses it."""
    make_and_lock(folder)
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
            f"{folder.path} is not a run folder ({folder.settings.name} is missing); name a run's folder, such as "
            f"{folder.path}/teacher."
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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
