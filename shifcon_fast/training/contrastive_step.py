"""A trainer's translation pairs, micro-batch by micro-batch, and the losses that are taken of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.objective.early_gradient import can_go_early, with_gradient_now
from shifcon_fast.objective.mcl import ContrastiveBatch, mcl_loss
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.batches.contrastive_data import ContrastiveSampler
from shifcon_fast.training.losses.pivot_keeping import (
    ANCHOR,
    anchor_loss,
    base_representations,
    pivot_losses,
    pivot_representations,
)


class ContrastiveTrainer:
    """Mixin of trainers: beside its instructions, each micro-batch has a batch of pairs of its own."""

    args: ShifConArguments
    handle: ShiftHandle | None
    state: Any
    accelerator: Any
    current_gradient_accumulation_steps: int
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _follow: Any
    _follow_in_passing: Any
    _weighted: Any
    _sampler: ContrastiveSampler | None
    _micro_batch = (-1, 0)  # (global step, micro-batch in it)

    def _check_pivot_losses(self) -> None:
        """Once the accelerator is there.

        Raises:
            ValueError: sharded weights, with a loss that runs the decoder and the head by themselves.
        """
        if self.is_fsdp_enabled and self.args.predicts_pivot:
            raise ValueError(
                "w_replay, w_distillation: not under FSDP, whose weights are gathered for the model's own forward "
                "alone; wanted 0, or another way to train on several devices (DDP)"
            )

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        step, micro = self._micro_batch
        here = self.state.global_step
        self._micro_batch = (here, micro + 1 if step == here else 0)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._prepare_next_pairs()
        return loss

    def _prepare_next_pairs(self) -> None:
        """Now that the device has been given this micro-batch's work, and computes."""
        if self._sampler is None:
            return
        step, micro = self._micro_batch
        ends = micro + 1 >= self.current_gradient_accumulation_steps
        if not ends or step + 1 < self.state.max_steps:
            following = (step + 1, 0) if ends else (step, micro + 1)
            self._sampler.prepare(*following, rank=self.args.process_index)

    def _goes_early(self, model: Any) -> bool:
        """Whether the contrastive loss goes through backward before the generation pass.

        Not where weights are sharded, whose root must run first; not with float16's scaler, as gradients would be
        too small without it.
        """
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return not sharded and self.accelerator.scaler is None and can_go_early(_trained(model))

    def _contrastive_shares(
        self, model: Any, accumulation: int, *, early: bool
    ) -> tuple[dict[str, Tensor], Any]:
        """A micro-batch's shares of the step's L_mcl and L_anchor, and their weighted sum, 0 of none.

        The vectors take note of its sentences.
        """
        if self._sampler is None:
            return {}, 0
        batch = self._sampler.batch(*self._micro_batch, rank=self.args.process_index)
        follow, shares = self._follow_in_passing(model, batch), {}
        seen: list[Tensor] = []
        if self.args.w_mcl:
            see = seen.append if self.args.w_anchor and self._passes_pivot_unshifted else None
            shares["loss_contrastive"] = self._contrastive_loss(model, batch, follow, see) / accumulation
        if self.args.w_anchor:
            shares[ANCHOR] = self._anchor_loss(model, batch, *seen) / accumulation
        weighted = self._weighted(shares)
        if early and shares:
            weighted = with_gradient_now(weighted, _trained(model))
            shares = {name: share.detach() for name, share in shares.items()}
        if follow is None:
            self._follow(model, batch)
        return shares, weighted

    @property
    def _passes_pivot_unshifted(self) -> bool:
        """Whether the contrastive pass does."""
        assert self.handle is not None
        return self.args.mcl_mode != "shifted" or not self.handle.moves_pivot

    def _contrastive_loss(
        self,
        model: Any,
        batch: ContrastiveBatch,
        follow: Callable[[Tensor], None] | None = None,
        see_pivot: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        assert self.handle is not None
        return mcl_loss(
            self.accelerator.unwrap_model(model),
            batch,
            self.handle,
            mode=self.args.mcl_mode,  # type: ignore[arg-type]
            temperature=float(self.args.temperature or 1.0),
            anchor_pivot=self.args.anchor_pivot,
            standardise=self.args.standardise_contrast,
            mini_batch_size=self.args.contrastive_mini_batch_size,
            gather_across_devices=self.args.gather_across_devices,
            pairs_by_process=[batch["input_ids"].shape[0] // 2] * self.args.world_size,
            follow=follow,
            see_pivot=see_pivot,
        )

    def _anchor_loss(self, model: Any, batch: ContrastiveBatch, pivot: Tensor | None = None) -> Tensor:
        """L_anchor, with the pivot's representations where the contrastive pass has them."""
        assert self.handle is not None
        area = (self.handle.forward, self.handle.backward)
        unwrapped = self.accelerator.unwrap_model(model)
        massive = self.handle.recipe == "official"
        if pivot is None:
            pivot = pivot_representations(unwrapped, batch, area, keep_massive=massive)
        return anchor_loss(pivot, base_representations(unwrapped, batch, area, keep_massive=massive))

    def _pivot_losses(self, model: Any, batch: ContrastiveBatch) -> dict[str, Tensor]:
        return pivot_losses(
            self.accelerator.unwrap_model(model),
            batch,
            replay=bool(self.args.w_replay),
            distillation=bool(self.args.w_distillation),
        )


def _trained(model: Any) -> list[Any]:
    return [weight for weight in model.parameters() if weight.requires_grad]
