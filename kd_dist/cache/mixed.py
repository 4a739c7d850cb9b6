"""Mixed views in a cache, the required feature "mixed_views": images made of two samples by mixup or CutMix."""

from dataclasses import dataclass
from typing import Any

import numpy as np

MIXED_VIEWS = "mixed_views"
WEIGHT_TOLERANCE = 1e-6  # of a float32 weight against the area that its float32 box leaves


@dataclass(frozen=True, eq=False)
class Mixed:
    """What each view of a split is mixed with: another sample in an earlier view, in which nothing is mixed.

    An image that is not mixed has weight 1, an empty box, and itself for a partner.
    """

    partner_NV: np.ndarray  # int32, row of the partner
    partner_view_NV: np.ndarray  # int16, the view whose crop and flip the partner is seen in
    weight_NV: np.ndarray  # float32 in [0, 1], share of the image itself and of its label
    paste_NV4: np.ndarray  # float32: CutMix's top, left, bottom, right as fractions of the side; all 0 for mixup

    def first(self, views: int | None) -> "Mixed":
        """The first V views (None: all)."""
        return Mixed(*(column[:, :views] for column in vars(self).values()))

    def in_view(self, view: int) -> tuple[np.ndarray, ...]:
        """Partners [N], the views they are seen in [N], weights [N] and boxes [N, 4] of one view."""
        return tuple(column[:, view] for column in vars(self).values())

    def mixed_views(self) -> np.ndarray:
        """The numbers of the views in which some image is mixed, ascending."""
        return np.flatnonzero((self.weight_NV < 1).any(axis=0))


def check_mixed(split: str, mixed: Mixed, teacher_N: np.ndarray) -> None:
    """Raise ValueError unless each image is made of two crops in the file that one teacher may label, and its weight
    is what its box leaves of it.
    """
    plain_V = np.ones(mixed.weight_NV.shape[1], bool)
    for view in range(len(plain_V)):
        partner_N, partner_view_N, weight_N, paste_N4 = mixed.in_view(view)
        mixed_N, pasted_N = weight_N != 1, paste_N4.any(axis=1)
        left_N = 1 - (paste_N4[:, 2:].astype(np.float64) - paste_N4[:, :2]).prod(axis=1)
        own_N = (partner_N == np.arange(len(partner_N))) & (partner_view_N == view)
        where = f"{split}/view", view
        _require((weight_N >= 0) & (weight_N <= 1), *where, "weight", weight_N)
        _require(_is_box(paste_N4), *where, "paste", paste_N4)
        _require(~pasted_N | (np.abs(weight_N - left_N) <= WEIGHT_TOLERANCE), *where, "weight", weight_N)
        _require(mixed_N | (own_N & ~pasted_N), *where, "partner", partner_N)
        _require((partner_N >= 0) & (partner_N < len(teacher_N)), *where, "partner", partner_N)
        _require(teacher_N[partner_N] == teacher_N, *where, "partner", partner_N)
        earlier_N = (partner_view_N >= 0) & (partner_view_N < view)
        _require(~mixed_N | earlier_N, *where, "partner_view", partner_view_N)
        _require(~mixed_N | plain_V[partner_view_N], *where, "partner_view", partner_view_N)
        plain_V[view] = not mixed_N.any()


def _require(holds_N: np.ndarray, group: str, view: int, name: str, values_N: Any) -> None:
    if not holds_N.all():
        row = int(holds_N.argmin())
        raise ValueError(f"{group}/{name} of row {row} in view {view} is {values_N[row].tolist()}")


def _is_box(paste_N4: np.ndarray) -> np.ndarray:
    """Whether edges lie in [0, 1] in their order; all 0 is no box."""
    inside_N = np.all((paste_N4 >= 0) & (paste_N4 <= 1), axis=1)
    return inside_N & (np.all(paste_N4[:, :2] < paste_N4[:, 2:], axis=1) | ~np.any(paste_N4, axis=1))
