"""Documentation names files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for folder in (".", "benchmarks", "csrc", "docs", "examples/*", "experiments")
    for page in REPOSITORY.glob(f"{folder}/*.md")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_page_on_the_compiled_operators_names_files_that_are_there() -> None:
    text = (REPOSITORY / "csrc/README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[`\s]((?:\.\./)?[\w*/]+/[\w.*]+\.(?:cpp|cu|cuh|h|py|md))`", text))
    named |= set(re.findall(r"`((?:tests|shifcon_fast|kernels|scripts)/[\w/]*)`", text))
    assert len(named) > 15
    missing = [
        name for name in named if not any(any(root.glob(name)) for root in (REPOSITORY, REPOSITORY / "csrc"))
    ]
    assert missing == []
