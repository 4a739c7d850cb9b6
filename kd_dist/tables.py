"""Tables as text: fitted to a terminal, whole in a pipe or a file, or as Markdown. Knows nothing of runs."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

from kd_dist.errors import UserError

Rows = Sequence[Sequence[str]]
_GAP = "  "
_NARROWEST = 6  # a column is not wrapped to fewer characters


def plain(rows: Rows, width: int | None = None) -> str:
    """Rows as aligned columns. Cells are wrapped so that a line has at most `width` characters; None: no limit."""
    columns = [*zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    if width is not None:
        words = [max(len(word) for cell in column for word in [*cell.split(), ""]) for column in columns]
        for least in (words, [_NARROWEST] * len(words)):  # words are cut only where they must be
            _narrow(widths, least, width - len(_GAP) * (len(widths) - 1))
    return "\n".join(line for row in rows for line in _lines(row, widths))


def _narrow(widths: list[int], least: Sequence[int], room: int) -> None:
    """Narrow the widest columns, in place, until they fit into the room or all are at their least width."""
    while sum(widths) > room:
        wide = [i for i, width in enumerate(widths) if width > least[i]]
        if not wide:
            return
        widths[max(wide, key=widths.__getitem__)] -= 1


def _lines(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
    for parts in zip_longest(*cells, fillvalue=""):
        yield _GAP.join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()


def streamed(rows: Iterable[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    """Rows as aligned columns of these widths, one by one, for a table too long to be held."""
    return ("\n".join(_lines(row, widths)) for row in rows)


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural where that is due: "1 epoch", "1,200 images"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def terminal_width() -> int | None:
    """Characters in a line of the terminal (COLUMNS, else its own size); None where the output is a pipe or a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def show(text: str) -> bool:
    """Print to standard output. A reader that has left (`| head`) ends the output quietly, and gives False.

    Raises UserError where the output cannot be written, such as on a full disk.
    """
    try:
        print(text, flush=True)
        return True
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"standard output cannot be written ({error.strerror or error}).") from error
        return False
