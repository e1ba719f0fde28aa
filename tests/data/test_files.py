"""The containers that data comes in: each read, or refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas
import pytest

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import read_instructions
from shifcon_fast.data.parallel import read_parallel
from shifcon_fast.data.questions import read_questions
from shifcon_fast.data.rows import read_rows

ROWS: list[dict[str, object]] = [
    {"en": 'A "quoted" word, and more', "sw": "Habari\u2028za asubuhi"},
    {"en": "two", "sw": "mbili ሁለት"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=2, ensure_ascii=False)
TSV = "en\tsw\n" + "".join(f"{row['en']}\t{row['sw']}\n" for row in ROWS)
CSV = 'en,sw\n"A ""quoted"" word, and more",Habari\u2028za asubuhi\ntwo,mbili ሁለት\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", LINES.replace("\n", "\r\n").encode("utf-8-sig")),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.json", ARRAY.encode()),
        ("a.json", ARRAY.encode("utf-8-sig")),
        ("a.json", LINES.encode("utf-32")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json.bz2", bz2.compress(ARRAY.encode())),
        ("compressed", lzma.compress(LINES.encode())),
        ("a.tsv", TSV.encode()),
        ("a.tsv.gz", gzip.compress(TSV.encode("utf-16"), mtime=0)),
        ("a.csv", CSV.encode("utf-8-sig")),
        ("a.csv", CSV.replace(",sw", ";sw").replace(",Ha", ";Ha").replace("two,", "two;").encode()),
        ("A.CSV", CSV.replace("\n", "\r\n").encode()),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_text_in_every_container(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert [row.value for row in read_rows(path)] == ROWS


def test_parquet_and_saved_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "dev": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    for source in (tmp_path / "a.parquet", tmp_path / "saved", tmp_path / "splits"):
        assert [row.value for row in read_rows(source)] == ROWS
    assert [row.value for row in read_rows(f"{tmp_path / 'splits'}::dev")] == ROWS[1:]


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        iter,
        pandas.DataFrame,
        datasets.Dataset.from_list,
        lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    ],
    ids=["list", "tuple", "iterator", "DataFrame", "Dataset", "IterableDataset"],
)
def test_rows_in_memory(make: Callable[[list[dict[str, object]]], object]) -> None:
    expected = {"en": [row["en"] for row in ROWS], "sw": [row["sw"] for row in ROWS]}
    assert read_parallel(make(ROWS)) == expected
    asked = read_questions(make([{"answer": 3, **row} for row in ROWS]), languages=["sw"])
    assert [(question.row, question.text, question.answer) for question in asked] == [
        (index, row["sw"], 3) for index, row in enumerate(ROWS)
    ]
    told = read_instructions(make([{"lang": "sw", "prompt": "a", "response": "b"}]))
    assert (told[0].language, told[0].where) == ("sw", "row 0 (from 0) of the given rows")


def test_columns_of_a_dataset_are_a_mapping() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    expected = {"sw": [row["sw"] for row in ROWS]}
    assert read_parallel({"sw": dataset["sw"]}) == expected
    assert read_parallel({"sw": pandas.DataFrame(ROWS)["sw"]}) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
            r"DatasetDict of 'train'; wanted .* split",
        ),
        (["a", "b"], r"row 0 \(from 0\) of the given rows: got a str"),
        (7, "the given data is a int; wanted a file name"),
        ([], "holds no rows"),
    ],
)
def test_what_is_not_rows_is_refused(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_parallel(source)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.xlsx", b"PK\x03\x04rest", "spreadsheet"),
        ("a.pkl", b"\x80\x04\x95rest", "pickles are never read"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdrest", "zstd"),
        ("a.arrow", b"\xff\xff\xff\xffrest", "Arrow stream"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "compression is damaged"),
        ("a.parquet", b"PAR1rest", "not a Parquet file"),
        ("a.jsonl", LINES.encode("utf-16")[2:], "UTF-16 without a byte-order mark"),
        ("a.jsonl", '{"en": "a"}\n{"en": "é"}\n'.encode("latin-1"), r"a\.jsonl:2: not valid UTF-8.*iconv"),
        ("a.jsonl", b'{"en": "a", "en": "b"}', r"a\.jsonl:1: .*'en' is there twice"),
        (
            "a.json",
            b'{\n "data": [1]\n}',
            r"one JSON object over several lines, with 'data'; wanted an array",
        ),
        ("a.json", b'[{"en": "a"},\n {"en": }]', r"a\.json:2: not valid JSON"),
        ("a.json", b'[{"en": "a"}, 3]', r"element 1 \(from 0\) is a JSON int"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.jsonl", b'{"answer": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: not valid JSON"),
        ("a.tsv", b"en\tsw\na\n", r"a\.tsv:2: has 1 field\(s\), the header has 2: en, sw"),
        ("a.tsv", b"en\ten\na\tb\n", r"a\.tsv:1: the header has 'en' twice"),
        ("a.csv", b'en,sw\n"one,moja\ntwo,mbili\n', r"a\.csv:2: not valid CSV"),
        ("a.csv", b'en,sw\nzero,sifuri\n"one,moja\n"two,mbili\n', r"a\.csv:3: not valid CSV"),
        ("a.csv", b"en,sw\none,moja,extra\n", r"a\.csv:2: has 3 field"),
        ("a.csv", b"", "holds no rows"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as refused:
        read_rows(path)
    assert str(path) in str(refused.value)


def test_a_stray_quotation_mark_swallows_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ['He said "hi', '"Well', "end"]
    path = tmp_path / "a.tsv"
    path.write_text("en\tsw\n" + "".join(f"{line}\tx\n" for line in lines))
    assert read_parallel(path)["en"] == lines
    (tmp_path / "b.csv").write_text("en,sw\n" + "".join(f"{line},x\n" for line in ['He said "hi', "end"]))
    assert read_parallel(tmp_path / "b.csv")["en"] == ['He said "hi', "end"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    (tmp_path / "c.csv").write_text('en,sw\n"two\nlines",x\nend,x\n')
    assert read_parallel(tmp_path / "c.csv")["en"] == ["two\nlines", "end"]
    assert "1 rows have a field that goes on over several lines (the first at 2–3)" in caplog.text
    (tmp_path / "d.tsv").write_text('en\tsw\n"two"\tx\nend\tx\n')
    assert read_parallel(tmp_path / "d.tsv")["en"] == ['"two"', "end"]
    assert "1 rows have a field in quotation marks" in caplog.text


def test_numbers_of_csv_rows_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("row,answer,en,sw\n7,18,How many?,Ngapi?\n9,2.5,And?,Na?\n")
    assert [(question.row, question.answer) for question in read_questions(path, languages=["sw"])] == [
        (7, "18"),
        (9, "2.5"),
    ]
