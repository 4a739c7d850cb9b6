"""A study's folder: the names in it, and study.json, which says what was asked for.

runs/study/
    study.json               arms and what variants are made of, seeds, the primary contrast, the cache, the settings
                             that all runs share
    cached-V/seed-0/ ...     a run's folder for each arm and seed
    table.md, plot.png       the results, and results.json with all their numbers
    sweep-views.png          one setting along an axis
    hparams/                 an entry a run for TensorBoard's HParams page
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_dist import checkpoint
from kd_dist.checkpoint import RunFolder
from kd_dist.config import StudentConfig, StudyConfig, flags_of
from kd_dist.errors import UserError
from kd_dist.files import locked, read_json, write_json
from kd_dist.study.arms import ARMS, Arm

_FORMAT, _VERSION = "kd_dist.study", 1
MADE_OF = "made of"  # in a variant's settings.json, the arm of the ladder that it is made of
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

    def sweep(self, setting: str) -> Path:
        """The plot of a sweep over a setting."""
        return self.path / f"sweep-{setting.replace('_', '-')}.png"

    @property
    def page(self) -> Path:
        return self.path / "hparams"

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
        """What study.json says; empty where there is none. Raises UserError where it cannot be read."""
        return read_json(self.study, mend="restore it, or run the study again.") or {}


def run_settings(study: StudyConfig, arm: Arm, seed: int) -> StudentConfig:
    """The settings of one run: the study's, with the arm's own changes. Blends are for fresh crops alone.

    An arm that learns from labels alone passes over a share of them so many times more often: about as many pictures
    are shown.
    """
    shared = {name: value for name, value in study.flat().items() if name in flags_of(StudentConfig)}
    out = StudyFolder(Path(study.out)).run(arm.name, seed).path
    values = {**shared, **arm.changes, "out": str(out), "seed": seed}
    if values.get("crops") != "fresh":
        values |= {"mixup": 0.0, "cutmix": 0.0}
    if values["alpha"] == 0:
        share = values["label_fraction"]
        epochs = round(study.epochs / share)
        values |= {"epochs": epochs, "no_mix_epochs": study.no_mix_epochs * epochs // study.epochs}
        values |= {"warmup_epochs": study.warmup_epochs * epochs / study.epochs}
    return arm.settings.of(**values).resolved()


def note(folder: StudyFolder, settings: StudyConfig, arms: Sequence[Arm], cache_digest: str) -> None:
    """Write study.json, or add these arms and seeds to what earlier commands of the same settings and cache asked for.

    Several processes may do so at once. A study of other settings or another cache is removed, with its runs, where
    --start-over says so. Raises UserError where it does not, and where the folder cannot be written.
    """
    shared = {name: value for name, value in settings.stored().items() if name not in _OWN}
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        with locked(folder.lock):
            earlier = _earlier(folder, shared, cache_digest, settings.start_over)
            names = {arm.name for arm in arms} | {*earlier["arms"]}
            variants = with_variants(folder, earlier, arms)
            document = {
                "format": _FORMAT,
                "version": _VERSION,
                "arms": [name for name in (*ARMS, *variants) if name in names],
                "variants": variants,
                "seeds": sorted({*settings.seeds, *earlier["seeds"]}),
                "primary": list(settings.primary),
                "cache": os.path.abspath(settings.cache),
                "cache digest": cache_digest,
                "settings": shared,
            }
            write_json(folder.study, document)
    except OSError as error:
        raise UserError(
            f"--out {folder.path} cannot be written ({error.strerror or error}); choose another."
        ) from error


def with_variants(folder: StudyFolder, document: Mapping[str, Any], arms: Sequence[Arm]) -> dict[str, str]:
    """What each variant is made of, by its name: those of study.json and these. Raises UserError for a name that was
    another arm's.
    """
    earlier = document.get("variants", {})
    own = {arm.name: arm.definition for arm in arms if arm.made_of is not None}
    for name in earlier.keys() & own.keys():
        if earlier[name] != own[name]:
            raise UserError(
                f"arm {name} of {folder.path} was {earlier[name]}, now {own[name]}; give the new one another name."
            )
    return earlier | own


def _earlier(folder: StudyFolder, shared: dict[str, Any], cache_digest: str, start_over: bool) -> dict[str, Any]:
    """The arms and seeds of earlier commands. Where their settings or their cache were others: UserError, or nothing
    once these runs are gone.
    """
    nothing = {"arms": [], "seeds": []}
    try:
        document = json.loads(folder.study.read_text(encoding="utf-8"))
        if (document["format"], document["version"]) != (_FORMAT, _VERSION):
            raise ValueError("another format or version")
        document["cache digest"] = document.get("cache digest", cache_digest)  # an older version did not note it
        earlier = StudyConfig.completed(document["settings"]) | {"cache digest": document["cache digest"]}
        differing = checkpoint.differences(earlier, shared | {"cache digest": cache_digest}, _OWN)
    except FileNotFoundError:
        return nothing
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.study} is no study of ours ({error}); choose another --out.") from error
    if differing and not start_over:
        raise UserError(
            f"--out {folder.path} holds a study with other settings ({'; '.join(differing)}): type the old values, "
            "choose another --out, or add --start-over to remove it and its runs."
        )
    if not differing:
        return document
    for run in (run for runs in folder.runs().values() for run in runs.values()):
        if run.settings.exists():  # what is no run of ours stays
            checkpoint.forget(run)
    return nothing
