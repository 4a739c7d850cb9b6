"""`make gpu`: what only a GPU can show, in pieces of a few minutes: tests, benchmark rows, the Imagewoof study.

python -m benchmarks.gpu --out runs/gpu

Each call resumes where the last one stopped and ends before its time is up. A finished step is not run again; training
and cache writing stop on SIGTERM with everything saved and resume in the next call. When all steps are done, the page
in docs/results/ is written from what they left.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import gpu_page
from benchmarks.children import ROOT
from kd_dist.dist.endings import run_entry
from kd_dist.errors import UserError
from kd_dist.files import read_json, write_json

BENCH_ROWS = ("gpu", "1", "2", "3", "4", "5", "7", "job")
ENDING_SECONDS = 60.0  # what a step gets to save after SIGTERM, before it is killed
LEAST_SECONDS = 120.0  # no step is begun with less
ATTEMPTS = 2  # of a step that cannot resume where it was stopped; then it counts as done, without a result
UNFINISHED = 75  # exit code: call again (EX_TEMPFAIL)


@dataclass(frozen=True)
class Step:
    """One command of the whole. `resumes`: stopped by SIGTERM it resumes where it was; `may_fail`: its failure is a
    result, and later steps do not need it.
    """

    name: str
    command: tuple[str, ...]
    resumes: bool = True
    may_fail: bool = False


def steps_of(out: Path, gpus: int) -> list[Step]:
    """All steps in their order, for results in `out`, on so many GPUs."""
    ranks = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", "-m")
    teacher, study = out / "teacher", out / "study"
    cache = ("--cache", str(teacher / "logits.h5"))
    mixed = out / "mixed.h5"
    model = ("--teacher-model", str(teacher / "model.pt"))

    def trained(*words: str) -> tuple[str, ...]:
        return (*ranks, *words)

    tests = ("-m", "pytest", "tests/gpu", f"--junitxml={out / 'tests.xml'}")
    bench = [
        Step(f"bench-{row}", ("-m", "benchmarks.bench", "--rows", row, "--out", str(out / f"bench-{row}")), False, True)
        for row in BENCH_ROWS
    ]
    return [
        Step("tests", tests, resumes=False, may_fail=True),
        *bench,
        Step("teacher", trained("kd_dist.teacher", "--out", str(teacher))),
        Step(
            "primary",
            trained("kd_dist.study", *cache, "--arms", *PRIMARY, "--seeds", *"01234", "--out", str(study)),
        ),
        Step("arms", trained("kd_dist.study", *cache, *model, "--seeds", *"012", "--out", str(study))),
        Step(
            "mixed-cache",
            trained(
                *("kd_dist.cache", "write", "--teacher", str(teacher / "model.pt"), "--views", "200"),
                *("--mixed-views", "0.5", "-o", str(mixed)),
            ),
        ),
        Step(
            "mixed-arm",
            trained(
                *("kd_dist.study", *cache, "--arms", f"mixed=distilled,cache={mixed}"),
                *("--seeds", *"012", "--out", str(study)),
            ),
        ),
    ]


PRIMARY = ("distilled", "baseline")


def main() -> None:
    typed = arguments()
    if not torch.cuda.is_available():
        raise UserError(
            "make gpu measures GPUs, and none is visible here; look at nvidia-smi and CUDA_VISIBLE_DEVICES."
        )
    out = Path(typed.out)
    out.mkdir(parents=True, exist_ok=True)
    steps = steps_of(out, torch.cuda.device_count())
    deadline = time.monotonic() + typed.minutes * 60 if typed.minutes else None
    if go_on(steps, out, deadline):
        print(f"{gpu_page.write(out, steps)} is written; all {len(steps)} steps are done", flush=True)
        return
    done = sum(is_done(out, step) for step in steps)
    print(f"{done} of {len(steps)} steps are done; run make gpu again to resume", flush=True)
    sys.stdout.flush()
    os._exit(UNFINISHED)


def go_on(steps: Sequence[Step], out: Path, deadline: float | None) -> bool:
    """Run the steps that are not done, in their order, until the deadline (of time.monotonic); whether all are done.

    Raises UserError where a step fails that later ones need.
    """
    for step in steps:
        if is_done(out, step):
            continue
        if deadline is not None and deadline - time.monotonic() < LEAST_SECONDS:
            return False
        ended = run(step, out, deadline)
        if ended is None:
            return False
        if ended and not step.may_fail:
            raise UserError(f"step {step.name} ended with code {ended}; {log_of(out, step)} has what it printed.")
    return True


def run(step: Step, out: Path, deadline: float | None) -> int | None:
    """Run a step: its exit code, noted as done with it; None where the deadline stopped it. Its output goes to a file
    and is not shown, but for the file's name.
    """
    earlier = read_record(out, step)
    before = earlier.get("seconds", 0.0) if step.resumes else 0.0
    print(f"{time.strftime('%H:%M:%S')} {step.name}: {shlex.join(step.command)} (see {log_of(out, step)})", flush=True)
    started = time.monotonic()
    with open(log_of(out, step), "ab") as log:
        process = subprocess.Popen(
            [sys.executable, *step.command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        code = _wait(process, deadline)
    facts = {
        "seconds": before + time.monotonic() - started,
        "code": code,
        "attempts": earlier.get("attempts", 0) + 1,
        "command": shlex.join(step.command),
    }
    ended = code is not None and (code == 0 or step.may_fail)
    too_long = code is None and not step.resumes and facts["attempts"] >= ATTEMPTS
    write_json(record_of(out, step), {**facts, "done": ended or too_long})
    return code


def _wait(process: subprocess.Popen, deadline: float | None) -> int | None:
    """The exit code; None where the process had to be stopped."""
    try:
        return process.wait(None if deadline is None else max(1.0, deadline - ENDING_SECONDS - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDING_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # loader processes and ranks that did not end with their launcher
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


def record_of(out: Path, step: Step) -> Path:
    """Where a step's seconds, exit code and command are noted."""
    return out / f"step-{step.name}.json"


def log_of(out: Path, step: Step) -> Path:
    """Where a step's output goes."""
    return out / f"step-{step.name}.log"


def read_record(out: Path, step: Step) -> dict[str, Any]:
    """What `run` noted of a step; empty before it ran."""
    return read_json(record_of(out, step), mend="delete it to run the step again.") or {}


def is_done(out: Path, step: Step) -> bool:
    """Whether a step ended by itself, well or with a failure that is a result."""
    return bool(read_record(out, step).get("done"))


def arguments(typed: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed. Raises UserError for a flag that is not known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.error = refuse
    parser.add_argument("--out", default="runs/gpu", metavar="DIR", help="results, logs and runs [runs/gpu]")
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="M", help="end before so many minutes are over; 0: no limit [9]"
    )
    found = parser.parse_args(typed)
    if found.minutes and found.minutes * 60 < LEAST_SECONDS + ENDING_SECONDS:
        refuse(f"--minutes {found.minutes:g} is too short for any step; use at least 3")
    return found


def refuse(message: str) -> NoReturn:
    """One sentence, as all commands refuse."""
    raise UserError(f"{message}; `python -m benchmarks.gpu --help` lists the flags.")


if __name__ == "__main__":
    run_entry(main)
