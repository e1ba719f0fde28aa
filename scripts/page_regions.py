"""The regions of a page that a command makes; what stands around them was written by people.

<!-- NAME: made by COMMAND -->

...

<!-- end of NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_START, _END = "<!-- {name}: made by {command} -->", "<!-- end of {name} -->"


def region_names(page: str, command: str) -> list[str]:
    """The names of what a command makes of a page, in its order, with whatever is there twice."""
    pattern = re.escape(_START).replace(r"\{name\}", r"([^<>:]+)").replace(r"\{command\}", re.escape(command))
    return re.findall(pattern, page)


def filled(page: str, command: str, contents: Mapping[str, str]) -> str:
    """The page with other content in some of its regions, by their names.

    Raises:
        ValueError: the page does not have one of them once, with both of its marks.
    """
    for name, made in contents.items():
        start, end = _marks(page, command, name)
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n\n{made}\n\n{end}{rest.partition(end)[2]}"
    return page


def _marks(page: str, command: str, name: str) -> tuple[str, str]:
    start, end = (mark.format(name=name, command=command) for mark in (_START, _END))
    if page.count(start) != 1 or page.count(end) != 1 or page.index(end) < page.index(start):
        known = region_names(page, command)
        raise ValueError(f"page: wanted {start!r} and, after it, {end!r} once each; it has {known}")
    return start, end
