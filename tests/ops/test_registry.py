"""The seam between operators and backends: choice, refusal, one warning, counting."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops
from shifcon_fast.ops import registry
from shifcon_fast.ops.reference import norm as reference_norm

MEAN, BASIS = torch.arange(12.0).reshape(2, 6), torch.eye(6)[:, :2].expand(2, 6, 2)
CALLS: dict[str, Callable[[Tensor, str], Any]] = {
    "add_shift_rms_norm": lambda x, impl: ops.add_shift_rms_norm(
        x, torch.ones(6), x, MEAN, torch.tensor([0, 1, -1]), impl=impl
    )[0],
    "masked_mean_pool": lambda x, impl: ops.masked_mean_pool(x, torch.ones(3, 4).bool(), True, impl=impl),
    "info_nce": lambda x, impl: ops.info_nce(x, x.roll(1, 2), 9.0, recenter=True, impl=impl),
    "contrastive_similarity": lambda x, impl: ops.contrastive_similarity(x, x.roll(1, 2), 9.0, impl=impl),
    "subspace_project": lambda x, impl: ops.subspace_project(
        x, MEAN, BASIS, torch.tensor([0, 1, -1]), impl=impl
    ),
}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backends registered by a test are gone after it."""
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    registry.select.cache_clear()
    ops.reset_call_counts()
    yield
    registry.select.cache_clear()
    ops.reset_call_counts()


@pytest.mark.parametrize("operator", registry.OPERATORS)
def test_auto_runs_the_reference_where_nothing_faster_is_built(operator: str) -> None:
    registry._backends = {key: value for key, value in registry._backends.items() if key[1] == "reference"}
    x = torch.randn(3, 4, 6, requires_grad=True)
    CALLS[operator](x, "auto").sum().backward()
    assert ops.call_counts() == {(operator, "reference"): 1, (f"{operator}_backward", "reference"): 1}


@pytest.mark.parametrize("operator", registry.OPERATORS)
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_a_backend_that_cannot_run_is_an_error_not_a_fallback(operator: str, impl: str) -> None:
    registry._backends.pop((operator, impl), None)
    with pytest.raises(
        ValueError, match=rf"impl: got '{impl}', which cannot run {operator} on cpu tensors of .*: this"
    ):
        CALLS[operator](torch.randn(3, 4, 6), impl)
    assert ops.call_counts() == {}


def test_a_registered_backend_engages_and_is_told_what_is_needed() -> None:
    received: list[tuple[Any, ...]] = []

    def forward(*args: Any) -> Any:
        received.append(args)
        return reference_norm.forward(*args)

    def backward(*args: Any) -> Any:
        received.append(args)
        return reference_norm.backward(*args)

    ops.register_backend("add_shift_rms_norm", "native", forward=forward, backward=backward)
    x, weight, shift = torch.randn(3, 6), torch.ones(6), torch.zeros(2, 6)
    index = torch.tensor([0, 1, -1])
    leaf = x.clone().requires_grad_()
    y, _ = ops.add_shift_rms_norm(leaf, weight, shift=shift, index=index)
    y.sum().backward()
    assert ops.call_counts() == {
        ("add_shift_rms_norm", "native"): 1,
        ("add_shift_rms_norm_backward", "native"): 1,
    }
    _, languages, style, need_input, need_weight, need_shift = received[1][5:]
    assert (languages, style) == (2, "llama")
    assert (need_input, need_weight, need_shift) == (True, False, False)  # QLoRA: the norm weight is frozen
    ops.add_shift_rms_norm(x, weight, impl="reference")
    assert ops.call_counts()["add_shift_rms_norm", "reference"] == 1


def test_a_dtype_the_fast_backend_lacks_goes_to_the_reference_only_under_auto() -> None:
    def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
        return "no variant for float16" if dtype == torch.float16 else None

    ops.register_backend(
        "add_shift_rms_norm",
        "native",
        forward=reference_norm.forward,
        backward=reference_norm.backward,
        unavailable=unavailable,
    )
    weight = torch.ones(6)
    ops.add_shift_rms_norm(torch.randn(2, 6).half(), weight)
    ops.add_shift_rms_norm(torch.randn(2, 6).bfloat16(), weight)
    assert ops.call_counts() == {("add_shift_rms_norm", "reference"): 1, ("add_shift_rms_norm", "native"): 1}
    with pytest.raises(ValueError, match=r"on cpu tensors of torch.float16: no variant for float16"):
        ops.add_shift_rms_norm(torch.randn(2, 6).half(), weight, impl="native")


def test_an_explicit_triton_backend_may_take_cpu_tensors() -> None:
    """Triton's interpreter runs on the CPU; auto does not choose it there."""
    ops.register_backend(
        "add_shift_rms_norm", "triton", forward=reference_norm.forward, backward=reference_norm.backward
    )
    registry._backends.pop(("add_shift_rms_norm", "native"), None)
    ops.add_shift_rms_norm(torch.randn(2, 6), torch.ones(6), impl="triton")
    ops.add_shift_rms_norm(torch.randn(2, 6), torch.ones(6))
    assert ops.call_counts() == {("add_shift_rms_norm", "triton"): 1, ("add_shift_rms_norm", "reference"): 1}


def test_cuda_prefers_triton_and_the_extension_for_subspaces() -> None:
    ops.register_backend("info_nce", "triton", forward=print, backward=print)
    ops.register_backend("subspace_project", "triton", forward=print, backward=print)
    ops.register_backend("subspace_project", "native", forward=print, backward=print)
    cuda = torch.device("cuda", 1)
    assert registry.select("info_nce", "auto", cuda, torch.bfloat16).name == "triton"
    assert registry.select("subspace_project", "auto", cuda, torch.bfloat16).name == "native"


def test_report_names_the_choice_and_the_reasons() -> None:
    registry._backends = {key: value for key, value in registry._backends.items() if key[1] == "reference"}
    ops.register_backend(
        "info_nce",
        "native",
        forward=print,
        backward=print,
        unavailable=lambda device, dtype: "built for another ABI",
    )
    ops.register_backend("masked_mean_pool", "native", forward=print, backward=print)
    report = {row.operator: row for row in ops.backend_report() if row.device == "cpu"}
    assert set(report) == set(registry.OPERATORS)
    assert report["info_nce"].chosen == "reference"
    assert report["info_nce"].reasons["native"] == "built for another ABI"
    assert (
        report["subspace_project"].reasons["native"] == "this installation has no compiled extension for it"
    )
    assert report["masked_mean_pool"].chosen == "native"
    assert report["masked_mean_pool"].reasons["reference"] == "native is preferred on cpu"


def test_bad_registrations() -> None:
    with pytest.raises(ValueError, match=r"operator: got 'softmax'; wanted one of add_shift_rms_norm"):
        ops.register_backend("softmax", "native", forward=print, backward=print)
    with pytest.raises(ValueError, match=r"name: got 'auto'; wanted 'reference', 'native' or 'triton'"):
        ops.register_backend("info_nce", "auto", forward=print, backward=print)


@pytest.mark.parametrize("operator", registry.OPERATORS)
def test_autocast_changes_nothing(operator: str) -> None:
    x = torch.randn(3, 4, 6, requires_grad=True)
    expected = CALLS[operator](x, "reference")
    (expected_grad,) = torch.autograd.grad(expected.sin().sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = CALLS[operator](x, "reference")
        (grad,) = torch.autograd.grad(result.sin().sum(), x)
    assert torch.equal(result, expected)
    assert torch.equal(grad, expected_grad)


def test_a_refused_dtype_is_no_reason_to_warn_of_a_slow_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match=r"x: got dtype torch.int64"):
            ops.add_shift_rms_norm(torch.ones(2, 6, dtype=torch.int64), torch.ones(6))


def test_one_warning_a_process() -> None:
    script = """
        import warnings, torch
        from shifcon_fast import ops
        from shifcon_fast.ops import registry
        registry._backends = {key: value for key, value in registry._backends.items() if key[1] == "reference"}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                x = torch.randn(2, 4, dtype=dtype)
                ops.info_nce(x, x, impl="reference")
                print(len(caught), end=" ")
                ops.info_nce(x, x)
                ops.contrastive_similarity(x, x)
        print(len(caught), caught[0].category.__name__, caught[0].message)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    # Nobody who asked for the reference is warned, and neither are float64 checks.
    assert result.stdout.startswith("0 0 1 1 SlowBackendWarning info_nce runs its reference backend")
    assert "shifcon doctor" in result.stdout
