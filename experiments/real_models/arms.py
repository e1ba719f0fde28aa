"""The experiment's arms and all that they share: protocol.md in code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
CONTINUED_ROWS = range(16)  # of FLORES-200: the first half of a sentence is the prompt
NEW_TOKENS = 40

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

WEIGHTS: dict[str, Any] = {"w_gen": 0.5, "w_mcl": 2.0}
"""Of the losses, unless an arm says otherwise: the authors', and both recipes' when the protocol was written."""


@dataclass(frozen=True)
class Arm:
    """What an arm or a candidate sets beside what all share.

    Attributes:
        arguments: those that differ.
        with_translations: the instructions hold the translation pairs too.
        on_questions: the language space and the contrastive pairs are of the prompts of the instructions, which are
            parallel too.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    with_translations: bool = False
    on_questions: bool = False


_BOTH_TASKS = {"per_device_train_batch_size": 16, "max_length": 256, "too_long": "error"}

ARMS = {
    PLAIN: Arm({"shift": False, "w_mcl": 0.0, "w_gen": 1.0}),
    "translation": Arm({"shift": False, "w_mcl": 0.0, "w_gen": 1.0, **_BOTH_TASKS}, with_translations=True),
    "shift": Arm({"w_mcl": 0.0, "w_gen": 1.0}),
    "mcl": Arm({"shift": False}),
    SHIFCON: Arm(),
    "official": Arm({"recipe": "official"}),
    "random": Arm({"intervention": "random"}),
    "subspace": Arm({"intervention": "subspace"}),
}

_AFP = {"shift": False, "mcl_mode": "unshifted"}
_LIGHT = {"w_gen": 1.0, "w_mcl": 0.2}

CANDIDATES = {
    "shifcon-light": Arm(_LIGHT),
    "shifcon-anchored": Arm({"anchor_pivot": True}),
    "shifcon-distilled": Arm({"w_distillation": 1.0}),
    "shifcon-replayed": Arm({"w_replay": 1.0}),
    "shifcon-questions": Arm(_LIGHT, on_questions=True),
    "afp": Arm(_AFP),
    "afp-anchored": Arm({**_AFP, "anchor_pivot": True}),
    "afp-light": Arm({**_AFP, **_LIGHT}),
    "afp-questions": Arm({**_AFP, **_LIGHT}, on_questions=True),
    "afp-translation": Arm({**_AFP, **_LIGHT, **_BOTH_TASKS}, with_translations=True),
    "shifcon-standardised": Arm({**_LIGHT, "standardise_contrast": True}),
    "afp-standardised": Arm({**_AFP, **_LIGHT, "standardise_contrast": True}),
}
"""Tried on the questions of the dev territories."""

CHOSEN = ("shifcon-light", "afp-standardised", "shifcon-anchored")
"""Of them, arms of the test too; protocol.md says by what rule."""

ARMS |= {name: CANDIDATES[name] for name in CHOSEN}

SEEDS = {arm: (1, 2, 3, 4, 5) if arm in (PLAIN, SHIFCON) else (1, 2, 3) for arm in ARMS}

SEARCH_SEEDS = (101,)


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


def split_for(seed: int) -> Split:
    """That of the territories whose questions a run is measured on."""
    return "dev" if seed >= SEARCH_SEEDS[0] else "test"


def made_of(arm: str) -> Arm:
    """An arm or a candidate by its name."""
    return (ARMS | CANDIDATES)[arm]


def arguments(model: str, arm: str) -> dict[str, Any]:
    """The trainer's arguments of an arm or a candidate, but for seed and folder."""
    return {**WEIGHTS, **_chosen(model, arm)}


def _chosen(model: str, arm: str) -> dict[str, Any]:
    forward, backward = AREAS[model]
    return {**TRAINING, "forward": forward, "backward": backward, **made_of(arm).arguments}


def fingerprint(model: str, arm: str) -> str:
    """SHA-256 of all that decides a run's result but for its seed, the software and the data files."""
    parts: dict[str, Any] = {
        "protocol": PROTOCOL,
        "model": model,
        "languages": LANGUAGES,
        "rows": [[rows.start, rows.stop] for rows in (SPACE_ROWS, TRANSLATION_ROWS, FLORES_ROWS)],
        "translations": TRANSLATIONS,
        "attention": ATTENTION,
        "lora": LORA,
        "arguments": _chosen(model, arm) if arm != BASE else None,  # beside WEIGHTS, which the protocol fixes
    }
    if arm != BASE and made_of(arm).on_questions:
        parts["parallel"] = "questions"
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
