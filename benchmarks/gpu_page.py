"""The results page that `make gpu` writes from what its steps left: docs/results/imagewoof-gpu.md, .json and .png."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from benchmarks.children import ROOT
from kd_dist.errors import UserError
from kd_dist.files import read_json, write_atomically, write_json

if TYPE_CHECKING:
    from benchmarks.gpu import Step

NAME = "imagewoof-gpu"
PAGE = """# Imagewoof on {gpus} x {gpu}

Measured by `make gpu` on {started}: {software}; {cpu}, {cores} cores. The command and the seconds of each step are at
the end; [{name}.json]({name}.json) has every number.

## Study

![Top-1 of each arm]({name}.png)

{study}

## Speed

{rows}

## Tests on the GPU

{tests}

## Steps

{steps}
"""


def write(out: Path, steps: Sequence["Step"], folder: Path = ROOT / "docs" / "results") -> Path:
    """Write page, numbers and plot; gives the page's path. Raises UserError where a step's result is missing."""
    records = {step.name: _document(out / f"step-{step.name}.json") for step in steps}
    rows = [row for name in records if name.startswith("bench-") for row in _rows(out / name / "bench.json")]
    about = next(
        (_document(out / name / "bench.json")["about"] for name in records if (out / name / "bench.json").exists()), {}
    )
    study = _document(out / "study" / "results.json")
    page = PAGE.format(
        name=NAME,
        gpus=about.get("gpus", 1),
        study=(out / "study" / "table.md").read_text(encoding="utf-8").strip(),
        rows=markdown(("what", "median", "quartiles", "goal", "reached"), map(row_cells, rows)),
        tests=tests_line(out / "tests.xml"),
        steps=markdown(
            ("step", "seconds", "exit code", "command"),
            (
                (name, f"{record['seconds']:.0f}", str(record["code"]), f"`{record['command']}`")
                for name, record in records.items()
            ),
        ),
        **{key: about.get(key, "unknown") for key in ("gpu", "started", "software", "cpu", "cores")},
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{NAME}.json", {"about": about, "rows": rows, "study": study, "steps": records})
    plot = (out / "study" / "plot.png").read_bytes()
    write_atomically(folder / f"{NAME}.png", lambda file: file.write(plot))
    write_atomically(folder / f"{NAME}.md", lambda file: file.write(page.encode()))
    return folder / f"{NAME}.md"


def _document(path: Path) -> dict[str, Any]:
    found = read_json(path, mend="delete it and type make gpu again.")
    if found is None:
        raise UserError(f"{path} is missing; type make gpu again.")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def row_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A benchmark row as cells of text: name, median with unit, quartiles, goal, and whether the goal is met."""
    if row["value"] is None:
        return row["name"], "not measured", "", row["goal"] or "", ""
    spread = " to ".join(f"{value:,.3g}" for value in row["spread"]) if row["spread"] else ""
    reached = {True: "yes", False: "no", None: ""}[row["met"]]
    return row["name"], f"{row['value']:,.4g} {row['unit']}", spread, row["goal"] or "", reached


def markdown(head: Sequence[str], rows) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def tests_line(junit: Path) -> str:
    """How many tests ran and how many of them failed, with the names of those."""
    if not junit.exists():
        return "The tests did not run."
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    bad = [case.get("name") for case in suite.iter("testcase") if {"failure", "error"} & {child.tag for child in case}]
    passed = int(suite.get("tests")) - len(bad) - int(suite.get("skipped"))
    named = f": {', '.join(bad)}" if bad else ""
    return f"{passed} passed, {suite.get('skipped')} skipped, {len(bad)} failed{named}."
