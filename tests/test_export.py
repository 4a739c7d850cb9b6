"""A model's folder: each file computes what the model does, it is whole or absent, and says what it is."""

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import kd_dist
from kd_dist import models, predict
from kd_dist.errors import UserError
from kd_dist.export import __main__ as entry
from kd_dist.export import graphs
from kd_dist.run.checkpoint import save_model
from kd_dist.run.folder import RunFolder
from kd_dist.run.results import write_val_logits
from tests.test_predict import SIZE, facts_of, run_folder  # noqa: F401

FILES = {"README.md", "config.json", "model.onnx", "model.pt2", "model.safetensors"}


@pytest.fixture(scope="module", params=[False, True], ids=["normalised", "pixels"])
def exported(request, run_folder, tiny, tmp_path_factory):  # noqa: F811
    """(folder, whether normalisation is inside the graphs), of a run with logits on val."""
    logits_NK = np.zeros((len(tiny.val), 3), np.float32)
    val = tiny.val
    write_val_logits(RunFolder(run_folder).val_logits, logits_NK, val.labels_N, val.paths, val.fingerprint, top1=0.5)
    target = tmp_path_factory.mktemp("export") / "student"
    flags = ["--data", str(tiny.root), "--license", "mit", *["--with-preprocessing"] * request.param]
    assert entry.main([str(run_folder), "--to", str(target), *flags]) == 0
    return target, request.param


def test_folder_holds_its_files_and_loads_as_the_run_does(exported, run_folder, tiny):  # noqa: F811
    folder, _ = exported
    assert {path.name for path in folder.iterdir()} == FILES
    assert os.listdir(folder.parent) == [folder.name]  # no temporary folder is left
    run, model = kd_dist.load(run_folder), kd_dist.load(folder)
    images_BCHW = torch.randn(5, 3, SIZE, SIZE)
    assert torch.equal(run(images_BCHW), model(images_BCHW))
    assert model.classes == run.classes and model.transform == run.transform


def test_graphs_take_any_batch(exported, run_folder):  # noqa: F811
    folder, from_pixels = exported
    model = kd_dist.load(run_folder)
    pixels_BCHW = graphs.noise(model, 7)
    normalised_BCHW = model.transform.normalise(pixels_BCHW)
    for run in (graphs._onnx_run(folder / graphs.ONNX), torch.export.load(folder / graphs.PT2).module()):
        logits_BK = run(pixels_BCHW if from_pixels else normalised_BCHW.contiguous())
        assert torch.allclose(logits_BK, model(normalised_BCHW), atol=1e-5)


def test_the_cards_own_snippet_predicts_as_the_command_does(exported, tiny, monkeypatch, capsys):
    """ONNX Runtime, Pillow and NumPy alone."""
    folder, _ = exported
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    for path in tiny.val.paths:
        exec(code.replace('"image.jpg"', repr(str(tiny.root / path))), {})
        alone = capsys.readouterr().out.strip()
        assert predict.main([str(folder), str(tiny.root / path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["top"][0]["class"] == alone


def test_card_and_config_say_what_the_model_is(exported, tiny):
    folder, from_pixels = exported
    card, config = (folder / "README.md").read_text(), json.loads((folder / "config.json").read_text())
    front = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert json.loads(front["license"]) == "mit"
    assert json.loads(front["model-index"])[0]["results"][0]["metrics"][0]["value"] == 0.5
    for words in (
        "c" * 64,
        "a" * 64,
        tiny.val.fingerprint,
        f"n = {len(tiny.val)}",
        "30 images of set",
        "| epochs | 3 |",
    ):
        assert words in card
    for name in ("model.safetensors", "model.onnx", "model.pt2"):
        assert f"| {name} | {(folder / name).stat().st_size:,} |" in card
    assert f"{models.count_weights(models.Cnn5(3)):,} parameters" in card
    assert all(f"| batch {size}: median" in card for size in (1, 64))
    assert card.count(" | 30/30 |") == 3
    assert "/home" not in card and "/home" not in json.dumps(config)
    assert config["preprocessing"]["graph_input"]["dtype"] == ("uint8" if from_pixels else "float32")
    assert config["architecture"] == "cnn5" and config["classes"] == list(tiny.classes)


def test_noise_is_named_where_there_are_no_images(run_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delenv("KD_DIST_DATA", raising=False)
    (tmp_path / "student").mkdir()  # an empty folder is taken
    entry.export(run_folder, tmp_path / "student", None, None, False)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "generated noise" in card and 'license: "unknown"' in card


def test_the_runs_own_images_are_taken_where_they_are(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("KD_DIST_DATA", raising=False)
    compared = {}
    for name, data in {"there": tiny.root, "gone": tmp_path / "gone"}.items():
        facts = {**facts_of(tiny), "settings": {"data": str(data)}}
        save_model(tmp_path / f"{name}.pt", {**facts, "weights": models.Cnn5(3).state_dict()})
        compared[name] = entry._images(kd_dist.load(tmp_path / f"{name}.pt"), None)[1]
    assert compared["there"] == f"30 images of {tiny.root.name}" and "generated noise" in compared["gone"]


def refused(source, target, **more) -> str:
    """The sentence; nothing is written."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        entry.export(source, target, **{"data": None, "licence": None, "with_preprocessing": False} | more)
    assert sorted(target.parent.rglob("*")) == before
    return str(caught.value)


def test_nothing_is_written_over(run_folder, tmp_path):  # noqa: F811
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "not an empty folder" in refused(run_folder, tmp_path / "full")
    assert "not an empty folder" in refused(run_folder, tmp_path / "full" / "notes.txt")


def test_a_file_that_differs_is_not_published(run_folder, tmp_path, monkeypatch):  # noqa: F811
    honest = graphs._onnx_run
    monkeypatch.setattr(graphs, "_onnx_run", lambda path: lambda images: honest(path)(images) + 0.001)
    assert "model.onnx differs from the model" in refused(run_folder, tmp_path / "student")


def test_not_a_number_is_not_published():
    nan_BK = torch.full((2, 3), float("nan"))
    with pytest.raises(UserError, match="differs"):
        graphs.check(lambda images: nan_BK[: len(images)], torch.zeros(2, 1), nan_BK).require("model.onnx")


class Unusual(nn.Module):
    """A network with an operator that ONNX lacks, or with a branch that depends on the images."""

    def __init__(self, classes: int, branch: bool = False):
        super().__init__()
        self.classifier, self.branch = nn.Linear(3, classes), branch

    def forward(self, images_BCHW):
        if self.branch and images_BCHW.sum() > 0:
            return self.classifier(images_BCHW.amax(dim=(2, 3)))
        means_BC = images_BCHW.mean(dim=(2, 3))
        return self.classifier(means_BC if self.branch else torch.special.i1(means_BC))


@pytest.mark.parametrize("branch", [False, True], ids=["operator", "branch"])
def test_a_network_that_no_graph_can_hold_is_a_sentence(branch, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(models.STUDENTS, "unusual", lambda classes: Unusual(classes, branch))
    weights = Unusual(3).state_dict()
    save_model(tmp_path / "model.pt", {**facts_of(tiny), "arch": "unusual", "weights": weights})
    sentence = refused(tmp_path, tmp_path / "student")
    assert ("torch.export cannot trace" if branch else "prims.bessel_i1") in sentence and "\n" not in sentence


def test_missing_packages_are_a_sentence(run_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence = refused(run_folder, tmp_path / "student")
    assert 'pip install "kd-dist[export]"' in sentence and "onnxruntime" in sentence


def test_a_damaged_or_foreign_folder_is_not_loaded(exported, tmp_path):
    folder, _ = exported
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="not written by this program"):
        kd_dist.load(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot be read"):
        kd_dist.load(tmp_path)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="does not hold the weights"):
        kd_dist.load(tmp_path)
