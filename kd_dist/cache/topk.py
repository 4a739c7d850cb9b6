"""Rows of many classes, shortened: the k largest logits of each, and what the others weigh together.

The other classes, the tail, share one value. At temperature T it is the logit that, given to each of them, keeps their
mass: T * log(mean(exp(logit / T))), for T -> infinity their mean. So the k probabilities at T are the teacher's own,
and so is the sum of the others; what is lost is how the others share that sum. The value is kept for the temperatures
of TAIL_TEMPERATURES and interpolated between them linearly in 1 / T, in which it is smooth: its slope at 0 is half the
variance.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd_dist.cache.format import TAIL, TAIL_TEMPERATURES, TOP_LOGITS, top_index
from kd_dist.errors import UserError


def shorten(logits_BK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row's three columns: classes [B, k] and logits [B, k], largest first (of equal ones the first class), and the
    tail's value [B, G] at TAIL_TEMPERATURES.
    """
    order_BK = np.argsort(-logits_BK.astype(np.float32), axis=1, kind="stable")
    top_Bk = np.take_along_axis(logits_BK, order_BK[:, :k], axis=1)
    index_Bk = order_BK[:, :k].astype(top_index(logits_BK.shape[1]).dtype)
    return index_Bk, top_Bk.astype(TOP_LOGITS.dtype), tail_of(logits_BK, index_Bk)


def tail_of(logits_BK: np.ndarray, index_Bk: np.ndarray) -> np.ndarray:
    """The common value of all classes but those of index_Bk at TAIL_TEMPERATURES: float16 [B, G]."""
    in_tail_BK = np.ones(logits_BK.shape, bool)
    np.put_along_axis(in_tail_BK, index_Bk.astype(np.int64), False, axis=1)
    tail_BR = logits_BK[in_tail_BK].reshape(len(logits_BK), -1).astype(np.float64)
    return np.stack([_soft_mean(tail_BR, temperature) for temperature in TAIL_TEMPERATURES], axis=1).astype(TAIL.dtype)


def _soft_mean(values_BR: np.ndarray, temperature: float) -> np.ndarray:
    if math.isinf(temperature):
        return values_BR.mean(axis=1)
    highest_B1 = values_BR.max(axis=1, keepdims=True)
    mean_B = np.exp((values_BR - highest_B1) / temperature).mean(axis=1)
    return highest_B1[:, 0] + temperature * np.log(mean_B)


def require_temperature(temperature: float, path: object) -> None:
    """Raise UserError where a cache of the top k does not know the tail's mass."""
    if temperature < min(TAIL_TEMPERATURES):
        raise UserError(
            f"--temperature {temperature:g} is below {min(TAIL_TEMPERATURES):g}, but {path} holds the largest "
            f"logits and the tail for temperatures from {min(TAIL_TEMPERATURES):g} on: use a higher --temperature, or "
            "a cache written without --top-k."
        )


@dataclass(frozen=True, eq=False)
class TopK:
    """The logits [N, V, K] that shortened rows stand for at one temperature, indexed like the array of all logits."""

    index_NVk: np.ndarray
    top_NVk: np.ndarray
    tail_NVG: np.ndarray
    classes: int
    temperature: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, V, K."""
        return (*self.index_NVk.shape[:2], self.classes)

    @property
    def dtype(self) -> np.dtype:
        """Type of the logits."""
        return TOP_LOGITS.dtype

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is stored, in the order of Header.logit_columns."""
        return self.index_NVk, self.top_NVk, self.tail_NVG

    def at(self, temperature: float) -> "TopK":
        """The same rows with the tail's mass at another temperature; infinity keeps its mean."""
        return replace(self, temperature=temperature)

    def __getitem__(self, key: Any) -> Any:
        index, top, tail = (column[key] for column in self.columns)
        if isinstance(key, tuple) and isinstance(key[1], slice):  # [:, :v]: the same with fewer views
            return replace(self, index_NVk=index, top_NVk=top, tail_NVG=tail)
        shared = (tail.astype(np.float32) @ self._weights_G()).astype(TOP_LOGITS.dtype)
        logits = np.repeat(shared[..., None], self.classes, axis=-1)
        np.put_along_axis(logits, index.astype(np.int64), top, axis=-1)
        return logits

    def _weights_G(self) -> np.ndarray:
        """The weight of each stored temperature at this one: linear interpolation in 1 / T."""
        nodes_G = 1 / np.array(TAIL_TEMPERATURES)
        return np.array([np.interp(1 / self.temperature, nodes_G, unit_G) for unit_G in np.eye(len(nodes_G))], "f4")

    def compared(self, logits_BK: np.ndarray, index_B: np.ndarray, view: int) -> tuple[np.ndarray, np.ndarray]:
        """The stored figures [B, k + G] of some rows, and the same figures of other logits, for the same classes."""
        index_Bk, top_Bk, tail_BG = (column[index_B, view] for column in self.columns)
        other_Bk = np.take_along_axis(logits_BK, index_Bk.astype(np.int64), axis=1)
        other = np.concatenate([other_Bk, tail_of(logits_BK, index_Bk)], axis=1)
        return np.concatenate([top_Bk, tail_BG], axis=1).astype(np.float32), other.astype(np.float32)
