"""A network by its name, which is one of

- a name of ours: `resnet18`, `cnn5`, see kd_dist/models/networks.py;
- `torchvision:NAME`, any classifier of torchvision, with random weights;
- `timm:NAME`, any model of timm where timm is installed, with random weights;
- `my_package.my_module:function`, a function of the number of classes K that gives an nn.Module; the module is found
  where Python finds it, and in the current folder.

Every network takes images [B, 3, S, S] and gives logits [B, K]. Nothing of torchvision or timm is imported before a
network of theirs is asked for.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_dist.errors import UserError
from kd_dist.functions import cause, function_of, near
from kd_dist.models.networks import STUDENTS, TEACHERS, Float32Linear

Build = Callable[[int], nn.Module]
"""The number of classes -> a network."""

WITHOUT_AUXILIARY_HEADS = {"googlenet", "inception_v3"}  # of torchvision; their heads change the output's type


def build(name: str, classes: int) -> nn.Module:
    """The network of this name for so many classes, with fresh weights and logits in float32 under autocast too.

    Raises UserError where the name is not known, or its function raises or gives no network.
    """
    make = _function_of(name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torchvision|timm")
            model = make(classes)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: building the network for {classes} classes raises {cause(error)}.") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} gives a {type(model).__name__}; a function that gives an nn.Module is needed.")
    return _with_float32_logits(model, classes)


def require_known(name: str, flag: str = "the network") -> None:
    """Raise UserError, with names like it, where no network has this name, given by this flag. Builds nothing."""
    _function_of(name, flag)


def restored(saved: Mapping[str, Any], path: Path) -> nn.Module:
    """The network of a model.pt, from what checkpoint.load_model read there, with its weights.

    Raises UserError where its code is not at hand, or is another network's by now.
    """
    name = saved["arch"]
    try:
        model = build(name, len(saved["classes"]))
    except UserError as error:
        raise UserError(f"{path} holds weights of the network {name}, which cannot be built here: {error}") from error
    try:
        model.load_state_dict(saved["weights"])
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the network {name} as it is here: its code has changed.") from error
    return model


def _function_of(name: str, flag: str = "the network") -> Build:
    ours = {**TEACHERS, **STUDENTS}
    if name in ours:
        return ours[name]
    library, colon, inner = name.partition(":")
    if not colon:

        def typed(known: str) -> str:
            return known if known in ours else f"torchvision:{known}"

        raise UserError(
            f"{flag} {name} is not known{near(name, [*ours, *_torchvision_names()], typed)}; choose from "
            f"{', '.join(ours)}, or use torchvision:NAME, timm:NAME, or a function as my_module:function."
        )
    by_library: dict[str, Callable[[str], Build]] = {"torchvision": _of_torchvision, "timm": _of_timm}
    return by_library[library](inner) if library in by_library else function_of(name)


def _of_torchvision(name: str) -> Build:
    models = _library("torchvision.models", "torchvision")
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classifier {name}{near(name, known)}.")
    without = {"aux_logits": False, "init_weights": True} if name in WITHOUT_AUXILIARY_HEADS else {}
    return lambda classes: models.get_model(name, weights=None, num_classes=classes, **without)


def _of_timm(name: str) -> Build:
    timm = _library("timm", "timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name}{near(name, timm.list_models())}.")
    return lambda classes: timm.create_model(name, pretrained=False, num_classes=classes)


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{package}:NAME needs {package} ({cause(error)}); `pip install {package}`.") from error


def _torchvision_names() -> list[str]:
    """The classifiers of torchvision, to suggest one; none where it is not installed."""
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError:
        return []
    return models.list_models(module=models)


def _with_float32_logits(model: nn.Module, classes: int) -> nn.Module:
    """The network, made to give float32 under autocast. This is the one place where that is seen to.

    The last linear layer of K outputs computes in float32, as ours do, so that logits are not rounded to bfloat16's
    eight bits. Of a network that ends otherwise (in a convolution, say) the result is converted, rounded as it is.
    """
    heads = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.out_features == classes]
    if heads:
        heads[-1].__class__ = Float32Linear
    model.register_forward_hook(_to_float32)
    return model


def _to_float32(model: nn.Module, given: object, result: object) -> object:
    if isinstance(result, Tensor) and result.dtype in (torch.bfloat16, torch.float16):
        return result.float()
    return None
