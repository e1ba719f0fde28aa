"""A trainer's generation loss, with or without logits, and its losses and metrics by language, in its log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import EvalPrediction

from shifcon_fast.notices import warn_once
from shifcon_fast.training.losses.language_losses import (
    LanguageLosses,
    LanguageSums,
    TokenLosses,
    token_losses,
)
from shifcon_fast.training.losses.learnt_tokens import take_learnt
from shifcon_fast.training.losses.loss_without_logits import (
    LossWithoutLogits,
    loss_without_logits,
    say_why_with_logits,
)

Metrics = Callable[[EvalPrediction], Mapping[str, Any]]


class LanguageLog:
    """Mixin of trainers: takes the losses of tokens as they are computed, and logs their means by language.

    What ``compute_metrics`` gives is given for each language too (``eval_accuracy_sw``).
    """

    args: Any
    accelerator: Any
    compute_metrics: Any
    compute_loss_func: Any
    model: Any

    def _start_language_log(self, languages: Sequence[str]) -> None:
        self._languages = tuple(languages)
        self._training_losses = LanguageLosses(self._languages)
        self._evaluation_losses = LanguageLosses(self._languages)
        self._evaluated: list[
            Tensor
        ] = []  # language ids of the rows of an evaluation, in the order of its rows
        self._without_logits = self._make_loss_without_logits()
        self._outputs_are_dropped = False

    def _make_loss_without_logits(self) -> LossWithoutLogits | None:
        own = None if self.compute_loss_func is None else "compute_loss_func"
        return loss_without_logits(self.args, self.model, own_loss=own)

    def _generation_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        language_ids: Tensor | None,
        return_outputs: bool,
        num_items_in_batch: Any,
    ) -> tuple[Any, Any, TokenLosses | LanguageSums | None]:
        """L_gen of a micro-batch, the model's outputs, and L_gen by token or language for ``language_losses``."""
        learnt = take_learnt(inputs)
        labels = inputs.get("labels")
        chunked = self._without_logits
        outputs_are_wanted = return_outputs and not self._outputs_are_dropped
        if chunked is not None and labels is not None and not outputs_are_wanted:
            with chunked.engaged(language_ids if self.args.language_losses else None, learnt) as found:
                loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)  # type: ignore[misc]
            if found.problem is None:
                return loss, outputs, found.losses
            self._without_logits = None
            say_why_with_logits(self.args, found.problem)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
        if not self.args.language_losses or labels is None:
            return loss, outputs, None
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if logits is None:
            warn_once(
                "No losses by language: the model gives no logits (a fused loss such as Liger's does not). "
                "language_losses=False says that this is meant."
            )
            return loss, outputs, None
        return loss, outputs, token_losses(logits, labels)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As ``Trainer``'s; where predictions are asked for, the loss is taken from their logits."""
        self._outputs_are_dropped = prediction_loss_only
        if self._without_logits is not None and not prediction_loss_only:
            warn_once(
                "chunked_cross_entropy: this evaluation makes all logits, since its predictions are asked for "
                "(compute_metrics or predict)"
            )
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        finally:
            self._outputs_are_dropped = False

    def _add_language_losses(
        self, tokens: TokenLosses | LanguageSums, language_ids: Tensor, *, training: bool
    ) -> None:
        losses = self._training_losses if training else self._evaluation_losses
        rows = losses.rows(tokens, language_ids)
        if not training and self.args.world_size > 1:  # without the rows that fill up the last batch
            rows = self.accelerator.gather_for_metrics(rows)
            if language_ids.dim() == 1:
                language_ids = self.accelerator.gather_for_metrics(language_ids)
        losses.add(rows)
        if not training and self.compute_metrics is not None:
            self._evaluated.append(language_ids)

    def _training_means(self) -> dict[str, float]:
        """``loss_generation_{language}``, means over the tokens since the last call."""
        means = self._training_losses.drain(lambda sums: self.accelerator.reduce(sums, reduction="sum"))
        return {f"loss_generation_{language}": mean for language, mean in means.items()}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``'s, with ``eval_loss_{language}`` and the metrics of each language."""
        self._evaluation_losses = LanguageLosses(self._languages)
        self._evaluated = []
        compute = self.compute_metrics
        if compute is not None and self.args.language_losses and not self.args.batch_eval_metrics:
            self.compute_metrics = lambda prediction: self._by_language(compute, prediction)
        try:
            output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.compute_metrics = compute
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._evaluation_losses.drain(lambda sums: sums)  # every process has those of all
        output.metrics.update({f"{prefix}_loss_{language}": mean for language, mean in means.items()})
        return output

    def _by_language(self, compute: Metrics, prediction: EvalPrediction) -> dict[str, Any]:
        metrics = dict(compute(prediction))
        if any(ids.dim() != 1 for ids in self._evaluated) or not self._evaluated:
            warn_once("No metrics by language: rows hold several languages (packed), or no losses are known.")
            return metrics
        ids = np.concatenate([each.cpu().numpy() for each in self._evaluated])
        for position, language in enumerate(self._languages):
            rows = np.flatnonzero(ids == position)
            if len(rows):
                own = compute(
                    EvalPrediction(_take(prediction.predictions, rows), _take(prediction.label_ids, rows))
                )
                metrics |= {f"{name}_{language}": value for name, value in own.items()}
        return metrics


def _take(values: Any, rows: np.ndarray) -> Any:
    """Some rows of what ``Trainer`` gathers: an array, or a tuple, list or dict of them."""
    if isinstance(values, Mapping):
        return {name: _take(each, rows) for name, each in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_take(each, rows) for each in values)
    return values[rows]
