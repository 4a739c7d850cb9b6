"""Which arms a study has: built-in arms by name, variants of them, and grids of variants.

--arms baseline distilled ensemble=distilled,cache=runs/both.h5 hot=distilled,temperature=8
--grid alpha=0,0.5,0.9 temperature=2,4
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from kd_dist.cache import Cache
from kd_dist.config import DistillConfig, StudentConfig, StudyConfig, parser_for, read_command_line
from kd_dist.distill import require_known
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.study.arms import ARMS, BASELINES, DISTILLED, Arm
from kd_dist.study.folder import run_settings

MAY_VARY = (
    *("cache", "views", "alpha", "temperature", "loss", "label_fraction"),
    *("label_smoothing", "mixup", "cutmix", "lr", "weight_decay"),
)
"""What a variant may set. The student and its budget are the same in all arms of a study."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(?<!\.md)(?<!\.json)(?<!\.png)")  # a folder beside the study's files
_HOW = "define a variant as NAME=ARM,setting=value, as in ensemble=distilled,cache=runs/both.h5"


def chosen_arms(settings: StudyConfig) -> list[Arm]:
    """The arms that were asked for: built-in arms in their order, then variants. Raises UserError for one that is not
    known or cannot run.
    """
    default = [arm.name for arm in ARMS.values() if settings.teacher_model or not arm.needs_teacher]
    words = [part for word in settings.arms or () for part in ([word] if "=" in word else word.split(",")) if part]
    if settings.grid:
        asked = list(_grid(settings, words or [DISTILLED]))
    else:
        asked = [variant(word) if "=" in word else _built_in(word) for word in words or default]
    arms: dict[str, Arm] = {}
    for arm in asked:
        if arms.setdefault(arm.name, arm) != arm:
            raise UserError(f"arm {arm.name} is defined twice; give one of the two another name.")
    for arm in arms.values():
        _check(settings, arm)
    for name in settings.primary:
        if name not in ARMS:
            raise UserError(f"--primary {name} is not a built-in arm; choose two of {', '.join(ARMS)}.")
    return sorted(arms.values(), key=lambda arm: list(ARMS).index(arm.name) if arm.name in ARMS else len(ARMS))


def _built_in(name: str) -> Arm:
    if name not in ARMS:
        raise UserError(f"arm {name} is not known; choose from {', '.join(ARMS)}, or {_HOW}.")
    return ARMS[name]


def _check(settings: StudyConfig, arm: Arm) -> None:
    """Raise UserError for an arm without its teacher or its labels, and for a variant whose values are out of range or
    the study's own.
    """
    if arm.needs_teacher and not settings.teacher_model:
        raise UserError(f"arm {arm.name} needs the teacher: pass its weights, --teacher-model runs/teacher/model.pt.")
    if arm.needs_labels and arm.own.get("label_fraction", settings.distillation.label_fraction) < 1:
        raise UserError(
            f"arm {arm.name} needs the hard label of every image, but --label-fraction uses fewer; omit the arm with "
            "--arms."
        )
    if arm.base is None:
        return
    word = f"{arm.name}={arm.definition}"
    try:
        require_known(run_settings(settings, arm, 0).distillation)
    except UserError as error:
        raise UserError(f"--arms {word}: {error}") from error
    if _is_base(settings, arm, ARMS[arm.base]):
        raise UserError(f"--arms {word} changes nothing: the study's {arm.base} has these values already.")


def _is_base(settings: StudyConfig, arm: Arm, base_arm: Arm) -> bool:
    """Whether a variant has the values that its base has in this study."""
    base = run_settings(settings, base_arm, 0)
    return all(base[name] == value for name, value in arm.own.items())


# ---- variants


def variant(word: str) -> Arm:
    """A built-in arm with other settings, from NAME=ARM,setting=value,... Raises UserError for any other text."""
    name, _, definition = word.partition("=")
    base, *changes = definition.split(",")
    if not _NAME.fullmatch(name) or name in ARMS:
        raise UserError(f"--arms {word}: {name or 'nothing'} cannot be the name of a new arm; {_HOW}.")
    if base not in ARMS:
        raise UserError(f"--arms {word}: {base or 'nothing'} is not a built-in arm; vary one of {', '.join(ARMS)}.")
    if not changes:
        raise UserError(f"--arms {word} changes nothing; {_HOW}.")
    own = _settings_in(f"--arms {word}", changes)
    for setting in own:
        _require_effect(f"--arms {word}", setting, ARMS[base], own)
    if own.get("alpha") == 0:
        raise UserError(f"--arms {word}: vary {' or '.join(BASELINES)} for an arm without soft labels.")
    return _varied(name, base, own)


def _varied(name: str, base: str, own: Mapping[str, Any]) -> Arm:
    changes, isolates = {**ARMS[base].changes, **own}, f"{base} with {_in_words(own)}"
    return replace(ARMS[base], name=name, isolates=isolates, changes=changes, base=base, own=own)


def _settings_in(where: str, changes: Sequence[str]) -> dict[str, Any]:
    """Settings from "name=value" each, read as their flags are, in one order and one spelling."""
    flags = {}
    for change in changes:
        name, sign, value = change.partition("=")
        setting = name.replace("-", "_")
        if not sign or setting not in MAY_VARY:
            allowed = ", ".join(map(_flag, MAY_VARY))
            raise UserError(f"{where}: {change or 'nothing'} is not a setting of a variant; it may set {allowed}.")
        if setting in flags:
            raise UserError(f"{where} sets {name} twice; leave one of them out.")
        flags[setting] = value
    parser = parser_for(DistillConfig, "kd_dist.study", "", "")
    typed = read_command_line(parser, [f"--{_flag(setting)}={value}" for setting, value in flags.items()])
    if "cache" in typed:
        typed["cache"] = os.path.abspath(os.path.expanduser(typed["cache"]))
        if "," in typed["cache"]:
            raise UserError(f"{where}: the path {typed['cache']} has a comma, which ends a setting; move the file.")
    return {setting: typed[setting] for setting in MAY_VARY if setting in typed}


def _require_effect(where: str, setting: str, base: Arm, own: Mapping[str, Any]) -> None:
    if setting in base.changes:
        raise UserError(f"{where}: {base.name} is defined by its {_flag(setting)}; set something else.")
    if _is_idle(setting, base, own):
        raise UserError(f"{where}: {_flag(setting)} has no effect on {base.name}; set something else.")


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
    return ", ".join(f"{_flag(name)} {_text(name, value)}" for name, value in own.items())


def _text(setting: str, value: Any) -> str:
    return "/".join(Path(value).parts[-2:]) if setting == "cache" else str(value)


# ---- grids


def _grid(settings: StudyConfig, bases: Sequence[str]) -> Iterator[Arm]:
    """An arm for each base and each combination of --grid's values.

    At alpha 0 the base is the hard-label baseline. A setting without effect on a combination is left out of it. The
    combination that the study's own settings are is the base itself.
    """
    words = settings.grid or ()
    axes = [_axis(word) for word in words]
    if len({setting for axis in axes for setting in axis[0]}) < len(axes):
        raise UserError(f"--grid {' '.join(words)} names a setting twice; give all its values after one name.")
    for base in map(_built_in, bases):
        for combination in product(*axes):
            own = {name: value for values in combination for name, value in values.items()}
            yield _cell(settings, base, own)


def _axis(word: str) -> list[dict[str, Any]]:
    """{setting: value} for each value of "setting=value,value"."""
    name, _, values = word.partition("=")
    if not values:
        raise UserError(f"--grid {word}: write it as SETTING=VALUE,VALUE.")
    return [_settings_in(f"--grid {word}", [f"{name}={value}"]) for value in values.split(",")]


def _cell(settings: StudyConfig, asked: Arm, own: Mapping[str, Any]) -> Arm:
    for setting in own:
        _require_effect("--grid", setting, asked, {})
    base = ARMS[BASELINES[0]] if own.get("alpha") == 0 else asked
    own = {name: own[name] for name in MAY_VARY if name in own and name not in base.changes}
    own = {name: value for name, value in own.items() if not _is_idle(name, base, own)}
    values = (f"{_flag(name)}-{_text(name, value).replace('/', '-')}" for name, value in own.items())
    arm = _varied("_".join([*([] if base.name == DISTILLED else [base.name]), *values]), base.name, own)
    return base if _is_base(settings, arm, base) else arm


# ---- caches that suit an arm


def require_views(arm: Arm, cache: Cache, used: int | None) -> None:
    """Raise UserError where the views of a cache, or the first `used` of them, are not what an arm needs."""
    views = used or cache.views
    if views < arm.needs_views:
        raise UserError(
            f"arm {arm.name} needs {arm.needs_views} views of every image, one of them for evaluation, and "
            f"{views} are used; add some by `python -m kd_dist.cache extend`, or leave the arm out by --arms."
        )
    if arm.soft_labels is not None and cache.split("train").mixed is not None:
        raise UserError(
            f"{cache.path} has mixed views, and arm {arm.name} makes soft labels for views of one image; leave it "
            "out by --arms, or pass a cache without mixed views."
        )


def require_alike_crops(settings: StudentConfig, cache: Cache) -> None:
    """Raise UserError where an arm on fresh crops would see other crops than those of the study's cache: a difference
    to the arms on cached crops would have two causes.
    """
    scale = cache.header.crop_scale
    if (
        settings.uses_fresh_crops
        and cache.header.view_rule == views.SAMPLER
        and scale != settings.augmentation.crop_scale
    ):
        cached, own = (f"{low:g} {high:g}" for low, high in (scale, settings.augmentation.crop_scale))
        raise UserError(
            f"the crops of {cache.path} have area fractions of {cached}, but fresh crops would have {own}: use "
            f"--crop-scale {cached}, so that the arms do not differ in their crops."
        )
