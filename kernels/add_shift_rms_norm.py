"""Residual add, language shift and RMSNorm in one pass over memory.

    h = round(x + residual + shift[index])                 x, residual, h, y: (M, d);  shift: (K, d);  index: (I,)
    r = 1 / sqrt(mean(h²) + eps)                           r: (M,) float32;  row m has language index[m // (M / I)]
    llama: y = round(round(h r) w)      gemma: y = round(h r (1 + w))      olmo: y = round(h r w)

Everything is computed in float32; ``round`` is to x's dtype. A row whose language is -1 is not shifted, not even by
0.0, and one whose language is outside the table becomes NaN instead of reading past its end. Unshifting is the same
call with the negated table. With g = ∂L/∂y · w (or 1 + w) and n = h r, rounding passed straight through:

    ∂L/∂h = r (g - n mean(g n)) + (∂L/∂h from above)       this is ∂L/∂x and ∂L/∂residual
    ∂L/∂w = Σ_m ∂L/∂y n                                    ∂L/∂shift[k] = Σ over the rows of language k of ∂L/∂h

Source: Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4. No atomics: every sum has one order.
"""

# ruff: noqa: PLR0917 - kernels take their pointers and strides by position, as launches pass them

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cached_launch, ceil_div, multiprocessors, next_power_of_2, on_device_of, options


@triton.jit
def _sum_at(x_ptr, residual_ptr, shift_ptr, language, languages, x_at, residual_at, shift_at, live):
    """h of a tile, rounded to x's dtype. ``language`` broadcasts over the columns; pointers may be None."""
    x = tl.load(x_ptr + x_at, mask=live, other=0.0)
    total = x.to(tl.float32)
    h = x
    if residual_ptr is not None:
        total += tl.load(residual_ptr + residual_at, mask=live, other=0.0).to(tl.float32)
        h = total.to(x.dtype)
    if shift_ptr is not None:
        known = live & (language >= 0) & (language < languages)
        shift = tl.load(shift_ptr + shift_at, mask=known, other=float("nan")).to(tl.float32)
        h = tl.where(live & (language != -1), (total + shift).to(x.dtype), h)
    return h


@triton.jit
def _factor(weight_ptr, column, hidden, STYLE: tl.constexpr):
    """What the normalised row is multiplied by, in float32."""
    weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)
    if STYLE == "gemma":
        weight += 1.0
    return weight


@triton.jit
def _scaled(normalised, weight, dtype: tl.constexpr, STYLE: tl.constexpr):
    """y from the normalised row, with the style's roundings."""
    if STYLE == "llama":
        normalised = normalised.to(dtype).to(tl.float32)
    return (normalised * weight).to(dtype)


@cached_launch
@triton.jit(do_not_specialize=["rows"])
def _forward_rows(
    x_ptr, residual_ptr, shift_ptr, index_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr,
    x_stride, residual_stride, languages, rows_per_index, rows: tl.int64, hidden, eps: tl.float32,
    STYLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of whole rows per program: x, residual, shift read once, h and y written once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    present = row < rows
    live = present[:, None] & (column < hidden)
    row_start = row[:, None]
    out = row_start * hidden + column
    language = row_start
    if shift_ptr is not None:
        language = tl.load(index_ptr + row // rows_per_index, mask=present, other=-1).to(tl.int64)[:, None]
    h = _sum_at(
        x_ptr, residual_ptr, shift_ptr, language, languages,
        row_start * x_stride + column, row_start * residual_stride + column, language * hidden + column, live,
    )  # fmt: skip
    if h_ptr is not None:
        tl.store(h_ptr + out, h, mask=live)
    normalised = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(normalised * normalised, axis=1) / hidden + eps)
    tl.store(rstd_ptr + row, rstd, mask=present)
    normalised *= rstd[:, None]
    weight = _factor(weight_ptr, column, hidden, STYLE)
    tl.store(y_ptr + out, _scaled(normalised, weight, h.dtype, STYLE), mask=live)


@cached_launch
@triton.jit
def _forward_looped(
    x_ptr, residual_ptr, shift_ptr, index_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr,
    x_stride, residual_stride, languages, rows_per_index, hidden, eps: tl.float32,
    STYLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program in blocks of columns, twice; the second time the row comes from the L2 cache."""
    row = (tl.program_id(0).to(tl.int64) + tl.arange(0, 1))[:, None]
    language = row
    if shift_ptr is not None:
        language = tl.load(index_ptr + row // rows_per_index).to(tl.int64)
    squares = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        live = column < hidden
        h = _sum_at(
            x_ptr, residual_ptr, shift_ptr, language, languages,
            row * x_stride + column, row * residual_stride + column, language * hidden + column, live,
        )  # fmt: skip
        if h_ptr is not None:
            tl.store(h_ptr + row * hidden + column, h, mask=live)
        squares += h.to(tl.float32) * h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / hidden + eps)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        live = column < hidden
        # Formed again rather than read back: no thread then depends on what another one wrote.
        h = _sum_at(
            x_ptr, residual_ptr, shift_ptr, language, languages,
            row * x_stride + column, row * residual_stride + column, language * hidden + column, live,
        )  # fmt: skip
        weight = _factor(weight_ptr, column, hidden, STYLE)
        y = _scaled(h.to(tl.float32) * rstd, weight, h.dtype, STYLE)
        tl.store(y_ptr + row * hidden + column, y, mask=live)


@cached_launch
@triton.jit(do_not_specialize=["rows"])
def _backward_rows(
    grad_y_ptr, grad_h_ptr, h_ptr, weight_ptr, rstd_ptr, grad_x_ptr,
    grad_y_stride, grad_h_stride, h_stride, rows: tl.int64, hidden,
    STYLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Frozen weight: shaped like the forward, one tile of rows per program, four passes over memory."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    present = row < rows
    live = present[:, None] & (column < hidden)
    row_start = row[:, None]
    grad_y = tl.load(grad_y_ptr + row_start * grad_y_stride + column, mask=live, other=0.0)
    h = tl.load(h_ptr + row_start * h_stride + column, mask=live, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=present, other=0.0)[:, None]
    if grad_h_ptr is not None:
        # Before the reduction: all of the row's loads are then in flight together.
        grad_h = tl.load(grad_h_ptr + row_start * grad_h_stride + column, mask=live, other=0.0)
    upper = grad_y.to(tl.float32) * _factor(weight_ptr, column, hidden, STYLE)
    normalised = h.to(tl.float32) * rstd
    along = tl.sum(upper * normalised, axis=1)[:, None] / hidden
    grad = (upper - normalised * along) * rstd
    if grad_h_ptr is not None:
        grad += grad_h.to(tl.float32)
    tl.store(grad_x_ptr + row_start * hidden + column, grad.to(h.dtype), mask=live)


@cached_launch
@triton.jit(do_not_specialize=["rows"])
def _backward_persistent(
    grad_y_ptr, grad_h_ptr, h_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    grad_y_stride, grad_h_stride, h_stride, rows: tl.int64, hidden,
    STYLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Trainable weight: each program walks over tiles of rows and keeps its own sum of ∂L/∂w in registers.

    With more than one stage the next tiles are on their way through shared memory while this one is reduced.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    weight = _factor(weight_ptr, column, hidden, STYLE)
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0).to(tl.int64) * ROWS
    for start in tl.range(program * ROWS, rows, step, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        present = row < rows
        live = present[:, None] & (column < hidden)
        row_start = row[:, None]
        grad_y = tl.load(grad_y_ptr + row_start * grad_y_stride + column, mask=live, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row_start * h_stride + column, mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=present, other=0.0)[:, None]
        if grad_x_ptr is not None and grad_h_ptr is not None:
            grad_h = tl.load(grad_h_ptr + row_start * grad_h_stride + column, mask=live, other=0.0)
        normalised = h.to(tl.float32) * rstd
        # ∂L/∂w first: its rounded copy of the row is then dead before the reduction needs registers.
        if STYLE == "llama":
            grad_weight += grad_y * normalised.to(h.dtype).to(tl.float32)
        else:
            grad_weight += grad_y * normalised
        if grad_x_ptr is not None:
            upper = grad_y * weight
            along = tl.sum(upper * normalised, axis=1)[:, None] / hidden
            grad = (upper - normalised * along) * rstd
            if grad_h_ptr is not None:
                grad += grad_h.to(tl.float32)
            tl.store(grad_x_ptr + row_start * hidden + column, grad.to(h.dtype), mask=live)
    out = tl.arange(0, BLOCK)
    tl.store(partial_ptr + program * hidden + out, tl.sum(grad_weight, axis=0), mask=out < hidden)


@cached_launch
@triton.jit
def _backward_looped(
    grad_y_ptr, grad_h_ptr, h_ptr, weight_ptr, rstd_ptr, grad_x_ptr,
    grad_y_stride, grad_h_stride, h_stride, hidden,
    STYLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program in blocks of columns: once for the mean of g n, once for the gradient."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < hidden
        grad_y = tl.load(grad_y_ptr + row * grad_y_stride + column, mask=live, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * h_stride + column, mask=live, other=0.0).to(tl.float32)
        products += grad_y * _factor(weight_ptr, column, hidden, STYLE) * (h * rstd)
    along = tl.sum(products) / hidden
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < hidden
        grad_y = tl.load(grad_y_ptr + row * grad_y_stride + column, mask=live, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * h_stride + column, mask=live, other=0.0)
        upper = grad_y * _factor(weight_ptr, column, hidden, STYLE)
        grad = (upper - h.to(tl.float32) * rstd * along) * rstd
        if grad_h_ptr is not None:
            grad += tl.load(grad_h_ptr + row * grad_h_stride + column, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * hidden + column, grad.to(h.dtype), mask=live)


@cached_launch
@triton.jit(do_not_specialize=["rows", "rows_per_chunk"])
def _weight_columns(
    grad_y_ptr, h_ptr, rstd_ptr, partial_ptr,
    grad_y_stride, h_stride, rows: tl.int64, rows_per_chunk: tl.int64, hidden,
    STYLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂L/∂w of rows too long for a whole sum in registers: a block of columns of a chunk of rows per program."""
    chunk = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = chunk * rows_per_chunk
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, tl.minimum(first + rows_per_chunk, rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        present = (row < rows) & (row < first + rows_per_chunk)
        live = present[:, None] & (column < hidden)[None, :]
        grad_y = tl.load(grad_y_ptr + row[:, None] * grad_y_stride + column[None, :], mask=live, other=0.0)
        h = tl.load(h_ptr + row[:, None] * h_stride + column[None, :], mask=live, other=0.0)
        normalised = h.to(tl.float32) * tl.load(rstd_ptr + row, mask=present, other=0.0)[:, None]
        if STYLE == "llama":
            normalised = normalised.to(h.dtype).to(tl.float32)
        total += grad_y.to(tl.float32) * normalised
    tl.store(partial_ptr + chunk * hidden + column, tl.sum(total, axis=0), mask=column < hidden)


@cached_launch
@triton.jit(do_not_specialize=["rows", "rows_per_chunk"])
def _shift_columns(
    grad_ptr, index_ptr, partial_ptr,
    grad_stride, rows_per_index, rows: tl.int64, rows_per_chunk: tl.int64, hidden,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of ∂L/∂h over one language's rows: a block of columns of a chunk of rows per program.

    Rows of other languages are masked off before they are read, so all the languages together read ∂L/∂h once.
    """
    chunk, language = tl.program_id(1).to(tl.int64), tl.program_id(2)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = chunk * rows_per_chunk
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, tl.minimum(first + rows_per_chunk, rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        present = (row < rows) & (row < first + rows_per_chunk)
        own = tl.load(index_ptr + row // rows_per_index, mask=present, other=-1) == language
        live = own[:, None] & (column < hidden)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=live, other=0.0)
        total += grad.to(tl.float32)
    out = (chunk * tl.num_programs(2) + language) * hidden + column
    tl.store(partial_ptr + out, tl.sum(total, axis=0), mask=column < hidden)


# Longest row that one program keeps in registers; longer ones take the looped kernels, which have no limit.
#
# 16 elements a thread: two 128-bit loads per 16-bit tensor are in flight before the first use, and ~50 registers
# let 1,024 threads share a multiprocessor: 64 KiB in flight for x and residual, twice what Little's law asks of an
# H200 (4.8 TB/s · 0.8 µs / 132 = 29 KiB). Short rows share a program, so that it still has 2,048 elements to load.
# Rows of 16,384 have 32 elements a thread, because more than 512 threads would leave 64 registers to each.
# Reasoned, not measured; the register counts are in tests/kernels/aot_table.json.
ROW_LIMIT = 16384
_ELEMENTS_PER_THREAD = 16
_TILE = 2048
# The persistent backward also holds a float32 sum and the weight, 2 registers an element: twice the threads, and it
# ends earlier. Of long rows few programs are resident, so each loads ahead: two rows, or one where the shared
# memory of a multiprocessor (of an A100, the least) does not hold two.
# Widths such as 5,120 are padded to the next power of two. As two of them (4,096 and 1,024 columns) a row takes
# more registers and few instructions less: the second one pays for its loads and its reduction again.
_PERSISTENT_LIMIT = 8192
_PERSISTENT_PROGRAMS_PER_MULTIPROCESSOR = ((1024, 8), (2048, 4), (4096, 2), (8192, 1))
_RESIDENT_THREADS = 1024  # of 64 registers
_SHARED_BYTES = 160 * 1024  # of a multiprocessor
# Column sums: 8 rows × 512 columns for 128 threads are four 128-bit loads a thread and tensor.
_COLUMN_ROWS, _COLUMN_BLOCK, _COLUMN_THREADS = 8, 512, 128
_LOOP_BLOCK, _LOOP_THREADS = 4096, 256


@cache
def _row_tile(hidden: int) -> tuple[int, int, int]:
    """Rows per program, padded row length and threads of the kernels that hold whole rows."""
    block = next_power_of_2(hidden)
    rows = max(1, _TILE // block)
    threads = min(max(rows * block // _ELEMENTS_PER_THREAD, 128), 512)
    return rows, block, threads


def _as_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` as rows with unit stride inside, and the distance between rows; copies only when no view exists."""
    hidden = x.shape[-1]
    if x.is_contiguous():
        return x, hidden
    rows = x.reshape(-1, hidden)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _chunks(rows: int, column_blocks: int, device: torch.device) -> tuple[int, int]:
    """Number of row chunks, so that four programs per multiprocessor have work, and the rows in each."""
    wanted = max(1, ceil_div(4 * multiprocessors(device), column_blocks))
    per_chunk = ceil_div(ceil_div(rows, wanted), _COLUMN_ROWS) * _COLUMN_ROWS
    return ceil_div(rows, per_chunk), per_chunk


def forward(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    eps: float,
    style: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return y, h (``None`` when it would be x itself) and r (x.shape[:-1], float32)."""
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if residual is None and shift is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rows == 0:
        return y, h, rstd
    x, x_stride = _as_rows(x)
    residual_stride = hidden
    if residual is not None:
        residual, residual_stride = _as_rows(residual)
    languages = rows_per_index = 1
    if shift is not None and index is not None:
        shift, index = shift.contiguous(), index.contiguous()
        languages, rows_per_index = shift.shape[0], rows // index.numel()
    weight = weight.contiguous()
    pointers = (x, residual, shift, index, weight, y, h, rstd)
    sizes = (x_stride, residual_stride, languages, rows_per_index)
    with on_device_of(x):
        if hidden > ROW_LIMIT:
            _forward_looped[(rows,)](
                *pointers, *sizes, hidden, eps, STYLE=style, BLOCK=_LOOP_BLOCK, **options(_LOOP_THREADS)
            )
        else:
            tile, block, threads = _row_tile(hidden)
            grid = (ceil_div(rows, tile),)
            _forward_rows[grid](
                *pointers, *sizes, rows, hidden, eps, STYLE=style, ROWS=tile, BLOCK=block, **options(threads)
            )
    return y, h, rstd


def backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    index: Tensor | None,
    languages: int,
    style: str,
    need_input: bool,
    need_weight: bool,
    need_shift: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x and residual (one tensor), weight and shift, each only when needed.

    The latter two are float32. An incoming gradient is never written into.
    """
    hidden = h.shape[-1]
    rows = h.numel() // hidden
    grad_x = grad_weight = grad_shift = None
    with on_device_of(h):
        if grad_y is None:
            if (need_input or need_shift) and grad_h is not None:
                grad_x = grad_h.clone(memory_format=torch.contiguous_format)
        elif rows == 0:
            grad_x = torch.empty_like(h, memory_format=torch.contiguous_format)
            grad_weight = weight.new_zeros(hidden, dtype=torch.float32) if need_weight else None
        else:
            grad_x, grad_weight = _through_norm(
                grad_y, grad_h, h, weight, rstd, style, need_input or need_shift, need_weight
            )
        if need_shift and grad_x is not None and index is not None:
            grad_shift = _shift_gradient(grad_x, index, languages)
    return (grad_x if need_input else None), grad_weight, grad_shift


def _through_norm(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    style: str,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂h and ∂L/∂w: fused while the sum over rows fits in registers, two kernels beyond."""
    hidden = h.shape[-1]
    rows = h.numel() // hidden
    grad_x = torch.empty_like(h, memory_format=torch.contiguous_format) if need_input else None
    grad_y, grad_y_stride = _as_rows(grad_y)
    grad_h_stride = hidden
    if grad_h is not None:
        grad_h, grad_h_stride = _as_rows(grad_h)
    h, h_stride = _as_rows(h)
    weight = weight.contiguous()
    pointers = (grad_y, grad_h, h, weight, rstd, grad_x)
    strides = (grad_y_stride, grad_h_stride, h_stride)
    tile, block, threads = _row_tile(min(hidden, ROW_LIMIT))
    if need_weight and block <= _PERSISTENT_LIMIT:
        per_multiprocessor = next(n for limit, n in _PERSISTENT_PROGRAMS_PER_MULTIPROCESSOR if block <= limit)
        programs = min(ceil_div(rows, tile), per_multiprocessor * multiprocessors(h.device))
        threads = min(2 * threads, 512)
        resident = min(per_multiprocessor, _RESIDENT_THREADS // threads)
        row_bytes = 3 * block * h.element_size()  # grad_y, grad_h and h
        ahead = min(2, _SHARED_BYTES // (resident * row_bytes)) if tile == 1 else 0
        partial = torch.empty((programs, hidden), dtype=torch.float32, device=h.device)
        _backward_persistent[(programs,)](
            *pointers,
            partial,
            *strides,
            rows,
            hidden,
            STYLE=style,
            ROWS=tile,
            BLOCK=block,
            STAGES=1 + ahead,
            **options(threads),
        )
        return grad_x, partial.sum(0)
    if grad_x is not None and hidden > ROW_LIMIT:
        _backward_looped[(rows,)](
            *pointers, *strides, hidden, STYLE=style, BLOCK=_LOOP_BLOCK, **options(_LOOP_THREADS)
        )
    elif grad_x is not None:
        grid = (ceil_div(rows, tile),)
        _backward_rows[grid](
            *pointers, *strides, rows, hidden, STYLE=style, ROWS=tile, BLOCK=block, **options(threads)
        )
    if not need_weight:
        return grad_x, None
    column_blocks = ceil_div(hidden, _COLUMN_BLOCK)
    chunks, per_chunk = _chunks(rows, column_blocks, h.device)
    partial = torch.empty((chunks, hidden), dtype=torch.float32, device=h.device)
    _weight_columns[(column_blocks, chunks)](
        grad_y, h, rstd, partial, grad_y_stride, h_stride, rows, per_chunk, hidden,
        STYLE=style, ROWS=_COLUMN_ROWS, BLOCK=_COLUMN_BLOCK, **options(_COLUMN_THREADS),
    )  # fmt: skip
    return grad_x, partial.sum(0)


def _shift_gradient(grad: Tensor, index: Tensor, languages: int) -> Tensor:
    """Rows of ``grad`` summed by language: (K, d) float32."""
    hidden = grad.shape[-1]
    rows = grad.numel() // hidden
    if rows == 0 or languages == 0:
        return torch.zeros((languages, hidden), dtype=torch.float32, device=grad.device)
    column_blocks = ceil_div(hidden, _COLUMN_BLOCK)
    chunks, per_chunk = _chunks(rows, column_blocks * languages, grad.device)
    partial = torch.empty((chunks, languages, hidden), dtype=torch.float32, device=grad.device)
    index = index.contiguous()
    _shift_columns[(column_blocks, chunks, languages)](
        grad, index, partial, hidden, rows // index.numel(), rows, per_chunk, hidden,
        ROWS=_COLUMN_ROWS, BLOCK=_COLUMN_BLOCK, **options(_COLUMN_THREADS),
    )  # fmt: skip
    return partial.sum(0)
