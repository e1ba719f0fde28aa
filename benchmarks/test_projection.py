"""``subspace_project`` against eager PyTorch grouped by language, and against ``torch.compile``."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops

RANKS = (16, 64, 256)
Values = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def ours(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return ops.subspace_project(x, mean, basis, source, target)


def eager(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """As one writes it: a loop over the languages that occur, in the dtype of x."""
    result = x.clone()
    for language in target.unique().tolist():
        rows = (target == language).nonzero().squeeze(-1)
        directions = basis[language].to(x.dtype)
        centred = x[rows] - mean[source[rows]].to(x.dtype)
        result[rows] = centred @ directions @ directions.T + mean[language].to(x.dtype)
    return result


def eager_float32(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The same loop in float32, rounded once at the end."""
    result = x.clone()
    for language in target.unique().tolist():
        rows = (target == language).nonzero().squeeze(-1)
        directions = basis[language].float()
        centred = x[rows].float() - mean[source[rows]]
        result[rows] = (centred @ directions @ directions.T + mean[language]).to(x.dtype)
    return result


def masked(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Shapes that no datum decides: the coefficients in every language's basis, all but one's set to zero.

    Two dense matrix products with (languages x rank) columns.
    """
    languages, hidden, rank = basis.shape
    mean = mean.to(x.dtype)
    wide = basis.to(x.dtype).permute(1, 0, 2).reshape(hidden, languages * rank)
    coefficients = ((x - mean[source]) @ wide).view(-1, languages, rank)
    own = torch.arange(languages, device=x.device) == target[:, None]
    kept = torch.where(own[:, :, None], coefficients, 0).view(-1, languages * rank)
    return kept @ wide.T + mean[target]


def padded(x: Tensor, mean: Tensor, basis: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Shapes that no datum decides: rows sorted into one padded group a language, one batched product each way.

    A group has twice its even share of places; the benchmark's languages, drawn evenly, fit.
    """
    languages, rows = basis.shape[0], x.shape[0]
    places = 2 * -(-rows // languages)
    mean, directions = mean.to(x.dtype), basis.to(x.dtype)
    order = torch.argsort(target, stable=True)
    ordered = target[order]
    first = torch.searchsorted(ordered, torch.arange(languages, device=x.device))
    place = ordered * places + torch.arange(rows, device=x.device) - first[ordered]
    groups = x.new_zeros(languages * places, x.shape[1])
    groups[place] = x[order] - mean[source[order]]
    groups = groups.view(languages, places, -1)
    moved = torch.baddbmm(mean[:, None], torch.bmm(groups, directions), directions.mT)
    result = torch.empty_like(x)
    result[order] = moved.view(languages * places, -1)[place]
    return result


PEERS: dict[str, Callable[..., Tensor]] = {
    "ours": ours,
    "eager": eager,
    "eager, float32 inside": eager_float32,
    "torch.compile": masked,
    "torch.compile, padded": padded,
}

SYNCHRONISING = ("eager", "eager, float32 inside")  # the loop asks the device which languages there are


def inputs(rows: int, hidden: int, languages: int, rank: int, device: torch.device) -> Values:
    """Languages in mixed order; float32 means, as a language space holds them, and a basis in x's dtype, by rows.

    torch.linalg.qr returns it by columns; who stores a basis stores it contiguous, and peers are faster with it.
    """
    dtype = torch.bfloat16
    x = torch.randn(rows, hidden, device=device, dtype=dtype)
    basis = torch.linalg.qr(torch.randn(languages, hidden, rank, device=device))[0].to(dtype).contiguous()
    source, target = torch.randint(0, languages, (2, rows), device=device)
    if languages * 4 <= rows:  # every language as often as the others, so that padded groups are large enough
        target = torch.arange(rows, device=device)[torch.randperm(rows, device=device)] % languages
    return x, torch.randn(languages, hidden, device=device), basis, source, target


def check(peer: str, function: Callable[..., Tensor], values: Values) -> None:
    """A peer that computes something else is not a peer."""
    try:
        got = function(*values)
    except (RuntimeError, TypeError, ValueError) as error:
        if peer == "ours":
            raise
        pytest.skip(f"{peer} does not run here: {error}")
    x, mean, basis, source, target = values
    expected = eager(x.float(), mean, basis.float(), source, target)
    distance = (got.float() - expected).norm() / expected.norm()
    assert distance < 2e-2, f"{peer} is off by {distance:.1e}"


def sizes(rank: int, device: torch.device, smoke: bool) -> tuple[int, int, int, int]:
    """Rows, hidden size, languages and rank."""
    if not smoke and device.type != "cpu":
        return 16_384, 4096, 16, rank
    if rank != 64:
        pytest.skip("one small size on the CPU")
    return (32, 64, 4, 8) if smoke else (4096, 2048, 8, rank)


def prepared(peer: str, smoke: bool) -> Callable[..., Tensor]:
    function = PEERS[peer]
    if peer.startswith("torch.compile"):
        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager" if smoke else "inductor", dynamic=False)
    return function


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("rank", RANKS)
def test_forward(
    rank: int,
    peer: str,
    measure: Any,
    rotations: Callable[[int], int],
    device: torch.device,
    smoke: bool,
) -> None:
    rows, hidden, languages, rank = sizes(rank, device, smoke)
    function = prepared(peer, smoke)
    first = inputs(rows, hidden, languages, rank, device)
    with torch.no_grad():
        check(peer, function, first)
        moved = 2 * first[0].nbytes
        sets = [first] + [inputs(rows, hidden, languages, rank, device) for _ in range(rotations(moved) - 1)]
        calls = [lambda values=values: function(*values) for values in sets]
        case = f"projection forward {rows}x{hidden}, {languages} languages, rank {rank}"
        measure(calls, moved=moved, case=case, peer=peer, capturable=peer not in SYNCHRONISING)


@pytest.mark.parametrize("peer", ["ours", "eager", "eager, float32 inside", "torch.compile"])
@pytest.mark.parametrize("rank", RANKS)
def test_backward(
    rank: int,
    peer: str,
    measure: Any,
    rotations: Callable[[int], int],
    device: torch.device,
    smoke: bool,
) -> None:
    """The gradient of x alone: language spaces are not trained."""
    rows, hidden, languages, rank = sizes(rank, device, smoke)
    function = prepared(peer, smoke)
    with torch.no_grad():
        check(peer, function, inputs(rows, hidden, languages, rank, device))

    def call() -> Callable[[], Any]:
        values = inputs(rows, hidden, languages, rank, device)
        leaf, upper = values[0].requires_grad_(), torch.randn_like(values[0])
        moved = function(leaf, *values[1:])
        return lambda: torch.autograd.grad(moved, leaf, upper, retain_graph=True)

    bytes_moved = 2 * rows * hidden * 2
    calls = [call() for _ in range(rotations(bytes_moved))]
    case = f"projection backward {rows}x{hidden}, {languages} languages, rank {rank}"
    # Also what eager peers asked the device for in the loop of their forward is known by now.
    measure(calls, moved=bytes_moved, case=case, peer=peer)
