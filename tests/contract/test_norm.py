"""``add_shift_rms_norm``: what every backend has to keep."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shifcon_fast import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STYLES = ["llama", "gemma", "olmo"]
EPS = 1e-6
ErrorRule = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture
def impl(backend: Callable[..., str]) -> str:
    return backend("add_shift_rms_norm")


def normalised(h: Tensor, weight: Tensor, style: str) -> Tensor:
    """The norm as transformers writes it, at h's dtype (float64: the oracle)."""
    wide = h if h.dtype == torch.float64 else h.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if style == "llama":
        return (weight * wide.to(h.dtype)).to(h.dtype)
    factor = weight if h.dtype == torch.float64 else weight.float()
    return (wide * (factor + 1 if style == "gemma" else factor)).to(h.dtype)


def by_language(grad: Tensor, index: Tensor, languages: int) -> Tensor:
    rows = grad.reshape(index.numel(), -1, grad.shape[-1]).sum(1)
    kept = index.reshape(-1) >= 0
    return rows.new_zeros(languages, grad.shape[-1]).index_add(0, index.reshape(-1)[kept].long(), rows[kept])


class Example:
    """One call's inputs, its results, and what they should be."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, index: Tensor, device: torch.device, impl: str
    ) -> None:
        self.impl = impl
        hidden = shape[-1]
        self.x, self.residual, self.grad_y, self.grad_h = torch.randn(4, *shape, device=device).to(dtype)
        self.weight = (torch.rand(hidden, device=device) + 0.5).to(dtype)
        self.shift = torch.randn(3, hidden, device=device)
        self.index = index.to(device)

    def run(
        self, style: str, wanted: tuple[bool, bool, bool, bool]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        leaves = [
            leaf.detach().clone().requires_grad_(needed)
            for leaf, needed in zip((self.x, self.weight, self.residual, self.shift), wanted, strict=True)
        ]
        x, weight, residual, shift = leaves
        y, h = ops.add_shift_rms_norm(x, weight, residual, shift, self.index, EPS, style, impl=self.impl)
        gradients: list[Tensor | None] = [None] * 4
        if any(wanted):
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            # Nobody's incoming gradient is written into: it may be shared.
            before = self.grad_y.clone(), self.grad_h.clone()
            found = iter(torch.autograd.grad((y, h), asked, (self.grad_y, self.grad_h)))
            gradients = [next(found) if needed else None for needed in wanted]
            assert torch.equal(self.grad_y, before[0])
            assert torch.equal(self.grad_h, before[1])
        return y.detach(), h.detach(), gradients

    def check(self, style: str, wanted: tuple[bool, bool, bool, bool], rule: ErrorRule) -> None:
        y, h, gradients = self.run(style, wanted)
        rows = self.index.reshape(self.index.shape + (1,) * (self.x.ndim - self.index.ndim))
        moved = self.shift.double()[rows.squeeze(-1).clamp(min=0).long()]
        total = self.x.double() + self.residual.double()
        oracle_h = torch.where(rows >= 0, total + moved, total)
        plain = self.x + self.residual
        rule(h, torch.where(rows >= 0, plain + moved.to(plain.dtype), plain), oracle_h)
        expected: dict[str, list[Tensor]] = {}
        for name, dtype in (("plain", h.dtype), ("oracle", torch.float64)):
            own_h, own_w = h.to(dtype).requires_grad_(), self.weight.to(dtype).requires_grad_()
            own_y = normalised(own_h, own_w, style)
            grad_h, grad_w = torch.autograd.grad(own_y, (own_h, own_w), self.grad_y.to(dtype))
            grad_h = grad_h + self.grad_h.to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            shifts = by_language(grad_h.to(wide), self.index, 3)
            expected[name] = [own_y.detach(), grad_h, grad_w, grad_h, shifts]
        for ours, plain_one, oracle in zip(
            [y, *gradients], expected["plain"], expected["oracle"], strict=True
        ):
            if ours is not None:
                rule(ours, plain_one, oracle)


EVERY = (True, True, True, True)
FROZEN = (True, False, True, False)  # what QLoRA asks for


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("hidden", [pytest.param(7, marks=pytest.mark.small), 96, 1000])
def test_values_and_gradients(
    hidden: int, style: str, dtype: torch.dtype, impl: str, device: torch.device, within_rule: ErrorRule
) -> None:
    example = Example((3, 5, hidden), dtype, torch.tensor([2, -1, 0]), device, impl)
    example.check(style, EVERY, within_rule)
    example.check(style, FROZEN, within_rule)


@pytest.mark.parametrize("hidden", [1, 2, 4096, 5120, 16384])
def test_hidden_sizes(hidden: int, impl: str, device: torch.device, within_rule: ErrorRule) -> None:
    example = Example((2, 2, hidden), torch.bfloat16, torch.tensor([1, -1]), device, impl)
    example.check("llama", EVERY, within_rule)
    example.check("gemma", FROZEN, within_rule)


@pytest.mark.parametrize(("hidden", "dtype"), [(16385, torch.float32), (65536, torch.bfloat16)])
def test_long_rows(
    hidden: int, dtype: torch.dtype, impl: str, device: torch.device, within_rule: ErrorRule
) -> None:
    Example((2, hidden), dtype, torch.tensor([1, -1]), device, impl).check("llama", EVERY, within_rule)


@pytest.mark.small
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64), (5, 64), (2, 3, 4, 64)])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
def test_index_per_row_and_per_token(
    shape: tuple[int, ...], integer: torch.dtype, impl: str, device: torch.device, within_rule: ErrorRule
) -> None:
    for prefix in range(len(shape)):
        index = (torch.arange(torch.Size(shape[:prefix]).numel()) % 4 - 1).reshape(shape[:prefix]).to(integer)
        Example(shape, torch.float32, index, device, impl).check("llama", EVERY, within_rule)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4)))
def test_every_subset_of_gradients(
    wanted: tuple[bool, bool, bool, bool], impl: str, device: torch.device, within_rule: ErrorRule
) -> None:
    Example((4, 2, 40), torch.bfloat16, torch.tensor([2, -1, 2, 0]), device, impl).check(
        "llama", wanted, within_rule
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rows_without_a_language_are_untouched_bit_for_bit(
    dtype: torch.dtype, with_residual: bool, impl: str, device: torch.device
) -> None:
    x = torch.randn(3, 2, 65, device=device).to(dtype)
    x[1, 0, :4] = torch.tensor([-0.0, 0.0, float("inf"), torch.finfo(dtype).tiny])
    residual = torch.full_like(x, -0.0) if with_residual else None
    shift, index = torch.randn(2, 65, device=device), torch.tensor([0, -1, 1], device=device)
    weight = torch.rand(65, device=device).to(dtype)
    y, h = ops.add_shift_rms_norm(x, weight, residual, shift, index, impl=impl)
    integers = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(h[1].view(integers), x[1].view(integers))
    assert not torch.equal(h[0], x[0])
    alone, _ = ops.add_shift_rms_norm(x, weight, residual, impl=impl)
    assert torch.equal(y[1, 1].view(integers), alone[1, 1].view(integers))


def test_the_unshift_is_the_same_call_with_the_negated_table(impl: str, device: torch.device) -> None:
    x = torch.randint(-64, 64, (2, 3, 48), device=device).float()  # sums of small integers are exact
    shift, index = torch.randint(-64, 64, (2, 48), device=device).float(), torch.tensor([1, 0], device=device)
    weight = torch.ones(48, device=device)
    _, there = ops.add_shift_rms_norm(x, weight, None, shift, index, impl=impl)
    _, back = ops.add_shift_rms_norm(there, weight, None, -shift, index, impl=impl)
    assert torch.equal(there, x + shift[index][:, None])
    assert torch.equal(back, x)


@pytest.mark.parametrize("with_shift", [False, True])
def test_without_residual(with_shift: bool, impl: str, device: torch.device, within_rule: ErrorRule) -> None:
    x, weight = torch.randn(4, 70, device=device), torch.rand(70, device=device)
    shift = torch.randn(2, 70, device=device) if with_shift else None
    index = torch.tensor([0, 1, -1, 0], device=device) if with_shift else None
    y, h = ops.add_shift_rms_norm(x, weight, None, shift, index, EPS, "olmo", impl=impl)
    moved = x.double()
    if shift is not None and index is not None:
        moved = moved + shift.double()[index.clamp(min=0)] * (index >= 0)[:, None]
    else:
        assert h is x
    within_rule(h, moved.float(), moved)
    within_rule(y, normalised(h, weight, "olmo"), normalised(h.double(), weight.double(), "olmo"))


def test_the_weight_may_be_float32_next_to_16_bits(
    impl: str, device: torch.device, within_rule: ErrorRule
) -> None:
    example = Example((3, 2, 50), torch.bfloat16, torch.tensor([0, -1, 1]), device, impl)
    example.weight = example.weight.float() * 1.001
    example.check("llama", EVERY, within_rule)
    assert example.run("llama", EVERY)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["sliced rows", "transposed", "sliced columns", "expanded"])
def test_non_contiguous_inputs(layout: str, impl: str, device: torch.device) -> None:
    base = torch.randn(6, 8, 40, device=device)
    views = {
        "sliced rows": lambda t: t[:, 1:5, :32],
        "transposed": lambda t: t.transpose(0, 1)[:4, :, :32],
        "sliced columns": lambda t: t[:4, :, 3:35],
        "expanded": lambda t: t[:1, :4, :32].expand(6, 4, 32),
    }
    x, residual = views[layout](base), views[layout](base.flip(0))
    weight, shift = torch.rand(64, device=device)[::2], torch.randn(32, 3, device=device).T
    index = torch.arange(2 * x.shape[0], device=device)[::2] % 3 - 1
    results = []
    for contiguous in (False, True):
        inputs = (x, weight, residual, shift, index)
        leaves = [
            (t.contiguous() if contiguous else t.detach()).requires_grad_(t.is_floating_point())
            for t in inputs
        ]
        y, h = ops.add_shift_rms_norm(*leaves, impl=impl)
        grad = torch.linspace(-1, 1, x.numel(), device=device).view(x.shape).transpose(0, 1).contiguous()
        upper = grad.transpose(0, 1)
        results.append([y, h, *torch.autograd.grad((y, h), leaves[:4], (upper, y.detach().sin()))])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_an_expanded_gradient_as_sum_gives_it(impl: str, device: torch.device) -> None:
    x = torch.randn(3, 20, device=device, requires_grad=True)
    y, _ = ops.add_shift_rms_norm(x, torch.ones(20, device=device), impl=impl)
    (grad,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        normalised(wide, torch.ones(20, device=device).double(), "llama").sum(), wide
    )
    torch.testing.assert_close(grad.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_zero_rows(shape: tuple[int, ...], impl: str, device: torch.device) -> None:
    leaves = [torch.randn(size, device=device, requires_grad=True) for size in (shape, (32,), shape, (2, 32))]
    x, weight, residual, shift = leaves
    index = torch.zeros(shape[0], dtype=torch.long, device=device)
    y, h = ops.add_shift_rms_norm(x, weight, residual, shift, index, impl=impl)
    gradients = torch.autograd.grad((y, h), leaves, (torch.ones_like(y), torch.ones_like(h)))
    assert y.shape == h.shape == gradients[0].shape == shape
    assert torch.equal(gradients[1], torch.zeros(32, device=device))
    assert torch.equal(gradients[3], torch.zeros(2, 32, device=device))


def test_only_one_of_the_two_results_is_used(impl: str, device: torch.device, within_rule: ErrorRule) -> None:
    example = Example((3, 2, 24), torch.float32, torch.tensor([0, -1, 1]), device, impl)
    for used in (0, 1):
        leaves = [t.detach().clone().requires_grad_() for t in (example.x, example.weight, example.residual)]
        shift = example.shift.clone().requires_grad_()
        outputs = ops.add_shift_rms_norm(*leaves, shift, example.index, EPS, impl=impl)
        upper = (example.grad_y, example.grad_h)[used]
        ours = torch.autograd.grad(outputs[used], [leaves[0], shift], upper)
        wide = outputs[1].detach().double().requires_grad_()
        chosen = (normalised(wide, example.weight.double(), "llama"), wide * 1)[used]
        (oracle,) = torch.autograd.grad(chosen, wide, upper.double())
        within_rule(ours[0], oracle.float(), oracle)
        within_rule(ours[1], oracle.new_zeros(3, 24).float(), by_language(oracle, example.index, 3))


def test_many_rows(
    impl: str, device: torch.device, within_rule: ErrorRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Triton: more tiles of rows than programs, so that each program walks over several."""
    if impl == "triton":
        from shifcon_fast.kernels import add_shift_rms_norm as kernel

        monkeypatch.setattr(kernel, "multiprocessors", lambda _: 1)
    index = torch.arange(300) % 4 - 1
    Example((300, 1000), torch.float32, index, device, impl).check("gemma", EVERY, within_rule)
    Example((40, 9000), torch.bfloat16, index[:40], device, impl).check("llama", EVERY, within_rule)
