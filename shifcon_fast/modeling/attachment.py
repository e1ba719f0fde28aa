"""What an attached model shifts by, and the way of ``language_ids`` from its forward to the blocks."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shifcon_fast.modeling.routing import Routing
from shifcon_fast.modeling.spoken import NO_ROUTER, Spoken
from shifcon_fast.space.intervention import MapTables, ProjectionTables
from shifcon_fast.space.language_shift import LanguageShift

ATTACHMENT = "_shifcon"
"""Name of the attribute by which an attached model, its decoder and some blocks reach their :class:`Attachment`."""


class _Call(threading.local):
    """What belongs to the calls of one thread; several may run one model at a time.

    Attributes:
        suspended: no row is shifted while this is true.
        spoken: languages of rows without ids, inside of ``ShiftHandle.use``.
        routing: of the decoder's running forward, where its rows find their own language.
        detected: language ids and probabilities of the last such forward, (B,) each.
        pending: ids given to a model whose head does not pass them on to the decoder, during its forward.
        current: prepared ids of the decoder's running forward, for blocks that are not passed them.
    """

    def __init__(self) -> None:  # runs in every thread that looks
        self.suspended = False
        self.spoken: Spoken | None = None
        self.routing: Routing | None = None
        self.detected: tuple[Tensor, Tensor] | None = None
        self.pending: Tensor | None = None
        self.current: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy of the model is in no call


class InUse(NamedTuple):
    """A shift, its number among those of the model, and its first row in the tables."""

    number: int
    first: int
    shift: LanguageShift


@dataclass
class Attachment:
    """What the swapped modules of one attached model share. Nothing in it leads back to the model.

    Attributes:
        shifts: adapter → the shift it was trained with; None → a shift whatever the adapter.
        forwards_kwargs: whether the decoder passes unknown keyword arguments on (see ``Architecture``).
        adapted: a module that knows which adapters are active; None where the shift follows none.
        spoken: languages of rows without ids, in all threads.
        threshold: how likely a language that rows find themselves must be, for them to be shifted.
        call: the state of the running calls, each thread's its own.
        warned: why calls run unshifted, as far as it was said.
        make_handle: what users control the model by, of the model and this.
        handle: of the model; it holds the model, so only weakly.
    """

    shifts: dict[str | None, LanguageShift]
    forwards_kwargs: bool
    make_handle: Callable[[nn.Module, Attachment], Any]
    adapted: Any = None
    spoken: Spoken | None = None
    threshold: float = 0.9
    call: _Call = field(default_factory=_Call)
    warned: set[str] = field(default_factory=set)
    handle: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handle": None}  # a copy of the model gets a handle of its own

    def handle_of(self, model: nn.Module) -> Any:
        """The handle of the model that holds this; the same one for as long as somebody keeps it."""
        handle = self.handle() if self.handle is not None else None
        if handle is None:
            handle = self.make_handle(model, self)
            self.handle = weakref.ref(handle)
        return handle

    def in_use(self) -> InUse | None:
        """The shift of the active adapter; None where that has none.

        Raises:
            ValueError: several adapters with a shift are active.
        """
        first, found = 0, None
        for number, (adapter, shift) in enumerate(self.shifts.items()):
            if adapter is None or self._is_active(adapter):
                if found is not None:
                    raise ValueError(
                        f"model: the adapters {', '.join(map(repr, self.shifts))} are active and each has a shift "
                        "of its own; wanted one of them: call model.set_adapter(name)"
                    )
                found = InUse(number, first, shift)
            first += len(shift.languages)
        return found

    def _is_active(self, adapter: str) -> bool:
        adapted = self.adapted
        return adapted is None or (not adapted.disable_adapters and adapter in adapted.active_adapters)

    def tables(self) -> dict[int, Tensor]:
        """block → (sum of K, d) float32, what is added at its input: the tables of all shifts in a row."""
        parts = [shift.tables() for shift in self.shifts.values()]
        blocks = sorted({block for part in parts for block in part})
        nothing = [torch.zeros_like(next(iter(part.values()))) for part in parts]
        return {
            block: torch.cat([part.get(block, zero) for part, zero in zip(parts, nothing, strict=True)])
            for block in blocks
        }

    def maps(self) -> dict[int, MapTables | ProjectionTables]:
        """block → how its input is moved, where the shift is a map; then it is the only one of the model."""
        return {block: map_ for shift in self.shifts.values() for block, map_ in shift.maps().items()}

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No row is shifted in this thread's calls inside, and none is warned of."""
        before = self.call.suspended
        self.call.suspended = True
        try:
            yield
        finally:
            self.call.suspended = before

    @contextmanager
    def use(self, spoken: Spoken) -> Iterator[None]:
        """Rows without ids in this thread's calls inside are of these languages."""
        before = self.call.spoken
        self.call.spoken = spoken
        try:
            yield
        finally:
            self.call.spoken = before

    def route(
        self, language_ids: Tensor | None, tokens: Tensor | None, arguments: Mapping[str, Any]
    ) -> Routing | None:
        """How the rows of a forward find their own language; None where it is said, or nothing is shifted.

        Args:
            language_ids, tokens: as for :meth:`prepare`.
            arguments: the other ones of the decoder's forward.
        """
        call = self.call
        spoken = self.spoken if call.spoken is None else call.spoken
        if (
            language_ids is not None
            or call.suspended
            or tokens is None
            or spoken is None
            or not spoken.is_auto
        ):
            return None
        found = self.in_use()
        if found is None or found.shift.alpha == 0:
            return None
        if found.shift.router is None:
            raise ValueError(NO_ROUTER)
        return Routing(found.shift, found.first, self.threshold, tokens, arguments)

    def prepare(self, language_ids: Tensor | None, tokens: Tensor | None) -> Tensor | None:
        """The rows of the tables for a batch: check ids, or make them, and map the pivot's to -1.

        Args:
            language_ids: (B,) integers, one per row, or (B, T), one per token (packed rows hold several languages);
                -1 leaves a row or token alone. None takes what is ``spoken``, in this thread or else in all; where
                nothing is, nothing is shifted, which is warned of once.
            tokens: the input, (B, T) ids or (B, T, d) embeddings.

        Returns:
            int64 on the device of the input, shaped like ``language_ids``; None when nothing is to be shifted.

        Raises:
            TypeError: not a tensor of integers. ValueError: another shape, or an id out of range (checked on the
            CPU; on an accelerator it would cost a synchronisation).
        """
        if self.call.suspended:
            return None
        found = self.in_use()
        if found is None:
            self._warn_of_an_adapter_without_a_shift()
            return None
        shift = found.shift
        if language_ids is None:
            spoken = self.spoken if self.call.spoken is None else self.call.spoken
            if spoken is None:
                self._warn_unshifted(shift)
                return None
            if tokens is None:
                return None
            language_ids = spoken.rows(found.number, shift, tokens.shape[0])
        else:
            _check(language_ids, tokens, len(shift.languages))
        if language_ids is None or shift.alpha == 0:
            return None
        ids = language_ids.to(device=None if tokens is None else tokens.device, dtype=torch.long)
        still = ids < 0 if shift.moves_pivot else (ids < 0) | (ids == shift.pivot_id)
        return torch.where(still, -1, ids + found.first)

    def _warn_unshifted(self, shift: LanguageShift) -> None:
        if not shift.alpha:
            return
        self._warn(
            "An attached model was called without a language: it runs unshifted. Set "
            'model.shifcon.language = "sw", or call it inside of model.shifcon.use("sw"), or pass '
            "language_ids=model.shifcon.language_ids([...]), one language code per row; or say that this is meant: "
            "with model.shifcon.suspended(). (Said once per model.)"
        )

    def _warn_of_an_adapter_without_a_shift(self) -> None:
        if self.adapted.disable_adapters:  # which is the base model, as it was asked for
            return
        active = ", ".join(map(repr, self.adapted.active_adapters))
        self._warn(
            f"The model runs unshifted: its active adapter {active} has no shift of its own, only "
            f"{', '.join(map(repr, self.shifts))} has. Give it one with model.shifcon.add_shift(shift, adapter). "
            "(Said once per adapter.)"
        )

    def _warn(self, message: str) -> None:
        # Not while torch.compile traces, which breaks the graph at a warning.
        if torch.compiler.is_compiling() or message in self.warned:
            return
        self.warned.add(message)
        warnings.warn(message, stacklevel=3)


def _check(language_ids: Tensor, tokens: Tensor | None, count: int) -> None:
    if not isinstance(language_ids, Tensor):
        raise TypeError(
            f"language_ids: got {type(language_ids).__name__}, wanted an integer tensor, one id per row; "
            "make one from language codes with handle.language_ids([...])."
        )
    if language_ids.is_floating_point() or language_ids.is_complex() or language_ids.dtype == torch.bool:
        raise TypeError(f"language_ids: got dtype {language_ids.dtype}, wanted integers (torch.long).")
    shape, dims = tuple(language_ids.shape), language_ids.dim()
    if dims not in (1, 2) or (tokens is not None and shape != tuple(tokens.shape[:dims])):
        here = "" if tokens is None else f": {(tokens.shape[0],)} or {tuple(tokens.shape[:2])}"
        raise ValueError(
            f"language_ids: got shape {shape}, wanted one id per row, (batch,), or per token, (batch, tokens)"
            f"{here}."
        )
    if language_ids.device.type == "cpu" and language_ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(language_ids))
        if low < -1 or high >= count:
            raise ValueError(
                f"language_ids: got an id of {low if low < -1 else high}, wanted 0 … {count - 1}, or -1 to leave a "
                "row alone."
            )


def unshifted(model: nn.Module) -> AbstractContextManager[None]:
    """This thread's calls inside are meant to be unshifted; nothing for a model that is not attached.

    Args:
        model: any model, in whatever wrappers.
    """
    found = (module.__dict__.get(ATTACHMENT) for module in model.modules())
    attachment: Attachment | None = next((each for each in found if each is not None), None)
    return nullcontext() if attachment is None else attachment.suspended()
