"""Decoding: one image file as RGB pixels."""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from kd_dist.data.samples import unreadable

# Named because Pillow goes by content, not suffix, and some of its readers run other programs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def decode(path: Path) -> np.ndarray:
    """One image as RGB, uint8 [H, W, 3], turned the way its EXIF orientation says; of several frames or pages the
    first.

    Greyscale, palette and CMYK become RGB; an alpha channel is dropped, and 16-bit greyscale is scaled to 8. Raises
    UserError naming the file when it is broken, cut short, no image of a known kind, or so large that Pillow takes it
    for an attack (179 million pixels).
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(_to_rgb(image))
    except Exception as error:  # Pillow's readers raise almost anything on broken bytes
        raise unreadable(path, error) from error


def rgb_of(image: Image.Image) -> np.ndarray:
    """An open image as `decode` gives one in a file, uint8 [H, W, 3]; the image itself is left as it is."""
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format  # a copy has none
    return np.array(_to_rgb(turned))


def decoded_size(path: Path) -> tuple[int, int]:
    """Height and width that `decode` gives, from the image's header where that holds its orientation too.

    Raises UserError naming the file when it is no image of a known kind.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            turned = image.format == "TIFF"  # Pillow gives the size of a TIFF as it is after turning
            sideways = not turned and image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
            return (width, height) if sideways else (height, width)
    except Exception as error:
        raise unreadable(path, error) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.format == "TIFF" and image.mode == "I"):
        raise ValueError("its pixels are floating-point or 32-bit numbers of unknown range")
    if image.mode.startswith("I"):  # 16-bit greyscale, which convert() would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:  # else Pillow warns of each such palette
        image = image.convert("RGBA")
    return image.convert("RGB")
