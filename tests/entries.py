"""Run an entry in this process, as one rank: starting Python is the slow part of starting it as a command."""

import sys

import pytest

from kd_dist.errors import UserError


def call(main, *arguments) -> None:
    """Run an entry's main in this process with these command line arguments."""
    before = sys.argv
    sys.argv = ["kd_dist", *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = before


def refused(main, *arguments) -> str:
    """The sentence that an entry refuses these arguments with."""
    with pytest.raises(UserError) as caught:
        call(main, *arguments)
    sentence = str(caught.value)
    assert sentence and "\n" not in sentence and sentence.endswith(".")
    return sentence
