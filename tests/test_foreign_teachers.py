"""A teacher that was not trained here: its weights, its classes, the cache that it writes, and what is refused."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kd_dist import distill, load, models, teacher
from kd_dist.cache import open_cache, render_info
from kd_dist.cache.__main__ import main
from kd_dist.data.samples import Dataset
from kd_dist.errors import UserError
from kd_dist.export.card import card, config
from kd_dist.label.class_map import picked, read_class_map, synsets
from kd_dist.models.weights import read_weights, take_weights
from kd_dist.run.checkpoint import load_model, weights_digest
from tests.entries import call, refused

OWN = (Path(__file__).parent / "programs/own_teachers.py").read_text()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "own_teachers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_teachers", None)


def network(classes: int) -> torch.nn.Module:
    torch.manual_seed(classes)
    model = models.build("own_teachers:small", classes)
    with torch.no_grad():
        model.classifier.weight.mul_(100)  # an untrained network's logits hardly differ between images
    return model


# ---- weights


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested", "of DDP"])
def test_weights_are_read_from_files_of_several_kinds(here, kind):
    own = network(3).state_dict()
    path = here / ("given.safetensors" if kind == "safetensors" else "given.pt")
    saved = {"nested": {"epoch": 3, "state_dict": own}, "of DDP": {f"module.{name}": own[name] for name in own}}
    if kind == "safetensors":
        save_file(own, path)
    else:
        torch.save(saved.get(kind, own), path)
    other = models.build("own_teachers:small", 3)
    assert take_weights(other, read_weights(path), path, 3) is None
    assert weights_digest(other.state_dict()) == weights_digest(own)


def test_a_head_of_another_size_is_replaced_and_nothing_else():
    given, model = network(7).state_dict(), models.build("own_teachers:small", 3)
    fresh = model.classifier.weight.detach().clone()
    assert take_weights(model, given, Path("given.pt"), 3) == 7
    assert torch.equal(model.classifier.weight, fresh)
    assert torch.equal(model.convolutions[1].weight, given["convolutions.1.weight"])


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_weights_that_do_not_fit_or_cannot_be_read_are_refused(here, capsys):
    given = network(3).state_dict()
    model = models.build("own_teachers:small", 3)
    del given["norms.0.bias"]
    with pytest.raises(UserError, match=r"does not fit this network: missing norms.0.bias, not known extra; pass"):
        take_weights(model, {**given, "extra": torch.zeros(1)}, Path("given.pt"), 3)
    (here / "code.pt").write_bytes(pickle.dumps({"weight": Code()}))
    torch.save({"weight": Code()}, here / "code2.pt")
    torch.save([1, 2], here / "list.pt")
    (here / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (here / "weights.npz").write_bytes(b"")
    for name, expected in {
        "code.pt": "holds more than weights .pickled code",
        "code2.pt": "holds more than weights .pickled code",
        "list.pt": "holds no state dict",
        "cut.safetensors": "cannot be read as safetensors",
        "weights.npz": "ends in none of .safetensors, .pt",
        "absent.pt": "there is no file .*absent.pt",
    }.items():
        with pytest.raises(UserError, match=expected):
            read_weights(here / name)
    assert "must not run" not in capsys.readouterr().out


def training(root: Path, *more: object) -> list[object]:
    size = ("--image-size", 16, "--epochs", 1, "--batch-size", 8, "--views", 0, "--device", "cpu")
    return ["--data", root, "--out", "run", "--teacher", "own_teachers:small", *size, *more]


def test_the_teachers_job_starts_from_given_weights(here, tiny_root, capsys):
    save_file(network(7).state_dict(), here / "given.safetensors")
    call(teacher.main, *training(tiny_root, "--weights", "given.safetensors", "--lr", 1e-9))
    assert "weights from given.safetensors; the head for 7 classes is replaced by a new head" in capsys.readouterr().out
    kept = load_model(here / "run/model.pt")
    assert kept["arch"] == "own_teachers:small"
    given = network(7).convolutions[1].weight
    torch.testing.assert_close(kept["weights"]["convolutions.1.weight"], given, rtol=0, atol=1e-6)


def test_the_teachers_job_refuses_weights_before_it_writes(here, tiny_root):
    torch.save({"conv.weight": torch.zeros(2)}, here / "given.pt")
    sentence = refused(teacher.main, *training(tiny_root, "--weights", "given.pt"))
    assert (
        "does not fit this network: missing classifier.bias, classifier.weight, convolutions.0.weight and" in sentence
    )
    assert "cannot be combined" in refused(teacher.main, *training(tiny_root, "--weights", "given.pt", "--init", "run"))
    assert not (here / "run").exists()


# ---- class maps


def test_imagewoof_is_found_among_imagenets_thousand():
    woof = ("n02086240", "n02087394", "n02088364", "n02089973", "n02093754")
    woof += ("n02096294", "n02099601", "n02105641", "n02111889", "n02115641")
    expected = [155, 159, 162, 167, 182, 193, 207, 229, 258, 273]  # as torchvision's categories have them
    assert picked(read_class_map("imagenet"), "imagenet", woof, 1000) == expected
    assert len(set(synsets())) == 1000


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("map.txt", "# a comment\ncat 2\nbig dog\t0\n", [2, 0]),
        ("map.json", '{"cat": 2, "big dog": "0"}', [2, 0]),
        ("map.json", '["big dog", "fish", "cat"]', [2, 0]),
    ],
)
def test_class_maps_of_all_kinds(here, name, text, expected):
    (here / name).write_text(text)
    assert picked(read_class_map(name), name, ("cat", "big dog"), 3) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("cat 2\n", r"has no line for big dog"),
        ("cat 2\nbig dig 1\n", r"has no line for big dog \(did you mean big dig\?\)"),
        ("cat 2\nbig dog 2\n", r"gives cat and big dog the same class of the teacher, 2"),
        ("cat 2\ncat 1\nbig dog 0\n", r"names cat twice"),
        ("cat 3\nbig dog 2\n", r"has the class 3, but the teacher's classes are 0 to 2\."),
        ("cat n02086240\nbig dog 2\n", r"has the class n02086240, but the teacher's classes are 0 to 2\."),
        ("cat\nbig dog 2\n", r"has a line with one column \(cat\)"),
    ],
)
def test_a_class_map_with_a_hole_or_a_double_is_refused(here, text, expected):
    (here / "map.txt").write_text(text)
    with pytest.raises(UserError, match=expected):
        picked(read_class_map("map.txt"), "map.txt", ("cat", "big dog"), 3)
    with pytest.raises(UserError, match=r"there is no class map absent.json; pass a file, or imagenet"):
        read_class_map("absent.json")


# ---- the cache


def labelling(root: Path, output: str, *more: object) -> None:
    main(
        [
            *("write", "--teacher", "own_teachers:small", "--image-size", "24", "--views", "2", "--device", "cpu"),
            *("--data", str(root), "-o", output, *map(str, more)),
        ]
    )


def test_a_network_from_elsewhere_labels_and_is_verified(here, tiny: Dataset, tiny_root, capsys):
    """Three of its seven classes are the data's; the cache names its network and weights."""
    weights = network(7).state_dict()
    save_file(weights, here / "given.safetensors")
    (here / "map.json").write_text(json.dumps(dict(zip(tiny.classes, (5, 0, 3), strict=True))))
    given = ("--weights", "given.safetensors", "--class-map", "map.json")
    labelling(tiny_root, "picked.h5", *given, "--mean", 0.5, 0.5, 0.5, "--std", 0.3, 0.3, 0.3)
    assert "it is not known whether the teacher has seen images of val" in capsys.readouterr().out
    cache = open_cache(here / "picked.h5")
    row = cache.header.teachers[0]
    assert (row.sha256, row.arch, row.seed) == (weights_digest(weights), "own_teachers:small", -1)
    assert row.val_top1 == cache.val_top1 and "trained elsewhere (may have seen val), 24 px" in render_info(cache)
    assert cache.header.mean == (0.5, 0.5, 0.5) and cache.header.image_size == 24
    verify = ["verify", "picked.h5", "--device", "cpu", "--data", str(tiny_root), "--samples", "999"]
    main([*verify, "--teacher", "own_teachers:small", *given])
    assert f"{2 * 30} soft labels recomputed" in capsys.readouterr().out
    main(["export", "picked.h5", "--to", "labels"])
    assert "whether it has seen images of val is not known" in (here / "labels/README.md").read_text()
    main(["verify", "labels", *verify[2:], "--teacher", "own_teachers:small", *given])
    assert f"{2 * 30} soft labels recomputed" in capsys.readouterr().out
    extend = ["extend", "picked.h5", "--views", "3", "--device", "cpu", "--data", str(tiny_root), "-o", "more.h5"]
    main([*extend, "--teacher", "own_teachers:small", *given])
    main(["verify", "more.h5", *verify[2:], "--teacher", "own_teachers:small", *given])
    more = open_cache(here / "more.h5")
    for split in ("train", "val"):
        assert np.array_equal(more.split(split).logits_NVK[:, :2], cache.split(split).logits_NVK)
    for path in here.glob("more.h5*"):
        path.unlink()
    save_file({**weights, "classifier.bias": weights["classifier.bias"] + 1}, here / "other.safetensors")
    with pytest.raises(UserError, match="pass it by --teacher own_teachers:small --weights FILE, with the same"):
        main([*extend, "--teacher", "own_teachers:small", "--weights", "other.safetensors", *given[2:]])
    (here / "map.json").write_text(json.dumps(dict(zip(tiny.classes, (0, 5, 3), strict=True))))
    with pytest.raises(UserError, match="is --class-map the one"):  # the weights are the same
        main([*extend, "--teacher", "own_teachers:small", *given])
    assert not list(here.glob("more.h5*"))
    with pytest.raises(UserError, match="does not hold the logits"):
        main([*verify, "--teacher", "own_teachers:small", *given])
    weights["classifier.bias"] += 1
    save_file(weights, here / "given.safetensors")
    with pytest.raises(UserError, match="has digest"):
        main([*verify, "--teacher", "own_teachers:small", *given])


def test_the_logits_picked_are_the_networks(here, tiny, tiny_root):
    save_file(network(3).state_dict(), here / "given.safetensors")
    (here / "map.txt").write_text("\n".join(f"{name} {2 - i}" for i, name in enumerate(tiny.classes)))
    labelling(tiny_root, "plain.h5", "--weights", "given.safetensors")
    labelling(tiny_root, "turned.h5", "--weights", "given.safetensors", "--class-map", "map.txt")
    plain, turned = (open_cache(here / name).split("val").logits_NVK[:] for name in ("plain.h5", "turned.h5"))
    assert np.array_equal(plain[:, :, ::-1], turned) and not np.array_equal(plain, turned)


def test_the_model_card_of_its_student_names_it(here, tiny, tiny_root):
    """A student's card and config say what labelled the cache, also where a class map chose the classes."""
    save_file(network(7).state_dict(), here / "given.safetensors")
    (here / "map.json").write_text(json.dumps(dict(zip(tiny.classes, (5, 0, 3), strict=True))))
    labelling(tiny_root, "picked.h5", "--weights", "given.safetensors", "--class-map", "map.json")
    size = ("--image-size", 32, "--epochs", 1, "--batch-size", 8, "--device", "cpu")
    call(distill.main, "--data", tiny_root, "--cache", "picked.h5", "--out", "student", *size)
    model = load(here / "student")
    text = card(model, "student", None, "no images", False, {})
    digest = weights_digest(network(7).state_dict())
    assert f"own_teachers:small trained elsewhere {digest}" in text
    assert config(model, False)["facts"]["cache"]["teachers"] == [digest]
    assert str(here) not in text and str(here) not in json.dumps(config(model, False))


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--teacher", "own_teachers:of_five"], "has 5 classes, but the data set has 3; .*--class-map"),
        (["--teacher", "torchvision:resnet18"], "would have random weights; add --weights FILE"),
        (["--teacher", "torchvision:resnet19", "--weights", "a.pt"], r"no classifier resnet19 \(did you mean"),
        (["--teacher", "own_teachers:small", "own_teachers:of_five"], "pass one teacher"),
        (["--weights", "absent.pt"], "there is no file absent.pt"),
        (["--image-size", "2"], "--image-size 2 is too small for own_teachers:small; the smallest that works is 4"),
        (["--class-map", "absent.txt"], "there is no class map absent.txt"),
        (["--teacher", "model.pt"], "--image-size is for a teacher that was not trained by kd_dist, but model.pt was"),
    ],
)
def test_a_teacher_that_cannot_label_is_refused_and_nothing_is_written(here, tiny_root, more, expected):
    with pytest.raises(UserError, match=expected):
        labelling(tiny_root, "none.h5", *more)
    assert not list(here.glob("none.h5*"))
