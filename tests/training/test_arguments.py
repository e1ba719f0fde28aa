"""Arguments take the recipe's numbers unless given, and bad ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shifcon_fast.objective.recipe import OFFICIAL, STABLE
from shifcon_fast.training.arguments import ShifConArguments


def build(tmp_path: Path, **settings: Any) -> ShifConArguments:
    return ShifConArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_defaults_are_the_recipes(tmp_path: Path) -> None:
    stable, official = build(tmp_path), build(tmp_path, recipe="official")
    for arguments, recipe in ((stable, STABLE), (official, OFFICIAL)):
        for name in (
            "w_gen",
            "w_mcl",
            "mcl_mode",
            "temperature",
            "contrastive_batch_size",
            "vectors",
            "max_length",
        ):
            assert getattr(arguments, name) == getattr(recipe, name), name
        assert arguments.learning_rate == recipe.learning_rate
        assert arguments.warmup_steps == recipe.warmup
        assert arguments.lr_scheduler_type.value == "cosine"
    assert (official.forward, official.backward) == (12, 15)
    assert (stable.forward, stable.backward) == (None, None)
    assert official.per_device_train_batch_size == 14


def test_given_values_win(tmp_path: Path) -> None:
    arguments = build(tmp_path, recipe="official", learning_rate=3e-4, w_mcl=0.0, forward=2, backward=5)
    assert (arguments.learning_rate, arguments.w_mcl, arguments.w_gen) == (3e-4, 0.0, 0.5)
    assert (arguments.forward, arguments.backward) == (2, 5)


def test_pooled_batches_are_of_one_language_unless_asked(tmp_path: Path) -> None:
    assert build(tmp_path).mixed_languages is True
    assert build(tmp_path, mcl_mode="pooled").mixed_languages is False
    assert build(tmp_path, mcl_mode="pooled", mixed_languages=True).mixed_languages is True
    assert build(tmp_path, recipe="official").mixed_languages is False


def test_settings_are_json(tmp_path: Path) -> None:
    settings = json.loads(json.dumps(build(tmp_path, w_mcl=0.25).method_settings()))
    assert settings["w_mcl"] == 0.25
    assert settings["lr_scheduler_type"] == "cosine"
    assert "output_dir" not in settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "fast"}, "recipe: got 'fast'; wanted one of stable, official"),
        ({"mcl_mode": "mixed"}, "mcl_mode: got 'mixed'"),
        ({"vectors": "live"}, "vectors: got 'live'"),
        ({"too_long": "ignore"}, "too_long: got 'ignore'"),
        ({"w_mcl": -1.0}, r"w_mcl: got -1\.0; wanted 0 or more"),
        ({"w_gen": float("nan")}, "w_gen: got nan"),
        ({"w_gen": 0.0, "w_mcl": 0.0}, "both are 0"),
        ({"temperature": 0.0}, r"temperature: got 0\.0"),
        (
            {"recipe": "official", "standardise_contrast": True},
            "standardise_contrast: got True with mcl_mode='pooled'",
        ),
        ({"contrastive_batch_size": 1}, "contrastive_batch_size: got 1; wanted 2 or more"),
        ({"ema_decay": 1.0}, r"ema_decay: got 1\.0"),
        ({"refresh_every": 0}, "refresh_every: got 0"),
        ({"forward": 3}, "forward, backward: got 3 and None; wanted both"),
        ({"forward": 3, "backward": 3}, "forward, backward: got 3 and 3; wanted forward < backward"),
        ({"alpha": float("inf")}, "alpha: got inf"),
    ],
)
def test_bad_values(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **settings)
