"""The cost of a cache, and after how many students it pays: wall seconds as the jobs themselves noted them.

Compared with a teacher in the loop, writing the cache is the cost, because the teacher is trained either way. Compared
with hard labels, the teacher's training counts too, and top-1 is what it buys.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_dist.run.folder import RunFolder
from kd_dist.run.metrics import CACHE_SECONDS, read_costs, read_metrics
from kd_dist.tables import counted

Cost = Mapping[str, float | int | None]
"""`training_s` of the teacher, `writing_s` of the cache, and its `bytes`; None where unknown."""


def run_seconds(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Wall seconds of a run: its epochs, each as long as the median one, so that a paused machine costs nothing."""
    known = [line["epoch_s"] for line in metrics if line.get("epoch_s") is not None]
    return len(metrics) * statistics.median(known) if known else None


def cost_of(cache: Path | None) -> Cost:
    """The costs that the teacher job in the cache's folder noted, where the cache is its own."""
    size = cache.stat().st_size if cache and cache.exists() else None
    folder = RunFolder(cache.parent) if cache else None
    if cache is None or folder is None or cache.name != folder.cache.name or not folder.costs.exists():
        return {"training_s": None, "writing_s": None, "bytes": size}
    training_s = run_seconds(read_metrics(folder))
    return {"training_s": training_s, "writing_s": read_costs(folder).get(CACHE_SECONDS), "bytes": size}


def sentences(cost: Cost, distilled_s: float | None, online_s: float | None) -> list[str]:
    """The cost of the cache, and after how many students it pays; seconds are of one student, None where unknown."""
    size = "an unknown size" if cost["bytes"] is None else f"{cost['bytes']:,} bytes"
    found = [
        f"Writing the cache took {duration(cost['writing_s'])}, training its teacher {duration(cost['training_s'])}; "
        f"the cache has {size}; a distilled student takes {duration(distilled_s)}. Wall time of the jobs as they ran."
    ]
    writing_s = cost["writing_s"]
    if writing_s is not None and distilled_s is not None and online_s is not None:
        saved_s = online_s - distilled_s
        students = math.ceil(writing_s / saved_s) if saved_s > 0 else None
        pays = f"pays after {counted(students, 'student')}" if students else "never pays"
        found.append(f"With the teacher in the loop a student takes {duration(online_s)}: the cache {pays}.")
    return found


def duration(seconds: float | None) -> str:
    """Seconds in the usual units: 4.2 s, 12 min, 3 h 05 min."""
    if seconds is None:
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
