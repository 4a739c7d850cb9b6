"""How sure we are: intervals and tests on the difference of two arms, and of two runs. Shares are in [0, 1].

Three intervals answer three questions. `paired` and `welch` ask what other seeds would give on these very val images;
`resampled` asks what other seeds would give on other images of the same kind, and is the one that speaks about new
pictures. `over_images` and `mcnemar` know one run of each side: what they say holds for these two networks, not for the
methods that made them. scipy is imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 4000
_SEED = 0
_INDICES_AT_ONCE = 1 << 22  # some 32 MB of drawn image numbers
_NO_SPREAD = 1e-12


@dataclass(frozen=True)
class Difference:
    """A difference of two means, its standard error, and the degrees of freedom of Student's t that go with it."""

    mean: float
    error: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the two-sided 95 % interval."""
        reach = self._quantile((1 + LEVEL) / 2) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def upper_bound(self) -> float:
        """The one-sided 95 % bound: the true difference lies below it, at this confidence."""
        return self.mean + self._quantile(LEVEL) * self.error

    @property
    def p(self) -> float:
        """Two-sided: how often so large a difference would come about if there were none."""
        from scipy.special import stdtr

        return float(2 * stdtr(self.freedom, -abs(self.mean) / self.error))

    def _quantile(self, share: float) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(self.freedom, share))


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample, S - 1 below) over S values; no deviation from one value."""

    mean: float
    deviation: float | None
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean by Student's t, None from fewer than two values."""
        if not self.deviation:
            return None
        return Difference(self.mean, self.deviation / math.sqrt(self.count), self.count - 1).interval


def spread(values_S: np.ndarray) -> Spread:
    """Mean and standard deviation of at least one value."""
    values_S = np.asarray(values_S, float)
    deviation = float(values_S.std(ddof=1)) if len(values_S) > 1 else None
    return Spread(float(values_S.mean()), deviation, len(values_S))


def paired(a_S: np.ndarray, b_S: np.ndarray) -> Difference | None:
    """mean(a - b) over seeds that both arms ran, by Student's paired t (Student 1908).

    Assumes that the differences of one seed's two runs are independent from seed to seed and about normal. Runs of one
    seed share weights at the start and order of images, and pairing takes out what these do to both. The val images
    are taken as given. None from fewer than two seeds, and where all differences are equal: nothing to tell by.
    """
    return _of_mean(np.asarray(a_S, float) - np.asarray(b_S, float))


def _of_mean(difference_S: np.ndarray) -> Difference | None:
    count = len(difference_S)
    if count < 2 or np.ptp(difference_S) < _NO_SPREAD:
        return None
    error = float(difference_S.std(ddof=1)) / math.sqrt(count)
    return Difference(float(difference_S.mean()), error, count - 1)


def welch(a_S: np.ndarray, b_R: np.ndarray) -> Difference | None:
    """mean(a) - mean(b) of S and R runs, by Welch's t (Welch 1947; degrees of freedom after Satterthwaite 1946).

    Assumes that all runs are independent and about normal within an arm; the arms may spread differently and differ
    in seeds. Where seeds are shared it leaves that knowledge unused. The val images are taken as given. None where an
    arm has fewer than two runs, or neither spreads.
    """
    a_S, b_R = np.asarray(a_S, float), np.asarray(b_R, float)
    if min(len(a_S), len(b_R)) < 2:
        return None
    parts = [values.var(ddof=1) / len(values) for values in (a_S, b_R)]
    if sum(parts) < _NO_SPREAD**2:
        return None
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a_S, b_R), strict=True))
    return Difference(float(a_S.mean() - b_R.mean()), math.sqrt(sum(parts)), freedom)


def resampled(hit_a_SN: np.ndarray, hit_b_SN: np.ndarray, draws: int = DRAWS) -> Difference | None:
    """Difference in top-1 of two arms whose runs share S seeds, with val images drawn anew as well as seeds.

    Row s holds, for one seed's run, whether each of the N val images was put in its class. Each of `draws` draws takes
    N of the N images with replacement, the same for all runs of both arms, and S - 1 of the S seeds with replacement,
    the same for both arms, and takes the mean of a - b over drawn seeds x drawn images. Images and seeds are drawn
    apart from each other, the pigeonhole bootstrap (Owen 2007), whose variance is not below the true one when runs and
    images interact. S - 1 seeds rather than S make it right for the mean of few seeds (Rao & Wu 1988). The draws'
    standard deviation is the standard error. The interval is Student's t with degrees of freedom after Satterthwaite
    1946, S - 1 for the seeds' part of the variance and N - 1 for the rest, because few seeds tell little of their own
    spread: where images outweigh them it may be narrower than the paired one. Assumes that images and seeds are each
    drawn independently; from two seeds it holds the truth less often than it says
    (docs/decisions/0012-study-statistics.md). The generator's seed is fixed.

    None from fewer than two seeds, or where nothing spreads.
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
    return Difference(float(difference_SN.mean()), math.sqrt(variance), freedom)


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
    replacement, the same for both networks. Assumes that images are drawn independently; says nothing of seeds.
    """
    difference_N = np.asarray(hit_a_N, float) - np.asarray(hit_b_N, float)
    drawn_R = _image_draws(difference_N[None], draws, np.random.default_rng(_SEED))[:, 0]
    low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(difference_N.mean()), float(low), float(high)


@dataclass(frozen=True)
class McNemar:
    """On how many images one of two networks alone is right, and the two-sided p of so uneven a split."""

    only_a: int
    only_b: int
    p: float


def mcnemar(hit_a_N: np.ndarray, hit_b_N: np.ndarray) -> McNemar:
    """McNemar's test (1947) in its exact form: were both networks equally good, the images that one of them alone gets
    right would fall to either side like a fair coin. Assumes independent images; p is 1 where there are none.
    """
    from scipy.stats import binomtest

    only_a, only_b = (int(np.sum(one & ~other)) for one, other in ((hit_a_N, hit_b_N), (hit_b_N, hit_a_N)))
    p = float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a, only_b, p)


def holm(p_by_name: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for their number by Holm's step-down method (Holm 1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1, held at no less than those before it and no more than 1. All
    below 0.05 may be called different with a chance of 5 % that any of them is not; no independence is assumed.
    """
    corrected, floor = {}, 0.0
    for rank, name in enumerate(sorted(p_by_name, key=p_by_name.__getitem__)):
        floor = max(floor, min(1.0, (len(p_by_name) - rank) * p_by_name[name]))
        corrected[name] = floor
    return {name: corrected[name] for name in p_by_name}
