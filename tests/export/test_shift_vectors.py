"""Language codes as names of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from shifcon_fast.export.shift_vectors import file_stem


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("sw", "sw"),
        ("swh_Latn", "swh_Latn"),
        ("zh/Hans", "zh%2FHans"),
        ("../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd"),
        ("..", "%2E."),
        (".", "%2E"),
        ("/sw", "%2Fsw"),
        ("a\\b:c\0d\n", "a%5Cb%3Ac%00d%0A"),
        ("Türkçe 1", "T%C3%BCrk%C3%A7e%201"),
    ],
)
def test_no_code_is_a_path(code: str, name: str) -> None:
    assert file_stem(code) == name
    assert Path("folder", name).resolve().parent == Path("folder").resolve()


@pytest.mark.parametrize("code", ["", "x" * 201, "字" * 30])
def test_a_code_that_can_name_no_file_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file"):
        file_stem(code)
