"""A language space with random vectors for any model: values do not matter, being different does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shifcon_fast.space.language_space import LanguageSpace

LANGUAGES = ("en", "de", "sw", "tr")


@pytest.fixture(scope="session")
def random_space() -> Callable[..., LanguageSpace]:
    def build(boundaries: int, hidden: int, *, scale: float = 0.3, seed: int = 5) -> LanguageSpace:
        generator = torch.Generator().manual_seed(seed)
        return LanguageSpace(
            languages=LANGUAGES,
            pivot="en",
            mean=scale * torch.randn(boundaries, len(LANGUAGES), hidden, generator=generator),
            counts=dict.fromkeys(LANGUAGES, 8),
            rms=torch.ones(boundaries),
            median_norm=torch.ones(boundaries, len(LANGUAGES)),
            sink_share=torch.zeros(boundaries, len(LANGUAGES)),
        )

    return build
