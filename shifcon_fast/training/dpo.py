"""``ShifConDPOTrainer``: TRL's ``DPOTrainer`` on an attached model, policy and reference both shifted."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft import PeftModel

from shifcon_fast.data.chat_template import end_of_turn
from shifcon_fast.data.languages import position_of
from shifcon_fast.extras import needed_for
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.training.batches.language_column import LanguageCollator
from shifcon_fast.training.batches.training_data import text_tokenizer
from shifcon_fast.training.batches.trl_columns import LanguageColumns, add_language_ids
from shifcon_fast.training.run.run_folder import RunState, save_run
from shifcon_fast.training.weights.sharding import CheckUnits, ShardedTrainer, gather_weights

with needed_for("ShifConDPOTrainer"):
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

REFERENCE = "ref"
"""What TRL calls the copy of an adapter that it compares with."""


class ShifConDPOTrainer(LanguageColumns, ShardedTrainer, DPOTrainer):
    """``DPOTrainer`` whose answers are shifted by the language of their row, in policy and reference.

    The plain ``DPOTrainer`` takes an attached model too, whose ``model.shifcon.language`` then says the language of
    all rows; but its reference is another adapter, which a shift that belongs to one adapter does not follow.

    Args:
        model: an attached model. A PEFT model, or one that ``peft_config`` makes one of.
        args: TRL's.
        processing_class: the model's tokenizer.
        language_column: of the data sets, with the language of each row.
        kwargs: other arguments of ``DPOTrainer``.

    Raises:
        ValueError: a model that is not attached, has no adapter to train, or whose reference would be unshifted.
        DataError: a row without a language, or with one that the shift does not know.
    """

    def __init__(
        self,
        model: Any,
        args: DPOConfig,
        *,
        processing_class: Any,
        language_column: str = "lang",
        **kwargs: Any,
    ) -> None:
        handle = getattr(model, "shifcon", None)
        if handle is None:
            raise ValueError("model: it is not attached; wanted what shifcon_fast.load or attach gives")
        self.handle: ShiftHandle = handle
        self._language_column = language_column
        self._check_reference(model, kwargs.get("ref_model"), kwargs.get("peft_config"))
        tokenizer = text_tokenizer(processing_class)
        if kwargs.get("data_collator") is None:
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            kwargs["data_collator"] = DataCollatorForPreference(
                pad_token_id=tokenizer.pad_token_id,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )
        kwargs["data_collator"] = LanguageCollator(
            kwargs["data_collator"], repeats=2
        )  # chosen, then rejected
        super().__init__(model, args=args, processing_class=processing_class, **kwargs)
        self.add_callback(CheckUnits())

    def _check_reference(self, model: Any, reference: Any, peft_config: Any) -> None:
        if reference is not None:
            if getattr(reference, "shifcon", None) is None:
                raise ValueError(
                    "ref_model: it is not attached; wanted a copy of the model, copy.deepcopy(model)"
                )
        elif peft_config is not None:
            if None not in self.handle.shifts:
                raise ValueError("peft_config: the shift belongs to an adapter that the model has already")
        elif not isinstance(model, PeftModel):
            raise ValueError(
                "ref_model: none given, and TRL would load one without the shift; wanted a PEFT model, a "
                "peft_config, or an attached ref_model"
            )
        elif not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "model: nothing in it is trained (shifcon_fast.load freezes it); call "
                f"model.set_requires_grad({model.active_adapter!r})"
            )

    def _prepare_dataset(self, dataset: Any, *settings: Any) -> Any:
        if REFERENCE in getattr(self.handle.model, "peft_config", {}):
            shifts = self.handle.shifts  # TRL has just made the reference's adapter
            if None not in shifts and REFERENCE not in shifts:
                self.handle.add_shift(self.handle.shift, REFERENCE)
        known = tuple(self.handle.shift.languages)
        dataset = add_language_ids(dataset, self._language_column, partial(position_of, known=known))
        return super()._prepare_dataset(dataset, *settings)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a run folder, as ``ShifConTrainer`` does: the shift would be lost with the adapter alone."""
        model = self.accelerator.unwrap_model(self.model)
        gathered = gather_weights(model)
        if self.args.should_save:
            tokenizer = text_tokenizer(self.processing_class)
            state = RunState(
                handle=self.handle,
                tokenizer=self.processing_class,
                log=self.state.log_history,
                end_of_turn=end_of_turn(tokenizer),
                gathered=gathered,
            )
            save_run(output_dir or self.args.output_dir, model, state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")
