"""Whether a run needs gradient checkpointing: what its activations will take, against what the device has free.

What the blocks leave for their backward pass is measured: one short row goes through the model as it will be
trained (quantised, with adapters, attached), and every tensor that autograd saves is counted once. It grows with
the tokens,

    activations = bytes of a token · max(B · T, pairs' tokens · (b - 1) / L)
    needed      = activations + logits of the loss + gradients and two moments of what is trained

where the two losses' passes follow each other (:mod:`shifcon_fast.objective.early_gradient`); else they add up.
Activations are kept where what is needed is no more than ``SHARE`` of the free memory: a prediction is not a
measurement, and what other programs take is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.attachment import unshifted
from shifcon_fast.modeling.evaluation_mode import evaluation_mode

SHARE = 0.7
"""Of the free memory that may be planned for."""
_LENGTH = 64  # tokens of the row that is measured
_FLOATS_OF_A_LOGIT = 3  # logits, their log probabilities, their gradients, in float32
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Micro:
    """The largest micro-batch that a run can meet, in tokens with their padding.

    Attributes:
        generation: of the instructions.
        contrastive: of the pairs; 0 for none.
        contrastive_share: of the blocks that the pairs go through, (b - 1) / L.
        logits: that are there at once.
        apart: whether the contrastive loss goes through backward before the generation pass.
    """

    generation: int
    contrastive: int = 0
    contrastive_share: float = 0.0
    logits: int = 0
    apart: bool = True


@dataclass(frozen=True)
class Verdict:
    """Whether activations are kept, and why in bytes."""

    needed: int
    free: int

    @property
    def keeps(self) -> bool:
        """Whether what is needed without checkpointing fits."""
        return self.needed <= SHARE * self.free

    def __str__(self) -> str:
        chosen = "off" if self.keeps else "on"
        return (
            f"gradient checkpointing is {chosen}: without it the largest micro-batch is predicted to take "
            f"{self.needed / 2**20:.0f} MiB, {self.free / 2**20:.0f} MiB are free, of which {SHARE:.0%} may be "
            "planned for (load_quantized(..., gradient_checkpointing=True or False) overrules)"
        )


def judge(model: nn.Module, micro: Micro) -> Verdict:
    """Predict what a micro-batch takes without checkpointing, on the model's device."""
    per_token = saved_bytes(model, _LENGTH) / _LENGTH
    contrastive = micro.contrastive * micro.contrastive_share
    tokens = max(micro.generation, contrastive) if micro.apart else micro.generation + contrastive
    trained = sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
    device = next(model.parameters()).device
    needed = per_token * tokens + 4 * _FLOATS_OF_A_LOGIT * micro.logits + 3 * trained
    return Verdict(round(needed), free_bytes(device))


def saved_bytes(model: nn.Module, length: int) -> int:
    """Bytes that the blocks' forward leaves for the backward of one row, besides the model's own weights.

    Without gradient checkpointing, whatever the model is set to; what dropout adds is not counted.
    """
    decoder = locate_decoder(model)
    device = next(decoder.module.get_input_embeddings().parameters()).device  # type: ignore[operator]
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # keeps them, so that no storage is freed and used again

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    tokens = torch.ones(1, length, dtype=torch.long, device=device)
    with (
        evaluation_mode(model),  # in which nothing is checkpointed
        unshifted(decoder.module),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = decoder.module(input_ids=tokens, use_cache=False)
        found = sum(each.untyped_storage().nbytes() for at, each in saved.items() if at not in own)
        del output
    return found


def free_bytes(device: torch.device) -> int:
    """Memory that a process may still take: of a GPU, or of the machine and of the container that it runs in."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return available if limit == "max" else min(available, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return available
