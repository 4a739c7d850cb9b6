"""The page for somebody who brings images, teacher and student, typed as it stands: small here, and in a new
environment with all that it says.
"""

import csv
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file

from kd_dist.cache import open_cache
from kd_dist.data.generated import generate
from tests.entries import call
from tests.test_package import checkout, installed, wheel  # noqa: F401

PAGE = (Path(__file__).parents[1] / "docs" / "bring-your-own.md").read_text()
STEP = re.compile(r"^`(\w+\.py)`[^\n]*:\n\n```python\n(.*?)```|^((?: {4}[^\n]*\n)+)", re.MULTILINE | re.DOTALL)
SMALLER = {"--image-size 48": "--image-size 32", "--epochs 20": "--epochs 8", "--views 4": "--views 2"}
SMALLER |= {"--batch-size 32": "--batch-size 8"}


def steps(section: str) -> list[str]:
    """The commands under a heading of the page, after writing the files that are shown there."""
    commands = []
    for name, code, lines in STEP.findall(PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]):
        if name:
            Path(name).write_text(code)
        else:
            commands += [line.strip() for line in lines.splitlines()]
    return commands


def type_here(line: str, capsys) -> None:
    """Run a command in this process: starting Python is the slow part."""
    words = shlex.split(line)
    assert words.pop(0) == "python"
    target = words[-1] if words[-2] == ">" else None
    words = words[: -2 if target else None]
    if words[0] == "-m":
        module = importlib.import_module(words[1])
        entry = module if hasattr(module, "main") else importlib.import_module(f"{words[1]}.__main__")
        call(entry.main, *words[2:])
    else:
        runpy.run_path(words[0], run_name="__main__")
    said = capsys.readouterr().out
    if target:
        Path(target).write_text(said)


def require_what_the_page_promises() -> float:
    """The folders are there and open without kd_dist; ONNX Runtime alone gives the command's classes. Gives top-1."""
    rows = list(csv.DictReader(Path("predictions.csv").read_text().splitlines()))
    alone = dict(line.split(",") for line in Path("alone.csv").read_text().splitlines())
    images = sorted(str(path) for path in Path("pictures").rglob("*.jpg"))
    assert list(alone) == images == [row["image"] for row in rows[::2]]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        between = float(first["probability"]) - float(second["probability"]) < 0.01
        assert alone[first["image"]] == first["class"] or between, first
    assert len(set(alone.values())) > 1
    val = open_cache(Path("logits.h5")).split("val")
    read = [line.split() for line in Path("labels.txt").read_text().splitlines()]
    assert [(path, int(label)) for path, label, *_ in read] == list(zip(val.paths, val.labels_N, strict=True))
    assert np.array_equal(np.array([row[2:] for row in read], np.float16), val.logits_NVK[:, 0])
    assert not [name for name in ("classify.py", "read_labels.py") if "kd_dist" in Path(name).read_text()]
    config = json.loads(Path("published/config.json").read_text())
    with safe_open("published/model.safetensors", "np") as weights:
        assert sum(weights.get_tensor(name).size for name in weights.keys()) > config["weights"] > 90_000  # noqa: SIM118
    assert config["architecture"] == "my_student:build" and config["classes"] == sorted(set(config["classes"]))
    return config["facts"]["val_top1"]


@pytest.mark.integration
def test_the_page_in_small(tmp_path, monkeypatch, capsys):
    """With a teacher of random weights, on 36 images."""
    monkeypatch.chdir(tmp_path)
    generate(tmp_path / "drawn", train_per_class=12, val_per_class=1, classes=3)
    shutil.move(tmp_path / "drawn/train", "pictures")
    torch.manual_seed(0)
    weights = torchvision.models.resnet34(num_classes=3).state_dict()
    weights["fc.weight"] *= 30  # random logits hardly differ between images
    save_file(weights, "teacher.safetensors")
    try:
        for section in ("The student", "Cache, distil, export", "Without kd_dist"):
            for line in steps(section):
                for large, small in SMALLER.items():
                    line = line.replace(large, small)
                type_here(line, capsys)
        require_what_the_page_promises()
    finally:
        sys.modules.pop("my_student", None)


@pytest.mark.integration
@pytest.mark.slow
def test_the_page_in_a_new_environment(wheel, installed, tmp_path, monkeypatch):  # noqa: F811
    """All that it says, but for the installing, which needs no package index here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{installed(wheel).parent}:/usr/bin:/bin")
    for name in ("PYTHONPATH", "KD_DIST_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for section in ("Stand-ins", "The student", "Cache, distil, export", "Without kd_dist"):
        for line in steps(section):
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert require_what_the_page_promises() > 0.15  # ten classes, 240 images: chance would be 0.1 with an error of 0.02
