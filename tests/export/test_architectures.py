"""Which export takes which architecture: what docs/serving.md says is what the exporters find."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shifcon_fast.export.merged import missing_biases
from shifcon_fast.export.output_bias import biases_for
from shifcon_fast.export.plain_copy import plain_copy
from shifcon_fast.export.shift_vectors import shift_vectors
from shifcon_fast.export.support import BIAS_IN_ADAPTER, BIAS_IN_CHECKPOINT
from shifcon_fast.modeling.architectures import ARCHITECTURES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
NAMES = sorted({row.model_type for row in ARCHITECTURES.values()})


def documented() -> dict[str, set[str]]:
    """model_type → the exports that the page gives it."""
    found: dict[str, set[str]] = {}
    row = re.compile(r"^\| (`[^|]+) \| (yes|no) \| (yes|no) \| yes \| yes \|$", re.MULTILINE)
    for names, peft, merged in row.findall(PAGE.read_text("utf-8")):
        exports = {target for target, takes in (("peft", peft), ("merged", merged)) if takes == "yes"}
        found.update(dict.fromkeys(re.findall(r"`(\w+)`", names), exports))
    return found


def places(model: Any) -> set[str]:
    vectors, base = shift_vectors(model, "sw"), plain_copy(model)
    try:
        biases = biases_for(vectors, base, "--to peft")
    except ValueError:
        return set()
    try:
        missing_biases(base, biases, vectors)
    except ValueError:
        return {"peft"}
    return {"peft", "merged"}


def test_the_page_names_every_architecture() -> None:
    assert documented().keys() == set(NAMES)


def test_model_cards_go_by_the_same_table() -> None:
    page = documented()
    assert {name for name, exports in page.items() if "peft" in exports} == BIAS_IN_ADAPTER
    assert {name for name, exports in page.items() if "merged" in exports} == BIAS_IN_CHECKPOINT


@pytest.mark.slow("every architecture that takes an export")
@pytest.mark.parametrize("architecture", NAMES)
def test_what_the_page_says_is_what_is_found(architecture: str, attached: Callable[..., Any]) -> None:
    model = attached(architecture, adapter=False)
    assert places(model) == documented()[architecture]
