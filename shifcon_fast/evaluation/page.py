"""One self-contained HTML page: text, pictures and tables, for any screen, paper and the dark.

The page loads nothing and runs no script: pictures are inside it, in a light and a dark version of which the
browser takes the one that its reader prefers. All text is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import jinja2

from shifcon_fast.evaluation.plot_style import DARK, LIGHT

Tone = Literal["", "gain", "loss", "noise"]


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it says, in small print below it, and how it is meant."""

    text: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first cell of a row is its heading."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    paragraphs: Sequence[str]
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Picture:
    """An SVG in a light and a dark version, with what it shows in words for those who do not see it."""

    light: bytes
    dark: bytes
    alt: str
    caption: str = ""
    kind: Literal["picture"] = "picture"

    @staticmethod
    def draw(
        plot: Callable[..., bytes], *arguments: object, alt: str, caption: str = "", **options: object
    ) -> Picture:
        """Call a function of :mod:`shifcon_fast.evaluation.plots` once for each theme."""
        light, dark = (plot(*arguments, theme=theme, file_format="svg", **options) for theme in (LIGHT, DARK))
        return Picture(light, dark, alt, caption)


Block = Text | Picture | Table


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def render_page(title: str, sections: Sequence[Section], *, subtitle: str = "", footer: str = "") -> str:
    """The page as a string of HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shifcon_fast.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("report.html.j2").render(
        title=title, subtitle=subtitle, footer=footer, sections=[s for s in sections if s.blocks]
    )


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"
