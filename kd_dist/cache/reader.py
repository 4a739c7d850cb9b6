"""Opening a cache: every reason to refuse one, in order, before a row of it is used."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import h5py
import numpy as np

from kd_dist.cache.fits import Pair, check_classes, check_samples
from kd_dist.cache.format import (
    FLAG,
    FLOAT,
    FORMAT,
    HEADER_ATTRIBUTES,
    INT,
    KNOWN_FEATURES,
    LATER_TEACHER_COLUMNS,
    MIXED,
    NUMBERS,
    ONE_TEMPERATURE,
    PATH,
    PROOF_ATTRIBUTES,
    SPLITS,
    TAIL_TEMPERATURES,
    TEACHER_COLUMNS,
    TEMPERATURE,
    TEXT,
    TOP_K,
    TOP_LOGITS,
    VERSION,
    Column,
    Header,
    Table,
    TeacherRow,
    binding_of,
    check_header,
    check_table,
    digest_file_of,
    parts_folder_of,
    pieces_of,
    refuse_rows,
    shape_of,
    val_top1_of,
)
from kd_dist.cache.mixed import MIXED_VIEWS, Mixed
from kd_dist.cache.stored import Source, Stored, state_of, stored
from kd_dist.cache.topk import TopK
from kd_dist.errors import UserError

TEMPERED_LOSSES = ("kl", "ce")  # those that see nothing of a row but its probabilities at --temperature
SIGNATURE = b"\x89HDF\r\n\x1a\n"
GROUPS = ("/", "teachers", *SPLITS, *(f"{split}/view" for split in SPLITS))
MEMORY = 4 << 30  # bytes up to which a cache is loaded whole
WRITE_ONE = "write one with `python -m kd_dist.teacher` or, from a finished teacher, `python -m kd_dist.cache write`"
MEND = "copy it again from where it was written, or write it anew with `python -m kd_dist.cache write`"


SoftLabels = np.ndarray | Stored | TopK
"""Raw logits float16 [N, V, K] in memory, on file, or shortened to the top k: [index_B, view_B] and [start:stop, view]
give rows of them all.
"""


@dataclass(frozen=True, eq=False)
class LabelledTable(Table):
    """A split as it stands in a cache: its columns and the raw logits.

    Where the cache is larger than the memory it was given, what is there for each view stays on file.
    """

    logits_NVK: SoftLabels

    @property
    def row_columns(self) -> tuple[np.ndarray | Stored, ...]:
        """What is stored of the logits, in the order of Header.row_columns."""
        return self.logits_NVK.columns if isinstance(self.logits_NVK, TopK) else (self.logits_NVK,)

    def pieces(self, position: int, view: int) -> Iterator[np.ndarray]:
        """One of the row columns in one view, a chunk of rows at a time."""
        return pieces_of(self.row_columns[position], view)


@dataclass(frozen=True, eq=False)
class Cache:
    """A cache that was read and found good: in memory, or with its rows on file, which is then kept open."""

    path: Path
    digest: str  # hex SHA-256 of the file
    header: Header
    splits: Mapping[str, LabelledTable]
    noted: bool = False  # whether a digest file beside it vouches for it

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position in them."""
        return self.header.classes

    @property
    def teacher_digests(self) -> set[str]:
        """The digests of all teachers; a mean of some is none of them."""
        return {row.sha256 for row in self.header.teachers if not row.members}

    @property
    def is_combined(self) -> bool:
        """Whether the rows of train are means of other caches' rows."""
        return any(self.header.teachers[number].members for number in np.unique(self.split("train").teacher_N))

    @property
    def is_out_of_fold(self) -> bool:
        """Whether val has the mean of the teachers, each of which labelled a part of train that it never saw."""
        of_val = np.unique(self.split("val").teacher_N)
        return not self.is_combined and any(self.header.teachers[number].members for number in of_val)

    @property
    def views(self) -> int:
        """V of train: view 0 is the evaluation view, the others are drawn."""
        return self.split("train").views

    @property
    def val_top1(self) -> float:
        """The teachers' top-1, in [0, 1], on the evaluation view of val."""
        val = self.split("val")
        return val_top1_of(self.header, val.pieces, val.labels_N)

    def split(self, name: str) -> LabelledTable:
        """The rows of "train" or "val"."""
        return self.splits[name]

    def fingerprint(self, name: str) -> str:
        """What binds a split to its data, recomputed from the cache's own columns."""
        return self.split(name).fingerprint

    def check_fits(self, dataset: str, classes: Sequence[str], splits: Mapping[str, object]) -> None:
        """Raise UserError, naming both values, unless this is a cache of exactly these images in this order.

        `dataset` is the data's name for messages; `splits` maps "train" and "val" to anything with paths, labels_N
        and sha256_N32.
        """
        names = Pair(f"the cache {self.path} (of {self.header.dataset})", dataset)
        check_classes(names, self.classes, tuple(classes))
        for name in SPLITS:
            check_samples(names, name, self.split(name), splits[name])

    def check_loss(self, loss: str, temperature: float) -> None:
        """Raise UserError where the rows hold at one temperature only, and this is another one, or a loss without."""
        own = self.header.temperature
        if own is None:
            return
        what = f"{self.path} holds means of probabilities at temperature {own:g}"
        if loss not in TEMPERED_LOSSES:
            raise UserError(
                f"{what}, and --loss {loss} looks at logits; use --loss {' or --loss '.join(TEMPERED_LOSSES)}."
            )
        if temperature != own:
            raise UserError(
                f"{what}, not {temperature:g}: use --temperature {own:g}, or a mean of logits, which holds at any."
            )


def open_cache(path: Path, memory: float = MEMORY) -> Cache:
    """Check a cache from end to end and read it, or raise UserError with the first reason not to use it.

    A file of up to `memory` bytes is loaded whole. Of a larger one the rows stay on file, to be read as they are asked
    for; what is loaded then grows with the number of images, but not with views or classes.

    The file's digest is compared with the one noted beside it before HDF5 parses a byte: checksums inside cannot
    vouch for the metadata that leads to them. A file that came without its note is read with all other checks, and
    says so by `noted`.
    """
    path = Path(path)
    source = _source_of(path)
    digest = source.digest()
    noted = _is_noted(path, digest)
    return replace(_read(source, digest=digest, memory=memory), noted=noted)


def _source_of(path: Path) -> Source:
    try:
        with open(path, "rb") as file:
            start = file.read(len(SIGNATURE))
        source = Source(path)
    except FileNotFoundError:
        raise UserError(_why_missing(path)) from None
    except OSError as error:
        raise UserError(f"the cache {path} cannot be read ({error.strerror}): name another with --cache.") from None
    if not start:
        raise UserError(f"the cache {path} is empty: {MEND}.")
    if start != SIGNATURE:
        raise UserError(f"{path} is not an HDF5 file: name a cache of soft labels with --cache, or {WRITE_ONE}.")
    return source


def _why_missing(path: Path) -> str:
    parts = parts_folder_of(path)
    if parts.is_dir():
        return f"the cache {path} is not finished, {parts} holds its blocks: run the command that was writing it again."
    return f"there is no cache {path}: {WRITE_ONE}."


def _is_noted(path: Path, digest: str) -> bool:
    """Whether the digest file vouches for the file, False where there is none; UserError where it names another."""
    beside = digest_file_of(path)
    try:
        noted = re.findall(r"^\\?([0-9a-f]{64}) ", beside.read_text(errors="replace"), re.MULTILINE)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(
            f"{beside} cannot be read ({error.strerror}): copy it again from beside the original."
        ) from None
    if digest not in noted:
        expected = " or ".join(noted) or "no SHA-256"
        raise UserError(f"the cache {path} has SHA-256 {digest}, but {beside.name} says {expected}: {MEND}.")
    return True


def read_cache(path: Path, *, digest: str, complete: bool = True, memory: float = MEMORY) -> Cache:
    """Everything that follows the digest: read all, and refuse what is not a whole and finished cache of this version.

    `complete=False` leaves that one mark out, for the writer's own scan.
    """
    return _read(Source(path), digest=digest, complete=complete, memory=memory)


def _read(source: Source, *, digest: str, complete: bool = True, memory: float) -> Cache:
    path = source.path
    with _damage_named(path), h5py.File(path, "r", locking=False) as file:
        _refuse_replaced(source)
        _refuse_other_formats(path, file)
        if complete and _attribute(file, "complete", FLAG, ()) != 1:
            raise UserError(f"the cache {path} is half-written: run the command that was writing it again.")
        columns = _Columns(file, path.stat().st_size, source if path.stat().st_size > memory else None)
        header = _read_header(file, columns)
        splits = {split: _read_split(columns, split, header) for split in SPLITS}
        proofs = {name: _attribute(file, name, dtype, ()) for name, dtype in PROOF_ATTRIBUTES.items()}
        cache = Cache(path, digest, header, splits)
        _check_val_top1(cache.val_top1, float(proofs["val_top1"]))
        for split, table in splits.items():
            _check_rows(split, table, proofs[f"{split}_rows"])
    return cache


def _refuse_replaced(source: Source) -> None:
    """HDF5 opens the file by its name once more; rows are read from the one that was digested."""
    if state_of(source.path.stat()) != source.state:
        raise UserError(f"the cache {source.path} was replaced while it was being opened: run the same command again.")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Make one sentence of every error that a damaged file can cause: h5py raises nearly every type there is."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"the cache {path} does not fit in memory ({error}): use a machine with more.") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the cache {path} is damaged ({reason:.300}): {MEND}.") from error


def _refuse_other_formats(path: Path, file: h5py.File) -> None:
    if "format" not in file.attrs or _attribute(file, "format", TEXT, ()) != FORMAT:
        raise UserError(
            f"{path} is an HDF5 file, but not a cache of soft labels: name one with --cache, or {WRITE_ONE}."
        )
    version = int(_attribute(file, "version", INT, ()))
    if version != VERSION:
        raise UserError(f"the cache {path} has format version {version}, this kd_dist reads {VERSION}: update kd_dist.")
    unknown = sorted(set(_attribute(file, "required_features", TEXT, None)) - KNOWN_FEATURES)
    if unknown:
        raise UserError(f"the cache {path} uses {', '.join(unknown)}, unknown to this kd_dist: update kd_dist.")


def _read_header(file: h5py.File, columns: "_Columns") -> Header:
    classes = columns.read("classes", TEXT, ("K",), {})
    sizes: dict[str, int] = {}
    later = {name: dtype for name, dtype in LATER_TEACHER_COLUMNS.items() if name in file["teachers"]}
    names = TEACHER_COLUMNS | later
    teachers = [columns.read(f"teachers/{name}", dtype, ("T",), sizes) for name, dtype in names.items()]
    rows = (dict(zip(names, row, strict=True)) for row in zip(*teachers, strict=True))
    values = {name: _attribute(file, name, *kind) for name, kind in HEADER_ATTRIBUTES.items()}
    features = _attribute(file, "required_features", TEXT, None)
    if ONE_TEMPERATURE in features:
        values["temperature"] = _attribute(file, *TEMPERATURE, ())
    if TOP_K in features:
        values["top_k"] = _top_k_of(file, columns)
    header = Header(classes=classes, teachers=tuple(TeacherRow(**row) for row in rows), features=features, **values)
    check_header(header)
    return header


def _top_k_of(file: h5py.File, columns: "_Columns") -> int:
    """How many logits of a row are stored. Raises ValueError where the tail is kept for other temperatures."""
    found = _attribute(file, "tail_temperatures", FLOAT, (len(TAIL_TEMPERATURES),))
    if found != TAIL_TEMPERATURES:
        raise ValueError(f"tail_temperatures are {found} instead of {TAIL_TEMPERATURES}")
    return columns.length_of(f"train/{TOP_LOGITS.name}", 2)


def _read_split(columns: "_Columns", split: str, header: Header) -> LabelledTable:
    sizes = dict(header.sizes)

    def read(column: Column) -> object:
        return columns.read(f"{split}/{column.name}", column.dtype, column.axes, sizes)

    values = {column.field: read(column) for column in (PATH, *NUMBERS)}
    rows = [read(column) for column in header.row_columns]
    logits_NVK = TopK(*rows, len(header.classes)) if header.top_k else rows[0]
    if MIXED_VIEWS in header.features:
        values["mixed"] = Mixed(*(read(column) for column in MIXED))
    table = LabelledTable(logits_NVK=logits_NVK, **values)
    check_table(split, table, header)
    for column, rows in zip(header.row_columns, table.row_columns, strict=True):
        if column.dtype.kind == "f":
            refuse_rows(split, column.name, rows, _is_not_finite, "are not all finite")
        else:
            refuse_rows(split, column.name, rows, partial(_is_no_choice, len(header.classes)))
    return table


def _is_not_finite(rows_BK: np.ndarray) -> np.ndarray:
    return ~np.isfinite(rows_BK).all(axis=1)


def _is_no_choice(classes: int, index_Bk: np.ndarray) -> np.ndarray:
    """Which rows do not name k different classes."""
    ascending_Bk = np.sort(index_Bk.astype(np.int64), axis=1)
    repeats_B = (np.diff(ascending_Bk, axis=1) == 0).any(axis=1)
    return repeats_B | (ascending_Bk[:, 0] < 0) | (ascending_Bk[:, -1] >= classes)


def _check_val_top1(found: float, stored: float) -> None:
    if found != stored:
        raise ValueError(
            f"val top-1 of view 0 is {found:.6f} but stored as {stored:.6f}, so rows and labels do not belong together"
        )


def _check_rows(split: str, table: LabelledTable, stored: str) -> None:
    found = binding_of(table, len(table.row_columns), table.pieces)
    if found != stored:
        raise ValueError(
            f"the rows of {split} have digest {found[:16]}... but {stored[:16]}... was stored, so they are not in the "
            "order, or not those, that were written"
        )


def _attribute(file: h5py.File, name: str, dtype: np.dtype | None, shape: tuple[int, ...] | None) -> object:
    """The value of an attribute of exactly this type and shape (None: one axis of any length), as plain Python."""
    if name not in file.attrs:
        raise ValueError(f"the attribute {name} is missing")
    stored = file.attrs.get_id(name)
    _check_type(f"the attribute {name}", stored.dtype, dtype)
    if stored.shape != shape and not (shape is None and len(stored.shape) == 1):
        raise ValueError(f"the attribute {name} has shape {list(stored.shape)}")
    return _plain(file.attrs[name])


def _plain(value: np.ndarray | np.generic) -> object:
    """Tuples, strings and numbers of Python instead of numpy's."""
    value = value.tolist()
    if isinstance(value, list):
        return tuple(item.decode() if isinstance(item, bytes) else item for item in value)
    return value.decode() if isinstance(value, bytes) else value


def _check_type(what: str, stored: np.dtype, dtype: np.dtype | None) -> None:
    fits = stored.kind == "S" if dtype is TEXT else stored == dtype
    if not fits:
        raise ValueError(f"{what} is of type {stored} instead of {'fixed-length text' if dtype is TEXT else dtype}")


def _fits(axes: tuple[str | int, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape is what `sizes` say of its axes; named axes that they lack are added."""
    for axis, size in zip(axes, shape, strict=False):
        if isinstance(axis, str):
            sizes.setdefault(axis, size)
    return len(shape) == len(axes) and shape == shape_of(axes, sizes)


class _Columns:
    """Reads columns out of an open file, and raises ValueError on any structure that the writer does not make.

    What is refused could make HDF5 read other files, load code, or fill the memory.
    """

    def __init__(self, file: h5py.File, file_bytes: int, source: Source | None):
        self._file, self._file_bytes, self._source = file, file_bytes, source
        for name in (*GROUPS, *(f"{split}/top" for split in SPLITS if f"{split}/top" in file)):
            self._refuse_links(name)

    def read(self, name: str, dtype: np.dtype | None, axes: tuple[str | int, ...], sizes: dict[str, int]) -> object:
        """All values of a dataset: an array, or a tuple of strings; with a source, columns over N and V stay there.

        Its shape has to be what `sizes` says of its named axes; one that is not in there yet is added.
        """
        dataset = self._dataset(name)
        _check_type(name, dataset.dtype, dtype)
        if not _fits(axes, dataset.shape, sizes):
            raise ValueError(f"{name} has shape {list(dataset.shape)}, which does not fit the other columns")
        self._refuse_hollow(name, dataset)
        if self._source and "V" in axes:
            return stored(dataset, self._source)
        values = dataset[()]  # whole: rows are drawn from memory many times faster than from the file
        return _plain(values) if dtype is TEXT or axes == ("T",) else values

    def length_of(self, name: str, axis: int) -> int:
        """The length of one axis of a dataset."""
        shape = self._dataset(name).shape
        return shape[axis] if axis < len(shape) else 0

    def _refuse_links(self, name: str) -> None:
        group = self._node(name) if name != "/" else self._file
        if not isinstance(group, h5py.Group):
            raise ValueError(f"{name} is not a group")
        for member in group:
            if not isinstance(group.get(member, getlink=True), h5py.HardLink):
                raise ValueError(f"{member} in {name} is a link to elsewhere")

    def _node(self, name: str) -> object:
        node = self._file
        for part in name.split("/"):
            if not isinstance(node, h5py.Group) or part not in node:
                raise ValueError(f"{name} is missing")
            node = node[part]
        return node

    def _dataset(self, name: str) -> h5py.Dataset:
        dataset = self._node(name)
        if not isinstance(dataset, h5py.Dataset):
            raise ValueError(f"{name} is not a dataset")
        made = dataset.id.get_create_plist()
        if made.get_layout() != h5py.h5d.CHUNKED or made.get_external_count():
            raise ValueError(f"{name} is not stored in chunks of this file")
        filters = [made.get_filter(index)[0] for index in range(made.get_nfilters())]
        if filters != [h5py.h5z.FILTER_FLETCHER32]:
            raise ValueError(f"{name} has the filters {filters} instead of a Fletcher-32 checksum alone")
        return dataset

    def _refuse_hollow(self, name: str, dataset: h5py.Dataset) -> None:
        declared, chunk = (prod(shape) * dataset.dtype.itemsize for shape in (dataset.shape, dataset.chunks))
        if max(declared, chunk) > self._file_bytes or dataset.id.get_storage_size() < declared:
            raise ValueError(f"{name} declares {declared} bytes that the file does not hold")
