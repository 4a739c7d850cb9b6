"""How far the host runs ahead of a GPU that never finishes by itself: ahead.py

Prints for each step how many steps before it the host had waited for when it enqueued it.
"""

import json

import torch
from setting import noise, trainer_of

BATCH, STEPS = 16, 8
waited = 0
synchronize = torch.cuda.Event.synchronize


def counted(event) -> None:
    global waited
    waited += 1
    synchronize(event)


torch.cuda.Event.synchronize = counted
unfinished = []
with trainer_of("cnn5", noise(BATCH * STEPS, BATCH, 32, images="fresh")) as trainer:
    for step, batch in enumerate(trainer.batches(0)):
        unfinished.append(step - waited)
        trainer.train_step(batch)
print(json.dumps({"unfinished": unfinished}))
