"""Mean over the tokens that a mask selects, with one read of the hidden states.

    m = (1 / c) Σ_t [mask_t ≠ 0] h_t,  c = selected tokens        h: (B, T, d);  mask: (B, T);  m, e: (B, d) float32
    e = m          or   e = m / ‖m‖
    f = 1 / c      or   f = 1 / (c ‖m‖)                            f: (B,)

Accumulated in float32. Tokens outside the mask are never read, so a NaN there does no harm; an empty row,
or a zero mean that should become unit length, gives zeros and f = 0. With g = ∂L/∂e, every selected token gets

    ∂L/∂h_t = f g    or    f (g - e (e · g)).

No atomics: partial sums of chunks of tokens are added in one order.
"""

# ruff: noqa: PLR0917 - kernels take their pointers and strides by position, as launches pass them

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cached_launch, ceil_div, multiprocessors, on_device_of, options


@cached_launch
@triton.jit(do_not_specialize=["tokens", "tokens_per_chunk"])
def _partial_sums(
    h_ptr, mask_ptr, partial_ptr, count_ptr,
    h_batch_stride, h_token_stride, tokens, tokens_per_chunk, hidden,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of a block of columns over a chunk of tokens of one row of the batch."""
    batch, chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    column = block * BLOCK + tl.arange(0, BLOCK)
    first = chunk * tokens_per_chunk
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    count = tl.zeros((TOKENS,), tl.float32)
    for start in tl.range(first, tl.minimum(first + tokens_per_chunk, tokens), TOKENS, num_stages=3):
        token = start + tl.arange(0, TOKENS)
        present = token < tl.minimum(first + tokens_per_chunk, tokens)
        selected = tl.load(mask_ptr + batch * tokens + token, mask=present, other=0) != 0
        at = batch * h_batch_stride + token.to(tl.int64)[:, None] * h_token_stride + column[None, :]
        live = selected[:, None] & (column < hidden)[None, :]
        total += tl.load(h_ptr + at, mask=live, other=0.0).to(tl.float32)
        count += selected.to(tl.float32)
    slot = batch * tl.num_programs(1) + chunk
    tl.store(partial_ptr + slot * hidden + column, tl.sum(total, axis=0), mask=column < hidden)
    if block == 0:
        tl.store(count_ptr + slot, tl.sum(count))


@cached_launch
@triton.jit(do_not_specialize=["chunks"])
def _finish(
    partial_ptr,
    count_ptr,
    pooled_ptr,
    factor_ptr,
    chunks,
    hidden,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the chunks of one row of the batch, divide by the count, make it unit length."""
    batch = tl.program_id(0).to(tl.int64)
    count = 0.0
    for chunk in range(chunks):
        count += tl.load(count_ptr + batch * chunks + chunk)
    factor = tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mean = _mean_of_chunks(partial_ptr, batch, chunks, column, hidden, factor)
        squares += mean * mean
        if not NORMALIZE:
            tl.store(pooled_ptr + batch * hidden + column, mean, mask=column < hidden)
    if NORMALIZE:
        length = tl.sqrt_rn(tl.sum(squares))
        inverse = tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0)
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)
            # Added again rather than read back: no thread then depends on what another one wrote.
            mean = _mean_of_chunks(partial_ptr, batch, chunks, column, hidden, factor)
            tl.store(pooled_ptr + batch * hidden + column, mean * inverse, mask=column < hidden)
        factor *= inverse
    tl.store(factor_ptr + batch, factor)


@triton.jit
def _mean_of_chunks(partial_ptr, batch, chunks, column, hidden, factor):
    total = tl.zeros(column.shape, tl.float32)
    for chunk in range(chunks):
        at = (batch * chunks + chunk) * hidden + column
        total += tl.load(partial_ptr + at, mask=column < hidden, other=0.0)
    return total * factor


@cached_launch
@triton.jit(do_not_specialize=["tokens"])
def _backward(
    grad_ptr, pooled_ptr, factor_ptr, mask_ptr, grad_h_ptr, tokens, hidden,
    NORMALIZE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One write: a tile of tokens of one row of the batch gets the same vector, or zeros."""
    batch = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    present = token < tokens
    selected = tl.load(mask_ptr + batch * tokens + token, mask=present, other=0) != 0
    factor = tl.load(factor_ptr + batch)
    along = 0.0
    if NORMALIZE:
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)
            at = batch * hidden + column
            grad = tl.load(grad_ptr + at, mask=column < hidden, other=0.0)
            products += grad * tl.load(pooled_ptr + at, mask=column < hidden, other=0.0)
        along = tl.sum(products)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = batch * hidden + column
        grad = tl.load(grad_ptr + at, mask=column < hidden, other=0.0)
        if NORMALIZE:
            grad -= tl.load(pooled_ptr + at, mask=column < hidden, other=0.0) * along
        # Selecting, not multiplying: an infinite gradient of one row of the batch stays out of its padding.
        grad_h = tl.where(selected[:, None], (grad * factor)[None, :], 0.0)
        out = (batch * tokens + token)[:, None] * hidden + column[None, :]
        live = present[:, None] & (column < hidden)[None, :]
        tl.store(grad_h_ptr + out, grad_h.to(grad_h_ptr.dtype.element_ty), mask=live)


# Forward: 8 tokens × 512 columns for 128 threads are four 128-bit loads of a 16-bit tensor per thread, and 32
# float32 sums in registers. Two such tiles are in flight, through shared memory, while one is added. Tokens are
# split into chunks until every multiprocessor has eight such programs (B · d / 512 blocks of columns are often
# fewer), but no chunk has under 64 tokens: its partial sum, 4 d bytes written and read, then stays at a sixteenth
# of the 128 d bytes it read.
# Backward: 16 tokens × 1,024 columns; the pooled row, its gradient (8 d bytes, from L2) against 32 d bytes written.
# Reasoned, not measured.
_TOKENS, _BLOCK, _THREADS = 8, 512, 128
_PROGRAMS_PER_MULTIPROCESSOR, _SHORTEST_CHUNK = 8, 64
_FINISH_BLOCK, _FINISH_THREADS = 1024, 256
_BACKWARD_TOKENS, _BACKWARD_BLOCK, _BACKWARD_THREADS = 16, 1024, 256


def _as_bytes(mask: Tensor) -> Tensor:
    """The mask with unit stride; a bool one is read as bytes."""
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def forward(h: Tensor, mask: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return e (B, d) and f (B,), both float32."""
    batch, tokens, hidden = h.shape
    pooled = torch.empty((batch, hidden), dtype=torch.float32, device=h.device)
    factor = torch.empty((batch,), dtype=torch.float32, device=h.device)
    if batch == 0:
        return pooled, factor
    if h.stride(2) != 1:
        h = h.contiguous()
    blocks = ceil_div(hidden, _BLOCK)
    wanted = ceil_div(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(h.device), blocks * batch)
    per_chunk = max(_SHORTEST_CHUNK, ceil_div(ceil_div(max(tokens, 1), wanted), _TOKENS) * _TOKENS)
    chunks = max(1, ceil_div(tokens, per_chunk))
    partial = torch.empty((batch, chunks, hidden), dtype=torch.float32, device=h.device)
    count = torch.empty((batch, chunks), dtype=torch.float32, device=h.device)
    with on_device_of(h):
        _partial_sums[(batch, chunks, blocks)](
            h, _as_bytes(mask), partial, count, h.stride(0), h.stride(1), tokens, per_chunk, hidden,
            TOKENS=_TOKENS, BLOCK=_BLOCK, **options(_THREADS),
        )  # fmt: skip
        _finish[(batch,)](
            partial, count, pooled, factor, chunks, hidden,
            NORMALIZE=normalize, BLOCK=_FINISH_BLOCK, **options(_FINISH_THREADS),
        )  # fmt: skip
    return pooled, factor


def backward(
    grad: Tensor, pooled: Tensor, factor: Tensor, mask: Tensor, dtype: torch.dtype, normalize: bool
) -> Tensor:
    """Return ∂L/∂h (B, T, d) in ``dtype``."""
    batch, tokens = mask.shape
    hidden = pooled.shape[1]
    grad_h = torch.empty((batch, tokens, hidden), dtype=dtype, device=grad.device)
    if grad_h.numel() == 0:
        return grad_h
    with on_device_of(grad):
        _backward[(batch, ceil_div(tokens, _BACKWARD_TOKENS))](
            grad.contiguous(), pooled, factor, _as_bytes(mask), grad_h, tokens, hidden,
            NORMALIZE=normalize, TOKENS=_BACKWARD_TOKENS, BLOCK=_BACKWARD_BLOCK, **options(_BACKWARD_THREADS),
        )  # fmt: skip
    return grad_h
