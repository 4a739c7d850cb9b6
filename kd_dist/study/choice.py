"""Which arms a study has: those of the ladder by name, and variants of them that a user makes on the command line.

--arms hard-fresh cached-V ensemble=cached-V,cache=runs/both.h5 hot=cached-V,temperature=8
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_dist.cache import Cache
from kd_dist.config import DistillSettings, StudySettings, parser_for, read_command_line
from kd_dist.errors import UserError
from kd_dist.study.arms import ARMS, Arm

MAY_VARY = (
    *("cache", "views", "alpha", "temperature", "loss"),
    *("label_smoothing", "mixup", "cutmix", "lr", "weight_decay"),
)
"""What a variant may set. The student and its budget are what all arms of a study share."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a folder
_TAKEN = ("hparams",)
_HOW = "make one by NAME=ARM,setting=value, as in ensemble=cached-V,cache=runs/both.h5"


def chosen_arms(settings: StudySettings) -> list[Arm]:
    """The arms that were asked for: the ladder's in its order, then variants. Raises UserError for one that is not
    known or cannot run.
    """
    default = [arm.name for arm in ARMS.values() if settings.teacher_model or not arm.needs_teacher]
    asked: dict[str, Arm] = {}
    for word in settings.arms or default:
        for arm in [variant(word)] if "=" in word else [_of_ladder(name) for name in word.split(",") if name]:
            if asked.setdefault(arm.name, arm) != arm:
                raise UserError(f"arm {arm.name} is made twice, in two ways; give one of them another name.")
    for name in settings.primary:
        _of_ladder(name)
    for arm in asked.values():
        if arm.needs_teacher and not settings.teacher_model:
            raise UserError(
                f"arm {arm.name} needs the teacher: name its weights, --teacher-model runs/teacher/model.pt."
            )
    return sorted(asked.values(), key=lambda arm: list(ARMS).index(arm.name) if arm.name in ARMS else len(ARMS))


def _of_ladder(name: str) -> Arm:
    if name not in ARMS:
        raise UserError(f"arm {name} is not known; choose from {', '.join(ARMS)}, or {_HOW}.")
    return ARMS[name]


def variant(word: str) -> Arm:
    """An arm of the ladder with other settings, from NAME=ARM,setting=value,... Raises UserError for what is none."""
    name, _, made_of = word.partition("=")
    base, *changes = made_of.split(",")
    if not _NAME.fullmatch(name) or name in {*ARMS, *_TAKEN}:
        raise UserError(f"--arms {word}: {name or 'nothing'} cannot be the name of a new arm; {_HOW}.")
    if not changes:
        raise UserError(f"--arms {word} changes nothing; {_HOW}.")
    arm = _of_ladder(base)
    own = _settings_in(word, changes)
    for setting in own:
        if setting in arm.changes:
            raise UserError(f"--arms {word}: {_flag(setting)} is what makes {base} what it is; set something else.")
        if _is_idle(setting, arm):
            raise UserError(f"--arms {word}: {_flag(setting)} has no effect on {base}; set something else.")
    return arm.varied(name, own, f"as {base}, with {_in_words(own)}")


def _settings_in(word: str, changes: Sequence[str]) -> dict[str, Any]:
    """Settings from "name=value" each, read as their flags are."""
    flags = [tuple(change.split("=", 1)) for change in changes]
    for flag in flags:
        if len(flag) < 2 or flag[0].replace("-", "_") not in MAY_VARY:
            allowed = ", ".join(map(_flag, MAY_VARY))
            raise UserError(f"--arms {word}: {'='.join(flag) or 'nothing'} is no setting; a variant sets {allowed}.")
    parser = parser_for(DistillSettings, "kd_dist.study", "", "")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags]
    own = read_command_line(parser, words)
    if "cache" in own:  # in one spelling, wherever the next command is typed
        own["cache"] = str(Path(own["cache"]).expanduser().absolute())
    return own


def _is_idle(setting: str, arm: Arm) -> bool:
    """Whether a setting would change nothing in this arm."""
    hard, fresh = arm.changes.get("alpha") == 0, arm.changes.get("crops") == "fresh"
    of_soft_labels, of_cached_crops, of_fresh_crops = ("temperature", "loss"), ("views",), ("mixup", "cutmix")
    idle = (hard, of_soft_labels), (fresh, of_cached_crops), (not fresh, of_fresh_crops)
    return any(off and setting in settings for off, settings in idle)


def _flag(setting: str) -> str:
    return setting.replace("_", "-")


def _in_words(own: Mapping[str, Any]) -> str:
    shown = {name: "/".join(Path(value).parts[-2:]) if name == "cache" else value for name, value in own.items()}
    return ", ".join(f"{_flag(name)} {value}" for name, value in shown.items())


def require_views(arm: Arm, cache: Cache, used: int | None) -> None:
    """Raise UserError where the views of a cache, or the first `used` of them, are not what an arm needs."""
    views = used or cache.views
    if views < arm.needs_views:
        raise UserError(
            f"arm {arm.name} needs {arm.needs_views} views of every image, one of them for evaluation, and "
            f"{views} are used; add some by `python -m kd_dist.cache extend`, or leave the arm out by --arms."
        )
    if arm.rows is not None and cache.split("train").mixed is not None:
        raise UserError(
            f"{cache.path} has mixed views, and arm {arm.name} makes soft labels for pictures of one image; leave it "
            "out by --arms, or name a cache without mixed views."
        )
