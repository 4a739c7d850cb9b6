"""Who may import whom, and the size and wording of what is written: read from the source, so a breach fails here."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kd_dist.config import DistillConfig, StudyConfig, TeacherConfig, flags_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kd_dist"
MOST_LINES = 50

LEAVES = {
    *("errors", "files", "fetch", "generated", "dataset", "folds", "pixels", "resident", "views", "models", "losses"),
    *("cache", "checkpoint", "monitor", "runtime", "batches", "inference"),
}
"""They take plain arguments: no settings, no engine, no job. Everything else puts them together."""

ENTRIES = {"teacher", "distill"}


def name_of(path: Path) -> str:
    """The module in a file, without the package's name: "cache.reader", and "cache" for its __init__."""
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


@cache
def imported(module: str) -> frozenset[str]:
    """The full names a module imports, inside functions too: "numpy", "kd_dist.views", "kd_dist.cache.reader"."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relative to itself"
            of_package = {f"{node.module}.{alias.name}" for alias in node.names if node.module == "kd_dist"}
            names |= of_package or {node.module}
    return frozenset(names)


def own(module: str) -> set[str]:
    """The modules of kd_dist that a module imports."""
    return {name.removeprefix("kd_dist.") for name in imported(module) if name.startswith("kd_dist.")} & FILES.keys()


def needed(module: str) -> set[str]:
    """The modules of kd_dist that come along when a module is imported, itself among them."""
    found, new = set(), {module}
    while new:
        found |= new
        new = set().union(*(own(name) for name in new)) - found
    return found


def is_leaf(module: str) -> bool:
    return module.partition(".")[0] in LEAVES and not module.endswith("__main__")


def functions(module: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


# ------------------------------------------------------------------------------------------------------------- imports


def test_the_leaves_are_there():
    assert {name.partition(".")[0] for name in FILES if is_leaf(name)} == LEAVES
    assert own("distill") >= {"job", "losses"}  # imports are seen


@pytest.mark.parametrize("module", [name for name in FILES if is_leaf(name)])
def test_leaf_imports_leaves_only(module):
    assert [name for name in own(module) if not is_leaf(name)] == []


def test_the_config_needs_no_other_module_than_the_error():
    assert {name for name in needed("config") if name.partition(".")[0] != "config"} == {"errors"}


@pytest.mark.parametrize("module", ["job", "teacher", "distill"])
def test_the_jobs_name_the_group_of_a_flag(module):
    """A job reads config.distillation.alpha; config.alpha is for the study and the launcher, which handle flags by
    name.
    """
    attributes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "config"}
    flags = set().union(*(flags_of(kind) for kind in (TeacherConfig, DistillConfig)))
    assert read & flags <= {"data", "preset", "out", "seed", "init", "crops"}
    assert "seed" in read  # reads are seen


def test_the_engine_knows_no_settings_and_no_job():
    assert not needed("engine") & {"config", "job", "label", "report", *ENTRIES}


def test_nobody_imports_an_entry_but_the_study_that_is_made_of_students():
    entries = {"teacher", "distill", "study.__main__", "cache.__main__"}
    importers = {name for name in FILES if own(name) & entries}
    assert {name for name in importers if not name.startswith("study.")} == set()
    assert set().union(*(own(name) & entries for name in importers)) == {"distill"}


def test_the_student_needs_nothing_of_the_teacher():
    assert not {name for name in needed("distill") if name.partition(".")[0] in ("teacher", "label", "study")}
    assert "job" in needed("distill")


def test_only_the_networks_import_torchvision():
    assert {module for module in FILES for name in imported(module) if name.startswith("torchvision")} == {"models"}


def test_imports_have_no_circle():
    circles = {module for module in FILES for name in own(module) if module in needed(name)}
    package_parts = {module for module in circles if module.partition(".")[0] in ("cache", "config")}
    assert circles - package_parts == set()


@pytest.mark.parametrize("module", FILES)
def test_library_knows_no_scheduler(module):
    assert not {name for name in imported(module) if name.partition(".")[0] in ("launch", "submitit")}
    assert "SLURM_" not in FILES[module].read_text()


# ---------------------------------------------------------------------------------------------------- what is written


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


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="there is no README.md yet")
@pytest.mark.parametrize("module", [name for name in FILES if name and "." not in name])
def test_readme_has_a_line_for_each_module(module):
    shown = f"{module}/" if FILES[module].name == "__init__.py" else f"{module}.py"
    assert shown in (ROOT / "README.md").read_text()
