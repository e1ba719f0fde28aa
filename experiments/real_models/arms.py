"""The experiment's arms and all that they share: protocol.md in code."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from shifcon_fast.data.cldr import Split

PROTOCOL = 1

PIVOT = "en"
WEAK = ("de", "fr", "sw", "tr", "hi", "id")
LANGUAGES = (PIVOT, *WEAK)

AREAS = {"smollm2-135m-instruct": (10, 20), "gemma-3-270m": (6, 12)}
MODELS = tuple(AREAS)

BASE, PLAIN, SHIFCON = "base", "plain", "shifcon"

SPACE_ROWS = range(200)
TRANSLATION_ROWS = range(200, 1200)
TRANSLATIONS = 400  # of them, the shortest in the pivot
FLORES_ROWS = range(64)

ATTENTION = "eager"
"""PyTorch's fused attention takes longer on a CPU, for its backward in bfloat16."""

CHOICES, SENTENCES = 128, 16
"""Of an evaluation's batch."""

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

TRAINING: dict[str, Any] = {
    "max_steps": 150,
    "per_device_train_batch_size": 8,
    "contrastive_batch_size": 8,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "max_length": 128,
    "max_length_pivot": 96,
    "max_length_other": 96,
}
"""Arguments of every run."""

_BOTH_TASKS = {"per_device_train_batch_size": 16, "max_length": 256, "too_long": "error"}

ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {"shift": False, "w_mcl": 0.0, "w_gen": 1.0},
    "translation": {"shift": False, "w_mcl": 0.0, "w_gen": 1.0, **_BOTH_TASKS},
    "shift": {"w_mcl": 0.0, "w_gen": 1.0},
    "mcl": {"shift": False},
    SHIFCON: {},
    "official": {"recipe": "official"},
    "random": {"intervention": "random"},
    "subspace": {"intervention": "subspace"},
}
"""Arm → arguments that differ."""

SEEDS = {arm: (1, 2, 3, 4, 5) if arm in (PLAIN, SHIFCON) else (1, 2, 3) for arm in ARMS}

_AFP = {"shift": False, "mcl_mode": "unshifted"}
_LIGHT = {"w_gen": 1.0, "w_mcl": 0.2}

CANDIDATES: dict[str, dict[str, Any]] = {
    "shifcon-light": _LIGHT,
    "shifcon-anchored": {"anchor_pivot": True},
    "shifcon-distilled": {"w_distillation": 1.0},
    "shifcon-replayed": {"w_replay": 1.0},
    "shifcon-questions": _LIGHT,
    "afp": _AFP,
    "afp-anchored": {**_AFP, "anchor_pivot": True},
    "afp-light": {**_AFP, **_LIGHT},
    "afp-questions": {**_AFP, **_LIGHT},
    "afp-translation": {**_AFP, **_LIGHT, **_BOTH_TASKS},
    "shifcon-standardised": {**_LIGHT, "standardise_contrast": True},
    "afp-standardised": {**_AFP, **_LIGHT, "standardise_contrast": True},
}
"""Tried on the questions of the dev territories: candidate → arguments that differ."""

SEARCH_SEEDS = (101,)

WITH_TRANSLATIONS = ("translation", "afp-translation")
"""Those whose instructions hold the translation pairs too."""

ON_QUESTIONS = ("shifcon-questions", "afp-questions")
"""Those whose language space and contrastive pairs are the prompts of the instructions, which are parallel too."""


def runs(models: tuple[str, ...] = MODELS) -> list[tuple[str, str, int]]:
    """(model, arm, seed) of every run, those that the primary measure needs first; the base has seed 0."""
    found = [(model, BASE, 0) for model in models]
    most = max(len(seeds) for seeds in SEEDS.values())
    for place in range(most):
        first = [(model, arm, SEEDS[arm][place]) for model in models for arm in (PLAIN, SHIFCON)]
        rest = [
            (model, arm, seeds[place])
            for model in models
            for arm, seeds in SEEDS.items()
            if arm not in (PLAIN, SHIFCON) and place < len(seeds)
        ]
        found += [*first, *rest]
    return found


def search_runs(models: tuple[str, ...] = MODELS) -> list[tuple[str, str, int]]:
    """(model, arm or candidate, seed) of the search."""
    tried = (BASE, PLAIN, SHIFCON, "translation", *CANDIDATES)
    return [
        (model, arm, seed)
        for seed in SEARCH_SEEDS
        for arm in tried
        for model in models
        if arm != BASE or seed == SEARCH_SEEDS[0]
    ]


def split_of(seed: int) -> Split:
    """Of the territories whose questions a run is measured on."""
    return "dev" if seed >= SEARCH_SEEDS[0] else "test"


def arguments(model: str, arm: str) -> dict[str, Any]:
    """The trainer's arguments of an arm or a candidate, but for seed and folder."""
    forward, backward = AREAS[model]
    return {**TRAINING, "forward": forward, "backward": backward, **(ARMS | CANDIDATES)[arm]}


def fingerprint(model: str, arm: str) -> str:
    """SHA-256 of all that decides a run's result but for its seed, the software and the data files."""
    made_of: dict[str, Any] = {
        "protocol": PROTOCOL,
        "model": model,
        "languages": LANGUAGES,
        "rows": [[rows.start, rows.stop] for rows in (SPACE_ROWS, TRANSLATION_ROWS, FLORES_ROWS)],
        "translations": TRANSLATIONS,
        "attention": ATTENTION,
        "lora": LORA,
        "arguments": arguments(model, arm) if arm != BASE else None,
    }
    if arm in ON_QUESTIONS:
        made_of["parallel"] = "questions"
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
