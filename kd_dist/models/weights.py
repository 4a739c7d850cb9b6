"""Weights that this program did not write: a safetensors file, or a `.pt` state dict, from which no code is run."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_dist.errors import UserError
from kd_dist.functions import cause

NESTED = ("state_dict", "model", "model_state_dict")  # where training scripts keep the weights among other things
TORCH_FILES = (".pt", ".pth", ".bin")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file by name, on the CPU. Raises UserError where there are none, or only with code to run."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; pass a .safetensors file or a .pt state dict with --weights.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in TORCH_FILES:
        raise UserError(f"--weights {path} ends in none of .safetensors, {', '.join(TORCH_FILES)}.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than weights (pickled code or objects) or is damaged, so it was not loaded; save "
            "model.state_dict() alone, or a .safetensors file."
        ) from error
    except Exception as error:
        raise UserError(f"{path} cannot be read as a state dict ({cause(error)}).") from error
    return _weights_among(found, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({cause(error)}).") from error


def _weights_among(found: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds; "module.", which DistributedDataParallel adds to all names, is dropped."""
    if isinstance(found, Mapping) and "payload" in found:
        raise UserError(f"{path} is a model.pt of this program: pass it with --init, or with --teacher alone.")
    for name in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds no state dict: a name and a tensor for each weight; save model.state_dict().")
    wrapped = all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in found.items()}


def classes_of(weights: Mapping[str, Tensor], model: nn.Module, classes: int) -> int:
    """For how many classes the head in these weights is, where `model` was built for `classes`."""
    return _other_head(model.state_dict(), weights, classes)[1] or classes


def take_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path, classes: int) -> int | None:
    """Load weights into a network for K classes. A head for another number of classes is not loaded: the network keeps
    its own fresh one, and the number is returned.

    Raises UserError, naming the keys, where anything else is missing, not known or of another shape.
    """
    own = model.state_dict()
    head, theirs = _other_head(own, weights, classes)
    if wrong := misfits(own, {**weights, **{name: own[name] for name in head}}):
        raise UserError(f"--weights {path} does not fit this network: {wrong}; pass the weights of the same network.")
    model.load_state_dict({**weights, **{name: own[name] for name in head}})
    return theirs


def _other_head(own: Mapping[str, Tensor], given: Mapping[str, Tensor], classes: int) -> tuple[list[str], int | None]:
    """The weights that differ in their first axis alone, which is the classes here and one other number there."""
    common = [name for name in own.keys() & given.keys() if own[name].shape != given[name].shape]
    head = [
        name
        for name in common
        if own[name].dim() and own[name].shape[0] == classes and own[name].shape[1:] == given[name].shape[1:]
    ]
    counts = {given[name].shape[0] for name in head}
    return (head, counts.pop()) if len(counts) == 1 else ([], None)


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The keys in which two sets of weights differ, in words; empty where they fit."""
    other = [name for name in own.keys() & given.keys() if own[name].shape != given[name].shape]
    shapes = [f"{name} (there {tuple(given[name].shape)}, here {tuple(own[name].shape)})" for name in sorted(other)]
    kinds = {
        "missing": sorted(own.keys() - given.keys()),
        "not known": sorted(given.keys() - own.keys()),
        "of another shape": shapes,
    }
    return ", ".join(f"{kind} {_first_names(names)}" for kind, names in kinds.items() if names)


def _first_names(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
