"""Interventions on an attached model, against hooks that do in float64 what their formulas say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shifcon_fast as sf
from shifcon_fast import ops
from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.space.intervention import INTERVENTIONS, MAPS
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.space.language_space import LanguageSpace

F, B, RANK = 1, 3, 4
LANGUAGES = ("en", "sw", "de")


@pytest.fixture(scope="module")
def plain(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama", layers=4)


@pytest.fixture(scope="module")
def space(plain: Any, word_tokenizer: Any, parallel_text: dict[str, list[str]]) -> LanguageSpace:
    text = {language: parallel_text[language] for language in LANGUAGES}
    return estimate_space(plain, word_tokenizer, text, rank=RANK, progress=False)


def moved(shift: LanguageShift, at: int, language: int, x: Tensor, alphas: Tensor | None = None) -> Tensor:
    """x (T, d) float64 as the formulas of ``space.intervention`` move it, at f (0) or b (1)."""
    vectors, pivot = shift.vectors.double()[at], shift.pivot_id
    start, end = (vectors[language], vectors[pivot]) if at == 0 else (vectors[pivot], vectors[language])
    sign, kind = (1, -1)[at], shift.intervention
    if language == pivot and not shift.moves_pivot:
        return x
    if kind == "mean":
        rows = [shift.languages.index(code) for code in shift.targets or (shift.pivot,)]
        there = x + sign * (vectors[rows].mean(0) - vectors[language])
    elif kind == "centre":
        there = x - sign * vectors[language]
    elif kind == "random":
        assert shift.directions is not None
        length = (vectors[pivot] - vectors[language]).norm()
        there = x + sign * length * shift.directions[language].double()
    else:
        assert shift.bases is not None
        v = shift.bases.double()[at]
        own, other = (v[language], v[pivot]) if at == 0 else (v[pivot], v[language])
        if kind == "subspace":
            there = end + (x - start) @ other @ other.T
        else:
            assert shift.links is not None
            coordinates = (x - start) @ own
            left = (x - start) - coordinates @ own.T
            there = end + left + coordinates @ shift.links.double()[at, language].T @ other.T
    return x + (shift.alpha if alphas is None else shift.alpha * alphas[language]) * (there - x)


def hooked(model: nn.Module, shift: LanguageShift, ids: Tensor, alphas: Tensor | None = None) -> nn.Module:
    """A float64 copy whose blocks' inputs are moved by hooks; ids are (B,) or (B, T), alphas (K,) float64."""
    plain = copy.deepcopy(model).double()

    def hook(at: int) -> Callable[..., tuple[Tensor, ...]]:
        def move(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *rest = args
            per_token = ids if ids.dim() == 2 else ids[:, None].expand(hidden.shape[:2])
            rows = []
            for row, languages in zip(hidden, per_token, strict=True):
                found = [
                    token if language < 0 else moved(shift, at, int(language), token[None], alphas)[0]
                    for token, language in zip(row, languages, strict=True)
                ]
                rows.append(torch.stack(found))
            return torch.stack(rows), *rest

        return move

    for at, block in enumerate(shift.blocks):
        plain.model.layers[block].register_forward_pre_hook(hook(at))
    return plain


def options(intervention: str) -> dict[str, Any]:
    if intervention == "barycentre":
        return {"targets": ["en", "de"]}
    return {"intervention": intervention}


EVERY = (*INTERVENTIONS, "barycentre")


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("intervention", EVERY)
def test_hidden_states_are_moved_by_the_formula(
    plain: Any, space: LanguageSpace, batch: dict[str, Tensor], intervention: str, alpha: float
) -> None:
    ids = torch.tensor([1, 2, 0, -1])  # sw, de, en (the pivot), none
    shift = space.shift(F, B, alpha, **options(intervention))
    with torch.no_grad():
        expected = hooked(plain, shift, ids)(**batch).logits
        model = copy.deepcopy(plain)
        with sf.attach(model, shift) as handle:
            got = model(**batch, language_ids=ids).logits
            assert handle.engagements[F]["shift"] == handle.engagements[B]["shift"] == 1
            alone = model(**batch, language_ids=torch.tensor([-1, -1, 0, -1])).logits
            with handle.suspended():
                unmoved = model(**batch).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(got[seen].double(), expected[seen], rtol=1e-3, atol=2e-4)
    changed = [not torch.equal(a, b) for a, b in zip(got, unmoved, strict=True)]
    assert changed[:2] == [True, True]
    moves_pivot = intervention in ("centre", "barycentre")
    assert shift.moves_pivot == moves_pivot
    assert torch.equal(alone[:2], unmoved[:2])
    assert torch.equal(alone[2], unmoved[2]) == (not moves_pivot)


@pytest.mark.parametrize("intervention", EVERY)
def test_rows_of_several_languages_are_moved_token_by_token(
    plain: Any, space: LanguageSpace, batch: dict[str, Tensor], intervention: str
) -> None:
    ids = torch.tensor([1, 2, 0, -1, 2]).repeat(4, 2)[:, : batch["input_ids"].shape[1]]
    shift = space.shift(F, B, **options(intervention))
    with torch.no_grad():
        expected = hooked(plain, shift, ids)(**batch).logits
        with sf.attach(copy.deepcopy(plain), shift) as handle:
            got = handle.model(**batch, language_ids=ids).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(got[seen].double(), expected[seen], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("intervention", EVERY)
def test_gradients_go_through(
    plain: Any, space: LanguageSpace, batch: dict[str, Tensor], intervention: str
) -> None:
    ids = torch.tensor([1, 2, 0, -1])
    shift = space.shift(F, B, **options(intervention))
    oracle = hooked(plain, shift, ids)
    oracle(**batch, labels=batch["input_ids"]).loss.backward()
    with sf.attach(copy.deepcopy(plain), shift) as handle:
        handle.model(**batch, labels=batch["input_ids"], language_ids=ids).loss.backward()
        got = handle.model.get_input_embeddings().weight.grad
    expected = oracle.get_input_embeddings().weight.grad
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("intervention", EVERY)
def test_learned_alphas_scale_and_get_exact_gradients(
    plain: Any, space: LanguageSpace, batch: dict[str, Tensor], intervention: str, per_token: bool
) -> None:
    ids = torch.tensor([1, 2, 0, -1])  # sw, de, en (the pivot), none
    if per_token:
        ids = torch.tensor([1, 2, 0, -1, 2]).repeat(4, 2)[:, : batch["input_ids"].shape[1]]
    shift = space.shift(F, B, 0.5, **options(intervention))
    alphas = torch.tensor([1.25, 0.5, -0.75])
    exact = alphas.double().requires_grad_()
    hooked(plain, shift, ids, exact)(**batch, labels=batch["input_ids"]).loss.backward()
    model = copy.deepcopy(plain).requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with sf.attach(model, replace(shift, alphas=alphas)) as handle:
        fixed = model(**batch, language_ids=ids).logits
        learnt = handle.learn_alpha()
        assert handle.learn_alpha() is learnt
        output = model(**batch, labels=batch["input_ids"], language_ids=ids)
        torch.testing.assert_close(output.logits, fixed, rtol=1e-5, atol=1e-5)
        output.loss.backward()
        assert learnt.grad is not None
        torch.testing.assert_close(learnt.grad.double(), exact.grad, rtol=2e-3, atol=2e-5)
        assert (learnt.grad[0] != 0) == shift.moves_pivot
        with torch.no_grad():
            learnt.mul_(2)
        doubled = model(**batch, language_ids=ids).logits
        handle.freeze_alpha()
        assert list(model.model.layers[F].named_parameters(recurse=False)) == []
        assert torch.equal(handle.shift.alphas, 2 * alphas)  # type: ignore[arg-type]
        torch.testing.assert_close(model(**batch, language_ids=ids).logits, doubled, rtol=1e-5, atol=1e-5)
    assert handle.shift.dose("sw")[0] == pytest.approx(
        space.shift(F, B, 0.5, **options(intervention)).dose("sw")[0]
    )


@pytest.mark.parametrize("intervention", EVERY)
def test_representations_are_means_of_moved_tokens(
    plain: Any, space: LanguageSpace, batch: dict[str, Tensor], intervention: str
) -> None:
    ids = torch.tensor([1, 2, 0, -1])
    shift = space.shift(F, B, **options(intervention))
    oracle, seen = hooked(plain, shift, ids), {}
    for at, block in enumerate(shift.blocks):  # after the hook that moves
        oracle.model.layers[block].register_forward_pre_hook(
            lambda module, args, at=at: seen.__setitem__(at, args[0].detach())
        )
    mask = batch["attention_mask"]
    with torch.no_grad(), sf.attach(copy.deepcopy(plain), shift) as handle:
        oracle(**batch)
        got = boundary_representations(
            handle.model, batch["input_ids"], mask, mask, (F, B), ids, keep_massive=True
        )
    expected = torch.stack([(seen[at] * mask[..., None]).sum(1) / mask.sum(1)[:, None] for at in (0, 1)])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_subspaces_go_through_the_operator(
    plain: Any, space: LanguageSpace, batch: dict[str, Tensor]
) -> None:
    with torch.no_grad(), sf.attach(copy.deepcopy(plain), space, F, B, intervention="subspace") as handle:
        ops.reset_call_counts()
        handle.model(**batch, language_ids=torch.tensor([1, 2, 0, -1]))
    counts = {operator: n for (operator, _), n in ops.call_counts().items()}
    assert counts["subspace_project"] == 2


@pytest.mark.parametrize("intervention", sorted(MAPS))
def test_a_map_survives_copies_dtypes_and_a_new_alpha(
    plain: Any, space: LanguageSpace, batch: dict[str, Tensor], intervention: str
) -> None:
    ids = torch.tensor([1, 2, 0, -1])
    shift = space.shift(F, B, intervention=intervention)  # type: ignore[arg-type]
    model = copy.deepcopy(plain)
    handle = sf.attach(model, shift)
    twin = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        half = twin(**batch, language_ids=ids).logits
        full = model(**batch, language_ids=ids).logits
        assert half.dtype == torch.bfloat16
        seen = batch["attention_mask"].bool()
        assert (half.float() - full)[seen].abs().mean() < 0.1 * full[seen].abs().mean()
        handle.set_shift(replace(shift, alpha=0.25))
        expected = hooked(plain, replace(shift, alpha=0.25), ids)(**batch).logits
        got = model(**batch, language_ids=ids).logits
    torch.testing.assert_close(got[seen].double(), expected[seen], rtol=1e-3, atol=2e-4)
    assert {buffer.dtype for _, buffer in twin.model.layers[F].named_buffers(recurse=False)} == {
        torch.float32
    }
    handle.detach()
    assert not list(model.model.layers[F].named_buffers(recurse=False))


def test_what_cannot_be_given_is_refused(
    plain: Any, space: LanguageSpace, word_tokenizer: Any, parallel_text: dict[str, list[str]]
) -> None:
    with pytest.raises(ValueError, match="intervention: got 'rotate'; wanted one of mean, random, centre"):
        space.shift(F, B, intervention="rotate")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="targets: got"):
        space.shift(F, B, intervention="subspace", targets=["sw"])
    with pytest.raises(ValueError, match="recipe 'official'"):
        space.shift(F, B, recipe="official", intervention="affine")
    bare = replace(space, bases={}, variances={}, covariances={})
    with pytest.raises(ValueError, match="no subspaces at boundary 1"):
        space_of = bare.shift(F, B, intervention="procrustes")
        assert space_of is None
    older = replace(space, covariances={})
    with pytest.raises(ValueError, match="Estimate it again"):
        older.shift(F, B, intervention="affine")
    assert older.shift(F, B, intervention="subspace").is_map
    flat = {"en": ["Ada lives in Rome"] * 4, "sw": ["Ada anaishi Roma"] * 4}
    with pytest.raises(ValueError, match="has rank 0"):
        estimate_space(plain, word_tokenizer, flat, progress=False).shift(F, B, intervention="subspace")


def test_a_map_is_the_only_shift_of_a_model(plain: Any, space: LanguageSpace) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules="all-linear"), "first")
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    handle = sf.attach(model, space, F, B, adapter="first")
    with pytest.raises(ValueError, match="must be the only shift"):
        handle.add_shift(space.shift(F, B, intervention="subspace"), "second")
    assert list(handle.shifts) == ["first"]


@pytest.mark.parametrize("intervention", EVERY)
def test_the_dose_is_how_far_sentences_move(space: LanguageSpace, intervention: str) -> None:
    shift = space.shift(F, B, 0.5, **options(intervention))
    position = shift.language_id("sw")
    subspace, ridge = space.subspace(F, "sw"), float(space.ridge[F])  # type: ignore[index]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40_000, space.hidden_size, generator=generator, dtype=torch.float64) * ridge**0.5
    basis = subspace.basis.double()
    noise -= noise @ basis @ basis.T
    along = torch.randn(len(noise), subspace.rank, generator=generator, dtype=torch.float64)
    sentences = subspace.mean.double() + noise + (along * subspace.variances.double().sqrt()) @ basis.T
    displacement = moved(shift, 0, position, sentences) - sentences
    expected = displacement.square().sum(1).mean().sqrt() / space.median_norm[F, position].double()
    assert shift.dose("sw")[0] == pytest.approx(expected.item(), rel=0.02)


def test_the_gradient_of_a_factor_is_the_tables_times_its_row() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 8), (3, 8), (8,))
    x, table, weight = (torch.randn(*shape, generator=generator).double() for shape in shapes)
    ids, factors = torch.tensor([2, -1, 0]), torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64)

    def normed(factors: Tensor) -> tuple[Tensor, Tensor]:
        tensors = (each.to(factors.dtype) for each in (x, weight, table))
        values, scale, rows = tensors
        return ops.add_shift_rms_norm(values, scale, None, factors[:, None] * rows, ids)

    def gradient(factors: Tensor) -> Tensor:
        y, h = normed(factors)
        return torch.autograd.grad((y * y).sum() + h.sum(), factors)[0]

    exact = gradient(factors.requires_grad_())
    assert torch.autograd.gradcheck(normed, factors)
    assert exact[1] == 0  # a language without a row
    fast = gradient(factors.detach().float().requires_grad_())  # the backend that trains
    torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_learnt_factor_stays_one_float32_parameter_of_both_blocks(
    plain: Any, space: LanguageSpace, batch: dict[str, Tensor]
) -> None:
    model = copy.deepcopy(plain).requires_grad_(False)
    learnt = sf.attach(model, space, F, B).learn_alpha()
    ids = torch.tensor([1, 2, 0, -1])
    with torch.no_grad():
        learnt.copy_(torch.tensor([1.0, 0.7, 1.3]))
    twin = copy.deepcopy(model).to(torch.bfloat16)
    copied = twin.shifcon.learnt_alphas
    assert copied is not learnt
    assert torch.equal(copied, learnt)  # neither converted nor rounded
    assert [each for _, each in twin.named_parameters() if each.requires_grad] == [copied]
    compiled = torch.compile(model, backend="eager")
    compiled(**batch, labels=batch["input_ids"], language_ids=ids).loss.backward()
    traced, learnt.grad = learnt.grad, None
    model(**batch, labels=batch["input_ids"], language_ids=ids).loss.backward()
    torch.testing.assert_close(traced, learnt.grad, rtol=1e-4, atol=1e-6)
