"""Reference ``info_nce`` in plain PyTorch, tile by tile: extra memory O(tile), whatever N.

S = scale · u b′ᵀ (see ``unit_rows`` for u and b′). One tile of S gives row and column sums:

    loss = 1 / (2N) Σ_i [lse_j S_ij + lse_j S_ji - 2 S_ii]
    ∂loss/∂S = (P_row + P_column - 2 I) / (2N)

The log-sum-exps run online over the tiles (Milakov & Gimelshein 2018, arXiv 1805.02867), so no scale overflows.
They are kept in two parts, the maximum m and l = log Σ exp(S - m), and P = exp((S - m) - l): their float32 sum
would put an error of |m| ulps into P, and P - 1 of a well separated positive is a small number.
"""

# ruff: noqa: PLR0917 - the arguments follow the operator's schema, which is positional

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shifcon_fast.ops.library import compute_dtype
from shifcon_fast.ops.reference.unit_rows import inverse_lengths, through_unit

# 1,024 × 1,024 float32 logits are 4 MiB: large enough for the matrix product, small enough for the cache.
_TILE = 1024


def _blocks(size: int, length: int) -> Iterator[slice]:
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


class _Rows:
    """u and b′ of one call, made block by block so that no float32 copy of a or b is held."""

    def __init__(self, a: Tensor, b: Tensor, normalize: bool, recenter: bool) -> None:
        self.compute = compute_dtype(a.dtype)
        self.a, self.b = a, b
        self.problems, self.count, _ = a.shape
        self.tile = min(self.count, _TILE)
        self.group = max(1, _TILE * _TILE // self.tile**2)  # small problems share a tile
        self.inverse_a: Tensor | None = None
        self.inverse_b: Tensor | None = None
        if normalize:
            self.inverse_a = a.new_empty((*a.shape[:2], 1), dtype=self.compute)
            self.inverse_b = torch.empty_like(self.inverse_a)
            for problems, rows in self.blocks():
                self.inverse_a[problems, rows] = inverse_lengths(a[problems, rows], self.compute)
                self.inverse_b[problems, rows] = inverse_lengths(b[problems, rows], self.compute)
        self.offset: Tensor | None = None
        if recenter:
            self.offset = a.new_zeros((self.problems, 1, a.shape[2]), dtype=self.compute)
            for problems, rows in self.blocks():
                gap = self.unit_a(problems, rows) - self.unit_b(problems, rows)
                self.offset[problems] += gap.sum(1, keepdim=True) / self.count

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        for problems in _blocks(self.problems, self.group):
            for rows in _blocks(self.count, self.tile):
                yield problems, rows

    def unit_a(self, problems: slice, rows: slice) -> Tensor:
        block = self.a[problems, rows].to(self.compute)
        return block if self.inverse_a is None else block * self.inverse_a[problems, rows]

    def unit_b(self, problems: slice, rows: slice) -> Tensor:
        block = self.b[problems, rows].to(self.compute)
        return block if self.inverse_b is None else block * self.inverse_b[problems, rows]

    def moved_b(self, problems: slice, rows: slice) -> Tensor:
        block = self.unit_b(problems, rows)
        return block if self.offset is None else block + self.offset[problems]


class _Softmax:
    """Online maximum and sum of exponentials along one side of S: parts[0] = m, parts[1] = Σ exp(S - m), (L, N)."""

    def __init__(self, like: Tensor, compute: torch.dtype) -> None:
        self.parts = like.new_zeros((2, *like.shape[:2]), dtype=compute)
        self.parts[0] = float("-inf")

    def add(self, problems: slice, rows: slice, logits: Tensor, over: int) -> None:
        maximum, total = self.parts[:, problems, rows]
        larger = torch.maximum(maximum, logits.amax(over))
        exponentials = (logits - larger.unsqueeze(over)).exp_()
        total.mul_((maximum - larger).exp_()).add_(exponentials.sum(over))
        maximum.copy_(larger)

    def finish(self) -> Tensor:
        self.parts[1].log_()
        return self.parts


def forward(
    a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (L,), and (m, l) of the rows and of the columns of S, each (2, L, N), all float32."""
    source = _Rows(a, b, normalize, recenter)
    of_rows, of_columns = _Softmax(a, source.compute), _Softmax(a, source.compute)
    diagonal = a.new_empty(a.shape[:2], dtype=source.compute)
    for problems, rows in source.blocks():
        block_a = source.unit_a(problems, rows)
        for columns in _blocks(source.count, source.tile):
            logits = torch.bmm(block_a, source.moved_b(problems, columns).mT).mul_(scale)
            of_rows.add(problems, rows, logits, over=2)
            of_columns.add(problems, columns, logits, over=1)
            if columns == rows:
                diagonal[problems, rows] = logits.diagonal(dim1=1, dim2=2)
    row_parts, column_parts = of_rows.finish(), of_columns.finish()
    per_row = (row_parts[0] - diagonal) + row_parts[1] + (column_parts[0] - diagonal) + column_parts[1]
    loss = per_row.mean(1, dtype=torch.float64) / 2
    return loss.to(source.compute), row_parts, column_parts


def _probabilities(logits: Tensor, parts: Tensor, along: int) -> Tensor:
    maximum, log_sum = parts.unsqueeze(along + 1)
    # S is at most m; the clamp keeps a product that rounds otherwise than in the forward from undoing that.
    return (logits - maximum).clamp_(max=0).sub_(log_sum).exp_()


def backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    row_parts: Tensor,
    column_parts: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a and b in their dtype, each only when needed."""
    source = _Rows(a, b, normalize, recenter)
    weight = (grad.to(source.compute) * (scale / (2 * source.count))).reshape(-1, 1, 1)
    grad_a = a.new_zeros(a.shape, dtype=source.compute) if need_a else None
    grad_b = b.new_zeros(b.shape, dtype=source.compute) if need_b or recenter else None
    for problems, rows in source.blocks():
        block_a = source.unit_a(problems, rows)
        for columns in _blocks(source.count, source.tile):
            block_b = source.moved_b(problems, columns)
            logits = torch.bmm(block_a, block_b.mT).mul_(scale)
            tile = _probabilities(logits, row_parts[:, problems, rows], along=2)
            of_columns = _probabilities(logits, column_parts[:, problems, columns], along=1)
            if columns == rows:  # each direction on its own: P - 1 first, so that small differences survive
                tile.diagonal(dim1=1, dim2=2).sub_(1)
                of_columns.diagonal(dim1=1, dim2=2).sub_(1)
            tile.add_(of_columns).mul_(weight[problems])
            if grad_a is not None:
                grad_a[problems, rows].baddbmm_(tile, block_b)
            if grad_b is not None:
                grad_b[problems, columns].baddbmm_(tile.mT, block_a)
    if recenter and grad_b is not None:
        mean = grad_b.mean(1, keepdim=True)
        grad_b -= mean
        if grad_a is not None:
            grad_a += mean
    if source.inverse_a is not None and source.inverse_b is not None:
        for at in source.blocks():
            if grad_a is not None:
                grad_a[at] = through_unit(grad_a[at], source.unit_a(*at), source.inverse_a[at])
            if grad_b is not None and need_b:
                grad_b[at] = through_unit(grad_b[at], source.unit_b(*at), source.inverse_b[at])
    return (
        grad_a.to(a.dtype) if grad_a is not None else None,
        grad_b.to(b.dtype) if need_b and grad_b is not None else None,
    )
