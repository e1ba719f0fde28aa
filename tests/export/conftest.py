"""Attached PEFT models of tiny random weights, and the oracle: the shift added by hooks, in any precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import shifcon_fast as sf
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.space.language_space import LanguageSpace

LANGUAGES = ("en", "sw", "zh/Hans:x")
PIVOT = "en"
FORWARD, BACKWARD = 2, 3


def random_space(model: nn.Module, languages: tuple[str, ...] = LANGUAGES) -> LanguageSpace:
    """Language vectors about as long as the tiny models' hidden states."""
    decoder = locate_decoder(model)
    boundaries, count = decoder.num_boundaries, len(languages)
    generator = torch.Generator().manual_seed(3)
    return LanguageSpace(
        languages=languages,
        pivot=PIVOT,
        mean=torch.randn(boundaries, count, decoder.hidden_size, generator=generator),
        counts=dict.fromkeys(languages, 2),
        rms=torch.ones(boundaries),
        median_norm=torch.full((boundaries, count), 100.0),
        sink_share=torch.zeros(boundaries, count),
    )


@pytest.fixture(scope="session")
def adapted() -> Callable[..., Any]:
    """A model with a random LoRA adapter, the same every time."""

    def adapt(base: nn.Module, *, name: str = "default", **settings: Any) -> peft.PeftModel:
        defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
        torch.manual_seed(5)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{**defaults, **settings})
        return peft.get_peft_model(base, config, adapter_name=name).eval()

    return adapt


@pytest.fixture(scope="session")
def attached(adapted: Callable[..., Any], tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """An attached PEFT model around a tiny base."""

    def make(
        base: Any = "llama",
        *,
        forward: int = FORWARD,
        backward: int = BACKWARD,
        alpha: float = 0.5,
        recipe: Any = "stable",
        adapter: bool = True,
        **settings: Any,
    ) -> Any:
        base = tiny_model(base) if isinstance(base, str) else base
        model = adapted(base, **settings) if adapter else base
        sf.attach(model, random_space(model), forward, backward, alpha, recipe=recipe)
        return model

    return make


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(3, 128, (3, 10), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _by_hooks(
    model: Any, added: Mapping[int, Tensor], tokens: Tensor, dtype: torch.dtype, *, merged: bool = False
) -> Tensor:
    """Logits of a copy in ``dtype`` without ShifCon, whose blocks' inputs are moved by hooks; PEFT merges it."""
    plain = copy.deepcopy(model)
    plain.shifcon.detach()
    plain.to(dtype)
    if merged:
        plain = plain.merge_and_unload()
    for block, vector in added.items():
        moved = vector.to(dtype)
        locate_decoder(plain).blocks[block].register_forward_pre_hook(
            lambda module, args, moved=moved: (args[0] + moved, *args[1:])
        )
    return plain(input_ids=tokens).logits  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Oracle:
    """What logits should be, and how far plain PyTorch is from it in float32."""

    logits: Tensor
    plain_error: float

    def check(self, logits: Tensor, row: int | None = None) -> None:
        """The export may be off by twice what plain float32 arithmetic is off by, as every operator here may."""
        wanted = self.logits if row is None else self.logits[row]
        assert (logits.double() - wanted).abs().max().item() <= 2 * self.plain_error


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Oracle]:
    """For one language of an attached model (None: unshifted), from its space's vectors and not from its tables.

    With ``merged``, plain float32 arithmetic is that of the adapter beside the weights or merged into them by PEFT,
    whichever is further off: merging rounds each weight once more.
    """

    def look(model: Any, language: str | None, tokens: Tensor, *, merged: bool = False) -> Oracle:
        handle, space = model.shifcon, random_space(model)
        added = {}
        if language is not None:
            earlier = 1 if handle.recipe == "official" else 0
            here, pivot = space.languages.index(language), space.languages.index(PIVOT)
            for boundary, sign in ((handle.forward, 1), (handle.backward, -1)):
                gap = space.mean[boundary, pivot] - space.mean[boundary, here]
                added[boundary - earlier] = sign * handle.alpha * gap
        exact = _by_hooks(model, added, tokens, torch.float64)
        errors = [
            (_by_hooks(model, added, tokens, torch.float32, merged=way).double() - exact).abs().max().item()
            for way in ((False, True) if merged else (False,))
        ]
        return Oracle(exact, max(errors))

    return look
