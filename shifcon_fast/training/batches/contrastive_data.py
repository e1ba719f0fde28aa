"""Batches of translation pairs, each a pure function of (seed, step, micro-batch, rank): resume needs no state."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shifcon_fast.data.errors import DataError
from shifcon_fast.modeling import vocabulary
from shifcon_fast.modeling.content import content_mask
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.modeling.vocabulary import check_token_ids, gives_unknown_ids, padding_id, within_context
from shifcon_fast.notices import warn_once
from shifcon_fast.objective.mcl import ContrastiveBatch
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.batches.instruction_data import pad_right

logger = logging.getLogger(__name__)


class ContrastiveSampler:
    """Draws batches of N pairs (pivot sentence, its translation), no text twice among the pairs of a batch.

    Rows are drawn without replacement within a batch and independently between batches. A sentence without a
    content token (one word, where the tokenizer puts no BOS in front of it) is passed over, and the first is named.

    Args:
        parallel: sentences aligned by position, as ``read_parallel`` gives them.
        pivot: its code.
        tokenizer: the model's.
        language_id: the id of a language code.
        batch_size: N.
        processes: whose batches are contrasted with each other: together they are one batch, in which no text is
            twice, and the same one whatever their number.
        mixed_languages: draw a language for each pair; otherwise one for the whole batch.
        max_length_pivot, max_length_other: tokens kept of a sentence, special tokens included.
        pool_all_tokens: represent a sentence by all its tokens (official), not by its content tokens.
        seed: of the draws.
        embedding_rows: ids that the model has rows for; None takes every id to have one.

    Raises:
        DataError: a pivot that is not in the data, no other language, fewer distinct sentences than N.
        ValueError: a token that the model has no row for.
    """

    def __init__(
        self,
        parallel: Mapping[str, Sequence[str]],
        pivot: str,
        tokenizer: Any,
        language_id: Callable[[str], int],
        *,
        batch_size: int,
        processes: int = 1,
        mixed_languages: bool = True,
        max_length_pivot: int = 256,
        max_length_other: int = 256,
        pool_all_tokens: bool = False,
        seed: int = 0,
        embedding_rows: int | None = None,
    ) -> None:
        self._batch_size = batch_size
        self._processes = processes
        if pivot not in parallel:
            raise DataError(f"parallel: has {', '.join(parallel)}; wanted the pivot {pivot!r} too")
        self._others = [language for language in parallel if language != pivot]
        if not self._others:
            raise DataError(f"parallel: has only the pivot {pivot!r}; wanted at least one other language")
        for language, sentences in parallel.items():
            if (distinct := len(set(sentences))) < batch_size * processes:
                raise DataError(
                    f"parallel: {language!r} has {distinct} distinct sentences; wanted at least "
                    f"{self._wanted()}, or they would be their own negatives"
                )
        if embedding_rows is not None and gives_unknown_ids(tokenizer, embedding_rows):
            for language, sentences in parallel.items():  # now, not in the middle of training
                for index, ids in enumerate(tokenizer(list(sentences))["input_ids"]):
                    where = f"parallel: sentence {index} (from 0) of {language!r}"
                    check_token_ids(ids, tokenizer, embedding_rows, where)
        self._filler = padding_id(tokenizer, embedding_rows)
        self._parallel = parallel
        self._pivot = pivot
        self._tokenizer = tokenizer
        self._ids = {language: language_id(language) for language in parallel}
        self._mixed = mixed_languages
        self._pool_all = pool_all_tokens
        self._seed = seed
        self._tokens = {
            language: _Tokens(len(sentences), max_length_pivot if language == pivot else max_length_other)
            for language, sentences in parallel.items()
        }
        self._passed_over = False
        self._ready: tuple[tuple[int, int, int], ContrastiveBatch] | None = None

    def pairs(self, step: int, micro_batch: int = 0, rank: int = 0) -> list[tuple[int, str]]:
        """(row, language) of each pair of a batch."""
        if self._processes > 1:  # one batch for all, of which each has its part
            drawn = self._draw((step, micro_batch, 0), self._batch_size * self._processes)
            return drawn[rank * self._batch_size :][: self._batch_size]
        return self._draw((step, micro_batch, rank), self._batch_size)

    def _draw(self, position: tuple[int, int, int], count: int) -> list[tuple[int, str]]:
        random = np.random.default_rng((self._seed, *position))
        drawn = random.integers(len(self._others), size=count if self._mixed else 1)
        languages = [self._others[int(index)] for index in drawn] * (1 if self._mixed else count)
        pairs: list[tuple[int, str]] = []
        seen: set[str] = set()
        for row in random.permutation(len(self._parallel[self._pivot])):
            language = languages[len(pairs)]
            texts = {self._parallel[self._pivot][row], self._parallel[language][row]}
            if seen.isdisjoint(texts) and all(
                self._counts(int(row), each) for each in (self._pivot, language)
            ):
                seen |= texts
                pairs.append((int(row), language))
                if len(pairs) == count:
                    return pairs
        raise DataError(
            f"parallel: only {len(pairs)} rows whose sentences all differ and have a content token; wanted "
            f"{self._wanted()}"
        )

    def _wanted(self) -> str:
        together = f" x {self._processes} processes" if self._processes > 1 else ""
        return f"contrastive_batch_size = {self._batch_size}{together}"

    def batch(self, step: int, micro_batch: int = 0, rank: int = 0) -> ContrastiveBatch:
        """The batch of an optimizer step, a micro-batch in it, and a process."""
        position = (step, micro_batch, rank)
        if self._ready is not None and self._ready[0] == position:
            return self._ready[1]
        return self._make(position)

    def prepare(self, step: int, micro_batch: int = 0, rank: int = 0) -> None:
        """Make a batch now, that :meth:`batch` then has at once: while the device is busy with the one before.

        Where there is a CUDA device it is in pinned memory, from which copies to the device need no waiting.
        """
        position = (step, micro_batch, rank)
        batch = self._make(position)
        if torch.cuda.is_available():
            batch = ContrastiveBatch(**{name: values.pin_memory() for name, values in batch.items()})  # type: ignore
        self._ready = (position, batch)

    def _make(self, position: tuple[int, int, int]) -> ContrastiveBatch:
        pairs = self.pairs(*position)
        rows = self._encode(self._pivot, [row for row, _ in pairs])
        by_language: dict[str, list[int]] = {}
        for row, language in pairs:
            by_language.setdefault(language, []).append(row)
        encoded = {language: iter(self._encode(language, each)) for language, each in by_language.items()}
        rows += [next(encoded[language]) for _, language in pairs]
        input_ids = pad_right(rows, self._filler)
        attention_mask = pad_right([[1] * len(row) for row in rows], 0)
        pool_mask = attention_mask.bool()
        if not self._pool_all:
            pool_mask = content_mask(input_ids, attention_mask, self._tokenizer.all_special_ids)
        languages = [self._ids[self._pivot]] * len(pairs) + [self._ids[language] for _, language in pairs]
        return ContrastiveBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pool_mask=pool_mask,
            language_ids=torch.tensor(languages),
        )

    def _counts(self, row: int, language: str) -> bool:
        """Whether a sentence has a token to average; looked at once."""
        known = self._tokens[language].has_content
        if known[row] < 0:
            (ids,) = self._encode(language, [row])
            content = content_mask(
                torch.tensor([ids], dtype=torch.long), None, self._tokenizer.all_special_ids
            )
            known[row] = bool(ids) if self._pool_all else bool(content.any())
            if not known[row] and not self._passed_over:
                self._passed_over = True
                logger.warning(
                    "parallel: sentence %d (from 0) of %r, %r, has no content token (docs/method.md); contrastive "
                    "batches are made without it and others like it.",
                    row,
                    language,
                    self._parallel[language][row][:40],
                )
        return bool(known[row])

    def _encode(self, language: str, rows: Sequence[int]) -> list[list[int]]:
        """Token ids of sentences of a language, each of which is tokenised once."""
        kept, sentences = self._tokens[language], self._parallel[language]
        new = [row for row in dict.fromkeys(rows) if kept.first[row] < 0]
        if new:
            texts = [sentences[row] for row in new]
            encoded = self._tokenizer(texts, truncation=True, max_length=kept.max_length)
            for row, ids in zip(new, encoded["input_ids"], strict=True):
                kept.put(row, ids)
            cut = [row for row, each in zip(new, encoded.encodings or (), strict=False) if each.overflowing]
            if cut:
                warn_once(
                    f"parallel: sentences of {language!r} have more than {kept.max_length} tokens "
                    "(max_length_pivot, max_length_other, or the model's context) and are cut at the end for the "
                    f"contrastive loss; the first is number {cut[0]} (from 0)."
                )
        return [kept.get(row) for row in rows]


class _Tokens:
    """Token ids of a language's sentences as they become known: 4 bytes a token, 13 a sentence."""

    def __init__(self, sentences: int, max_length: int) -> None:
        self.max_length = max_length
        self.first = np.full(sentences, -1, dtype=np.int64)
        self.has_content = np.full(sentences, -1, dtype=np.int8)
        self._count = np.zeros(sentences, dtype=np.int32)
        self._ids = array("i")

    def put(self, row: int, ids: Sequence[int]) -> None:
        self.first[row], self._count[row] = len(self._ids), len(ids)
        self._ids.extend(ids)

    def get(self, row: int) -> list[int]:
        first = int(self.first[row])
        return self._ids[first : first + int(self._count[row])].tolist()


def make_sampler(
    args: ShifConArguments,
    handle: ShiftHandle | None,
    parallel: Mapping[str, Sequence[str]] | None,
    tokenizer: Any,
) -> ContrastiveSampler | None:
    """Contrastive batches; None where neither a loss nor the vectors need any.

    Raises:
        ValueError: they are needed and there is no parallel text.
    """
    follows = args.vectors in ("ema", "running") and (args.shift or args.w_mcl)
    if handle is None or not (args.w_mcl or follows or args.keeps_pivot):
        return None
    if parallel is None:
        reason = f"vectors={args.vectors!r} follows its sentences"
        if args.keeps_pivot:
            weights = {name: getattr(args, name) for name in ("w_replay", "w_distillation", "w_anchor")}
            reason = " and ".join(f"{name} is {weight}" for name, weight in weights.items() if weight)
        if args.w_mcl:
            reason = f"w_mcl is {args.w_mcl}"
        raise ValueError(f"parallel: none given; wanted translations, for {reason}")
    return ContrastiveSampler(
        parallel,
        handle.shift.pivot,
        tokenizer,
        handle.shift.language_id,
        batch_size=int(args.contrastive_batch_size or 0),
        processes=args.world_size if args.gather_across_devices else 1,
        mixed_languages=bool(args.mixed_languages),
        max_length_pivot=within_context(args.max_length_pivot, handle.model),
        max_length_other=within_context(args.max_length_other, handle.model),
        pool_all_tokens=args.recipe == "official",
        seed=args.seed,
        embedding_rows=vocabulary.embedding_rows(handle.model),
    )
