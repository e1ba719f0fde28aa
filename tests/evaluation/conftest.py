"""A tiny model attached to a language space of its own, for measurements with and without the shift."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.space.language_space import LanguageSpace


@pytest.fixture(scope="session")
def own_space(
    tiny_model: Callable[..., PreTrainedModel],
    word_tokenizer: PreTrainedTokenizerFast,
    parallel_text: dict[str, list[str]],
) -> LanguageSpace:
    return estimate_space(tiny_model(), word_tokenizer, parallel_text, subspaces=False, progress=False)


@pytest.fixture
def attached(tiny_model: Callable[..., PreTrainedModel], own_space: LanguageSpace) -> Iterator[ShiftHandle]:
    """The tiny Llama, shifted from boundary 1 to boundary 3; ``attached.model`` is the model."""
    handle = attach(tiny_model(), own_space, 1, 3)
    yield handle
    handle.detach()
