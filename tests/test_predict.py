"""A trained model loaded for use, and the command that classifies images with it."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import kd_dist
from kd_dist import predict
from kd_dist.errors import UserError
from kd_dist.images import views
from kd_dist.models import Cnn5
from kd_dist.run.checkpoint import save_model
from kd_dist.run.folder import RunFolder
from kd_dist.version import __version__

SIZE = 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def facts_of(dataset) -> dict:
    """What a student's file says besides its weights."""
    data = {"name": "tiny", "train": dataset.train.fingerprint, "val": dataset.val.fingerprint}
    return {
        **{"kind": "student", "arch": "cnn5", "classes": list(dataset.classes), "image_size": SIZE, "seed": 0},
        **{"mean": list(MEAN), "std": list(STD), "val_top1": 0.5, "fold": None, "data": data, "finished": "2026-01-01"},
        **{"settings": {"epochs": 3, "cache": "/home/someone/logits.h5"}, "software": f"kd_dist {__version__}"},
        "cache": {"path": "/home/someone/logits.h5", "sha256": "c" * 64, "teachers": ["a" * 64], "fingerprints": {}},
    }


@pytest.fixture(scope="session")
def run_folder(tiny, tmp_path_factory):
    """A student's run folder whose network gives different logits to different images."""
    torch.manual_seed(0)
    network = Cnn5(3).train()
    for _ in range(2):
        network(torch.randn(8, 3, SIZE, SIZE) + 1)
    folder = RunFolder(tmp_path_factory.mktemp("student"))
    save_model(folder.model, {**facts_of(tiny), "weights": network.state_dict()})
    return folder.path


def test_import_alone_does_not_wait_for_torch():
    code = "import sys, kd_dist as k; assert 'torch' not in sys.modules; [getattr(k, name) for name in k.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transform_gives_the_bits_that_validation_sees(run_folder, tiny, tiny_pixels):
    model, pixels = kd_dist.load(run_folder), tiny_pixels["val"]
    box_N4 = views.evaluation_boxes(pixels.sizes_N2)
    shown = views.Shown.plain(np.arange(len(pixels)), box_N4, np.zeros(len(pixels), np.uint8))
    expected = views.Normalise(MEAN, STD, torch.float32, torch.device("cpu"))(pixels.show(shown, SIZE))
    for path, expected_CHW in zip(tiny.val.paths, expected, strict=True):
        with Image.open(tiny.root / path) as image:
            assert torch.equal(model.transform(image), expected_CHW)
    assert not model.training and model.classes == tiny.classes and model.facts["val_top1"] == 0.5


def test_csv_and_json_give_the_models_own_classes_and_probabilities(run_folder, tiny, capsys):
    model = kd_dist.load(run_folder / "model.pt")
    assert predict.main([str(run_folder), str(tiny.root / "val"), "--csv", "--top-k", "3"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["image"] for row in rows[::3]] == sorted(str(tiny.root / path) for path in tiny.val.paths)
    for first in rows[::3]:
        with Image.open(first["image"]) as image:
            probabilities_K = model(model.transform(image)[None])[0].softmax(0)
        assert first["class"] == model.classes[probabilities_K.argmax()]
        assert float(first["probability"]) == pytest.approx(float(probabilities_K.max()), abs=1e-5)
    assert predict.main([str(run_folder), str(tiny.root / "val"), "--json", "--top-k", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["class"] for row in rows] == [each["class"] for line in lines for each in line["top"]]


def test_table_has_a_header_and_a_line_an_image(run_folder, tiny, capsys):
    assert predict.main([str(run_folder), str(tiny.root / "val")]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == list(predict.COLUMNS) and len(lines) == len(tiny.val)
    assert len({line.rindex(line.split()[2]) for line in lines}) == 1  # aligned


@pytest.mark.parametrize("batch", [2, 64])
def test_broken_images_are_named_and_the_rest_goes_on(run_folder, tiny, tmp_path, capsys, monkeypatch, batch):
    monkeypatch.setattr(predict, "BATCH", batch)
    shutil.copytree(tiny.root / "val", tmp_path / "val")
    (tmp_path / "val" / "a.jpg").write_bytes(b"not an image")
    (tmp_path / "val" / "b.jpg").write_bytes(b"")
    assert predict.main([str(run_folder), str(tmp_path / "val"), "--json"]) == predict.EXIT_SOME_BROKEN
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == len(tiny.val)
    errors = said.err.splitlines()
    assert "a.jpg" in errors[0] and "b.jpg" in errors[1] and "could not be read: 2" in errors[2]


def test_a_terminal_shows_how_far_it_is(run_folder, tiny, tmp_path, capsys, monkeypatch):
    """The bar counts broken images too, and is not in the table."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shutil.copytree(tiny.root / "val", tmp_path / "val")
    (tmp_path / "val" / "a.jpg").write_bytes(b"not an image")
    assert predict.main([str(run_folder), str(tmp_path / "val"), "--csv"]) == predict.EXIT_SOME_BROKEN
    said = capsys.readouterr()
    assert "10/10" in said.err and "image/s" in said.err
    assert len(list(csv.DictReader(said.out.splitlines()))) == 9 and "10/10" not in said.out


def test_images_are_read_as_they_are_needed(run_folder, tiny, monkeypatch):
    """Memory is flat: when the first batch is there, no more than the threads' share of the next was decoded."""
    monkeypatch.setattr(predict, "BATCH", 4)
    monkeypatch.setattr(predict, "available_cores", lambda: 2)
    decode, decoded = predict.decode, []
    monkeypatch.setattr(predict, "decode", lambda path: decoded.append(path) or decode(path))
    images = [str(tiny.root / path) for path in tiny.val.paths] * 20
    batches = predict.predict(kd_dist.load(run_folder), images, 1, lambda image, sentence: pytest.fail(sentence))
    assert [each.image for each in next(batches)] == images[:4]
    assert 4 <= len(decoded) <= 4 + 3


def test_a_reader_that_leaves_ends_the_work(run_folder, tiny, monkeypatch):
    monkeypatch.setattr(predict.tables, "show", lambda text: False)
    monkeypatch.setattr(predict, "decode", lambda path: pytest.fail("decoded for nobody"))
    assert predict.main([str(run_folder), str(tiny.root / "val")]) == 0


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    "case", ["empty folder", "no such image", "top-k", "foreign model", "code", "sealed code", "no model", "other arch"]
)
def test_bad_input_is_one_sentence(case, run_folder, tiny, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.pt")
    torch.save({"weights": Code()}, tmp_path / "code.pt")
    save_model(tmp_path / "sealed.pt", {**facts_of(tiny), "weights": Code()})  # as one who wishes us ill would
    weights = Cnn5(3).state_dict()
    save_model(tmp_path / "other.pt", {**facts_of(tiny), "arch": "cnn5_wide", "weights": weights})
    val = str(tiny.root / "val")
    arguments, words = {
        "empty folder": ([run_folder, tmp_path / "empty"], "holds no images"),
        "no such image": ([run_folder, tmp_path / "none.jpg"], "there is no"),
        "top-k": ([run_folder, val, "--top-k", "4"], "use --top-k 3 or less"),
        "foreign model": ([tmp_path / "foreign.pt", val], "was not written by kd_dist"),
        "code": ([tmp_path / "code.pt", val], "was not written by kd_dist"),
        "sealed code": ([tmp_path / "sealed.pt", val], "holds more than weights and plain values"),
        "no model": ([tmp_path / "empty", val], "train first"),
        "other arch": ([tmp_path / "other.pt", val], "does not fit the network cnn5_wide"),
    }[case]
    assert predict.main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and words in said.err


def test_logits_that_are_not_finite_are_refused(run_folder, tiny, tmp_path):
    weights = kd_dist.load(run_folder).network.state_dict()
    weights["classifier.bias"][0] = float("nan")
    save_model(tmp_path / "model.pt", {**facts_of(tiny), "weights": weights})
    with pytest.raises(UserError, match="not finite"):
        list(predict.predict(kd_dist.load(tmp_path), [str(tiny.root / tiny.val.paths[0])], 1, lambda *_: None))
