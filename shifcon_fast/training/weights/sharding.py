"""Weights of which each process holds a part: FSDP2 (``torch.distributed.fsdp.fully_shard``) and DeepSpeed ZeRO-3.

accelerate shards; what is here sees to it that it does, in units that the contrastive pass can run by themselves,
and brings together what a run folder needs. The contrastive pass runs the embedding and the lower blocks without
the model around them, whose hooks therefore gather nothing for it: each block has to be a unit of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.fingerprint import model_fingerprint
from shifcon_fast.training.weights.adapter_files import saved_weights
from shifcon_fast.training.weights.quantization import fsdp_is_asked_for


@dataclass(frozen=True)
class Gathered:
    """What a run folder needs of a sharded model, the same on every process.

    Attributes:
        weights: those that the adapter's file holds, by their names in the model, whole and on the CPU.
        fingerprint: of the model, see :func:`.model_fingerprint`.
    """

    weights: dict[str, Tensor]
    fingerprint: dict[str, Any]


def check_fsdp_version(plugin_arguments: Mapping[str, Any] | None) -> None:
    """Refuse FSDP1, before accelerate makes its plugin, which has errors of its own.

    Args:
        plugin_arguments: ``TrainingArguments.fsdp_plugin_args``; None where they are the environment's.

    Raises:
        ValueError: FSDP1 was asked for.
    """
    if plugin_arguments is None and not fsdp_is_asked_for():
        return
    version = int((plugin_arguments or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    if version != 2:
        raise ValueError(
            f"fsdp_version: got {version}; wanted 2: FSDP1 flattens a block's frozen 4-bit weights and adapters "
            "into one parameter"
        )


class ShardedTrainer:
    """Mixin of trainers: what their accelerator shards is what was asked for, or refused."""

    args: Any
    accelerator: Any
    is_fsdp_enabled: bool

    def create_accelerator_and_postprocess(self) -> None:
        check_fsdp_version(self.args.fsdp_plugin_args)
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        check_processes(self.accelerator)
        if engage_fsdp(self.accelerator, self.args.fsdp_plugin_args):
            self.is_fsdp_enabled = True


class CheckUnits(TrainerCallback):
    """See :func:`check_units`, once the model is sharded; and it is the root of its units from then on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_units(model)
        if isinstance(model, FSDPModule):
            # FSDP2 takes for the root what runs first, and that may be a block of the contrastive pass.
            model._get_fsdp_state()._lazy_init()


def check_processes(accelerator: Any) -> None:
    """See to it that accelerate knows of all processes.

    Raises:
        ValueError: it takes each of several for the only one, as accelerate (1.15) does with DeepSpeed on the CPU:
            each would read the same rows and count its own tokens alone.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() != accelerator.num_processes:
        raise ValueError(
            f"accelerate: takes each of {dist.get_world_size()} processes for one of {accelerator.num_processes} "
            f"({accelerator.state.distributed_type.value}, {accelerator.device}); wanted another engine here: "
            "DeepSpeed needs a GPU, DDP and FSDP2 run on the CPU as well"
        )


def engage_fsdp(accelerator: Any, plugin_arguments: Mapping[str, Any] | None) -> bool:
    """Have accelerate shard where FSDP was asked for; True if this had to be said to it.

    On the CPU accelerate (1.15) takes FSDP's arguments and trains with DDP, without a word. The code that it leaves
    out runs there as it is.

    Args:
        accelerator: as ``Trainer`` has made it.
        plugin_arguments: ``TrainingArguments.fsdp_plugin_args``; None where they are the environment's.

    Raises:
        ValueError: FSDP was asked for and cannot be had, or in a way that does not train what was meant.
    """
    if not fsdp_is_asked_for():
        return False
    state = accelerator.state
    if state.distributed_type == DistributedType.FSDP:
        _check_plugin(state.fsdp_plugin)
        return False
    if state.distributed_type != DistributedType.MULTI_CPU:
        raise ValueError(
            f"fsdp: asked for, but accelerate runs as {state.distributed_type.value} on {state.num_processes} "
            "process(es), where it shards nothing; wanted several, as accelerate launch or torchrun start them"
        )
    plugin = FullyShardedDataParallelPlugin(**(plugin_arguments or {}))
    _check_plugin(plugin)
    PartialState().distributed_type = DistributedType.FSDP  # which every new AcceleratorState copies
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    return True


def _check_plugin(plugin: Any) -> None:
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing: it wraps the blocks, which are then run without their shift; wanted "
            "gradient_checkpointing (load_quantized turns it on)"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: all processes but one have no weights to begin with, and the language "
            "space is estimated and checked on every process; wanted false"
        )


def check_units(model: nn.Module) -> None:
    """See to it that a model under FSDP2 is sharded block by block.

    Raises:
        ValueError: a policy cuts a block in two, or leaves blocks to a larger unit; or 4-bit weights would stay
            whole on every process.
    """
    if not isinstance(model, FSDPModule):
        return
    decoder = locate_decoder(model)
    for index, block in enumerate(decoder.blocks):
        parts = [name for name, each in block.named_modules() if name and isinstance(each, FSDPModule)]
        if parts:
            raise ValueError(
                f"fsdp: its policy cuts block {index} in two at {parts[0]}; {_policy(decoder.blocks[0])}"
            )
        if not isinstance(block, FSDPModule):
            raise ValueError(
                f"fsdp: block {index} is no unit of its own, and the contrastive pass runs blocks by themselves; "
                f"{_policy(decoder.blocks[0])}"
            )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "Params4bit" and not isinstance(parameter.data, DTensor):
            raise ValueError(
                f"fsdp: the 4-bit weight {name} is stored as {parameter.dtype}, which FSDP2 leaves whole on every "
                "process; wanted load_quantized(..., quant_storage=) with the dtype of the other weights"
            )


def _policy(block: nn.Module) -> str:
    cls = type(block).__name__.removeprefix("FSDP")
    return f"wanted auto_wrap_policy TRANSFORMER_BASED_WRAP with transformer_layer_cls_to_wrap {cls}"


def gather_weights(model: nn.Module) -> Gathered | None:
    """Bring together what a run folder needs of a sharded model; None for one that each process has whole.

    Every process must call this.
    """
    if not any(_is_part(parameter) for parameter in model.parameters()):
        return None
    with _together(model.get_input_embeddings().parameters()):  # type: ignore[operator]
        fingerprint = model_fingerprint(model)
    return Gathered({name: _whole(each) for name, each in saved_weights(model).items()}, fingerprint)


def _is_part(parameter: Tensor) -> bool:
    return (
        isinstance(parameter, DTensor) or isinstance(parameter.data, DTensor) or hasattr(parameter, "ds_id")
    )


def _whole(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach().cpu()
    with _together([parameter]):
        return parameter.detach().cpu().clone()


def _together(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Inside, parameters that ZeRO-3 has taken apart are whole."""
    apart = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not apart:
        return nullcontext()
    deepspeed = sys.modules["deepspeed"]  # which has taken them apart
    return deepspeed.zero.GatheredParameters(apart)
