"""How the hardware does, over all ranks: step times, the slowest rank, memory peaks, and the share of the peak that the
network's arithmetic reaches.
"""

import copy
import functools
import resource
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd_dist.training.watch import EpochSums, StepClock

KIB = 1024

# Dense bfloat16 on tensor cores in FLOP/s, by the beginning of the device's name; the longest that fits counts. From
# NVIDIA's data sheet of each product; where it states the figure with structured sparsity, half of that.
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}


@dataclass(frozen=True)
class RankHealth:
    """What one rank saw in an epoch. Seconds and bytes; `own_s` is its work before it waits for other ranks."""

    step_median_s: float
    step_worst_s: float
    wait_s: float
    own_s: float
    host_bytes: int
    device_bytes: int


def health_of(clock: StepClock, sums: EpochSums) -> RankHealth | None:
    """This rank's, since the epoch began or the run resumed; None where it took no step since."""
    if not clock.steps_s:
        return None
    on_gpu = clock.device.type == "cuda"
    return RankHealth(
        step_median_s=statistics.median(clock.steps_s),
        step_worst_s=max(clock.steps_s),
        wait_s=sums.wait_seconds,
        own_s=sums.wait_seconds + clock.forward_s,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB,
        device_bytes=torch.cuda.max_memory_allocated(clock.device) if on_gpu else 0,
    )


def metrics_of(ranks: Sequence[RankHealth | None], train_s: float) -> dict[str, float]:
    """The epoch's health over all ranks; `train_s` is what its steps took.

    data_wait_s is that of the rank that waited longest. slowest_rank is the one with most work of its own, waiting for
    data and forward passes, and slowest_rank_extra_share how much more that is than the median rank's, of train_s.
    """
    known = [rank for rank in ranks if rank is not None]
    if not known:
        return {}
    own = [rank.own_s for rank in known]
    slowest, train_s = own.index(max(own)), max(train_s, 1e-9)
    wait_s = max(rank.wait_s for rank in known)
    found: dict[str, float] = {
        "data_wait_s": wait_s,
        "data_wait_share": wait_s / train_s,
        "step_median_s": statistics.median(rank.step_median_s for rank in known),
        "step_worst_s": max(rank.step_worst_s for rank in known),
        "slowest_rank": slowest,
        "slowest_rank_extra_share": (own[slowest] - statistics.median(own)) / train_s,
        "host_memory_peak_bytes": max(rank.host_bytes for rank in known),
    }
    device_bytes = max(rank.device_bytes for rank in known)
    return found | ({"device_memory_peak_bytes": device_bytes} if device_bytes else {})


def flops_an_image(model: nn.Module, image_size: int) -> float | None:
    """Floating-point operations of forward and backward pass for one image, as torch's counter has them: convolutions
    and matrix products. Nothing is computed. None for a network that does not run on the meta device.
    """
    images = 2  # BatchNorm refuses one value a channel
    try:
        shadow = copy.deepcopy(model).to("meta").train()
        for module in shadow.modules():
            if isinstance(module, nn.Linear):  # ours switch autocast off, which does not know this device
                module.forward = functools.partial(nn.Linear.forward, module)  # type: ignore[method-assign]
        with FlopCounterMode(display=False) as counter:
            shadow(torch.zeros(images, 3, image_size, image_size, device="meta")).sum().backward()
        return counter.get_total_flops() / images
    except Exception:  # whatever a network of the user's does
        return None


def peak_of(device: torch.device, dtype: str) -> float | None:
    """What a device can do in FLOP/s, None where that is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    fitting = [known for known in PEAKS if name == known or name.startswith((known + " ", known + "-"))]
    return PEAKS[max(fitting, key=len)] if fitting else None


def peak_images_per_s(model: nn.Module, image_size: int, device: torch.device, dtype: str, ranks: int) -> float | None:
    """Images/s at which so many devices would do arithmetic alone, at their peak; None where that is not known."""
    peak = peak_of(device, dtype)
    flops = flops_an_image(model, image_size) if peak else None
    return peak * ranks / flops if peak and flops else None
