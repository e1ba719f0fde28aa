"""Attach language shifts to a live Hugging Face model, and take them off again."""

from __future__ import annotations

import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shifcon_fast.modeling.architectures import Decoder, locate_decoder
from shifcon_fast.modeling.blocks import SHIFT_TABLE
from shifcon_fast.modeling.fingerprint import fingerprint_differences, model_fingerprint
from shifcon_fast.modeling.language_ids import ATTACHMENT, Attachment, unshifted
from shifcon_fast.modeling.norms import NORM_COUNTS, NormCounts
from shifcon_fast.modeling.swap import (
    HANDLES,
    block_class,
    decoder_class,
    original_class,
    outer_class,
    restore_class,
    swap_class,
)
from shifcon_fast.space.area import dose_warning
from shifcon_fast.space.language_space import LanguageSpace

logger = logging.getLogger(__name__)

Recipe = Literal["stable", "official"]


def attach(
    model: nn.Module,
    space: LanguageSpace,
    forward: int,
    backward: int,
    alpha: float = 1.0,
    *,
    recipe: Recipe = "stable",
    check_fingerprint: bool = True,
) -> ShiftHandle:
    """Make a model shift rows of other languages into the pivot's region between two boundaries.

    At boundary ``forward``, h ← h + α (v(pivot) - v(language)); at boundary ``backward``, the same with the sign
    turned round (ShifCon, arXiv 2410.19453). The model's forward and ``generate`` then take
    ``language_ids``, a (B,) integer tensor from :meth:`ShiftHandle.language_ids`; rows of the pivot and rows with
    -1 are left alone bit for bit. Without the argument nothing is shifted, which is warned of once per model unless
    it happens under :meth:`ShiftHandle.suspended` or alpha is 0.

    Only this instance changes, and :meth:`ShiftHandle.detach` puts everything back. Weights, ``state_dict`` and
    ``save_pretrained`` are untouched. Attach before or after PEFT wraps the model. An attached model can be copied,
    pickled, and run by several threads; it is freed with the last reference to it and to its handle.

    Args:
        model: a causal LM, a PEFT model around one, or a bare decoder; the architecture must be in the table.
        space: the language vectors, estimated on this model.
        forward, backward: boundaries f < b, each in 0 … L-1 (1 … L-1 for ``recipe="official"``).
        alpha: length of the shift, in language vector differences; finite.
        recipe: ``"stable"`` adds the vectors of boundary k at boundary k. ``"official"`` adds those of boundaries
            f and b at f-1 and b-1, as the authors' code does.
        check_fingerprint: refuse a space that was estimated on another model.

    Returns:
        The handle, also found as ``shifcon`` on the Hugging Face model.

    Raises:
        ValueError: unknown architecture; boundaries out of order or range; an alpha that is not finite; a space of
            another hidden size, number of boundaries or model; a model that is attached already. The model is then
            as it was.
    """
    decoder = locate_decoder(model)
    if ATTACHMENT in decoder.module.__dict__:
        raise ValueError("model: it is attached already; call model.shifcon.detach() first.")
    _check_area(forward, backward, decoder.num_boundaries, recipe)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: got {alpha}, wanted a finite number.")
    _check_space(space, decoder)
    made_with = space.card.get("model")
    expected = made_with.get("fingerprint") if check_fingerprint and isinstance(made_with, dict) else None
    if expected:
        differences = fingerprint_differences(expected, model_fingerprint(model))
        if differences:
            origin = expected.get("name_or_path") or "another model"
            raise ValueError(
                f"space: it was estimated on {origin}, not on this model ({'; '.join(differences)}). "
                "Estimate a space on this model (shifcon profile), or pass check_fingerprint=False in Python if "
                "you know better."
            )
    if warning := dose_warning(space, forward, backward, alpha):
        logger.warning("%s", warning)
    outer = _outermost_model(model, decoder.module)
    installed = _Installed(space, forward, backward, float(alpha), recipe)
    try:
        _install(decoder, outer, installed)
    except BaseException:
        _uninstall(decoder, outer)
        raise
    handle: ShiftHandle = installed.of(outer)
    return handle


@dataclass
class _Installed:
    """What an attached model knows of its attachment, beside what its modules hold.

    It does not hold the model, and the handle only weakly: the handle holds the model.
    """

    space: LanguageSpace
    forward: int
    backward: int
    alpha: float
    recipe: Recipe
    handle: weakref.ref[ShiftHandle] | None = None

    def of(self, model: nn.Module) -> ShiftHandle:
        """The handle of the model that holds this; the same one for as long as somebody keeps it."""
        handle = self.handle() if self.handle is not None else None
        if handle is None:
            handle = ShiftHandle(model, self)
            self.handle = weakref.ref(handle)
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handle": None}  # a copy of the model gets a handle of its own

    def tables(self) -> dict[int, Tensor]:
        """block → what is added at its input."""
        earlier = 1 if self.recipe == "official" else 0
        toward = self.alpha * self.space.shift_vectors(self.forward)
        back = -self.alpha * self.space.shift_vectors(self.backward)
        return {self.forward - earlier: toward, self.backward - earlier: back}


class ShiftHandle:
    """An attached model's controls: what :func:`attach` returns and what the model has as ``shifcon``.

    As a context manager it detaches at the end.

    Attributes:
        model: the Hugging Face model; the one inside, where PEFT or another wrapper was attached.
        space: the language space whose vectors are in use.
        forward, backward, alpha, recipe: as passed to :func:`attach`.
    """

    def __init__(self, model: nn.Module, installed: _Installed) -> None:
        self.model = model
        self._installed = installed

    @property
    def space(self) -> LanguageSpace:
        return self._installed.space

    @property
    def forward(self) -> int:
        return self._installed.forward

    @property
    def backward(self) -> int:
        return self._installed.backward

    @property
    def alpha(self) -> float:
        return self._installed.alpha

    @property
    def recipe(self) -> Recipe:
        return self._installed.recipe

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return locate_decoder(self.model)

    @property
    def _is_attached(self) -> bool:
        return self.model.__dict__.get(HANDLES) is self._installed

    def language_ids(
        self, languages: str | Sequence[str], device: torch.device | str | None = None
    ) -> Tensor:
        """Ids for the ``language_ids`` argument: (B,) int64, one per row of a batch.

        Args:
            languages: one code per row, or a single code for a batch of one row.
            device: where to put them; the CPU by default, the model moves them.

        Raises:
            ValueError: a code that the space does not know; the known ones are listed.
        """
        codes = [languages] if isinstance(languages, str) else list(languages)
        return torch.tensor([self.space.language_id(code) for code in codes], dtype=torch.long, device=device)

    def shift_table(self, block: int) -> Tensor | None:
        """The (K, d) float32 vectors that are added at the input of a block, or None where nothing is."""
        return self._decoder.blocks[block]._buffers.get(SHIFT_TABLE)

    def set_space(self, space: LanguageSpace) -> None:
        """Use the vectors of another space of the same model, from the next forward on.

        Not between a forward and its backward: under gradient checkpointing, recomputation would use the new ones.

        Raises:
            ValueError: other languages (or another order of them), pivot, hidden size or number of boundaries.
        """
        _check_space(space, self._decoder)
        if space.languages != self.space.languages or space.pivot != self.space.pivot:
            raise ValueError(
                f"space: got languages {space.languages} with pivot {space.pivot}, wanted {self.space.languages} "
                f"with pivot {self.space.pivot}; detach and attach to change them."
            )
        if not self._is_attached:
            raise ValueError("handle: it was detached; attach again.")
        changed = replace(self._installed, space=space)
        for block, vectors in changed.tables().items():
            table = self.shift_table(block)
            assert table is not None
            with torch.no_grad():
                table.copy_(vectors)
        self._installed.space = space

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No row is shifted inside, whatever ``language_ids`` says; the norms still go through the operators.

        Holds for the calls of this thread. A call without ``language_ids`` inside is not warned of.
        """
        with unshifted(self.model):
            yield

    @property
    def engagements(self) -> dict[int, dict[str, int]]:
        """block → norm site → runs through ``ops.add_shift_rms_norm``. Compiled code is not counted."""
        architecture, blocks = self._decoder.architecture, self._decoder.blocks
        return {
            index: {site: counts.engaged[site] for site in architecture.norm_sites(block)}
            for index, (block, counts) in enumerate(zip(blocks, self._norm_counts(), strict=True))
        }

    @property
    def bypassed(self) -> dict[int, dict[str, str]]:
        """block → norm site → why the norm module was called instead of the operator. Empty when all engage."""
        return {
            index: dict(counts.bypassed)
            for index, counts in enumerate(self._norm_counts())
            if counts.bypassed
        }

    def reset_engagements(self) -> None:
        """Start counting from zero."""
        for counts in self._norm_counts():
            counts.engaged.clear()
            counts.bypassed.clear()

    def detach(self) -> None:
        """Put the model back exactly as it was before :func:`attach`. Once detached, does nothing.

        Raises:
            ValueError: something has changed a swapped module's class since (FSDP2 does); nothing is undone.
        """
        if not self._is_attached:
            return
        for module in _swapped_modules(self._decoder, self.model):
            if original_class(module) is None:
                raise ValueError(
                    f"model: a {type(module).__name__} was given another class since it was attached, by "
                    "FSDP2's fully_shard for instance; it can only be detached after that is undone."
                )
        _uninstall(self._decoder, self.model)

    def __enter__(self) -> ShiftHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        area = f"forward={self.forward}, backward={self.backward}, alpha={self.alpha}, recipe={self.recipe!r}"
        return f"ShiftHandle({area}, languages={list(self.space.languages)}, pivot={self.space.pivot!r})"

    def _norm_counts(self) -> list[NormCounts]:
        return [block.__dict__.get(NORM_COUNTS) or NormCounts() for block in self._decoder.blocks]


def _install(decoder: Decoder, outer: nn.Module, installed: _Installed) -> None:
    space, tables = installed.space, installed.tables()
    attachment = Attachment(
        num_languages=len(space.languages),
        pivot_id=space.language_id(space.pivot),
        forwards_kwargs=decoder.architecture.forwards_kwargs,
        shifts=installed.alpha != 0,
    )
    for index, block in enumerate(decoder.blocks):
        if index in tables:
            block.register_buffer(SHIFT_TABLE, tables[index].to(_device_of(block)), persistent=False)
        block.__dict__[NORM_COUNTS] = NormCounts()
        block.__dict__[ATTACHMENT] = attachment
        _swap(block, block_class)
    decoder.module.__dict__[ATTACHMENT] = attachment
    _swap(decoder.module, decoder_class)
    if outer is not decoder.module:
        outer.__dict__[ATTACHMENT] = attachment
        _swap(outer, outer_class)
    outer.__dict__[HANDLES] = installed


def _swap(module: nn.Module, subclass: Callable[[Any], type[nn.Module]]) -> None:
    swap_class(module, subclass(type(module)))


def _uninstall(decoder: Decoder, outer: nn.Module) -> None:
    """Undo :func:`_install`, or as much of it as was done."""
    for module in _swapped_modules(decoder, outer):
        if original_class(module) is not None:
            restore_class(module)
        for name in (ATTACHMENT, NORM_COUNTS, HANDLES):
            module.__dict__.pop(name, None)
    for block in decoder.blocks:
        block._buffers.pop(SHIFT_TABLE, None)
        block._non_persistent_buffers_set.discard(SHIFT_TABLE)


def _swapped_modules(decoder: Decoder, outer: nn.Module) -> list[nn.Module]:
    return [*decoder.blocks, decoder.module, *([] if outer is decoder.module else [outer])]


def _check_area(forward: int, backward: int, boundaries: int, recipe: str) -> None:
    if recipe not in ("stable", "official"):
        raise ValueError(f"recipe: got {recipe!r}, wanted 'stable' or 'official'.")
    lowest = 1 if recipe == "official" else 0
    for name, value in (("forward", forward), ("backward", backward)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, wanted the number of a boundary (an int).")
        if not lowest <= value < boundaries:
            raise ValueError(
                f"{name}: got boundary {value}, wanted {lowest} … {boundaries - 1} "
                f"(the model has {boundaries} blocks)."
            )
    if forward >= backward:
        raise ValueError(
            f"forward, backward: got {forward} and {backward}, wanted forward < backward; the shift toward the "
            "pivot comes before the shift back."
        )


def _check_space(space: LanguageSpace, decoder: Decoder) -> None:
    if space.hidden_size != decoder.hidden_size:
        raise ValueError(
            f"space: got vectors of size {space.hidden_size}, wanted the model's hidden size "
            f"{decoder.hidden_size}; it was estimated on another model."
        )
    if space.num_boundaries != decoder.num_boundaries:
        raise ValueError(
            f"space: got {space.num_boundaries} boundaries, wanted {decoder.num_boundaries}, one per block of the "
            "model; it was estimated on another model."
        )


def _outermost_model(model: nn.Module, decoder: nn.Module) -> nn.Module:
    """The Hugging Face model that users call: the one with the head, inside of PEFT's and other wrappers."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(part is decoder for part in module.modules()):
            return module
    return decoder


def _device_of(block: nn.Module) -> torch.device:
    """Where a block computes; weights that accelerate offloads are on ``meta`` between calls."""
    device = next(block.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
