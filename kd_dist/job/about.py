"""What a run shows of itself in TensorBoard: its command, settings, versions, data, cache and hosts."""

import platform
import shlex
import socket
import sys
from collections.abc import Mapping
from typing import Any

import torch

from kd_dist.cache import Cache
from kd_dist.config import NetworkConfig
from kd_dist.data.samples import SPLITS, Dataset
from kd_dist.dist.runtime import Runtime
from kd_dist.run.curves import Description
from kd_dist.version import commit, software

HPARAMS = (
    *("alpha", "temperature", "loss", "crops", "label_fraction", "image_size", "epochs", "batch_size", "lr"),
    *("weight_decay", "warmup_epochs", "label_smoothing", "ema", "mixup", "cutmix", "seed"),
)


def describe(config: NetworkConfig, data: Dataset, cache: Cache | None, runtime: Runtime) -> Description:
    """The run's texts and hyperparameters, on rank 0; all ranks call it, because each adds where it runs."""
    ranks = runtime.gather((socket.gethostname(), _device(runtime.device)))
    if not runtime.is_main:
        return Description()
    settings = config.flat()
    texts = {
        "run/1_command": f"    {command_line()}",
        "run/2_settings": table({name: settings[name] for name in sorted(settings)}, "flag"),
        "run/3_versions": table(
            {"software": software(), "commit": commit() or "not known", "host": platform.platform()}
        ),
        "run/4_data_and_cache": table(_identity(data, cache)),
        "run/5_hosts": table({f"rank {rank}": f"{host}, {device}" for rank, (host, device) in enumerate(ranks)}),
    }
    hparams = {name: settings.get(name) for name in HPARAMS}
    network = settings.get("student") or settings.get("teacher")
    return Description(texts, {"kind": config.kind, "network": network, "data": data.name, **hparams})


def command_line() -> str:
    """The command that started this process, as one would type it."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])


def table(values: Mapping[str, Any], head: str = "what") -> str:
    """A Markdown table of names and values."""
    rows = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in values.items()]
    return "\n".join([f"| {head} | value |", "| --- | --- |", *rows])


def _identity(data: Dataset, cache: Cache | None) -> dict[str, str]:
    found = {"data": data.name, "classes": str(len(data.classes))}
    for split in SPLITS:
        samples = data.split(split)
        found[split] = f"{len(samples):,} images, fingerprint {samples.fingerprint}"
    if cache is None:
        return found
    teachers = ", ".join(row.sha256 for row in cache.header.teachers)
    return {**found, "cache": str(cache.path), "cache SHA-256": cache.digest, "teachers": teachers}


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
