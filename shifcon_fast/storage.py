"""Files and folders that are whole or do not count, and the only readers of them.

Writing: an update is written into a staging folder inside the folder it is for, brought to the disk, and then its
files are renamed into place. A folder counts as long as its *card* (one JSON file) is there, so the card is deleted
before the first rename and is itself the last one: killed at any moment, an update leaves the old state, the new
one, or a folder without a card, and never a mixture that a reader takes for whole. One writer at a time.

Reading: looks and never touches. What a file must hold is said by a type, and checked before anything is used; a
card holds the SHA-256 of the tensor files beside it, so that damaged and mixed-up files are noticed too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import reprlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

T = TypeVar("T")

_STAGING = ".saving-"
_JSON_TYPES = {
    dict: "object",
    list: "list",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def cache_root() -> Path:
    """``$SHIFCON_CACHE``, or ``~/.cache/shifcon_fast``: what is kept for later runs, and can be made anew."""
    return Path(os.environ.get("SHIFCON_CACHE") or Path.home() / ".cache" / "shifcon_fast").expanduser()


def staging_folder(folder: str | Path, card: str) -> Path:
    """Where :func:`replacing` has the files of ``card`` written; processes that help the writer need to know."""
    return Path(folder) / f"{_STAGING}{Path(card).name}"


@contextmanager
def replacing(folder: str | Path, card: str, others: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty staging folder; on success its files replace those of ``folder``, the card last.

    If the body raises (a full disk, Ctrl-C), ``folder`` stays as it was. If the process is killed, it stays as it
    was or, in the moment of the renames, has no card; the next update sets that right.

    Args:
        folder: made if need be. Its other files stay.
        card: path inside of ``folder`` of the file that makes the rest count; the body must write it.
        others: paths of further files that belong to the card and are deleted if the body does not write them.

    Raises:
        FileNotFoundError: the body wrote no card.
        OSError: what is to be replaced lies behind a link that leads out of the folder.
    """
    folder, staging = Path(folder), staging_folder(folder, card)
    folder.mkdir(parents=True, exist_ok=True)
    _delete(staging)  # of a writer that died
    staging.mkdir()
    try:
        yield staging
        names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        if card not in names:
            raise FileNotFoundError(f"{staging / card}: the update of {folder} has no card")
        for name in names:
            _inside(folder, name)
            _sync_file(staging / name)
        retract(folder, card, (name for name in others if name not in names))
        for name in [name for name in names if name != card]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, folder / name)
        _sync_folders(folder, names)
        (folder / card).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / card, folder / card)
        _sync_folders(folder, [card])
    finally:
        _delete(staging)


def retract(folder: str | Path, card: str, others: Iterable[str] = ()) -> None:
    """Delete a card and then the files that belong to it: whenever it is interrupted, nothing counts any more."""
    folder = Path(folder)
    for name in (card, *others):
        target = _inside(folder, name)
        if target.is_symlink() or target.exists():
            target.unlink()
            _sync_folders(folder, [name])


def remove(folder: str | Path, card: str) -> None:
    """Delete a whole folder, its card first; of a link only the link."""
    folder = Path(folder)
    if not folder.is_symlink():
        retract(folder, card)
    _delete(folder)


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file atomically: the old one stays whole until the new one is on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        temporary.write_bytes(content)
        _sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Write ``value`` as UTF-8 JSON, atomically; on one line where ``indent`` is None."""
    write_file(path, (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode())


@overload
def read_json(path: str | Path, what: str, *, wanted: Mapping[str, Any] | None = None) -> dict[str, Any]: ...
@overload
def read_json(
    path: str | Path, what: str, shape: type[T], *, wanted: Mapping[str, Any] | None = None
) -> T: ...
def read_json(
    path: str | Path, what: str, shape: Any = dict[str, Any], *, wanted: Mapping[str, Any] | None = None
) -> Any:
    """Read a JSON object and check every value of it.

    Args:
        path: the file.
        what: what it should have been, for the error.
        shape: a dataclass, ``TypedDict`` or other type that pydantic knows; types are taken as they are written,
            an ``int`` is neither 1.0 nor True. A ``ValueError`` of ``__post_init__`` counts as a wrong value.
        wanted: keys with the only value they may have (format and version). They are looked at first, so that a
            file of another version is called that, and not damaged.

    Returns:
        An instance of ``shape``.

    Raises:
        ValueError: no such file, not JSON, or not of this shape; the message names the file and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; wanted {what}")
    content = path.read_bytes()
    head = _parse(path, content, what, dict[str, Any])
    _check_integers(path, head)
    for name, value in (wanted or {}).items():
        found = head.get(name)
        if found != value or isinstance(found, bool):
            reads = "this release reads" if name == "format_version" else "wanted"
            raise ValueError(f"{path}: {name} is {reprlib.repr(found)}; {reads} {value!r}")
    return head if shape == dict[str, Any] else _parse(path, content, what, shape)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: no such file, or not safetensors; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; wanted tensors")
    try:
        return load_file(path)
    except Exception as error:  # headers that lie raise what they like in safetensors and in torch
        raise ValueError(f"{path}: not a safetensors file that can be read ({error})") from error


def read_metadata(path: str | Path, key: str, what: str, shape: type[T]) -> T:
    """Read one entry of a safetensors file's metadata, JSON, and check every value of it as :func:`read_json` does.

    Raises:
        ValueError: no such file or entry, or not of this shape; the message names the file.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as tensors:
            entry = (tensors.metadata() or {}).get(key)
    except Exception as error:
        raise ValueError(f"{path}: not a safetensors file that can be read ({error})") from error
    if entry is None:
        raise ValueError(f"{path}: its metadata lacks {key!r}; wanted {what}")
    result: T = _parse(path, entry.encode(), what, shape)
    return result


def verify(path: str | Path, sha256: str, card: str) -> None:
    """Check that a file is the one that the card beside it was written with.

    Raises:
        ValueError: it is not there, or has another digest.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file, though {card} lies beside it; copy the whole folder")
    if sha256_file(path) != sha256:
        raise ValueError(
            f"{path}: its SHA-256 is not the one in {card}; it was damaged or replaced, copy the whole folder again"
        )


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _parse(path: Path, content: bytes, what: str, shape: Any) -> Any:
    try:
        return _adapter(shape).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ValueError(f"{path}: not valid JSON ({first['msg']}); wanted {what}") from error
        if not first["loc"] and shape == dict[str, Any]:
            kind = _JSON_TYPES.get(type(first["input"]), type(first["input"]).__name__)
            raise ValueError(f"{path}: holds a JSON {kind}; wanted {what}, an object") from error
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise ValueError(f"{path}: lacks {key!r}; wanted {what}") from error
        if first["type"] == "value_error":
            problem = first["msg"].removeprefix("Value error, ")
        else:
            problem = f"{first['msg']}, got {reprlib.repr(first['input'])}"
        raise ValueError(f"{path}: {key and f'{key}: '}{problem}; wanted {what}") from error


def _check_integers(path: Path, value: Any) -> None:
    """Refuse what fits no counter and no axis. The depth of ``value`` is bounded by the parser."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{path}: holds the integer {reprlib.repr(value)}; wanted at most 64 bits")
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            _check_integers(path, each)


def _inside(folder: Path, name: str) -> Path:
    """The place of a file to be written or deleted, unless a link on the way leads out of the folder."""
    target = folder / name
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{target}: lies outside of {folder}, behind a link; nothing was written")
    return target


def _delete(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folders(folder: Path, names: Iterable[str]) -> None:
    """Have the disk know the entries of the folders that hold these files."""
    if os.name != "posix":  # directories cannot be opened for fsync elsewhere
        return
    for each in {folder, *((folder / name).parent for name in names)}:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
