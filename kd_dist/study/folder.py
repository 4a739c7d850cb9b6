"""A study's folder: the names in it, and study.json, which records what was requested. Trains nothing.

runs/study/
    study.json               arms, definitions of variants, settings of the grid, seeds, the primary contrast, the
                             cache, and the settings that all runs share
    distilled/seed-0/ ...    a run's folder for each arm and seed
    table.md, plot.png       the results, and results.json with all their numbers
    over-views.png           top-1 over one setting
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_dist.config import StudentConfig, StudyConfig, flags_of
from kd_dist.errors import UserError
from kd_dist.fetch import is_address
from kd_dist.files import read_json, write_json
from kd_dist.lock import locked
from kd_dist.run.claim import differences, forget
from kd_dist.run.folder import RunFolder

if TYPE_CHECKING:
    from kd_dist.study.arms import Arm

_FORMAT, _VERSION = "kd_dist.study", 2
BASE = "base arm"  # in a variant's settings.json, the built-in arm that it varies
_OWN = StudyConfig.may_change


@dataclass(frozen=True)
class StudyFolder:
    """The names inside one study's folder. Making one touches no disk."""

    path: Path

    @property
    def study(self) -> Path:
        return self.path / "study.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def table(self) -> Path:
        return self.path / "table.md"

    @property
    def figures(self) -> Path:
        return self.path / "results.json"

    @property
    def plot(self) -> Path:
        return self.path / "plot.png"

    def plot_over(self, setting: str) -> Path:
        """The plot of top-1 over a setting."""
        return self.path / f"over-{setting.replace('_', '-')}.png"

    def run(self, arm: str, seed: int) -> RunFolder:
        """The run of an arm with a seed."""
        return RunFolder(self.path / arm / f"seed-{seed}")

    def runs(self) -> dict[str, dict[int, RunFolder]]:
        """The runs that are there, finished or not, by arm and seed."""
        found: dict[str, dict[int, RunFolder]] = {}
        for path in sorted(self.path.glob("*/seed-*")):
            number = path.name.removeprefix("seed-")
            if number.isdecimal():
                found.setdefault(path.parent.name, {})[int(number)] = RunFolder(path)
        return found

    def document(self) -> dict[str, Any]:
        """The content of study.json; empty where there is none. Raises UserError where it cannot be read."""
        return read_json(self.study, mend="restore it, or run the study again.") or {}


def run_settings(study: StudyConfig, arm: Arm, seed: int) -> StudentConfig:
    """The settings of one run: the study's, with the arm's own changes. Only arms on fresh crops mix images.

    An arm on a fraction of the hard labels only trains for 1 / share times the epochs, so that all arms are shown about
    as many images.
    """
    shared = {name: value for name, value in study.flat().items() if name in flags_of(StudentConfig)}
    out = StudyFolder(Path(study.out)).run(arm.name, seed).path
    values = {**shared, **arm.changes, "out": str(out), "seed": seed}
    if values.get("crops") != "fresh":
        values |= {"mixup": 0.0, "cutmix": 0.0}
    if values["alpha"] == 0:
        share = values["label_fraction"]
        all_labels = study.optimisation.epochs
        epochs = round(all_labels / share)
        values |= {"epochs": epochs, "no_mix_epochs": study.augmentation.no_mix_epochs * epochs // all_labels}
        values |= {"warmup_epochs": study.optimisation.warmup_epochs * epochs / all_labels}
    return arm.settings.of(**values).resolved()


def note(folder: StudyFolder, settings: StudyConfig, arms: Sequence[Arm], cache_digest: str) -> None:
    """Write study.json, or add these arms and seeds to what earlier commands of the same settings and cache asked for.

    Several processes may do so at once. A study of other settings or another cache is removed, with its runs, if
    --start-over was typed. Raises UserError if it was not, and where the folder cannot be written.
    """
    shared = {name: value for name, value in settings.stored().items() if name not in _OWN}
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        with locked(folder.lock):
            earlier = _earlier(folder, shared, cache_digest, settings.run.start_over)
            document = {
                "format": _FORMAT,
                "version": _VERSION,
                "arms": [*dict.fromkeys([*earlier["arms"], *(arm.name for arm in arms)])],
                "variants": with_variants(folder, earlier, arms),
                "grid": [*dict.fromkeys([*earlier["grid"], *(word.partition("=")[0] for word in settings.grid or ())])],
                "seeds": sorted({*settings.seeds, *earlier["seeds"]}),
                "primary": list(settings.primary),
                "cache": settings["cache"] if is_address(settings["cache"]) else os.path.abspath(settings["cache"]),
                "cache digest": cache_digest,
                "settings": shared,
            }
            write_json(folder.study, document)
    except OSError as error:
        raise UserError(
            f"--out {folder.path} cannot be written ({error.strerror or error}); choose another."
        ) from error


def with_variants(folder: StudyFolder, document: Mapping[str, Any], arms: Sequence[Arm]) -> dict[str, str]:
    """The definition of each variant by its name: those of study.json and these. Raises UserError for a name that had
    another definition.
    """
    earlier = document.get("variants", {})
    own = {arm.name: arm.definition for arm in arms if arm.base is not None}
    for name in earlier.keys() & own.keys():
        if earlier[name] != own[name]:
            raise UserError(
                f"arm {name} of {folder.path} was {earlier[name]}, now {own[name]}; give the new one another name."
            )
    return earlier | own


def _earlier(folder: StudyFolder, shared: dict[str, Any], cache_digest: str, start_over: bool) -> dict[str, Any]:
    """The content of study.json; nothing where there is none, or where it is another study and is removed now. Raises
    UserError for another study that --start-over does not remove.
    """
    nothing: dict[str, Any] = {"arms": [], "grid": [], "seeds": []}
    try:
        document = json.loads(folder.study.read_text(encoding="utf-8"))
        if (document["format"], document["version"]) != (_FORMAT, _VERSION):
            raise ValueError("another format or version")
        earlier = StudyConfig.completed(document["settings"]) | {"cache digest": document["cache digest"]}
        differing = differences(earlier, shared | {"cache digest": cache_digest}, _OWN)
    except FileNotFoundError:
        return nothing
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.study} is not a study of this version ({error}); choose another --out.") from error
    if differing and not start_over:
        raise UserError(
            f"--out {folder.path} holds a study with other settings ({'; '.join(differing)}): use the old values, "
            "choose another --out, or add --start-over to remove it and its runs."
        )
    if not differing:
        return document
    for run in (run for runs in folder.runs().values() for run in runs.values()):
        if run.settings.exists():  # a folder without settings is not a run of ours
            forget(run)
    return nothing
