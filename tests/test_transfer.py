"""Small tensors packed into one buffer."""

import torch

from kd_dist.images.transfer import _room, to_device, unpacked


def test_a_buffer_gives_every_tensor_back():
    tensors = [
        torch.arange(5, dtype=torch.uint8),
        torch.arange(6, dtype=torch.int64).view(2, 3),
        torch.zeros(0, 4),
        torch.tensor(2.5, dtype=torch.float64),
        torch.rand(3, 3).half(),
    ]
    buffer_X = torch.zeros(sum(map(_room, tensors)), dtype=torch.uint8)
    for place, tensor in zip(unpacked(buffer_X, tensors), tensors, strict=True):
        place.copy_(tensor)
    for back, tensor in zip(unpacked(buffer_X, tensors), tensors, strict=True):
        assert torch.equal(back, tensor) and back.dtype == tensor.dtype


def test_on_a_cpu_nothing_is_copied():
    tensors = [torch.arange(3)]
    assert to_device(tensors, torch.device("cpu"))[0] is tensors[0]
