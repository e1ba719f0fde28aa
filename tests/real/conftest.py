"""The two real models of examples/real_models, made once and opened once a session.

`make test-real` runs these tests; plain `pytest` and `make test` leave them out. A model that cannot be fetched
fails the tests that need it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Opened:
    """A real model in float32 and eval mode, shared by the tests of a session: leave it as you found it."""

    folder: Path
    model: Any
    tokenizer: Any


@pytest.fixture(scope="session")
def fetching() -> ModuleType:
    """examples/real_models/fetch.py as a module."""
    path = REPOSITORY / "examples" / "real_models" / "fetch.py"
    spec = importlib.util.spec_from_file_location("real_models_fetch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def smollm2(fetching: ModuleType) -> Path:
    """The folder of SmolLM2-135M-Instruct (Llama architecture, no BOS, ChatML)."""
    return fetching.fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma3(fetching: ModuleType) -> Path:
    """The folder of Gemma-3-270M (base model, BOS, no chat template)."""
    return fetching.fetch("gemma-3-270m")


@pytest.fixture(scope="session")
def _smollm2_once(smollm2: Path) -> Opened:
    return _open(smollm2)


@pytest.fixture(scope="session")
def _gemma3_once(gemma3: Path) -> Opened:
    return _open(gemma3)


@pytest.fixture
def open_smollm2(_smollm2_once: Opened) -> Iterator[Opened]:
    """SmolLM2, opened; the test must leave it detached."""
    yield _smollm2_once
    _check_detached(_smollm2_once)


@pytest.fixture
def open_gemma3(_gemma3_once: Opened) -> Iterator[Opened]:
    """Gemma 3, opened; the test must leave it detached."""
    yield _gemma3_once
    _check_detached(_gemma3_once)


def _open(folder: Path) -> Opened:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return Opened(folder, model, AutoTokenizer.from_pretrained(folder))


def _check_detached(opened: Opened) -> None:
    assert getattr(opened.model, "shifcon", None) is None, "the test left the shared model attached"
    assert not opened.model.training, "the test left the shared model in training mode"
