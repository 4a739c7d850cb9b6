"""The errors that a user can fix, the exit codes of all commands, and how a failed rank informs the others."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

EXIT_USER_ERROR = 2
EXIT_PEER_LOST = 3  # of a rank that ends only because another one did


class UserError(Exception):
    """A wrong input, reported in one sentence: what is wrong and what to type next.

    Entries print it on one line from one rank and exit with code 2; anything else is a defect of ours and keeps its
    traceback.
    """


class MachineError(UserError):
    """Something is wrong with one machine, before the ranks have met: one rank of each machine concerned reports it."""


class UnreachableError(MachineError):
    """Rank 0 cannot be reached from this machine."""


@dataclass(frozen=True)
class Failure:
    """Why a job ends: one sentence, the exit code, and the traceback where it is a defect of ours.

    `lost_rank` is the rank that died or is silent, None where a rank that lives reported the failure itself.
    """

    sentence: str
    code: int
    lost_rank: int | None = None
    traceback: str | None = None


def exit_code_of(name: str, work: Callable[[], object]) -> int:
    """Do the work of a command of one process: its exit code, 2 after a UserError's sentence on stderr, headed by the
    command's name.
    """
    try:
        work()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def require_installed(extra: str, *modules: str) -> None:
    """Raise UserError where a package of an extra, such as "study", is missing."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UserError(f'missing: {", ".join(missing)}; install with `pip install "kd-dist[{extra}]"`.')
