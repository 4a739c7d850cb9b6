"""What the documents say can be typed, and what they point to is there."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from kd_dist.errors import UserError
from kd_dist.study.__main__ import COMMANDS
from tests.ranks import run_command

REPO = Path(__file__).parent.parent
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
COMMAND = re.compile(
    r"^(?: {4}|\| `)(?:\S+=\S+ )*((?:python|torchrun [^`|]*?) -m (?:kd_dist|launch)\.[^`|#\n]*)", re.MULTILINE
)


def commands() -> list[str]:
    """Every command line of ours in an indented block or a table of a document, without its comment."""
    pages = (re.sub(r"\\\n *", "", document.read_text()) for document in DOCUMENTS)  # a command may go over lines
    return sorted({found.strip() for page in pages for found in COMMAND.findall(page)})


@cache
def help_of(module: str, command: str) -> str:
    """What --help of a module, or of one of its commands, prints."""
    return run_command(module, *([command] if command else []), "--help").stdout


PAGES = ("README.md", *(f"docs/{name}.md" for name in ("quickstart", "guide", "data", "study", "cluster")))


WRITTEN_LATER = ("docs/results/imagewoof-gpu.md",)  # by `make gpu`


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_hold_commands(page):
    assert len(COMMAND.findall((REPO / page).read_text())) >= 4


@pytest.mark.parametrize("page, most", [("README.md", 100), ("docs/glossary.md", 40)])
def test_short_pages_stay_short(page, most):
    assert len((REPO / page).read_text().splitlines()) <= most


def test_numbers_of_decisions_are_unique():
    pages = sorted((REPO / "docs/decisions").glob("*.md"))
    assert len({page.name[:4] for page in pages}) == len(pages)
    assert all(page.read_text().startswith(f"# {page.name[:4]} ") for page in pages)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_of_the_repository_that_are_named_exist(document):
    named = re.findall(r"`((?:kd_dist|launch|slurm|tests|docs|benchmarks)/[\w./-]*)`", document.read_text())
    assert [name for name in named if not (REPO / name).exists() and name not in WRITTEN_LATER] == []


def test_the_readme_s_image_is_drawn_by_its_command(tmp_path):
    """From the committed figures; the PNG itself depends on the fonts of the machine."""
    page = (REPO / "docs/study.md").read_text()
    (figures,) = re.findall(r"study summary (\S+) -o docs/results/imagewoof-cpu-summary.png", page)
    run_command("kd_dist.study", "summary", str(REPO / figures), "-o", str(tmp_path / "summary.png"))
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


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


@pytest.mark.parametrize("content", [None, "{}", '{"study": {"primary": null}, "teacher": {}}', "no JSON"])
def test_a_image_of_no_study_is_one_sentence(content, tmp_path):
    if content is not None:
        (tmp_path / "figures.json").write_text(content)
    with pytest.raises(UserError, match="published study"):
        COMMANDS["summary"]([str(tmp_path / "figures.json"), "-o", str(tmp_path / "summary.png")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} points to {target}"


def test_make_targets_of_the_pages_exist():
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    for page in (*PAGES, "CONTRIBUTING.md"):
        assert set(re.findall(r"(?:`|^ {4})make ([\w-]+)", (REPO / page).read_text(), re.MULTILINE)) <= targets
