"""What a job asks of the machines: nodes, ranks, time, and the site's own settings from the file the user filled in
once.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kd_dist.errors import UserError

SITE_FILE = Path(__file__).resolve().parent.parent / "slurm" / "site.conf"
_UNITS = {"d": 1440, "h": 60, "m": 1}
_TIME_FORMS = "2h, 90m, 1d12h, 45 (minutes), HH:MM:SS or D-HH:MM:SS"


@dataclass(frozen=True)
class Site:
    """What one cluster needs and no other: see slurm/site.conf, which says what each name means."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    interface: str | None = None
    scratch: str | None = None
    activate: str | None = None
    options: tuple[str, ...] = ()

    def network(self) -> dict[str, str]:
        """The variables that keep gloo and NCCL on the interface that reaches the other nodes."""
        return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), self.interface) if self.interface else {}


# The name in the file -> the field. The first four are names that sbatch itself reads from the environment.
_NAMES = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SITE_CPUS_PER_TASK": "cpus_per_task",
    "SITE_INTERFACE": "interface",
    "SITE_SCRATCH": "scratch",
    "SITE_ACTIVATE": "activate",
    "SITE_OPTIONS": "options",
}


def read_site(path: Path) -> Site:
    """The site file's settings; an empty value counts as none. Raises UserError: missing, an unknown name, a bad
    line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the site file {path} cannot be read ({error.strerror or error}); name yours with --site."
        ) from None
    values = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = _words(path, number, line)
        if words:
            name, separator, value = words[0].partition("=")
            if not separator or len(words) > 1 or name not in _NAMES:
                raise UserError(f'{path}, line {number}: write NAME="value" with a NAME of {", ".join(_NAMES)}.')
            values[_NAMES[name]] = value
    return _site(path, values)


def _words(path: Path, number: int, line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}; put the value between two double quotes.") from None


def _site(path: Path, values: Mapping[str, str]) -> Site:
    fields = {name: value for name, value in values.items() if value}
    cpus = fields.get("cpus_per_task", "1")
    if not cpus.isdigit() or int(cpus) < 1:
        raise UserError(f"{path}: SITE_CPUS_PER_TASK {cpus} is no number of cores; write 8, say, or leave it empty.")
    if "cpus_per_task" in fields:
        fields["cpus_per_task"] = int(cpus)
    if "options" in fields:
        fields["options"] = tuple(shlex.split(fields["options"]))
    return Site(**fields)


def minutes_of(text: str) -> int:
    """Minutes, rounded up, of a time as people and Slurm write it. Raises UserError for anything else."""
    for read in (_units, _clock):
        minutes = read(text.strip())
        if minutes:
            return minutes
    raise UserError(f"--time {text} is no time; write {_TIME_FORMS}.")


def _units(text: str) -> int | None:
    """2h, 1d12h, 90m, 45."""
    if text.isdigit():
        return int(text)
    if not re.fullmatch(r"(\d+[dhm])+", text):
        return None
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([dhm])", text))


def _clock(text: str) -> int | None:
    """HH:MM:SS and D-HH[:MM[:SS]]; MM:SS is Slurm's too, but more often a mistake for HH:MM, so it is refused."""
    found = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d\d))?(?::(\d\d))?)|(?:(\d+):(\d\d):(\d\d))", text)
    if not found:
        return None
    days, hours, minutes, seconds, plain_hours, plain_minutes, plain_seconds = (
        int(part or 0) for part in found.groups()
    )
    whole = days * 1440 + (hours + plain_hours) * 60 + minutes + plain_minutes
    return whole + (1 if seconds + plain_seconds else 0)


@dataclass(frozen=True)
class Resources:
    """What one job asks for. `ranks` processes are started on each of `nodes` machines."""

    nodes: int
    ranks: int
    gpus: int
    minutes: int
    cpus: int | None
    memory: str | None
    signal_seconds: int

    def __post_init__(self):
        for name, value in (
            ("--nodes", self.nodes),
            ("--ranks-per-node", self.ranks),
            ("--signal-before", self.signal_seconds),
        ):
            if value < 1:
                raise UserError(f"{name} {value} must be at least 1.")
        if self.gpus < 0:
            raise UserError(f"--gpus-per-node {self.gpus} must not be negative; 0 runs on the CPU.")
        if self.cpus is not None and self.cpus < 1:
            raise UserError(f"--cpus-per-task {self.cpus} must be at least 1.")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks
