"""The flat command line of a job, both ways: parsed into a config, and built again for a command that we print.

The value that a run uses is, first found: what was typed, what the preset says, the default.
"""

import argparse
import dataclasses
import shlex
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from kd_dist.config.groups import RunConfig, one_of
from kd_dist.config.jobs import JobConfig, flags_of, groups_of
from kd_dist.config.presets import PRESETS, scaled
from kd_dist.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Its errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `python -m {self.prog} --help` lists the flags.")


class _Page(argparse.HelpFormatter):
    """A narrow column of flags, sentences beside it."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)


def parser_for(kind: type[JobConfig], prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser of a job's flags, by group; only what was typed ends up in the namespace."""
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=_Page,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.usage = f"torchrun --nproc_per_node=N -m {prog} [FLAG ...]"
    groups = groups_of(kind)
    sections = {RunConfig.title: parser.add_argument_group(RunConfig.title)}
    own = [each for each in dataclasses.fields(kind) if each.name not in groups]
    _add_flags(sections[RunConfig.title], kind, kind, own)
    for group in groups.values():
        section = sections[group.title] if group.title in sections else parser.add_argument_group(group.title)
        _add_flags(section, kind, group, dataclasses.fields(group))
    parser.add_argument_group("presets", "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items()))
    return parser


def _add_flags(section: Any, kind: type[JobConfig], holder: type, flags: Sequence[dataclasses.Field]) -> None:
    hints = get_type_hints(holder)
    for each in flags:
        _add_flag(section, each, hints[each.name], _shown_default(kind, each))


def _add_flag(section: Any, flag: dataclasses.Field, hint: Any, default: str) -> None:
    name, text = flag_name(flag.name), flag.metadata["help"] + default
    if hint is bool:
        section.add_argument(name, action="store_true", help=text)
        return
    is_pair = hint == tuple[float, float]
    optional = isinstance(hint, types.UnionType)
    value = next((part for part in get_args(hint) if part is not type(None)), hint) if optional else hint
    nargs = 2 if is_pair else "+" if get_origin(value) is tuple else None
    value = get_args(value)[0] if nargs else value
    metavar = ("LOW", "HIGH") if is_pair else flag.metadata["metavar"] or ("N" if value is int else "X")
    section.add_argument(name, type=value, nargs=nargs, metavar=metavar, help=text)


def _shown_default(kind: type[JobConfig], flag: dataclasses.Field) -> str:
    """The defaults in brackets: the flag's own unless every preset overrides it, and the presets' by name."""
    presets = {name: preset.of(kind) for name, preset in PRESETS.items()}
    shown = [f"{name}: {values[flag.name]}" for name, values in presets.items() if flag.name in values]
    default = flag.default
    if default not in (None, ()) and not isinstance(default, bool) and len(shown) < len(presets):
        shown.insert(0, " ".join(map(str, default)) if isinstance(default, tuple) else str(default))
    return f" [{', '.join(shown)}]" if shown else ""


def flag_name(name: str) -> str:
    """The flag of a field: "--batch-size" of "batch_size"."""
    return "--" + name.replace("_", "-")


def read_command_line(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """What was typed, by flag name. Raises UserError for an unknown flag or an unreadable value."""
    return vars(parser.parse_args(sys.argv[1:] if arguments is None else arguments))


def resolve(
    kind: type[JobConfig],
    typed: Mapping[str, Any],
    has_gpu: bool,
    ranks: int = 1,
    stored: Mapping[str, Any] | None = None,
) -> Any:
    """The config of a command line: what was typed, over the preset's values, over the defaults. Raises UserError for
    an unknown preset.

    A preset for each GPU is multiplied by the number of `ranks` where these are on GPUs and train one network.
    `stored` are the flags of the run that is resumed, if any: its batch size stays, whatever the number of ranks.
    """
    on_gpu = has_gpu and typed.get("device") != "cpu"
    name = typed.get("preset") or ("gpu-128px" if on_gpu else "cpu-64px")
    one_of("preset", name, tuple(PRESETS))
    kept = None if typed.get("start_over") else (stored or {}).get("batch_size")
    together = ranks if on_gpu and kind.trains_together else 1
    scaled_values = scaled(PRESETS[name], kind, typed, together, kept)
    values = {**PRESETS[name].of(kind), **scaled_values, **typed, "preset": name}
    values |= _shortened(kind, values, typed)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return kind.of(**values).resolved()


def _shortened(kind: type[JobConfig], values: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Warm-up and no-mix epochs that fit into a short run, unless their number was typed."""
    defaults = flags_of(kind)
    names = ("epochs", "warmup_epochs", "no_mix_epochs")
    epochs, warmup, unmixed = (values.get(name, defaults[name].default) for name in names)
    short = {"warmup_epochs": min(warmup, max(epochs, 0) / 5), "no_mix_epochs": min(unmixed, max(epochs, 0) // 10)}
    return {name: value for name, value in short.items() if name not in typed}


def flag_words(typed: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give these values, by flag name."""
    words: list[str] = []
    for name, value in typed.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        words += [flag_name(name), *map(str, values)]
    return words


SHARED = ("data", "val_share", "unlabelled", "release", "pixels_dir", "folds", "fold", "tune", "preset", "device")
OF_DATA = ("data", "val_share", "unlabelled", "pixels_dir", "device")


def carried(config: JobConfig, names: Sequence[str] = SHARED) -> dict[str, Any]:
    """The flags that a command on the same data has to repeat: those of `names` that are neither defaults nor the
    preset's.
    """
    preset = PRESETS[config.preset].of(type(config)) if config.preset else {}
    usual = {name: preset.get(name, flags_of(type(config))[name].default) for name in names}
    flat = config.flat()
    return {name: flat[name] for name in names if flat[name] != usual[name]}


def command(module: str, *words: object, **flags: Any) -> str:
    """A command that a reader can copy into a shell: `python -m module words --flags`, quoted where needed; a flag of
    value None or False is left out.
    """
    return shlex.join(["python", "-m", module, *map(str, words), *flag_words(flags)])
