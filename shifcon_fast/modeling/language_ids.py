"""The ``language_ids`` argument on its way from the model's forward to the blocks."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ATTACHMENT = "_shifcon"
"""Name of the attribute by which an attached model, its decoder and some blocks reach their :class:`Attachment`."""


class _Call(threading.local):
    """What belongs to the calls of one thread; several may run one model at a time.

    Attributes:
        suspended: no row is shifted while this is true.
        pending: ids given to a model whose head does not pass them on to the decoder, during its forward.
        current: prepared ids of the decoder's running forward, for blocks that are not passed them.
    """

    def __init__(self) -> None:  # runs in every thread that looks
        self.suspended = False
        self.pending: Tensor | None = None
        self.current: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy of the model is in no call


@dataclass
class Attachment:
    """What the swapped modules of one attached model share.

    Attributes:
        num_languages: K, the rows of a shift table; valid ids are -1 … K-1.
        pivot_id: the id whose rows are left alone.
        forwards_kwargs: whether the decoder passes unknown keyword arguments on (see ``Architecture``).
        shifts: whether ids make a difference (alpha is not 0).
        call: the state of the running calls, each thread's its own.
        warned: whether it was said that a call without ids runs unshifted.
    """

    num_languages: int
    pivot_id: int
    forwards_kwargs: bool
    shifts: bool = True
    call: _Call = field(default_factory=_Call)
    warned: bool = False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No row is shifted in this thread's calls inside, and none is warned of."""
        before = self.call.suspended
        self.call.suspended = True
        try:
            yield
        finally:
            self.call.suspended = before

    def prepare(self, language_ids: Tensor | None, tokens: Tensor | None) -> Tensor | None:
        """Check ids and map the pivot's to -1, "leave this row alone".

        Args:
            language_ids: (B,) integers, one per row, or (B, T), one per token (packed rows hold several languages);
                or None, whose first time is warned of, unless shifts are suspended.
            tokens: the input, (B, T) ids or (B, T, d) embeddings.

        Returns:
            int64 of the same shape on the device of the input; None when nothing is to be shifted.

        Raises:
            TypeError: not a tensor of integers. ValueError: another shape, or an id out of range (checked on the
            CPU; on an accelerator it would cost a synchronisation).
        """
        if self.call.suspended:
            return None
        if language_ids is None:
            self._warn_unshifted()
            return None
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
            if low < -1 or high >= self.num_languages:
                raise ValueError(
                    f"language_ids: got an id of {low if low < -1 else high}, wanted 0 … {self.num_languages - 1}, "
                    "or -1 to leave a row alone."
                )
        ids = language_ids.to(device=None if tokens is None else tokens.device, dtype=torch.long)
        return ids.masked_fill(ids == self.pivot_id, -1)

    def _warn_unshifted(self) -> None:
        # Not while torch.compile traces, which breaks the graph at a warning.
        if torch.compiler.is_compiling() or self.warned or not self.shifts:
            return
        self.warned = True
        warnings.warn(
            "An attached model was called without language_ids: it runs unshifted. Pass "
            "language_ids=model.shifcon.language_ids([...]), one language code per row, or say that this is meant: "
            "with model.shifcon.suspended(). (Said once per model.)",
            stacklevel=2,
        )


def unshifted(model: nn.Module) -> AbstractContextManager[None]:
    """This thread's calls inside are meant to be unshifted; nothing for a model that is not attached.

    Args:
        model: any model, in whatever wrappers.
    """
    found = (module.__dict__.get(ATTACHMENT) for module in model.modules())
    attachment: Attachment | None = next((each for each in found if each is not None), None)
    return nullcontext() if attachment is None else attachment.suspended()
