"""What a command makes of a page goes between its marks, and nowhere else."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

COMMAND = "make this"
PAGE = """Before.

<!-- one: made by make this -->

old

<!-- end of one -->

Between, by a person.

<!-- two words: made by make this -->
<!-- end of two words -->

<!-- three: made by make that -->
<!-- end of three -->
"""


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    return importlib.import_module("page_regions")


def test_what_is_made_replaces_what_was_made(regions: ModuleType) -> None:
    r"""Also with what a pattern would take for a group, ``\1``."""
    assert regions.region_names(PAGE, COMMAND) == ["one", "two words"]
    once = regions.filled(PAGE, COMMAND, {"one": r"\1 new", "two words": "a\n\nb"})
    assert once == PAGE.replace("old", r"\1 new").replace(
        "make this -->\n<!-- end of two", "make this -->\n\na\n\nb\n\n<!-- end of two"
    )
    assert regions.filled(once, COMMAND, {"one": r"\1 new", "two words": "a\n\nb"}) == once
    assert regions.filled(PAGE, COMMAND, {"one": "old"}) == PAGE


@pytest.mark.parametrize(
    ("page", "name"),
    [
        pytest.param(PAGE, "four", id="not there"),
        pytest.param(PAGE, "three", id="another command's"),
        pytest.param(PAGE + PAGE, "one", id="twice"),
        pytest.param(PAGE.replace("<!-- end of one -->", ""), "one", id="no end"),
        pytest.param("<!-- end of one -->\n<!-- one: made by make this -->", "one", id="end first"),
    ],
)
def test_a_page_without_the_region_is_refused(regions: ModuleType, page: str, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"wanted '<!-- {name}: made by make this -->' and, after it, .*once each"
    ):
        regions.filled(page, COMMAND, {name: "new"})
