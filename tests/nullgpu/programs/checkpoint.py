"""A checkpoint's snapshot on a GPU: checkpoint.py prints where the copies lie and whether the host had to wait."""

import json

import nullgpu
import torch
from setting import noise, trainer_of

from kd_dist.training.saving import snapshot


def tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in tensors(value)]
    return [tree] if isinstance(tree, torch.Tensor) else []


with trainer_of("cnn5", noise(32, 16, 32, images="fresh")) as trainer:
    for batch in trainer.batches(0):
        trainer.train_step(batch)
    trained = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()["state"]}
    snapshot(trained)  # takes the pinned memory, which later ones reuse
    with nullgpu.no_sync():
        copied, ready = snapshot(trained)
    ready.synchronize()
    on_gpu = [tensor.is_cuda for tensor in tensors(trained)]
    pinned = [tensor.is_pinned() for tensor in tensors(copied)]
    same = all(torch.equal(a.cpu(), b) for a, b in zip(tensors(trained), tensors(copied), strict=True))
print(json.dumps({"on_gpu": on_gpu, "pinned": pinned, "same": same}))
