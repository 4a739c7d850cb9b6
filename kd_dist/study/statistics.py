"""Intervals and tests on the difference of two arms, and of two runs. Shares are in [0, 1]. Knows nothing of studies.

Three intervals answer three questions. `paired` and `welch` ask what other seeds would give on these val images;
`resampled` asks what other seeds would give on other images of the same kind. `over_images` and `mcnemar` know one run
of each side: they compare two networks, not the methods that made them.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
DRAWS = 4000
_SEED = 0
_INDICES_AT_ONCE = 1 << 22  # some 32 MB of drawn image numbers
_NO_SPREAD = 1e-12


@dataclass(frozen=True)
class Difference:
    """A difference of two means, its two-sided 95 % interval, the degrees of freedom of Student's t behind it, and the
    two-sided p value where it is reliable.
    """

    mean: float
    interval: tuple[float, float]
    freedom: float
    p: float | None = None


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample, S - 1 below) over S values; no deviation from one value."""

    mean: float
    deviation: float | None
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean by Student's t, None from fewer than two values."""
        return _interval(self.mean, self.deviation / self.count**0.5, self.count - 1) if self.deviation else None

    def text(self, digits: int, scale: float = 1.0) -> str:
        """Mean and standard deviation as text: "73.50 ± 0.39"."""
        values = (value for value in (self.mean, self.deviation) if value is not None)
        return " ± ".join(f"{scale * value:.{digits}f}" for value in values)


def spread(values_S: np.ndarray) -> Spread:
    """Mean and standard deviation of at least one value."""
    deviation = float(np.std(values_S, ddof=1)) if len(values_S) > 1 else None
    return Spread(float(np.mean(values_S)), deviation, len(values_S))


def _interval(mean: float, error: float, freedom: float) -> tuple[float, float]:
    low, high = stats.t.interval(LEVEL, freedom, mean, error)
    return float(low), float(high)


def paired(a_S: np.ndarray, b_S: np.ndarray) -> Difference | None:
    """mean(a - b) over seeds that both arms ran, by Student's paired t (Student 1908).

    Assumes that the differences are independent from seed to seed and about normal. Runs of one seed share first
    weights and the order of images; pairing removes the effect of these. The val images are taken as given. None from
    fewer than two seeds, and where all differences are equal.
    """
    if not _can_pair(a_S, b_S):
        return None
    return _difference(np.mean(a_S) - np.mean(b_S), stats.ttest_rel(a_S, b_S))


def upper_bound(a_S: np.ndarray, b_S: np.ndarray) -> float | None:
    """The one-sided 95 % bound of `paired`: at this confidence the true difference lies below it."""
    if not _can_pair(a_S, b_S):
        return None
    return float(stats.ttest_rel(a_S, b_S, alternative="less").confidence_interval(LEVEL).high)


def _can_pair(a_S: np.ndarray, b_S: np.ndarray) -> bool:
    return len(a_S) > 1 and np.ptp(np.subtract(a_S, b_S)) >= _NO_SPREAD


def welch(a_S: np.ndarray, b_R: np.ndarray) -> Difference | None:
    """mean(a) - mean(b) of S and R runs, by Welch's t (Welch 1947; degrees of freedom after Satterthwaite 1946).

    Assumes that all runs are independent and about normal within an arm; the arms may differ in spread and in seeds.
    The val images are taken as given. None where an arm has fewer than two runs, or neither spreads.
    """
    if min(len(a_S), len(b_R)) < 2 or max(np.ptp(a_S), np.ptp(b_R)) < _NO_SPREAD:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one arm without spread is fine
        return _difference(np.mean(a_S) - np.mean(b_R), stats.ttest_ind(a_S, b_R, equal_var=False))


def _difference(mean: float, test: Any) -> Difference:
    low, high = test.confidence_interval(LEVEL)
    return Difference(float(mean), (float(low), float(high)), float(test.df), float(test.pvalue))


def resampled(hit_a_SN: np.ndarray, hit_b_SN: np.ndarray, draws: int = DRAWS) -> Difference | None:
    """Difference in top-1 of two arms whose runs share S seeds, with both val images and seeds resampled.

    Row s holds, for one seed's run, whether each of the N val images was put in its class. Each of `draws` draws takes
    N of the N images with replacement, the same for all runs of both arms, and S - 1 of the S seeds with replacement,
    the same for both arms, and averages a - b over drawn seeds x drawn images. Images and seeds are drawn separately,
    the pigeonhole bootstrap (Owen 2007), whose variance is not below the true one when runs and images interact. S - 1
    seeds rather than S correct the mean of few seeds (Rao & Wu 1988). The draws' standard deviation is the standard
    error. The interval is Student's t with degrees of freedom after Satterthwaite 1946, S - 1 for the seeds' part of
    the variance and N - 1 for the rest, because few seeds estimate their own spread poorly: where images outweigh them
    it may be narrower than the paired one. Assumes that images and seeds are each drawn independently; from two seeds
    its coverage is below 95 % (docs/decisions/0012-study-statistics.md). The generator's seed is fixed.

    None from fewer than two seeds, or where nothing spreads. scipy's bootstrap resamples one factor, not two.
    """
    difference_SN = np.asarray(hit_a_SN, float) - np.asarray(hit_b_SN, float)
    seeds, images = difference_SN.shape
    if seeds < 2:
        return None
    variance = float(np.var(_drawn_means(difference_SN, draws), ddof=1))
    if variance < _NO_SPREAD**2:
        return None
    of_seeds = min(float(difference_SN.mean(axis=1).var(ddof=1)) / seeds, variance)
    of_images = variance - of_seeds
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_images**2 / max(images - 1, 1))
    mean = float(difference_SN.mean())
    return Difference(mean, _interval(mean, variance**0.5, freedom), freedom)


def _drawn_means(difference_SN: np.ndarray, draws: int) -> np.ndarray:
    """The mean of each draw of S - 1 seeds and N images: [draws]."""
    seeds = len(difference_SN)
    generator = np.random.default_rng(_SEED)
    by_image_RS = _image_draws(difference_SN, draws, generator)
    drawn_RD = generator.integers(seeds, size=(draws, max(seeds - 1, 1)))
    return np.take_along_axis(by_image_RS, drawn_RD, axis=1).mean(axis=1)


def _image_draws(values_SN: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """The mean of each row over N images drawn with replacement, the same images for all rows: [draws, S]."""
    images = values_SN.shape[1]
    at_once = max(1, _INDICES_AT_ONCE // images)
    parts = []
    for start in range(0, draws, at_once):
        rows = min(at_once, draws - start)
        drawn = generator.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        times_RN = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images)
        parts.append(times_RN @ values_SN.T / images)
    return np.concatenate(parts)


def over_images(hit_a_N: np.ndarray, hit_b_N: np.ndarray, draws: int = DRAWS) -> tuple[float, float, float]:
    """Difference in top-1 of two networks and its 95 % interval (difference, low, high), over images alone.

    The percentile bootstrap (Efron & Tibshirani 1993, section 13.3): each draw takes N of the N images with
    replacement, the same for both networks. Assumes that images are drawn independently; other seeds are not covered.
    """
    difference_N = np.asarray(hit_a_N, float) - np.asarray(hit_b_N, float)
    drawn_R = _image_draws(difference_N[None], draws, np.random.default_rng(_SEED))[:, 0]
    low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(difference_N.mean()), float(low), float(high)


def mcnemar(hit_a_N: np.ndarray, hit_b_N: np.ndarray) -> tuple[int, int, float]:
    """(images that a alone gets right, those that b alone gets right, p) of McNemar's exact test (1947).

    Under the null hypothesis an image that one network alone gets right falls to either side like a fair coin. Assumes
    independent images; p is two-sided, and 1 where there are no such images.
    """
    only_a, only_b = (int(np.sum(one & ~other)) for one, other in ((hit_a_N, hit_b_N), (hit_b_N, hit_a_N)))
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return only_a, only_b, float(p)


def holm(p_by_name: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for their number by Holm's step-down method (Holm 1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1, and is at least the one before it and at most 1. No independence
    is assumed. scipy has no Holm; statsmodels has, but would bring pandas along for these four lines.
    """
    corrected, floor = {}, 0.0
    for rank, name in enumerate(sorted(p_by_name, key=p_by_name.__getitem__)):
        corrected[name] = floor = max(floor, min(1.0, (len(p_by_name) - rank) * p_by_name[name]))
    return {name: corrected[name] for name in p_by_name}
