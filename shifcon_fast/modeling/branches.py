"""What a block computes between its norms, where that is not ``self_attn`` and ``mlp``: callables for table rows.

A *mixer* gets the block, the normed hidden states (B, T, d) and the block's keyword arguments; it returns the
branch and the attention weights (None where there are none). A *feed-forward* gets the block, the normed hidden
states, the residual stream that they are the norm of, and ``norm``, which sends a further norm of the block, given
by its name, through the operator. A *finish* gets the block, what it would return, the arguments and ``norm``.

Each hands a submodule what transformers' own block hands it, in every version that is supported. A block's
``past_key_values`` is called ``cache`` from 5.24 on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Arguments = dict[str, Any]
Norm = Callable[[str, Tensor], Tensor]
Mixer = Callable[[Any, Tensor, Arguments], tuple[Tensor, Tensor | None]]
FeedForward = Callable[[Any, Tensor, Tensor, Norm], Tensor]
Finish = Callable[[Any, Tensor, Arguments, Norm], Tensor]

_ATTENTION_ONLY = ("position_ids", "position_embeddings", "use_cache")


def attention(block: Any, y: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor | None]:
    """``block.self_attn``."""
    branch, weights = block.self_attn(hidden_states=y, **arguments)
    return branch, weights


def attention_without(*names: str) -> Mixer:
    """``block.self_attn`` without arguments that the block keeps to itself."""

    def mix(block: Any, y: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor | None]:
        return attention(block, y, _without(arguments, names))

    return mix


def recurrent_or_attention(name: str, cache: str = "cache_params") -> Mixer:
    """The recurrent mixer ``block.<name>`` in the blocks that have one, ``block.self_attn`` in the others.

    Args:
        name: attribute of the block.
        cache: what the recurrent mixer calls the block's ``past_key_values``.
    """

    def mix(block: Any, y: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor | None]:
        recurrent = getattr(block, name, None)
        if recurrent is None:
            return attention(block, y, arguments)
        given = _without(arguments, _ATTENTION_ONLY)
        if "past_key_values" in given:
            given[cache] = given.pop("past_key_values")
        named = _named_parameters(type(recurrent))
        if named is not None:
            given = {key: value for key, value in given.items() if key in named}
        return recurrent(hidden_states=y, **given), None

    return mix


@torch.compiler.assume_constant_result
def _named_parameters(module: type[nn.Module]) -> tuple[str, ...] | None:
    """What a module's forward takes; None if it takes any keyword. It differs between versions of transformers."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return tuple(parameters)


def mlp(block: Any, y: Tensor, _stream: Tensor, _norm: Norm) -> Tensor:
    """``block.mlp``."""
    return _first(block.mlp(y))


def feed_forward(block: Any, y: Tensor, _stream: Tensor, _norm: Norm) -> Tensor:
    """``block.feed_forward``, whose experts flatten the batch (Llama 4)."""
    return _first(block.feed_forward(y)).view(y.shape)


def experts_and_shared_mlp(block: Any, y: Tensor, _stream: Tensor, _norm: Norm) -> Tensor:
    """Granite 4: ``block.block_sparse_moe``, where there are experts, beside ``block.shared_mlp``."""
    if block.has_experts:
        return _first(block.block_sparse_moe(y)) + block.shared_mlp(y)
    return block.shared_mlp(y)


def mlp_and_experts(block: Any, y: Tensor, stream: Tensor, norm: Norm) -> Tensor:
    """Gemma 4: ``block.mlp``, in some models beside experts, which route by the stream and norm it themselves."""
    branch = block.mlp(y)
    if not block.enable_moe_block:
        return branch
    branch = norm("post_feedforward_layernorm_1", branch)
    flat = stream.reshape(-1, stream.shape[-1])
    _, weights, chosen = block.router(flat)
    routed = block.experts(norm("pre_feedforward_layernorm_2", flat), chosen, weights)
    return branch + norm("post_feedforward_layernorm_2", routed.reshape(stream.shape))


def scale_layer(block: Any, h: Tensor, _arguments: Arguments, _norm: Norm) -> Tensor:
    """The block's output times ``block.layer_scalar``, in the dtype of the stream."""
    h *= block.layer_scalar
    return h


def add_layer_input_and_scale(block: Any, h: Tensor, arguments: Arguments, norm: Norm) -> Tensor:
    """Gemma 4: the embedding that each layer has of its own, gated by the stream, then ``block.layer_scalar``."""
    if block.hidden_size_per_layer_input:
        gated = block.act_fn(block.per_layer_input_gate(h)) * arguments["per_layer_input"]
        h = h + norm("post_per_layer_input_norm", block.per_layer_projection(gated))
    return scale_layer(block, h, arguments, norm)


def _first(output: Any) -> Tensor:
    """The hidden states of experts that return their router's scores too."""
    return output[0] if isinstance(output, tuple) else output


def _without(arguments: Arguments, names: tuple[str, ...]) -> Arguments:
    return {name: value for name, value in arguments.items() if name not in names}
