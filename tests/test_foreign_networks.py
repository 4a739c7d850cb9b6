"""Networks that are not ours: torchvision's, timm's and those of a user's function, by name; what is refused."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import kd_dist
from kd_dist import models, predict
from kd_dist.errors import UserError
from kd_dist.run.checkpoint import save_model
from tests.test_predict import facts_of

OWN = (Path(__file__).parent / "programs/own_nets.py").read_text()


@pytest.fixture
def own_nets(tmp_path, monkeypatch):
    """A module own_nets in the current folder, which is not on Python's path."""
    (tmp_path / "own_nets.py").write_text(OWN)
    (tmp_path / "half_done.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("own_nets", None)


def refusal(name: str, classes: int = 3, size: int = 16) -> str:
    """What is said against a network as a job checks it."""
    with pytest.raises(UserError) as caught:
        models.require_known(name)
        models.require_usable(name, models.build(name, classes), classes, size)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_a_function_of_the_current_folder_builds_a_network(own_nets):
    model = models.build("own_nets:build", 7)
    models.require_usable("own_nets:build", model, 7, 16)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert isinstance(model[4], models.Float32Linear)
    assert str(own_nets) not in sys.path


@pytest.mark.parametrize(
    "name, expected",
    {
        "own_nets:biuld": "own_nets has no function biuld (did you mean build?)",
        "own_nets:": "own_nets has no function (empty name)",
        "own_nets:SIZES": "own_nets:SIZES is a list; pass a function",
        "own_net:build": "there is no module own_net, neither installed nor in ",
        "half_done:build": "importing half_done raises ModuleNotFoundError: No module named 'no_such_package'",
        "own_nets:broken": "building the network for 3 classes raises KeyError: 'depth'",
        "own_nets:no_arguments": "raises TypeError: no_arguments() takes 0 positional arguments but 1 was given",
        "own_nets:no_network": "gives a int; a function that gives an nn.Module is needed",
        "own_nets:features": "gives the shape [2, 4] for 2 images; logits [B, K] are needed, here [2, 3]",
        "own_nets:a_number": "gives the shape [] for 2 images",
        "own_nets:a_pair": "gives a tuple for 2 images",
        "own_nets:whole_numbers": "gives values of torch.int64",
        "own_nets:infinite": "logits that are not finite",
        "own_nets:not_for_training": "in training mode it raises ZeroDivisionError: division by zero",
        "own_nets:frozen": "has no parameters to train",
        "own_nets:unused": "has parameters that its logits do not depend on (extra.weight, extra.bias); remove them",
        "own_nets:large_images_alone": "too small for own_nets:large_images_alone; the smallest that works is 20",
        "torchvision:resnet35": "torchvision has no classifier resnet35 (did you mean resnet",
        "torchvision:fcn_resnet50": "torchvision has no classifier fcn_resnet50",
        "resnet34": "resnet34 is not known (did you mean torchvision:resnet34, torchvision:resnet50, resnet18?)",
        "timm:resnet18": "timm:NAME needs timm (",
    }.items(),
)
def test_a_network_that_cannot_be_used_is_refused_in_one_sentence(own_nets, monkeypatch, name, expected):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it raises
    assert expected in refusal(name)


def test_the_trial_leaves_network_and_random_numbers_alone():
    torch.manual_seed(1)
    model = models.build("cnn5", 5)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    models.require_usable("cnn5", model, 5, 32)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_building_by_name_draws_the_same_weights_as_ever():
    for name, make in {**models.TEACHERS, **models.STUDENTS}.items():
        torch.manual_seed(2)
        expected = make(4).state_dict()
        torch.manual_seed(2)
        assert all(torch.equal(value, expected[key]) for key, value in models.build(name, 4).state_dict().items())


@pytest.mark.parametrize("name", ["own_nets:build", "own_nets:without_head", "torchvision:squeezenet1_1"])
def test_logits_of_any_network_are_float32_under_autocast(own_nets, name):
    """A linear head computes in float32; the result of a network that ends in a convolution is converted."""
    model = models.build(name, 6).eval()
    seen = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, given, result: seen.append(result.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits_BK = model(torch.randn(2, 3, 64, 64))
    assert set(seen) == {torch.bfloat16} and logits_BK.dtype == torch.float32
    is_rounded = torch.equal(logits_BK, logits_BK.bfloat16().float())
    assert is_rounded == (name != "own_nets:build")


@pytest.mark.parametrize("name", ["resnet34", "mobilenet_v3_small", "googlenet", "squeezenet1_1"])
def test_torchvision_classifiers_are_built_and_pass_the_trial(name):
    model = models.build(f"torchvision:{name}", 3)
    models.require_usable(name, model, 3, 64)


def test_vision_transformer_takes_its_own_size_alone():
    assert "smallest that works is 224" in refusal("torchvision:vit_b_32", size=64)
    assert (
        "does not suit torchvision:vit_b_32 (AssertionError: Wrong image height! Expected 224 but got 256!)"
        in refusal("torchvision:vit_b_32", size=256)
    )


def with_timm(monkeypatch) -> list[tuple[str, bool]]:
    """Puts a package timm in place that has one model; gives what is asked for: (name, pretrained)."""
    asked = []

    def create_model(name, pretrained, num_classes):
        asked.append((name, pretrained))
        return models.Cnn5(num_classes, (4, 8))

    fake = types.SimpleNamespace(
        is_model=lambda name: name == "convnext_pico", list_models=lambda: ["convnext_pico"], create_model=create_model
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    return asked


def test_timm_is_asked_for_a_model_with_fresh_weights(monkeypatch):
    asked = with_timm(monkeypatch)
    assert models.build("timm:convnext_pico", 9)(torch.zeros(2, 3, 16, 16)).shape == (2, 9)
    assert asked == [("convnext_pico", False)]
    assert "timm has no model convnext_pic (did you mean convnext_pico?)" in refusal("timm:convnext_pic")


def saved(name: str, classes: int = 3) -> dict:
    return {"arch": name, "classes": ["a", "b", "c"][:classes], "weights": models.build(name, classes).state_dict()}


def test_a_saved_network_is_built_again_with_its_weights(own_nets):
    holds = saved("own_nets:build")
    model = models.restored(holds, Path("model.pt"))
    assert all(torch.equal(value, holds["weights"][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["torchvision:shufflenet_v2_x0_5", "timm:convnext_pico", "own_nets:build"])
def test_a_run_with_any_network_is_loaded_by_its_folder(name, own_nets, tiny, monkeypatch):
    """As a user does; the logits are those of the network that was saved, in evaluation mode."""
    with_timm(monkeypatch)
    model = models.build(name, 3).train()
    model(torch.randn(8, 3, 32, 32) + 1)  # batch statistics of its own
    (own_nets / "run").mkdir()
    save_model(own_nets / "run/model.pt", {**facts_of(tiny), "arch": name, "weights": model.state_dict()})
    loaded = kd_dist.load("run")
    images_BCHW = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images_BCHW), model.eval()(images_BCHW))
    assert loaded.classes == tiny.classes and not loaded.training and loaded.facts["arch"] == name
    assert predict.main(["run", str(tiny.root / "val")]) == 0


def test_a_saved_network_needs_its_code(own_nets):
    holds = saved("own_nets:build")
    (own_nets / "own_nets.py").unlink()
    del sys.modules["own_nets"]
    with pytest.raises(
        UserError, match=r"model.pt holds weights of the network own_nets:build, .* is no module own_nets"
    ):
        models.restored(holds, Path("model.pt"))
    with pytest.raises(UserError, match="does not fit the network cnn5 as it is here"):
        models.restored({**holds, "arch": "cnn5"}, Path("model.pt"))


def test_a_students_process_imports_torchvision_for_its_networks_alone(own_nets):
    """Also with a function of its own, in the current folder."""
    code = (Path(__file__).parent / "programs/imports_of_a_student.py").read_text()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(kd_dist.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.stdout, done.stderr) == ("[]\n['torchvision']\n", "")
