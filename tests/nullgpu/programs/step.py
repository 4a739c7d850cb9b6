"""Launches, waits and bytes of a step with its input: step.py MODEL LOSS IMAGES PIXELS [SIZE].

LOSS is hard or the name of a soft one, IMAGES and PIXELS are those of setting.noise.
"""

import json
import sys

import nullgpu
from setting import HARD_LOSS, launches, noise, soft_loss, trainer_of

BATCH, STEPS = 16, 8
SIZE = 64  # launches do not depend on it; the student `reference_cnn` needs 64 pixels

model, loss, images, pixels, *size = sys.argv[1:]
data = noise(BATCH * STEPS, BATCH, int(size[0]) if size else SIZE, images, pixels)
with trainer_of(model, data, HARD_LOSS if loss == "hard" else soft_loss(loss)) as trainer:
    batches = trainer.batches(0)
    for _ in range(STEPS - 3):
        trainer.train_step(next(batches))
    batch = next(batches)
    with nullgpu.Bytes() as moved:
        trainer.train_step(batch)
    nullgpu.reset()
    with nullgpu.no_sync():
        batch = next(batches)
        of_input = launches()
        trainer.train_step(batch)
    bytes_an_image = sum(moved.moved.values()) / BATCH
    print(json.dumps({"launches": launches(), "step_launches": launches() - of_input, "step_bytes": bytes_an_image}))
