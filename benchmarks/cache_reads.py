"""What reading soft labels costs per sample, and how much memory it takes: one epoch of one process, without images.

    python -m benchmarks.cache_reads /tmp/logits.h5

Prints one line of JSON: microseconds per sample of an epoch's soft labels (median over epochs, least and most), of
drawing its views and fetching their boxes, seconds to open, and memory in MB: the peak before the cache was opened and
after the epochs, mapped pages included, and what the process shares with no file. Times are the processor's, not the
clock's, so that a busy machine measures the same.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from kd_dist.cache import open_cache
from kd_dist.training.batches import CachedCrops, EpochBatches, TrainData

EPOCHS = 5
SAMPLES = 50_000  # to be read at least: a small cache's epoch is over in no time


def measure(path: Path, batch_size: int = 256) -> dict[str, float]:
    """The figures of one cache, read in this process; its peak of memory is this process's, so use a fresh one."""
    before = peak_megabytes()
    started = time.process_time()
    train = open_cache(path).split("train")
    opened = time.process_time() - started
    crops = CachedCrops(train.box_NV4, train.flip_NV, seed=0)
    data = TrainData(None, train.labels_N, crops, 64, batch_size, seed=0, logits_NVK=train.logits_NVK)
    drawing, reading = [], []
    for epoch in range(max(EPOCHS, -(-SAMPLES // len(train)))):
        started = time.process_time()
        batches = EpochBatches(data, epoch, rank=0, world_size=1)
        drawn = time.process_time()
        for step in range(len(batches)):
            batches.soft_labels(step)
        drawing.append((drawn - started) / len(train) * 1e6)
        reading.append((time.process_time() - drawn) / len(train) * 1e6)
    return {
        "rows": len(train) * train.views,
        "images": len(train),
        "us_per_sample": round(statistics.median(reading), 4),
        "least": round(min(reading), 4),
        "most": round(max(reading), 4),
        "views_us_per_sample": round(statistics.median(drawing), 4),
        "open_s": round(opened, 3),
        "peak_mb_before": before,
        "peak_mb": peak_megabytes(),
        "private_mb": private_megabytes(),
    }


def peak_megabytes() -> float:
    """The most memory this process ever had resident, in MB of 10^6 bytes."""
    status = Path("/proc/self/status").read_text().split()
    return round(int(status[status.index("VmHWM:") + 1]) * 1024 / 1e6, 1)


def private_megabytes() -> float:
    """The memory of this process that it shares with no file, in MB of 10^6 bytes."""
    status = Path("/proc/self/status").read_text().split()
    return round(int(status[status.index("RssAnon:") + 1]) * 1024 / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache_reads", description=__doc__)
    parser.add_argument("path", type=Path)
    print(json.dumps(measure(parser.parse_args().path)))


if __name__ == "__main__":
    main()
