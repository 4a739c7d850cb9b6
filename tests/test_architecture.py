"""What no linter checks, read from the source: long functions, missing descriptions, settings that nobody reads.

Who may import whom is checked by import-linter: see pyproject.toml.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kd_dist.config import DistillConfig, StudyConfig, TeacherConfig, flags_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kd_dist"
MOST_LINES = 40


def name_of(path: Path) -> str:
    """The module in a file, without the package's name: "cache.reader", and "cache" for its __init__."""
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def functions(module: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("module", FILES)
def test_library_knows_no_scheduler(module):
    """import-linter sees what is imported; this is about the scheduler's variables."""
    assert "SLURM_" not in FILES[module].read_text()


@pytest.mark.parametrize("module", FILES)
def test_no_function_is_long(module):
    lengths = {function.name: function.end_lineno - function.lineno + 1 for function in functions(module)}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize("module", FILES)
def test_module_and_what_it_offers_is_described(module):
    """An entry's `main` is described by its module."""
    offered = [node for node in tree(module).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    nameless = [
        node.name
        for node in offered
        if not node.name.startswith("_") and node.name != "main" and not ast.get_docstring(node)
    ]
    assert ast.get_docstring(tree(module))
    assert nameless == []


def test_every_setting_is_read_somewhere():
    """Being checked for its range does not count; the preset's name is there to be stored."""
    read = set()
    for module in FILES:
        checks = {id(node) for f in functions(module) if f.name == "__post_init__" for node in ast.walk(f)}
        nodes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute) and id(node) not in checks]
        read |= {node.attr for node in nodes}
    flags = {name for kind in (TeacherConfig, DistillConfig, StudyConfig) for name in flags_of(kind)}
    assert flags - read - {"preset"} == set()


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


@pytest.mark.parametrize("module", [name for name in FILES if name])
def test_the_architecture_page_names_each_module(module):
    folder, _, name = module.rpartition(".")
    is_package = FILES[module].name == "__init__.py"
    lines = [line for line in ARCHITECTURE.splitlines() if f"**`{folder}/`**" in line] if folder else [ARCHITECTURE]
    assert any((f"`{name}/`" if is_package else f"`{name}`") in line for line in lines)
