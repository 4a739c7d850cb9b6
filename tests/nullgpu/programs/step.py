"""Launches and waits of a step with its input: step.py MODEL LOSS(hard or a soft one's name)."""

import json
import sys

import nullgpu
from setting import HARD_LOSS, launches, noise, soft_loss, trainer_of

BATCH, SIZE, STEPS = 16, 64, 8  # launches depend on neither size; the student `origin` needs 64 pixels

model, loss = sys.argv[1:]
data = noise(BATCH * STEPS, BATCH, SIZE, blended=loss == "hard")
with trainer_of(model, data, HARD_LOSS if loss == "hard" else soft_loss(loss)) as trainer:
    batches = trainer.batches(0)
    for _ in range(STEPS - 2):
        trainer.train_step(next(batches))
    nullgpu.reset()
    with nullgpu.no_sync():
        batch = next(batches)
        of_input = launches()
        trainer.train_step(batch)
    print(json.dumps({"launches": launches(), "step_launches": launches() - of_input}))
