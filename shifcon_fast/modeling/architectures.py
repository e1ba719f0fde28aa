"""The table of decoder architectures: one row per decoder block class, and the search that finds it in a model.

A *block* is one decoder layer; *boundary* k is the residual stream entering block k, Hugging Face's
``hidden_states[k]``. A row says how the block's own ``forward`` is assembled, so that :mod:`.blocks` can run the
same computation with every RMSNorm going through ``ops.add_shift_rms_norm``. ``docs/architectures.md`` shows how to
add one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from shifcon_fast.modeling import branches
from shifcon_fast.modeling.branches import FeedForward, Finish, Mixer
from shifcon_fast.notices import warn_once

Layout = Literal["pre_norm", "sandwich", "post_norm", "shift_only"]

_NORM_NAMES: dict[Layout, tuple[str, ...]] = {
    "pre_norm": ("input_layernorm", "post_attention_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "post_norm": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "shift_only": (),
}


@dataclass(frozen=True)
class Architecture:
    """How one decoder block class is put together.

    Attributes:
        model_type: ``config.model_type`` of the models that use the block.
        block: name of the block class in transformers; the key of the table.
        layout: ``pre_norm`` (Llama: norm, attention, residual add, norm, MLP, residual add), ``sandwich``
            (Gemma-2: a norm before and after both halves), ``post_norm`` (OLMo-2: norms on the outputs of the two
            halves only) or ``shift_only`` (no RMSNorm: the block's own forward runs on shifted hidden states).
        norm: name of the block's RMSNorm class; None for ``shift_only``.
        style: the norm's rounding, as in ``ops.add_shift_rms_norm``.
        norms: the block's names for the layout's norms, in the layout's order, where they are not the usual ones.
        further_norms: RMSNorms that only some blocks have, beside the layout's.
        mixer: what stands for ``self_attn``; see :mod:`.branches`.
        feed_forward: what stands for ``mlp``.
        finish: what is done to the block's output after the second residual add.
        residual_multiplier: attribute of the block that scales both branches before the residual add (Granite).
        dropouts: attributes of the block that drop out the attention and the MLP branch before the add (Phi-3).
        blocks: name of the decoder's block list.
        after_blocks: names of the decoder's modules between its last block and its output: the final norm. None
            where they are not known.
        forwards_kwargs: whether the decoder hands unknown keyword arguments on to its blocks, in every version of
            transformers that is supported. Where it does not, the swapped block fetches the language ids in
            ``__call__``, outside of gradient checkpointing.
        packs: whether several sentences can share a row, each with its own positions. Not where a recurrent mixer
            or a convolution runs from one into the next, nor where the decoder, in any version of transformers that
            is supported, makes its mask or its biases of something else than the positions.
    """

    model_type: str
    block: str
    layout: Layout = "pre_norm"
    norm: str | None = None
    style: str = "llama"
    norms: tuple[str, ...] | None = None
    further_norms: tuple[str, ...] = ()
    mixer: Mixer = branches.attention
    feed_forward: FeedForward = branches.mlp
    finish: Finish | None = None
    residual_multiplier: str | None = None
    dropouts: tuple[str, str] | None = None
    blocks: str = "layers"
    after_blocks: tuple[str, ...] | None = ("norm",)
    forwards_kwargs: bool = True
    packs: bool = True

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Attribute names of the layout's RMSNorms, in the order in which they run."""
        return _NORM_NAMES[self.layout] if self.norms is None else self.norms

    def norm_sites(self, block: nn.Module) -> tuple[str, ...]:
        """Attribute names of a block's RMSNorms: the layout's, and the further ones that it has."""
        return self.norm_names + tuple(name for name in self.further_norms if hasattr(block, name))


_ROWS = (
    Architecture("llama", "LlamaDecoderLayer", norm="LlamaRMSNorm"),
    Architecture("mistral", "MistralDecoderLayer", norm="MistralRMSNorm"),
    Architecture("ministral", "MinistralDecoderLayer", norm="MinistralRMSNorm"),
    Architecture("ministral3", "Ministral3DecoderLayer", norm="Ministral3RMSNorm"),
    Architecture("mixtral", "MixtralDecoderLayer", norm="MixtralRMSNorm"),
    Architecture("qwen2", "Qwen2DecoderLayer", norm="Qwen2RMSNorm"),
    Architecture("qwen2_moe", "Qwen2MoeDecoderLayer", norm="Qwen2MoeRMSNorm"),
    Architecture("qwen3", "Qwen3DecoderLayer", norm="Qwen3RMSNorm"),
    Architecture("qwen3_moe", "Qwen3MoeDecoderLayer", norm="Qwen3MoeRMSNorm"),
    Architecture(
        "qwen3_5_text",
        "Qwen3_5DecoderLayer",
        norm="Qwen3_5RMSNorm",
        style="gemma",
        mixer=branches.recurrent_or_attention("linear_attn"),
        packs=False,
    ),
    Architecture("smollm3", "SmolLM3DecoderLayer", norm="SmolLM3RMSNorm"),
    Architecture("hunyuan_v1_dense", "HunYuanDenseV1DecoderLayer", norm="HunYuanDenseV1RMSNorm"),
    Architecture(
        "llama4_text",
        "Llama4TextDecoderLayer",
        norm="Llama4TextRMSNorm",
        mixer=branches.attention_without("position_ids"),
        feed_forward=branches.feed_forward,
    ),
    Architecture("gpt_oss", "GptOssDecoderLayer", norm="GptOssRMSNorm", style="olmo", packs=False),
    Architecture(
        "phi3", "Phi3DecoderLayer", norm="Phi3RMSNorm", dropouts=("resid_attn_dropout", "resid_mlp_dropout")
    ),
    Architecture(
        "granite", "GraniteDecoderLayer", norm="GraniteRMSNorm", residual_multiplier="residual_multiplier"
    ),
    Architecture(
        "granitemoehybrid",
        "GraniteMoeHybridDecoderLayer",
        norm="GraniteMoeHybridRMSNorm",
        mixer=branches.recurrent_or_attention("mamba"),
        feed_forward=branches.experts_and_shared_mlp,
        residual_multiplier="residual_multiplier",
        packs=False,
    ),
    Architecture(
        "apertus",
        "ApertusDecoderLayer",
        norm="ApertusRMSNorm",
        norms=("attention_layernorm", "feedforward_layernorm"),
    ),
    Architecture(
        "lfm2",
        "Lfm2DecoderLayer",
        norm="Lfm2RMSNorm",
        norms=("operator_norm", "ffn_norm"),
        mixer=branches.recurrent_or_attention("conv", cache="past_key_values"),
        feed_forward=branches.feed_forward,
        after_blocks=("embedding_norm",),
        packs=False,
    ),
    Architecture("gemma", "GemmaDecoderLayer", norm="GemmaRMSNorm", style="gemma"),
    Architecture("gemma2", "Gemma2DecoderLayer", "sandwich", norm="Gemma2RMSNorm", style="gemma"),
    Architecture("gemma3_text", "Gemma3DecoderLayer", "sandwich", norm="Gemma3RMSNorm", style="gemma"),
    # Longer than the others: one class serves models with experts, with an input of its own for each layer, and
    # with neither. Its norm multiplies by w, not 1 + w, and rounds once: OLMo's rounding.
    Architecture(
        "gemma4_text",
        "Gemma4TextDecoderLayer",
        "sandwich",
        norm="Gemma4RMSNorm",
        style="olmo",
        further_norms=(
            "post_feedforward_layernorm_1",
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm_2",
            "post_per_layer_input_norm",
        ),
        mixer=branches.attention_without("per_layer_input"),
        feed_forward=branches.mlp_and_experts,
        finish=branches.add_layer_input_and_scale,
    ),
    Architecture(
        "gemma4_unified_text",
        "Gemma4UnifiedTextDecoderLayer",
        "sandwich",
        norm="Gemma4UnifiedRMSNorm",
        style="olmo",
        finish=branches.scale_layer,
    ),
    Architecture("olmo2", "Olmo2DecoderLayer", "post_norm", norm="Olmo2RMSNorm", style="olmo"),
    Architecture("olmo3", "Olmo3DecoderLayer", "post_norm", norm="Olmo3RMSNorm", style="olmo"),
    Architecture("exaone4", "Exaone4DecoderLayer", "post_norm", norm="Exaone4RMSNorm"),
    Architecture("cohere", "CohereDecoderLayer", "shift_only"),
    Architecture("cohere2", "Cohere2DecoderLayer", "shift_only"),
    Architecture("starcoder2", "Starcoder2DecoderLayer", "shift_only"),
    Architecture("stablelm", "StableLmDecoderLayer", "shift_only", forwards_kwargs=False, packs=False),
    Architecture("gpt_neox", "GPTNeoXLayer", "shift_only", after_blocks=("final_layer_norm",)),
    Architecture(
        "gpt2", "GPT2Block", "shift_only", blocks="h", after_blocks=("ln_f",), forwards_kwargs=False
    ),
    Architecture(
        "falcon",
        "FalconDecoderLayer",
        "shift_only",
        blocks="h",
        after_blocks=("ln_f",),
        forwards_kwargs=False,
        packs=False,
    ),
    Architecture(
        "bloom",
        "BloomBlock",
        "shift_only",
        blocks="h",
        after_blocks=("ln_f",),
        forwards_kwargs=False,
        packs=False,
    ),
    Architecture(
        "opt",
        "OPTDecoderLayer",
        "shift_only",
        after_blocks=("final_layer_norm", "project_out"),
        forwards_kwargs=False,
        packs=False,
    ),
    Architecture(
        "xglm",
        "XGLMDecoderLayer",
        "shift_only",
        after_blocks=("layer_norm",),
        forwards_kwargs=False,
        packs=False,
    ),
)

ARCHITECTURES: dict[str, Architecture] = {row.block: row for row in _ROWS}


@dataclass(frozen=True)
class Decoder:
    """The decoder inside a model: the module that owns the embedding, the blocks and the final norm.

    Attributes:
        module: the decoder itself, e.g. a ``LlamaModel``.
        blocks: its blocks 0 … L-1.
        architecture: the row that describes them.
        hidden_size: width d of the residual stream.
        num_boundaries: number L of boundaries, one per block.
    """

    module: nn.Module
    blocks: nn.ModuleList
    architecture: Architecture
    hidden_size: int
    num_boundaries: int


def architecture_of(block: nn.Module) -> Architecture | None:
    """The table's row for a block, or None; see :func:`architecture_of_class`."""
    return architecture_of_class(type(block))


def architecture_of_class(block: type[nn.Module]) -> Architecture | None:
    """The table's row for a block class, or None.

    Classes are matched by name along the MRO, so that subclasses made at run time (ours, FSDP2's) still match; a
    subclass that computes something else, and code that is not transformers' own, does not.
    """
    for cls in block.__mro__:
        row = ARCHITECTURES.get(cls.__name__)
        if row is None or not cls.__module__.startswith("transformers.models."):
            continue
        return row if _computes(block) is _computes(cls) else None
    return None


def _computes(cls: Any) -> Any:
    """A class's forward without the wrappers of gradient checkpointing and of our own subclasses."""
    return inspect.unwrap(cls.forward)


def shift_alone(model_type: str, block: str, blocks: str = "layers") -> Architecture:
    """The row of an architecture that the table does not have: nothing is relied on but its list of blocks."""
    return Architecture(
        model_type,
        block,
        "shift_only",
        blocks=blocks,
        after_blocks=None,
        forwards_kwargs=False,
        packs=False,
    )


def locate_decoder(model: nn.Module) -> Decoder:
    """Find the decoder inside a PEFT model, a model with a head, a compiled or wrapped model, or a bare decoder.

    A decoder that is not in the table is found by its list of blocks, and gets the shift alone, which is said once
    per kind of block: a module with a token embedding and ``config.num_hidden_layers`` blocks in a list, each of
    which takes ``hidden_states`` first.

    Args:
        model: any ``nn.Module`` that contains exactly one list of decoder blocks.

    Raises:
        ValueError: an encoder-decoder; no such list, or more than one (the known architectures are listed).
    """
    for module in model.modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"model: got {type(module).__name__}, an encoder-decoder; wanted a decoder-only language model."
            )
    found = [*_decoders(model, _known)] or [*_decoders(model, _unknown)]
    if len(found) == 1:
        (decoder,) = found
        row = decoder.architecture
        if row.after_blocks is None:
            warn_once(
                f"The architecture {row.model_type!r} ({row.block}) is not in the table of docs/architectures.md: "
                f"it gets the shift alone, added to what enters each of the decoder's {row.blocks!r}; its norms "
                "stay its own. This is right where a block's first input is the residual stream."
            )
        return decoder
    known = ", ".join(f"{row.model_type} ({row.block})" for row in ARCHITECTURES.values())
    if found:
        lists = ", ".join(
            f"{type(each.module).__name__}.{each.architecture.blocks} ({each.architecture.block})"
            for each in found
        )
        raise ValueError(
            f"model: got {type(model).__name__} with {len(found)} decoders, wanted exactly one; pass the one that "
            f"is meant. Found: {lists}."
        )
    raise ValueError(
        f"model: got {type(model).__name__}, in which no list of decoder blocks was found. Known architectures, as "
        f"implemented in transformers: {known}. docs/architectures.md says how others are found."
    )


def _decoders(
    model: nn.Module, architecture_in: Callable[[nn.Module, str, nn.ModuleList], Architecture | None]
) -> Iterator[Decoder]:
    for owner in model.modules():
        for name, blocks in owner.named_children():
            if isinstance(blocks, nn.ModuleList) and len(blocks) > 0:
                row = architecture_in(owner, name, blocks)
                if row is not None:
                    hidden_size = int(owner.config.hidden_size)  # type: ignore[union-attr,arg-type]
                    yield Decoder(owner, blocks, row, hidden_size, len(blocks))


def _known(_owner: nn.Module, name: str, blocks: nn.ModuleList) -> Architecture | None:
    rows = {architecture_of(block) for block in blocks}
    row = next(iter(rows))
    return row if len(rows) == 1 and row is not None and row.blocks == name else None


def _unknown(owner: nn.Module, name: str, blocks: nn.ModuleList) -> Architecture | None:
    config: Any = getattr(owner, "config", None)
    if getattr(config, "num_hidden_layers", None) != len(blocks) or not _has_token_embedding(owner):
        return None
    if not all(_first_parameter(type(block)) == "hidden_states" for block in blocks):
        return None
    return shift_alone(getattr(config, "model_type", ""), type(blocks[0]).__name__, name)


def _has_token_embedding(owner: Any) -> bool:
    """Whether a module embeds tokens: the towers of images and sound embed other things."""
    try:
        embedding = owner.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    for below_adapter in ("original_module", "base_layer"):
        embedding = getattr(embedding, below_adapter, embedding)
    return isinstance(embedding, nn.Embedding)


def _first_parameter(block: Any) -> str | None:
    parameters = list(inspect.signature(block.forward).parameters)
    return parameters[1] if len(parameters) > 1 else None
