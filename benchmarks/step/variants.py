"""The ways to take one training step that are compared, and what the ablations switch off.

All but the plain one compute the same loss, 0.5 · L_gen + 2 · L_mcl with the authors' numbers (Zhang et al., ACL
2025, arXiv 2410.19453): generation rows shifted with the vectors of f and b at the inputs of blocks f-1 and b-1;
unit sentence means of an unshifted pass, re-centred (t - mean(t) + mean(a)), temperature 1, boundaries f … b-1.
Language vectors are fixed: following the model is left out on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from model import Size, on_every_norm
from torch import Tensor
from torch.nn.functional import normalize

import shifcon_fast as sf
from shifcon_fast import ops
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.objective.mcl import ContrastiveBatch, mcl_from_representations

W_GEN, W_MCL, TEMPERATURE = 0.5, 2.0, 1.0
LANGUAGES = ("en", "sw")


@dataclass(frozen=True)
class Batch:
    """generation (R, T); pivot (N, T_p) and other (N, T_o) as the authors feed them, pairs (2N, T_o) as we do."""

    generation: Tensor
    pivot: Tensor
    other: Tensor
    pairs: ContrastiveBatch


def make_batch(size: Size, device: torch.device, seed: int = 1) -> Batch:
    """Random tokens; every row as long as the recipe cuts it, pivot rows padded on the right in ``pairs``."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = size.config["vocab_size"]
    count, length_pivot, length_other = size.pairs

    def tokens(*shape: int) -> Tensor:
        return torch.randint(3, vocabulary, shape, generator=generator).to(device)

    generation = tokens(*size.generation)
    pivot, other = tokens(count, length_pivot), tokens(count, length_other)
    padded = torch.nn.functional.pad(pivot, (0, length_other - length_pivot))
    mask = torch.ones(2 * count, length_other, dtype=torch.long, device=device)
    mask[:count, length_pivot:] = 0
    pairs: ContrastiveBatch = {
        "input_ids": torch.cat([padded, other]),
        "attention_mask": mask,
        "pool_mask": mask,
        "language_ids": torch.tensor([0] * count + [1] * count, device=device),
    }
    return Batch(generation, pivot, other, pairs)


def make_space(model: Any, seed: int = 2) -> sf.LanguageSpace:
    """Two random language vectors per boundary."""
    decoder = locate_decoder(model)
    shape = (decoder.num_boundaries, len(LANGUAGES), decoder.hidden_size)
    return sf.LanguageSpace(
        languages=LANGUAGES,
        pivot=LANGUAGES[0],
        mean=0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)),
        counts=dict.fromkeys(LANGUAGES, 2),
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


def _attached(*, fused_norms: bool, cut: bool) -> Callable[..., Any]:
    @contextmanager
    def variant(model: Any, batch: Batch, area: tuple[int, int], space: sf.LanguageSpace) -> Iterator[Loss]:
        with ExitStack() as stack:
            handle = stack.enter_context(sf.attach(model, space, *area, recipe="official"))
            if (
                not fused_norms
            ):  # a norm with a hook is called as a module, so the block runs transformers' norms
                handles: list[Any] = []
                on_every_norm(model, lambda norm: handles.append(norm.register_forward_hook(_nothing)))
                for each in handles:
                    stack.callback(each.remove)
            ids = torch.ones(batch.generation.shape[0], dtype=torch.long, device=batch.generation.device)

            def loss() -> Tensor:
                generation = model(
                    input_ids=batch.generation, labels=batch.generation, language_ids=ids, use_cache=False
                ).loss
                if cut:
                    contrast = sf.mcl_loss(model, batch.pairs, handle, mode="pooled", temperature=TEMPERATURE)
                else:
                    contrast = _uncut_contrast(model, batch.pairs, range(*area))
                return W_GEN * generation + W_MCL * contrast

            yield loss

    return variant


def _nothing(module: Any, arguments: Any, output: Any) -> None:
    return None


def _uncut_contrast(model: Any, pairs: ContrastiveBatch, boundaries: range) -> Tensor:
    """The contrastive loss of one pass through every block and the LM head, all hidden states kept."""
    states = model(
        input_ids=pairs["input_ids"],
        attention_mask=pairs["attention_mask"],
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    means = torch.stack([ops.masked_mean_pool(states[k], pairs["pool_mask"]) for k in boundaries])
    count = means.shape[1] // 2
    return mcl_from_representations(
        means[:, :count], means[:, count:], mode="pooled", temperature=TEMPERATURE
    )


VARIANTS: dict[str, Callable[..., Any]] = {
    "plain QLoRA": plain,
    "authors' recipe": authors,
    "ours": _attached(fused_norms=True, cut=True),
    "ours, transformers' norms": _attached(fused_norms=False, cut=True),
    "ours, contrastive pass not cut": _attached(fused_norms=True, cut=False),
}
SAME_LOSS = tuple(name for name in VARIANTS if name != "plain QLoRA")
