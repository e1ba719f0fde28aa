"""The ``shifcon_fast`` operator library: what PyTorch wants registered of an operator follows from a description.

A description (:func:`define`) is the public function, whose parameters are the schema's, and a few functions that
say what else is known of the operator; each names the parameters that it looks at, and no others.

``Library.define`` + ``impl`` rather than ``@custom_op``, which costs several microseconds a call. What is left of
the dispatcher's cost, about 15 µs a differentiable call and so several times a small kernel, is paid only by those
who need the dispatcher: ``torch.compile``, dispatch modes, tensor subclasses, functorch. Plain eager tensors go to
the same kernel and the same gradient formula directly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shifcon_fast.ops.registry import IMPLS, Backend, in_place, run, run_backward, select
from shifcon_fast.ops.validation import check_impl, check_index_range

NAMESPACE = "shifcon_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Backward = Callable[["str | Backend", tuple[Any, ...]], Sequence[Tensor | None]]

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), float, int, bool, str, torch.dtype})


@dataclass(frozen=True)
class Gradients:
    """What the backward of an operator takes and returns; backends compute it. It is not differentiable again.

    Args:
        of: the gradients that it returns, in order → the parameters of the operator whose gradient each is; several
            where they are the terms of a sum.
        fake: the backward's description. Its parameters are its schema's: the gradients of the first outputs,
            ``grad`` or ``grad_<output>``; then what else it needs, tensors first. Those called as a parameter or an
            output of the operator are that. It returns an empty tensor for each gradient, needed or not. (Where
            there are several, backends are told which are needed, by a bool ``need_<gradient>`` for each.)
        like: the parameter of ``fake`` whose device and dtype choose the backend, as the operator's first parameter
            does in the forward. A parameter ``dtype`` takes the place of its dtype.
        derived: parameters of ``fake`` that are something else → what makes them, of some parameters and outputs.
        through: a gradient → the only output that it comes through.
    """

    of: Mapping[str, tuple[str, ...]]
    fake: Callable[..., Any]
    like: str
    derived: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    through: Mapping[str, str] = field(default_factory=dict)


def define(
    function: Callable[..., Any],
    *,
    outputs: tuple[str, ...],
    fake: Callable[..., Any],
    gradients: Gradients,
    check: Callable[..., None] | None = None,
    language_ids: Mapping[str, str] | None = None,
) -> Callable[..., Any]:
    """Register an operator and its backward. Returns what calls it, with positional arguments.

    Args:
        function: the public function. Its name is the operator's; its parameters, the last of which is ``impl``,
            are the schema's.
        outputs: names of the results, which are tensors. Any but the first may be absent: where a backend returns
            ``None`` the operator returns an empty tensor of shape (0,), because it may not return its input.
        fake: some parameters → empty results, contiguous.
        gradients: of the first outputs; the others are not differentiable.
        check: some parameters → raises where they do not fit. ``None``: the function has checked them.
        language_ids: parameters that hold language ids → the table whose rows they are. Their range is checked
            where the operator runs, so in compiled graphs as well.

    Plain eager calls of a backend that checks its arguments skip these checks; after a failure they word the error.
    """
    name = function.__name__
    names = list(inspect.signature(function).parameters)
    make_fake = _by_name(fake, names)
    check_some = None if check is None else _by_name(check, names)
    check_ids = _check_of_ids(names, language_ids or {})

    def run_on(backend: Backend, args: tuple[Any, ...]) -> Any:
        if language_ids and not backend.checks_arguments:
            check_ids(args)
        try:
            found = run(backend, args[:-1])
        except RuntimeError:
            check_ids(args)
            raise
        if type(found) is tuple:
            for output in found:
                if output is None:
                    return tuple(args[0].new_empty(0) if each is None else each for each in found)
        return found

    def kernel(*args: Any) -> Any:
        return run_on(select(name, args[-1], args[0].device, args[0].dtype), args)

    returns = ", ".join(f"Tensor {output}" for output in outputs)
    overload = _register(
        f"{name}({_parameters(function)}) -> {'Tensor' if len(outputs) == 1 else f'({returns})'}",
        kernel,
        lambda *args: make_fake(args),
    )
    setup_context, formula = _formula(names, outputs, gradients, _define_backward(name, gradients))
    torch.library.register_autograd(f"{NAMESPACE}::{name}", formula, setup_context=setup_context, lib=LIBRARY)
    recorded = _eager_function(name, run_on, formula, setup_context)

    def checked(args: tuple[Any, ...]) -> None:
        if check_some is not None:
            check_impl(args[-1])
            check_some(args)

    def call(*args: Any) -> Any:
        if not _is_plain_eager(args):
            checked(args)
            return overload(*args)
        like, impl = args[0], args[-1]
        if check_some is not None and not (
            isinstance(like, Tensor) and like.is_floating_point() and impl in IMPLS
        ):
            checked(args)  # raises; select would warn of a slow backend first where the dtype is refused
        backend = select(name, impl, like.device, like.dtype)
        records = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if check_some is None or not (backend.checks_arguments and like.is_cpu):
            checked(args)
            return recorded(*args[:-1], backend) if records else run_on(backend, args)
        try:
            return recorded(*args[:-1], backend) if records else run(backend, args[:-1])
        except Exception:
            checked(args)
            check_ids(args)
            raise

    return call


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an operator computes in: float32, or float64 for float64 inputs (so that gradcheck works)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_plain_eager(args: tuple[Any, ...]) -> bool:
    """Nobody watches the dispatcher: not compiling, no modes, no transforms, no tensor subclasses."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and _PLAIN.issuperset(map(type, args))
    )


def _parameters(function: Callable[..., Any]) -> str:
    """The parameters of a function in PyTorch's schema language, without their defaults.

    With defaults in the schema the dispatcher would leave out arguments that are equal to them.
    """
    signature = inspect.signature(function, eval_str=True)
    parameters = [p.replace(default=inspect.Parameter.empty) for p in signature.parameters.values()]

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=None
    )
    return torch.library.infer_schema(prototype, mutates_args=()).removeprefix("(").removesuffix(") -> ()")


def _register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _by_name(function: Callable[..., Any], names: Sequence[str]) -> Callable[[tuple[Any, ...]], Any]:
    """``function``, called with those of the arguments called ``names`` that its parameters name."""
    at = [names.index(parameter) for parameter in inspect.signature(function).parameters]
    first = len(at)
    if at == list(range(first)):
        return lambda args: function(*args[:first])
    return lambda args: function(*[args[i] for i in at])


def _pick(places: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """The values at some places, as a tuple."""
    return itemgetter(*places) if len(places) > 1 else lambda values: tuple(values[i] for i in places)


def _check_of_ids(names: Sequence[str], language_ids: Mapping[str, str]) -> Callable[[tuple[Any, ...]], None]:
    places = [(ids, names.index(ids), names.index(table)) for ids, table in language_ids.items()]

    def check_ids(args: tuple[Any, ...]) -> None:
        for ids, at, table in places:
            if args[at] is not None and args[table] is not None:
                check_index_range(ids, args[at], args[table].shape[0])

    return check_ids


def _define_backward(name: str, gradients: Gradients) -> Backward:
    """Register ``<name>_backward``.

    What is returned takes the backend that ran the forward, or the operator's ``impl`` where the dispatcher ran it,
    and the arguments of the backward; it gives the gradients, and ``None`` for each that is not needed.
    """
    values = list(inspect.signature(gradients.fake).parameters)
    like, count, alone = values.index(gradients.like), len(values), len(gradients.of) == 1
    dtype_at = values.index("dtype") if "dtype" in values else None

    def kernel(*args: Any) -> Any:
        of = args[like]
        dtype = of.dtype if dtype_at is None else args[dtype_at]
        found = run_backward(select(name, args[-1], of.device, dtype), args[:-1])
        return found if alone else [gradient for gradient in found if gradient is not None]

    def fake(*args: Any) -> Any:
        found = gradients.fake(*args[:count])
        return found if alone else list(compress(found, args[count:-1]))

    needs = "" if alone else "".join(f", bool need_{gradient}" for gradient in gradients.of)
    returns = "Tensor" if alone else "Tensor[]"
    overload = _register(
        f"{name}_backward({_parameters(gradients.fake)}{needs}, str impl) -> {returns}", kernel, fake
    )

    def call(impl: str | Backend, args: tuple[Any, ...]) -> Sequence[Tensor | None]:
        if type(impl) is Backend:
            if _is_plain_eager(args):
                found = run_backward(impl, args)
                return (found,) if alone else found
            impl = impl.name
        found = overload(*args, impl)
        return (found,) if alone else in_place(found, args[count:])

    return call


def _formula(
    names: list[str], outputs: tuple[str, ...], gradients: Gradients, backward: Backward
) -> tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]]]:
    """``setup_context`` and ``backward`` as :func:`torch.library.register_autograd` wants them."""
    values = inspect.signature(gradients.fake, eval_str=True).parameters
    upper = [value for value in values if value.startswith("grad")]
    differentiable = len(upper)
    tensors = sum(value.annotation in (Tensor, Tensor | None) for value in values.values()) - differentiable
    known = [*names, *outputs]
    derived = [_by_name(made, known) for made in gradients.derived.values()]
    at = {value: number for number, value in enumerate([*known, *gradients.derived])}
    kept = [at[value] for value in list(values)[differentiable:]]
    tensors_of, options_of = _pick(kept[:tensors]), _pick(kept[tensors:])
    pairs = [(names.index(each), number) for number, of in enumerate(gradients.of.values()) for each in of]
    through = [
        (list(gradients.of).index(gradient), upper.index(f"grad_{output}"))
        for gradient, output in gradients.through.items()
    ]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        found = output if type(output) is tuple else (output,)
        everything = inputs + found
        for made in derived:
            everything += (made(everything),)
        ctx.save_for_backward(*tensors_of(everything))
        ctx.options, ctx.impl = options_of(everything), inputs[-1]
        constant = found[differentiable:]
        if differentiable > 1:
            constant += tuple(output for output in found[1:differentiable] if output.shape == (0,))  # absent
        if constant:
            ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)

    def formula(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * len(names)
        given = of_outputs[:differentiable]
        for grad in given:
            if grad is not None:
                break
        else:
            return tuple(result)
        asked, needs = ctx.needs_input_grad, [False] * len(gradients.of)
        for parameter, gradient in pairs:
            if asked[parameter]:
                needs[gradient] = True
        for gradient, output in through:
            if given[output] is None:
                needs[gradient] = False
        told = needs if len(needs) > 1 else ()
        # Saved tensors once: under checkpointing a second look recomputes, and is refused.
        found = backward(ctx.impl, (*given, *ctx.saved_tensors, *ctx.options, *told))
        for parameter, gradient in pairs:
            if asked[parameter]:
                result[parameter] = found[gradient]  # autograd itself casts it to the parameter's dtype
        return tuple(result)

    return setup_context, formula


def _eager_function(
    name: str, run_on: Callable[..., Any], formula: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """The operator as autograd records it without the dispatcher; a backend stands in the place of ``impl``."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = run_on(args[-1], args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            return formula(ctx, *gradients)

    Eager.__name__ = Eager.__qualname__ = name  # what autograd graphs and profilers show
    return Eager.apply
