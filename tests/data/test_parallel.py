"""Parallel sentences: what counts as a language, alignment, and the errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shifcon_fast.data import parallel
from shifcon_fast.data.errors import DataError
from shifcon_fast.data.parallel import ParallelText, read_parallel


def write_lines(path: Path, rows: list[dict[str, object] | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_integer_id_is_a_row_number_and_string_id_is_indonesian(tmp_path: Path) -> None:
    numbered = write_lines(
        tmp_path / "a.jsonl", [{"id": 0, "en": "a", "sw": "b"}, {"id": 1, "en": "c", "sw": "d"}]
    )
    assert read_parallel(numbered) == {"en": ["a", "c"], "sw": ["b", "d"]}
    indonesian = write_lines(
        tmp_path / "b.jsonl", [{"row": 0, "en": "a", "id": "b"}, {"row": 1, "en": "c", "id": "d"}]
    )
    assert read_parallel(indonesian) == {"en": ["a", "c"], "id": ["b", "d"]}


def test_other_fields_are_not_languages(tmp_path: Path) -> None:
    row = {
        "row": 3,
        "answer": 5,
        "equations": ["1+1=2"],
        "response_en": "x",
        "En": "x",
        "zh-Hans": "y",
        "e": "x",
    }
    path = write_lines(tmp_path / "a.jsonl", [{**row, "en": "a", "swh": "b"}, {**row, "en": "c", "swh": "d"}])
    assert read_parallel(path) == {"zh-Hans": ["y", "y"], "en": ["a", "c"], "swh": ["b", "d"]}
    assert read_parallel(path, languages=["zh-Hans", "en"]) == {"zh-Hans": ["y", "y"], "en": ["a", "c"]}


def test_blank_lines_and_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"en": "a"}\n\n{"en": "b"}\n')
    assert read_parallel(path) == {"en": ["a", "b"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"en": "a"}, '{"en": '], r"a\.jsonl:2: not valid JSON"),
        ([{"en": "a"}, "[1]"], r"a\.jsonl:2: a JSON list; wanted an object"),
        ([{"en": "a"}, {"en": "  "}], r"a\.jsonl:2: 'en' is empty"),
        ([{"en": "a"}, {"en": 5}], r"a\.jsonl:2: 'en' is int \(5\); wanted a string"),
        ([{"en": "a"}, r'{"en": "\ud800"}'], r"a\.jsonl:2: 'en' holds half of a surrogate"),
        ([{"en": "a"}], "1 complete row.* at least two"),
        ([{"row": 1}, {"row": 2}], "no language found .*'row'"),
        ([], "holds no rows"),
    ],
)
def test_bad_rows_name_file_and_line(
    tmp_path: Path, rows: list[dict[str, object] | str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_parallel(write_lines(tmp_path / "a.jsonl", rows))


def test_missing_language_is_counted_and_can_be_dropped(tmp_path: Path) -> None:
    rows: list[dict[str, object] | str] = [
        {"en": "a", "sw": "b"},
        {"en": "c"},
        {"en": "d", "sw": None},
        {"en": "e", "sw": "f"},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        DataError, match=r"'sw' in 2 of 4 rows \(first: .*a\.jsonl:2 lacks 'sw'\).*--allow-missing"
    ):
        read_parallel(path)
    assert read_parallel(path, allow_missing=True) == {"en": ["a", "e"], "sw": ["b", "f"]}
    assert read_parallel(path, languages=["en"]) == {"en": ["a", "c", "d", "e"]}
    with pytest.raises(DataError, match="no row has 'de'; found en, sw"):
        read_parallel(path, languages=["en", "de"])


def test_mappings_are_checked_too() -> None:
    assert read_parallel({"en": ["a", "b"], "sw": ["c", "d"]}) == {"en": ["a", "b"], "sw": ["c", "d"]}
    with pytest.raises(DataError, match="unequal length"):
        read_parallel({"en": ["a", "b"], "sw": ["c"]})
    with pytest.raises(DataError, match=r"sentence 1 \(from 0\).*'sw' is empty"):
        read_parallel({"en": ["a", "b"], "sw": ["c", ""]})
    with pytest.raises(DataError, match="'en': str; wanted"):
        read_parallel({"en": "a sentence"})


def test_dataset_folder_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "pairs"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"id": 1, "en": "a", "sw": "b"}, {"id": 2, "en": "c", "sw": None}])
    write_lines(
        folder / "validation.jsonl", [{"id": 3, "en": "e", "sw": "f"}, {"id": 4, "en": "g", "sw": "h"}]
    )
    with pytest.raises(DataError, match=r"\[train\] row 1 lacks 'sw'"):
        read_parallel(folder)
    assert read_parallel(str(folder), languages=["en"]) == {"en": ["a", "c"]}
    assert read_parallel(f"{folder}::validation") == {"en": ["e", "g"], "sw": ["f", "h"]}
    with pytest.raises(DataError, match="Hugging Face dataset"):
        read_parallel(f"{folder}::test")


def test_translation_column(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"translation": {"en": "e", "de": "f"}}] * 2)
    assert read_parallel(path) == {"en": ["e", "e"], "de": ["f", "f"]}


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", Path("missing")])
def test_missing_file_is_said_to_be_missing(source: str | Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_parallel(source)


def test_real_text(shifcon_data: Path) -> None:
    text = read_parallel(shifcon_data / "ntrex128.jsonl")
    assert {len(sentences) for sentences in text.values()} == {1497}
    assert "id" in text
    assert "row" not in text
    assert len(text) == 16
    math = read_parallel(shifcon_data / "gsm8k_train_multi.jsonl")
    assert list(math) == ["en", "de", "es", "fr", "ru", "zh", "ja", "sw"]


def test_what_was_read_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    text = read_parallel({"eng_Latn": ["a", "c"], "swh_Latn": ["b", "d"], "deu_Latn": ["e", "f"]})

    def refuse(*args: object, **options: object) -> str:
        raise AssertionError("a sentence was checked twice")

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "check_text", refuse)
        assert read_parallel(text) is text
        chosen = read_parallel(text, languages=["sw", "en"])
        assert list(chosen.items()) == [("sw", ["b", "d"]), ("en", ["a", "c"])]
        assert read_parallel(chosen) is chosen


@pytest.mark.parametrize(
    ("languages", "message"),
    [
        (["en", "xx"], "no row has 'xx'; found en, sw"),
        (["sw", "swh"], "'sw' and 'swh'"),
        ("en", "wanted a list of language codes"),
        ([], "wanted a list of language codes"),
    ],
)
def test_languages_of_what_was_read_are_refused_as_ever(languages: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_parallel(read_parallel({"en": ["a", "c"], "sw": ["b", "d"]}), languages=languages)


def test_what_was_read_and_then_changed_is_read_again() -> None:
    text = read_parallel({"en": ["a", "c"], "sw": ["b", "d"]})
    text["sw"].append("e")
    with pytest.raises(DataError, match="unequal length"):
        read_parallel(text)
    with pytest.raises(DataError, match="holds no language"):
        read_parallel(ParallelText())
    with pytest.raises(DataError, match="at least two"):
        read_parallel(ParallelText(en=["a"], sw=["b"]))
