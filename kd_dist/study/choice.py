"""Which arms a study has: those of the ladder by name, and variants of them that a user makes on the command line.

--arms hard-fresh cached-V ensemble=cached-V,cache=runs/both.h5 hot=cached-V,temperature=8
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_dist import views
from kd_dist.cache import Cache
from kd_dist.config import DistillConfig, StudentConfig, StudyConfig, parser_for, read_command_line
from kd_dist.distill import require_known
from kd_dist.errors import UserError
from kd_dist.study.arms import ARMS, Arm
from kd_dist.study.folder import run_settings

MAY_VARY = (
    *("cache", "views", "alpha", "temperature", "loss", "label_fraction"),
    *("label_smoothing", "mixup", "cutmix", "lr", "weight_decay"),
)
"""What a variant may set. The student and its budget are what all arms of a study share."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of a folder; the study's own files have dots in their names
_TAKEN = ("hparams",)
_HOW = "make one by NAME=ARM,setting=value, as in ensemble=cached-V,cache=runs/both.h5"


def chosen_arms(settings: StudyConfig) -> list[Arm]:
    """The arms that were asked for: the ladder's in its order, then variants. Raises UserError for one that is not
    known or cannot run.
    """
    default = [arm.name for arm in ARMS.values() if settings.teacher_model or not arm.needs_teacher]
    asked: dict[str, Arm] = {}
    for word in settings.arms or default:
        for arm in [variant(word)] if "=" in word else map(_of_ladder, filter(None, word.split(","))):
            if asked.setdefault(arm.name, arm) != arm:
                raise UserError(f"arm {arm.name} is made twice, in two ways; give one of them another name.")
    for arm in asked.values():
        _require_sense(settings, arm)
    for name in settings.primary:
        if name not in ARMS:
            raise UserError(f"--primary {name} is no arm of the ladder; name two of {', '.join(ARMS)}.")
    return sorted(asked.values(), key=lambda arm: list(ARMS).index(arm.name) if arm.name in ARMS else len(ARMS))


def _of_ladder(name: str) -> Arm:
    if name not in ARMS:
        raise UserError(f"arm {name} is not known; choose from {', '.join(ARMS)}, or {_HOW}.")
    return ARMS[name]


def _require_sense(settings: StudyConfig, arm: Arm) -> None:
    """Raise UserError for an arm without its teacher or its labels, and for a variant whose values are out of range or
    the study's own.
    """
    if arm.needs_teacher and not settings.teacher_model:
        raise UserError(f"arm {arm.name} needs the teacher: name its weights, --teacher-model runs/teacher/model.pt.")
    if arm.needs_labels and arm.own.get("label_fraction", settings.label_fraction) < 1:
        raise UserError(
            f"arm {arm.name} needs every image's label, --label-fraction uses fewer; leave it out by --arms."
        )
    if arm.made_of is None:
        return
    try:
        own, base = (run_settings(settings, one, 0) for one in (arm, ARMS[arm.made_of]))
        require_known(own.distillation)
    except UserError as error:
        raise UserError(f"--arms {arm.word}: {error}") from error
    if all(getattr(own, name) == getattr(base, name) for name in arm.own):
        raise UserError(f"--arms {arm.word} changes nothing: the study's {arm.made_of} has these values already.")


def variant(word: str) -> Arm:
    """An arm of the ladder with other settings, from NAME=ARM,setting=value,... Raises UserError for what is none."""
    name, _, made_of = word.partition("=")
    base, *changes = made_of.split(",")
    if not _NAME.fullmatch(name) or name in {*ARMS, *_TAKEN}:
        raise UserError(f"--arms {word}: {name or 'nothing'} cannot be the name of a new arm; {_HOW}.")
    if base not in ARMS:
        raise UserError(f"--arms {word}: {base or 'nothing'} is no arm of the ladder; vary one of {', '.join(ARMS)}.")
    if not changes:
        raise UserError(f"--arms {word} changes nothing; {_HOW}.")
    arm, own = ARMS[base], _settings_in(word, changes)
    for setting in own:
        if setting in arm.changes:
            raise UserError(f"--arms {word}: {_flag(setting)} is what makes {base} what it is; set something else.")
        if _is_idle(setting, arm, own):
            raise UserError(f"--arms {word}: {_flag(setting)} has no effect there; set something else.")
    if own.get("alpha") == 0:
        raise UserError(f"--arms {word}: arms without soft labels are there already; vary hard-fresh or hard-cached.")
    return arm.varied(name, own, f"as {base}, with {_in_words(own)}")


def _settings_in(word: str, changes: Sequence[str]) -> dict[str, Any]:
    """Settings from "name=value" each, read as their flags are, in one order and one spelling."""
    flags = {}
    for change in changes:
        name, sign, value = change.partition("=")
        setting = name.replace("-", "_")
        if not sign or setting not in MAY_VARY:
            allowed = ", ".join(map(_flag, MAY_VARY))
            raise UserError(f"--arms {word}: {change or 'nothing'} is no setting; a variant sets {allowed}.")
        if setting in flags:
            raise UserError(f"--arms {word} sets {name} twice; leave one of them out.")
        flags[setting] = value
    parser = parser_for(DistillConfig, "kd_dist.study", "", "")
    typed = read_command_line(parser, [f"--{_flag(setting)}={value}" for setting, value in flags.items()])
    if "cache" in typed:
        typed["cache"] = os.path.abspath(os.path.expanduser(typed["cache"]))
        if "," in typed["cache"]:
            raise UserError(
                f"--arms {word}: the path {typed['cache']} has a comma, which ends a setting; move the file."
            )
    return {setting: typed[setting] for setting in MAY_VARY if setting in typed}


def _is_idle(setting: str, arm: Arm, own: Mapping[str, Any]) -> bool:
    """Whether a setting would change no weight of this arm."""
    hard, fresh = arm.changes.get("alpha") == 0, arm.changes.get("crops") == "fresh"
    return {
        "temperature": hard or own.get("loss") == "mse",
        "loss": hard or arm.loss is not None,
        "views": fresh,
        "cache": fresh,
        "mixup": not fresh,
        "cutmix": not fresh,
    }.get(setting, False)


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


def require_alike_crops(settings: StudentConfig, cache: Cache) -> None:
    """Raise UserError where an arm on fresh crops would see others than those of the study's cache: a difference to the
    arms on cached crops would have two causes.
    """
    scale = cache.header.crop_scale
    if settings.uses_fresh_crops and cache.header.view_rule == views.SAMPLER and scale != settings.crop_scale:
        cached, own = (f"{low:g} {high:g}" for low, high in (scale, settings.crop_scale))
        raise UserError(
            f"the crops of {cache.path} have area shares of {cached}, fresh crops would have {own}: use --crop-scale "
            f"{cached}, so that arms do not differ in that."
        )
