"""The data card of a published cache: README.md as the Hugging Face Hub reads it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kd_dist import tables
from kd_dist.cache.reader import Cache
from kd_dist.cache.statistics import (
    describe_labels,
    describe_scale,
    describe_teacher,
    describe_views,
    label_statistics,
    rows_of,
    top1_by_class,
)
from kd_dist.hub import front_matter

NOT_STATED = "not stated"
ABOUT = "Soft labels for knowledge distillation: a teacher's logits for several crops of every image of an image set."
NO_IMAGES = "The images are not part of this set; paths and SHA-256 digests name them."
USE = "Made for training smaller image classifiers, on the same images, by offline distillation."
SIZES = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", 1e7: "1M<n<10M", 1e8: "10M<n<100M"}


def stated(value: str | None) -> str:
    """What the publisher said, or that nothing was."""
    return value or NOT_STATED


def data_card(cache: Cache, name: str, document: Mapping[str, Any]) -> str:
    """The content of README.md; `document` is that of labels.json."""
    parts = (
        *(_front_matter(cache, name, document), f"# {name}", f"{ABOUT} {NO_IMAGES}", _facts(cache, document)),
        *("## Files", _files(document), "## Read", READ, "## Views", _views(cache)),
        *("## The teacher's accuracy by class", _by_class(cache), "## What the labels are worth", _worth(cache)),
        *("## Limits", limits(cache)),
    )
    return "\n\n".join(parts) + "\n"


READ = """With Hugging Face's `datasets`: `datasets.load_dataset(FOLDER, streaming=True)`. With kd_dist: `python -m \
kd_dist.cache verify FOLDER` checks the folder, and `python -m kd_dist.cache import FOLDER -o logits.h5` gives the \
cache that a student learns from."""


def _front_matter(cache: Cache, name: str, document: Mapping[str, Any]) -> str:
    images = sum(map(len, cache.splits.values()))
    files = [{"split": split, "path": facts["file"]} for split, facts in document["splits"].items()]
    return front_matter(
        {
            "license": document["statement"]["licence"] or "unknown",
            "pretty_name": name,
            "task_categories": ["image-classification"],
            "tags": ["knowledge-distillation", "soft-labels", "kd-dist"],
            "size_categories": [next((text for limit, text in SIZES.items() if images < limit), "n>100M")],
            "configs": [{"config_name": "default", "data_files": files}],
        }
    )


def _facts(cache: Cache, document: Mapping[str, Any]) -> str:
    header, own, by = cache.header, document["statement"], document["exported_by"]
    rows = [
        ("fact", "value"),
        ("licence of the labels", stated(own["licence"])),
        ("licence of the teacher", stated(own["teacher_licence"])),
        ("publisher", stated(own["creator"])),
        ("images", f"{header.dataset}; source: {stated(own['source'])}"),
        ("intended use", f"{stated(own['intended_use'])} ({USE[0].lower()}{USE[1:-1]})"),
        ("classes", ", ".join(cache.classes)),
        *((f"teacher {i}", f"{describe_teacher(row)}... = {row.sha256}") for i, row in enumerate(header.teachers)),
        ("written", f"{header.created} in {header.compute_dtype} by {header.software}"),
        ("exported", f"by {by['software']}, commit {by['commit']}"),
        ("cache", f"SHA-256 {cache.digest}"),
    ]
    return tables.markdown(rows)


def _files(document: Mapping[str, Any]) -> str:
    rows = [("file", "images", "views of each", "bytes", "SHA-256")]
    for facts in document["splits"].values():
        numbers = (f"{facts[name]:,}" for name in ("images", "views", "bytes"))
        rows.append((facts["file"], *numbers, facts["sha256"]))
    others = "`labels.json`: header, teachers and checksums. `croissant.json`: the columns, and facts on their making."
    return f"{tables.markdown(rows)}\n\n{others}"


def _views(cache: Cache) -> str:
    header = cache.header
    return (
        f"{describe_views(header)}. A view is a box in pixels of the decoded image (top, left, height, width), resized "
        f"to {header.image_size} px by {header.renderer}, mirrored where `flips` is 1, then normalised by "
        f"{describe_scale(header.mean, header.std)}."
    )


def _by_class(cache: Cache) -> str:
    images_K, hits_K = top1_by_class(cache, "val")
    rows = [("class", "val images", "top-1 on the evaluation view")]
    for name, images, hits in zip(cache.classes, images_K, hits_K, strict=True):
        rows.append((name, f"{images:,}", f"{hits / images:.1%}" if images else "-"))
    return tables.markdown([*rows, ("all", f"{images_K.sum():,}", f"{hits_K.sum() / max(1, images_K.sum()):.1%}")])


def _worth(cache: Cache) -> str:
    found = label_statistics(cache)
    warning = found["train"].warning
    return tables.markdown(rows_of(found)) + (f"\n\n{warning}" if warning else "")


def limits(cache: Cache) -> str:
    """What to know before one relies on the labels: their errors, and whether the teacher had seen the images."""
    images_K, hits_K = top1_by_class(cache, "val")
    share_K = np.where(images_K > 0, hits_K / np.maximum(1, images_K), np.inf)
    worst = int(share_K.argmin())
    singles = [row for row in cache.header.teachers if not row.members]
    lines = [
        f"The top class is wrong for {1 - hits_K.sum() / max(1, images_K.sum()):.1%} of the val images; of "
        f"{cache.classes[worst]}, the worst class, it is right for {share_K[worst]:.1%} of {images_K[worst]:,}.",
        *(f"{text[0].upper()}{text[1:]}." for text in describe_labels(cache)),
    ]
    if any(row.trained_on == "elsewhere" for row in singles):
        lines.append("The teacher was trained elsewhere: whether it has seen images of val is not known.")
    elif not cache.is_out_of_fold:
        lines.append("The teacher was trained on images of train, so its labels of train are surer than those of val.")
    if cache.header.top_k:
        lines.append(f"Of each view the {cache.header.top_k} largest logits are kept, of the others their mass.")
    return " ".join(lines)
