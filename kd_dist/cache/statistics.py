"""Label statistics: what soft labels are worth, and one screen of text about a whole cache.

Probabilities are softmax at temperature 1, in float64. The random views are all but view 0, the evaluation view. Mixed
views are counted but left out of the statistics: two labels are right for them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import shorten, wrap

import numpy as np

from kd_dist.cache.format import LOGITS, PIECE_BYTES, Header, TeacherRow, row_bytes
from kd_dist.cache.reader import Cache, LabelledTable, SoftLabels

BINS = 15
ONE_HOT = 0.99  # logits with a larger probability than this hold little more than a class
WARNING_SHARE = 0.5  # of such soft labels
WIDTH = 100
TEACHERS_SHOWN = 3


@dataclass(frozen=True)
class LabelStatistics:
    """Statistics of one split's soft labels: means over samples and random views (over view 0 where there are none)."""

    top1: float  # of view 0, in [0, 1]
    top1_drawn: float | None
    entropy: float  # in nats
    entropy_share: float  # fraction of log K, the maximum
    label_probability: float  # what the label's class gets
    max_probability: float
    calibration_error: float  # see calibration_error
    nll: float  # negative log-likelihood of the label, in nats
    near_one_hot: float  # fraction of soft labels with a probability above ONE_HOT
    spread: float | None  # standard deviation of a class's probability over a sample's views
    divergence: float | None  # KL(view's probabilities | mean over the sample's views), in nats

    @property
    def warning(self) -> str | None:
        """A sentence where most soft labels are nearly one-hot, else None."""
        if self.near_one_hot <= WARNING_SHARE:
            return None
        return (
            f"warning: {self.near_one_hot:.0%} of the soft labels assign more than {ONE_HOT} to one class (limit: "
            f"{WARNING_SHARE:.0%}), so they carry little more information than hard labels: raise --temperature, or "
            "label with an earlier checkpoint, a teacher trained with --mixup or --label-smoothing, or out-of-fold "
            "teachers."
        )


def statistics_of(
    logits_NVK: SoftLabels, labels_N: np.ndarray, views: Sequence[int] | None = None, temperature: float = 1.0
) -> LabelStatistics:
    """The statistics of a split's logits over T in these views (all), some samples at a time, so that a large cache
    needs no memory.

    The calibration error is Guo et al. 2017, equation 3: soft labels are binned by their largest probability into 15
    bins of equal width ((m - 1) / 15, m / 15]; the error is the mean over soft labels of the distance between their
    bin's accuracy and mean confidence.
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
    samples, several = len(labels_N), len(views) > 2
    return LabelStatistics(
        top1=float(sums["hits in view 0"]) / samples,
        top1_drawn=float(mean["hits"]) if len(views) > 1 else None,
        entropy=float(mean["entropy"]),
        entropy_share=float(mean["entropy"] / np.log(max(logits_NVK.shape[2], 2))),
        label_probability=float(mean["label"]),
        max_probability=float(mean["max"]),
        calibration_error=float(np.abs(mean["excess"]).sum()),
        nll=float(-mean["log label"]),
        near_one_hot=float(mean["near one-hot"]),
        spread=float(sums["spread"]) / samples if several else None,
        divergence=float(sums["divergence"]) / samples if several else None,
    )


def _excess(confidence_R: np.ndarray, hit_R: np.ndarray) -> np.ndarray:
    """Confidence minus hits, summed over the soft labels of each bin."""
    bin_R = np.clip(np.ceil(confidence_R * BINS).astype(int) - 1, 0, BINS - 1)
    return np.bincount(bin_R, weights=confidence_R - hit_R, minlength=BINS)


def _sums_of(logits_BVK: np.ndarray, labels_B: np.ndarray) -> dict[str, np.ndarray]:
    """What the statistics are means of, summed over the random views of some samples."""
    drawn_BVK = logits_BVK[:, 1:] if logits_BVK.shape[1] > 1 else logits_BVK
    shifted_BVK = drawn_BVK - drawn_BVK.max(axis=2, keepdims=True)
    log_p_BVK = shifted_BVK - np.log(np.exp(shifted_BVK).sum(axis=2, keepdims=True))
    p_BVK = np.exp(log_p_BVK)
    entropy_BV = -(p_BVK * log_p_BVK).sum(axis=2)
    log_label_BV = np.take_along_axis(log_p_BVK, labels_B[:, None, None], axis=2)[..., 0]
    max_BV = p_BVK.max(axis=2)
    hit_BV = log_p_BVK.argmax(axis=2) == labels_B[:, None]
    mean_BK = p_BVK.mean(axis=1)
    # The mean KL is the entropy of the mean minus the mean of the entropies (Lin 1991, equation 4.1).
    entropy_of_mean_B = -(mean_BK * np.log(np.maximum(mean_BK, np.finfo(float).tiny))).sum(axis=1)
    return {
        "rows": np.float64(hit_BV.size),
        "hits in view 0": (logits_BVK[:, 0].argmax(axis=1) == labels_B).sum(),
        "hits": hit_BV.sum(),
        "entropy": entropy_BV.sum(),
        "label": np.exp(log_label_BV).sum(),
        "max": max_BV.sum(),
        "excess": _excess(max_BV.ravel(), hit_BV.ravel()),
        "log label": log_label_BV.sum(),
        "near one-hot": (max_BV > ONE_HOT).sum(),
        "spread": p_BVK.std(axis=1).mean(axis=1).sum(),
        "divergence": (entropy_of_mean_B - entropy_BV.mean(axis=1)).sum(),
    }


def render_info(cache: Cache) -> str:
    """One screen about a cache: what it is, what it fits, and what its labels are worth."""
    at = cache.header.temperature or 1.0  # logits that hold at one temperature alone are described there
    found = [
        statistics_of(table.logits_NVK, table.labels_N, unmixed_views(table), at) for table in cache.splits.values()
    ]
    lines = [*_identity(cache), "", *_worth(list(cache.splits), found)]
    if found[0].warning:
        lines += ["", *wrap(found[0].warning, WIDTH)]
    return "\n".join(lines)


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
        ("storage", _describe_rows(header)),
        *(("teacher", _describe_teacher(row)) for row in shown[:TEACHERS_SHOWN]),
        ("views", _describe_views(header)),
        ("images", f"{header.renderer} at {header.image_size} px, {_describe_scale(header.mean, header.std)}"),
        ("written", f"{header.created} in {header.compute_dtype} by {header.software}"),
        *(("labels", text) for text in _describe_labels(cache)),
    ]
    if len(header.teachers) > TEACHERS_SHOWN:
        facts.insert(6 + TEACHERS_SHOWN, ("", f"further teachers: {len(header.teachers) - TEACHERS_SHOWN}"))
    return [_fact(name, text) for name, text in facts]


def _fact(name: str, text: str) -> str:
    keep_whole = name in ("cache", "sha256")  # to be copied from the screen
    return f"{name:<10}{text if keep_whole else shorten(text, WIDTH - 10, placeholder=' ...')}"


def _describe_split(split: LabelledTable) -> str:
    return f"{len(split):,} images x {split.views} views, fingerprint {split.fingerprint[:32]}..."


def _describe_views(header: Header) -> str:
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
        f"{kept:,} bytes per (image, view): the {header.top_k} largest of {len(header.classes)} logits, and the tail; "
        f"all logits would take {dense:,}"
    )


def _describe_teacher(row: TeacherRow) -> str:
    figures = f"val {row.val_top1:.1%}, sha256 {row.sha256[:12]}"
    if row.members:
        return f"{row.arch} (mean of teachers {row.members}), {figures}"
    if row.trained_on == "elsewhere":
        return f"{row.arch} trained elsewhere (may have seen val), {row.image_size} px, {figures}"
    return f"{row.arch} {row.trained_on}, seed {row.seed}, {row.image_size} px, {figures}"


def _describe_labels(cache: Cache) -> Iterator[str]:
    """Lines on what a soft label is where it is not one teacher's logits."""
    if cache.header.temperature is not None:
        t = f"{cache.header.temperature:g}"
        yield f"T * log of mean probabilities at T = {t}: for --temperature {t} only; the statistics are at T = {t} too"
    for name, split in cache.splits.items():
        if mixed := split.views - len(unmixed_views(split)):
            yield f"{mixed} of {split.views} views of {name} are mixup or CutMix, and not in the statistics below"
    if cache.is_out_of_fold:
        yield "out-of-fold: each train image by the teacher that was not trained on it, val by the mean of all teachers"


def _describe_scale(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    mean_text, std_text = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return f"mean {mean_text}, std {std_text}"


def _worth(names: list[str], found: list[LabelStatistics]) -> list[str]:
    rows = [
        ("top-1, evaluation view", [f"{each.top1:.2%}" for each in found]),
        ("top-1, random views", [_optional(each.top1_drawn, ".2%") for each in found]),
        ("probability of the label", [f"{each.label_probability:.3f}" for each in found]),
        ("largest probability", [f"{each.max_probability:.3f}" for each in found]),
        (f"soft labels above {ONE_HOT}", [f"{each.near_one_hot:.1%}" for each in found]),
        ("entropy, nats (fraction of maximum)", [f"{each.entropy:.3f} ({each.entropy_share:.0%})" for each in found]),
        ("negative log-likelihood, nats", [f"{each.nll:.3f}" for each in found]),
        (f"calibration error, {BINS} bins", [f"{each.calibration_error:.3f}" for each in found]),
        ("std over views, class probability", [_optional(each.spread, ".4f") for each in found]),
        ("KL(view || mean of views), nats", [_optional(each.divergence, ".4f") for each in found]),
    ]
    return [f"{name:<36}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in [("labels", names), *rows]]


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
