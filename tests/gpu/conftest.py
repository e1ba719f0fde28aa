"""Tests that need a CUDA device: ``scripts/gpu_check.sh`` runs them on a machine with one.

Elsewhere they are collected, so that their imports are checked, and skipped. ``SHIFCON_REHEARSE=1`` runs on the CPU
all of them that do not ask for what only CUDA has (the fixture ``cuda``), with operators on their CPU backends;
``tests/scripts/test_rehearsal.py`` does that on every commit, so that the first run on a device tests the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from shifcon_fast import ops
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.ops.registry import OPERATORS
from shifcon_fast.space.language_space import LanguageSpace

REHEARSED = os.environ.get("SHIFCON_REHEARSE") == "1" and not torch.cuda.is_available()
HERE = Path(__file__).parent
LANGUAGES = ("en", "sw", "de")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.gpu)
        if REHEARSED and "cuda" not in getattr(item, "fixturenames", ()):
            continue
        if not torch.cuda.is_available():
            item.add_marker(
                pytest.mark.skip("needs a CUDA device: scripts/gpu_check.sh runs it on a machine with one")
            )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if REHEARSED else "cuda")


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """For tests of what only CUDA has; a rehearsal leaves them out."""
    return torch.device("cuda")


@pytest.fixture(scope="session")
def only_fast() -> Callable[[dict[tuple[str, str], int]], bool]:
    """Whether ``ops.call_counts()`` hold calls of the fast backends alone: what is chosen by itself on the device.

    On CUDA that must be Triton (subspace_project: the compiled library), or a silent fallback would pass.
    """
    chosen = {
        r.operator: r.chosen for r in ops.backend_report(torch.float32) if r.device.partition(":")[0] == "cpu"
    }
    if not REHEARSED:
        chosen = dict.fromkeys(OPERATORS, "triton") | {"subspace_project": "native"}

    def check(counts: dict[tuple[str, str], int]) -> bool:
        return bool(counts) and all(
            backend == chosen[operator.removesuffix("_backward")] for operator, backend in counts
        )

    return check


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def random_space() -> Callable[..., LanguageSpace]:
    """Random language vectors about as long as the tiny models' hidden states; the pivot is "de"."""

    def build(model: nn.Module, seed: int = 0) -> LanguageSpace:
        decoder = locate_decoder(model)
        shape = (decoder.num_boundaries, len(LANGUAGES), decoder.hidden_size)
        return LanguageSpace(
            languages=LANGUAGES,
            pivot="de",
            mean=torch.randn(shape, generator=torch.Generator().manual_seed(seed)),
            counts=dict.fromkeys(LANGUAGES, 2),
            rms=torch.ones(shape[0]),
            median_norm=torch.ones(shape[:2]),
            sink_share=torch.zeros(shape[:2]),
        )

    return build


@pytest.fixture
def batch(device: torch.device) -> dict[str, torch.Tensor]:
    """Four rows, one language each way, see ``batch_ids``; the last two padded on the left."""
    tokens = torch.randint(3, 128, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[2, :2] = 0
    mask[3, :4] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0).to(device), "attention_mask": mask.to(device)}


@pytest.fixture
def batch_ids(device: torch.device) -> torch.Tensor:
    """sw, de (the pivot), en, none."""
    return torch.tensor([1, 2, 0, -1], device=device)
