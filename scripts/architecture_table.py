"""The table of docs/architectures.md, made from the rows and from the tests that run over them.

    python scripts/architecture_table.py            print it
    python scripts/architecture_table.py --write    put it into docs/architectures.md (make architectures)

What a row is made of comes from ``shifcon_fast.modeling.architectures``. What works comes from the tests, which
build a tiny random model of each row: a test marked ``every_architecture(column="...")`` vouches for that column in
the rows that it is collected for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from page_regions import filled

from shifcon_fast.modeling.architectures import ARCHITECTURES, Architecture

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "architectures.md"
COMMAND = "make architectures"


class _Columns:
    """A pytest plugin: column → ``model_type`` of the rows that its test is collected for."""

    def __init__(self) -> None:
        self.rows: dict[str, set[str]] = defaultdict(set)

    @pytest.hookimpl(tryfirst=True)  # before -m takes tests out
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("every_architecture")
            if marker is not None and "column" in marker.kwargs:
                self.rows[marker.kwargs["column"]].add(item.callspec.params["architecture"])  # type: ignore[attr-defined]


def tested_rows() -> dict[str, set[str]]:
    """Column → ``model_type`` of the rows that its test runs over.

    Raises:
        RuntimeError: the tests cannot be collected.
    """
    columns, said = _Columns(), io.StringIO()
    folder = str(REPOSITORY / "tests" / "modeling")
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = pytest.main(["--collect-only", "-p", "no:cacheprovider", folder], plugins=[columns])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests in tests/modeling cannot be collected:\n{said.getvalue()}")
    return dict(columns.rows)


def table(tested: dict[str, set[str]]) -> str:
    """Markdown: what is tested for every row, then a line per row, with a column for what only some have."""
    rows = list(ARCHITECTURES.values())
    everywhere = sorted(name for name, types in tested.items() if len(types) == len(rows))
    somewhere = sorted(name for name in tested if name not in everywhere)
    head = ["`model_type`", "block class", "layout", "RMSNorms", "rounding", *somewhere]
    lines = ["Tested for every row:", "", *(f"* {name}" for name in everywhere), ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        marks = ["yes" if row.model_type in tested[name] else "–" for name in somewhere]
        cells = [f"`{row.model_type}`", f"`{row.block}`", _layout(row), _norms(row), _rounding(row), *marks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _layout(row: Architecture) -> str:
    own = [
        name
        for name in ("mixer", "feed_forward", "finish")
        if getattr(row, name) is not getattr(Architecture, name)
    ]
    extras = [
        *(["dropout on both branches"] if row.dropouts else []),
        *(["scaled branches"] if row.residual_multiplier else []),
        *([f"own {', '.join(f'`{name}`' for name in own)}"] if own else []),
    ]
    return ", ".join([f"`{row.layout}`", *extras])


def _norms(row: Architecture) -> str:
    if row.norm is None:
        return "–"
    fewest = len(row.norm_names)
    return f"{fewest}–{fewest + len(row.further_norms)}" if row.further_norms else str(fewest)


def _rounding(row: Architecture) -> str:
    return f"`{row.style}`" if row.norm else "–"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/architectures.md")
    made = table(tested_rows())
    if not parser.parse_args().write:
        print(made)
        return 0
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), COMMAND, {"table": made}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
