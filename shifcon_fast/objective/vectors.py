"""Language vectors that follow the model while it is trained.

* ``frozen``: those of the space that training started with.
* ``ema``: v(l) ← decay · v(l) + (1 - decay) · m(l) after every optimizer step, m(l) the mean of the step's
  contrastive sentences of language l, over all processes; a language without any keeps its vector.
* ``refresh``: replaced every N steps by a fresh estimate (the trainer makes it and calls :meth:`start_again`).
* ``running``: the authors' way: the mean, over all steps so far, of the steps' means.

Only the two boundaries where shifts happen, f and b, are tracked. Sentences are represented by an unshifted pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

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
        rows = representations.detach().to(device="cpu", dtype=torch.float64)
        if self._unit:
            rows = functional.normalize(rows, dim=-1)
        index = language_ids.to("cpu")
        self._sums.index_add_(1, index, rows)
        self._counts.index_add_(0, index, torch.ones(index.shape, dtype=torch.float64))

    def step(self, reduce: Reduce | None = None) -> bool:
        """End the optimizer step; True if vectors changed. ``reduce`` sums over processes, which all must call."""
        if not self.follows_batches:
            return False
        sums, counts = (
            (self._sums, self._counts) if reduce is None else (reduce(self._sums), reduce(self._counts))
        )
        seen = counts > 0
        means = sums[:, seen] / counts[seen, None]
        self._final = None
        if self.mode == "ema":
            self._vectors[:, seen] = self._decay * self._vectors[:, seen] + (1 - self._decay) * means
        else:
            started = self._updates[seen, None] > 0
            total = torch.where(started, self._vectors[:, seen], 0) + means.to(self._vectors.dtype)
            self._vectors[:, seen] = total
            self._updates[seen] += 1
        self._sums.zero_()
        self._counts.zero_()
        return bool(seen.any())

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
        """The shift to train with (undivided sums, if asked for) or, else, the one to evaluate and serve with."""
        if self._final is not None and not training:
            return self._final
        vectors = self._vectors.double()
        if self.mode == "running" and not (training and self._running_sums):
            vectors = vectors / self._updates.clamp(min=1)[:, None]
        return replace(self._shift, vectors=vectors.float())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that :meth:`load_state_dict` needs to go on between two optimizer steps."""
        return {"vectors": self._vectors.clone(), "updates": self._updates.clone()}

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
