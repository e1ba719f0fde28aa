"""Rows of one file: JSON Lines, a JSON array, CSV, TSV or Parquet; plain or compressed; UTF-8, or as its mark says.

* JSON Lines: an object a line; blank lines are skipped. A file that begins with ``[`` is a JSON array of objects.
* CSV (``.csv``): a header line, then RFC 4180 with ``,`` or, where the header has it instead, ``;`` or a tab. Every
  row must have the header's number of fields, and a quotation mark that is not closed is an error, so that a stray
  one does not swallow lines.
* TSV (``.tsv``, ``.tab``): a header line; tabs separate, and quotation marks are text like any other.
* Parquet, through pyarrow.

Compression (gzip, bzip2, xz) is told by the first bytes, not by the name. What is refused is refused by name:
spreadsheets and other archives, pickles, Arrow files outside of their dataset folder, zstd, text without a
byte-order mark that is not UTF-8.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.row import Row
from shifcon_fast.extras import needed_for

logger = logging.getLogger(__name__)

FILE_KINDS = "JSON Lines, a JSON array, CSV, TSV or Parquet, also compressed"

_COMPRESSED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
}
_REFUSED = {
    b"PK\x03\x04": "a zip archive or a spreadsheet (.xlsx); unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet (.xls); save it as CSV",
    b"(\xb5/\xfd": "compressed with zstd; unpack it (`zstd -d`), or use gzip",
    b"\x80": "a pickle, or binary; pickles are never read: save the data as JSON Lines",
    b"ARROW1": "an Arrow file; name the folder of the dataset it belongs to, or save it as Parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; name the folder of the dataset it belongs to, or save it as Parquet",
}
_BYTE_ORDER_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LINE_END = re.compile(r"\r\n|\n|\r")  # not str.splitlines, which also breaks at U+2028 inside of a sentence
_COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz")
_DELIMITERS = ",;\t"


def read_file(path: Path) -> list[Row]:
    """Every row of a file.

    Raises:
        DataError: damaged, or of a kind that is not read. The message names the file and the line, if there is one.
    """
    data = _decompress(path, path.read_bytes())
    for start, what in _REFUSED.items():
        if data.startswith(start):
            raise DataError(f"{path}: is {what}; wanted {FILE_KINDS}")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSION_SUFFIXES]
    suffix = suffixes[-1] if suffixes else ""
    if data.startswith(b"PAR1") or suffix == ".parquet":
        return _read_parquet(path, data)
    text = _decode(path, data)
    if suffix == ".csv":
        return list(_read_csv(path, text))
    if suffix in (".tsv", ".tab"):
        return list(_read_tsv(path, text))
    if text.lstrip().startswith("["):
        return _read_json_array(path, text)
    return list(_read_json_lines(path, text))


def _decompress(path: Path, data: bytes) -> bytes:
    for start, decompress in _COMPRESSED.items():
        if data.startswith(start):
            try:
                return decompress(data)
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise DataError(
                    f"{path}: its compression is damaged ({error}); copy the file again"
                ) from error
    return data


def _decode(path: Path, data: bytes) -> str:
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\x00" in data[:1000]:
        raise DataError(
            f"{path}: holds zero bytes: binary data, or UTF-16 without a byte-order mark; wanted UTF-8 (or "
            f"UTF-16 with a byte-order mark) in {FILE_KINDS}"
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not valid {encoding.upper()} ({error.reason} at byte {error.start}); wanted UTF-8 (in "
            "another encoding, convert the file: `iconv -f LATIN1 -t UTF-8`)"
        ) from error


def _read_json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = _parse_json(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and "\n" in text.strip() and (fields := _fields_of_one_object(text)):
                raise DataError(
                    f"{path}: is one JSON object over several lines, with {fields}; wanted an array of objects, "
                    "or an object a line"
                ) from error
            raise DataError(
                f"{where}: not valid JSON ({error}); wanted one JSON object a line{_other_kinds(path)}"
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: a JSON {type(value).__name__}; wanted an object")
        yield Row(where, value)


def _read_json_array(path: Path, text: str) -> list[Row]:
    try:
        values = _parse_json(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{line}: not valid JSON ({error}); wanted one array of objects") from error
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataError(
                f"{path}: element {index} (from 0) is a JSON {type(value).__name__}; wanted an object"
            )
    return [Row(f"{path}: element {index} (from 0)", value) for index, value in enumerate(values)]


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_field_twice)


def _no_field_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the field {next(name for name in names if names.count(name) > 1)!r} is there twice"
        )
    return value


def _other_kinds(path: Path) -> str:
    """For names that do not say JSON, how the other kinds are told."""
    is_json = ".json" in path.name.lower()
    return "" if is_json else " (CSV and TSV are read from names in .csv and .tsv)"


def _fields_of_one_object(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return ", ".join(map(repr, value)) if isinstance(value, dict) else ""


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    header_line = _LINE_END.split(text, maxsplit=1)[0]
    delimiter = max(_DELIMITERS, key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    spanning: list[str] = []
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}:{start}: not valid CSV ({error}, by line {reader.line_num}); a quotation mark inside of a "
                'quoted field is written twice (""), and one that opens a field must be closed; not so in TSV'
            ) from error
        if fields is None:
            break
        if not any(field.strip() for field in fields) and len(fields) <= 1:
            continue
        if header is None:
            header = _check_header(path, start, fields)
            continue
        if reader.line_num > start:
            spanning.append(f"{start}–{reader.line_num}")
        yield _row(path, start, header, fields)
    if spanning:
        logger.warning(
            "%s: %d rows have a field that goes on over several lines (the first at %s); if that is not meant, a "
            "quotation mark is missing or too many",
            path,
            len(spanning),
            spanning[0],
        )


def _read_tsv(path: Path, text: str) -> Iterator[Row]:
    header: list[str] | None = None
    quoted = 0
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if header is None:
            header = _check_header(path, number, fields)
            continue
        quoted += any(len(field) > 1 and field[0] == field[-1] == '"' for field in fields)
        yield _row(path, number, header, fields)
    if quoted:
        logger.warning(
            "%s: %d rows have a field in quotation marks, which were kept: TSV is read as it stands. Name the file "
            ".csv if it was written as CSV with tabs",
            path,
            quoted,
        )


def _check_header(path: Path, line: int, fields: list[str]) -> list[str]:
    names = [field.strip() for field in fields]
    if repeated := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise DataError(f"{path}:{line}: the header has {repeated[0]!r} twice; wanted every name once")
    return names


def _row(path: Path, line: int, header: list[str], fields: list[str]) -> Row:
    where = f"{path}:{line}"
    if len(fields) != len(header):
        raise DataError(
            f"{where}: has {len(fields)} field(s), the header has {len(header)}: {', '.join(header)[:100]}; wanted "
            "as many: is a separator inside of a sentence, or one missing?"
        )
    return Row(where, {name: field for name, field in zip(header, fields, strict=True) if name})


def _read_parquet(path: Path, data: bytes) -> list[Row]:
    with needed_for(f"{path}: Parquet"):
        import pyarrow
        from pyarrow import parquet

    try:
        values = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error})") from error
    return [Row(f"{path} row {index} (from 0)", value) for index, value in enumerate(values)]
