"""The ways to take one training step that are compared, and what the ablations switch off.

All but the plain one compute the same loss, 0.5 · L_gen + 2 · L_mcl with the authors' numbers (Zhang et al., ACL
2025, arXiv 2410.19453): generation rows shifted with the vectors of f and b at the inputs of blocks f-1 and b-1;
unit sentence means of an unshifted pass, re-centred (t - mean(t) + mean(a)), temperature 1, boundaries f … b-1.
Language vectors are fixed: following the model is left out on both sides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from model import on_every_norm
from shapes import Size
from torch import Tensor
from torch.nn.functional import normalize

import shifcon_fast as sf
from shifcon_fast import ops
from shifcon_fast.modeling import boundaries
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.objective.early_gradient import with_gradient_now
from shifcon_fast.objective.mcl import ContrastiveBatch, mcl_from_representations
from shifcon_fast.training.losses.loss_without_logits import LossWithoutLogits

W_GEN, W_MCL, TEMPERATURE = 0.5, 2.0, 1.0
PIVOT = "en"


@dataclass(frozen=True)
class Batch:
    """generation (R, T); pivot (N, T_p) and other (N, T_o) as the authors feed them, pairs (2N, T_o) as we do.

    The pairs are on the host, from where the collator gives them.
    """

    generation: Tensor
    pivot: Tensor
    other: Tensor
    pairs: ContrastiveBatch


def make_batch(size: Size, device: torch.device, seed: int = 1, languages: int = 1) -> Batch:
    """Random tokens; every row as long as the recipe cuts it, pivot rows padded on the right in ``pairs``.

    The translations are in so many languages, in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = size.config["vocab_size"]
    count, length_pivot, length_other = size.pairs

    def tokens(*shape: int) -> Tensor:
        return torch.randint(3, vocabulary, shape, generator=generator).to(device)

    generation = tokens(*size.generation)
    pivot, other = tokens(count, length_pivot), tokens(count, length_other)
    padded = torch.nn.functional.pad(pivot, (0, length_other - length_pivot))
    mask = torch.ones(2 * count, length_other, dtype=torch.long)
    mask[:count, length_pivot:] = 0
    pairs: ContrastiveBatch = {
        "input_ids": torch.cat([padded, other]).cpu(),
        "attention_mask": mask,
        "pool_mask": mask,
        "language_ids": torch.tensor([0] * count + [1 + row % languages for row in range(count)]),
    }
    return Batch(generation, pivot, other, pairs)


def make_space(model: Any, seed: int = 2, languages: int = 2) -> sf.LanguageSpace:
    """So many random language vectors per boundary, the pivot's among them."""
    decoder = locate_decoder(model)
    codes = (PIVOT, *(f"l{index}" for index in range(languages - 1)))
    shape = (decoder.num_boundaries, len(codes), decoder.hidden_size)
    return sf.LanguageSpace(
        languages=codes,
        pivot=PIVOT,
        mean=0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)),
        counts=dict.fromkeys(codes, 2),
        rms=torch.ones(shape[0]),
        median_norm=torch.ones(shape[:2]),
        sink_share=torch.zeros(shape[:2]),
    )


Loss = Callable[[], Tensor]


@contextmanager
def plain(model: Any, batch: Batch, area: tuple[int, int], space: sf.LanguageSpace) -> Iterator[Loss]:
    """QLoRA on the instructions: no shift, no contrastive loss, transformers' own blocks."""
    yield lambda: model(input_ids=batch.generation, labels=batch.generation, use_cache=False).loss


@contextmanager
def authors(model: Any, batch: Batch, area: tuple[int, int], space: sf.LanguageSpace) -> Iterator[Loss]:
    """Three full forwards with all hidden states and logits, a loop over boundaries and sentences.

    The shift is a hook on transformers' own blocks. No sentence of the loop synchronises with the host, which is
    the kindest reading of "a loop per sentence".
    """
    forward, backward = area

    def shift(vector: Tensor) -> Callable[..., Any]:
        def add(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden, *rest = arguments
            if hidden.shape[:2] != batch.generation.shape:  # the sentences' passes are not shifted
                return None
            return (hidden + vector.to(hidden.dtype), *rest)

        return add

    def loss() -> Tensor:
        keep = {"use_cache": False, "output_hidden_states": True}
        generation = model(input_ids=batch.generation, labels=batch.generation, **keep)
        pivot = model(input_ids=batch.pivot, **keep)
        other = model(input_ids=batch.other, **keep)
        contrast = _authors_contrast(pivot.hidden_states, other.hidden_states, range(forward, backward))
        return W_GEN * generation.loss + W_MCL * contrast

    blocks = locate_decoder(model).blocks
    toward, back = (space.shift_vectors(k)[1].to(batch.generation.device) for k in area)
    with ExitStack() as stack:
        # They stay until the step is over: gradient checkpointing runs them again in the backward.
        for block, vector in ((forward - 1, toward), (backward - 1, -back)):
            stack.callback(blocks[block].register_forward_pre_hook(shift(vector)).remove)
        yield loss


def _authors_contrast(pivot: Any, other: Any, boundaries: range) -> Tensor:
    losses = []
    for k in boundaries:
        a = torch.stack([normalize(sentence.float().mean(0), dim=-1) for sentence in pivot[k]])
        b = torch.stack([normalize(sentence.float().mean(0), dim=-1) for sentence in other[k]])
        b = b - b.mean(0) + a.mean(0)
        for one, others in ((a, b), (b, a)):
            for i in range(one.shape[0]):
                logits = others @ one[i] / TEMPERATURE
                losses.append(torch.logsumexp(logits, 0) - logits[i])
    return torch.stack(losses).mean()


def _attached(
    *, fused_norms: bool = True, cut: bool = True, packed: bool = True, all_at_once: bool = False
) -> Callable[..., Any]:
    """Our step, or what it is without one of its parts.

    Args:
        fused_norms: the operators' norms; else transformers' own.
        cut: the contrastive pass ends at boundary b-1; else it runs every block and the head.
        packed: sentences share rows; else they are padded.
        all_at_once: all logits, and one backward of both losses; else the loss without logits, and the contrastive
            one gone through backward first.
    """

    @contextmanager
    def variant(model: Any, batch: Batch, area: tuple[int, int], space: sf.LanguageSpace) -> Iterator[Loss]:
        with ExitStack() as stack:
            handle = stack.enter_context(sf.attach(model, space, *area, recipe="official"))
            if not fused_norms:
                # A norm with a hook is called as a module, so the block runs transformers' norms.
                on_every_norm(model, lambda norm: stack.callback(norm.register_forward_hook(_nothing).remove))
            if not packed:
                stack.callback(setattr, boundaries, "packing_of", boundaries.packing_of)
                boundaries.packing_of = lambda *_: None
            languages = int(batch.pairs["language_ids"].max())
            rows = torch.arange(batch.generation.shape[0], device=batch.generation.device)
            ids = 1 + rows % languages
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            without_logits = _loss_without_logits(model.get_base_model())

            def generate() -> Tensor:
                inputs = {"input_ids": batch.generation, "labels": batch.generation, "use_cache": False}
                if all_at_once:
                    return model(**inputs, language_ids=ids).loss
                with without_logits.engaged(None) as found:
                    loss = model(**inputs, language_ids=ids).loss
                assert found.problem is None, found.problem
                return loss

            def contrast() -> Tensor:
                if cut:
                    return sf.mcl_loss(model, batch.pairs, handle, mode="pooled", temperature=TEMPERATURE)
                return _uncut_contrast(model, batch.pairs, range(*area))

            def loss() -> Tensor:
                if all_at_once:
                    return W_GEN * generate() + W_MCL * contrast()
                contrastive = with_gradient_now(contrast(), weights)
                return W_GEN * generate() + W_MCL * contrastive

            yield loss

    return variant


@functools.cache
def _loss_without_logits(model: Any) -> LossWithoutLogits:
    """One for all steps of a model, as a run has: it tries its first batch against the model's own logits."""
    return LossWithoutLogits(model)


def _nothing(module: Any, arguments: Any, output: Any) -> None:
    return None


def _uncut_contrast(model: Any, pairs: ContrastiveBatch, boundaries: range) -> Tensor:
    """The contrastive loss of one pass through every block and the LM head, all hidden states kept."""
    device = next(model.parameters()).device
    states = model(
        input_ids=pairs["input_ids"].to(device),
        attention_mask=pairs["attention_mask"].to(device),
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    means = torch.stack([ops.masked_mean_pool(states[k], pairs["pool_mask"].to(device)) for k in boundaries])
    count = means.shape[1] // 2
    return mcl_from_representations(
        means[:, :count], means[:, count:], mode="pooled", temperature=TEMPERATURE
    )


VARIANTS: dict[str, Callable[..., Any]] = {
    "plain QLoRA": plain,
    "authors' recipe": authors,
    "ours": _attached(),
    "ours, transformers' norms": _attached(fused_norms=False),
    "ours, sentences padded": _attached(packed=False),
    "ours, all logits and one backward": _attached(all_at_once=True),
    "ours, contrastive pass not cut": _attached(cut=False),
}
SAME_LOSS = tuple(name for name in VARIANTS if name != "plain QLoRA")
