"""Which backend runs an operator, why not a faster one, and how often each one ran.

A *backend* supplies a forward and a backward function for one operator, plus a function that says why it cannot run
on a device and dtype (``None`` when it can). What else there is to an operator, its schema, checks, fake
implementation and gradients, is described once, above this seam; see ``docs/operators.md`` for what a backend may
assume.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch

IMPLS = frozenset({"auto", "reference", "native", "triton"})
OPERATORS = (
    "add_shift_rms_norm",
    "masked_mean_pool",
    "info_nce",
    "contrastive_similarity",
    "subspace_project",
)

# What impl="auto" tries, fastest first; "reference" ends every list.
_PREFERENCE = {"cpu": ("native",), "cuda": ("triton",)}
_PREFERENCE_OF_OPERATOR = {("subspace_project", "cuda"): ("native",)}

_NOT_REGISTERED = {
    "native": "this installation has no compiled extension for it",
    "triton": "this installation has no Triton kernel for it",
}

Unavailable = Callable[[torch.device, torch.dtype], "str | None"]


class SlowBackendWarning(UserWarning):
    """``impl="auto"`` settled for the reference backend because no faster one can run here."""


@dataclass(frozen=True)
class Backend:
    """One operator's implementation; ``unavailable(device, dtype)`` gives the reason it cannot run, or ``None``.

    A backend that ``checks_arguments`` raises, whatever it is given on the CPU, before it touches memory.
    """

    operator: str
    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    unavailable: Unavailable
    checks_arguments: bool = False


@dataclass(frozen=True)
class BackendReport:
    """What ``impl="auto"`` picks for an operator on a device, and why each other backend is not the choice."""

    operator: str
    device: str
    chosen: str
    reasons: dict[str, str]


_backends: dict[tuple[str, str], Backend] = {}
_calls: Counter[tuple[str, str]] = Counter()
_calls_lock = threading.Lock()
_warned = False


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def register_backend(
    operator: str,
    name: str,
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    unavailable: Unavailable = _always,
    checks_arguments: bool = False,
    calls_torch: bool = True,
) -> None:
    """Add (or replace) the backend ``name`` of ``operator``.

    Args:
        operator: one of :data:`OPERATORS`.
        name: "reference", "native" or "triton".
        forward, backward: take and return what the reference backend's functions of the same operator do.
        unavailable: ``(device, dtype) -> reason | None``; constant within a process, its answers are cached.
        checks_arguments: its forward raises on any argument that the operator refuses (shapes, dtypes, devices,
            language ids, numbers) before it touches memory, if the first is a CPU tensor. Calls on plain CPU
            tensors then skip the operator's own checks, which make the message after a failure.
        calls_torch: its functions use PyTorch operators, which must be kept from autocast.

    Raises:
        ValueError: unknown operator or backend name.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: got {operator!r}; wanted one of {', '.join(OPERATORS)}")
    if name not in IMPLS - {"auto"}:
        raise ValueError(f"name: got {name!r}; wanted 'reference', 'native' or 'triton'")
    if calls_torch:
        forward, backward = _kept_from_autocast(forward), _kept_from_autocast(backward)
    _backends[operator, name] = Backend(operator, name, forward, backward, unavailable, checks_arguments)
    select.cache_clear()


def _preference(operator: str, device_type: str) -> tuple[str, ...]:
    faster = _PREFERENCE_OF_OPERATOR.get((operator, device_type), _PREFERENCE.get(device_type, ()))
    return (*faster, "reference")


def _reason(operator: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``name`` cannot run ``operator`` there, or ``None`` if it can."""
    backend = _backends.get((operator, name))
    return _NOT_REGISTERED[name] if backend is None else backend.unavailable(device, dtype)


@cache
def select(operator: str, impl: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that runs ``operator`` for ``impl`` on tensors of this device and dtype.

    Raises:
        ValueError: ``impl`` names a backend that cannot run them; there is no silent fallback.
    """
    if impl != "auto":
        reason = _reason(operator, impl, device, dtype)
        if reason is not None:
            raise ValueError(
                f"impl: got {impl!r}, which cannot run {operator} on {device} tensors of {dtype}: {reason}; "
                "wanted 'auto', 'reference' or a backend that `shifcon doctor` lists as usable here"
            )
        return _backends[operator, impl]
    preference = _preference(operator, device.type)
    for name in preference:
        if _reason(operator, name, device, dtype) is None:
            if name != preference[0]:
                _warn_slow(operator, preference[0], device, dtype)
            return _backends[operator, name]
    raise AssertionError(f"{operator} has no reference backend")  # pragma: no cover - registered on import


def _warn_slow(operator: str, wanted: str, device: torch.device, dtype: torch.dtype) -> None:
    """Say once per process that a slower backend runs; float64 is for checking numbers, not for speed."""
    global _warned  # noqa: PLW0603 - "once per process" is process state
    if _warned or dtype == torch.float64:
        return
    _warned = True
    warnings.warn(
        f"{operator} runs its reference backend (plain PyTorch, slower) on {device.type}: {wanted}: "
        f"{_reason(operator, wanted, device, dtype)}. `shifcon doctor` lists every operator; this is said once.",
        SlowBackendWarning,
        stacklevel=2,
    )


def _kept_from_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator says itself in which precision it computes; autocast would form its products in bfloat16."""

    @wraps(function)
    def kept(*args: Any) -> Any:
        device = next(value.device.type for value in args if isinstance(value, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return kept


def run(backend: Backend, args: tuple[Any, ...]) -> Any:
    """Run and count the forward of a selected backend."""
    with _calls_lock:
        _calls[backend.operator, backend.name] += 1
    return backend.forward(*args)


def run_backward(backend: Backend, args: tuple[Any, ...]) -> Any:
    """Run and count the backward of a selected backend."""
    with _calls_lock:
        _calls[f"{backend.operator}_backward", backend.name] += 1
    return backend.backward(*args)


def in_place(gradients: Sequence[torch.Tensor], needed: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
    """Gradients, of which only those needed are there, with ``None`` in the place of each other one."""
    found: list[torch.Tensor | None] = []
    at = 0
    for each in needed:
        found.append(gradients[at] if each else None)
        at += each
    return tuple(found)


def call_counts() -> dict[tuple[str, str], int]:
    """Calls so far as {(operator, backend): count}; a backward counts under ``"<operator>_backward"``.

    Counted where the backend runs, so calls from a compiled graph count as well.
    """
    with _calls_lock:
        return dict(_calls)


def reset_call_counts() -> None:
    """Start :func:`call_counts` again from nothing."""
    with _calls_lock:
        _calls.clear()


def backend_report(dtype: torch.dtype = torch.bfloat16) -> list[BackendReport]:
    """Per operator and device of this machine: what ``impl="auto"`` runs for ``dtype``, and why not the others."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    reports = []
    for operator in OPERATORS:
        for device in devices:
            preference = _preference(operator, device.type)
            usable = {
                name: _reason(operator, name, device, dtype) for name in ("native", "triton", "reference")
            }
            chosen = next(name for name in preference if usable[name] is None)
            reasons = {
                name: reason or f"{chosen} is preferred on {device.type}"
                for name, reason in usable.items()
                if name != chosen
            }
            reports.append(BackendReport(operator, str(device), chosen, reasons))
    return reports
