"""A whole job on a simulated GPU, under torchrun too: job.py MODULE ARGUMENTS...

What nobody computed must not end the run: losses, weights and logits pass for finite, rendered crops for the host's,
and gloo stands in for NCCL. STOP_AFTER_STEPS has each rank ask itself to stop, as a scheduler would, after so many
steps.
"""

import os
import runpy
import signal
import sys

import nullgpu  # noqa: F401  takes over convolutions
import numpy as np
import torch
from setting import never_diverge

from kd_dist import inference
from kd_dist.images import device as resident
from kd_dist.training import Trainer


def main() -> None:
    never_diverge()
    resident.fault_of = lambda on_device, pixels: None
    logits, join = inference.Forward._logits_of, torch.distributed.init_process_group
    inference.Forward._logits_of = lambda self, batches: np.clip(np.nan_to_num(logits(self, batches)), -9, 9)
    torch.distributed.init_process_group = lambda backend, **how: join(backend.replace("nccl", "gloo"), **how)
    if "STOP_AFTER_STEPS" in os.environ:
        stop_after(int(os.environ["STOP_AFTER_STEPS"]))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def stop_after(steps: int) -> None:
    """Have the trainer's step number `steps` followed by SIGTERM."""
    train_step = Trainer.train_step

    def and_stop(self, batch):
        train_step(self, batch)
        if self.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.train_step = and_stop


if __name__ == "__main__":
    main()
