"""A trainer's language vectors: shown what it trains on, estimated again, and a saved model's in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.modeling.evaluation_mode import drops_out, evaluation_mode
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.notices import warn_once
from shifcon_fast.objective.mcl import ContrastiveBatch
from shifcon_fast.objective.vectors import LanguageVectors
from shifcon_fast.space.language_shift import LanguageShift, dose_warning
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.language_vectors import estimate_again, track_vectors


class FollowingTrainer:
    """Mixin of trainers: their shift's vectors follow the model, as ``args.vectors`` says."""

    args: ShifConArguments
    handle: ShiftHandle | None
    model: Any
    state: Any
    accelerator: Any
    processing_class: Any
    is_world_process_zero: Any
    save_model: Any
    _check_finite: Any
    _reduce: Any
    _parallel: Mapping[str, Sequence[str]] | None
    _vectors: LanguageVectors | None

    def _start_vectors(self, args: ShifConArguments, model: Any) -> None:
        self._vectors = track_vectors(args, self.handle, model)
        if self._vectors is not None and self._vectors.mode == "refresh" and self._parallel is None:
            raise ValueError("parallel: none given; vectors='refresh' estimates from its sentences")
        if self._vectors is not None and args.final_estimation and self._parallel is None:
            raise ValueError(
                "parallel: none given; final_estimation estimates from its sentences (final_estimation=False needs "
                "none)"
            )

    def _follow_in_passing(self, model: Any, batch: ContrastiveBatch) -> Callable[[Tensor], None] | None:
        """What shows the vectors the batch's sentences in the contrastive pass; None where that cannot.

        It cannot where there is none, where some of it runs twice (gradient caching), and where it drops out, which
        an estimate of the language space never does.
        """
        vectors, size = self._vectors, self.args.contrastive_mini_batch_size
        if vectors is None or not vectors.follows_batches or not self.args.w_mcl:
            return None
        one_pass = size is None or size >= int(self.args.contrastive_batch_size or 0)
        if not one_pass or drops_out(self.accelerator.unwrap_model(model)):
            return None
        return lambda representations: vectors.add(representations, batch["language_ids"])

    def _follow(self, model: Any, batch: ContrastiveBatch) -> None:
        """Show the batch's sentences to the vectors, as an unshifted pass of its own in eval mode sees them."""
        if self._vectors is None or not self._vectors.follows_batches or self.handle is None:
            return
        unwrapped = self.accelerator.unwrap_model(model)
        with evaluation_mode(unwrapped), torch.no_grad():
            representations = boundary_representations(
                unwrapped,
                batch["input_ids"],
                batch["attention_mask"],
                batch["pool_mask"],
                (self.handle.forward, self.handle.backward),
                keep_massive=self.handle.recipe == "official",
            )
        self._vectors.add(representations, batch["language_ids"])

    def _move_vectors(self) -> None:
        """After an optimizer step: the vectors of the next one; after the last one, those of the finished run."""
        if self._vectors is None or self.handle is None:
            return
        changed = self._vectors.step(self._reduce if self.args.world_size > 1 else None)
        if self._vectors.mode == "refresh" and self.state.global_step % self.args.refresh_every == 0:
            self._vectors.start_again(self._estimate())
            changed = True
        if changed:
            self.handle.set_shift(self._vectors.shift(training=True))
        if self.args.final_estimation and self.state.global_step >= self.state.max_steps:
            self._check_finite()
            # Now, so that the last evaluation and the last checkpoint have the vectors of the finished run.
            self._estimate_finally()

    def _finish_vectors(self) -> None:
        """Training is over: estimate them if that is still to do, and shift by them."""
        if self._vectors is None or self.handle is None:
            return
        if self.args.final_estimation and not self._vectors.finished:  # ended early, or at an earlier best
            self._estimate_finally()
        self.handle.set_shift(self._vectors.shift(training=False))
        if self._vectors.mode != "frozen" and (warning := dose_warning(self.handle.shift)):
            warn_once(f"After training: {warning}")

    def _estimate(self) -> LanguageShift:
        assert self.handle is not None
        assert self._parallel is not None
        return estimate_again(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            self._parallel,
            self.handle.shift,
            sentences=self.args.estimation_sentences,
            batch_size=self.args.estimation_batch_size,
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )

    def _estimate_finally(self) -> None:
        assert self.handle is not None
        assert self._vectors is not None
        try:
            shift = self._estimate()
        except BaseException:
            self.handle.set_shift(self._vectors.shift(training=False))
            self.save_model()  # whatever happens in the estimation, the trained model is kept
            raise
        self._vectors.finish(shift)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates with the vectors that a saved model would have."""
        if self._vectors is None or self.handle is None:
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        before = self.handle.shift
        self.handle.set_shift(self._vectors.shift(training=False))
        try:
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.handle.set_shift(before)
