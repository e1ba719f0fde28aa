"""What is registered of an operator follows from its description: schemas, and functions that agree with them."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
import torch

from shifcon_fast import ops
from shifcon_fast.ops import registry

SCHEMAS = {
    "add_shift_rms_norm": (
        "(Tensor x, Tensor weight, Tensor? residual, Tensor? shift, Tensor? index, float eps, str style, str impl) "
        "-> (Tensor y, Tensor h, Tensor rstd)",
        "(Tensor? grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor rstd, Tensor? index, SymInt languages, "
        "str style, bool need_input, bool need_weight, bool need_shift, str impl) -> Tensor[]",
    ),
    "masked_mean_pool": (
        "(Tensor h, Tensor mask, bool normalize, str impl) -> (Tensor pooled, Tensor factor)",
        "(Tensor grad, Tensor pooled, Tensor factor, Tensor mask, ScalarType dtype, bool normalize, str impl) "
        "-> Tensor",
    ),
    "info_nce": (
        "(Tensor a, Tensor b, float scale, bool normalize, bool recenter, str impl) "
        "-> (Tensor loss, Tensor row_parts, Tensor column_parts)",
        "(Tensor grad, Tensor a, Tensor b, Tensor row_parts, Tensor column_parts, float scale, bool normalize, "
        "bool recenter, bool need_a, bool need_b, str impl) -> Tensor[]",
    ),
    "contrastive_similarity": (
        "(Tensor a, Tensor b, float scale, bool normalize, bool recenter, str impl) -> Tensor",
        "(Tensor grad, Tensor a, Tensor b, float scale, bool normalize, bool recenter, bool need_a, bool need_b, "
        "str impl) -> Tensor[]",
    ),
    "subspace_project": (
        "(Tensor x, Tensor mean, Tensor basis, Tensor source, Tensor? target, str impl) -> Tensor",
        "(Tensor grad, Tensor? x, Tensor mean, Tensor basis, Tensor source, Tensor? target, bool need_x, "
        "bool need_mean, bool need_basis, str impl) -> Tensor[]",
    ),
}
REFERENCES = {
    "add_shift_rms_norm": "norm",
    "masked_mean_pool": "pooling",
    "info_nce": "contrastive_loss",
    "contrastive_similarity": "similarity",
    "subspace_project": "projection",
}


@pytest.mark.parametrize("operator", registry.OPERATORS)
def test_the_schemas_that_exported_programs_hold(operator: str) -> None:
    """A saved program names operators and their arguments: a schema that changes cannot be read back."""
    for name, schema in zip((operator, f"{operator}_backward"), SCHEMAS[operator], strict=True):
        registered = str(getattr(torch.ops.shifcon_fast, name).default._schema)
        assert registered == f"shifcon_fast::{name}{schema}"


@pytest.mark.parametrize("operator", registry.OPERATORS)
def test_kernels_take_what_the_schema_says(operator: str) -> None:
    modules = [import_module(f"shifcon_fast.ops.reference.{REFERENCES[operator]}")]
    if operator != "subspace_project":
        pytest.importorskip("triton", reason="the Triton kernels cannot be imported without triton")
        modules.append(import_module(f"shifcon_fast.kernels.{operator}"))
    for name, direction in ((operator, "forward"), (f"{operator}_backward", "backward")):
        schema = getattr(torch.ops.shifcon_fast, name).default._schema
        wanted = [argument.name for argument in schema.arguments][:-1]  # without impl
        reference, *others = [list(inspect.signature(getattr(m, direction)).parameters) for m in modules]
        assert reference == wanted
        assert all(len(other) == len(wanted) for other in others)


def test_the_public_signature_is_the_schema() -> None:
    for operator in registry.OPERATORS:
        schema = getattr(torch.ops.shifcon_fast, operator).default._schema
        parameters = inspect.signature(getattr(ops, operator)).parameters
        assert list(parameters) == [argument.name for argument in schema.arguments]


def test_a_gradient_that_comes_through_one_output_alone() -> None:
    """The weight's comes through y, so a loss of h has none, whatever the weight asks for."""
    x, residual, weight = (torch.randn(shape, requires_grad=True) for shape in ((2, 4), (2, 4), (4,)))
    ops.add_shift_rms_norm(x, weight, residual)[1].sum().backward()
    assert weight.grad is None
    assert torch.equal(x.grad, torch.ones(2, 4))
    assert torch.equal(residual.grad, torch.ones(2, 4))
