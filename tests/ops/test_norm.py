"""add_shift_rms_norm against float64, Hugging Face's norms, and its rounding contract."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from shifcon_fast import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STYLES = ["llama", "gemma", "olmo"]
HF_NORM = {"llama": LlamaRMSNorm, "gemma": Gemma2RMSNorm, "olmo": Olmo2RMSNorm}


def plain(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    *,
    style: str,
) -> tuple[Tensor, Tensor]:
    """The formula as one would write it in PyTorch, at the dtype of x; the oracle when x is float64."""
    h = x if residual is None else x + residual
    if shift is not None and index is not None:
        table = torch.cat([shift, torch.zeros_like(shift[:1])]).to(x.dtype)  # id -1 reads the last row
        rows = table[index.long()]
        h = h + rows.reshape(index.shape + (1,) * (x.ndim - 1 - index.ndim) + (x.shape[-1],))
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return y * ((1 + weight) if style == "gemma" else weight).to(x.dtype), h


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(within_rule: Callable[..., None], style: str, dtype: torch.dtype) -> None:
    for shape in [(2, 5, 48), (1, 17), (7, 129), (3, 2, 2, 3), (4, 1), (0, 8), (2, 0, 8), (11,)]:
        x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        weight, shift = torch.randn(shape[-1]).to(dtype), torch.randn(3, shape[-1])
        index = torch.randint(-1, 3, shape[:1] if len(shape) > 1 else ())
        for with_residual, with_shift in itertools.product([False, True], repeat=2):
            inputs = (
                x,
                weight,
                residual if with_residual else None,
                shift if with_shift else None,
                index if with_shift else None,
            )
            y, h = ops.add_shift_rms_norm(*inputs, style=style)
            assert y.dtype == h.dtype == dtype
            exact = [None if v is None else v.double() if v.is_floating_point() else v for v in inputs]
            for ours, ordinary, oracle in zip(
                (y, h), plain(*inputs, style=style), plain(*exact, style=style), strict=True
            ):
                within_rule(ours, ordinary, oracle)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_hugging_faces_norm_bit_for_bit(style: str, dtype: torch.dtype) -> None:
    norm = HF_NORM[style](96, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = (torch.randn(4, 9, 96) * 3).to(dtype)
    y, h = ops.add_shift_rms_norm(x, norm.weight, eps=1e-5, style=style, impl="reference")
    assert torch.equal(y, norm(x))
    assert h is x
    residual = torch.randn(4, 9, 96).to(dtype)
    y, h = ops.add_shift_rms_norm(x, norm.weight, residual, eps=1e-5, style=style, impl="reference")
    assert torch.equal(h, x + residual)
    assert torch.equal(y, norm(x + residual))


@pytest.mark.parametrize("style", STYLES)
def test_float32_weight_leaves_y_in_the_dtype_of_x(style: str) -> None:
    """PEFT's prepare_model_for_kbit_training casts norm weights up; the Llama norm then returns float32."""
    norm = HF_NORM[style](64, eps=1e-6)
    norm.weight.data.normal_()
    x = torch.randn(5, 64).bfloat16()
    y, _ = ops.add_shift_rms_norm(x, norm.weight, style=style)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, norm(x).bfloat16())


def test_the_sum_is_rounded_once_and_the_norm_is_of_the_rounded_sum() -> None:
    x, residual = torch.full((1, 4), 256.0).bfloat16(), torch.ones(1, 4).bfloat16()
    shift, index = torch.ones(1, 4), torch.zeros(1, dtype=torch.long)
    assert (x + residual + shift.bfloat16()).eq(256).all()  # rounding after each addition loses both ones
    _, h = ops.add_shift_rms_norm(x, torch.ones(4), residual, shift, index)
    assert h.eq(258).all()

    x, residual, shift = torch.randn(6, 64).bfloat16(), torch.randn(6, 64).bfloat16(), torch.randn(2, 64)
    index = torch.tensor([0, 1, 0, 1, 1, 0])
    weight = torch.randn(64).bfloat16()
    y, h = ops.add_shift_rms_norm(x, weight, residual, shift, index)
    assert torch.equal(h, (x.float() + residual.float() + shift[index]).bfloat16())
    assert torch.equal(y, ops.add_shift_rms_norm(h, weight)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_rows_of_id_minus_one_stay_bit_for_bit(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 8).to(dtype)
    x[0, 0, :4] = torch.tensor([-0.0, float("nan"), float("-inf"), 0.0]).to(dtype)
    x[0, 1, 0] = -torch.tensor(float("nan")).to(dtype)
    shift = torch.full((2, 8), 1000.0)
    for index in (torch.tensor([-1, 0, -1]), torch.tensor([[-1, -1, 0, 1], [-1] * 4, [0] * 4])):
        index = index.to(index_dtype)
        _, h = ops.add_shift_rms_norm(x, torch.ones(8), shift=shift, index=index)
        kept = (index < 0).reshape(index.shape + (1,) * (3 - index.ndim)).expand(x.shape)
        assert torch.equal(bits(h)[kept], bits(x)[kept])
        assert (h[~kept].float() > 900).all()
    everywhere = torch.tensor(-1, dtype=index_dtype)
    assert torch.equal(
        bits(ops.add_shift_rms_norm(x, torch.ones(8), shift=shift, index=everywhere)[1]), bits(x)
    )


def test_a_row_with_nan_does_not_touch_other_rows() -> None:
    x = torch.randn(3, 8)
    x[1] = float("nan")
    y, _ = ops.add_shift_rms_norm(x, torch.ones(8))
    assert torch.equal(y[[0, 2]], ops.add_shift_rms_norm(x[[0, 2]], torch.ones(8))[0])


def test_unshift_is_the_negated_table() -> None:
    x, shift, index = torch.randn(4, 3, 16), torch.randn(2, 16), torch.tensor([0, 1, -1, 0])
    _, there = ops.add_shift_rms_norm(x, torch.ones(16), shift=shift, index=index)
    _, back = ops.add_shift_rms_norm(there, torch.ones(16), shift=-shift, index=index)
    assert (there - x).abs().max() > 1
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)


def test_strides_do_not_matter() -> None:
    base, other = torch.randn(6, 5, 8), torch.randn(5, 6, 8)
    shift, index, weight = torch.randn(3, 16)[:, ::2], torch.randint(-1, 3, (6, 5)), torch.randn(16)[::2]
    for x in (base.transpose(0, 1), torch.randn(5, 6, 16)[..., ::2], torch.randn(1, 1, 8).expand(5, 6, 8)):
        inputs = (x, weight, other, shift, index.T)
        dense = tuple(v.contiguous() for v in inputs)
        for ours, expected in zip(
            ops.add_shift_rms_norm(*inputs), ops.add_shift_rms_norm(*dense), strict=True
        ):
            assert torch.equal(ours, expected)
            assert ours.is_contiguous()


@pytest.mark.parametrize("style", STYLES)
def test_gradients_for_every_subset_that_asks(style: str) -> None:
    values = [torch.randn(3, 4, 16), torch.randn(16), torch.randn(3, 4, 16), torch.randn(2, 16)]
    index = torch.tensor([1, -1, 1])
    grad_y, grad_h = torch.randn(3, 4, 16), torch.randn(3, 4, 16)
    before = grad_y.clone(), grad_h.clone()

    def gradients(
        function: Callable[..., Any], dtype: torch.dtype, asks: tuple[bool, ...], use: str
    ) -> list[Any]:
        leaves = [v.clone().to(dtype).requires_grad_(ask) for v, ask in zip(values, asks, strict=True)]
        y, h = function(leaves[0], leaves[1], leaves[2], leaves[3], index, style=style)
        pairs = [(y, grad_y)] * (use != "h") + [(h, grad_h)] * (use != "y")
        pairs = [(out, grad.to(dtype)) for out, grad in pairs if out.requires_grad]
        if not pairs:
            return [None] * 4
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return [leaf.grad for leaf in leaves]

    for asks in itertools.product([False, True], repeat=4):
        for use in ("y", "h", "both"):
            ours = gradients(ops.add_shift_rms_norm, torch.float32, asks, use)
            oracle = gradients(plain, torch.float64, asks, use)
            for mine, expected, ask in zip(ours, oracle, asks, strict=True):
                if not ask or expected is None:
                    assert mine is None or not mine.any()
                else:
                    torch.testing.assert_close(mine.double(), expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(grad_y, before[0])
    assert torch.equal(grad_h, before[1])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits(within_rule: Callable[..., None], style: str, dtype: torch.dtype) -> None:
    values = [torch.randn(6, 64), torch.randn(64), torch.randn(6, 64), torch.randn(2, 64)]
    index, upstream = torch.tensor([1, 0, 1, -1, 0, 1]), torch.randn(2, 6, 64)
    results = []
    for function, to in ((ops.add_shift_rms_norm, dtype), (plain, dtype), (plain, torch.float64)):
        # Every side starts from the values that 16 bits hold, so that only the computation differs.
        leaves = [v.clone().to(dtype).to(to).requires_grad_() for v in values]
        outputs = function(*leaves, index, style=style)
        torch.autograd.backward(outputs, [g.to(dtype).to(to) for g in upstream])
        results.append([leaf.grad for leaf in leaves])
    for ours, ordinary, oracle in zip(*results, strict=True):
        assert ours.dtype == dtype
        within_rule(ours, ordinary, oracle)


def test_shift_gradient_accumulates_in_float32() -> None:
    """4,096 tokens of gradient 1 in bfloat16 sum to 4,096; accumulated in bfloat16 they would stagnate at 256."""
    x = torch.randn(4096, 2).bfloat16()
    shift = torch.zeros(1, 2, requires_grad=True)
    _, h = ops.add_shift_rms_norm(x, torch.ones(2), shift=shift, index=torch.zeros(4096, dtype=torch.long))
    h.sum().backward()
    assert shift.grad is not None
    assert shift.grad.eq(4096).all()


@pytest.mark.parametrize("style", STYLES)
def test_gradcheck(style: str) -> None:
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(2, 3, 5), (5,), (2, 3, 5), (2, 5)]
    ]
    index = torch.tensor([[0, 1, -1], [1, 1, 0]])
    assert torch.autograd.gradcheck(lambda *v: ops.add_shift_rms_norm(*v, index, style=style), leaves)
    assert torch.autograd.gradcheck(lambda *v: ops.add_shift_rms_norm(*v, style=style), leaves[:2])


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(
        ops.add_shift_rms_norm(x, torch.ones(4))[0].sin().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


X, W = torch.ones(2, 3, 4), torch.ones(4)
IDS = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x: got list; wanted a torch.Tensor"),
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, TypeError, r"x: got dtype torch.int64; wanted float32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: got shape \(\); wanted \(..., d\)"),
        ({"weight": torch.ones(3)}, ValueError, r"weight: got shape \(3,\); wanted \(4,\)"),
        (
            {"weight": torch.ones(4, device="meta")},
            ValueError,
            r"weight: got a tensor on meta; wanted .* cpu",
        ),
        (
            {"residual": torch.ones(2, 3, 5)},
            ValueError,
            r"residual: got shape \(2, 3, 5\); wanted .*\(2, 3, 4\)",
        ),
        (
            {"residual": torch.ones(2, 3, 4).half()},
            TypeError,
            r"residual: got dtype torch.float16; wanted x's",
        ),
        ({"shift": torch.ones(2, 4)}, ValueError, r"index: got None together with shift"),
        ({"index": IDS}, ValueError, r"shift: got None together with index"),
        (
            {"shift": torch.ones(2, 5), "index": IDS},
            ValueError,
            r"shift: .*\(2, 5\); wanted \(languages, 4\)",
        ),
        (
            {"shift": torch.ones(2, 4), "index": IDS.float()},
            TypeError,
            r"index: .*float32; wanted int64",
        ),
        (
            {"shift": torch.ones(2, 4), "index": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"index: .*prefix",
        ),
        (
            {"shift": torch.ones(2, 4), "index": IDS + 2},
            ValueError,
            r"index: got language id 2; wanted 0 to 1",
        ),
        ({"shift": torch.ones(2, 4), "index": IDS - 2}, ValueError, r"index: got language id -2"),
        ({"eps": 0.0}, ValueError, r"eps: got 0.0; wanted a finite number > 0"),
        ({"eps": float("nan")}, ValueError, r"eps: got nan"),
        ({"style": "opt"}, ValueError, r"style: got 'opt'; wanted 'llama', 'gemma' or 'olmo'"),
        ({"impl": "fast"}, ValueError, r"impl: got 'fast'; wanted 'auto'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.add_shift_rms_norm(**{"x": X, "weight": W, **arguments})
