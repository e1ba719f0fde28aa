"""A trainer's run folders and checkpoints: whole or not there, and gone on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers.trainer import TRAINER_STATE_NAME

from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.objective.vectors import LanguageVectors
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.storage import replacing, staging_folder
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.attaching import check_same_run
from shifcon_fast.training.batches.contrastive_data import ContrastiveSampler
from shifcon_fast.training.batches.training_data import TrainingData
from shifcon_fast.training.language_vectors import VECTORS, load_vectors
from shifcon_fast.training.run.checkpoints import CARD, rotate
from shifcon_fast.training.run.run_folder import RunState, save_run
from shifcon_fast.training.weights.adapter_files import shift_is_not_lost
from shifcon_fast.training.weights.sharding import gather_weights


class SavingTrainer:
    """Mixin of trainers: they save run folders; a checkpoint is one with ``Trainer``'s own files beside."""

    args: ShifConArguments
    handle: ShiftHandle | None
    model: Any
    state: Any
    accelerator: Any
    processing_class: Any
    is_in_train: bool
    is_deepspeed_enabled: bool
    push_to_hub: Any
    _check_finite: Any
    _data: TrainingData
    _end_of_turn: Sequence[int]
    _parallel: Mapping[str, Sequence[str]] | None
    _sampler: ContrastiveSampler | None
    _vectors: LanguageVectors | None
    _staging: Path | None = None  # while a checkpoint is written

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a run folder, all or nothing; only the main process does, and all must call this.

        Raises:
            NonFiniteLossError: a loss or gradient was not finite, so that the weights are not either.
        """
        self._check_finite()
        model = self.accelerator.unwrap_model(self.model)
        gathered = gather_weights(model)
        if self.args.should_save:
            # In the middle of training the saved vectors are those of evaluation, not the undivided sums.
            vectors = self._vectors if self.is_in_train else None
            state = self._run_state(vectors.shift(training=False) if vectors else None)
            save_run(output_dir or self.args.output_dir, model, replace(state, gathered=gathered))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _run_state(self, shift: LanguageShift | None = None) -> RunState:
        return RunState(
            handle=self.handle,
            shifted=self.args.shift,
            tokenizer=self.processing_class,
            settings={**self.args.method_settings(), **self._data_sizes()},
            log=self.state.log_history,
            shift=shift,
            end_of_turn=self._end_of_turn,
        )

    def _data_sizes(self) -> dict[str, Any]:
        """How much was trained on, for the record."""
        pairs = (
            None if self._sampler is None or not self._parallel else len(next(iter(self._parallel.values())))
        )
        return {"examples": self._data.examples, "translations": pairs}

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """``Trainer._save_checkpoint``, all or nothing: it writes into a staging folder (``storage.replacing``)."""
        self._check_finite()
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with ExitStack() as stack:
            if self.args.should_save:
                stack.enter_context(replacing(run, f"{name}/{CARD}"))
            self.accelerator.wait_for_everyone()
            self._staging = staging_folder(run, CARD)
            stack.callback(setattr, self, "_staging", None)
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            best, found = self.state.best_global_step, run / f"checkpoint-{self.state.best_global_step}"
            if best == self.state.global_step or found.is_dir():
                self.state.best_model_checkpoint = str(found)  # not where it is staged
            if self.args.should_save:
                self.state.save_to_json(str(self._staging / name / TRAINER_STATE_NAME))
                if self._vectors is not None:
                    save_file(self._vectors.state_dict(), self._staging / name / VECTORS)
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(run / name))
            rotate(run, self.args.save_total_limit, keep=[self.state.best_model_checkpoint])
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # once it is whole
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_same_run(Path(resume_from_checkpoint), self.handle, self.args.method_settings())
        with shift_is_not_lost():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        self._load_vectors(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and self.is_deepspeed_enabled:  # which loads the weights by itself
            check_same_run(Path(checkpoint), self.handle, self.args.method_settings())
            self._load_vectors(Path(checkpoint))

    def _load_best_model(self) -> None:
        with shift_is_not_lost():
            super()._load_best_model()  # type: ignore[misc]
        self._load_vectors(Path(str(self.state.best_model_checkpoint)))

    def _load_vectors(self, checkpoint: Path) -> None:
        if self._vectors is None or self.handle is None:
            return
        load_vectors(checkpoint, self._vectors)
        self.handle.set_shift(self._vectors.shift(training=True))
