"""Opening a cache: every reason to refuse one, in order, before a row of it is used.

The columns over samples and views are mapped, not loaded: the processes of a node share one copy of them in memory.
"""

import mmap
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kd_dist.cache.fits import Pair, Samples, check_classes, check_samples
from kd_dist.cache.format import (
    CHECK_ATTRIBUTES,
    FLAG,
    FLOAT,
    FORMAT,
    HEADER_ATTRIBUTES,
    INT,
    KNOWN_FEATURES,
    MIXED,
    NUMBERS,
    ONE_TEMPERATURE,
    PATH,
    PUBLISHED,
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
    check_header,
    check_table,
    checksum_file_of,
    checksum_of,
    digest_of,
    refuse_rows,
    shards_folder_of,
    val_top1_of,
)
from kd_dist.cache.mixed import MIXED_VIEWS, Mixed
from kd_dist.cache.structure import Columns, attribute
from kd_dist.cache.topk import TopK
from kd_dist.errors import UserError
from kd_dist.files import sha256_of

TEMPERED_LOSSES = ("kl", "ce")  # those that use nothing of a row but its probabilities at --temperature
SIGNATURE = b"\x89HDF\r\n\x1a\n"
WRITE_ONE = "`python -m kd_dist.cache write --help` shows how a finished teacher writes one"
MEND = "copy it again from where it was written, or write it anew: see `python -m kd_dist.cache write --help`"

SoftLabels = np.ndarray | TopK
"""Raw logits float16 [N, V, K], or the top k of them: [index_B, view_B] gives rows, [start:stop] all views of some
samples, [start:stop, view] one view, [:, :v] the first views alone.
"""

OnceANode = Callable[[str, Callable[[], Any]], Any]
"""(task, work) -> the plain JSON that `work` gives, done by one process of each node, and its UserError on all."""


def in_this_process(_task: str, work: Callable[[], Any]) -> Any:
    """As OnceANode where there is one process."""
    return work()


@dataclass(frozen=True, eq=False)
class LabelledTable(Table):
    """A split as it stands in a cache: its columns and the raw logits. Arrays over N and V are read-only."""

    logits_NVK: SoftLabels

    @property
    def logit_columns(self) -> tuple[np.ndarray, ...]:
        """What is stored of the logits, in the order of Header.logit_columns."""
        return self.logits_NVK.columns if isinstance(self.logits_NVK, TopK) else (self.logits_NVK,)

    @property
    def checksum(self) -> str:
        """The split's checksum, computed from all its columns."""
        return checksum_of(self.fingerprint, map(digest_of, (*self.numbers.values(), *self.logit_columns)))


@dataclass(frozen=True, eq=False)
class Cache:
    """A cache that was verified, mapped into memory. Pickled, it is the file's name and identity: who unpickles it maps
    the same file again.
    """

    path: Path
    digest: str  # hex SHA-256 of the file
    header: Header
    splits: Mapping[str, LabelledTable]
    has_checksum: bool = False  # whether the checksum file beside it names this digest
    identity: tuple[int, ...] = ()  # of the mapped file, see identity_of

    def __reduce__(self) -> tuple[Callable[..., "Cache"], tuple[Any, ...]]:
        return _remapped, (self.path, self.digest, self.has_checksum, self.identity)

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
        """Whether each teacher labelled the fold of train that it was not trained on, and val has the mean of all."""
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
        return val_top1_of(self.header, val.logit_columns[0], val.labels_N)

    def split(self, name: str) -> LabelledTable:
        """The rows of "train" or "val"."""
        return self.splits[name]

    def fingerprint(self, name: str) -> str:
        """The digest of a split's paths, labels and contents, computed from the cache's own columns."""
        return self.split(name).fingerprint

    def require_unchanged(self) -> None:
        """Raise UserError where the mapped file was changed in place; a new time stamp alone is no change."""
        try:
            now = identity_of(self.path.stat())
        except OSError:
            return
        if now != self.identity and now[-1] == self.identity[-1] and sha256_of(self.path) != self.digest:
            raise UserError(
                f"the cache {self.path} was changed while this run was reading it, so what the run learned since is of "
                "no use: put the file back, and start the run again with --start-over."
            )

    def check_fits(self, dataset: str, classes: Sequence[str], splits: Mapping[str, Samples]) -> None:
        """Raise UserError, naming both values, unless this is a cache of exactly these images in this order.

        `dataset` is the data's name for messages; `splits` maps "train" and "val" to anything with paths, labels_N
        and sha256_N32.
        """
        names = Pair(f"the cache {self.path} (of {self.header.dataset})", dataset)
        check_classes(names, self.classes, tuple(classes))
        for name in SPLITS:
            check_samples(names, name, self.split(name), splits[name])

    def check_loss(self, loss: str, temperature: float) -> None:
        """Raise UserError where the logits hold at one temperature only, and the loss needs another one, or none."""
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


def open_cache(path: Path, once_a_node: OnceANode = in_this_process) -> Cache:
    """Verify a cache from end to end and map it, or raise UserError with the first reason not to use it.

    One process of each node verifies; the others rely on that for as long as the file's size, time of change and inode
    are the same. The file's digest is compared with the checksum file beside it before HDF5 parses a byte: checksums
    inside cannot vouch for the metadata that leads to them. A file without a checksum file is read with all other
    checks; see `has_checksum`.
    """
    path, verified = Path(path), []

    def verify() -> dict[str, Any]:
        cache = _verified(path)
        verified.append(cache)
        return {"digest": cache.digest, "has_checksum": cache.has_checksum, "identity": cache.identity}

    found = once_a_node(f"verify {path}", verify)
    if verified:
        return verified[0]
    return _remapped(path, found["digest"], found["has_checksum"], tuple(found["identity"]))


def _remapped(path: Path, digest: str, has_checksum: bool, identity: tuple[int, ...]) -> Cache:
    """Map a cache that was verified already. Raises UserError where the file is another one by now."""
    cache, _ = _mapped(path, digest, has_checksum)
    _require_identity(path, identity, cache.identity)
    return cache


def _verified(path: Path) -> Cache:
    """Map a cache and check everything about it."""
    with _refusing(path):
        before = identity_of(path.stat())
        _require_hdf5(path)
        digest = sha256_of(path)
    cache, stored = _mapped(path, digest, _has_checksum(path, digest))
    with _damage_named(path):
        _check_values(cache, stored)
    _require_identity(path, before)
    return cache


def identity_of(status: os.stat_result) -> tuple[int, ...]:
    """Size, time of change and inode of a file: another file, or another content, hardly has the same."""
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def _require_identity(path: Path, expected: tuple[int, ...], found: tuple[int, ...] = ()) -> None:
    """Raise UserError unless a file, by default the one that has this name now, has this identity."""
    with _refusing(path):
        found = found or identity_of(path.stat())
    if found != expected:
        raise UserError(f"the cache {path} was replaced while it was being opened: run the same command again.")


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Raise UserError where the system has no such file or does not let it be read."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(_why_missing(path)) from None
    except IsADirectoryError:
        raise UserError(_why_no_file(path)) from None
    except OSError as error:
        raise UserError(f"the cache {path} cannot be read ({error.strerror}): name another with --cache.") from None


def _require_hdf5(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(len(SIGNATURE))
    if not start:
        raise UserError(f"the cache {path} is empty: {MEND}.")
    if start != SIGNATURE:
        raise UserError(f"{path} is not an HDF5 file: name a cache of soft labels with --cache, or {WRITE_ONE}.")


def _why_missing(path: Path) -> str:
    shards = shards_folder_of(path)
    if shards.is_dir():
        return (
            f"the cache {path} is not finished, {shards} holds its shards: run the command that was writing it again."
        )
    return f"there is no cache {path}: {WRITE_ONE}."


def _why_no_file(path: Path) -> str:
    if (path / PUBLISHED).is_file():
        folder = shlex.quote(str(path))
        return f"{path} is an exported cache: write one to read by `python -m kd_dist.cache import {folder} -o FILE`."
    return f"the cache {path} is a folder: name a file such as {path / 'logits.h5'}, or {WRITE_ONE}."


def _has_checksum(path: Path, digest: str) -> bool:
    """Whether the checksum file names this digest; False where there is none, UserError where it names another."""
    beside = checksum_file_of(path)
    try:
        named = re.findall(r"^\\?([0-9a-f]{64}) ", beside.read_text(errors="replace"), re.MULTILINE)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(
            f"{beside} cannot be read ({error.strerror}): copy it again from beside the original."
        ) from None
    if digest not in named:
        expected = " or ".join(named) or "no SHA-256"
        raise UserError(f"the cache {path} has SHA-256 {digest}, but {beside.name} has {expected}: {MEND}.")
    return True


def _mapped(path: Path, digest: str, has_checksum: bool) -> tuple[Cache, dict[str, Any]]:
    """Map a cache, and refuse what is not a whole and finished cache of this version by its structure. Its values are
    to be checked against the values of CHECK_ATTRIBUTES, given beside it.
    """
    with _damage_named(path), _refusing(path), open(path, "rb") as raw:
        identity = identity_of(os.fstat(raw.fileno()))
        mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    with _damage_named(path), h5py.File(path, "r", locking=False) as file:
        _refuse_other_formats(path, file)
        if attribute(file, "complete", FLAG, ()) != 1:
            raise UserError(f"the cache {path} is half-written: run the command that was writing it again.")
        columns = Columns(file, mapped)
        header = _read_header(file, columns)
        splits = {split: _read_split(columns, split, header) for split in SPLITS}
        stored = {name: attribute(file, name, dtype, ()) for name, dtype in CHECK_ATTRIBUTES.items()}
    _require_identity(path, identity)  # HDF5 opened the file by its name once more
    return Cache(path, digest, header, splits, has_checksum, identity), stored


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
    if "format" not in file.attrs or attribute(file, "format", TEXT, ()) != FORMAT:
        raise UserError(
            f"{path} is an HDF5 file, but not a cache of soft labels: name one with --cache, or {WRITE_ONE}."
        )
    version = int(attribute(file, "version", INT, ()))
    if version != VERSION:
        mend = "update kd_dist" if version > VERSION else "write it anew: see `python -m kd_dist.cache write --help`"
        raise UserError(f"the cache {path} has format version {version}, this kd_dist reads {VERSION}: {mend}.")
    unknown = sorted(set(attribute(file, "required_features", TEXT, None)) - KNOWN_FEATURES)
    if unknown:
        raise UserError(f"the cache {path} uses {', '.join(unknown)}, unknown to this kd_dist: update kd_dist.")


def _read_header(file: h5py.File, columns: Columns) -> Header:
    classes = columns.read("classes", TEXT, ("K",), {})
    sizes: dict[str, int] = {}
    teachers = [columns.read(f"teachers/{name}", dtype, ("T",), sizes) for name, dtype in TEACHER_COLUMNS.items()]
    rows = (dict(zip(TEACHER_COLUMNS, row, strict=True)) for row in zip(*teachers, strict=True))
    values = {name: attribute(file, name, *kind) for name, kind in HEADER_ATTRIBUTES.items()}
    features = attribute(file, "required_features", TEXT, None)
    if ONE_TEMPERATURE in features:
        values["temperature"] = attribute(file, *TEMPERATURE, ())
    if TOP_K in features:
        values["top_k"] = _top_k_of(file, columns)
    header = Header(classes=classes, teachers=tuple(TeacherRow(**row) for row in rows), features=features, **values)
    check_header(header)
    return header


def _top_k_of(file: h5py.File, columns: Columns) -> int:
    """How many logits of a row are stored. Raises ValueError where the tail is kept for other temperatures."""
    found = attribute(file, "tail_temperatures", FLOAT, (len(TAIL_TEMPERATURES),))
    if found != TAIL_TEMPERATURES:
        raise ValueError(f"tail_temperatures are {found} instead of {TAIL_TEMPERATURES}")
    return columns.length_of(f"train/{TOP_LOGITS.name}", 2)


def _read_split(columns: Columns, split: str, header: Header) -> LabelledTable:
    sizes = dict(header.sizes)

    def read(column: Column) -> Any:
        return columns.read(f"{split}/{column.name}", column.dtype, column.axes, sizes)

    values = {column.field: read(column) for column in (PATH, *NUMBERS)}
    logits = {column.field: read(column) for column in header.logit_columns}
    if header.top_k:
        logits = {"logits_NVK": TopK(**logits, classes=len(header.classes))}
    if MIXED_VIEWS in header.features:
        values["mixed"] = Mixed(**{column.field: read(column) for column in MIXED})
    return LabelledTable(**logits, **values)


def _check_values(cache: Cache, stored: Mapping[str, Any]) -> None:
    """Raise ValueError where a value cannot be, or a checksum is not the one that was stored."""
    for split, table in cache.splits.items():
        check_table(split, table, cache.header)
        for column, values in zip(cache.header.logit_columns, table.logit_columns, strict=True):
            if column.dtype.kind == "f":
                refuse_rows(split, column.name, values, lambda rows: ~np.isfinite(rows), "are not all finite")
            else:
                refuse_rows(split, column.name, values, partial(_is_no_choice, len(cache.classes)))
    if cache.val_top1 != stored["val_top1"]:
        raise ValueError(
            f"val top-1 of view 0 is {cache.val_top1:.6f} but stored as {stored['val_top1']:.6f}, so logits and labels "
            "do not belong together"
        )
    for split, table in cache.splits.items():
        found, expected = table.checksum, stored[f"{split}_checksum"]
        if found != expected:
            raise ValueError(
                f"the columns of {split} have checksum {found[:16]}... but {expected[:16]}... was stored, so they are "
                "not those, or not in the order, that were written"
            )


def _is_no_choice(classes: int, index_BVk: np.ndarray) -> np.ndarray:
    """Which rows do not name k different classes."""
    ascending_BVk = np.sort(index_BVk.astype(np.int64), axis=-1)
    repeats_BV = (np.diff(ascending_BVk, axis=-1) == 0).any(axis=-1)
    return repeats_BV | (ascending_BVk[..., 0] < 0) | (ascending_BVk[..., -1] >= classes)
