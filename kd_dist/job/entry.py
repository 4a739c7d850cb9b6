"""How a job begins: its command line, and the folder that it claims."""

import sys
from pathlib import Path
from typing import TypeVar

import torch

from kd_dist.config import JobConfig, NetworkConfig, flags_of, parser_for, read_command_line, resolve
from kd_dist.dist.endings import launched_rank
from kd_dist.dist.runtime import Runtime, launched_world_size
from kd_dist.job.data import Data
from kd_dist.run.claim import claim, read_settings
from kd_dist.run.folder import RunFolder

Kind = TypeVar("Kind", bound=JobConfig)


def read_config(kind: type[Kind], prog: str, description: str, epilog: str) -> Kind:
    """The config that this process was started with. --help prints once, however many ranks.

    A resume at another number of ranks keeps the batch size that the run's folder holds. All ranks look there before
    the rendezvous; rank 0 writes the file of a new run after it.
    """
    parser = parser_for(kind, prog, description, epilog)
    if {"-h", "--help"} & set(sys.argv[1:]) and launched_rank() != 0:
        sys.exit(0)
    typed = read_command_line(parser)
    folder = RunFolder(Path(str(typed.get("out", flags_of(kind)["out"].default))))
    stored = read_settings(folder)[1] if folder.settings.exists() else None
    return resolve(kind, typed, torch.cuda.is_available(), launched_world_size(), stored)


def claim_folder(config: NetworkConfig, data: Data, runtime: Runtime, **identity: str) -> RunFolder:
    """Take the run folder for this run; raises UserError on every rank where it holds something else.

    The data's fingerprints and `identity` are kept with the config, so that a run is not gone on with on other data.
    Claim when all else has been checked: a typo must not bind the folder, nor a refusal mark a finished run as failed.
    """
    folder = RunFolder(Path(config.out))
    stored = stored_settings(config, data, **identity)
    start_over = config.run.start_over
    runtime.on_main(lambda: claim(folder, config.kind, stored, config.may_change, start_over, config.completed))
    return folder


def stored_settings(config: NetworkConfig, data: Data, **identity: str) -> dict[str, object]:
    """What a run folder keeps of the config, and what else its run is bound to."""
    fingerprints = {f"{split} data": data.samples.split(split).fingerprint for split in ("train", "val")}
    return {**config.stored(), **fingerprints, **identity}
