"""Attach language shifts to a live Hugging Face model, and take them off again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shifcon_fast.modeling.architectures import Decoder, locate_decoder
from shifcon_fast.modeling.blocks import SHIFT_TABLE
from shifcon_fast.modeling.fingerprint import fingerprint_differences, model_fingerprint
from shifcon_fast.modeling.language_ids import ATTACHMENT, Attachment
from shifcon_fast.modeling.norms import NORM_COUNTS, NormCounts
from shifcon_fast.modeling.swap import block_class, decoder_class, outer_class, restore_class, swap_class
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
    -1 are left alone bit for bit, and without the argument nothing is shifted.

    Only this instance changes, and :meth:`ShiftHandle.detach` puts everything back. Weights, ``state_dict`` and
    ``save_pretrained`` are untouched. Attach before or after PEFT wraps the model.

    Args:
        model: a causal LM, a PEFT model around one, or a bare decoder; the architecture must be in the table.
        space: the language vectors, estimated on this model.
        forward, backward: boundaries f < b, each in 0 … L-1 (1 … L-1 for ``recipe="official"``).
        alpha: length of the shift, in language vector differences.
        recipe: ``"stable"`` adds the vectors of boundary k at boundary k. ``"official"`` adds those of boundaries
            f and b at f-1 and b-1, as the authors' code does.
        check_fingerprint: refuse a space that was estimated on another model.

    Returns:
        The handle, also found as ``shifcon`` on the Hugging Face model.

    Raises:
        ValueError: unknown architecture; boundaries out of order or range; a space of another hidden size, number
            of boundaries or model; a model that is attached already. The model is then as it was.
    """
    decoder = locate_decoder(model)
    if ATTACHMENT in decoder.module.__dict__:
        raise ValueError("model: it is attached already; call model.shifcon.detach() first.")
    _check_area(forward, backward, decoder.num_boundaries, recipe)
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
    return ShiftHandle(
        model=model,
        space=space,
        decoder=decoder,
        forward=forward,
        backward=backward,
        alpha=float(alpha),
        recipe=recipe,
    )


class ShiftHandle:
    """An attached model's controls. Made by :func:`attach`; as a context manager it detaches at the end.

    Attributes:
        model: what was passed to :func:`attach`.
        space: the language space whose vectors are in use.
        forward, backward, alpha, recipe: as passed to :func:`attach`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        space: LanguageSpace,
        decoder: Decoder,
        forward: int,
        backward: int,
        alpha: float,
        recipe: Recipe,
    ) -> None:
        self.model = model
        self.space = space
        self.forward = forward
        self.backward = backward
        self.alpha = alpha
        self.recipe = recipe
        self._decoder = decoder
        self._outer = _outermost_model(model, decoder.module)
        self._swapped: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []
        self._attachment = Attachment(
            num_languages=len(space.languages),
            pivot_id=space.language_id(space.pivot),
            forwards_kwargs=decoder.architecture.forwards_kwargs,
        )
        tables = self._tables(space)
        try:
            self._install(tables)
        except BaseException:
            self.detach()
            raise

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
        tables = self._tables(space)
        for block, vectors in tables.items():
            table = self.shift_table(block)
            if table is None:
                raise ValueError("handle: it was detached; attach again.")
            with torch.no_grad():
                table.copy_(vectors)
        self.space = space

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """No row is shifted inside, whatever ``language_ids`` says; the norms still go through the operators."""
        before = self._attachment.suspended
        self._attachment.suspended = True
        try:
            yield
        finally:
            self._attachment.suspended = before

    @property
    def engagements(self) -> dict[int, dict[str, int]]:
        """block → norm site → runs through ``ops.add_shift_rms_norm``. Compiled code is not counted."""
        sites = self._decoder.architecture.norm_sites
        return {
            index: {site: counts.engaged[site] for site in sites}
            for index, counts in enumerate(self._norm_counts())
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
        for module, _, replacement in self._swapped:
            if type(module) is not replacement:
                raise ValueError(
                    f"model: a {type(module).__name__} was given another class since it was attached, by "
                    "FSDP2's fully_shard for instance; it can only be detached after that is undone."
                )
        while self._swapped:
            module, original, _ = self._swapped.pop()
            restore_class(module, original)
        for block in self._decoder.blocks:
            block._buffers.pop(SHIFT_TABLE, None)
            block._non_persistent_buffers_set.discard(SHIFT_TABLE)
            block.__dict__.pop(NORM_COUNTS, None)
            block.__dict__.pop(ATTACHMENT, None)
        for module in (self._decoder.module, self._outer):
            module.__dict__.pop(ATTACHMENT, None)
        self._outer.__dict__.pop("shifcon", None)

    def __enter__(self) -> ShiftHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        area = f"forward={self.forward}, backward={self.backward}, alpha={self.alpha}, recipe={self.recipe!r}"
        return f"ShiftHandle({area}, languages={list(self.space.languages)}, pivot={self.space.pivot!r})"

    def _install(self, tables: dict[int, Tensor]) -> None:
        for index, block in enumerate(self._decoder.blocks):
            if index in tables:
                block.register_buffer(SHIFT_TABLE, tables[index].to(_device_of(block)), persistent=False)
            block.__dict__[NORM_COUNTS] = NormCounts()
            block.__dict__[ATTACHMENT] = self._attachment
            self._swap(block, block_class)
        self._decoder.module.__dict__[ATTACHMENT] = self._attachment
        self._swap(self._decoder.module, decoder_class)
        if self._outer is not self._decoder.module:
            self._outer.__dict__[ATTACHMENT] = self._attachment
            self._swap(self._outer, outer_class)
        self._outer.__dict__["shifcon"] = self

    def _swap(self, module: nn.Module, subclass: Callable[[Any], type[nn.Module]]) -> None:
        replacement = subclass(type(module))
        self._swapped.append((module, swap_class(module, replacement), replacement))

    def _tables(self, space: LanguageSpace) -> dict[int, Tensor]:
        """block → what is added at its input."""
        earlier = 1 if self.recipe == "official" else 0
        toward = self.alpha * space.shift_vectors(self.forward)
        back = -self.alpha * space.shift_vectors(self.backward)
        return {self.forward - earlier: toward, self.backward - earlier: back}

    def _norm_counts(self) -> list[NormCounts]:
        return [block.__dict__.get(NORM_COUNTS) or NormCounts() for block in self._decoder.blocks]


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
