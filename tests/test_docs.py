"""What the documents say can be typed, and what they point to is there."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from tests.ranks import run_command

REPO = Path(__file__).parent.parent
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
COMMAND = re.compile(
    r"^(?: {4}|\| `)(?:\S+=\S+ )*((?:python|torchrun [^`|]*?) -m (?:kd_dist|launch)\.[^`|#\n]*)", re.MULTILINE
)


def commands() -> list[str]:
    """Every command line of ours in an indented block or a table of a document, without its comment."""
    return sorted({found.strip() for document in DOCUMENTS for found in COMMAND.findall(document.read_text())})


@cache
def help_of(module: str, command: str) -> str:
    """What --help of a module, or of one of its commands, prints."""
    return run_command(module, *([command] if command else []), "--help").stdout


def test_the_documents_hold_commands():
    assert len(commands()) >= 8


@pytest.mark.parametrize("line", commands())
def test_each_command_knows_its_flags(line):
    words = shlex.split(line.split(" -m ", 1)[1])
    words = words[: words.index("--")] if "--" in words else words
    module, rest = words[0], words[1:]
    has_commands = module in ("kd_dist.cache", "kd_dist.study", "launch.submit")
    command = rest[0] if has_commands and rest and rest[0].isidentifier() else ""
    known = help_of(module, command)
    for flag in (word for word in rest if word.startswith("-") and " " not in word):  # others are quoted options
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", known), f"{flag} is no flag of {module} {command}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} points to {target}"


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([\w-]+)", (REPO / "README.md").read_text())) <= targets
