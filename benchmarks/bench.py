"""`make bench`: the rows that were asked for, as a table, bench.json and bench.png.

python -m benchmarks.bench --rows 1 3 --data data/imagewoof2-160
"""

import argparse
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import (
    cache_reading,
    cache_writing,
    gpu_rows,
    input_rows,
    peers,
    rank_rows,
    report,
    setting,
    student_rows,
    whole_job,
)
from benchmarks.measure import Row
from benchmarks.setting import Bench
from kd_dist.dist.endings import run_entry
from kd_dist.dist.runtime import joined
from kd_dist.errors import UserError
from kd_dist.job import open_data
from kd_dist.version import software

ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "1": student_rows.distillation,
    "2": student_rows.teacher_in_the_loop,
    "3": input_rows.loaders,
    "4": student_rows.feeding,
    "5": cache_writing.writing,
    "6": rank_rows.scaling,
    "7": cache_reading.reading,
    "8": whole_job.against_torchdistill,
    "9": student_rows.monitoring,
    "gpu": gpu_rows.rates,
    "job": whole_job.phases,
}
"""Measurements by the name that --rows takes; each gives one row of the table or several."""


def main() -> None:
    typed = arguments()
    folder = Path(typed.out)
    threads = typed.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    about = machine(threads)
    with joined(typed.device) as runtime:
        source = setting.source_of(typed.data, typed.archive, folder)
        bench = Bench(open_data(source, runtime), runtime, folder / "work", threads, typed.quick)
        bench.folder.mkdir(parents=True, exist_ok=True)
        about |= described(bench)
        failed = measure(bench, typed.rows, folder, about)
    if failed:
        raise UserError(f"rows {', '.join(failed)} failed, their tracebacks stand above; {folder} holds the others.")


def measure(bench: Bench, names: Sequence[str], folder: Path, about: dict[str, Any]) -> list[str]:
    """Measure the rows, writing down each as it comes, and print the table; gives the names of those that failed."""
    rows: list[Row] = []
    failed = []
    for name in names:
        started = time.monotonic()
        try:
            for row in ROWS[name](bench):
                rows.append(row)
                report.write(folder, rows, about)
        except Exception:  # an hour's other figures are not lost over it
            traceback.print_exc()
            failed.append(name)
        about.setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
        print(f"{time.strftime('%H:%M:%S')} row {name}: {about['seconds'][name]:.0f} s", flush=True)
    report.write(folder, rows, about)
    print(f"\n{report.table(rows)}\n\n{folder / 'bench.json'}, bench.txt, bench.png")
    return failed


def arguments(typed: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed. Raises UserError for a flag or a row that is not known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.splitlines()[0])
    parser.error = refuse
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"{', '.join(ROWS)}")
    parser.add_argument("--data", metavar="DIR", help="folder with train/ and val/ [$KD_DIST_DATA]")
    parser.add_argument("--archive", metavar="FILE", help="unpack this archive instead [$KD_DIST_IMAGEWOOF]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[auto: a GPU]")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads on a CPU [all cores of this process]")
    parser.add_argument("--out", default="runs/bench", metavar="DIR", help="results and scratch files [runs/bench]")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: whether it runs, not how fast")
    found = parser.parse_args(typed)
    if found.threads is not None and found.threads < 1:
        refuse(f"--threads {found.threads} must be at least 1")
    return found


def refuse(message: str) -> NoReturn:
    """One sentence, as all our commands refuse."""
    raise UserError(f"{message}; `python -m benchmarks.bench --help` lists the flags.")


def machine(threads: int) -> dict[str, Any]:
    """Where and with what this was measured; the load is the one before anything of ours ran."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load_average": os.getloadavg(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": gpu,
        "gpus": torch.cuda.device_count(),
        "system": platform.platform(),
        "software": software(),
        "peers": {package: peers.version_of(package) for package in ("ffcv", "torchdistill")},
    }


def cpu_name() -> str:
    """The processor's name as Linux reports it, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def described(bench: Bench) -> dict[str, Any]:
    """What was measured on."""
    samples = bench.data.samples
    return {
        "data": {"name": samples.name, "train": len(samples.train), "val": len(samples.val)},
        "device": bench.runtime.device.type,
        "quick": bench.quick,
        "student": bench.student.stored(),
        "teacher": bench.teacher.stored(),
    }


if __name__ == "__main__":
    run_entry(main)
