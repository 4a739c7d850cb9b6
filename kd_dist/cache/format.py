"""What a cache file holds: names, types and shapes, and the checks that the writer and the reader share.

docs/cache-format.md describes the same file for people who read it without this package. Nothing here knows of images,
networks or training.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from kd_dist.cache.mixed import MIXED_VIEWS, Mixed, check_mixed
from kd_dist.fingerprint import UNKNOWN, fingerprint_of

FORMAT = "kd_dist.teacher_cache"
VERSION = 2
PUBLISHED = "labels.json"  # in a folder that a cache was exported to
ONE_TEMPERATURE = "one_temperature"
TOP_K = "top_k"  # of each row the k largest logits and the mass of the others, see kd_dist.cache.topk
UNLABELLED_IMAGES = "unlabelled_images"  # some images of train have the label UNKNOWN
# Those that describe images and views, and are kept with these when others label them.
TABLE_FEATURES: frozenset[str] = frozenset({MIXED_VIEWS, UNLABELLED_IMAGES})
KNOWN_FEATURES: frozenset[str] = TABLE_FEATURES | {ONE_TEMPERATURE, TOP_K}
SPLITS = ("train", "val")
PIECE_BYTES = 1 << 22  # of a column that is looked at from end to end

INT, FLOAT, FLAG = np.dtype("<i8"), np.dtype("<f8"), np.dtype("u1")
TEXT = np.dtype("S")  # fixed-length UTF-8, as long as its longest value needs
HEADER_ATTRIBUTES = {  # field of Header -> type and shape of the file's attribute of that name
    "dataset": (TEXT, ()),
    "image_size": (INT, ()),
    "mean": (FLOAT, (3,)),
    "std": (FLOAT, (3,)),
    "renderer": (TEXT, ()),
    "compute_dtype": (TEXT, ()),
    "view_rule": (TEXT, ()),
    "crop_scale": (FLOAT, (2,)),
    "mixed_share": (FLOAT, ()),
    "seed": (INT, ()),
    "created": (TEXT, ()),
    "software": (TEXT, ()),
}
CHECK_ATTRIBUTES = {"val_top1": FLOAT, "train_checksum": TEXT, "val_checksum": TEXT}  # recomputed on opening
TEMPERATURE = ("temperature", FLOAT)  # an attribute of files that require ONE_TEMPERATURE
TEACHER_COLUMNS = {  # field of TeacherRow -> type of /teachers/<field>
    "sha256": TEXT,
    "arch": TEXT,
    "seed": INT,
    "fold": INT,
    "image_size": INT,
    "val_top1": FLOAT,
    "folds": INT,
    "members": TEXT,
}


@dataclass(frozen=True)
class Column:
    """One dataset of a split: its name, the field of Table it holds, its type, its axes.

    An axis is N (samples), V (views), K (classes) or a number.
    """

    name: str
    field: str
    dtype: np.dtype
    axes: tuple[str | int, ...]


PATH = Column("path", "paths", TEXT, ("N",))
NUMBERS = (
    Column("bytes", "bytes_N", INT, ("N",)),
    Column("sha256", "sha256_N32", np.dtype("u1"), ("N", 32)),
    Column("label", "labels_N", INT, ("N",)),
    Column("teacher", "teacher_N", np.dtype("<i2"), ("N",)),
    Column("view/box", "box_NV4", np.dtype("<i2"), ("N", "V", 4)),
    Column("view/flip", "flip_NV", np.dtype("u1"), ("N", "V")),
)
MIXED = (  # of Table.mixed, in files that require MIXED_VIEWS
    Column("view/partner", "partner_NV", np.dtype("<i4"), ("N", "V")),
    Column("view/partner_view", "partner_view_NV", np.dtype("<i2"), ("N", "V")),
    Column("view/weight", "weight_NV", np.dtype("<f4"), ("N", "V")),
    Column("view/paste", "paste_NV4", np.dtype("<f4"), ("N", "V", 4)),
)
LOGITS = Column("logits", "logits_NVK", np.dtype("<f2"), ("N", "V", "K"))
TOP_LOGITS = Column("top/logits", "top_NVk", np.dtype("<f2"), ("N", "V", "k"))
TAIL_TEMPERATURES = (math.inf, 8.0, 4.0, 3.0, 2.0, 1.5, 1.25, 1.0)  # nearly even in 1 / T
TAIL = Column("top/tail", "tail_NVG", np.dtype("<f2"), ("N", "V", len(TAIL_TEMPERATURES)))


def top_index(classes: int) -> Column:
    """Which classes the largest logits belong to, in the smallest type that can count them."""
    kind = next(kind for kind in ("u1", "<u2", "<i4") if classes <= np.iinfo(kind).max + 1)
    return Column("top/index", "index_NVk", np.dtype(kind), ("N", "V", "k"))


@dataclass(frozen=True)
class TeacherRow:
    """One teacher whose logits stand in the cache, or a mean of several.

    sha256: hex, over its weights; fold: the fold of train that it was not trained on, -1 when it was trained on all of
    train; image_size: its render size in pixels; val_top1 in [0, 1], None to have the writer fill in the cache's own;
    folds: how many folds train was cut into, 0 where it was not; members: of a mean, the rows it is the mean of,
    "0 1 2", all before its own.
    """

    sha256: str
    arch: str
    seed: int
    fold: int
    image_size: int
    val_top1: float | None
    folds: int = 0
    members: str = ""

    @property
    def member_rows(self) -> tuple[int, ...]:
        """The rows of Header.teachers that this is the mean of; none for a single teacher."""
        return tuple(map(int, self.members.split()))

    @property
    def trained_on(self) -> str:
        """The images it was trained on, in words."""
        if self.seed < 0 and not self.members:
            return "elsewhere"
        return "on all of train" if self.fold < 0 else f"without fold {self.fold} of {self.folds or '?'} of train"


@dataclass(frozen=True)
class Header:
    """What holds for a whole cache: the classes, how views were drawn and rendered, which teachers labelled them.

    image_size: the teachers' render size in pixels; mean, std: by RGB channel, on pixels in [0, 1]; renderer,
    view_rule: names of rules, so that a reader can refuse one it does not know; crop_scale: least and largest share of
    an image's area in a drawn crop; mixed_share: of the drawn views of train; created: ISO 8601, chosen by the caller,
    since the writer reads no clock; features: of KNOWN_FEATURES, what a reader has to understand; temperature: the only
    one at which the logits mean anything, for ONE_TEMPERATURE; top_k: how many logits of a row are stored, 0 for all.
    """

    classes: tuple[str, ...]
    dataset: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    renderer: str
    compute_dtype: str
    view_rule: str
    crop_scale: tuple[float, float]
    seed: int
    created: str
    software: str
    teachers: tuple[TeacherRow, ...]
    mixed_share: float = 0.0
    features: tuple[str, ...] = ()
    temperature: float | None = None
    top_k: int = 0

    @property
    def logit_columns(self) -> tuple[Column, ...]:
        """The columns that hold a teacher's logits of each image in each view."""
        return (top_index(len(self.classes)), TOP_LOGITS, TAIL) if self.top_k else (LOGITS,)

    @property
    def sizes(self) -> dict[str, int]:
        """The lengths of the axes that logits have besides N and V."""
        return {"K": len(self.classes), "k": self.top_k}


def mean_of(rows: Sequence[TeacherRow], members: Sequence[int], how: str = "") -> TeacherRow:
    """The row of a mean of the teachers in these rows; `how` names a mean of anything but logits.

    Its digest is the SHA-256 over those of its members, in hex, in order.
    """
    of = [rows[member] for member in members]
    fold_pairs = {(row.fold, row.folds) for row in of}
    fold, folds = fold_pairs.pop() if len(fold_pairs) == 1 else (-1, 0)
    return TeacherRow(
        sha256=sha256("".join(row.sha256 for row in of).encode()).hexdigest(),
        arch=f"mean{how} of {len(of)}: {', '.join(row.arch for row in of)}",
        seed=-1,
        fold=fold,
        image_size=max(row.image_size for row in of),
        val_top1=None,
        folds=folds,
        members=" ".join(map(str, members)),
    )


@dataclass(frozen=True, eq=False)
class Table:
    """Everything of one split but the logits; row i is sample i in the data's own order.

    A column over N and V is an array, or anything with shape, dtype and an array's [start:stop].
    """

    paths: tuple[str, ...]  # relative to the data folder
    labels_N: np.ndarray  # int64; in train UNKNOWN where there is none
    bytes_N: np.ndarray  # int64, file sizes
    sha256_N32: np.ndarray  # uint8, digests of the files' contents
    teacher_N: np.ndarray  # int16, row of Header.teachers
    box_NV4: np.ndarray  # int16: top, left, height, width in pixels of the decoded image
    flip_NV: np.ndarray  # uint8, 1 where mirrored
    mixed: Mixed | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def numbers(self) -> dict[Column, np.ndarray]:
        """The columns of numbers with their values, those of mixed views last, where there are any."""
        mixed = {} if self.mixed is None else {column: getattr(self.mixed, column.field) for column in MIXED}
        return {column: getattr(self, column.field) for column in NUMBERS} | mixed

    @property
    def of_views(self) -> dict[Column, np.ndarray]:
        """Those of the columns of numbers that describe each view."""
        return {column: values for column, values in self.numbers.items() if "V" in column.axes}

    @property
    def views(self) -> int:
        """V, the number of views of each sample."""
        return self.box_NV4.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of paths, labels and file contents in this order."""
        return fingerprint_of(self.paths, self.labels_N, self.sha256_N32)

    def without_logits(self, **changes: Any) -> "Table":
        """The table alone of what may be a cache's split, with changes."""
        return replace(Table(**{each.name: getattr(self, each.name) for each in fields(Table)}), **changes)


def pieces_of(column: Any) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a column from end to end, a few megabytes at a time."""
    row_bytes = math.prod(column.shape[1:]) * column.dtype.itemsize
    rows = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, column.shape[0], rows):
        yield start, column[start : min(start + rows, column.shape[0])]


def little_endian(values: np.ndarray) -> memoryview:
    """The bytes of an array as a file holds them."""
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return values.reshape(-1).view(np.uint8).data


def digest_of(column: Any) -> str:
    """Hex SHA-256 of a column's bytes, row after row."""
    digest = sha256()
    for _, rows in pieces_of(column):
        digest.update(little_endian(rows))
    return digest.hexdigest()


def checksum_of(fingerprint: str, digests: Iterable[str]) -> str:
    """A split's checksum: hex SHA-256 over its fingerprint and the digests of all its columns but the paths, in hex, in
    the order of Table.numbers and Header.logit_columns.

    It ties logits to images: rows in another order, or under other views, have another checksum.
    """
    return sha256("".join((fingerprint, *digests)).encode()).hexdigest()


def shards_folder_of(target: Path) -> Path:
    """The folder that holds the blocks of an unfinished cache."""
    return target.with_name(target.name + ".shards")


def checksum_file_of(target: Path) -> Path:
    """The file beside a cache that holds its SHA-256, as `sha256sum` writes it."""
    return target.with_name(target.name + ".sha256")


def hits_of(top: np.ndarray, labels_B: np.ndarray, header: Header) -> int:
    """How many rows have their label as the first class, from the first logit column [B, K or k] of one view."""
    return int(hit_rows(top, labels_B, header).sum())


def hit_rows(top: np.ndarray, labels_B: np.ndarray, header: Header) -> np.ndarray:
    """Which of those rows they are: bool [B]."""
    class_B = top[:, 0] if header.top_k else top.argmax(axis=1)
    return class_B == labels_B


def val_top1_of(header: Header, column: Any, labels_N: np.ndarray) -> float:
    """Top-1 in [0, 1] of val's view 0, from its first logit column."""
    hits = (hits_of(rows[:, 0], labels_N[start : start + len(rows)], header) for start, rows in pieces_of(column))
    return sum(hits) / len(labels_N)


def first_true(marks_N: np.ndarray) -> int | None:
    """Index of the first true element, or None."""
    return int(np.argmax(marks_N)) if marks_N.any() else None


def shape_of(axes: tuple[str | int, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that axes have when the named ones have these sizes."""
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)


def row_bytes(column: Column, header: Header) -> int:
    """What one image in one view takes in a column over N and V."""
    return math.prod(shape_of(column.axes[2:], header.sizes)) * column.dtype.itemsize


def check_header(header: Header) -> None:
    """Raise ValueError where a header holds values that cannot be."""
    if not header.classes or len(set(header.classes)) < len(header.classes):
        raise ValueError(f"{len(header.classes)} classes have {len(set(header.classes))} names")
    if header.image_size < 1:
        raise ValueError(f"image_size is {header.image_size}")
    if not (np.isfinite([header.mean, header.std]).all() and min(header.std) > 0):
        raise ValueError(f"mean is {header.mean} and std {header.std}")
    if unknown := set(header.features) - KNOWN_FEATURES:
        raise ValueError(f"the features {', '.join(sorted(unknown))} are not known")
    if (TOP_K in header.features) != bool(header.top_k) or not 0 <= header.top_k < len(header.classes):
        raise ValueError(f"top_k is {header.top_k} of {len(header.classes)} classes, with features {header.features}")
    if not header.teachers:
        raise ValueError("there is no teacher")
    for number, row in enumerate(header.teachers):
        _check_teacher(number, row)
    _check_temperature(header)
    _check_views(header)


def _check_teacher(number: int, row: TeacherRow) -> None:
    if row.val_top1 is not None and not 0 <= row.val_top1 <= 1:
        raise ValueError(f"val_top1 of a teacher is {row.val_top1}")
    if row.fold < -1 or (row.folds and row.fold >= row.folds):
        raise ValueError(f"fold of a teacher is {row.fold} of {row.folds}")
    if not all(0 <= member < number for member in row.member_rows):
        raise ValueError(f"teacher {number} is the mean of the rows {row.members}")


def _check_temperature(header: Header) -> None:
    temperature = header.temperature
    fits = temperature is None or 0 < temperature < np.inf
    if not fits or (temperature is not None) != (ONE_TEMPERATURE in header.features):
        raise ValueError(f"temperature is {temperature} with the features {list(header.features)}")


def _check_views(header: Header) -> None:
    low, high = header.crop_scale
    if not 0 <= low <= high <= 1:
        raise ValueError(f"crop_scale is {header.crop_scale}")
    if not 0 <= header.mixed_share <= 1 or (header.mixed_share > 0) != (MIXED_VIEWS in header.features):
        raise ValueError(f"mixed_share is {header.mixed_share} with the features {list(header.features)}")


def check_table(split: str, table: Table, header: Header) -> None:
    """Raise ValueError where columns have the wrong type or length, or hold values that cannot be."""
    sizes = {"N": len(table), "V": table.views}
    if min(sizes.values()) < 1:
        raise ValueError(f"{split} has {len(table)} samples and {table.views} views")
    if (table.mixed is not None) != (MIXED_VIEWS in header.features):
        raise ValueError(f"the columns of mixed views in {split} do not fit the features {list(header.features)}")
    for column, values in table.numbers.items():
        _check_shape(split, column, values, sizes)
    if len(set(table.paths)) < len(table):
        raise ValueError(f"{split}/path holds a path twice")
    _check_labels(split, table.labels_N, header)
    refuse_rows(split, "teacher", table.teacher_N, lambda row_B: (row_B < 0) | (row_B >= len(header.teachers)))
    refuse_rows(split, "view/flip", table.flip_NV, lambda flip_BV: flip_BV >= 2)
    refuse_rows(split, "view/box", table.box_NV4, lambda box_BV4: box_BV4 < (0, 0, 1, 1))
    if table.mixed is not None:
        check_mixed(split, table.mixed, table.teacher_N)


def _check_labels(split: str, labels_N: np.ndarray, header: Header) -> None:
    may_lack = split == "train" and UNLABELLED_IMAGES in header.features
    least = UNKNOWN if may_lack else 0
    refuse_rows(split, "label", labels_N, lambda label_B: (label_B < least) | (label_B >= len(header.classes)))
    unlabelled = int((labels_N == UNKNOWN).sum())
    if may_lack and not 0 < unlabelled < len(labels_N):
        raise ValueError(f"{unlabelled} of {len(labels_N)} images of train have no label, with {UNLABELLED_IMAGES}")


def refuse_rows(split: str, name: str, column: Any, is_bad: Callable[[np.ndarray], np.ndarray], what: str = "") -> None:
    """Raise ValueError with the first row of a column in which `is_bad` marks a value; `what` is wrong with it."""
    for start, rows in pieces_of(column):
        place = first_true(np.any(is_bad(rows).reshape(len(rows), -1), axis=1))
        if place is not None:
            raise ValueError(f"{split}/{name} of row {start + place} {what or f'is {rows[place].tolist()}'}")


def _check_shape(split: str, column: Column, values: np.ndarray, sizes: Mapping[str, int]) -> None:
    shape = shape_of(column.axes, sizes)
    if values.dtype != column.dtype or values.shape != shape:
        found = f"{values.dtype} {list(values.shape)}"
        raise ValueError(f"{split}/{column.name} is {found} instead of {column.dtype} {list(shape)}")
