"""``estimate_space``: run a model over parallel sentences and estimate its language space."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from shifcon_fast import ops
from shifcon_fast.data.languages import find_language
from shifcon_fast.data.parallel import Parallel, read_parallel
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.boundaries import visit_boundaries
from shifcon_fast.modeling.content import content_mask, ordinary_tokens
from shifcon_fast.modeling.evaluation_mode import evaluation_mode
from shifcon_fast.modeling.fingerprint import model_fingerprint
from shifcon_fast.modeling.vocabulary import check_token_ids, embedding_rows, padding_id
from shifcon_fast.space.accumulator import SpaceAccumulator
from shifcon_fast.space.language_shift import Recipe
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.version import __version__

logger = logging.getLogger(__name__)


def estimate_space(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    parallel: Parallel,
    pivot: str = "en",
    batch_size: int = 16,
    *,
    languages: Sequence[str] | None = None,
    boundaries: Sequence[int] | None = None,
    subspaces: bool = True,
    rank: int | None = None,
    variance: float | None = None,
    max_length: int | None = None,
    recipe: Recipe = "stable",
    memory_gib: float = 2.0,
    allow_missing: bool = False,
    progress: bool = True,
) -> LanguageSpace:
    """Estimate language vectors, subspaces, distances and noise floors at a model's boundaries.

    The model runs without gradients, in evaluation mode (each module's mode is put back), unshifted even when it is
    attached, and no further than the last boundary asked for. Sentences are sorted by length within their language
    and padded on the right, whatever the tokenizer's ``padding_side``; the tokenizer is not changed, and it needs
    no padding token. The result depends neither on the order of the batches nor, up to the model's own round-off,
    on their size (``recipe="official"`` excepted).

    Sentence matrices are kept on the CPU for as many boundaries as fit into ``memory_gib``, with one pass over the
    sentences for each such range; on the model's device lies nothing but the current batch. The result holds
    4·d·k bytes of basis per boundary and language, where k is the rank.

    Args:
        model: a Hugging Face decoder of a known architecture; quantised, wrapped by PEFT or attached as it may be.
        tokenizer: the model's. It adds its special tokens (BOS) as it does for the model's own inputs.
        parallel: {language: [sentence, ...]} aligned by position, a file, a Hugging Face dataset or its id;
            see :func:`~shifcon_fast.data.parallel.read_parallel`.
        pivot: code of the language to shift toward, in any form (``en`` finds ``eng_Latn``).
        batch_size: sentences per forward pass.
        languages: which languages to read, in this order; None for all. The pivot must be one of them.
        boundaries: which boundaries to estimate; None for all L. At others the space holds NaN.
        subspaces: False estimates language vectors only, in one pass and without sentence matrices.
        rank: directions of every subspace, the same for all languages and boundaries, since distances compare at
            equal rank only. None takes 32, or what half of the sentences can have.
        variance: instead, the fewest directions that hold this share of Σs², for each language and boundary anew:
            the method's formula (0.9). Not together with ``rank``.
        max_length: truncate sentences to so many tokens, and to the model's context; None refuses a sentence longer
            than the context.
        recipe: ``"stable"``: a sentence is the mean of its content tokens (:mod:`shifcon_fast.modeling.content`), a
            language the mean of its sentences. Rows with a sentence that has none are left out, with a warning.
            ``"official"``, as in the authors' code: a sentence is the mean of all its tokens, BOS included, made
            unit length; a language is the mean of the batches' means, batches being taken in the order of the data.
        memory_gib: memory for sentence matrices, in GiB of CPU memory.
        allow_missing: drop rows in which a language is missing instead of refusing them.
        progress: show a progress bar.

    Raises:
        ValueError: no decoder in the model; unknown recipe; a boundary out of range; a pivot that is not in the
            data; fewer than two languages, or than two sentences in one; a sentence that is too long or of special
            tokens only; non-finite hidden states. :class:`~shifcon_fast.data.errors.DataError` for malformed data.
    """
    if recipe not in ("stable", "official"):
        raise ValueError(f"recipe: got {recipe!r}; wanted 'stable' or 'official'")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; wanted at least 1")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: got {max_length}; wanted at least 1, or None to refuse long sentences")
    if not memory_gib > 0:
        raise ValueError(f"memory_gib: got {memory_gib}; wanted a positive number of GiB")
    decoder = locate_decoder(model)
    wanted = _check_boundaries(boundaries, decoder.num_boundaries)
    sentences = read_parallel(parallel, languages=languages, allow_missing=allow_missing)
    pivot = find_language(pivot, sentences) or pivot  # as the data writes it
    official = recipe == "official"
    tokens = _tokenize(tokenizer, sentences, decoder.module, max_length, official)
    accumulator = SpaceAccumulator(
        {language: len(texts) for language, texts in tokens.items()},
        pivot,
        num_boundaries=decoder.num_boundaries,
        hidden_size=decoder.hidden_size,
        subspaces=subspaces,
        rank=rank,
        variance=variance,
        batch_means=official,
    )
    batches = list(_batches(tokens, batch_size, sort=not official))
    filler, device = padding_id(tokenizer, embedding_rows(decoder.module)), _input_device(decoder.module)
    ranges = accumulator.ranges(wanted, memory_bytes=memory_gib * 2**30)

    total = sum(len(texts) for texts in tokens.values())
    with (
        tqdm(total=total * len(ranges), desc="language space", unit="sentence", disable=not progress) as bar,
        evaluation_mode(model),
        torch.no_grad(),
    ):
        for selected in ranges:
            with accumulator.boundary_range(selected):
                for batch in batches:
                    input_ids, attention_mask = _pad(batch.token_ids, filler, device)
                    candidates = content_mask(input_ids, attention_mask, tokenizer.all_special_ids)
                    found = _look_at(
                        model, input_ids, attention_mask, candidates, boundaries=selected, official=official
                    )
                    accumulator.update(batch.language, batch.positions, **found)
                    bar.update(len(batch.positions))
                bar.set_postfix_str(f"boundaries {selected[0]}–{selected[-1]}")

    card = {
        "model": {"class": type(model).__name__, "fingerprint": model_fingerprint(model)},
        "tokenizer": _tokenizer_card(tokenizer),
        "versions": {
            "shifcon_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "recipe": recipe,
        "rank": accumulator.rank,
        "variance": variance,
        "max_length": max_length,
        "batch_size": batch_size,
    }
    space = accumulator.finish(card)
    size = sum(basis.nbytes for basis in space.bases.values())
    if size > memory_gib * 2**30:
        logger.warning(
            "The subspace bases take %.1f GiB in memory and on disk; rank= (--rank) caps them (median rank: %d).",
            size / 2**30,
            sorted(basis.shape[1] for basis in space.bases.values())[len(space.bases) // 2],
        )
    return space


@dataclass(frozen=True)
class _Batch:
    """Tokenised sentences of one language, with their positions in its list."""

    language: str
    positions: list[int]
    token_ids: list[list[int]]


def _check_boundaries(boundaries: Sequence[int] | None, count: int) -> list[int]:
    wanted = sorted(set(range(count) if boundaries is None else boundaries))
    if not wanted or wanted[0] < 0 or wanted[-1] >= count:
        raise ValueError(f"boundaries: got {boundaries}; wanted some of 0 … {count - 1}")
    return wanted


def _context(decoder: nn.Module) -> int | None:
    """Longest input in tokens; None where the configuration names none (ALiBi)."""
    context: int | None = getattr(decoder.config, "max_position_embeddings", None)
    return context


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Mapping[str, Sequence[str]],
    decoder: nn.Module,
    max_length: int | None,
    official: bool,
) -> dict[str, list[list[int]]]:
    """Token ids per language, special tokens included, of the rows that have content tokens in every language."""
    context, rows = _context(decoder), embedding_rows(decoder)
    if max_length is not None and context is not None:
        max_length = min(max_length, context)
    special = set(tokenizer.all_special_ids)
    result: dict[str, list[list[int]]] = {}
    empty: dict[int, str] = {}
    for language, texts in sentences.items():
        encoded = tokenizer(
            list(texts), truncation=max_length is not None, max_length=max_length, verbose=False
        )["input_ids"]
        for position, ids in enumerate(encoded):
            where = f"parallel: sentence {position + 1} (from 1) of {language!r}"
            if context is not None and len(ids) > context:
                raise ValueError(
                    f"{where} has {len(ids)} tokens, more than the model's context of {context}; shorten it, or "
                    "pass max_length (--max-length) to truncate"
                )
            check_token_ids(ids, tokenizer, rows, where)
            if not ids or (not official and special.issuperset(ids)):
                raise ValueError(
                    f"{where}, {texts[position]!r}, has no content token, only special tokens (unknown ones "
                    "count as special); is this the model's tokenizer?"
                )
            if not official and special.issuperset(ids[1:]):
                empty.setdefault(
                    position, f"sentence {position + 1} (from 1) of {language!r}, {texts[position]!r}"
                )
        result[language] = encoded
    if not empty:
        return result
    logger.warning(
        "parallel: %d row(s) are left out: in some language nothing follows the first position, which is the "
        "attention sink and never counts (first: %s).",
        len(empty),
        next(iter(empty.values())),
    )
    return {
        language: [ids for position, ids in enumerate(each) if position not in empty]
        for language, each in result.items()
    }


def _batches(tokens: Mapping[str, list[list[int]]], size: int, *, sort: bool) -> Iterator[_Batch]:
    """Batches of one language each; longest first, so that running out of memory shows at once."""
    for language, sentences in tokens.items():
        order = list(range(len(sentences)))
        if sort:
            order.sort(key=lambda position: -len(sentences[position]))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield _Batch(language, chosen, [sentences[position] for position in chosen])


def _look_at(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    candidates: Tensor,
    *,
    boundaries: Sequence[int],
    official: bool,
) -> dict[str, Tensor]:
    """What :meth:`.SpaceAccumulator.update` wants to know of a batch; candidates: (B, T), see ``content_mask``."""
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("representations", "square_norms", "tokens", "median_norms", "sink_shares")
    }

    def visit(_: int, hidden_states: Tensor) -> None:
        device = hidden_states.device
        attended = attention_mask.to(device) != 0
        content, medians, norms = ordinary_tokens(hidden_states, candidates.to(device))
        means = ops.masked_mean_pool(hidden_states, content).float()
        sinks = attended & ~content
        found["sink_shares"].append(
            _sink_share(ops.masked_mean_pool(hidden_states, sinks), sinks, means, content)
        )
        if official:
            means = ops.masked_mean_pool(hidden_states, attended, normalize=True).float()
        found["representations"].append(means)
        found["square_norms"].append((norms.square() * content).sum())
        found["tokens"].append(content.sum())
        found["median_norms"].append(medians)

    visit_boundaries(model, input_ids, attention_mask, boundaries, visit)
    return {name: _gather(each) for name, each in found.items()}


def _gather(values: Sequence[Tensor]) -> Tensor:
    """Stack on the CPU: the boundaries of a model spread by ``device_map`` lie on several devices."""
    return torch.stack([value.cpu() for value in values])


def _sink_share(left_out: Tensor, left_out_mask: Tensor, content: Tensor, content_mask: Tensor) -> Tensor:
    """(B,) ‖Σ h left out‖ / (‖Σ h left out‖ + ‖Σ h content‖), from means (B, d): what a plain mean is made of."""
    # The mean times the count is the sum, of which nothing under the mask was read.
    sinks, rest = (
        mean.norm(dim=-1) * mask.sum(1) for mean, mask in ((left_out, left_out_mask), (content, content_mask))
    )
    return sinks / (sinks + rest).clamp_min(torch.finfo(torch.float32).tiny)


def _pad(sentences: Sequence[Sequence[int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) token ids and attention mask, padded on the right: positions then count from 0 in every model."""
    longest = max(map(len, sentences))
    input_ids = torch.tensor([[*ids, *[filler] * (longest - len(ids))] for ids in sentences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sentences])
    return input_ids.to(device), mask.to(device)


def _input_device(decoder: nn.Module) -> torch.device:
    parameter: Tensor = next(decoder.get_input_embeddings().parameters())  # type: ignore[operator]
    return parameter.device


def _tokenizer_card(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return {
        "class": type(tokenizer).__name__,
        "name_or_path": str(tokenizer.name_or_path or ""),
        "vocabulary_size": len(tokenizer),
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "bos_token": tokenizer.bos_token,
        "special_ids": sorted(tokenizer.all_special_ids),
    }
