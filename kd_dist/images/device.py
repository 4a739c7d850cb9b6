"""Images that live on the device: a split's bytes in its memory, and the views of a whole batch rendered there in a
few kernels.

The rule is the one of `views.render`, whose uint8 arithmetic is imitated: triangle filters with weights rounded to 16
bits, the image rounded to whole grey levels after the horizontal pass and again after the vertical one. Each pass is
one batched matrix product of the crops with a matrix of filter weights per crop, half a grey level added on the way, so
that rounding is cutting off. Up to a scale of about 3 every sum is exact in float32 and the images are the same to the
bit; beyond, a grey level may differ by one (see TOLERANCE). The products must be float32's own: `exact_products` keeps
autocast and TF32 away from them, and `place` compares crops with the host's before the renderer is used.

A batch's crops are rendered in classes of similar size, each padded to its largest crop (see `size_classes`), so that a
few large images do not make all others expensive. Besides the result, rendering needs at most WORK_BYTES of memory at a
time, and the filters kept for each size of image at most 220 MB at 224 px (sides up to LONGEST_SIDE; 4 MB up to 512).

Shapes beyond the package's usual letters: C crops of a call, X lines of filters, T taps of a filter, L sides, S size of
the result, P pixels.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import torch

from kd_dist.images import views
from kd_dist.images.store import Pixels
from kd_dist.images.transfer import to_device
from kd_dist.images.views import Shown

TOLERANCE = 1  # grey levels by which a value may differ from the CPU's image
TOLERATED_SHARE = 1e-3  # of the values that may differ at all; TF32 changes some 10 %, by one grey level
COMPARED_CROPS, COMPARED_SIZE = 16, 64
STEP = 8  # crops are padded to a multiple of this, so that few shapes occur
WORK_BYTES = 2**30
LONGEST_SIDE = 4096  # of an image on a device, in pixels
SMALLEST_TABLE = 256  # sides
TABLE_CELLS = 2**22  # of a table, computed at once


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Within, float32 matrix products of this thread are computed in float32, whatever autocast, TF32 or
    `torch.set_float32_matmul_precision` say outside; what they say is restored.
    """
    backends: Any = torch.backends  # torch makes an object of each by itself, which types do not see
    matmul = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = matmul.fp32_precision
    lowered = before not in ("ieee", "none")
    with torch.autocast(device.type, enabled=False):
        if lowered:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            if lowered:
                matmul.fp32_precision = before


class ResidentPixels:
    """The decoded images of a split in a device's memory, no side longer than LONGEST_SIDE."""

    renderer = views.DEVICE_RENDERER
    drawn_by_host = False

    def __init__(self, pixels: Pixels, device: torch.device):
        self.device, self.sizes_N2, self.starts_N = device, pixels.sizes_N2, pixels.starts_N // 3
        # A line of a crop is read up to its class's length, beyond the last image too.
        self.pixels_Q = torch.empty(len(pixels.bytes_) + 3 * _padded(LONGEST_SIDE), dtype=torch.uint8, device=device)
        self.pixels_Q[: len(pixels.bytes_)].copy_(pixels.bytes_)
        self._numbers = torch.arange(_padded(LONGEST_SIDE), device=device)
        self._tables: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.sizes_N2)

    def at(self, rows_M: np.ndarray) -> "ResidentPixels":
        """Some of the images, where they are."""
        some = copy.copy(self)
        some.sizes_N2, some.starts_N = self.sizes_N2[rows_M], self.starts_N[rows_M]
        return some

    @torch.no_grad()
    def show(self, shown: Shown, size: int) -> torch.Tensor:
        """The images: uint8 [B, 3, size, size] on the device, channels_last in memory. The host does not wait."""
        b, mixed_M = len(shown), np.flatnonzero(shown.weight_B < 1)
        index_C = np.concatenate([shown.index_B, shown.partner_B[mixed_M]])
        box_C4 = np.concatenate([shown.box_B4, shown.partner_box_B4[mixed_M]]).astype(np.int64)
        flip_C = np.concatenate([shown.flip_B, shown.partner_flip_B[mixed_M]])
        classes = size_classes(box_C4[:, 2:])
        order_C = np.concatenate(classes)
        crops_C6 = self._crop_numbers(index_C, box_C4, flip_C, size)[order_C]
        numbers = (crops_C6, np.argsort(order_C), *_mix_numbers(shown.at(mixed_M), mixed_M, size))
        crops_C6, place_C, slot_M, edges_22M1, lambda_M = to_device(list(map(torch.from_numpy, numbers)), self.device)
        images_CHW3 = torch.empty((len(order_C), size, size, 3), dtype=torch.uint8, device=self.device)
        with exact_products(self.device):
            for low, count, *longest in _pieces([box_C4[members, 2:] for members in classes], size):
                self._draw(images_CHW3[low : low + count], crops_C6[low : low + count], *longest)
        if len(classes) > 1:
            images_CHW3 = images_CHW3[place_C]
        own_BHW3, partner_MHW3 = images_CHW3.split([b, len(mixed_M)])
        if len(mixed_M):
            _mix(own_BHW3, partner_MHW3, slot_M, edges_22M1, lambda_M, self._numbers[:size])
        return own_BHW3.permute(0, 3, 1, 2)

    def _crop_numbers(self, index_C: np.ndarray, box_C4: np.ndarray, flip_C: np.ndarray, size: int) -> np.ndarray:
        """What the kernels need to know of each crop, int64 [C, 6]: where its first pixel lies, pixels from one line to
        the next, and where its filters lie in a table, down and across: the first and the step from one to the next.
        """
        top_C, left_C, height_C, width_C = box_C4.T
        row_C = self.sizes_N2[index_C, 1]
        start_C = self.starts_N[index_C] + top_C * row_C + left_C
        mirrored_C = flip_C.astype(np.int64)
        down_C, across_C = (height_C - 1) * size, (width_C - 1) * size + mirrored_C * (size - 1)
        return np.column_stack([start_C, row_C, down_C, np.ones_like(row_C), across_C, 1 - 2 * mirrored_C])

    def _draw(self, result_CHW3: torch.Tensor, crops_C6: torch.Tensor, longest_h: int, longest_w: int) -> None:
        """Render crops of at most these sides into a uint8 [C, S, S, 3]."""
        c, size = result_CHW3.shape[:2]
        filters_XSL = self._filters(crops_C6[:, 2:], size, max(longest_h, longest_w))
        down_CSH, across_CSW = filters_XSL[:, 0, :, : longest_h + 1], filters_XSL[:, 1, :, : longest_w + 1]
        # Line 0 and column 0 hold a constant that adds the filters' half grey level.
        lines_CH3W = torch.empty((c, longest_h + 1, 3, longest_w + 1), device=self.device)
        lines_CH3W[:, 1:, :, 1:] = self._cut(crops_C6, longest_h, longest_w).permute(0, 1, 3, 2)
        lines_CH3W[..., 0] = 1
        narrow_CHX = torch.bmm(lines_CH3W.flatten(1, 2), across_CSW.mT).floor_().view(c, longest_h + 1, 3 * size)
        narrow_CHX[:, 0] = 1
        result_CHW3.copy_(torch.bmm(down_CSH, narrow_CHX).view(c, size, 3, size).permute(0, 1, 3, 2))

    def _cut(self, crops_C6: torch.Tensor, longest_h: int, longest_w: int) -> torch.Tensor:
        """The crops' pixels, uint8 [C, H, W, 3]; what lies beyond a crop is any pixel, and has no weight."""
        last = len(self.pixels_Q) // 3 - longest_w
        lines_PW3 = self.pixels_Q.as_strided((last + 1, longest_w, 3), (3, 3, 1))
        start_CH = torch.addcmul(crops_C6[:, :1], crops_C6[:, 1:2], self._numbers[:longest_h]).clamp_(max=last)
        return lines_PW3[start_CH]

    def _filters(self, rows_C4: torch.Tensor, size: int, longest: int) -> torch.Tensor:
        """Filters float32 [C, 2, S, 1 + longest or more], down and across: half a grey level, the weights of pixels."""
        taps_RT, first_R1, moved_T = self._table(size, longest)
        rows_C22 = rows_C4.unflatten(1, (2, 2))
        rows_C2S = torch.addcmul(rows_C22[..., :1], rows_C22[..., 1:], self._numbers[:size])
        taps = taps_RT.shape[1]
        place_C2ST = torch.addcmul(self._numbers[:taps], first_R1[rows_C2S], moved_T)
        filters = torch.zeros((*rows_C2S.shape, max(longest + 1, taps)), dtype=torch.float32, device=self.device)
        return filters.scatter_(3, place_C2ST, taps_RT[rows_C2S])

    def _table(self, size: int, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The taps of all filters to `size` of sides up to a power of two: weights float32 [R, 1 + T], the constant's
        half grey level before them, for each of R = sides * S lines; the line's first pixel int64 [R, 1]; and which
        taps move with it, int64 [1 + T]: all but the constant. Made once.
        """
        sides = min(max(SMALLEST_TABLE, 1 << (longest - 1).bit_length()), LONGEST_SIDE)
        if (sides, size) not in self._tables:
            side_L = torch.arange(1, sides + 1, device=self.device)
            taps = taps_of(sides, size)
            pieces = [
                filter_taps(piece_L, size, taps) for piece_L in side_L.split(max(1, TABLE_CELLS // (size * taps)))
            ]
            weights_RT, first_R1 = (torch.cat(column) for column in zip(*pieces, strict=True))
            moved_T = self._numbers[: taps + 1].clamp(max=1)
            taps_RT = torch.nn.functional.pad(weights_RT.flatten(0, 1), (1, 0), value=0.5)
            self._tables[sides, size] = taps_RT, first_R1.view(-1, 1), moved_T
        return self._tables[sides, size]


def taps_of(side: int, size: int) -> int:
    """Pixels that a filter of lines with up to `side` pixels may need."""
    return ceil(2 * max(1.0, side / size)) + 1


def filter_taps(side_L: torch.Tensor, size: int, taps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The antialiased bilinear resize of lines with these many pixels to `size`: weights float32 [L, S, T] of T pixels
    in a row, and the first one's number int64 [L, S].

    A triangle around each result's centre, max(1, scale) wide to either side, its weights adding up to 1: Pillow's
    filter, which torch's uint8 `interpolate` follows. As there the weights are whole multiples of 2^-p with the largest
    p <= 22 for which the line's largest one stays below 2^15, so that sums of products are whole numbers too.
    """
    centre_S = torch.arange(size, device=side_L.device, dtype=torch.float64) + 0.5
    scale_L1 = side_L[:, None].double() / size
    width_L1 = scale_L1.clamp(min=1)
    first_LS = (centre_S * scale_L1 - width_L1 + 0.5).floor().long()
    first_LS = torch.minimum(first_LS, side_L[:, None] - taps).clamp_(min=0)
    place_LST = first_LS[:, :, None] + torch.arange(taps, device=side_L.device) + 0.5
    distance_LST = (place_LST - (centre_S * scale_L1)[:, :, None]) / width_L1[:, :, None]
    weights_LST = (1 - distance_LST.abs()).clamp_(min=0) * (place_LST < side_L[:, None, None])
    weights_LST /= weights_LST.sum(dim=2, keepdim=True)
    largest_L11 = weights_LST.amax(dim=(1, 2), keepdim=True)
    unit_L11 = torch.exp2(((2**15 - 0.5) / largest_L11).log2().ceil() - 1).clamp(max=2.0**22)
    return ((weights_LST * unit_L11 + 0.5).floor() / unit_L11).float(), first_LS


def size_classes(sides_C2: np.ndarray) -> list[np.ndarray]:
    """The places of C crops in classes that are padded to their largest member each, from heights and widths [C, 2].

    A class is divided, at a place in the order of areas, where that at least halves its padded pixels. So crops of
    similar size stay together, and a few large ones cost no more than they would alone.
    """

    def divided(places_M: np.ndarray) -> list[np.ndarray]:
        sides_M2 = sides_C2[places_M]
        count_M = np.arange(1, len(places_M) + 1)
        smaller_M = count_M * np.maximum.accumulate(sides_M2).prod(axis=1)
        larger_M = (count_M * np.maximum.accumulate(sides_M2[::-1]).prod(axis=1))[::-1]
        both_M = smaller_M[:-1] + larger_M[1:]
        cut = int(both_M.argmin()) + 1 if len(both_M) else 0
        if not cut or 2 * both_M[cut - 1] > smaller_M[-1]:
            return [places_M]
        return divided(places_M[:cut]) + divided(places_M[cut:])

    classes = divided(sides_C2.astype(np.int64).prod(axis=1).argsort(kind="stable"))
    return classes if len(classes) > 1 else [np.arange(len(sides_C2))]


def _pieces(classes: list[np.ndarray], size: int) -> Iterator[tuple[int, int, int, int]]:
    """Which crops are rendered together, for the sides [M, 2] of classes that lie one after another: the first, how
    many, as many as WORK_BYTES hold, and the height and width that they are padded to.
    """
    start = 0
    for sides_M2 in classes:
        height, width = map(_padded, sides_M2.max(axis=0, initial=1).tolist())
        bytes_of_one = 15 * height * width + 12 * size * (height + size) + 8 * size * max(height, width)
        at_once = max(1, WORK_BYTES // bytes_of_one)
        for low in range(0, len(sides_M2), at_once):
            yield start + low, min(at_once, len(sides_M2) - low), height, width
        start += len(sides_M2)


def _padded(side: int) -> int:
    """A length that with the constant's place is a multiple of STEP."""
    return -(-(side + 1) // STEP) * STEP - 1


def _mix_numbers(mixed: Shown, mixed_M: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of M mixes its image's place in the batch; the box that is mixed, int64 [2, 2, M, 1]: first and end, of
    rows and of columns; and the own share in there: CutMix's box has none, mixup's box is all of the image.
    """
    is_cutmix_M = np.any(mixed.paste_B4, axis=1)
    box_M4 = np.where(is_cutmix_M[:, None], (mixed.paste_B4.astype(np.float64) * size).round(), [0, 0, size, size])
    edges_22M1 = box_M4.astype(np.int64).T.reshape(2, 2, -1, 1)  # top and left, then bottom and right
    return mixed_M, edges_22M1, np.where(is_cutmix_M, 0, mixed.weight_B).astype(np.float32)


def _mix(
    own_BHW3: torch.Tensor,
    partner_MHW3: torch.Tensor,
    slot_M: torch.Tensor,
    edges_22M1: torch.Tensor,
    lambda_M: torch.Tensor,
    numbers_S: torch.Tensor,
) -> None:
    """Mix partners into their images in place, as `views.mix` does."""
    inside_2MS = (numbers_S >= edges_22M1[0]) & (numbers_S < edges_22M1[1])
    inside_MHW1 = (inside_2MS[0, :, :, None] & inside_2MS[1, :, None, :])[..., None]
    share_MHW1 = torch.where(inside_MHW1, lambda_M[:, None, None, None], 1.0)
    own_BHW3[slot_M] = torch.lerp(partner_MHW3.float(), own_BHW3[slot_M].float(), share_MHW1).round_().to(torch.uint8)


def place(pixels: Mapping[str, Pixels], device: torch.device) -> tuple[dict[str, ResidentPixels], str | None]:
    """The splits' images on a device; or none of them and why not, in one sentence: an image is too large, or the
    device does not draw some crops as the host does.
    """
    longest = max(int(split.sizes_N2.max(initial=0)) for split in pixels.values())
    if longest > LONGEST_SIDE:
        return {}, f"an image has a side of {longest} pixels, the device's renderer takes {LONGEST_SIDE} at most"
    resident = {name: ResidentPixels(split, device) for name, split in pixels.items()}
    noise = _noise()
    pairs = [(ResidentPixels(noise, device), noise), *((resident[name], split) for name, split in pixels.items())]
    fault = next(filter(None, (fault_of(on_device, on_host) for on_device, on_host in pairs)), None)
    return ({}, fault) if fault else (resident, None)


def _noise() -> Pixels:
    """Images of noise, in which every rounding shows; those of a data set may be smooth."""
    sizes_N2 = np.array([[160, 213], [213, 160], [375, 500]])
    counts_N = sizes_N2.prod(axis=1) * 3
    noise = np.random.default_rng(0).integers(0, 256, counts_N.sum(), dtype=np.uint8)
    return Pixels(torch.from_numpy(noise), sizes_N2, np.cumsum(counts_N) - counts_N)


def fault_of(resident: ResidentPixels, pixels: Pixels) -> str | None:
    """How far the device's crops are from the host's, in one sentence, where that is more than TOLERANCE and
    TOLERATED_SHARE allow. A handful of crops is compared, the largest image's among them; the host waits for these.
    """
    if not len(pixels):
        return None
    rng = np.random.default_rng(0)
    index_B = np.append(rng.integers(0, len(pixels), COMPARED_CROPS - 1), pixels.sizes_N2.prod(axis=1).argmax())
    box_B4 = views.draw_boxes(rng, pixels.sizes_N2[index_B], (0.08, 1.0))
    plain = Shown.plain(index_B, box_B4, views.draw_flips(rng, len(index_B)))
    mixes = views.draw_mixes(rng, len(index_B), 0.25, 0.25)
    partners = plain.at(mixes.partner_N)
    shown = replace(
        plain,
        partner_B=partners.index_B,
        partner_box_B4=partners.box_B4,
        partner_flip_B=partners.flip_B,
        weight_B=mixes.weight_N.astype(np.float32),
        paste_B4=mixes.paste_N4.astype(np.float32),
    )
    of_host, of_device = (drawer.show(shown, COMPARED_SIZE).cpu().int() for drawer in (pixels, resident))
    off = (of_device - of_host).abs()
    most, share = int(off.max()), float((off > 0).float().mean())
    if most <= TOLERANCE and share <= TOLERATED_SHARE:
        return None
    return f"{resident.device} draws {share:.2%} of the values of some crops up to {most} grey levels off the host's"


def free_bytes(device: torch.device) -> float:
    """Memory that a device has left for images; without end on a CPU, where they are not counted."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else float("inf")
