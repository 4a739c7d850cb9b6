"""What soft labels are worth: figures of a split's logits, and one screen of text about a whole cache.

Probabilities are softmax at temperature 1, in float64. The drawn views are all but view 0, the evaluation view.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import shorten, wrap

import numpy as np

from kd_dist.cache.format import TeacherRow, top1_of
from kd_dist.cache.reader import Cache, LabelledTable

BINS = 15
ONE_HOT = 0.99  # a row with a larger probability than this says little more than a class
WARNING_SHARE = 0.5  # of such rows
WIDTH = 100
TEACHERS_SHOWN = 3


@dataclass(frozen=True)
class LabelCard:
    """Figures of one split: means over samples and drawn views (over view 0 where none was drawn)."""

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


def card_of(logits_NVK: np.ndarray, labels_N: np.ndarray) -> LabelCard:
    """The figures of a split's raw logits; view by view, so that memory stays at a few arrays [N, K]."""
    views = logits_NVK.shape[1]
    drawn_NVK = logits_NVK[:, 1:] if views > 1 else logits_NVK
    rows = (_figures_of_rows(log_p_NK, labels_N) for log_p_NK in _log_probabilities(drawn_NVK))
    entropy_NV, max_NV, log_label_NV, hit_NV = (np.stack(figure, axis=1) for figure in zip(*rows, strict=True))
    several = views > 2
    return LabelCard(
        top1=top1_of(logits_NVK[:, 0], labels_N),
        top1_drawn=float(hit_NV.mean()) if views > 1 else None,
        entropy=float(entropy_NV.mean()),
        entropy_share=float(entropy_NV.mean() / np.log(max(logits_NVK.shape[2], 2))),
        label_probability=float(np.exp(log_label_NV).mean()),
        max_probability=float(max_NV.mean()),
        calibration_error=calibration_error(max_NV.ravel(), hit_NV.ravel()),
        nll=float(-log_label_NV.mean()),
        near_one_hot=float((max_NV > ONE_HOT).mean()),
        spread=_spread(drawn_NVK) if several else None,
        divergence=_divergence(drawn_NVK, entropy_NV) if several else None,
    )


def calibration_error(confidence_R: np.ndarray, hit_R: np.ndarray) -> float:
    """Expected calibration error over R rows, Guo et al. 2017, equation 3.

    Rows are binned by their largest probability into 15 bins of equal width ((m - 1) / 15, m / 15]; the error is the
    mean over rows of the distance between their bin's accuracy and mean confidence.
    """
    bin_R = np.clip(np.ceil(confidence_R * BINS).astype(int) - 1, 0, BINS - 1)
    excess_M = np.bincount(bin_R, weights=confidence_R - hit_R, minlength=BINS)
    return float(np.abs(excess_M).sum() / len(confidence_R))


def _log_probabilities(logits_NVK: np.ndarray) -> Iterator[np.ndarray]:
    """log softmax of one view after the other, float64 [N, K]."""
    for logits_NK in np.moveaxis(logits_NVK, 1, 0):
        shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
        yield shifted_NK - np.log(np.exp(shifted_NK).sum(axis=1, keepdims=True))


def _figures_of_rows(log_p_NK: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each row's entropy, largest probability, log-probability of the label, and whether the label's is the largest."""
    entropy_N = -(np.exp(log_p_NK) * log_p_NK).sum(axis=1)
    log_label_N = np.take_along_axis(log_p_NK, labels_N[:, None], axis=1)[:, 0]
    return entropy_N, np.exp(log_p_NK.max(axis=1)), log_label_N, log_p_NK.argmax(axis=1) == labels_N


def _mean_probabilities(logits_NVK: np.ndarray) -> np.ndarray:
    return sum(np.exp(log_p_NK) for log_p_NK in _log_probabilities(logits_NVK)) / logits_NVK.shape[1]


def _spread(logits_NVK: np.ndarray) -> float:
    mean_NK = _mean_probabilities(logits_NVK)
    squares = ((np.exp(log_p_NK) - mean_NK) ** 2 for log_p_NK in _log_probabilities(logits_NVK))
    return float(np.sqrt(sum(squares) / logits_NVK.shape[1]).mean())


def _divergence(logits_NVK: np.ndarray, entropy_NV: np.ndarray) -> float:
    """The mean KL is the entropy of the mean less the mean of the entropies (Lin 1991, equation 4.1)."""
    mean_NK = _mean_probabilities(logits_NVK)
    entropy_of_mean_N = -(mean_NK * np.log(np.maximum(mean_NK, np.finfo(float).tiny))).sum(axis=1)
    return float((entropy_of_mean_N - entropy_NV.mean(axis=1)).mean())


def render_info(cache: Cache) -> str:
    """One screen about a cache: what it is, what it fits, and what its labels are worth."""
    cards = [card_of(_logits_at_1(cache, split), split.labels_N) for split in cache.splits.values()]
    lines = [*_identity(cache), "", *_worth(list(cache.splits), cards)]
    if cards[0].warning:
        lines += ["", *wrap(cards[0].warning, WIDTH)]
    return "\n".join(lines)


def _logits_at_1(cache: Cache, split: LabelledTable) -> np.ndarray:
    """A split's rows; those that hold at one temperature alone, divided by it: the figures are of what holds there."""
    temperature = cache.header.temperature
    return split.logits_NVK if temperature is None else split.logits_NVK / np.float16(temperature)


def _identity(cache: Cache) -> list[str]:
    header = cache.header
    shown = sorted(header.teachers, key=lambda row: not row.members)  # means first
    facts = [
        ("cache", f"{cache.path} ({cache.path.stat().st_size:,} bytes)"),
        ("sha256", cache.digest),
        ("data", f"{header.dataset}, {len(header.classes)} classes: {', '.join(header.classes)}"),
        *((name, _describe_split(split)) for name, split in cache.splits.items()),
        *(("teacher", _describe_teacher(row)) for row in shown[:TEACHERS_SHOWN]),
        ("views", f"{header.view_sampler}, seed {header.seed}; view 0 is the evaluation view"),
        ("pictures", f"{header.renderer} at {header.image_size} px, {_describe_scale(header.mean, header.std)}"),
        ("written", f"{header.created} in {header.compute_dtype} by {header.software}"),
        *(("labels", text) for text in _describe_labels(cache)),
    ]
    if len(header.teachers) > TEACHERS_SHOWN:
        facts.insert(5 + TEACHERS_SHOWN, ("", f"and {len(header.teachers) - TEACHERS_SHOWN} more teachers"))
    return [_fact(name, text) for name, text in facts]


def _fact(name: str, text: str) -> str:
    keep_whole = name in ("cache", "sha256")  # to be copied from the screen
    return f"{name:<10}{text if keep_whole else shorten(text, WIDTH - 10, placeholder=' ...')}"


def _describe_split(split: LabelledTable) -> str:
    return f"{len(split):,} images x {split.views} views, fingerprint {split.fingerprint[:32]}..."


def _describe_teacher(row: TeacherRow) -> str:
    figures = f"val top-1 {row.val_top1:.2%}, sha256 {row.sha256[:12]}..."
    if row.members:
        return f"{row.arch} (rows {row.members} of the teachers), {figures}"
    return f"{row.arch} {row.trained_on}, seed {row.seed}, {row.image_size} px, {figures}"


def _describe_labels(cache: Cache) -> Iterator[str]:
    """Lines on what a row is where it is not one teacher's logits."""
    if cache.header.temperature is not None:
        t = f"{cache.header.temperature:g}"
        yield f"T * log of mean probabilities at T = {t}: of use at --temperature {t} alone, as are the figures below"
    if cache.is_out_of_fold:
        yield "out-of-fold: each train image by the one teacher that never saw it, val by the mean of all"


def _describe_scale(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    mean_text, std_text = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return f"mean {mean_text}, std {std_text}"


def _worth(names: list[str], cards: list[LabelCard]) -> list[str]:
    rows = [
        ("top-1, evaluation view", [f"{card.top1:.2%}" for card in cards]),
        ("top-1, drawn views", [_optional(card.top1_drawn, ".2%") for card in cards]),
        ("probability of the label", [f"{card.label_probability:.3f}" for card in cards]),
        ("largest probability", [f"{card.max_probability:.3f}" for card in cards]),
        (f"rows above {ONE_HOT}", [f"{card.near_one_hot:.1%}" for card in cards]),
        ("entropy, nats (of an even guess)", [f"{card.entropy:.3f} ({card.entropy_share:.0%})" for card in cards]),
        ("negative log-likelihood, nats", [f"{card.nll:.3f}" for card in cards]),
        (f"calibration error, {BINS} bins", [f"{card.calibration_error:.3f}" for card in cards]),
        ("spread over views, probability", [_optional(card.spread, ".4f") for card in cards]),
        ("a view from the mean, KL in nats", [_optional(card.divergence, ".4f") for card in cards]),
    ]
    return [f"{name:<34}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in [("labels", names), *rows]]


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
