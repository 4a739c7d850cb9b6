"""Row 7 comes with the reader that leaves rows on file."""

from benchmarks.setting import Bench


def reading(bench: Bench):
    """Nothing yet."""
    yield from ()
