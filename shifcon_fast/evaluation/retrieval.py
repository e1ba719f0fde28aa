"""Cross-lingual retrieval and MEXA at the boundaries of a decoder.

Sentence representations r(s, k) are means over the content tokens at boundary k, made unit length; S = a tᵀ
are the cosines of the N sentences of one language (rows) with their N translations (columns).

* retrieval, top-1: the share of rows i with S_ii > S_ij for all j ≠ i (query in the row's language), and the
  same for columns (query in the column's language). Chance is 1/N.
* MEXA (Kargaran et al. 2024, https://arxiv.org/abs/2410.05873, eq. 1): the share of i with S_ii strictly
  greater than all others in its row *and* its column. Never above either retrieval.

A tie is not a hit: where all representations are equal, everything is 0, not 1. So a sentence that occurs
twice in the other language is a miss: its two copies are equally near. (Exact copies exist in real data: up
to three a language in NTREX-128. :func:`duplicates` counts them; 1 - duplicates/N bounds what can be
reached.)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shifcon_fast import ops
from shifcon_fast.evaluation.sentences import input_device, sentence_batches
from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.modeling.content import content_mask
from shifcon_fast.modeling.handle import ShiftHandle

log = logging.getLogger(__name__)

_SIMILARITIES_AT_ONCE = 32_000_000  # 128 MB of float32


@dataclass(frozen=True)
class RetrievalScores:
    """Shares between 0 and 1, one for each boundary.

    Attributes:
        to_pivot: query in the language, candidates in the pivot language.
        from_pivot: query in the pivot language, candidates in the language.
        mexa: both at once.
    """

    to_pivot: list[float]
    from_pivot: list[float]
    mexa: list[float]


@dataclass(frozen=True)
class Retrieval:
    """How well translations find each other.

    Attributes:
        boundaries: where; scores are in this order.
        scores: language → scores against the pivot, for every language but the pivot.
        matrix_boundary: where ``matrix`` was taken.
        matrix: (K, K), row = language of the query, column = language of the candidates, in the order of
            ``languages``; None on the diagonal.
        duplicates: language → sentences that occur more than once.
    """

    pivot: str
    languages: list[str]
    sentences: int
    boundaries: list[int]
    scores: dict[str, RetrievalScores]
    matrix_boundary: int
    matrix: list[list[float | None]]
    duplicates: dict[str, int]

    def __post_init__(self) -> None:
        if self.sentences < 1:
            raise ValueError(f"sentences: got {self.sentences}; wanted at least one")
        if {len(self.matrix), *map(len, self.matrix)} != {len(self.languages)}:
            raise ValueError(f"matrix: wanted a row and a column for each of {self.languages}")
        for code, found in self.scores.items():
            if {len(found.to_pivot), len(found.from_pivot), len(found.mexa)} != {len(self.boundaries)}:
                raise ValueError(
                    f"scores of {code!r}: wanted one for each of {len(self.boundaries)} boundaries"
                )


def measure_retrieval(
    model: nn.Module,
    tokenizer: Any,
    parallel: Mapping[str, Sequence[str]],
    *,
    pivot: str,
    boundaries: Sequence[int],
    matrix_boundary: int,
    handle: ShiftHandle | None = None,
    batch_size: int = 16,
    memory_gib: float = 2.0,
    progress: bool = False,
) -> Retrieval:
    """Retrieval and MEXA against the pivot at every boundary, and between all languages at one.

    Args:
        parallel: language → sentences, aligned by position.
        handle: measure shifted with this attachment; None for an unshifted pass.
        memory_gib: how much memory the representations may take; where they need more, the boundaries are
            measured in several passes over the data.

    Raises:
        ValueError: fewer than two sentences, lists of different lengths, or a pivot that is not in the data.
    """
    languages = list(parallel)
    count = check_parallel(parallel, pivot)
    scores: dict[str, list[tuple[float, float, float]]] = {code: [] for code in languages if code != pivot}
    matrix: list[list[float | None]] = []
    counted: Tensor | None = None
    wanted = sorted({*boundaries, matrix_boundary})
    hidden = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    fits = max(1, int(memory_gib * 2**30 // (4 * hidden * count * len(languages))))
    for chunk in _chunks(wanted, fits):
        spaces = {
            code: sentence_representations(
                model,
                tokenizer,
                sentences,
                chunk,
                language=code,
                handle=handle,
                batch_size=batch_size,
                progress=progress,
            )
            for code, sentences in parallel.items()
        }
        if counted is None:
            counted = _rows_with_content(spaces)
        spaces = {code: each[:, counted] for code, each in spaces.items()}
        if matrix_boundary in chunk:
            matrix = _matrix([spaces[code][chunk.index(matrix_boundary)] for code in languages])
        kept = [index for index, boundary in enumerate(chunk) if boundary in set(boundaries)]
        for code, found in scores.items():
            found += retrieval_scores(spaces[code][kept], spaces[pivot][kept])
    assert counted is not None  # there is at least one boundary
    return Retrieval(
        pivot=pivot,
        languages=languages,
        sentences=len(counted),
        boundaries=sorted(set(boundaries)),
        scores={
            code: RetrievalScores(*(list(column) for column in zip(*found, strict=True)))
            for code, found in scores.items()
        },
        matrix_boundary=matrix_boundary,
        matrix=matrix,
        duplicates={code: duplicates([texts[i] for i in counted]) for code, texts in parallel.items()},
    )


@torch.no_grad()
def sentence_representations(
    model: nn.Module,
    tokenizer: Any,
    sentences: Sequence[str],
    boundaries: Sequence[int],
    *,
    language: str,
    handle: ShiftHandle | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """r(s, k): (boundaries, sentences, d) float32 on the CPU; shifted where a handle is given."""
    representations: Tensor | None = None
    bar = tqdm(total=len(sentences), desc=f"representations {language}", disable=not progress, leave=False)
    what = f"parallel[{language!r}]"
    for batch in sentence_batches(model, tokenizer, sentences, batch_size=batch_size, what=what):
        ids = None
        if handle is not None:
            ids = handle.language_ids([language] * len(batch.rows)).to(input_device(model))
        mask = content_mask(batch.input_ids, batch.attention_mask, tokenizer.all_special_ids)
        pooled = boundary_representations(
            model, batch.input_ids, batch.attention_mask, mask, list(boundaries), ids
        ).cpu()
        if representations is None:
            representations = pooled.new_empty(len(boundaries), len(sentences), pooled.shape[-1])
        representations[:, batch.rows] = pooled
        bar.update(len(batch.rows))
    bar.close()
    if representations is None:
        raise ValueError(f"{what} holds no sentence; wanted at least two")
    return representations


def _rows_with_content(spaces: Mapping[str, Tensor]) -> Tensor:
    """The rows that have a content token in every language; a sentence without any has the representation 0."""
    has_content = torch.stack([each[0].abs().amax(dim=-1) > 0 for each in spaces.values()]).all(dim=0)
    if not has_content.all():
        first = int((~has_content).nonzero()[0])
        log.warning(
            "parallel: %d row(s) are left out of retrieval, the first is row %d (from 0): in some language the "
            "sentence has no content token (docs/method.md).",
            int((~has_content).sum()),
            first,
        )
    return has_content.nonzero().flatten()


def retrieval_scores(source: Tensor, target: Tensor) -> list[tuple[float, float, float]]:
    """(retrieval source → target, retrieval target → source, MEXA) for each of L boundaries.

    Args:
        source, target: (L, N, d) representations, row i of one being the translation of row i of the other.
    """
    scores: list[tuple[float, float, float]] = []
    step = max(1, _SIMILARITIES_AT_ONCE // source.shape[1] ** 2)
    for a, b in zip(source.split(step), target.split(step), strict=True):
        rows, columns = top1_hits(ops.contrastive_similarity(a, b))
        scores += zip(_share(rows), _share(columns), _share(rows & columns), strict=True)
    return scores


def top1_hits(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Which diagonal entries of (L, N, N) are strictly greatest in their row, and in their column: (L, N) bool."""
    diagonal = similarity.diagonal(dim1=-2, dim2=-1)
    others = similarity.masked_fill(torch.eye(similarity.shape[-1], dtype=torch.bool), -torch.inf)
    return diagonal > others.amax(dim=-1), diagonal > others.amax(dim=-2)


def duplicates(sentences: Sequence[str]) -> int:
    """How many sentences have an exact copy elsewhere in the list."""
    return sum(count for count in Counter(sentences).values() if count > 1)


def check_parallel(parallel: Mapping[str, Sequence[str]], pivot: str) -> int:
    """The number of sentences of aligned lists.

    Raises:
        ValueError: a pivot that is not there, fewer than two sentences, or lists of different lengths.
    """
    if pivot not in parallel:
        raise ValueError(f"pivot is {pivot!r}, which is not in the data; it has {', '.join(parallel)}")
    lengths = {code: len(sentences) for code, sentences in parallel.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"parallel has {lengths} sentences; wanted the same number in every language")
    if lengths[pivot] < 2:
        raise ValueError(f"parallel has {lengths[pivot]} sentence(s) a language; wanted at least two")
    return lengths[pivot]


def _matrix(spaces: Sequence[Tensor]) -> list[list[float | None]]:
    matrix: list[list[float | None]] = [[None] * len(spaces) for _ in spaces]
    for row, source in enumerate(spaces):
        for column in range(row):
            forward, backward, _ = retrieval_scores(source[None], spaces[column][None])[0]
            matrix[row][column], matrix[column][row] = forward, backward
    return matrix


def _share(hits: Tensor) -> list[float]:
    return (hits.sum(dim=-1, dtype=torch.float64) / hits.shape[-1]).tolist()


def _chunks(values: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])
