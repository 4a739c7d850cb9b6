"""A whole job on a simulated GPU, under torchrun too: job.py MODULE ARGUMENTS...

What nobody computed must not end the run: losses, weights and logits pass for finite, rendered crops for the host's,
and gloo stands in for NCCL.
"""

import runpy
import sys

import nullgpu  # noqa: F401  takes over convolutions
import numpy as np
import torch
from setting import never_diverge

from kd_dist import inference, resident


def main() -> None:
    never_diverge()
    resident.fault_of = lambda on_device, pixels: None
    is_finite, logits, join = torch.isfinite, inference.Forward.logits, torch.distributed.init_process_group
    torch.isfinite = lambda tensor: torch.ones((), dtype=torch.bool) if tensor.is_cuda else is_finite(tensor)
    inference.Forward.logits = lambda self, shown: np.clip(np.nan_to_num(logits(self, shown)), -9, 9)
    torch.distributed.init_process_group = lambda backend, **how: join(backend.replace("nccl", "gloo"), **how)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
