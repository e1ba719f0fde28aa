"""What an attached model shifts by, and the way of ``language_ids`` from its forward to the blocks."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shifcon_fast.data.languages import find_language
from shifcon_fast.modeling.routing import AUTO, Routing
from shifcon_fast.space.language_shift import LanguageShift

ATTACHMENT = "_shifcon"
"""Name of the attribute by which an attached model, its decoder and some blocks reach their :class:`Attachment`."""

NO_ROUTER = (
    'language: got "auto"; the shift has no router, which is estimated with the subspaces of a stable space: '
    "profile again without subspaces=False, or say the language"
)

Languages = str | tuple[str, ...]
"""One code for every row of a batch, or one code a row, or ``"auto"``: rows find their own."""


class _Call(threading.local):
    """What belongs to the calls of one thread; several may run one model at a time.

    Attributes:
        suspended: no row is shifted while this is true.
        languages: of rows without ids, inside of ``ShiftHandle.use``.
        routing: of the decoder's running forward, where its rows find their own language.
        detected: language ids and probabilities of the last such forward, (B,) each.
        pending: ids given to a model whose head does not pass them on to the decoder, during its forward.
        current: prepared ids of the decoder's running forward, for blocks that are not passed them.
    """

    def __init__(self) -> None:  # runs in every thread that looks
        self.suspended = False
        self.languages: Languages | None = None
        self.routing: Routing | None = None
        self.detected: tuple[Tensor, Tensor] | None = None
        self.pending: Tensor | None = None
        self.current: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy of the model is in no call


@dataclass
class Attachment:
    """What the swapped modules of one attached model share. Nothing in it leads back to the model.

    Attributes:
        shifts: adapter → the shift it was trained with; None → a shift whatever the adapter.
        forwards_kwargs: whether the decoder passes unknown keyword arguments on (see ``Architecture``).
        adapted: a module that knows which adapters are active; None where the shift follows none.
        languages: of rows without ids, in all threads.
        threshold: how likely a language that rows find themselves must be, for them to be shifted.
        call: the state of the running calls, each thread's its own.
        warned: whether it was said that a call without ids runs unshifted.
        make_handle: what users control the model by, of the model and this.
        handle: of the model; it holds the model, so only weakly.
    """

    shifts: dict[str | None, LanguageShift]
    forwards_kwargs: bool
    make_handle: Callable[[nn.Module, Attachment], Any]
    adapted: Any = None
    languages: Languages | None = None
    threshold: float = 0.9
    call: _Call = field(default_factory=_Call)
    warned: bool = False
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

    def in_use(self) -> tuple[int, LanguageShift] | None:
        """The shift of the active adapter with its first row in the tables; None where that adapter has none.

        Raises:
            ValueError: several adapters with a shift are active.
        """
        first, found = 0, None
        for adapter, shift in self.shifts.items():
            if adapter is None or self._is_active(adapter):
                if found is not None:
                    raise ValueError(
                        f"model: the adapters {', '.join(map(repr, self.shifts))} are active and each has a shift "
                        "of its own; wanted one of them: call model.set_adapter(name)"
                    )
                found = first, shift
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
    def use(self, languages: Languages) -> Iterator[None]:
        """Rows without ids in this thread's calls inside are of these languages."""
        before = self.call.languages
        self.call.languages = languages
        try:
            yield
        finally:
            self.call.languages = before

    def route(
        self, language_ids: Tensor | None, tokens: Tensor | None, arguments: Mapping[str, Any]
    ) -> Routing | None:
        """How the rows of a forward find their own language; None where it is said, or nothing is shifted.

        Args:
            language_ids, tokens: as for :meth:`prepare`.
            arguments: the other ones of the decoder's forward.
        """
        call = self.call
        languages = self.languages if call.languages is None else call.languages
        if languages != AUTO or language_ids is not None or call.suspended or tokens is None:
            return None
        found = self.in_use()
        if found is None or found[1].alpha == 0:
            return None
        first, shift = found
        if shift.router is None:
            raise ValueError(NO_ROUTER)
        return Routing(shift, first, self.threshold, tokens, arguments)

    def prepare(self, language_ids: Tensor | None, tokens: Tensor | None) -> Tensor | None:
        """The rows of the tables for a batch: check ids, or make them, and map the pivot's to -1.

        Args:
            language_ids: (B,) integers, one per row, or (B, T), one per token (packed rows hold several languages);
                -1 leaves a row or token alone. None takes the languages of
                ``use`` or else ``languages``; without any, nothing is shifted, which is warned of once.
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
            return None
        first, shift = found
        if language_ids is None:
            languages = self.languages if self.call.languages is None else self.call.languages
            if languages is None:
                self._warn_unshifted(shift)
                return None
            return None if tokens is None else _rows_of(languages, first, shift, tokens)
        _check(language_ids, tokens, len(shift.languages))
        if shift.alpha == 0:
            return None
        ids = language_ids.to(device=None if tokens is None else tokens.device, dtype=torch.long)
        pivot = shift.pivot_id
        return torch.where((ids < 0) | (ids == pivot), -1, ids + first)

    def _warn_unshifted(self, shift: LanguageShift) -> None:
        # Not while torch.compile traces, which breaks the graph at a warning.
        if torch.compiler.is_compiling() or self.warned or not shift.alpha:
            return
        self.warned = True
        warnings.warn(
            "An attached model was called without a language: it runs unshifted. Set "
            'model.shifcon.language = "sw", or call it inside of model.shifcon.use("sw"), or pass '
            "language_ids=model.shifcon.language_ids([...]), one language code per row; or say that this is meant: "
            "with model.shifcon.suspended(). (Said once per model.)",
            stacklevel=2,
        )


def _rows_of(languages: Languages, first: int, shift: LanguageShift, tokens: Tensor) -> Tensor | None:
    codes = [languages] if isinstance(languages, str) else languages
    pivot = shift.pivot_id
    ids = [-1 if position == pivot else first + position for position in map(shift.language_id, codes)]
    if shift.alpha == 0 or max(ids) < 0:
        return None
    batch = tokens.shape[0]
    if isinstance(languages, str):
        return torch.full((batch,), ids[0], dtype=torch.long, device=tokens.device)
    if batch % len(ids):
        raise ValueError(
            f"language: {len(ids)} are in use for a batch of {batch} rows; wanted one per row (times the beams or "
            "num_return_sequences of generate), or a single one for all"
        )
    return torch.tensor(ids, dtype=torch.long, device=tokens.device).repeat_interleave(batch // len(ids))


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


def checked_languages(languages: str | Sequence[str], shifts: Sequence[LanguageShift]) -> Languages:
    """``languages`` as an :class:`Attachment` holds them: each as the first shift that knows it spells it.

    Raises:
        ValueError: a code that no shift knows, or none at all.
    """
    if languages == AUTO:
        if not any(shift.router is not None for shift in shifts):
            raise ValueError(NO_ROUTER)
        return AUTO
    if isinstance(languages, str):
        for shift in shifts[:-1]:
            if find_language(languages, shift.languages) is not None:
                return shift.languages[shift.language_id(languages)]
        return shifts[-1].languages[shifts[-1].language_id(languages)]
    codes = tuple(str(checked_languages(code, shifts)) for code in languages)
    if AUTO in codes:
        raise ValueError(f"language: got {list(codes)}; wanted {AUTO!r} alone, which finds each row's own")
    if not codes:
        raise ValueError("language: got none; wanted a language code, or one per row")
    return codes


def unshifted(model: nn.Module) -> AbstractContextManager[None]:
    """This thread's calls inside are meant to be unshifted; nothing for a model that is not attached.

    Args:
        model: any model, in whatever wrappers.
    """
    found = (module.__dict__.get(ATTACHMENT) for module in model.modules())
    attachment: Attachment | None = next((each for each in found if each is not None), None)
    return nullcontext() if attachment is None else attachment.suspended()
