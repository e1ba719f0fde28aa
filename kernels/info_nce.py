"""Symmetric InfoNCE over in-batch negatives, without an N × N matrix.

    S = scale · u b′ᵀ                                     a, b: (L, N, d); u, b′ as in ``contrastive_similarity``
    R_i = log Σ_j exp S_ij,   C_j = log Σ_i exp S_ij      R, C: (2, L, N) float32, kept for the backward
    loss = 1 / (2N) Σ_i [R_i + C_i - 2 S_ii]              loss: (L,) float32
    ∂loss/∂S = (P_row + P_column - 2 I) / (2N),           P_row = exp(S_ij - R_i),   P_column = exp(S_ij - C_j)

R and C are kept as a maximum m and l = log Σ exp(S - m), and P = exp((S - m) - l): their float32 sum would put an
error of |m| ulps into P, and P - 1 of a well separated positive is a small number.

A tile of S gives its part of the row sums and of the column sums at once, so the symmetric loss costs one pass over
S forward and one backward. In units of N² d multiply-adds: 1 + 1, and 2 for the products of ∂loss/∂S with a and b.

Two paths. Up to N = 128, what training uses, a problem's S is one tile: two launches forward (the products, split
along d so that L problems fill the device; the loss), three backward (the products again, the weights W, the
gradients). Beyond, tiles: forward in one launch per stripe of rows, backward one stripe of W at a time.

No atomics: every sum has one order. Source: van den Oord et al. 2018, arXiv 1807.03748.
"""

# ruff: noqa: PLR0917 - kernels take their pointers and strides by position, as launches pass them

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contrastive_similarity import (
    Scaling,
    library_products,
    logits_tile,
    prepare,
    through_unit,
    tile_options,
    tile_pointers,
    tile_start,
    weights_dtype,
)
from .launch import cached_launch, ceil_div, multiprocessors, next_power_of_2, on_device_of, options

# --- One tile, N ≤ 128


@cached_launch
@triton.jit
def _split_products(
    a_ptr, b_ptr, product_ptr, squares_ptr, count, hidden, depth_per_split,
    UPCAST: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """a_i · b_j, ‖a_i‖² and ‖b_j‖² over a part of d, for a whole problem."""
    problem, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, TILE)
    present = (row < count)[:, None]
    a_start = a_ptr + problem * count * hidden
    b_start = b_ptr + problem * count * hidden
    first = split * depth_per_split
    last = tl.minimum(first + depth_per_split, hidden)
    products = tl.zeros((TILE, TILE), tl.float32)
    squares_a = tl.zeros((TILE,), tl.float32)
    squares_b = tl.zeros((TILE,), tl.float32)
    for start in range(first, last, DEPTH):
        depth = start + tl.arange(0, DEPTH)[None, :]
        # A split is a multiple of DEPTH wide, so that only the last one can end inside a block: at d.
        live = present & (depth < hidden)
        a = tl.load(a_start + row[:, None] * hidden + depth, mask=live, other=0.0)
        b = tl.load(b_start + row[:, None] * hidden + depth, mask=live, other=0.0)
        squares_a += tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
        squares_b += tl.sum(b.to(tl.float32) * b.to(tl.float32), axis=1)
        if UPCAST:  # the interpreter has no bfloat16 arithmetic
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    slot = problem * tl.num_programs(1) + split
    at = tile_pointers(product_ptr, slot, count, count, 0, 0, TILE)
    tl.store(at, products, mask=present & (row < count)[None, :])
    tl.store(squares_ptr + slot * 2 * count + row, squares_a, mask=row < count)
    tl.store(squares_ptr + slot * 2 * count + count + row, squares_b, mask=row < count)


@triton.jit
def _whole_products(
    product_ptr, squares_ptr, problem, splits, count, row_start, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """Add the splits: some rows of a_i · b_j, their ‖a_i‖², and every ‖b_j‖².

    They lie in L2 and come through shared memory, so that three are under way at once, or all of one that is larger
    than 16 KiB. Loaded into registers, every piece would be waited for.
    """
    STAGES: tl.constexpr = 4 if ROWS * TILE <= 4096 else 2
    row, column = row_start + tl.arange(0, ROWS), tl.arange(0, TILE)
    inside = (row < count)[:, None] & (column < count)[None, :]
    products = tl.zeros((ROWS, TILE), tl.float32)
    squares_a = tl.zeros((ROWS,), tl.float32)
    squares_b = tl.zeros((TILE,), tl.float32)
    for split in tl.range(splits, num_stages=STAGES):
        slot = problem * splits + split
        at = row[:, None] * count + column[None, :]
        products += tl.load(product_ptr + slot * count * count + at, mask=inside, other=0.0)
        squares_a += tl.load(squares_ptr + slot * 2 * count + row, mask=row < count, other=0.0)
        squares_b += tl.load(squares_ptr + slot * 2 * count + count + column, mask=column < count, other=0.0)
    return products, squares_a, squares_b


@triton.jit
def _inverse_root(squares):
    """1 / √squares, and 0 for a zero row."""
    return tl.where(squares > 0, 1.0 / tl.sqrt_rn(tl.where(squares > 0, squares, 1.0)), 0.0)


@triton.jit
def _whole_logits(products, squares_a, squares_b, scale, NORMALIZE: tl.constexpr):
    """S of a problem. Forward and backward must round alike: exp(S - m) of the largest logit is 1 in both."""
    if NORMALIZE:
        products *= _inverse_root(squares_a)[:, None]
        products *= _inverse_root(squares_b)[None, :]
    return products * scale


@triton.jit
def _maximum_and_sum(logits, present, AXIS: tl.constexpr):
    """m and Σ exp(S - m) along an axis of a tile whose outside is -inf; 0 and 1 for rows that lie outside."""
    maximum = tl.where(present, tl.max(logits, axis=AXIS), 0.0)
    total = tl.sum(tl.exp(logits - tl.expand_dims(maximum, AXIS)), axis=AXIS)
    return maximum, tl.where(present, total, 1.0)


@cached_launch
@triton.jit
def _whole_loss(
    product_ptr, squares_ptr, loss_ptr, row_max_ptr, row_log_ptr, column_max_ptr, column_log_ptr,
    splits, count, scale: tl.float32, NORMALIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """R, C and the loss of one problem."""
    problem = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, TILE)
    present = row < count
    products, squares_a, squares_b = _whole_products(
        product_ptr, squares_ptr, problem, splits, count, 0, TILE, TILE
    )
    logits = _whole_logits(products, squares_a, squares_b, scale, NORMALIZE)
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], logits, 0.0), axis=1)
    logits = tl.where(present[:, None] & present[None, :], logits, -float("inf"))
    row_max, row_sum = _maximum_and_sum(logits, present, 1)
    column_max, column_sum = _maximum_and_sum(logits, present, 0)
    at = problem * count + row
    tl.store(row_max_ptr + at, row_max, mask=present)
    tl.store(row_log_ptr + at, tl.log(row_sum), mask=present)
    tl.store(column_max_ptr + at, column_max, mask=present)
    tl.store(column_log_ptr + at, tl.log(column_sum), mask=present)
    per_row = (row_max - diagonal) + tl.log(row_sum) + (column_max - diagonal) + tl.log(column_sum)
    tl.store(loss_ptr + problem, tl.sum(tl.where(present, per_row, 0.0)) / (2.0 * count))


@triton.jit
def _tile_of_weights(
    logits, row_max_ptr, row_log_ptr, column_max_ptr, column_log_ptr, problem, row, column, count
):
    """P_row + P_column - 2 I, each direction on its own: P - 1 first, so that small differences survive."""
    row_at, column_at = problem * count + row, problem * count + column
    row_max = tl.load(row_max_ptr + row_at, mask=row < count, other=0.0)[:, None]
    row_log = tl.load(row_log_ptr + row_at, mask=row < count, other=0.0)[:, None]
    column_max = tl.load(column_max_ptr + column_at, mask=column < count, other=0.0)[None, :]
    column_log = tl.load(column_log_ptr + column_at, mask=column < count, other=0.0)[None, :]
    identity = tl.where(row[:, None] == column[None, :], 1.0, 0.0)
    # S is at most m; the minimum keeps a product that rounds otherwise than in the forward from undoing that.
    weights = tl.exp(tl.minimum(logits - row_max, 0.0) - row_log) - identity
    return weights + (tl.exp(tl.minimum(logits - column_max, 0.0) - column_log) - identity)


@cached_launch
@triton.jit
def _whole_weights(
    product_ptr, squares_ptr, row_max_ptr, row_log_ptr, column_max_ptr, column_log_ptr,
    grad_ptr, weights_ptr, along_ptr, splits, count, scale: tl.float32,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some rows of one problem's W, and α_i² a_i · p_i = α_i² Σ_j W_ij (a_i · b_j), which needs no pass over d.

    ``along`` (L, 1 + blocks of rows, N) gets that for a, then each block's part of the same for b.
    """
    problem, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column = block * ROWS + tl.arange(0, ROWS), tl.arange(0, TILE)
    inside = (row < count)[:, None] & (column < count)[None, :]
    products, squares_a, squares_b = _whole_products(
        product_ptr, squares_ptr, problem, splits, count, block * ROWS, ROWS, TILE
    )
    logits = _whole_logits(products, squares_a, squares_b, scale, NORMALIZE)
    weights = _tile_of_weights(
        logits, row_max_ptr, row_log_ptr, column_max_ptr, column_log_ptr, problem, row, column, count
    )
    weights *= tl.load(grad_ptr + problem).to(tl.float32) * scale / (2.0 * count)
    if NORMALIZE:
        inverse_a, inverse_b = _inverse_root(squares_a), _inverse_root(squares_b)
        weights *= inverse_a[:, None]
        weights *= inverse_b[None, :]
        terms = tl.where(inside, weights * products, 0.0)
        along_a = tl.sum(terms, axis=1) * inverse_a * inverse_a
        along_b = tl.sum(terms, axis=0) * inverse_b * inverse_b
        along = along_ptr + problem * (1 + tl.num_programs(1)) * count
        tl.store(along + row, along_a, mask=row < count)
        tl.store(along + (1 + block) * count + column, along_b, mask=column < count)
    at = row[:, None] * count + column[None, :]
    tl.store(weights_ptr + problem * count * count + at, weights, mask=inside)


@cached_launch
@triton.jit
def _whole_gradient(
    a_ptr, b_ptr, weights_ptr, along_ptr, grad_a_ptr, grad_b_ptr, count, hidden, blocks,
    PRECISION: tl.constexpr, NORMALIZE: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂loss/∂a = W b - α² (a · p) a, and (axis 2) ∂loss/∂b = Wᵀ a - β² (b · t) b, for a block of columns."""
    problem = tl.program_id(1).to(tl.int64)
    a_start = a_ptr + problem * count * hidden
    b_start = b_ptr + problem * count * hidden
    weights_start = weights_ptr + problem * count * count
    along_start = along_ptr + problem * (1 + blocks) * count
    if tl.program_id(2) == 0:
        _half_gradient(
            a_start, b_start, weights_start, along_start, grad_a_ptr,
            problem, count, hidden, 1, count, 1, PRECISION, NORMALIZE, TILE, CHUNK, BLOCK,
        )  # fmt: skip
    else:
        _half_gradient(
            b_start, a_start, weights_start, along_start + count, grad_b_ptr,
            problem, count, hidden, blocks, 1, count, PRECISION, NORMALIZE, TILE, CHUNK, BLOCK,
        )  # fmt: skip


@triton.jit
def _half_gradient(
    own_ptr, other_ptr, weights_ptr, along_ptr, out_ptr, problem, count, hidden, blocks, own_stride, other_stride,
    PRECISION: tl.constexpr, NORMALIZE: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if out_ptr is not None:
        row = tl.arange(0, TILE)[:, None]
        column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
        grad = tl.zeros((TILE, BLOCK), tl.float32)
        for start in range(0, count, CHUNK):
            other_row = start + tl.arange(0, CHUNK)
            at = row * own_stride + other_row[None, :] * other_stride
            weights = tl.load(weights_ptr + at, mask=(row < count) & (other_row < count)[None, :], other=0.0)
            at = other_row[:, None] * hidden + column
            live = (other_row < count)[:, None] & (column < hidden)
            other = tl.load(other_ptr + at, mask=live, other=0.0).to(tl.float32)
            grad = tl.dot(weights, other, grad, input_precision=PRECISION)
        at = row * hidden + column
        live = (row < count) & (column < hidden)
        if NORMALIZE:
            own = tl.load(own_ptr + at, mask=live, other=0.0).to(tl.float32)
            along = tl.zeros((TILE, 1), tl.float32)
            for block in range(blocks):
                along += tl.load(along_ptr + block * count + row, mask=row < count, other=0.0)
            grad -= own * along
        out = out_ptr + problem * count * hidden
        tl.store(out + at, grad.to(out_ptr.dtype.element_ty), mask=live)


# --- Tiles


@cached_launch
@triton.jit(do_not_specialize=["first_row", "stripe"])
def _tile_sums(
    a_ptr, b_ptr, product_ptr, inverse_a_ptr, inverse_b_ptr, bias_ptr,
    row_sum_ptr, row_max_ptr, column_sum_ptr, column_max_ptr, diagonal_ptr,
    count, hidden, first_row, stripe, scale: tl.float32,
    UPCAST: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile's part of R and C: sums of exp(S - m), m the tile's maximum, or scale where no maxima are kept."""
    problem = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(count, TILE)
    row_start, column_start = tile_start(tl.cdiv(stripe, TILE), tiles, TILE)
    row_start += first_row
    row = row_start + tl.arange(0, TILE)
    column = column_start + tl.arange(0, TILE)
    logits = logits_tile(
        a_ptr, b_ptr, product_ptr, inverse_a_ptr, inverse_b_ptr, bias_ptr,
        problem, row_start, column_start, count, count, first_row, stripe, hidden, scale, UPCAST, TILE, DEPTH,
    )  # fmt: skip
    if row_start == column_start:
        diagonal = tl.sum(tl.where(row[:, None] == column[None, :], logits, 0.0), axis=1)
        tl.store(diagonal_ptr + problem * count + row, diagonal, mask=row < count)
    logits = tl.where((row < count)[:, None] & (column < count)[None, :], logits, -float("inf"))
    row_at = (problem * tiles + column_start // TILE) * count + row
    column_at = (problem * tiles + row_start // TILE) * count + column
    if row_max_ptr is None:
        terms = tl.exp(logits - scale)
        row_sum = tl.sum(terms, axis=1)
        column_sum = tl.sum(terms, axis=0)
    else:
        row_max, row_sum = _maximum_and_sum(logits, row < count, 1)
        column_max, column_sum = _maximum_and_sum(logits, column < count, 0)
        tl.store(row_max_ptr + row_at, row_max, mask=row < count)
        tl.store(column_max_ptr + column_at, column_max, mask=column < count)
    tl.store(row_sum_ptr + row_at, row_sum, mask=row < count)
    tl.store(column_sum_ptr + column_at, column_sum, mask=column < count)


@cached_launch
@triton.jit(do_not_specialize=["tiles"])
def _combine(
    part_sum_ptr, part_max_ptr, max_ptr, log_ptr, tiles, count, scale: tl.float32, BLOCK: tl.constexpr
):
    """m and l from the tiles' parts, online (Milakov & Gimelshein 2018, arXiv 1805.02867)."""
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = row < count
    maximum = tl.full((BLOCK,), -float("inf"), tl.float32)
    if part_max_ptr is None:
        maximum = tl.zeros((BLOCK,), tl.float32) + scale
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles):
        at = (problem * tiles + tile) * count + row
        part = tl.load(part_sum_ptr + at, mask=present, other=1.0)
        if part_max_ptr is None:
            total += part
        else:
            of_part = tl.load(part_max_ptr + at, mask=present, other=0.0)
            larger = tl.maximum(maximum, of_part)
            total = total * tl.exp(maximum - larger) + part * tl.exp(of_part - larger)
            maximum = larger
    tl.store(max_ptr + problem * count + row, maximum, mask=present)
    tl.store(log_ptr + problem * count + row, tl.log(total), mask=present)


@cached_launch
@triton.jit
def _mean_loss(
    row_max_ptr, row_log_ptr, column_max_ptr, column_log_ptr, diagonal_ptr, loss_ptr, count, BLOCK: tl.constexpr
):  # fmt: skip
    """The loss of one problem from R, C and the diagonal of S."""
    problem = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        at = problem * count + row
        diagonal = tl.load(diagonal_ptr + at, mask=row < count, other=0.0)
        total += tl.load(row_max_ptr + at, mask=row < count, other=0.0) - diagonal
        total += tl.load(row_log_ptr + at, mask=row < count, other=0.0)
        total += tl.load(column_max_ptr + at, mask=row < count, other=0.0) - diagonal
        total += tl.load(column_log_ptr + at, mask=row < count, other=0.0)
    tl.store(loss_ptr + problem, tl.sum(total) / (2.0 * count))


@cached_launch
@triton.jit(do_not_specialize=["first_row", "stripe"])
def _tile_weights(
    a_ptr, b_ptr, product_ptr, inverse_a_ptr, inverse_b_ptr, bias_ptr,
    row_max_ptr, row_log_ptr, column_max_ptr, column_log_ptr, grad_ptr, weights_ptr, row_sum_ptr,
    count, hidden, first_row, stripe, scale: tl.float32,
    UPCAST: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of W, and of the row sums ρ where the caller wants them. W may overwrite the library's products."""
    problem = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(count, TILE)
    row_start, column_start = tile_start(tl.cdiv(stripe, TILE), tiles, TILE)
    row_start += first_row
    row = row_start + tl.arange(0, TILE)
    column = column_start + tl.arange(0, TILE)
    logits = logits_tile(
        a_ptr, b_ptr, product_ptr, inverse_a_ptr, inverse_b_ptr, bias_ptr,
        problem, row_start, column_start, count, count, first_row, stripe, hidden, scale, UPCAST, TILE, DEPTH,
    )  # fmt: skip
    weights = _tile_of_weights(
        logits, row_max_ptr, row_log_ptr, column_max_ptr, column_log_ptr, problem, row, column, count
    )
    factor = tl.load(grad_ptr + problem).to(tl.float32) * scale / (2.0 * count)
    weights *= tl.where(column < count, factor, 0.0)[None, :]
    if row_sum_ptr is not None:
        at = (problem * tiles + column_start // TILE) * count + row
        tl.store(row_sum_ptr + at, tl.sum(weights, axis=1), mask=row < count)
    if inverse_a_ptr is not None:
        weights *= tl.load(inverse_a_ptr + problem * count + row, mask=row < count, other=0.0)[:, None]
        weights *= tl.load(inverse_b_ptr + problem * count + column, mask=column < count, other=0.0)[None, :]
    at = tile_pointers(weights_ptr, problem, stripe, count, row_start - first_row, column_start, TILE)
    tl.store(
        at, weights.to(weights_ptr.dtype.element_ty), mask=(row < count)[:, None] & (column < count)[None, :]
    )


# One tile: with N ≤ 128 a problem's S is at most 64 KiB and stays in the registers of one program (256 threads, 64
# values each). The products read a and b, 2 L N d values, once; they are split along d until 2 programs per
# multiprocessor have work, each with at least 256 columns (a split writes 4 N² bytes and reads 8 N · 256 of
# float32: an eighth at N = 64, a quarter at N = 128): four blocks of a matrix product, of which three are under way
# at once in 16 bits, and one in float32, which takes its time to multiply.
# Tiles: W takes 2,048 rows at a time, enough 128 × 128 tiles of its products with a and b to fill the device at
# d ≥ 1,024; where N² is small, several problems share a launch up to 64 MiB of W.
# Largest scale for which scale is the maximum of a tile: exp(-2 scale) > 1e-35 stays a normal float32.
# Reasoned, not measured.
WHOLE_LIMIT = 128
_WHOLE_DEPTH, _WHOLE_BLOCK, _SPLIT_COLUMNS, _PROGRAMS_PER_MULTIPROCESSOR = 64, 64, 256, 2
_STRIPE_ROWS, _STRIPE_BYTES = 2048, 64 * 2**20
_BOUNDED_SCALE = 40.0
_COMBINE_BLOCK, _COMBINE_THREADS = 512, 128
_LOSS_BLOCK, _LOSS_THREADS = 1024, 256


def _whole_tile(count: int) -> tuple[int, int]:
    """Padded N and threads of the one-tile kernels; a matrix instruction wants at least 16 rows."""
    tile = max(16, next_power_of_2(count))
    return tile, 64 if tile == 16 else 128 if tile <= 64 else 256


def _products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
    problems, count, hidden = a.shape
    tile, threads = _whole_tile(count)
    wanted = ceil_div(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(a.device), problems)
    per_split = max(_SPLIT_COLUMNS, ceil_div(ceil_div(hidden, wanted), _WHOLE_DEPTH) * _WHOLE_DEPTH)
    splits = ceil_div(hidden, per_split)
    products = torch.empty((problems, splits, count, count), dtype=torch.float32, device=a.device)
    squares = torch.empty((problems, splits, 2, count), dtype=torch.float32, device=a.device)
    depth, stages = (16, 2) if a.dtype == torch.float32 else (32 if tile > 64 else _WHOLE_DEPTH, 4)
    _split_products[(problems, splits)](
        a, b, products, squares, count, hidden, per_split,
        UPCAST=a.device.type == "cpu", TILE=tile, DEPTH=depth, **options(threads, stages),
    )  # fmt: skip
    return products, squares, splits


def _groups(problems: int, count: int) -> list[slice]:
    """Which problems share a launch, so that their stripes of W stay within the budget."""
    size = max(1, _STRIPE_BYTES // (4 * count * min(count, _STRIPE_ROWS)))
    return [slice(start, min(start + size, problems)) for start in range(0, problems, size)]


def forward(
    a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (L,), and (m, l) of the rows and of the columns of S, each (2, L, N), all float32."""
    problems, count, _ = a.shape
    loss = torch.empty((problems,), dtype=torch.float32, device=a.device)
    of_rows = torch.empty((2, problems, count), dtype=torch.float32, device=a.device)
    of_columns = torch.empty_like(of_rows)
    if problems == 0:
        return loss, of_rows, of_columns
    a, b = a.contiguous(), b.contiguous()
    with on_device_of(a):
        if count <= WHOLE_LIMIT and not recenter:
            products, squares, splits = _products(a, b)
            tile, threads = _whole_tile(count)
            _whole_loss[(problems,)](
                products, squares, loss, *of_rows, *of_columns, splits, count, scale,
                NORMALIZE=normalize, TILE=tile, **options(2 * threads, fuse=False),
            )  # fmt: skip
            return loss, of_rows, of_columns
        scaling = prepare(a, b, normalize, recenter)
        diagonal = torch.empty((problems, count), dtype=torch.float32, device=a.device)
        bounded = normalize and not recenter and scale <= _BOUNDED_SCALE
        for group in _groups(problems, count):
            parts = (of_rows[:, group], of_columns[:, group], diagonal[group])
            _tiled_sums(a[group], b[group], *parts, scaling.of(group), scale, bounded)
        _mean_loss[(problems,)](
            *of_rows, *of_columns, diagonal, loss, count, BLOCK=_LOSS_BLOCK, **options(_LOSS_THREADS)
        )
    return loss, of_rows, of_columns


def _tiled_sums(
    a: Tensor,
    b: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
    diagonal: Tensor,
    scaling: Scaling,
    scale: float,
    bounded: bool,
) -> None:
    """Fill R, C and the diagonal of S for one group of problems."""
    problems, count, hidden = a.shape
    library = library_products(a.dtype)
    sizes = tile_options(library)
    tiles = ceil_div(count, sizes["TILE"])
    shape = (
        1 if bounded else 2,
        problems,
        tiles,
        count,
    )  # sums, and maxima where they are not known beforehand
    row_parts, column_parts = (torch.empty(shape, dtype=torch.float32, device=a.device) for _ in range(2))
    row_sum, row_max = row_parts[0], None if bounded else row_parts[1]
    column_sum, column_max = column_parts[0], None if bounded else column_parts[1]
    # Where the library forms the products they are held a stripe at a time, else not at all.
    step = _STRIPE_ROWS if library else count
    for first in range(0, count, step):
        stripe = min(step, count - first)
        product = torch.bmm(a[:, first : first + stripe], b.mT) if library else None
        _tile_sums[(ceil_div(stripe, sizes["TILE"]) * tiles, problems)](
            a, b, product, *scaling[:3], row_sum, row_max, column_sum, column_max, diagonal,
            count, hidden, first, stripe, scale, UPCAST=a.device.type == "cpu", **sizes,
        )  # fmt: skip
        del product  # before the next one is made
    for part_sum, part_max, out in ((row_sum, row_max, of_rows), (column_sum, column_max, of_columns)):
        _combine[(ceil_div(count, _COMBINE_BLOCK), problems)](
            part_sum, part_max, *out, tiles, count, scale, BLOCK=_COMBINE_BLOCK, **options(_COMBINE_THREADS)
        )


def backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ∂L/∂a and ∂L/∂b in the dtype of a, each only when needed."""
    problems, count, hidden = a.shape
    grad_a = torch.empty_like(a, memory_format=torch.contiguous_format) if need_a else None
    grad_b = torch.empty_like(b, memory_format=torch.contiguous_format) if need_b else None
    if problems == 0 or not (need_a or need_b):
        return grad_a, grad_b
    a, b, grad = a.contiguous(), b.contiguous(), grad.contiguous()
    with on_device_of(a):
        if count > WHOLE_LIMIT or recenter:
            return _tiled_gradient(
                grad, a, b, of_rows, of_columns, scale, normalize, recenter, need_a, need_b
            )
        products, squares, splits = _products(a, b)
        tile, threads = _whole_tile(count)
        weights = torch.empty((problems, count, count), dtype=torch.float32, device=a.device)
        rows = min(tile, 32)
        blocks = ceil_div(count, rows)
        along = torch.empty((problems, 1 + blocks, count), dtype=torch.float32, device=a.device)
        _whole_weights[(problems, blocks)](
            products, squares, *of_rows, *of_columns, grad, weights, along, splits, count, scale,
            NORMALIZE=normalize, ROWS=rows, TILE=tile, **options(128, fuse=False),
        )  # fmt: skip
        # 16-bit values are exact in TF32, and W keeps float32's range; float32 values need the exact product.
        precision, chunk = ("ieee", 16) if a.dtype == torch.float32 else ("tf32", 16 if threads < 256 else 32)
        _whole_gradient[(ceil_div(hidden, _WHOLE_BLOCK), problems, 2)](
            a, b, weights, along, grad_a, grad_b, count, hidden, blocks,
            PRECISION=precision, NORMALIZE=normalize,
            TILE=tile, CHUNK=chunk, BLOCK=_WHOLE_BLOCK, **options(threads),
        )  # fmt: skip
    return grad_a, grad_b


def _tiled_gradient(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients from stripes of W. Wᵀ a is summed over the stripes in float32."""
    problems, count, hidden = a.shape
    compute = weights_dtype(a.dtype)
    scaling = prepare(a, b, normalize, recenter)
    left, right = a.to(compute), b.to(compute)
    library = library_products(a.dtype)
    sizes = tile_options(library, weights=True)
    tiles = ceil_div(count, sizes["TILE"])
    product_a = torch.empty(a.shape, dtype=compute, device=a.device) if need_a else None
    product_b = torch.zeros(b.shape, dtype=torch.float32, device=b.device) if need_b else None
    row_sums = torch.empty((problems, count), dtype=torch.float32, device=a.device) if recenter else None
    for group in _groups(problems, count):
        in_group = group.stop - group.start
        partial = None
        if row_sums is not None:
            partial = torch.empty((in_group, tiles, count), dtype=torch.float32, device=a.device)
        for first in range(0, count, _STRIPE_ROWS):
            stripe = min(_STRIPE_ROWS, count - first)
            rows = slice(first, first + stripe)
            product = torch.bmm(a[group, rows], b[group].mT) if library else None
            weights = product
            if weights is None:
                weights = torch.empty((in_group, stripe, count), dtype=compute, device=a.device)
            _tile_weights[(ceil_div(stripe, sizes["TILE"]) * tiles, in_group)](
                a[group], b[group], product, *scaling.of(group)[:3],
                *of_rows[:, group], *of_columns[:, group], grad[group], weights, partial,
                count, hidden, first, stripe, scale, UPCAST=a.device.type == "cpu", **sizes,
            )  # fmt: skip
            if product_a is not None:
                torch.bmm(weights, right[group], out=product_a[group, rows])
            if product_b is not None and compute == torch.float32:
                product_b[group].baddbmm_(weights.mT, left[group, rows])
            elif product_b is not None:
                product_b[group] += torch.bmm(weights.mT, left[group, rows])
            del product, weights  # before the next stripe is made
        if row_sums is not None and partial is not None:
            torch.sum(partial, 1, out=row_sums[group])
    return through_unit(a, b, product_a, product_b, row_sums, scaling)
