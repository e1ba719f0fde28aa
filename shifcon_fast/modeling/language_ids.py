"""The ``language_ids`` argument on its way from the model's forward to the blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ATTACHMENT = "_shifcon"
"""Name of the attribute by which an attached model, its decoder and some blocks reach their :class:`Attachment`."""


@dataclass
class Attachment:
    """What the swapped modules of one attached model share.

    Attributes:
        num_languages: K, the rows of a shift table; valid ids are -1 … K-1.
        pivot_id: the id whose rows are left alone.
        forwards_kwargs: whether the decoder passes unknown keyword arguments on (see ``Architecture``).
        suspended: no row is shifted while this is true.
        pending: ids given to a model whose head does not pass them on to the decoder, during its forward.
        current: prepared ids of the decoder's running forward, for blocks that are not passed them.
    """

    num_languages: int
    pivot_id: int
    forwards_kwargs: bool
    suspended: bool = False
    pending: Tensor | None = None
    current: Tensor | None = None

    def prepare(self, language_ids: Tensor | None, tokens: Tensor | None) -> Tensor | None:
        """Check ids and map the pivot's to -1, "leave this row alone".

        Args:
            language_ids: (B,) integers, or None.
            tokens: the input, (B, T) ids or (B, T, d) embeddings.

        Returns:
            (B,) int64 on the device of the input; None when nothing is to be shifted.

        Raises:
            TypeError: not a tensor of integers. ValueError: another shape, or an id out of range (checked on the
            CPU; on an accelerator it would cost a synchronisation).
        """
        if language_ids is None or self.suspended:
            return None
        if not isinstance(language_ids, Tensor):
            raise TypeError(
                f"language_ids: got {type(language_ids).__name__}, wanted an integer tensor of shape (batch,); "
                "make one from language codes with handle.language_ids([...])."
            )
        if language_ids.is_floating_point() or language_ids.is_complex() or language_ids.dtype == torch.bool:
            raise TypeError(f"language_ids: got dtype {language_ids.dtype}, wanted integers (torch.long).")
        if language_ids.dim() != 1 or (tokens is not None and language_ids.shape[0] != tokens.shape[0]):
            rows = "" if tokens is None else f" = ({tokens.shape[0]},)"
            raise ValueError(
                f"language_ids: got shape {tuple(language_ids.shape)}, wanted one id per row, (batch,){rows}."
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
