"""A cache as a folder to publish: Parquet, a data card, a Croissant file, and labels.json with what the Parquet files
lack. It gives back the cache it was made from.

No image is in the folder: paths and digests of their contents say which images the labels belong to.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py

from kd_dist.cache.assemble import assemble
from kd_dist.cache.format import PUBLISHED, Header, TeacherRow, checksum_file_of
from kd_dist.cache.plan import CachePlan
from kd_dist.cache.reader import Cache
from kd_dist.errors import UserError
from kd_dist.files import disk_full, new_folder, publish, read_json, sha256_of, write_atomically, write_json, writing
from kd_dist.publish.card import data_card
from kd_dist.publish.croissant import croissant
from kd_dist.publish.parquet import block_reader, read_table, write_split
from kd_dist.version import commit, software

FORMAT, VERSION = "kd_dist.published_labels", 1
CARD, CROISSANT = "README.md", "croissant.json"


@dataclass(frozen=True)
class Statement:
    """What the publisher says of a set of labels and no file knows; None where nothing was said."""

    licence: str | None = None  # of the labels, as the Hub names licences
    teacher_licence: str | None = None
    source: str | None = None  # of the images
    intended_use: str | None = None
    creator: str | None = None


def export(cache: Cache, target: Path, statement: Statement) -> None:
    """Write the folder whole, or nothing. Raises UserError where it is there and not empty, or cannot be written."""
    with new_folder(target) as folder:
        (folder / "data").mkdir()
        splits = {}
        for name, table in cache.splits.items():
            path = folder / "data" / f"{name}.parquet"
            write_split(path, table, cache.header)
            splits[name] = {
                "file": f"data/{path.name}",
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
                "images": len(table),
                "views": table.views,
                "fingerprint": table.fingerprint,
                "checksum": table.checksum,
            }
        document = {
            "format": FORMAT,
            "version": VERSION,
            "cache": {"sha256": cache.digest, "val_top1": cache.val_top1, "header": asdict(cache.header)},
            "splits": splits,
            "statement": asdict(statement),
            "exported_by": {"software": software(), "commit": commit()},
        }
        write_json(folder / PUBLISHED, document)
        write_json(folder / CROISSANT, croissant(cache, target.resolve().name, document))
        (folder / CARD).write_text(data_card(cache, target.resolve().name, document), encoding="utf-8")


def restore(folder: Path, target: Path) -> bool:
    """Write the cache that a folder was made from, with its checksum file; whether it is the original to the byte,
    as it is with the same version of HDF5. Its columns always are.

    Raises UserError: the folder is none, a file is missing or another, `target` is there or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} exists already: move it away, or choose another place for the new one.")
    document = _read(folder)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with writing(target, "from the start"):
            digest = _assembled(folder, document, temporary)
            text = f"{digest}  {target.name}\n"
            write_atomically(checksum_file_of(target), lambda file: file.write(text.encode()))
            publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return digest == document["cache"]["sha256"]


def _assembled(folder: Path, document: Mapping[str, Any], temporary: Path) -> str:
    """Write the cache to `temporary`: its hex SHA-256."""
    paths = {name: folder / split["file"] for name, split in document["splits"].items()}
    for name, path in paths.items():
        _require_digest(folder, path, document["splits"][name]["sha256"])
    try:
        header = _header(document["cache"]["header"])
        plan = CachePlan(header, {name: read_table(path, header) for name, path in paths.items()})
        plan.check()
        digest = assemble(temporary, plan, block_reader(paths, header))
        with h5py.File(temporary, locking=False) as file:
            found = {name: file.attrs[f"{name}_checksum"].decode() for name in paths}
    except (ValueError, KeyError, TypeError, NotImplementedError, OSError) as error:  # pyarrow raises any of them
        if isinstance(error, OSError) and (error.errno is not None or disk_full(error)):
            raise
        raise UserError(_damaged(folder, str(error))) from error
    for name, checksum in found.items():
        if checksum != document["splits"][name]["checksum"]:
            raise UserError(_damaged(folder, f"the columns of {name} do not have the checksum that {PUBLISHED} names"))
    return digest


def _require_digest(folder: Path, path: Path, expected: str) -> None:
    if not path.is_file():
        raise UserError(_damaged(folder, f"{path.relative_to(folder)} is missing"))
    if (found := sha256_of(path)) != expected:
        raise UserError(
            _damaged(folder, f"{path.relative_to(folder)} has SHA-256 {found}, {PUBLISHED} names {expected}")
        )


def _read(folder: Path) -> dict[str, Any]:
    """labels.json. Raises UserError where it is missing, damaged or of another version."""
    document = read_json(folder / PUBLISHED, "get the folder again from where it was published.")
    if document is None:
        raise UserError(f"{folder} holds no {PUBLISHED}: name a folder that `python -m kd_dist.cache export` wrote.")
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise UserError(f"{folder / PUBLISHED} is not of version {VERSION} of published labels: update kd_dist.")
    if bad := [name for name, split in document["splits"].items() if split["file"] != f"data/{name}.parquet"]:
        raise UserError(_damaged(folder, f"the file of {bad[0]} is not data/{bad[0]}.parquet"))
    return document


def _header(values: Mapping[str, Any]) -> Header:
    """A header as it was before it became JSON: with tuples and rows of teachers."""
    teachers = tuple(TeacherRow(**row) for row in values["teachers"])
    own: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Header(**(own | {"teachers": teachers}))


def _damaged(folder: Path, reason: str) -> str:
    return f"{folder} is damaged ({reason:.300}): get it again from where it was published."
