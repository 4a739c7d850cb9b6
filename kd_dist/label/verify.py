"""Whether a cache holds what its teachers give: some of its logits computed again."""

import numpy as np

from kd_dist.cache import Cache, TopK
from kd_dist.dist.runtime import Runtime
from kd_dist.inference import FORWARD_BATCH
from kd_dist.label.labeller import Labeller


def why_not_computed(cache: Cache, labeller: Labeller) -> str | None:
    """Why no logits of a cache can be computed by these teachers, in words; None where some can."""
    header = cache.header
    if header.temperature is not None:
        return (
            f"the logits are means of probabilities at temperature {header.temperature:g}, which cannot be recomputed "
            "from single teachers: verify the caches from which it was combined"
        )
    of_header = (header.image_size, header.mean, header.std)
    alike = all((teacher.row.image_size, teacher.mean, teacher.std) == of_header for teacher in labeller.teachers)
    if cache.is_combined and not (alike and " and " not in header.compute_dtype):
        return "the teachers differ in image size, normalisation or precision: verify the caches that were combined"
    if not any(len(labeller.known_samples(table)) for table in cache.splits.values()):
        return "each soft label is a mean of several teachers: pass the model.pt of all of them"
    return None


def largest_difference(cache: Cache, labeller: Labeller, rows: int, runtime: Runtime) -> tuple[float, int]:
    """Compute about `rows` rows again, drawn in whole forward batches over splits and views: the largest |new - stored|
    / max(1, |stored|), and how many rows were compared. Rows of teachers that are not at hand are passed over.
    """
    known_N = {split: labeller.known_samples(table) for split, table in cache.splits.items()}
    batches = [
        (split, view, start)
        for split, table in cache.splits.items()
        for view in range(table.views)
        for start in range(0, len(known_N[split]), FORWARD_BATCH)
    ]
    drawn = np.random.default_rng(0).permutation(len(batches))[: max(1, round(rows / FORWARD_BATCH))]
    differences = []
    for split, view, start in (batches[drawn[i]] for i in runtime.shard(len(drawn))):
        index_B = known_N[split][start : start + FORWARD_BATCH]
        differences.append((_difference(cache, labeller, split, view, index_B), len(index_B)))
    everyone = [pair for mine in runtime.gather(differences) for pair in mine]
    return float(np.max([worst for worst, _ in everyone])), sum(count for _, count in everyone)


def _difference(cache: Cache, labeller: Labeller, split: str, view: int, index_B: np.ndarray) -> float:
    table = cache.split(split)
    new_BK = labeller.logits(split, table, index_B, view)
    if isinstance(table.logits_NVK, TopK):
        stored_BK, new_BK = table.logits_NVK.compared(new_BK, index_B, view)
    else:
        stored_BK = table.logits_NVK[index_B, view].astype(np.float32)
    return float((np.abs(new_BK - stored_BK) / np.maximum(1, np.abs(stored_BK))).max())
