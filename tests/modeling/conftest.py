"""Random language spaces, mixed batches, and the oracle: the shift added by hooks to an untouched copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shifcon_fast.modeling.architectures import ARCHITECTURES, locate_decoder
from shifcon_fast.space.language_space import LanguageSpace

LANGUAGES = ("en", "sw", "de")

# The most used, and one of each way in which a block is put together: what every run tests. The others differ from
# these by names, which the quick tests of all rows see.
REPRESENTATIVES = frozenset(
    {
        "bloom",
        "falcon",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "lfm2",
    }
    | {
        "granitemoehybrid",
        "llama",
        "llama4_text",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_5_text",
    }
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``@pytest.mark.every_architecture`` runs a test for every row of the table.

    Arguments of the marker: ``only``, a function that picks rows; ``heavy``, every run tests representatives alone;
    ``quick``, every run tests these alone; ``slow``, why the others wait for ``make test-all``; ``column``, what
    docs/architectures.md then says of the rows (scripts/architecture_table.py).
    """
    marker = metafunc.definition.get_closest_marker("every_architecture")
    if marker is None:
        return
    options = marker.kwargs
    rows = [row.model_type for row in ARCHITECTURES.values() if options.get("only", bool)(row)]
    quick = REPRESENTATIVES if options.get("heavy") else options.get("quick", rows)
    slow = pytest.mark.slow(options.get("slow", "a model that is put together like one that is tested"))
    metafunc.parametrize(
        "architecture", [pytest.param(row, marks=[] if row in quick else [slow]) for row in rows]
    )


def build_space(model: nn.Module, *, seed: int = 0, languages: tuple[str, ...] = LANGUAGES) -> LanguageSpace:
    """Random language vectors about as long as the tiny models' hidden states; the pivot is not the first."""
    decoder = locate_decoder(model)
    generator = torch.Generator().manual_seed(seed)
    boundaries, count = decoder.num_boundaries, len(languages)
    return LanguageSpace(
        languages=languages,
        pivot="de",
        mean=torch.randn(boundaries, count, decoder.hidden_size, generator=generator),
        counts=dict.fromkeys(languages, 2),
        rms=torch.ones(boundaries),
        median_norm=torch.ones(boundaries, count),
        sink_share=torch.zeros(boundaries, count),
    )


@pytest.fixture(scope="session")
def random_space() -> Callable[..., LanguageSpace]:
    return build_space


@pytest.fixture(scope="session")
def batch() -> dict[str, Tensor]:
    """Four rows, one language each way: sw, de (the pivot), en, none; the last two padded on the left."""
    tokens = torch.randint(3, 128, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[2, :2] = 0
    mask[3, :4] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture(scope="session")
def batch_ids() -> Tensor:
    """Language ids of ``batch`` in a ``random_space``."""
    return torch.tensor([1, 2, 0, -1])


@pytest.fixture(scope="session")
def shifted_by_hooks() -> Callable[..., object]:
    """The oracle: a deep copy of a model, made before attaching, whose blocks' inputs are shifted by hooks."""

    @contextmanager
    def oracle(
        model: PreTrainedModel, space: LanguageSpace, ids: Tensor, shifts: dict[int, tuple[int, float]]
    ) -> Iterator[PreTrainedModel]:
        """``shifts``: block → (boundary whose vectors are added, sign · alpha)."""
        plain = copy.deepcopy(model)
        pivot = space.language_id(space.pivot)

        def hook(boundary: int, scale: float) -> Callable[..., tuple[Tensor, ...]]:
            def shift(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                hidden, *rest = args
                rows = ids.repeat_interleave(hidden.shape[0] // len(ids))  # beams
                moved = []
                for row, language in zip(hidden, rows.tolist(), strict=True):
                    vector = space.mean[boundary, pivot] - space.mean[boundary, language]
                    same = language in (-1, pivot)
                    moved.append(row if same else (row + scale * vector).to(row.dtype))  # promotes to float32
                return (torch.stack(moved), *rest)

            return shift

        for block, (boundary, scale) in shifts.items():
            locate_decoder(plain).blocks[block].register_forward_pre_hook(hook(boundary, scale))
        yield plain

    return oracle
