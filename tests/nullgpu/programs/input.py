"""The input of a step, in simulated figures: input.py PLACEMENT(device or host) MIX SIZE H W [H W of one image in 64].

MIX is the share of mixup, and of CutMix. Prints launches, MB an image, and GiB needed beside what was there before; the
host must wait for nothing.
"""

import json
import sys
from dataclasses import replace

import nullgpu
import numpy as np
import torch
from setting import ALONE, HARD_LOSS, launches, resident_data, trainer_of

from kd_dist.images import device as resident
from kd_dist.images.store import Pixels

BATCH, BATCHES = 256, 4


def on_the_host(data):
    """The same data with images that the host draws."""
    sizes_N2 = data.pixels.sizes_N2
    zeros = torch.zeros(int(sizes_N2.prod(1).max()) * 6, dtype=torch.uint8)
    return replace(data, pixels=Pixels(zeros, sizes_N2, np.zeros(len(sizes_N2), np.int64)))


placement, mix, size, *sides = sys.argv[1:]
sides = np.array(sides, np.int64).reshape(-1, 2)
sizes_N2 = np.tile(np.stack([sides[0], sides[0, ::-1]]), (BATCH * BATCHES // 2, 1))
sizes_N2[::64] = sides[-1]
data = resident_data(sizes_N2, BATCH, int(size), float(mix))
if placement == "host":
    data = on_the_host(data)
with trainer_of("cnn5", data, HARD_LOSS) as trainer, nullgpu.no_sync():
    batches = data.epoch(0, ALONE)
    trainer.prepare(next(batches))
    trainer.prepare(next(batches))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nullgpu.reset()
    with nullgpu.Bytes() as bytes_:
        batch = trainer.prepare(next(batches))
    found = {
        "launches": launches(),
        "mb_an_image": sum(bytes_.moved.values()) / BATCH / 1e6,
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "result_bytes": batch.images_BCHW.nbytes * 2,  # in bfloat16, and before in uint8 with its mixes
        "work_bytes": resident.WORK_BYTES,
        "copies_to_device": nullgpu.counts().calls["cudaMemcpyAsync H2D"],
    }
print(json.dumps(found))
