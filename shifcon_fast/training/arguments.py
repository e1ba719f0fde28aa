"""Arguments of a ShifCon training run: those of ``transformers.TrainingArguments``, and the method's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import torch
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from shifcon_fast.extras import missing
from shifcon_fast.notices import warn_once
from shifcon_fast.objective.recipe import RECIPES, MclMode
from shifcon_fast.space.intervention import check_intervention

# Arguments whose default is the recipe's, and the recipe's name for them where it differs.
_FROM_RECIPE = {
    "w_gen": "w_gen",
    "w_mcl": "w_mcl",
    "mcl_mode": "mcl_mode",
    "temperature": "temperature",
    "contrastive_batch_size": "contrastive_batch_size",
    "mixed_languages": "mixed_languages",
    "vectors": "vectors",
    "running_sums": "running_sums",
    "running_dtype_of_model": "running_dtype_of_model",
    "max_length": "max_length",
    "max_length_pivot": "max_length_pivot",
    "max_length_other": "max_length_other",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler_type",
    "warmup_steps": "warmup",
    "num_train_epochs": "num_train_epochs",
    "per_device_train_batch_size": "per_device_train_batch_size",
}
_CHOICES = {
    "recipe": tuple(RECIPES),
    "mcl_mode": get_args(MclMode),
    "vectors": ("frozen", "ema", "refresh", "running"),
    "too_long": ("truncate", "drop", "error"),
    "chunked_cross_entropy": ("auto", "on", "off"),
}
_AT_LEAST = {
    "contrastive_batch_size": 2,
    "contrastive_mini_batch_size": 1,
    "refresh_every": 1,
    "estimation_batch_size": 1,
    "max_length": 2,
    "max_length_pivot": 2,
    "max_length_other": 2,
}


def _default_report_to() -> str:
    if is_tensorboard_available():
        return "tensorboard"
    warn_once(
        "report_to: tensorboard is not installed, so the losses are in training_log.json alone (pip install "
        '"shifcon-fast[cli]" brings it; report_to="none" says that this is meant)'
    )
    return "none"


_OF_THE_SHIFT = ("alpha", "intervention", "targets")


@dataclass
class ShifConArguments(TrainingArguments):
    """Arguments of :class:`ShifConTrainer`.

    An argument left at None takes the recipe's number (see ``objective.recipe``); after construction none of those
    is None any more, nor is ``final_estimation``, which then is whether ``vectors`` follow the model. With
    ``shift=False`` and ``w_mcl=0`` the run is plain (Q)LoRA fine-tuning.

    Raises:
        ValueError: a value out of range; the message names the argument.
    """

    recipe: str = field(default="stable", metadata={"help": "stable, or official (the authors' numerics)."})
    shift: bool = field(
        default=True, metadata={"help": "Shift the generation pass by each row's language; generation too."}
    )
    forward: int | None = field(
        default=None, metadata={"help": "Boundary of the shift toward the pivot. Default: recommended."}
    )
    backward: int | None = field(
        default=None, metadata={"help": "Boundary of the shift back. Default: recommended."}
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Length of the shift, in vector differences. Default: 1, or what the model is attached with."
        },
    )
    intervention: str | None = field(
        default=None,
        metadata={
            "help": "The way to move hidden states: mean (ShifCon's shift), random, centre, subspace, affine or "
            "procrustes. Default: mean, or what the model is attached with."
        },
    )
    targets: list[str] | None = field(
        default=None,
        metadata={"help": "Languages whose barycentre is shifted to. Default: the pivot alone."},
    )
    learn_alpha: bool = field(
        default=False,
        metadata={"help": "Learn alpha with the adapters: a factor for each language, 1 at first."},
    )
    alpha_learning_rate: float = field(
        default=3e-3,
        metadata={"help": "Peak learning rate of a learnt alpha, which has no weight decay."},
    )
    pivot: str = field(default="en", metadata={"help": "The dominant language."})
    w_gen: float | None = field(default=None, metadata={"help": "Weight of the generation loss."})
    w_mcl: float | None = field(
        default=None, metadata={"help": "Weight of the contrastive loss; 0 skips its pass."}
    )
    w_replay: float = field(
        default=0.0,
        metadata={
            "help": "Weight of predicting the pivot sentences of the parallel text, which keeps the pivot."
        },
    )
    w_distillation: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the divergence from the base model on the pivot sentences of the parallel text."
        },
    )
    w_anchor: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the distance of pivot sentences from where the base model has them, at forward and "
            "backward."
        },
    )
    mcl_mode: str | None = field(
        default=None,
        metadata={
            "help": "shifted (contrast a shifted pass), pooled (re-centre an unshifted one) or unshifted."
        },
    )
    anchor_pivot: bool = field(
        default=False,
        metadata={
            "help": "In the contrastive loss, pivot sentences are targets alone: no gradient goes through them."
        },
    )
    standardise_contrast: bool = field(
        default=False,
        metadata={
            "help": "Contrast representations less their mean over the batch, each dimension over its standard "
            "deviation. Not with mcl_mode=pooled."
        },
    )
    temperature: float | None = field(default=None, metadata={"help": "Temperature of the contrastive loss."})
    contrastive_batch_size: int | None = field(
        default=None, metadata={"help": "Translation pairs per process and micro-batch."}
    )
    contrastive_mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs in one pass of the contrastive loss. With fewer than contrastive_batch_size it takes "
            "several, the memory of one, and gives the same loss and gradients. Default: all in one pass."
        },
    )
    gather_across_devices: bool = field(
        default=False,
        metadata={"help": "Contrast each pair with those of all processes, not of its own alone."},
    )
    mixed_languages: bool | None = field(
        default=None,
        metadata={
            "help": "Pairs of several languages in one contrastive batch. Default: unless mcl_mode is pooled."
        },
    )
    vectors: str | None = field(
        default=None,
        metadata={
            "help": "How language vectors follow the model: frozen, ema, refresh or running (the authors')."
        },
    )
    ema_decay: float = field(default=0.99, metadata={"help": "Decay per optimizer step of vectors=ema."})
    refresh_every: int = field(
        default=100, metadata={"help": "Optimizer steps between estimates of vectors=refresh."}
    )
    running_sums: bool | None = field(
        default=None,
        metadata={"help": "vectors=running: shift by undivided sums in training, as the authors' code."},
    )
    running_dtype_of_model: bool | None = field(
        default=None,
        metadata={"help": "vectors=running: accumulate in the model's dtype, as the authors' code."},
    )
    final_estimation: bool | None = field(
        default=None,
        metadata={
            "help": "Estimate the language space again on the trained model. Default: only if vectors follow the "
            "model (not frozen): adapters have learnt around frozen ones, which therefore stay."
        },
    )
    estimation_sentences: int | None = field(
        default=None,
        metadata={
            "help": "Sentences per language for estimates in and after training. Default: as the space has."
        },
    )
    estimation_batch_size: int = field(default=16, metadata={"help": "Batch size of those estimates."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of an instruction with its response; the model's context if shorter."},
    )
    max_length_pivot: int | None = field(default=None, metadata={"help": "Tokens kept of a pivot sentence."})
    max_length_other: int | None = field(
        default=None, metadata={"help": "Tokens kept of a sentence in another language."}
    )
    too_long: str = field(
        default="truncate",
        metadata={"help": "Instructions beyond max_length: truncate (at the end), drop, or error."},
    )
    use_chat_template: bool = field(
        default=True, metadata={"help": "Use the tokenizer's chat template, if it has one."}
    )
    language_column: str = field(
        default="lang", metadata={"help": "Column of the instructions that holds each row's language."}
    )
    language_losses: bool = field(
        default=True,
        metadata={"help": "Log the generation loss of each language too, in training and in evaluation."},
    )

    chunked_cross_entropy: str = field(
        default="auto",
        metadata={
            "help": "Generation loss of the learnt tokens alone, without all logits: auto (unless something needs "
            "them), on (or an error), off."
        },
    )

    learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str | None = field(default=None, metadata={"help": "Learning rate schedule."})
    warmup_steps: float | None = field(
        default=None, metadata={"help": "Warm-up steps, or below 1 their share of all steps."}
    )
    num_train_epochs: float | None = field(default=None, metadata={"help": "Passes over the instructions."})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Instructions per process and micro-batch."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between logged losses."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not used: a loss that is not finite ends the run."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 - HfArgumentParser takes the second
        default=None,
        metadata={"help": "Where to log: tensorboard, wandb, none, ... Default: tensorboard, if installed."},
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume callbacks, such as early stopping, where they were."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Not used: batches hold what the trainer needs."}
    )
    # As in transformers from 5.20 on; before it False was the default, and no wish could be told from it.
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Run blocks again in the backward pass. Default: as the model was loaded, or by what fits.",
            "nargs": "?",
            "const": True,
        },
    )

    def __post_init__(self) -> None:
        # YAML and TOML read on and off as truth values.
        switch = str(self.chunked_cross_entropy).lower()
        self.chunked_cross_entropy = {"true": "on", "false": "off"}.get(switch, switch)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name in _FROM_RECIPE):
                raise ValueError(f"{name}: got {value!r}; wanted one of {', '.join(choices)}")
        recipe = RECIPES[self.recipe]
        mode_was_given = self.mcl_mode is not None
        for name, source in _FROM_RECIPE.items():
            if getattr(self, name) is None:
                value = getattr(recipe, source)
                if name == "mixed_languages" and mode_was_given:
                    value = self.mcl_mode != "pooled"
                setattr(self, name, value)
        if self.final_estimation is None:
            self.final_estimation = self.vectors != "frozen" and bool(self.shift or self.w_mcl)
        if recipe.area is not None and self.forward is None and self.backward is None:
            self.forward, self.backward = recipe.area
        self._check()
        # It would stop each process at a step of its own.
        if getattr(self, "enable_jit_checkpoint", False):
            self.enable_jit_checkpoint = False
            warn_once(
                "enable_jit_checkpoint: not used; SIGTERM saves a checkpoint and stops the run without it"
            )
        if self.report_to is None:
            self.report_to = _default_report_to()
        elif "tensorboard" in self.report_to and not is_tensorboard_available():
            raise missing("report_to: tensorboard", "tensorboard", "cli")
        self._checkpointing_wish = self._read_checkpointing_wish()
        super().__post_init__()
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False

    def _read_checkpointing_wish(self) -> bool | None:
        names = ("activation_checkpointing", "gradient_checkpointing")
        given = [getattr(self, name) for name in names if getattr(self, name, None) is not None]
        return bool(given[0]) if given else None

    @property
    def checkpointing_wish(self) -> bool | None:
        """``gradient_checkpointing`` as it was given; None where it was not, and memory decides."""
        return self._checkpointing_wish

    def _check(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value}; wanted {least} or more")
        for name in ("w_gen", "w_mcl", "w_replay", "w_distillation", "w_anchor"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"{name}: got {value}; wanted 0 or more")
        if self.w_gen == 0 and self.w_mcl == 0:
            raise ValueError("w_gen, w_mcl: both are 0; wanted at least one loss to train on")
        if self.standardise_contrast and self.mcl_mode == "pooled":
            raise ValueError(
                "standardise_contrast: got True with mcl_mode='pooled', which re-centres unit vectors; wanted "
                "mcl_mode shifted or unshifted, or standardise_contrast=False"
            )
        if not (math.isfinite(self.temperature or 0) and (self.temperature or 0) > 0):
            raise ValueError(f"temperature: got {self.temperature}; wanted a positive number")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ValueError(f"alpha: got {self.alpha}; wanted a number")
        if self.intervention is not None:
            check_intervention(self.intervention)
        self._check_learn_alpha()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay}; wanted 0 <= ema_decay < 1")
        if (self.forward is None) != (self.backward is None):
            raise ValueError(
                f"forward, backward: got {self.forward} and {self.backward}; wanted both, or neither to have them "
                "recommended"
            )
        if self.forward is not None and self.backward is not None and self.forward >= self.backward:
            raise ValueError(
                f"forward, backward: got {self.forward} and {self.backward}; wanted forward < backward"
            )

    def _check_learn_alpha(self) -> None:
        rate = self.alpha_learning_rate
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"alpha_learning_rate: got {rate}; wanted a positive number")
        if not self.learn_alpha:
            return
        why = None
        if not self.shift:
            why = "shift=False, which leaves generation without an alpha; wanted shift=True"
        elif self.alpha == 0:
            why = "alpha=0, with which nothing is shifted; wanted another alpha, such as 1"
        elif not self.w_gen and self.mcl_mode != "shifted":
            why = f"w_gen=0 and mcl_mode={self.mcl_mode!r}, of which no loss depends on alpha; wanted w_gen above 0"
        if why is not None:
            raise ValueError(f"learn_alpha: got True with {why}, or learn_alpha=False")

    @property
    def keeps_pivot(self) -> bool:
        """Whether a loss over the pivot's sentences is trained on."""
        return bool(self.predicts_pivot or self.w_anchor)

    @property
    def predicts_pivot(self) -> bool:
        """Whether one of them needs the whole model's predictions."""
        return bool(self.w_replay or self.w_distillation)

    def method_settings(self) -> dict[str, Any]:
        """The method's own arguments with their values, JSON-able, for the run folder.

        Without those that the folder's card has from the attachment.
        """
        inherited = {each.name for each in fields(TrainingArguments)}
        own = [
            each.name
            for each in fields(ShifConArguments)  # and not what a subclass has of another library
            if (each.name not in inherited or each.name in _FROM_RECIPE) and each.name not in _OF_THE_SHIFT
        ]
        return {name: getattr(getattr(self, name), "value", getattr(self, name)) for name in own}
