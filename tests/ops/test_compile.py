"""torch.compile and torch.library: no graph breaks, right fakes, registered autograd, engagement counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops

OPERATORS = torch.ops.shifcon_fast
IDS, MASK = torch.tensor([1, -1]), torch.tensor([[1, 0, 1], [0, 0, 0]])


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def norm_everything(x: Tensor, weight: Tensor, residual: Tensor, shift: Tensor) -> Tensor:
    y, h = ops.add_shift_rms_norm(x, weight, residual, shift, IDS.to(x.device), style="gemma")
    y2, h2 = ops.add_shift_rms_norm(h, weight)
    return y.sin().sum() + y2.cos().sum() + h2.sum()


def pool(h: Tensor) -> Tensor:
    return ops.masked_mean_pool(h, MASK, normalize=True).sin().sum() + ops.masked_mean_pool(h, MASK).sum()


def contrast(a: Tensor, b: Tensor) -> Tensor:
    loss = ops.info_nce(a, b, scale=5.0, recenter=True).sum() + ops.info_nce(a[0], b[0])
    return loss + ops.contrastive_similarity(a, b[:, :3], recenter=True).sin().sum()


def project(x: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    return (
        ops.subspace_project(x, mean, basis, IDS).sin().sum()
        + ops.subspace_project(x, mean, basis, IDS, IDS.flip(0)).sum()
    )


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]], set[str]]] = {
    "norm": (
        norm_everything,
        lambda: [leaf(2, 3, 8), leaf(8), leaf(2, 3, 8), leaf(2, 8)],
        {"add_shift_rms_norm"},
    ),
    "pool": (pool, lambda: [leaf(2, 3, 8, dtype=torch.bfloat16)], {"masked_mean_pool"}),
    "contrast": (contrast, lambda: [leaf(2, 4, 8), leaf(2, 4, 8)], {"info_nce", "contrastive_similarity"}),
    "project": (project, lambda: [leaf(2, 3, 8), leaf(2, 8), leaf(2, 8, 2)], {"subspace_project"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_graph_with_the_same_numbers_and_counted(case: str) -> None:
    function, inputs, operators = CASES[case]
    leaves = inputs()
    expected = function(*leaves)
    expected_gradients = torch.autograd.grad(expected, leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    ops.reset_call_counts()
    result = compiled(*leaves)
    gradients = torch.autograd.grad(result, leaves)
    assert torch.equal(result, expected)
    for ours, plain in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, plain)
    counts = ops.call_counts()
    for operator in operators:
        assert sum(count for (name, _), count in counts.items() if name == operator) > 0
        assert sum(count for (name, _), count in counts.items() if name == f"{operator}_backward") > 0


@pytest.mark.slow("compiles C++ that inductor has written")
def test_inductor_in_bfloat16() -> None:
    leaves = [
        leaf(2, 3, 16, dtype=torch.bfloat16),
        leaf(16),
        leaf(2, 3, 16, dtype=torch.bfloat16),
        leaf(2, 16),
    ]
    expected = norm_everything(*leaves)
    expected_gradients = torch.autograd.grad(expected, leaves)
    result = torch.compile(norm_everything, fullgraph=True)(*leaves)
    torch.testing.assert_close(
        result, expected, rtol=2e-2, atol=2e-2
    )  # Inductor fuses and rounds the sums around it
    for ours, plain in zip(torch.autograd.grad(result, leaves), expected_gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)


def test_a_compiled_graph_still_refuses_language_ids_out_of_range() -> None:
    def shifted(x: Tensor, index: Tensor) -> Tensor:
        return ops.add_shift_rms_norm(x, torch.ones(8), shift=torch.ones(2, 8), index=index)[1]

    compiled = torch.compile(shifted, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8)
    assert torch.equal(compiled(x, IDS), torch.stack([x[0] + 1, x[1]]))
    with pytest.raises(ValueError, match=r"index: got language id 7; wanted 0 to 1"):
        compiled(x, IDS + 6)


def norm_call(dtype: torch.dtype, residual: bool, shift: bool) -> tuple[Any, ...]:
    x = leaf(2, 3, 8, dtype=dtype)
    added = leaf(2, 3, 8, dtype=dtype) if residual else None
    table = (leaf(2, 8), IDS) if shift else (None, None)
    return (x, leaf(8), added, *table, 1e-6, "llama", "reference")


SCHEMA_CALLS: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "norm, everything": ("add_shift_rms_norm", lambda: norm_call(torch.bfloat16, True, True)),
    "norm alone": ("add_shift_rms_norm", lambda: norm_call(torch.float32, False, False)),
    "norm, transposed": (
        "add_shift_rms_norm",
        lambda: (leaf(8, 3, 2).permute(2, 1, 0), leaf(8), None, leaf(2, 8), IDS, 1e-6, "gemma", "reference"),
    ),
    "pool": ("masked_mean_pool", lambda: (leaf(2, 3, 8, dtype=torch.float16), MASK, True, "reference")),
    "nce": ("info_nce", lambda: (leaf(2, 4, 8), leaf(2, 4, 8), 5.0, True, True, "reference")),
    "similarity": (
        "contrastive_similarity",
        lambda: (leaf(2, 4, 8), leaf(2, 3, 8), 5.0, True, False, "reference"),
    ),
    "project": (
        "subspace_project",
        lambda: (leaf(2, 3, 8), leaf(2, 8), leaf(2, 8, 2), IDS, None, "reference"),
    ),
    "norm backward": (
        "add_shift_rms_norm_backward",
        lambda: (
            *(None, torch.randn(2, 8)),
            *(
                torch.randn(2, 8),
                torch.ones(8),
                torch.ones(2),
                IDS,
                2,
                "olmo",
                True,
                False,
                True,
                "reference",
            ),
        ),
    ),
    "pool backward": (
        "masked_mean_pool_backward",
        lambda: (
            *(torch.randn(2, 8), torch.randn(2, 8), torch.ones(2), MASK),
            *(torch.bfloat16, True, "reference"),
        ),
    ),
    "nce backward": (
        "info_nce_backward",
        lambda: (
            *(torch.ones(2), torch.randn(2, 4, 8), torch.randn(2, 4, 8)),
            *(torch.ones(2, 2, 4), torch.ones(2, 2, 4), 5.0, True, True, True, False, "reference"),
        ),
    ),
    "similarity backward": (
        "contrastive_similarity_backward",
        lambda: (
            *(torch.randn(2, 4, 3), torch.randn(2, 4, 8), torch.randn(2, 3, 8)),
            *(5.0, True, False, False, True, "reference"),
        ),
    ),
    "project backward": (
        "subspace_project_backward",
        lambda: (
            *(torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8, 2)),
            *(IDS, IDS.flip(0), True, True, True, "reference"),
        ),
    ),
}


@pytest.mark.parametrize("call", SCHEMA_CALLS)
def test_opcheck(call: str) -> None:
    """Schema (nothing mutated, nothing aliased), fake shapes and strides, autograd registration, AOT dispatch."""
    name, arguments = SCHEMA_CALLS[call]
    torch.library.opcheck(getattr(OPERATORS, name).default, arguments())


def test_fake_tensors_reach_the_fake_implementation() -> None:
    with torch._subclasses.FakeTensorMode():
        y, h = ops.add_shift_rms_norm(
            torch.empty(2, 3, 8).bfloat16(), torch.empty(8), torch.empty(2, 3, 8).bfloat16()
        )
        pooled = ops.masked_mean_pool(torch.empty(2, 3, 8).bfloat16(), torch.empty(2, 3).bool())
        assert (y.shape, y.dtype, h.shape) == ((2, 3, 8), torch.bfloat16, (2, 3, 8))
        assert (pooled.shape, pooled.dtype) == ((2, 8), torch.float32)
        assert ops.info_nce(torch.empty(4, 8), torch.empty(4, 8)).shape == ()


def test_dispatch_modes_see_the_operator() -> None:
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = leaf(2, 8)
    with Watch():
        ops.add_shift_rms_norm(x, torch.ones(8))[0].sum().backward()
    assert "shifcon_fast.add_shift_rms_norm.default" in seen
    assert "shifcon_fast.add_shift_rms_norm_backward.default" in seen
    assert x.grad is not None
