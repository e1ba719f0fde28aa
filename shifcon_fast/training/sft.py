"""``ShifConSFTTrainer``: TRL's ``SFTTrainer`` on the ShifCon objective."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shifcon_fast.extras import needed_for
from shifcon_fast.notices import warn_once
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.batches.language_column import PER_EXAMPLE, PER_TOKEN, LanguageCollator
from shifcon_fast.training.batches.prepared_data import column_names
from shifcon_fast.training.batches.training_data import TrainingData, name_languages
from shifcon_fast.training.batches.trl_columns import LanguageColumns, add_language_ids
from shifcon_fast.training.losses.language_losses import TokenLosses
from shifcon_fast.training.trainer import ShifConTrainer

with needed_for("ShifConSFTTrainer"):
    from trl import SFTConfig, SFTTrainer, pack_dataset


@dataclass
class ShifConSFTConfig(ShifConArguments, SFTConfig):
    """Arguments of :class:`ShifConSFTTrainer`: all of :class:`ShifConArguments` and what ``SFTConfig`` adds.

    What both have (``max_length``, ``learning_rate``, ...) has the recipe's number unless it is given; packing,
    chat template, truncation and what is learnt are TRL's.

    Raises:
        ValueError: a value out of range, or an argument whose work TRL's do here.
    """

    remove_unused_columns: bool | None = field(
        default=True, metadata={"help": "Drop columns of the data that the trainer does not need."}
    )

    def __post_init__(self) -> None:
        for name, instead in (
            ("too_long", "max_length and truncation_mode"),
            ("chunked_cross_entropy", "fused LM head and loss_type"),
            ("use_chat_template", "the form of the rows (text or messages) and chat_template_path"),
        ):
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; here TRL's {instead} decide")
        unlimited = self.padding_free and not self.packing and self.max_length is None
        super().__post_init__()
        if unlimited:  # the only thing that TRL lets pass there
            self.max_length = None


class ShifConSFTTrainer(LanguageColumns, ShifConTrainer, SFTTrainer):
    """``SFTTrainer`` whose generation pass is shifted by each row's language, with the rest of ``ShifConTrainer``.

    Data sets are those of ``SFTTrainer`` (text, messages, prompt and completion, tokenised; table or stream) with
    each row's language in ``args.language_column``. Packing, padding-free batches, completion-only and
    assistant-only losses, and chat templates are TRL's; a packed row may hold several languages, whose tokens then
    have an id each. Contrastive loss, losses by language, run folder and resuming are ``ShifConTrainer``'s.

    Args:
        model, args, processing_class, parallel, space: as for :class:`ShifConTrainer`; args is a
            :class:`ShifConSFTConfig`. TRL sets the tokenizer's padding token where it has none.
        train_dataset, eval_dataset: as above; ``eval_dataset`` may be a dict.
        kwargs: other arguments of ``SFTTrainer``, but for ``peft_config``: give a PEFT model.

    Raises:
        ValueError: something is missing or does not fit; the message names the argument.
    """

    args: ShifConSFTConfig
    data_collator: Any

    def __init__(self, model: Any, args: ShifConSFTConfig, **kwargs: Any) -> None:
        if kwargs.get("peft_config") is not None:
            raise ValueError(
                "peft_config: not taken here, since the shift is attached to a model with its adapter; wanted "
                "model=get_peft_model(model, peft_config), or load_quantized(..., lora=...)"
            )
        super().__init__(model, args, **kwargs)
        self.data_collator = LanguageCollator(self.data_collator)

    def _read_data(self, model: Any, args: ShifConArguments, tokenizer: Any, **sources: Any) -> TrainingData:
        """Nothing is read here: TRL does, by :meth:`_prepare_dataset`."""
        known, shifted = self._known_languages(args)
        train, evaluation = sources["train"], sources["evaluation"]
        languages, language_id = name_languages(known, args, train, evaluation, shifted=shifted)
        return TrainingData(languages, language_id, sources["collator"], train, evaluation)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: ShifConSFTConfig, packing: bool, *rest: Any
    ) -> Any:
        """TRL's, with the languages of the rows; packed, with one for each token."""
        _, shifted = self._known_languages(args)
        dataset = add_language_ids(dataset, args.language_column, self._data.language_id, wanted=shifted)
        if not packing:
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        whole = copy.copy(args)  # TRL packs input_ids and labels only, so it prepares and we pack
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, *rest)
        if PER_TOKEN not in column_names(dataset):
            dataset = dataset.map(_spread, batched=True)
        dataset = dataset.select_columns(["input_ids", "labels", PER_TOKEN])
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        assert args.max_length is not None  # the recipe has one
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _reject_skip_prepare_without_labels(self, datasets: Any, data_collator: Any) -> None:
        super()._reject_skip_prepare_without_labels(
            datasets, getattr(data_collator, "collator", data_collator)
        )

    def _make_loss_without_logits(self) -> None:
        """TRL has its own."""

    def _generation_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        language_ids: Tensor | None,
        return_outputs: bool,
        num_items_in_batch: Any,
    ) -> tuple[Any, Any, TokenLosses | None]:
        with _token_log_probabilities(model) as seen:
            result = SFTTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        if not self.args.language_losses:
            return loss, outputs, None
        if not seen:
            warn_once(
                "No losses by language: TRL's fused head did not run. language_losses=False says it is meant."
            )
            return loss, outputs, None
        log_probs, learnt = seen[-1]
        return loss, outputs, TokenLosses(-log_probs.detach().float(), learnt)


def _spread(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """An id per row as an id per token."""
    rows = zip(batch[PER_EXAMPLE], batch["input_ids"], strict=True)
    return {PER_TOKEN: [[language] * len(ids) for language, ids in rows]}


@contextmanager
def _token_log_probabilities(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What TRL's fused head gives inside, (B, T-1) each: log probabilities, and which tokens are learnt."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        if getattr(output, "log_probs", None) is not None:
            seen.append((output.log_probs, output.label_mask))

    hook = model.register_forward_hook(see)
    try:
        yield seen
    finally:
        hook.remove()
