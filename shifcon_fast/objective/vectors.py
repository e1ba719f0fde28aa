"""Language vectors that follow the model while it is trained.

* ``frozen``: those of the space that training started with.
* ``ema``: v(l) ← decay · v(l) + (1 - decay) · m(l) after every optimizer step, m(l) the mean of the step's
  contrastive sentences of language l, over all processes; a language without any keeps its vector.
* ``refresh``: replaced every N steps by a fresh estimate (the trainer makes it and calls :meth:`start_again`).
* ``running``: the authors' way: the mean, over all steps so far, of the steps' means.

Only the two boundaries where shifts happen, f and b, are tracked. Sentences are represented by an unshifted pass,
which shares with the contrastive one what is the same in both (``boundaries.representations_and_unshifted``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn import functional

from shifcon_fast.modeling.packing import to_device
from shifcon_fast.objective.recipe import VectorMode
from shifcon_fast.space.language_shift import LanguageShift

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


class LanguageVectors:
    """The vectors of K languages at boundaries f and b, as training goes on.

    Args:
        shift: gives the first vectors and everything that does not change.
        mode: see the module.
        decay: of ``ema``, in [0, 1).
        unit: make representations unit length first, as the official recipe does.
        running_sums, dtype: of ``running``, see ``Recipe``; state is ``dtype``, float64 unless the recipe's
            ``running_dtype_of_model`` asks for the model's.

    Raises:
        ValueError: an unknown mode or a decay outside [0, 1).
    """

    def __init__(
        self,
        shift: LanguageShift,
        mode: VectorMode = "frozen",
        *,
        decay: float = 0.99,
        unit: bool = False,
        running_sums: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if mode not in ("frozen", "ema", "refresh", "running"):
            raise ValueError(f'vectors: got {mode!r}; wanted "frozen", "ema", "refresh" or "running"')
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay: got {decay}; wanted 0 <= decay < 1")
        self.mode = mode
        self._shift = shift
        self._decay = decay
        self._unit = unit
        self._running_sums = running_sums
        start = shift.vectors
        self._vectors = start.to(dtype if mode == "running" else torch.float64)
        self._updates = torch.zeros(len(shift.languages), dtype=torch.long)  # batches in a running vector
        self._final: LanguageShift | None = None
        self._added = 0  # sentences of the step at hand
        self._elsewhere: tuple[torch.device, LanguageShift] | None = None
        self._sums = torch.zeros(start.shape, dtype=torch.float64)  # of the step at hand
        self._counts = torch.zeros(len(shift.languages), dtype=torch.float64)

    @property
    def follows_batches(self) -> bool:
        """Whether :meth:`add` and :meth:`step` do anything."""
        return self.mode in ("ema", "running")

    def add(self, representations: Tensor, language_ids: Tensor) -> None:
        """Take note of sentences of the current optimizer step.

        Args:
            representations: (2, M, d) at f and b, from an unshifted pass.
            language_ids: (M,).
        """
        if not self.follows_batches:
            return
        self._move(representations.device)
        rows = representations.detach().to(self._sums)
        if self._unit:
            rows = functional.normalize(rows, dim=-1)
        # A product, since adding by an index has no order on a GPU.
        owners = functional.one_hot(to_device(language_ids, rows.device), self._counts.numel()).to(rows)
        self._sums += owners.T @ rows
        self._counts += owners.sum(0)
        self._added += len(language_ids)

    def _move(self, device: torch.device) -> None:
        """Go on where the representations are: nothing of a step is read back to the host."""
        if device.type == "mps":  # which has no 64 bits
            device = torch.device("cpu")
        if self._vectors.device != device:
            for name in ("_vectors", "_updates", "_sums", "_counts"):
                setattr(self, name, to_device(getattr(self, name), device))

    def step(self, reduce: Reduce | None = None) -> bool:
        """End the optimizer step; True if vectors changed. ``reduce`` sums over processes, which all must call."""
        if not self.follows_batches:
            return False
        sums, counts = (
            (self._sums, self._counts) if reduce is None else (reduce(self._sums), reduce(self._counts))
        )
        seen = counts > 0
        means = sums / counts.clamp(min=1)[:, None]
        self._final = None
        if self.mode == "ema":
            found = self._decay * self._vectors + (1 - self._decay) * means
        else:
            started = self._updates[:, None] > 0
            found = torch.where(started, self._vectors, 0) + means.to(self._vectors.dtype)
            self._updates = self._updates + seen
        self._vectors = torch.where(seen[:, None], found, self._vectors)
        added, self._added = self._added, 0
        self._sums.zero_()
        self._counts.zero_()
        return added > 0 or reduce is not None

    def start_again(self, shift: LanguageShift) -> None:
        """Go on from a fresh estimate's vectors."""
        self._vectors = shift.vectors.to(self._vectors.dtype)
        self._updates.zero_()
        self._final = None

    def finish(self, shift: LanguageShift) -> None:
        """Evaluate and serve with an estimate on the trained model, until training goes on.

        The vectors of training, which :meth:`state_dict` saves, stay as they are.
        """
        self._final = shift

    @property
    def finished(self) -> bool:
        """Whether :meth:`finish` was called and the vectors have not changed since."""
        return self._final is not None

    def shift(self, *, training: bool) -> LanguageShift:
        """The shift to train with (undivided sums, if asked for), where the model is, or, else, the one to evaluate
        and serve with, on the CPU."""
        if self._final is not None and not training:
            return self._final
        vectors = self._vectors.double()
        if self.mode == "running" and not (training and self._running_sums):
            vectors = vectors / self._updates.clamp(min=1)[:, None]
        if not training:
            return replace(self._shift, vectors=vectors.float().cpu())
        return replace(self._shift_on(vectors.device), vectors=vectors.float())

    def _shift_on(self, device: torch.device) -> LanguageShift:
        """The shift that training began with, its tensors on a device."""
        if device.type == "cpu":
            return self._shift
        if self._elsewhere is None or self._elsewhere[0] != device:
            tensors = {
                each.name: to_device(value, device)
                for each in fields(self._shift)
                if isinstance(value := getattr(self._shift, each.name), Tensor)
            }
            self._elsewhere = device, replace(self._shift, **tensors)  # type: ignore[arg-type]
        return self._elsewhere[1]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that :meth:`load_state_dict` needs to go on between two optimizer steps, on the CPU."""
        return {"vectors": self._vectors.cpu().clone(), "updates": self._updates.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state of the same mode, languages and model.

        Raises:
            ValueError: a state of another shape or precision.
        """
        for name, here in (("vectors", self._vectors), ("updates", self._updates)):
            there = state.get(name)
            if there is None or there.shape != here.shape or there.dtype != here.dtype:
                found = "nothing" if there is None else f"{there.dtype} {tuple(there.shape)}"
                raise ValueError(
                    f"{name}: the saved state has {found}; wanted {here.dtype} {tuple(here.shape)}"
                )
        self._vectors, self._updates = state["vectors"].clone(), state["updates"].clone()
        self._final = None
