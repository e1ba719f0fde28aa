"""The house: a room imports from the floors below it alone, and no two rooms have one name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "shifcon_fast"
FLOORS = (
    {"version", "extras", "notices", "storage", "_native"},
    {"json_record", "markdown", "data", "ops"},
    {"space"},
    {"modeling"},
    {"objective"},
    {"evaluation", "export"},
    {"training"},
    {"opening", "tables", "demo", "doctor"},
    {"workflow", "lm_eval_model"},
    {"cli"},
    {"__main__"},
)
TRAINING = ("arguments", "losses", "weights", "batches", "run")
"""The rooms of ``training``, and what they have in common; the files beside them import from all."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(file: Path) -> Iterator[tuple[str, int]]:
    """What a file imports of the package, wherever in it, with the line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "shifcon_fast":
                yield rest.partition(".")[0], node.lineno


def test_imports_point_downwards() -> None:
    problems = []
    for file in sorted(PACKAGE.rglob("*.py")):
        room = room_of(file)
        if room == "__init__":  # the public names, which load on first use
            continue
        assert room in FLOOR, f"{room} is new: on which floor of {__name__} does it stand?"
        for other, line in imported_rooms(file):
            if other not in (room, "kernels") and FLOOR.get(other, 0) >= FLOOR[room]:
                problems.append(f"{file.relative_to(PACKAGE)}:{line} imports {other}")
    assert problems == []


def test_the_rooms_of_training_import_from_those_before_them() -> None:
    problems = []
    for file in sorted((PACKAGE / "training").rglob("*.py")):
        room = file.relative_to(PACKAGE / "training").with_suffix("").parts[0]
        if room not in TRAINING:
            continue
        for module in re.findall(
            r"from shifcon_fast\.training\.([\w.]+) import", file.read_text(encoding="utf-8")
        ):
            other = module.partition(".")[0]
            if other not in TRAINING[: TRAINING.index(room) + 1]:
                problems.append(f"{file.relative_to(PACKAGE)} imports {module}")
    assert problems == []


def test_the_page_on_the_layout_has_every_room_on_its_floor() -> None:
    text = (PACKAGE.parent / "docs" / "layout.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    told = {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
    assert told == FLOOR
    begun = re.findall(r"\| `([\w/]+\.py)` \|$", text, re.MULTILINE)
    assert [name for name in begun if not (PACKAGE / name).is_file()] == []
    assert len(begun) > 5


def test_no_two_rooms_have_one_name() -> None:
    places = defaultdict(list)
    for file in PACKAGE.rglob("*.py"):
        # What computes an operator is called as the operator is, in every backend.
        if file.stem != "__init__" and room_of(file) != "ops":
            places[file.stem].append(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
