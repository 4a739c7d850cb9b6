"""Label statistics: what soft labels are worth, and one screen of text about a whole cache.

Probabilities are softmax at temperature 1, in float64. The drawn views are all but view 0, the evaluation view. Mixed
views are counted but left out of the statistics: two labels are right for them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten, wrap

import numpy as np

from kd_dist.cache.format import LOGITS, PIECE_BYTES, Header, TeacherRow, hit_rows, pieces_of, row_bytes
from kd_dist.cache.reader import Cache, LabelledTable, SoftLabels
from kd_dist.fingerprint import UNKNOWN

BINS = 15
ONE_HOT = 0.99  # logits with a larger probability than this hold little more than a class
WARNING_SHARE = 0.5  # of such rows
WIDTH = 100
TEACHERS_SHOWN = 3


@dataclass(frozen=True)
class LabelStatistics:
    """Statistics of one split's soft labels: means over samples and drawn views (over view 0 where none was drawn).

    What compares with the label (top-1, its probability, calibration, likelihood) is over the images that have one.
    """

    top1: float  # of view 0, in [0, 1]
    top1_drawn: float | None
    entropy: float  # in nats
    entropy_share: float  # of log K, the entropy of an even guess
    label_probability: float  # what the label's class gets
    max_probability: float
    calibration_error: float  # see calibration_error
    nll: float  # negative log-likelihood of the label, in nats
    near_one_hot: float  # share of rows with a probability above ONE_HOT
    spread: float | None  # standard deviation of a class's probability over a sample's views
    divergence: float | None  # KL(view's probabilities | mean over the sample's views), in nats

    @property
    def warning(self) -> str | None:
        """A sentence where most rows are nearly one-hot, else None."""
        if self.near_one_hot <= WARNING_SHARE:
            return None
        return (
            f"warning: {self.near_one_hot:.0%} of the rows give one class more than {ONE_HOT} (the limit is "
            f"{WARNING_SHARE:.0%} of rows), so they say little more than hard labels: raise --temperature, or label "
            "with an earlier checkpoint, a teacher trained with --mixup or --label-smoothing, or out-of-fold teachers."
        )


def statistics_of(
    logits_NVK: SoftLabels, labels_N: np.ndarray, views: Sequence[int] | None = None, temperature: float = 1.0
) -> LabelStatistics:
    """The statistics of a split's logits over T in these views (all), some samples at a time, so that a large cache
    needs no memory.

    The calibration error is Guo et al. 2017, equation 3: rows are binned by their largest probability into 15 bins of
    equal width ((m - 1) / 15, m / 15]; it is the mean over rows of the distance between their bin's accuracy and mean
    confidence.
    """
    _, all_views, classes = logits_NVK.shape
    views = range(all_views) if views is None else views
    samples_at_once = max(1, PIECE_BYTES // (8 * all_views * classes))
    sums: dict[str, np.ndarray] = {}
    for start in range(0, len(labels_N), samples_at_once):
        piece = slice(start, start + samples_at_once)
        logits_BVK = logits_NVK[piece][:, list(views)].astype(np.float64) / temperature
        for name, value in _sums_of(logits_BVK, labels_N[piece]).items():
            sums[name] = sums.get(name, 0) + value
    mean = {name: value / sums["rows"] for name, value in sums.items()}
    of_label = {name: value / sums["labelled rows"] for name, value in sums.items()}
    samples, several = len(labels_N), len(views) > 2
    return LabelStatistics(
        top1=float(sums["hits in view 0"]) / int((labels_N != UNKNOWN).sum()),
        top1_drawn=float(of_label["hits"]) if len(views) > 1 else None,
        entropy=float(mean["entropy"]),
        entropy_share=float(mean["entropy"] / np.log(max(logits_NVK.shape[2], 2))),
        label_probability=float(of_label["label"]),
        max_probability=float(mean["max"]),
        calibration_error=float(np.abs(of_label["excess"]).sum()),
        nll=float(-of_label["log label"]),
        near_one_hot=float(mean["near one-hot"]),
        spread=float(sums["spread"]) / samples if several else None,
        divergence=float(sums["divergence"]) / samples if several else None,
    )


def _excess(confidence_R: np.ndarray, hit_R: np.ndarray) -> np.ndarray:
    """Confidence less hits, summed over the rows of each bin."""
    bin_R = np.clip(np.ceil(confidence_R * BINS).astype(int) - 1, 0, BINS - 1)
    return np.bincount(bin_R, weights=confidence_R - hit_R, minlength=BINS)


def _sums_of(logits_BVK: np.ndarray, labels_B: np.ndarray) -> dict[str, np.ndarray]:
    """What the statistics are means of, summed over the drawn rows of some samples."""
    drawn_BVK = logits_BVK[:, 1:] if logits_BVK.shape[1] > 1 else logits_BVK
    shifted_BVK = drawn_BVK - drawn_BVK.max(axis=2, keepdims=True)
    log_p_BVK = shifted_BVK - np.log(np.exp(shifted_BVK).sum(axis=2, keepdims=True))
    p_BVK = np.exp(log_p_BVK)
    entropy_BV = -(p_BVK * log_p_BVK).sum(axis=2)
    max_BV = p_BVK.max(axis=2)
    known_B = labels_B != UNKNOWN
    log_label_RV = np.take_along_axis(log_p_BVK[known_B], labels_B[known_B, None, None], axis=2)[..., 0]
    hit_RV = log_p_BVK[known_B].argmax(axis=2) == labels_B[known_B, None]
    mean_BK = p_BVK.mean(axis=1)
    # The mean KL is the entropy of the mean less the mean of the entropies (Lin 1991, equation 4.1).
    entropy_of_mean_B = -(mean_BK * np.log(np.maximum(mean_BK, np.finfo(float).tiny))).sum(axis=1)
    return {
        "rows": np.float64(max_BV.size),
        "labelled rows": np.float64(hit_RV.size),
        "hits in view 0": (logits_BVK[:, 0].argmax(axis=1) == labels_B).sum(),
        "hits": hit_RV.sum(),
        "entropy": entropy_BV.sum(),
        "label": np.exp(log_label_RV).sum(),
        "max": max_BV.sum(),
        "excess": _excess(max_BV[known_B].ravel(), hit_RV.ravel()),
        "log label": log_label_RV.sum(),
        "near one-hot": (max_BV > ONE_HOT).sum(),
        "spread": p_BVK.std(axis=1).mean(axis=1).sum(),
        "divergence": (entropy_of_mean_B - entropy_BV.mean(axis=1)).sum(),
    }


def render_info(cache: Cache) -> str:
    """One screen about a cache: what it is, what it fits, and what its labels are worth."""
    found = label_statistics(cache)
    table = [f"{name:<34}" + "".join(f"{cell:>16}" for cell in cells) for name, *cells in rows_of(found)]
    lines = [*_identity(cache), "", *table]
    if warning := found["train"].warning:
        lines += ["", *wrap(warning, WIDTH)]
    return "\n".join(lines)


def label_statistics(cache: Cache) -> dict[str, LabelStatistics]:
    """The statistics of each split; of logits that hold at one temperature alone, at that one."""
    at = cache.header.temperature or 1.0
    return {
        name: statistics_of(table.logits_NVK, table.labels_N, unmixed_views(table), at)
        for name, table in cache.splits.items()
    }


def top1_by_class(cache: Cache, split: str) -> tuple[np.ndarray, np.ndarray]:
    """How many images of each class there are in a split, and of how many view 0 has the class on top: int64 [K]."""
    table, classes = cache.split(split), len(cache.classes)
    images_K, hits_K = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for start, rows in pieces_of(table.logit_columns[0]):
        labels_B = table.labels_N[start : start + len(rows)]
        images_K += np.bincount(labels_B[labels_B >= 0], minlength=classes)
        hits_K += np.bincount(labels_B[hit_rows(rows[:, 0], labels_B, cache.header)], minlength=classes)
    return images_K, hits_K


def unmixed_views(split: LabelledTable) -> list[int]:
    """The views in which no image is mixed; view 0 is one."""
    mixed = set() if split.mixed is None else set(split.mixed.mixed_views())
    return [view for view in range(split.views) if view not in mixed]


def _identity(cache: Cache) -> list[str]:
    header = cache.header
    shown = sorted(header.teachers, key=lambda row: not row.members)  # means first
    facts = [
        ("cache", f"{cache.path} ({cache.path.stat().st_size:,} bytes)"),
        ("sha256", cache.digest),
        ("data", f"{header.dataset}, {len(header.classes)} classes: {', '.join(header.classes)}"),
        *((name, _describe_split(split)) for name, split in cache.splits.items()),
        ("rows", _describe_rows(header)),
        *(("teacher", describe_teacher(row)) for row in shown[:TEACHERS_SHOWN]),
        ("views", describe_views(header)),
        ("images", f"{header.renderer} at {header.image_size} px, {describe_scale(header.mean, header.std)}"),
        ("written", f"{header.created} in {header.compute_dtype} by {header.software}"),
        *(("labels", text) for text in describe_labels(cache)),
    ]
    if len(header.teachers) > TEACHERS_SHOWN:
        facts.insert(6 + TEACHERS_SHOWN, ("", f"and {len(header.teachers) - TEACHERS_SHOWN} more teachers"))
    return [_fact(name, text) for name, text in facts]


def _fact(name: str, text: str) -> str:
    keep_whole = name in ("cache", "sha256")  # to be copied from the screen
    return f"{name:<10}{text if keep_whole else shorten(text, WIDTH - 10, placeholder=' ...')}"


def _describe_split(split: LabelledTable) -> str:
    unlabelled = int((split.labels_N == UNKNOWN).sum())
    note = f" ({unlabelled:,} without a label)" if unlabelled else ""
    return f"{len(split):,} images{note} x {split.views} views, fingerprint {split.fingerprint[:32]}..."


def describe_views(header: Header) -> str:
    """How the views were drawn, in one line."""
    low, high = header.crop_scale
    mixed = f", {header.mixed_share:.0%} mixed" if header.mixed_share else ""
    return f"{header.view_rule}, area {low:g} to {high:g}{mixed}, seed {header.seed}; view 0 is the evaluation view"


def _describe_rows(header: Header) -> str:
    """What an image in one view takes, and what that is of."""
    dense = len(header.classes) * LOGITS.dtype.itemsize
    if not header.top_k:
        return f"{dense:,} bytes of logits per (image, view): all {len(header.classes)} of them in float16"
    kept = sum(row_bytes(column, header) for column in header.logit_columns)
    return (
        f"{kept:,} bytes per (image, view): the {header.top_k} largest logits of {len(header.classes)} and the tail's "
        f"mass; dense {dense:,}"
    )


def describe_teacher(row: TeacherRow) -> str:
    """A teacher in one line: network, what it was trained on, val top-1, start of its digest."""
    figures = f"val {row.val_top1:.1%}, sha256 {row.sha256[:12]}"
    if row.members:
        return f"{row.arch} (rows {row.members} of the teachers), {figures}"
    if row.trained_on == "elsewhere":
        return f"{row.arch} trained elsewhere (may have seen val), {row.image_size} px, {figures}"
    return f"{row.arch} {row.trained_on}, seed {row.seed}, {row.image_size} px, {figures}"


def describe_labels(cache: Cache) -> Iterator[str]:
    """Lines on what a row is where it is not one teacher's logits."""
    if cache.header.temperature is not None:
        t = f"{cache.header.temperature:g}"
        yield f"T * log of mean probabilities at T = {t}: for --temperature {t} alone, as are the statistics below"
    for name, split in cache.splits.items():
        if mixed := split.views - len(unmixed_views(split)):
            yield f"{mixed} of {split.views} views of {name} are mixup or CutMix, and not in the statistics below"
    if cache.is_out_of_fold:
        yield "out-of-fold: each train image by the one teacher that was not trained on it, val by the mean of all"


def describe_scale(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Mean and deviation by colour, in one line."""
    mean_text, std_text = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return f"mean {mean_text}, std {std_text}"


def rows_of(found: Mapping[str, LabelStatistics]) -> list[tuple[str, ...]]:
    """The statistics of splits as a table: a row of headings, then a row for each statistic."""
    each = list(found.values())
    rows: list[tuple[str, Callable[[LabelStatistics], str]]] = [
        ("top-1, evaluation view", lambda of: f"{of.top1:.2%}"),
        ("top-1, drawn views", lambda of: _optional(of.top1_drawn, ".2%")),
        ("probability of the label", lambda of: f"{of.label_probability:.3f}"),
        ("largest probability", lambda of: f"{of.max_probability:.3f}"),
        (f"rows above {ONE_HOT}", lambda of: f"{of.near_one_hot:.1%}"),
        ("entropy, nats (of an even guess)", lambda of: f"{of.entropy:.3f} ({of.entropy_share:.0%})"),
        ("negative log-likelihood, nats", lambda of: f"{of.nll:.3f}"),
        (f"calibration error, {BINS} bins", lambda of: f"{of.calibration_error:.3f}"),
        ("spread over views, probability", lambda of: _optional(of.spread, ".4f")),
        ("a view from the mean, KL in nats", lambda of: _optional(of.divergence, ".4f")),
    ]
    return [("labels", *found), *((name, *map(shown, each)) for name, shown in rows)]


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
