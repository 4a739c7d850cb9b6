"""The networks: their shapes, sizes and order of layers, logits in float32, and a student that needs no teacher."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import kd_dist
from kd_dist.models import STUDENTS, TEACHERS, Cnn5, Float32Linear, count_weights

NETWORKS = {**TEACHERS, **STUDENTS}
SIZES = {
    "resnet18": (32, 97),
    "resnet18_s1": (32, 65),
    "cnn5": (32, 64, 97),
    "cnn5_wide": (32, 97),
    "origin": (64, 97, 224),
}


def seeded(name: str, classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name](classes)


def inputs_and_outputs(model: nn.Module, layers: dict[str, nn.Module], images_BCHW: torch.Tensor) -> dict[str, tuple]:
    """What goes into and comes out of the named layers during one forward pass in evaluation mode."""
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, given, result, name=name: seen.__setitem__(name, (given[0], result)))
    with torch.inference_mode():
        model.eval()(images_BCHW)
    return seen


def test_every_network_is_checked_here():
    assert SIZES.keys() == NETWORKS.keys()
    assert not TEACHERS.keys() & STUDENTS.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_a_column_for_each_class_at_every_size(name):
    model = seeded(name, classes=7).eval()
    with torch.inference_mode():
        shapes = [model(torch.randn(2, 3, size, size)).shape for size in SIZES[name]]
    assert shapes == [(2, 7)] * len(SIZES[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_learns(name):
    model = seeded(name).train()
    size = SIZES[name][0]
    model(torch.randn(4, 3, size, size)).logsumexp(dim=1).sum().backward()
    still = [weight for weight, value in model.named_parameters() if value.grad is None or value.grad.abs().max() == 0]
    assert still == []


@pytest.mark.parametrize("name", ["resnet18_s1", *STUDENTS])  # the first holds a resnet18
def test_weights_are_drawn_from_the_seed(name):
    first, same, other = (nn.utils.parameters_to_vector(seeded(name, seed=seed).parameters()) for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_float32_under_autocast(name):
    """The convolutions run in bfloat16, the last layer does not: its result is not rounded to eight bits."""
    model = seeded(name).eval()
    size = SIZES[name][0]
    layers = {
        "convolution": next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)),
        "last": next(layer for layer in model.modules() if isinstance(layer, Float32Linear)),
    }
    with torch.autocast("cpu", torch.bfloat16):
        seen = inputs_and_outputs(model, layers, torch.randn(2, 3, size, size))
    assert seen["convolution"][1].dtype == torch.bfloat16
    features_BD, logits_BK = seen["last"]
    assert logits_BK.dtype == torch.float32
    assert torch.equal(logits_BK, nn.functional.linear(features_BD.float(), layers["last"].weight, layers["last"].bias))
    assert not torch.equal(logits_BK, logits_BK.bfloat16().float())


def test_networks_run_in_float64():
    for name in STUDENTS:
        model = seeded(name).double().eval()
        assert model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).dtype == torch.float64


def test_cnn5_is_small():
    assert count_weights(seeded("cnn5")) == 1_574_698 <= 1_600_000
    wide = seeded("cnn5_wide")
    assert count_weights(wide) == 1_541_450
    assert [layer.kernel_size[0] for layer in wide.convolutions] == [5, 5, 3, 3, 3]


def test_cnn5_pools_before_it_normalises():
    model = seeded("cnn5")
    for norm in model.norms:  # so that a forgotten or misplaced one is seen
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    layers = {f"conv{i}": layer for i, layer in enumerate(model.convolutions)}
    layers |= {f"norm{i}": layer for i, layer in enumerate(model.norms)} | {"last": model.classifier}
    seen = inputs_and_outputs(model, layers, torch.randn(2, 3, 64, 64))
    for i in range(5):
        assert torch.equal(seen[f"norm{i}"][0], nn.functional.max_pool2d(seen[f"conv{i}"][1], 2))
    for i in range(4):
        assert torch.equal(seen[f"conv{i + 1}"][0], seen[f"norm{i}"][1].relu())
    assert seen["norm4"][1].min() < 0
    assert torch.equal(seen["last"][0], seen["norm4"][1].relu().mean(dim=(2, 3)))


def test_cnn5_takes_other_channels():
    assert count_weights(Cnn5(3, (4, 8))) == 3 * 4 * 9 + 4 * 8 * 9 + 2 * (4 + 8) + 8 * 3 + 3


def test_origin_is_the_described_network():
    """Conv 5x5 of 64, conv 3x3 stride 2 of 128, the same of 264, then 512, 64 and the classes: 5.28 M weights."""
    model = seeded("origin")
    assert count_weights(model) == pytest.approx(5.28e6, rel=0.002)
    kinds = [layer for layer in model if not isinstance(layer, nn.ReLU)]
    first_linear = next(layer for layer in kinds if isinstance(layer, nn.Linear))
    before_flatten = next(layer for layer in kinds if isinstance(layer, nn.AdaptiveAvgPool2d))
    seen = inputs_and_outputs(model, {"map": before_flatten, "fc": first_linear}, torch.randn(1, 3, 224, 224))
    assert seen["map"][0].shape == (1, 264, 6, 6)
    assert torch.equal(seen["map"][0], seen["map"][1])  # the added pooling changes nothing at the origin's size
    assert seen["fc"][0].shape == (1, 264 * 36)
    order = [type(layer).__name__ for layer in kinds]
    assert order[:8] == ["Conv2d", "MaxPool2d", *["Conv2d", "MaxPool2d", "BatchNorm2d"] * 2]
    assert [layer.out_features for layer in kinds if isinstance(layer, nn.Linear)] == [512, 64, 10]


def test_stride_one_stem_halves_the_reduction():
    stock, fine = seeded("resnet18"), seeded("resnet18_s1")
    maps = [
        inputs_and_outputs(model, {"last": model.layer4}, torch.randn(1, 3, 64, 64))["last"][1].shape[-1]
        for model in (stock, fine)
    ]
    assert maps == [2, 4]
    assert count_weights(stock) - count_weights(fine) == 3 * 64 * (49 - 9)
    assert 11.1e6 < count_weights(stock) < 11.3e6


def test_students_process_needs_no_teacher():
    """With torchvision barred, the student's job is imported, and its networks are built and run."""
    code = (Path(__file__).parent / "programs/student_without_torchvision.py").read_text()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(Path(kd_dist.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
