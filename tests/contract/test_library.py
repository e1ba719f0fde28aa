"""A backend behind PyTorch's machinery: opcheck, torch.compile, checkpointing, an attached model."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shifcon_fast import ops

OPERATORS = torch.ops.shifcon_fast
Chosen = Callable[..., str]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def gpu(backend: Chosen, device: torch.device) -> str:
    """The backend under test, where it runs on a GPU."""
    if device.type != "cuda":
        pytest.skip("about a GPU's memory, or two GPUs: needs a CUDA device")
    return backend(*(set().union(*(operators for _, _, operators in CASES.values()))))


def leaf(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def norm(impl: str, x: Tensor, weight: Tensor, residual: Tensor, shift: Tensor) -> Tensor:
    index = torch.arange(x.shape[0], device=x.device) - 1
    y, h = ops.add_shift_rms_norm(x, weight, residual, shift, index, impl=impl)
    return y.sin().sum() + h.cos().sum()


def pool(impl: str, h: Tensor) -> Tensor:
    mask = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
    return ops.masked_mean_pool(h, mask, normalize=True, impl=impl).sin().sum()


def contrast(impl: str, a: Tensor, b: Tensor) -> Tensor:
    loss = ops.info_nce(a, b, 5.0, recenter=True, impl=impl) + ops.info_nce(a, b, 5.0, impl=impl)
    return loss.sum() + ops.contrastive_similarity(a, b[:, :3], impl=impl).sin().sum()


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], set[str]]] = {
    "norm": (norm, [(2, 3, 8), (8,), (2, 3, 8), (2, 8)], {"add_shift_rms_norm"}),
    "pool": (pool, [(2, 3, 8)], {"masked_mean_pool"}),
    "contrast": (contrast, [(2, 4, 8), (2, 4, 8)], {"info_nce", "contrastive_similarity"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_graph_with_the_same_numbers_and_counted(
    case: str, backend: Chosen, device: torch.device
) -> None:
    function, shapes, operators = CASES[case]
    impl = backend(*operators)
    function = partial(function, impl)
    leaves = [leaf(*shape, device=device) for shape in shapes]
    expected = function(*leaves)
    expected_gradients = torch.autograd.grad(expected, leaves)
    ops.reset_call_counts()
    compiled = torch.compile(
        function, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager"
    )
    result = compiled(*leaves)
    gradients = torch.autograd.grad(result, leaves)
    torch.testing.assert_close(result, expected)
    for ours, plain in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, plain)
    for operator in operators:
        assert ops.call_counts()[operator, impl] > 0
        assert ops.call_counts()[f"{operator}_backward", impl] > 0


def test_checkpointing_recomputes_the_same(backend: Chosen, device: torch.device) -> None:
    function = partial(norm, backend("add_shift_rms_norm"))
    leaves = [leaf(*shape, device=device) for shape in CASES["norm"][1]]
    expected = torch.autograd.grad(function(*leaves), leaves)
    for reentrant in (False, True):
        result = checkpoint(function, *leaves, use_reentrant=reentrant)
        result.backward()
        for one, wanted in zip(leaves, expected, strict=True):
            assert torch.equal(one.grad, wanted)
            one.grad = None


def samples(impl: str, device: torch.device) -> dict[str, tuple[Any, ...]]:
    x, weight, shift = leaf(2, 3, 8, device=device), leaf(8, device=device), leaf(2, 8, device=device)
    index, mask = torch.tensor([1, -1], device=device), torch.tensor([[1, 0, 1], [0, 0, 0]], device=device)
    return {
        "add_shift_rms_norm": (
            x,
            weight,
            leaf(2, 3, 8, device=device),
            shift,
            index,
            1e-6,
            "llama",
            impl,
        ),
        "masked_mean_pool": (x, mask, True, impl),
        "info_nce": (x, leaf(2, 3, 8, device=device), 5.0, True, True, impl),
        "contrastive_similarity": (x, leaf(2, 4, 8, device=device), 5.0, True, False, impl),
    }


@pytest.mark.parametrize(
    "operator", ["add_shift_rms_norm", "masked_mean_pool", "info_nce", "contrastive_similarity"]
)
def test_opcheck(operator: str, backend: Chosen, device: torch.device) -> None:
    # Its runs on memory that opcheck itself leaves uninitialised must not be poisoned.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.library.opcheck(getattr(OPERATORS, operator).default, samples(backend(operator), device)[operator])


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_twice(case: str, backend: Chosen, device: torch.device) -> None:
    function, shapes, operators = CASES[case]
    impl = backend(*operators)
    leaves = [leaf(*shape, device=device) for shape in shapes]
    first, second = (torch.autograd.grad(function(impl, *leaves), leaves) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case: str, backend: Chosen, device: torch.device) -> None:
    function, shapes, operators = CASES[case]
    impl = backend(*operators)
    leaves = [leaf(*shape, device=device) for shape in shapes]
    expected = function(impl, *leaves)
    gradients = torch.autograd.grad(expected, leaves)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = function(impl, *leaves)
        for one, other in zip(torch.autograd.grad(found, leaves), gradients, strict=True):
            assert torch.equal(one, other)
    assert torch.equal(found, expected)


def test_float64_has_no_kernel_and_says_so(backend: Chosen, device: torch.device) -> None:
    impl = backend("add_shift_rms_norm")
    x = torch.randn(2, 8, device=device, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, not for torch\.float64"):
        ops.add_shift_rms_norm(x, x[0], impl=impl)


def test_the_report_names_it(backend: Chosen, device: torch.device) -> None:
    for report in (r for r in ops.backend_report() if r.device.startswith(device.type)):
        if INTERPRETED:  # on request only
            assert report.chosen in ("native", "reference")
        if report.operator == "subspace_project":
            assert "no Triton kernel" in report.reasons["triton"]
        elif INTERPRETED:
            assert report.reasons["triton"] == f"{report.chosen} is preferred on cpu"
        else:
            assert report.chosen == backend(report.operator)


@pytest.mark.skipif(INTERPRETED, reason="on the CPU impl='auto' does not take the interpreter")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_norm_site_of_an_attached_model_runs_on_the_kernels(
    checkpointing: bool, tiny_model: Callable[..., Any], backend: Chosen, device: torch.device
) -> None:
    import shifcon_fast as sf

    impl = backend("add_shift_rms_norm")
    torch.use_deterministic_algorithms(False)  # attention's own backward is not
    model = tiny_model("llama", layers=4, hidden=32).to(device)
    space = sf.LanguageSpace(
        languages=("en", "sw"),
        pivot="en",
        mean=torch.randn(4, 2, 32),
        counts={"en": 9, "sw": 9},
        rms=torch.ones(4),
        median_norm=torch.ones(4, 2),
        sink_share=torch.zeros(4, 2),
    )
    handle = sf.attach(model, space, forward=1, backward=3)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ops.reset_call_counts()
    ids = torch.randint(3, 100, (2, 7)).to(device)
    model(
        input_ids=ids, labels=ids, language_ids=handle.language_ids(["sw", "en"]).to(device)
    ).loss.backward()
    counts = ops.call_counts()
    assert counts["add_shift_rms_norm", impl] >= 8
    assert counts["add_shift_rms_norm_backward", impl] == 8
    assert {backend for _, backend in counts} == {impl}


def test_the_loss_of_12000_rows_needs_no_square_matrix(gpu: str) -> None:
    a, b = torch.randn(2, 12_000, 256, device="cuda", dtype=torch.bfloat16).unbind()
    a.requires_grad_(), b.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.info_nce(a, b, 20.0, impl=gpu).backward()
    assert torch.cuda.max_memory_allocated() - before < 250 * 2**20


def test_more_than_two_to_the_31_elements(gpu: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    hidden, rows = 4096, 2**19 + 3
    x = torch.zeros(rows, hidden, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(hidden, device="cuda")
    weight, shift = (
        torch.ones(hidden, device="cuda", dtype=torch.bfloat16),
        torch.randn(2, hidden, device="cuda"),
    )
    index = torch.full((rows,), -1, device="cuda")
    index[-1] = 1
    y, h = ops.add_shift_rms_norm(x, weight, None, shift, index, impl=gpu)
    last, last_h = ops.add_shift_rms_norm(x[-1:].clone(), weight, None, shift, index[-1:].clone(), impl=gpu)
    assert torch.equal(y[-1:], last)
    assert torch.equal(h[-1:], last_h)


def test_a_device_that_is_not_the_current_one(gpu: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for function, shapes, _ in CASES.values():
        leaves = [leaf(*shape, device=torch.device("cuda", 1)) for shape in shapes]
        for grad in torch.autograd.grad(function(gpu, *leaves), leaves):
            assert torch.isfinite(grad).all()
    with pytest.raises(ValueError, match="device"):
        ops.info_nce(torch.randn(3, 4, device="cuda:0"), torch.randn(3, 4, device="cuda:1"), impl=gpu)
