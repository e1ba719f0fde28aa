"""``ShifConTrainer``: a ``transformers.Trainer`` for w_gen · L_gen + w_mcl · L_mcl."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from shifcon_fast.data.chat_template import NOTHING_ENDS_A_TURN, end_of_turn
from shifcon_fast.data.parallel import Parallel, read_parallel
from shifcon_fast.notices import warn_once
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.attaching import attach_for_training
from shifcon_fast.training.batches.contrastive_data import make_sampler
from shifcon_fast.training.batches.prepared_data import Instructions
from shifcon_fast.training.batches.training_data import TrainingData, read_training_data, text_tokenizer
from shifcon_fast.training.compiling import KeepCompilable
from shifcon_fast.training.contrastive_step import ContrastiveTrainer
from shifcon_fast.training.following import FollowingTrainer
from shifcon_fast.training.interruption import InterruptibleTrainer
from shifcon_fast.training.language_log import LanguageLog
from shifcon_fast.training.learning_alpha import AlphaTrainer
from shifcon_fast.training.losses.liger import check_liger, name_language_ids
from shifcon_fast.training.losses.loss_meter import FiniteWatch, LossMeter, NonFiniteLossError
from shifcon_fast.training.losses.pivot_keeping import (
    ANCHOR,
    DISTILLATION,
    REPLAY,
)
from shifcon_fast.training.run.checkpoints import CARD, last_checkpoint
from shifcon_fast.training.run.generation import stop_at
from shifcon_fast.training.run.run_readme import RunReadme
from shifcon_fast.training.saving import SavingTrainer
from shifcon_fast.training.weights.adapter_files import warn_of_what_is_not_saved
from shifcon_fast.training.weights.checkpointing import choose_checkpointing
from shifcon_fast.training.weights.quantization import keep_4bit_trainable
from shifcon_fast.training.weights.sharding import CheckUnits, ShardedTrainer

logger = logging.getLogger(__name__)


class ShifConTrainer(
    ContrastiveTrainer,
    AlphaTrainer,
    FollowingTrainer,
    LanguageLog,
    SavingTrainer,
    InterruptibleTrainer,
    RunReadme,
    ShardedTrainer,
    Trainer,
):
    """Fine-tunes a PEFT model with the ShifCon objective and writes a run folder (``args.output_dir``).

    What is not said otherwise here is as in ``Trainer``: callbacks, evaluation, schedulers, ``accelerate``.

    Args:
        model: a PEFT model, as ``load_quantized(..., lora=LoraConfig(...))`` returns it; attached already or not.
        args: see :class:`ShifConArguments`.
        processing_class: the model's tokenizer, or a processor with one. It is used as it is and never changed.
        train_dataset, eval_dataset: instructions: a file, a dataset or its id, a ``datasets.Dataset`` or
            ``IterableDataset``, a list of dicts, ``Instruction`` objects; or examples that are tokenised already
            (see :func:`.prepare`). ``eval_dataset`` may be a dict of such sets, each of which then has its own loss
            (``eval_{name}_loss``). The evaluation loss is the generation loss.
        data_collator: makes batches of tokenised examples instead of ours; their languages are added to what it
            gives.
        parallel: translations: a file, a dataset or its id, a list of dicts or ``{language: [sentence, ...]}``.
            Needed for the contrastive loss, for vectors that follow training, and for ``final_estimation``.
        space: the language space, estimated on this model, or the shift of another run on it. Needed unless
            ``shift`` is off and ``w_mcl`` is 0.
        kwargs: other arguments of ``Trainer`` (callbacks, optimizers, ...).

    Attributes:
        handle: the attachment; None for a plain run without a space.

    Raises:
        ValueError: something is missing or does not fit; the message names the argument.
    """

    args: ShifConArguments

    def __init__(
        self,
        model: Any,
        args: ShifConArguments,
        *,
        processing_class: Any,
        train_dataset: Instructions | None = None,
        eval_dataset: Instructions | Mapping[str, Instructions] | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        parallel: Parallel | None = None,
        space: LanguageSpace | LanguageShift | None = None,
        **kwargs: Any,
    ) -> None:
        check_liger(args, model)
        keep_4bit_trainable(model)
        if hasattr(model, "active_adapters"):
            warn_of_what_is_not_saved(model)
        attached_before = getattr(model, "shifcon", None)
        shift_before = None if attached_before is None else attached_before.shift
        self.handle = attach_for_training(model, args, space)
        try:
            tokenizer = text_tokenizer(processing_class)
            self._set_up_method(model, args, tokenizer, parallel)
            self._data = self._read_data(
                model, args, tokenizer, train=train_dataset, evaluation=eval_dataset, collator=data_collator
            )
            if self.handle is not None:
                self._data.tell_what_is_in_one_only(
                    self.handle.shift.languages, translations=bool(args.w_mcl)
                )
            super().__init__(
                model=model,
                args=args,
                processing_class=processing_class,
                data_collator=self._data.collator,
                train_dataset=self._data.train,
                eval_dataset=self._data.evaluation,
                **kwargs,
            )
            self._check_pivot_losses()
            self._start_alpha()
        except BaseException:  # leave the model as it came
            if attached_before is not None:
                attached_before.set_shift(shift_before)
            elif self.handle is not None:
                self.handle.detach()
            raise
        self._end_of_turn = end_of_turn(tokenizer, use_chat_template=args.use_chat_template)
        if not self._end_of_turn:
            warn_once(NOTHING_ENDS_A_TURN)
        stop_at(model, self._end_of_turn)
        self.loss_is_scaled_for_ga = True  # compute_loss does it: the two losses need different divisors
        self._meter = LossMeter()
        self._watch = FiniteWatch()
        self._start_language_log(self._data.languages)
        self.add_callback(CheckUnits())
        self.add_callback(KeepCompilable())
        self.add_callback(_StepEnd(self))

    def _set_up_method(self, model: Any, args: ShifConArguments, tokenizer: Any, parallel: Any) -> None:
        languages = None if self.handle is None else self.handle.shift.languages
        self._parallel = None if parallel is None else read_parallel(parallel, languages=languages)
        self._sampler = make_sampler(args, self.handle, self._parallel, tokenizer)
        self._start_vectors(args, model)

    def _read_data(self, model: Any, args: ShifConArguments, tokenizer: Any, **sources: Any) -> TrainingData:
        known, shifted = self._known_languages(args)
        return read_training_data(model, args, tokenizer, known, shifted=shifted, **sources)

    def _known_languages(self, args: ShifConArguments) -> tuple[Sequence[str], bool]:
        """The shift's languages, and whether rows must be in one of them."""
        if self.handle is None:
            return (), False
        return self.handle.shift.languages, args.shift

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """w_gen · L_gen + w_mcl · L_mcl of a micro-batch, scaled for gradient accumulation; in evaluation, L_gen.

        L_gen is the mean over all learnt tokens of the step's micro-batches (and processes), L_mcl the mean over
        its contrastive batches; so are the losses of :mod:`.pivot_keeping`, where they have a weight.
        """
        accumulation = self.current_gradient_accumulation_steps if model.training else 1
        early = model.training and self._sampler is not None and self._goes_early(model)
        if early:  # nothing of it is held any more when the generation pass needs its memory
            contrastive, total = self._contrastive_shares(model, accumulation, early=True)
        inputs = dict(inputs)
        language_ids = inputs.get("language_ids")
        if self.handle is None or not self.args.shift:
            inputs.pop("language_ids", None)
        with nullcontext() if self.handle is None or self.args.shift else self.handle.suspended():
            loss, outputs, tokens = self._generation_loss(
                model, inputs, language_ids, return_outputs, num_items_in_batch
            )
        if tokens is not None and language_ids is not None:
            self._add_language_losses(tokens, language_ids, training=model.training)
        if not model.training:
            return (loss, outputs) if return_outputs else loss
        counts_tokens = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if num_items_in_batch is None or not counts_tokens:
            loss = loss / accumulation
        if not early:
            contrastive, total = self._contrastive_shares(model, accumulation, early=False)
        shares = {"loss_generation": loss}
        if self._sampler is not None and self.args.predicts_pivot:
            batch = self._sampler.batch(*self._micro_batch, rank=self.args.process_index)
            kept = self._pivot_losses(model, batch)
            shares |= {name: each / accumulation for name, each in kept.items()}
        total = total + self._weighted(shares)
        shares = {**shares, **contrastive}
        step, micro = self._micro_batch
        self._watch.note(shares, step + 1, micro)
        for name, share in shares.items():
            self._meter.add(name, share)
        return (total, outputs) if return_outputs else total

    def _weighted(self, shares: Mapping[str, Tensor]) -> Any:
        """The sum of losses' shares, each with its weight; 0 of none."""
        weights = {
            "loss_generation": float(self.args.w_gen or 0),
            "loss_contrastive": float(self.args.w_mcl or 0),
            REPLAY: self.args.w_replay,
            DISTILLATION: self.args.w_distillation,
            ANCHOR: self.args.w_anchor,
        }
        return sum((weights[name] * share for name, share in shares.items()), start=0)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Also has gradients watched that are not finite (float16's scaler handles its own)."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self.accelerator.scaler is None:
            whole = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
            self._watch.note({"gradient norm": whole}, self.state.global_step + 1)
        return norm

    def _check_finite(self, before: int | None = None) -> None:
        """Raise for what was not finite in the steps before one; in all, together with the other processes.

        Raises:
            NonFiniteLossError: something was not.
        """
        problem = self._watch.problem(before)
        if before is None and self._any_process(problem is not None):
            problem = problem or "a loss or gradient of another process is not finite; its error says which"
        if problem is not None:
            raise NonFiniteLossError(problem)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds loss_generation and loss_contrastive, averaged like ``loss`` since the last log line.

        And ``loss_generation_{language}``, the mean over the language's tokens since then.
        """
        if "loss" in logs:
            self._check_finite()
            logs.update(self._meter.drain(lambda total: self.accelerator.gather(total).mean()))
            logs.update(self._training_means())
        super().log(logs, start_time)

    def _end_step(self) -> None:
        """After an optimizer step: new vectors for the next one."""
        self._meter.end_step()
        self._check_finite(before=self.state.global_step)
        self._move_vectors()

    def _any_process(self, this_one: bool) -> bool:
        """Whether it is so in any process; all must ask."""
        if self.args.world_size == 1:
            return this_one
        return bool(self._reduce(torch.tensor(float(this_one))) > 0)

    def _reduce(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``'s, unless a loss was not finite before."""
        self._check_finite()
        return super().evaluation_loop(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As ``Trainer``'s, for data in any form that the trainer takes."""
        return super().get_eval_dataloader(self._data.prepared(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As ``Trainer``'s, for data in any form that the trainer takes."""
        return super().get_test_dataloader(self._data.prepared(test_dataset))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train and write the run folder, with the vectors that training, evaluation and serving share.

        With ``final_estimation`` (the default where ``vectors`` follow the model) they are estimated on the
        trained model, before the last evaluation and checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last one of ``output_dir``. The run goes on
                exactly as if it had never stopped.
            args, kwargs: as for ``Trainer.train``.

        Raises:
            NonFiniteLossError: a loss or gradient became NaN or infinite.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, in this process or another, once the step at hand (several
                processes: the next one) is finished and a checkpoint is saved.
            ValueError: a checkpoint of another run; no training data, or too little for one batch.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(self.args.output_dir))
        elif not resume_from_checkpoint and (Path(self.args.output_dir) / CARD).is_file():
            logger.warning(
                "%s holds a finished run, which shifcon_fast.load goes on reading until this training ends and "
                "replaces it",
                self.args.output_dir,
            )
        if self.train_dataset is None:
            raise ValueError(
                "train_dataset: none given; wanted instructions, whose batches the steps go by (with w_gen=0 only "
                "the translations beside them are learnt)"
            )
        if not self.args.w_gen:
            warn_once("w_gen is 0: instructions are passed through the model for the logged loss alone")
        choose_checkpointing(
            self.accelerator.unwrap_model(self.model),
            self.args,
            longest=getattr(self.train_dataset, "longest", None),
            backward=self.handle.backward if self.handle and self._sampler and self.args.w_mcl else None,
            in_chunks=self._without_logits is not None,
            apart=self._goes_early(self.model),
        )
        self._watch = FiniteWatch()
        with self._watch_for_interrupts():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._raise_if_stopped()
        if self.state.global_step == 0 < self.state.max_steps:
            raise ValueError(
                "train_dataset: not one batch came of it, and nothing was trained; wanted at least "
                f"{self.args.train_batch_size} rows a process (per_device_train_batch_size) where "
                "dataloader_drop_last is set, else one"
            )
        self._finish()
        self._raise_if_asked_too_late()
        return output

    def _finish(self) -> None:
        self._check_finite()
        self._finish_vectors()
        self.save_model()


class _StepEnd(TrainerCallback):
    """Tells the trainer that training begins or an optimizer step is over, and stops it after an interrupt."""

    def __init__(self, trainer: ShifConTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.use_liger_kernel and self._trainer.handle is not None:  # it has just replaced the forward
            name_language_ids(self._trainer.handle.model)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._trainer._end_step()
        if self._trainer._stops():
            control.should_save = True
            control.should_training_stop = True
        return control
