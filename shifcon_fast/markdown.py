"""Text of others in Markdown: whatever is in it, it stays text and breaks neither a table nor a block of code."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ACTIVE = re.compile(r"([\\`*_\[\]<>|~#&$])")


def prose(text: object) -> str:
    """Text on one line of prose or in a cell of a table."""
    return _ACTIVE.sub(r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """Text as a span of code in prose; not for tables, where a ``|`` would end the cell."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if not line or "`" in (line[0], line[-1]) else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def block(text: str, language: str = "") -> str:
    """A block of code, with a fence longer than any inside."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; the first column to the left, the others to the right. Cells may be any text."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *([prose(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
