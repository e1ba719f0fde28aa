"""MCL against its formula in float64, per boundary and sentence, and what its pass may touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.objective.mcl import ContrastiveBatch, mcl_from_representations, mcl_loss
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.space.language_space import LanguageSpace

FORWARD, BACKWARD, LAYERS = 2, 4, 6


@pytest.fixture
def attached(
    tiny_model: Callable[..., PreTrainedModel], random_space: Callable[..., LanguageSpace]
) -> tuple[Any, ShiftHandle]:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(layers=LAYERS), config)
    return model, attach(model, random_space(LAYERS, 32), FORWARD, BACKWARD)


@pytest.fixture
def batch() -> ContrastiveBatch:
    """Three pairs; lengths 7, 5, 6 with right padding; BOS (1) is attended to but not content."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 100, (6, 7), generator=generator)
    ids[:, 0] = 1
    attention = torch.ones(6, 7, dtype=torch.long)
    attention[1, 5:] = attention[4, 5:] = attention[2, 6:] = 0
    return ContrastiveBatch(
        input_ids=ids.masked_fill(attention == 0, 0),
        attention_mask=attention,
        pool_mask=(attention == 1) & (ids != 1),
        language_ids=torch.tensor([0, 0, 0, 2, 1, 2]),
    )


def naive_loss(
    pivot: Tensor, other: Tensor, temperature: float, recenter: bool, standardise: bool = False
) -> Tensor:
    """The definition, in the inputs' precision: pivot and other are (L, N, d)."""
    total = torch.zeros((), dtype=pivot.dtype)
    for a, t in zip(pivot, other, strict=True):
        if standardise:
            a, t = a - a.mean(0), t - t.mean(0)
            variance = torch.cat([a, t]).var(0, correction=0)
            deviation = (variance + 1e-6 * variance.mean()).sqrt()
            a, t = a / deviation, t / deviation
        a, t = a / a.norm(dim=-1, keepdim=True), t / t.norm(dim=-1, keepdim=True)
        if recenter:
            t = t - t.mean(0) + a.mean(0)
        logits = a @ t.T / temperature
        target = torch.arange(len(a))
        total += (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
    return total / len(pivot)


@pytest.mark.parametrize(
    ("mode", "temperature", "standardise"),
    [
        ("shifted", 0.05, False),
        ("shifted", 0.2, True),
        ("unshifted", 0.1, False),
        ("unshifted", 0.3, True),
        ("pooled", 1.0, False),
        ("pooled", 0.1, False),
    ],
)
def test_formula_and_gradients(mode: Any, temperature: float, standardise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    pivot, other = torch.randn(2, 3, 5, 16, generator=generator, dtype=torch.float64)
    expected_inputs = [pivot.clone().requires_grad_(), other.clone().requires_grad_()]
    expected = naive_loss(*expected_inputs, temperature, mode == "pooled", standardise)
    expected.backward()
    inputs = [pivot.float().requires_grad_(), other.float().requires_grad_()]
    loss = mcl_from_representations(*inputs, mode=mode, temperature=temperature, standardise=standardise)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for got, wanted in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)


def naive_representations(
    model: PreTrainedModel, language_shift: LanguageShift, batch: ContrastiveBatch, shifted: bool
) -> Tensor:
    """(boundaries, rows, d) in the model's precision: one sentence at a time, through the blocks themselves."""
    decoder = model.base_model.model.model if hasattr(model, "base_model") else model.model
    rows = []
    for ids, attention, pool, language in zip(*batch.values(), strict=True):
        kept = attention.bool()
        shift = torch.zeros(language_shift.hidden_size, dtype=torch.float64)
        if shifted:
            at_f = language_shift.vectors[0].double()
            shift = (at_f[0] - at_f[language]) * float(language != 0)
        h = decoder.embed_tokens(ids[kept][None])
        position = torch.arange(int(kept.sum()))[None]
        rotary = decoder.rotary_emb(h, position)
        seen = []
        for k in range(BACKWARD):
            if k == FORWARD:
                h = h + shift.to(h.dtype)
            if k >= FORWARD:
                seen.append(h[0, pool[kept]].mean(0))
            h = decoder.layers[k](h, position_embeddings=rotary, position_ids=position, attention_mask=None)
        rows.append(torch.stack(seen))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("mode", ["shifted", "pooled", "unshifted"])
def test_whole_loss_against_a_float64_walk_through_the_blocks(
    attached: tuple[Any, ShiftHandle], batch: ContrastiveBatch, mode: Any
) -> None:
    model, handle = attached
    loss = mcl_loss(model, batch, handle, mode=mode, temperature=0.1)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    handle.detach()
    model.zero_grad()
    model.double()
    model.base_model.model.config._attn_implementation = "sdpa"
    representations = naive_representations(model, handle.shift, batch, mode == "shifted")
    expected = naive_loss(representations[:, :3], representations[:, 3:], 0.1, mode == "pooled")
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert gradients
    for name, gradient in gradients.items():
        wanted = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-5, msg=name)


def test_modes_differ(attached: tuple[Any, ShiftHandle], batch: ContrastiveBatch) -> None:
    model, handle = attached
    modes = ("shifted", "pooled", "unshifted")
    first, second, third = (mcl_loss(model, batch, handle, mode=mode).item() for mode in modes)  # type: ignore[arg-type]
    assert min(abs(first - second), abs(first - third), abs(second - third)) > 1e-3


@pytest.mark.parametrize("mode", ["shifted", "pooled", "unshifted"])
def test_an_anchored_pivot_gets_no_gradient(mode: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 5, 16, generator=generator, requires_grad=True) for _ in range(2)]
    free = mcl_from_representations(*inputs, mode=mode, temperature=0.1)
    of_pivot, of_other = torch.autograd.grad(free, inputs)
    anchored = mcl_from_representations(*inputs, mode=mode, temperature=0.1, anchor_pivot=True)
    assert anchored.item() == free.item()
    pivot, other = torch.autograd.grad(anchored, inputs, allow_unused=True)
    assert pivot is None
    assert of_pivot.abs().max() > 0
    torch.testing.assert_close(other, of_other)


def test_what_all_sentences_have_in_common_does_not_show_in_a_standardised_contrast() -> None:
    """Nor how far a dimension reaches, nor one in which all are alike, whose gradient is finite."""
    generator = torch.Generator().manual_seed(0)
    pivot = torch.randn(2, 6, 16, generator=generator, dtype=torch.float64)
    other = pivot + 0.3 * torch.randn(2, 6, 16, generator=generator, dtype=torch.float64)
    far = torch.full((16,), 30.0, dtype=torch.float64)
    wide = torch.logspace(-1, 1, 16, dtype=torch.float64)

    def loss(a: Tensor, t: Tensor, standardise: bool) -> float:
        return mcl_from_representations(a.float(), t.float(), standardise=standardise).item()

    plain = loss(pivot, other, True)
    assert plain < 0.1
    assert loss(pivot * wide + far, other * wide - far, True) == pytest.approx(plain, rel=0.02, abs=1e-4)
    assert loss(pivot * wide + far, other * wide + far, False) > 1.0
    dead = [side.float().clone() for side in (pivot, other)]
    for side in dead:
        side[..., 3] = 7.0
        side.requires_grad_()
    mcl_from_representations(*dead, standardise=True).backward()
    assert all(side.grad.isfinite().all() and side.grad.abs().max() < 100 for side in dead)


def test_gradient_reaches_exactly_the_adapters_below_the_last_boundary(
    attached: tuple[Any, ShiftHandle], batch: ContrastiveBatch
) -> None:
    model, handle = attached
    mcl_loss(model, batch, handle).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block = int(name.split(".layers.")[1].split(".")[0])
        if block < BACKWARD - 1:  # boundary b-1, the last that is pooled, is the output of block b-2
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_no_later_block_and_no_head_runs(attached: tuple[Any, ShiftHandle], batch: ContrastiveBatch) -> None:
    model, handle = attached
    causal = model.base_model.model
    ran: list[str] = []
    watched = {f"block {i}": block for i, block in enumerate(causal.model.layers)}
    watched |= {"norm": causal.model.norm, "head": causal.lm_head}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    mcl_loss(model, batch, handle)
    assert ran == [f"block {i}" for i in range(BACKWARD - 1)]  # once: both languages in one pass


def test_bad_arguments(attached: tuple[Any, ShiftHandle], batch: ContrastiveBatch) -> None:
    model, handle = attached
    with pytest.raises(ValueError, match="mode: got 'mixed'"):
        mcl_loss(model, batch, handle, mode="mixed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"temperature: got 0\.0; wanted a positive number"):
        mcl_loss(model, batch, handle, temperature=0.0)
    with pytest.raises(ValueError, match="standardise: got True with mode 'pooled'"):
        mcl_loss(model, batch, handle, mode="pooled", standardise=True)
    odd = ContrastiveBatch(**{name: value[:5] for name, value in batch.items()})  # type: ignore[typeddict-item]
    none = ContrastiveBatch(**{name: value[:0] for name, value in batch.items()})  # type: ignore[typeddict-item]
    with pytest.raises(
        ValueError, match="batch: got 0 rows; wanted N pivot sentences and their N translations"
    ):
        mcl_loss(model, none, handle)
    with pytest.raises(ValueError, match="batch: got 5 rows"):
        mcl_loss(model, odd, handle)
