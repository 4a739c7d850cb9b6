"""The one exception that means "the user can mend this", and how a command says it."""

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_PEER_LOST = 3  # of a rank that ends only because another one did


class UserError(Exception):
    """A wrong input, said in one sentence: what is wrong and what to type next.

    Entries print it on one line from one rank and exit with code 2; anything else is a defect of ours and keeps its
    traceback.
    """


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
