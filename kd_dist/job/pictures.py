"""Pictures of a run for TensorBoard: a batch as the network sees it, mistakes and disagreements on val, confusion of
classes, calibration, and top-1 of each class. Drawn by rank 0 after an epoch's evaluation, outside of the steps.
"""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from kd_dist.job.validation import Validation
from kd_dist.training import Trainer
from kd_dist.training.batches import EpochBatches

PICTURED_EPOCHS = 8  # of a run, about
TILE, COLUMNS, TILES, LINE = 96, 4, 8, 13  # pixels, tiles a row, tiles, pixels
CLASSES_SHOWN = 30
BINS = 10
GROUP = "5_pictures"
BLUE, RED, GREY, BLACK, WHITE = (31, 119, 180), (200, 30, 30), (170, 170, 170), (0, 0, 0), (255, 255, 255)


def is_pictured(epoch: int, epochs: int, evaluate_every: int) -> bool:
    """Whether pictures are drawn after this evaluated epoch, counted from 1: every few epochs, and at the end."""
    every = max(1, round(epochs / PICTURED_EPOCHS))
    return epoch == epochs or epoch // every > (epoch - evaluate_every) // every


@dataclass(frozen=True, eq=False)
class Scores:
    """What a network and, where one is cached, its teacher make of the images that a run is scored on: probabilities
    [M, K] and labels [M].
    """

    own_MK: np.ndarray
    teacher_MK: np.ndarray | None
    labels_M: np.ndarray
    classes: tuple[str, ...]


def pictures_of(
    trainer: Trainer, validation: Validation, model: nn.Module, logits_MK: np.ndarray, epoch: int
) -> dict[str, tuple[bytes, tuple[int, int]]]:
    """All pictures after an epoch, counted from 1, by their tags: encoded, with width and height."""
    teacher_MK, samples = validation.teacher_MK, validation.scored.samples
    of_teacher = None if teacher_MK is None else probabilities(teacher_MK, validation.temperature)
    scores = Scores(probabilities(logits_MK), of_teacher, samples.labels_N, samples.classes)
    photos = {
        "1_batch": batch(trainer, validation, model, epoch - 1, samples.classes),
        "2_mistakes": tiles(validation, scores, most_confident_mistakes(scores)),
    }
    if teacher_MK is not None:
        photos["3_disagreements"] = tiles(validation, scores, largest_disagreements(scores))
    charts = {
        "4_confusion": confusion(scores),
        "5_reliability": reliability(scores),
        "6_top1_of_each_class": top1_of_each_class(scores),
    }
    found = {name: (as_jpeg(picture), picture.size) for name, picture in photos.items()}
    found |= {name: (as_png(picture), picture.size) for name, picture in charts.items()}
    return {f"{GROUP}/{name}": picture for name, picture in found.items()}


def as_jpeg(picture: Image.Image) -> bytes:
    """For photos: several times smaller than PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def as_png(picture: Image.Image) -> bytes:
    """For charts, with a palette."""
    buffer = io.BytesIO()
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def probabilities(logits_BK: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64 [B, K]."""
    return torch.from_numpy(logits_BK.astype(np.float64) / temperature).softmax(dim=1).numpy()


# ---- which images


def most_confident_mistakes(scores: Scores) -> np.ndarray:
    """The places of wrong answers, the most probable first."""
    wrong_M = scores.own_MK.argmax(axis=1) != scores.labels_M
    order = np.argsort(-scores.own_MK.max(axis=1), kind="stable")
    return order[wrong_M[order]][:TILES]


def largest_disagreements(scores: Scores) -> np.ndarray:
    """The places with the largest KL(teacher || network), the largest first."""
    assert scores.teacher_MK is not None
    tiny = np.finfo(np.float64).tiny
    logs_MK = np.log(scores.teacher_MK + tiny) - np.log(scores.own_MK + tiny)
    return np.argsort(-(scores.teacher_MK * logs_MK).sum(axis=1), kind="stable")[:TILES]


# ---- images with captions


def batch(
    trainer: Trainer, validation: Validation, model: nn.Module, epoch: int, classes: Sequence[str]
) -> Image.Image:
    """The first images of an epoch, counted from 0, as the network was shown them."""
    data = trainer.data
    shown = EpochBatches(data, epoch, 0, trainer.runtime.world_size)[0]
    images_BCHW = shown.images_BCHW[:TILES]
    own_BK = probabilities(validation.forward(model).of_images(images_BCHW))
    logits_BK = shown.teacher_logits_BK
    teacher_BK = None if logits_BK is None else probabilities(logits_BK[:TILES].numpy(), validation.temperature)
    return grid(images_BCHW, captions(own_BK, teacher_BK, shown.labels_B[:TILES].numpy(), classes))


def tiles(validation: Validation, scores: Scores, places: np.ndarray) -> Image.Image:
    """Images that the run is scored on, with what network and teacher make of them."""
    images_BCHW = validation.pixels.show(validation.shown.at(places), validation.image_size)
    teacher = None if scores.teacher_MK is None else scores.teacher_MK[places]
    return grid(images_BCHW, captions(scores.own_MK[places], teacher, scores.labels_M[places], scores.classes))


def captions(
    own_BK: np.ndarray, teacher_BK: np.ndarray | None, labels_B: np.ndarray, classes: Sequence[str]
) -> list[list[str]]:
    """For each image its label, the network's first answer, and the teacher's first three."""

    def answers(values_K: np.ndarray, count: int) -> list[str]:
        return [f"{100 * values_K[k]:.0f} % {classes[k]}" for k in np.argsort(-values_K, kind="stable")[:count]]

    lines = []
    for place, label in enumerate(labels_B):
        of_teacher = [] if teacher_BK is None else [f"t {text}" for text in answers(teacher_BK[place], 3)]
        own = [f"s {text}" for text in answers(own_BK[place], 1)]
        lines.append([f"label {classes[label] if label >= 0 else 'not used'}", *own, *of_teacher])
    return lines


def grid(images_BCHW: torch.Tensor, texts: Sequence[Sequence[str]]) -> Image.Image:
    """Images uint8 in rows, each with its lines of text below."""
    images_BHWC = images_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    lines = max(map(len, texts), default=0)
    width, height = TILE + 44, TILE + LINE * lines + 6
    canvas = Image.new("RGB", (COLUMNS * width, LINE + max(1, -(-len(texts) // COLUMNS)) * height), WHITE)
    pen = ImageDraw.Draw(canvas)
    write(pen, (2, 0), "s: this network's answer; t: the teacher's first three, where it is cached")
    for place, (image_HWC, words) in enumerate(zip(images_BHWC, texts, strict=True)):
        left, top = place % COLUMNS * width + 2, LINE + place // COLUMNS * height + 2
        canvas.paste(Image.fromarray(image_HWC).resize((TILE, TILE), Image.Resampling.BICUBIC), (left, top))
        for number, line in enumerate(words):
            write(pen, (left, top + TILE + 1 + LINE * number), fitting(line, width - 4))
    return canvas


# ---- charts


def confusion(scores: Scores) -> Image.Image:
    """How often the class of a row is taken for that of a column: shares of the row, and the hits on the diagonal."""
    kept = shown_classes(scores)
    counts_KK = np.zeros((len(scores.classes),) * 2)
    np.add.at(counts_KK, (scores.labels_M, scores.own_MK.argmax(axis=1)), 1)
    shares_KK = (counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1))[np.ix_(kept, kept)]
    cell, left = 26, 130
    canvas = Image.new("RGB", (left + cell * len(kept) + 2, cell * len(kept) + 120), WHITE)
    pen = ImageDraw.Draw(canvas)
    for row, shares_K in enumerate(shares_KK):
        write(pen, (2, row * cell + 6), fitting(scores.classes[kept[row]], left - 6))
        for column, share in enumerate(shares_K):
            color = shade(share, BLUE if row == column else RED)
            x, y = left + column * cell, row * cell
            pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=color)
            if share >= 0.005:
                write(pen, (x + 4, y + 6), f"{100 * share:.0f}", WHITE if share > 0.5 else BLACK)
    for column, number in enumerate(kept):
        label = Image.new("RGB", (116, LINE), WHITE)
        write(ImageDraw.Draw(label), (0, 0), fitting(scores.classes[number], 114))
        canvas.paste(label.rotate(-90, expand=True), (left + column * cell + 6, cell * len(kept) + 2))
    return canvas


def reliability(scores: Scores) -> Image.Image:
    """Top-1 by confidence in bins, the network's as bars and the teacher's as dots; calibrated ones end at the dashed
    line.
    """
    size, edge = 260, 34
    canvas = Image.new("RGB", (size + edge + 10, size + edge + 22), WHITE)
    pen = ImageDraw.Draw(canvas)

    def place(x: float, y: float) -> tuple[float, float]:
        return edge + x * size, 20 + (1 - y) * size

    own = bins_of(scores.own_MK, scores.labels_M)
    for number, share, _, _ in own:
        pen.rectangle((*place((number + 0.1) / BINS, share), *place((number + 0.9) / BINS, 0)), fill=BLUE)
    if scores.teacher_MK is not None:
        for number, share, _, _ in bins_of(scores.teacher_MK, scores.labels_M):
            x, y = place((number + 0.5) / BINS, share)
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=RED)
    for dash in np.arange(0, 1, 0.05):
        pen.line((*place(dash, dash), *place(dash + 0.025, dash + 0.025)), fill=BLACK)
    pen.rectangle((*place(0, 1), *place(1, 0)), outline=BLACK)
    for tick in (0, 0.5, 1):
        write(pen, (edge + tick * size - 8, size + 22), f"{tick:g}")
        write(pen, (8, 14 + (1 - tick) * size), f"{tick:g}")
    write(pen, (edge + 60, size + 36), "confidence, 10 bins")
    teacher = "; red: teacher" if scores.teacher_MK is not None else ""
    error = sum(count * abs(share - confidence) for _, share, confidence, count in own) / len(scores.labels_M)
    write(pen, (2, 2), f"top-1 by confidence, calibration error {error:.3f}{teacher}")
    return canvas


def top1_of_each_class(scores: Scores) -> Image.Image:
    """A bar for each class, and a mark for the teacher's."""
    kept, left, width, row = shown_classes(scores), 150, 240, 17
    own_K = hits_by_class(scores.own_MK, scores)
    teacher_K = None if scores.teacher_MK is None else hits_by_class(scores.teacher_MK, scores)
    canvas = Image.new("RGB", (left + width + 50, row * len(kept) + LINE + 8), WHITE)
    pen = ImageDraw.Draw(canvas)
    for number, label in enumerate(kept):
        y = number * row
        write(pen, (2, y + 2), fitting(scores.classes[label], left - 6))
        pen.rectangle((left, y + 2, left + width * own_K[label], y + row - 3), fill=BLUE)
        if teacher_K is not None:
            x = left + width * teacher_K[label]
            pen.rectangle((x - 1, y, x + 2, y + row - 1), fill=RED)
        write(pen, (left + width + 8, y + 2), f"{100 * own_K[label]:.0f} %")
    write(pen, (left, row * len(kept) + 4), "top-1 of each class" + ("" if teacher_K is None else "; red: teacher"))
    return canvas


def bins_of(probabilities_MK: np.ndarray, labels_M: np.ndarray) -> list[tuple[int, float, float, int]]:
    """(number, top-1, mean confidence, images) of each bin of confidence that is not empty, as in Guo et al. 2017."""
    confidence_M, hit_M = probabilities_MK.max(axis=1), probabilities_MK.argmax(axis=1) == labels_M
    bin_M = np.minimum((confidence_M * BINS).astype(int), BINS - 1)
    members = ((int(number), bin_M == number) for number in np.unique(bin_M))
    return [(number, float(hit_M[of].mean()), float(confidence_M[of].mean()), int(of.sum())) for number, of in members]


def hits_by_class(probabilities_MK: np.ndarray, scores: Scores) -> np.ndarray:
    """Top-1 of each class, 0 for one without images: float64 [K]."""
    hit_M, k = probabilities_MK.argmax(axis=1) == scores.labels_M, len(scores.classes)
    counts_K = np.bincount(scores.labels_M, minlength=k)
    return np.bincount(scores.labels_M, weights=hit_M, minlength=k) / np.maximum(counts_K, 1)


def shown_classes(scores: Scores) -> np.ndarray:
    """All classes, or where there are many those with the lowest top-1, in their order."""
    if len(scores.classes) <= CLASSES_SHOWN:
        return np.arange(len(scores.classes))
    return np.sort(np.argsort(hits_by_class(scores.own_MK, scores), kind="stable")[:CLASSES_SHOWN])


# ---- text and colour


@functools.cache
def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own."""
    return ImageFont.load_default(11)


def write(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, color: tuple[int, int, int] = BLACK) -> None:
    """A line of text with its upper left corner there."""
    pen.text(at, text, fill=color, font=font())


def fitting(text: str, width: float) -> str:
    """The text, cut to so many pixels."""
    while len(text) > 1 and font().getlength(text) > width:
        text = text[:-1]
    return text


def shade(share: float, color: tuple[int, int, int]) -> tuple[int, ...]:
    """White for 0, the colour for 1."""
    return tuple(round(255 - share * (255 - part)) for part in color)
