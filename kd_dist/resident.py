"""Pictures that live on the device: a split's bytes in its memory, and the views of a whole batch rendered there in a
few kernels.

The rule is the one of `views.render`, whose uint8 arithmetic is imitated: triangle filters with weights rounded to 16
bits, the picture rounded to whole grey levels after the horizontal pass and again after the vertical one. Each pass is
one batched matrix product of the crops with a matrix of filter weights per crop. Up to a scale of about 3 every sum is
exact in float32 and the pictures are the same to the bit; beyond, a grey level may differ by one (see TOLERANCE).

Shapes beyond the package's usual letters: C crops of a call, L longest side, S size of the result, P pixels.
"""

import copy

import numpy as np
import torch

from kd_dist import views
from kd_dist.pixels import Pixels
from kd_dist.views import Shown

TOLERANCE = 1  # grey levels by which a value may differ from the CPU's picture
STEP = 32  # crops are padded to a multiple of this, so that few shapes occur
TABLE_BYTES = 2**27
WORK_BYTES = 2**30


class ResidentPixels:
    """The decoded pictures of a split in a device's memory. On a CPU they are the store's own bytes."""

    renderer = views.DEVICE_RENDERER
    drawn_by_host = False

    def __init__(self, pixels: Pixels, device: torch.device):
        self.device, self.sizes_N2 = device, pixels.sizes_N2
        self.pixels_P3 = pixels.bytes_.view(-1, 3).to(device)
        self.starts_N = torch.from_numpy(pixels.starts_N // 3).to(device)
        self.widths_N = torch.from_numpy(pixels.sizes_N2[:, 1]).to(device)
        self._tables: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.sizes_N2)

    def at(self, rows_M: np.ndarray) -> "ResidentPixels":
        """Some of the pictures, where they are."""
        some = copy.copy(self)
        rows_on_device_M = torch.from_numpy(rows_M).to(self.device)
        some.sizes_N2, some._tables = self.sizes_N2[rows_M], {}
        some.starts_N, some.widths_N = self.starts_N[rows_on_device_M], self.widths_N[rows_on_device_M]
        return some

    def show(self, shown: Shown, size: int) -> torch.Tensor:
        """The pictures: uint8 [B, 3, size, size] on the device, channels_last in memory. The host does not wait."""
        b, blended = len(shown), np.flatnonzero(shown.weight_B < 1)
        crops_C6 = np.column_stack(
            [
                np.concatenate([shown.index_B, shown.partner_B[blended]]),
                np.concatenate([shown.box_B4, shown.partner_box_B4[blended]]),
                np.concatenate([shown.flip_B, shown.partner_flip_B[blended]]),
            ]
        )
        blends_B6 = np.column_stack([blended, shown.weight_B[blended], shown.paste_B4[blended]])
        numbers_X6 = self._sent(np.concatenate([crops_C6, blends_B6]))
        longest = -(-crops_C6[:, 3:5].max(axis=0, initial=1) // STEP) * STEP
        pictures_CHW3 = self._crops(numbers_X6[: len(crops_C6)].long(), int(longest[0]), int(longest[1]), size)
        if len(blended):
            own_BHW3, partner_BHW3 = pictures_CHW3.split([b, len(blended)])
            _blend(own_BHW3, partner_BHW3, numbers_X6[len(crops_C6) :])
            pictures_CHW3 = own_BHW3
        return pictures_CHW3.permute(0, 3, 1, 2)

    def _sent(self, numbers_X6: np.ndarray) -> torch.Tensor:
        """All that the kernels need to know of a batch in one small copy, float64: no image index is too large."""
        numbers = torch.from_numpy(numbers_X6.astype(np.float64))
        return numbers.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else numbers

    def _crops(self, crops_C6: torch.Tensor, longest_h: int, longest_w: int, size: int) -> torch.Tensor:
        """uint8 [C, S, S, 3], as many at once as the work memory allows."""
        bytes_of_one = 15 * longest_h * longest_w + 12 * longest_h * size + 4 * size * (longest_h + longest_w)
        at_once = max(1, WORK_BYTES // bytes_of_one)
        pieces = [self._resized(piece_C6, longest_h, longest_w, size) for piece_C6 in crops_C6.split(at_once)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _resized(self, crops_C6: torch.Tensor, longest_h: int, longest_w: int, size: int) -> torch.Tensor:
        index_C, top_C, left_C, height_C, width_C, flip_C = crops_C6.unbind(1)
        pixels_CHW3 = self._cut(index_C, top_C, left_C, longest_h, longest_w)
        lines_CH3W = pixels_CHW3.permute(0, 1, 3, 2).to(torch.float32, memory_format=torch.contiguous_format)
        across_CSW = self._filters(width_C, flip_C, size, longest_w)
        narrow_CLS = _whole_levels(torch.bmm(lines_CH3W.flatten(1, 2), across_CSW.mT))
        down_CSH = self._filters(height_C, torch.zeros_like(flip_C), size, longest_h)
        picture_CSX = _whole_levels(torch.bmm(down_CSH, narrow_CLS.view(-1, longest_h, 3 * size)))
        return picture_CSX.to(torch.uint8).view(-1, size, 3, size).permute(0, 1, 3, 2).contiguous()

    def _cut(self, index_C, top_C, left_C, longest_h: int, longest_w: int) -> torch.Tensor:
        """The crops' pixels, uint8 [C, H, W, 3]; what lies beyond a crop is any pixel, and has no weight."""
        row_width_C11 = self.widths_N[index_C][:, None, None]
        rows_CH1 = (top_C[:, None] + torch.arange(longest_h, device=self.device))[:, :, None]
        columns_C1W = (left_C[:, None] + torch.arange(longest_w, device=self.device))[:, None, :]
        place_CHW = self.starts_N[index_C][:, None, None] + rows_CH1 * row_width_C11 + columns_C1W
        return self.pixels_P3[place_CHW.clamp_(max=len(self.pixels_P3) - 1)]

    def _filters(self, side_C: torch.Tensor, flip_C: torch.Tensor, size: int, longest: int) -> torch.Tensor:
        """Filter weights float32 [C, S, longest] of crops with these sides, mirrored where they are flipped."""
        order_S = torch.arange(size, device=self.device)
        order_CS = torch.where(flip_C[:, None] > 0, size - 1 - order_S, order_S)
        if (longest + 1) * size * longest * 4 > TABLE_BYTES:
            return torch.take_along_dim(filter_weights(side_C, size, longest), order_CS[:, :, None], dim=1)
        table_LSW = self._tables.get(size)
        if table_LSW is None or table_LSW.shape[2] < longest:
            table_LSW = filter_weights(torch.arange(1, longest + 1, device=self.device), size, longest)
            self._tables[size] = table_LSW
        return table_LSW[..., :longest][side_C[:, None] - 1, order_CS]


def filter_weights(side_L: torch.Tensor, size: int, longest: int) -> torch.Tensor:
    """Weights of the antialiased bilinear resize of lines with these many pixels to `size`: float32 [L, S, longest].

    A triangle around each result's centre, max(1, scale) wide to either side, its weights adding up to 1: Pillow's
    filter, which torch's uint8 `interpolate` follows. As there the weights are whole multiples of 2^-p with the largest
    p <= 22 for which the line's largest one stays below 2^15, so that sums of products are whole numbers too.
    """
    place_S, place_W = (torch.arange(n, device=side_L.device, dtype=torch.float64) + 0.5 for n in (size, longest))
    scale_L11 = side_L[:, None, None].double() / size
    distance_LSW = (place_W - place_S[:, None] * scale_L11) / scale_L11.clamp(min=1)
    weights_LSW = (1 - distance_LSW.abs()).clamp_(min=0) * (place_W < side_L[:, None, None])
    weights_LSW /= weights_LSW.sum(dim=2, keepdim=True)
    largest_L11 = weights_LSW.amax(dim=(1, 2), keepdim=True)
    unit_L11 = torch.exp2(((2**15 - 0.5) / largest_L11).log2().ceil() - 1).clamp(max=2.0**22)
    return ((weights_LSW * unit_L11 + 0.5).floor() / unit_L11).float()


def _whole_levels(values: torch.Tensor) -> torch.Tensor:
    """Rounded to grey levels, halves upwards, in place."""
    return values.add_(0.5).floor_().clamp_(0, 255)


def _blend(own_BHW3: torch.Tensor, partner_BHW3: torch.Tensor, blends_B6: torch.Tensor) -> None:
    """Blend partners into their pictures in place, as `views.blend` does: (slot, weight, top, left, bottom, right)."""
    slot_B, size = blends_B6[:, 0].long(), own_BHW3.shape[1]
    weight_B111 = blends_B6[:, 1].float()[:, None, None, None]
    top_B, left_B, bottom_B, right_B = (blends_B6[:, 2:] * size).round().unbind(1)
    place_S = torch.arange(size, device=own_BHW3.device)
    inside_BH = (place_S >= top_B[:, None]) & (place_S < bottom_B[:, None])
    inside_BW = (place_S >= left_B[:, None]) & (place_S < right_B[:, None])
    inside_BHW1 = (inside_BH[:, :, None] & inside_BW[:, None, :])[..., None]
    pasted_B111 = blends_B6[:, 2:].any(dim=1)[:, None, None, None]
    before_BHW3 = own_BHW3[slot_B]
    mixed_BHW3 = torch.lerp(partner_BHW3.float(), before_BHW3.float(), weight_B111).round().to(torch.uint8)
    after_BHW3 = torch.where(pasted_B111, torch.where(inside_BHW1, partner_BHW3, before_BHW3), mixed_BHW3)
    own_BHW3[slot_B] = after_BHW3


def free_bytes(device: torch.device) -> float:
    """Memory that a device has left for pictures; without end on a CPU, where they are mapped already."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else float("inf")
