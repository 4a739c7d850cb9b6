"""Where jobs run: the site's own settings, from the file that its user filled in once, and what one job asks for."""

import dataclasses
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_dist.errors import UserError

SITE_FILE = Path(__file__).resolve().parent.parent / "slurm" / "site.conf"


@dataclass(frozen=True)
class Site:
    """What one cluster needs and no other: slurm/site.conf explains each name."""

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


# The name in the file -> the field. sbatch itself reads the first four names from the environment.
_FIELDS = [field.name for field in dataclasses.fields(Site)]
_NAMES = {f"{'SBATCH' if number < 4 else 'SITE'}_{name.upper()}": name for number, name in enumerate(_FIELDS)}


def read_site(path: Path | None) -> Site:
    """The settings of a site file, or of SITE_FILE, where there is one; an empty value counts as none.

    Raises UserError: the file that was named is missing, an unknown name, a bad line.
    """
    if path is None:
        return read_site(SITE_FILE) if SITE_FILE.exists() else Site()
    try:
        words = shlex.split(path.read_text(encoding="utf-8"), comments=True)
    except OSError as error:
        raise UserError(
            f"the site file {path} cannot be read ({error.strerror or error}); pass yours with --site."
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; put each value between two double quotes.") from None
    values: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if "=" not in word or name not in _NAMES:
            raise UserError(f'{path}: invalid {word}; write NAME="value", one per line, NAME of {", ".join(_NAMES)}.')
        values |= {_NAMES[name]: value} if value else {}
    cpus = values.get("cpus_per_task", "1")
    if not cpus.isdigit() or int(cpus) < 1:
        raise UserError(f"{path}: invalid SITE_CPUS_PER_TASK {cpus}; write a number of cores such as 8.")
    typed: dict[str, Any] = {**values, "options": tuple(shlex.split(values.get("options", "")))}
    if "cpus_per_task" in values:
        typed["cpus_per_task"] = int(cpus)
    return Site(**typed)


def minutes_of(text: str) -> int:
    """Minutes, rounded up, of a time as people and Slurm write it: 2h, 90m, 1d12h, 45, HH:MM:SS, D-HH:MM:SS.

    Raises UserError for anything else; MM:SS is Slurm's too, but more often a mistake for HH:MM.
    """
    for pattern in (r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m?)?()", r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)"):
        if found := re.fullmatch(pattern, text):
            days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
            if whole := days * 1440 + hours * 60 + minutes + (seconds > 0):
                return whole
    raise UserError(f"Invalid --time {text}; write 2h, 90m, 1d12h, 45 (minutes), HH:MM:SS or D-HH:MM:SS.")


@dataclass(frozen=True)
class Resources:
    """What one job asks for: `ranks` processes on each of `nodes` machines, `cpus` cores per rank, `minutes` of time.

    `signal_seconds` before the time limit comes the warning; after `max_timeouts` time limits no more requeue.
    Raises UserError for a number out of range.
    """

    nodes: int
    ranks: int
    gpus: int
    minutes: int
    cpus: int | None
    memory: str | None
    signal_seconds: int
    max_timeouts: int

    def __post_init__(self):
        for flag, value, least in (
            ("--nodes", self.nodes, 1),
            ("--ranks-per-node", self.ranks, 1),
            ("--gpus-per-node", self.gpus, 0),
            ("--cpus-per-task", self.cpus, 1),
            ("--signal-before", self.signal_seconds, 1),
            ("--max-timeouts", self.max_timeouts, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"{flag} {value} must be at least {least}.")
        if self.signal_seconds >= self.minutes * 60:
            raise UserError(f"--signal-before {self.signal_seconds} s must be shorter than --time {self.minutes}m.")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks
