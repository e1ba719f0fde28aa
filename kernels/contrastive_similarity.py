"""Batched similarity logits, and the tile and row operations that ``info_nce`` shares with them.

    u = a / ‖a‖,  v = b / ‖b‖   (or a and b)              a: (L, N, d);  b: (L, M, d)
    b′ = v + o,   o = mean(u) - mean(v)  (or 0)           o: (L, d) float32
    S_nm = scale · u_n · b′_m = scale · (α_n β_m a_n · b_m + r_n)

with α_n = 1 / ‖a_n‖, β_m = 1 / ‖b_m‖ (0 for a zero row) and r_n = u_n · o, all float32. Rows are never normalised
in memory: the matrix product takes a and b as they are, in their dtype with float32 accumulation, and α, β and r
enter where a tile of products becomes logits. For the gradient, with W_nm = scale · ∂L/∂S_nm · α_n β_m and
ρ_n = scale · Σ_m ∂L/∂S_nm, no division is needed and a zero row gets zeros by itself:

    p_n = Σ_m W_nm b_m + α_n (ρ_n o + q / N)              q = Σ_n ρ_n u_n: (L, d), the gradient of o
    ∂L/∂a_n = p_n - a_n α_n² (a_n · p_n)
    ∂L/∂b_m = t_m - b_m β_m² (b_m · t_m),                 t_m = Σ_n W_nm a_n - β_m q / M

The two products with W are left to the vendor's matrix library. No atomics: every sum has one order.
"""

# ruff: noqa: PLR0917 - kernels take their pointers and strides by position, as launches pass them

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cached_launch, ceil_div, multiprocessors, next_power_of_2, on_device_of, options


@triton.jit
def _product_tile(
    a_ptr, b_ptr, rows, columns, hidden, UPCAST: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """a_n · b_m of a tile; the pointers are at its first rows, of which there are ``rows`` and ``columns`` left."""
    local = tl.arange(0, TILE)[:, None]
    products = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, hidden, DEPTH):
        depth = start + tl.arange(0, DEPTH)[None, :]
        at = local * hidden + depth
        a = tl.load(a_ptr + at, mask=(local < rows) & (depth < hidden), other=0.0)
        b = tl.load(b_ptr + at, mask=(local < columns) & (depth < hidden), other=0.0)
        if UPCAST:  # the interpreter has no bfloat16 arithmetic
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    return products


@triton.jit
def tile_start(row_tiles, column_tiles, TILE: tl.constexpr):
    """First row and column of this program's tile; eight rows of tiles go together, as L2 holds their inputs."""
    program = tl.program_id(0)
    tile_row, tile_column = tl.swizzle2d(
        program // column_tiles, program % column_tiles, row_tiles, column_tiles, 8
    )
    return tile_row * TILE, tile_column * TILE


@triton.jit
def tile_pointers(ptr, problem, rows, columns, row_start, column_start, TILE: tl.constexpr):
    """Where a tile of an (L, rows, columns) matrix lies: 64 bits for its corner, 32 within it."""
    local = tl.arange(0, TILE)
    corner = ptr + ((problem * rows + row_start) * columns + column_start)
    return corner + (local[:, None] * columns + local[None, :])


@triton.jit
def logits_tile(
    a_ptr, b_ptr, product_ptr, inverse_a_ptr, inverse_b_ptr, bias_ptr,
    problem, row_start, column_start, rows, columns, first_row, stripe, hidden, scale,
    UPCAST: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of S. Products are read where the library wrote them (for a stripe of rows), else computed here."""
    row = row_start + tl.arange(0, TILE)
    column = column_start + tl.arange(0, TILE)
    if product_ptr is not None:
        at = tile_pointers(product_ptr, problem, stripe, columns, row_start - first_row, column_start, TILE)
        logits = tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    else:
        a_start = a_ptr + (problem * rows + row_start) * hidden
        b_start = b_ptr + (problem * columns + column_start) * hidden
        left = rows - row_start
        logits = _product_tile(a_start, b_start, left, columns - column_start, hidden, UPCAST, TILE, DEPTH)
    if inverse_a_ptr is not None:
        inverse_a = tl.load(inverse_a_ptr + problem * rows + row, mask=row < rows, other=0.0)
        inverse_b = tl.load(inverse_b_ptr + problem * columns + column, mask=column < columns, other=0.0)
        logits *= inverse_a[:, None]
        logits *= inverse_b[None, :]
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + problem * rows + row, mask=row < rows, other=0.0)[:, None]
    return logits * scale


@cached_launch
@triton.jit
def _write_logits(
    a_ptr, b_ptr, product_ptr, inverse_a_ptr, inverse_b_ptr, bias_ptr, out_ptr,
    rows, columns, hidden, scale: tl.float32,
    UPCAST: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of S, written out. ``out`` may be the library's products themselves."""
    problem = tl.program_id(1).to(tl.int64)
    row_start, column_start = tile_start(tl.cdiv(rows, TILE), tl.cdiv(columns, TILE), TILE)
    logits = logits_tile(
        a_ptr, b_ptr, product_ptr, inverse_a_ptr, inverse_b_ptr, bias_ptr,
        problem, row_start, column_start, rows, columns, 0, rows, hidden, scale, UPCAST, TILE, DEPTH,
    )  # fmt: skip
    row = row_start + tl.arange(0, TILE)
    column = column_start + tl.arange(0, TILE)
    at = tile_pointers(out_ptr, problem, rows, columns, row_start, column_start, TILE)
    tl.store(at, logits, mask=(row < rows)[:, None] & (column < columns)[None, :])


@cached_launch
@triton.jit(do_not_specialize=["rows_of_a", "rows_of_b"])
def _inverse_lengths(
    a_ptr, b_ptr, out_ptr, rows_of_a, rows_of_b, hidden, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """1 / ‖row‖ of the rows of a, then (programs of axis 1) of those of b; 0 for a zero row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of_b = tl.program_id(1) == 1
    present = row < tl.where(of_b, rows_of_b, rows_of_a)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        at = row[:, None] * hidden + column
        live = present[:, None] & (column < hidden)
        if of_b:
            x = tl.load(b_ptr + at, mask=live, other=0.0).to(tl.float32)
        else:
            x = tl.load(a_ptr + at, mask=live, other=0.0).to(tl.float32)
        squares += x * x
    length = tl.sqrt_rn(tl.sum(squares, axis=1))
    inverse = tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0)
    tl.store(out_ptr + row + tl.where(of_b, rows_of_a, 0), inverse, mask=present)


@cached_launch
@triton.jit(do_not_specialize=["rows_per_chunk"])
def _weighted_sums(
    x_ptr, weight_ptr, partial_ptr, rows, rows_per_chunk, hidden, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Σ_n weight_n x_n over a chunk of one problem's rows, for a block of columns."""
    problem, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first = chunk * rows_per_chunk
    last = tl.minimum(first + rows_per_chunk, rows)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < last)[:, None] & (column < hidden)[None, :]
        at = (problem * rows + row)[:, None] * hidden + column[None, :]
        weight = tl.load(weight_ptr + problem * rows + row, mask=row < last, other=0.0)
        total += tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) * weight[:, None]
    at = (problem * tl.num_programs(1) + chunk) * hidden + column
    tl.store(partial_ptr + at, tl.sum(total, axis=0), mask=column < hidden)


@cached_launch
@triton.jit(do_not_specialize=["rows"])
def _row_products(
    x_ptr, inverse_ptr, offset_ptr, out_ptr, rows, hidden, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """r_n = α_n a_n · o."""
    problem = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = local < rows
    row = problem * rows + local
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = present[:, None] & (column < hidden)[None, :]
        x = tl.load(x_ptr + row[:, None] * hidden + column[None, :], mask=live, other=0.0).to(tl.float32)
        total += x * tl.load(offset_ptr + problem * hidden + column, mask=column < hidden, other=0.0)[None, :]
    products = tl.sum(total, axis=1)
    if inverse_ptr is not None:
        products *= tl.load(inverse_ptr + row, mask=present, other=0.0)
    tl.store(out_ptr + row, products, mask=present)


@cached_launch
@triton.jit(do_not_specialize=["rows"])
def _gradient_weights(
    grad_ptr, inverse_a_ptr, inverse_b_ptr, out_ptr, rows, columns, scale: tl.float32,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W from ∂L/∂S, in tiles."""
    problem = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = problem * rows + local
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = (local < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        grad = tl.load(grad_ptr + at, mask=live, other=0.0).to(tl.float32) * scale
        if inverse_a_ptr is not None:
            inverse_b = tl.load(inverse_b_ptr + problem * columns + column, mask=column < columns, other=0.0)
            grad *= tl.load(inverse_a_ptr + row, mask=local < rows, other=0.0)[:, None] * inverse_b[None, :]
        tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _row_gradient(
    product_ptr,
    common_ptr,
    offset_ptr,
    row,
    problem,
    column,
    live,
    hidden,
    inverse,
    row_factor,
    common_factor,
):
    """p_n or t_m of a tile: the product with W, plus what comes through o."""
    grad = tl.load(product_ptr + row * hidden + column[None, :], mask=live, other=0.0).to(tl.float32)
    if common_ptr is not None:
        at, inside = problem * hidden + column, column < hidden
        through = tl.load(common_ptr + at, mask=inside, other=0.0)[None, :] * common_factor
        if offset_ptr is not None:
            through += tl.load(offset_ptr + at, mask=inside, other=0.0)[None, :] * row_factor
        grad += through * inverse
    return grad


@cached_launch
@triton.jit(do_not_specialize=["rows"])
def _through_unit(
    product_ptr, x_ptr, inverse_ptr, row_factor_ptr, offset_ptr, common_ptr, out_ptr,
    rows, hidden, common_factor: tl.float32, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p - x α² (x · p); ``out`` may be the product itself."""
    problem = tl.program_id(1).to(tl.int64)
    local = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    present = local < rows
    row = problem * rows + local
    inverse = tl.full((ROWS, 1), 1.0, tl.float32)
    row_factor = tl.zeros((ROWS, 1), tl.float32)
    along = tl.zeros((ROWS, 1), tl.float32)
    if row_factor_ptr is not None:
        row_factor = tl.load(row_factor_ptr + row, mask=present, other=0.0)
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + row, mask=present, other=0.0)
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)
            live = present & (column < hidden)[None, :]
            grad = _row_gradient(
                product_ptr, common_ptr, offset_ptr,
                row, problem, column, live, hidden, inverse, row_factor, common_factor,
            )  # fmt: skip
            x = tl.load(x_ptr + row * hidden + column[None, :], mask=live, other=0.0).to(tl.float32)
            products += grad * (x * inverse)
        along = tl.sum(products, axis=1)[:, None]
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = present & (column < hidden)[None, :]
        grad = _row_gradient(
            product_ptr, common_ptr, offset_ptr,
            row, problem, column, live, hidden, inverse, row_factor, common_factor,
        )  # fmt: skip
        at = row * hidden + column[None, :]
        if inverse_ptr is not None:
            x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
            grad -= (x * inverse) * along
        tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=live)


# Tiles of products: 128 × 128 × 64 in 16 bits is 64 float32 sums a thread of 256, and 3 stages of 32 KiB of shared
# memory; two programs then fit on a multiprocessor of an H100. ``info_nce``'s weights hold exponentials besides the
# products: twice the threads and half the depth, or they would not fit in the registers. float32 products go to the
# vendor's library: Triton's exact float32 dot runs without tensor cores, and PyTorch's own switch for TF32 stays in
# force.
# Rows: 2,048 elements for 256 threads, a 128-bit load of a 16-bit tensor a thread; short rows share a program.
# Reasoned, not measured.
TILE, DEPTH, TILE_THREADS, TILE_STAGES = 128, 64, 256, 3
# A tile of finished products only passes through registers: 64 × 64 for 128 threads are 32 values a thread.
LIBRARY_TILE, LIBRARY_THREADS = 64, 128
_ROW_ELEMENTS, _ROW_THREADS = 2048, 256
_SUM_ROWS, _SUM_BLOCK, _SUM_THREADS = 8, 512, 128


class Scaling(NamedTuple):
    """What turns a_n · b_m into logits: α (L, N), β (L, M), r (L, N), o (L, d); ``None`` where not used."""

    inverse_a: Tensor | None
    inverse_b: Tensor | None
    bias: Tensor | None
    offset: Tensor | None

    def of(self, problems: slice) -> Scaling:
        """The same for some of the problems."""
        return Scaling(*(None if part is None else part[problems] for part in self))


def library_products(dtype: torch.dtype) -> bool:
    """Whether the vendor's library forms the products a_n · b_m."""
    return dtype == torch.float32


def tile_options(library: bool, weights: bool = False) -> dict[str, int | bool]:
    """Tile sizes and compile options of the kernels built on :func:`logits_tile`.

    Nothing is fused with the last multiplication of a logit, so that forward and backward round it alike.
    """
    if library:
        return {"TILE": LIBRARY_TILE, "DEPTH": DEPTH, **options(LIBRARY_THREADS, fuse=False)}
    if weights:
        return {"TILE": TILE, "DEPTH": DEPTH // 2, **options(2 * TILE_THREADS, TILE_STAGES + 1, fuse=False)}
    return {"TILE": TILE, "DEPTH": DEPTH, **options(TILE_THREADS, TILE_STAGES, fuse=False)}


def _row_tile(hidden: int) -> dict[str, int | bool]:
    """Tile and compile options of the kernels that reduce along rows."""
    block = min(next_power_of_2(hidden), _ROW_ELEMENTS)
    return {"ROWS": min(_ROW_ELEMENTS // block, 16), "BLOCK": block, **options(_ROW_THREADS)}


def weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """Σ_n weight_n x_n: (L, N, d), (L, N) float32 -> (L, d) float32."""
    problems, rows, hidden = x.shape
    blocks = ceil_div(hidden, _SUM_BLOCK)
    wanted = ceil_div(4 * multiprocessors(x.device), blocks * problems)
    per_chunk = ceil_div(ceil_div(rows, wanted), _SUM_ROWS) * _SUM_ROWS
    chunks = ceil_div(rows, per_chunk)
    partial = torch.empty((problems, chunks, hidden), dtype=torch.float32, device=x.device)
    _weighted_sums[(problems, chunks, blocks)](
        x, weight, partial, rows, per_chunk, hidden, ROWS=_SUM_ROWS, BLOCK=_SUM_BLOCK, **options(_SUM_THREADS)
    )
    return partial.sum(1)


def prepare(a: Tensor, b: Tensor, normalize: bool, recenter: bool) -> Scaling:
    """α, β, r and o of contiguous a and b with at least one row each."""
    problems, rows, hidden = a.shape
    columns = b.shape[1]
    inverse_a = inverse_b = bias = offset = None
    tile = _row_tile(hidden)
    if normalize:
        rows_of_a, rows_of_b = problems * rows, problems * columns
        inverse = torch.empty(rows_of_a + rows_of_b, dtype=torch.float32, device=a.device)
        _inverse_lengths[(ceil_div(max(rows_of_a, rows_of_b), tile["ROWS"]), 2)](
            a, b, inverse, rows_of_a, rows_of_b, hidden, **tile
        )
        inverse_a = inverse[:rows_of_a].view(problems, rows)
        inverse_b = inverse[rows_of_a:].view(problems, columns)
    if recenter:
        weight_a = a.new_ones((problems, rows), dtype=torch.float32) if inverse_a is None else inverse_a
        weight_b = b.new_ones((problems, columns), dtype=torch.float32) if inverse_b is None else inverse_b
        offset = weighted_sum(a, weight_a) / rows - weighted_sum(b, weight_b) / columns
        bias = torch.empty((problems, rows), dtype=torch.float32, device=a.device)
        _row_products[(ceil_div(rows, tile["ROWS"]), problems)](
            a, inverse_a, offset, bias, rows, hidden, **tile
        )
    return Scaling(inverse_a, inverse_b, bias, offset)


def through_unit(
    a: Tensor,
    b: Tensor,
    product_a: Tensor | None,
    product_b: Tensor | None,
    row_sums: Tensor | None,
    scaling: Scaling,
) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂a and ∂L/∂b from W b, Wᵀ a and ρ; written over the products where they have the dtype of a."""
    inverse_a, inverse_b, _, offset = scaling
    common = None
    if row_sums is not None:
        common = weighted_sum(a, row_sums if inverse_a is None else row_sums * inverse_a)
    gradients = []
    for x, product, inverse, row_factor, own_offset, sign in (
        (a, product_a, inverse_a, row_sums, offset, 1),
        (b, product_b, inverse_b, None, None, -1),
    ):
        if product is None:
            gradients.append(None)
            continue
        problems, rows, hidden = x.shape
        out = product if product.dtype == x.dtype else torch.empty_like(x)
        if inverse is not None or common is not None or out is not product:
            tile = _row_tile(hidden)
            _through_unit[(ceil_div(rows, tile["ROWS"]), problems)](
                product, x, inverse, row_factor, own_offset, common, out,
                rows, hidden, sign / rows, **tile,
            )  # fmt: skip
        gradients.append(out)
    return gradients[0], gradients[1]


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of W and of the products with it: W has the size of α β / N, which is too small for float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def forward(a: Tensor, b: Tensor, scale: float, normalize: bool, recenter: bool) -> Tensor:
    """Return S (L, N, M) float32."""
    problems, rows, hidden = a.shape
    columns = b.shape[1]
    if problems * rows * columns == 0:
        return torch.empty((problems, rows, columns), dtype=torch.float32, device=a.device)
    a, b = a.contiguous(), b.contiguous()
    with on_device_of(a):
        scaling = prepare(a, b, normalize, recenter)
        library = library_products(a.dtype)
        product = torch.bmm(a, b.mT) if library else None
        shape = (problems, rows, columns)
        out = torch.empty(shape, dtype=torch.float32, device=a.device) if product is None else product
        sizes = tile_options(library)
        tiles = ceil_div(rows, sizes["TILE"]) * ceil_div(columns, sizes["TILE"])
        _write_logits[(tiles, problems)](
            a, b, product, *scaling[:3], out, rows, columns, hidden, scale,
            UPCAST=a.device.type == "cpu", **sizes,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    normalize: bool,
    recenter: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ∂L/∂a and ∂L/∂b in the dtype of a, each only when needed."""
    problems, rows, columns = grad.shape
    if grad.numel() == 0:
        return (torch.zeros_like(a) if need_a else None), (torch.zeros_like(b) if need_b else None)
    a, b, grad = a.contiguous(), b.contiguous(), grad.contiguous()
    with on_device_of(a):
        scaling = prepare(a, b, normalize, recenter)
        compute = weights_dtype(a.dtype)
        weights = torch.empty(grad.shape, dtype=compute, device=a.device)
        tile = _row_tile(columns)
        _gradient_weights[(ceil_div(rows, tile["ROWS"]), problems)](
            grad, scaling.inverse_a, scaling.inverse_b, weights, rows, columns, scale, **tile
        )
        return through_unit(
            a,
            b,
            torch.bmm(weights, b.to(compute)) if need_a else None,
            torch.bmm(weights.mT, a.to(compute)) if need_b else None,
            grad.sum(2) * scale if recenter else None,
            scaling,
        )
