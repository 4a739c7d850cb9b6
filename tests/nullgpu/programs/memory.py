"""Reserved memory after each of EPOCHS epochs, in bytes: memory.py EPOCHS one|many (side streams)."""

import json
import sys

import torch
from setting import imagewoof_like, trainer_of

from kd_dist.training import device_input

BATCH, SIZE, STEPS = 32, 64, 3

epochs, streams = int(sys.argv[1]), sys.argv[2]
reserved = []
with trainer_of("cnn5", imagewoof_like(BATCH * STEPS, BATCH, SIZE, mix=0.25), epochs=epochs) as trainer:
    for epoch in range(epochs):
        if streams == "many":
            device_input.side_stream.cache_clear()
        for batch in trainer.batches(epoch):
            trainer.train_step(batch)
        del batch
        reserved.append(torch.cuda.memory_reserved())
print(json.dumps({"reserved": reserved}))
