"""Small tensors on their way to a GPU: packed into one pinned buffer and copied at once, without the host waiting."""

from collections.abc import Sequence

import torch

ALIGNMENT = 16  # bytes; that of the widest type


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """These host tensors on the device: on a GPU by one copy that the host does not wait for, elsewhere one by one."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    buffer = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=True)
    for place, tensor in zip(unpacked(buffer, tensors), tensors, strict=True):
        place.copy_(tensor)
    return unpacked(buffer.to(device, non_blocking=True), tensors)


def unpacked(buffer_X: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of a buffer, uint8 [X], that have the types and shapes of `like`, one after another."""
    pieces, start = [], 0
    for tensor in like:
        pieces.append(buffer_X[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _room(tensor)
    return pieces


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
