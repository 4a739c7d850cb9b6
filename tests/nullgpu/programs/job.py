"""A whole job on a simulated GPU, under torchrun too: job.py MODULE ARGUMENTS...

What nobody computed must not end the run: losses, weights and logits pass for finite, and gloo stands in for NCCL.
"""

import runpy
import sys

import nullgpu  # noqa: F401  takes over convolutions
import numpy as np
import torch
from setting import never_diverge

from kd_dist import inference


def main() -> None:
    never_diverge()
    logits, join = inference.Forward._logits_of, torch.distributed.init_process_group
    inference.Forward._logits_of = lambda self, batches: np.clip(np.nan_to_num(logits(self, batches)), -9, 9)
    torch.distributed.init_process_group = lambda backend, **how: join(backend.replace("nccl", "gloo"), **how)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
