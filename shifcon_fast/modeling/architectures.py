"""The table of decoder architectures: one row per decoder block class, and the search that finds it in a model.

A *block* is one decoder layer; *boundary* k is the residual stream entering block k, Hugging Face's
``hidden_states[k]``. A row says how the block's own ``forward`` is assembled, so that :mod:`.blocks` can run the
same computation with every RMSNorm going through ``ops.add_shift_rms_norm``. ``docs/architectures.md`` shows how to
add one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Layout = Literal["pre_norm", "sandwich", "post_norm", "shift_only"]

_NORM_SITES: dict[Layout, tuple[str, ...]] = {
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
        residual_multiplier: attribute of the block that scales both branches before the residual add (Granite).
        dropouts: attributes of the block that drop out the attention and the MLP branch before the add (Phi-3).
        blocks: name of the decoder's block list.
        final_norm: name of the decoder's final norm.
        forwards_kwargs: whether the decoder hands unknown keyword arguments on to its blocks. Where it does not,
            the swapped block fetches the language ids in ``__call__``, outside of gradient checkpointing.
    """

    model_type: str
    block: str
    layout: Layout = "pre_norm"
    norm: str | None = None
    style: str = "llama"
    residual_multiplier: str | None = None
    dropouts: tuple[str, str] | None = None
    blocks: str = "layers"
    final_norm: str = "norm"
    forwards_kwargs: bool = True

    @property
    def norm_sites(self) -> tuple[str, ...]:
        """Attribute names of the block's RMSNorms, in the order in which they run."""
        return _NORM_SITES[self.layout]


_ROWS = (
    Architecture("llama", "LlamaDecoderLayer", norm="LlamaRMSNorm"),
    Architecture("mistral", "MistralDecoderLayer", norm="MistralRMSNorm"),
    Architecture("qwen2", "Qwen2DecoderLayer", norm="Qwen2RMSNorm"),
    Architecture("qwen3", "Qwen3DecoderLayer", norm="Qwen3RMSNorm"),
    Architecture(
        "phi3", "Phi3DecoderLayer", norm="Phi3RMSNorm", dropouts=("resid_attn_dropout", "resid_mlp_dropout")
    ),
    Architecture(
        "granite", "GraniteDecoderLayer", norm="GraniteRMSNorm", residual_multiplier="residual_multiplier"
    ),
    Architecture("gemma2", "Gemma2DecoderLayer", "sandwich", norm="Gemma2RMSNorm", style="gemma"),
    Architecture("gemma3_text", "Gemma3DecoderLayer", "sandwich", norm="Gemma3RMSNorm", style="gemma"),
    Architecture("olmo2", "Olmo2DecoderLayer", "post_norm", norm="Olmo2RMSNorm", style="olmo"),
    Architecture("gpt_neox", "GPTNeoXLayer", "shift_only", final_norm="final_layer_norm"),
    Architecture("bloom", "BloomBlock", "shift_only", blocks="h", final_norm="ln_f", forwards_kwargs=False),
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
    """The row for a block, or None.

    Classes are matched by name along the MRO, so that subclasses made at run time (ours, FSDP2's) still match; a
    subclass that computes something else, and code that is not transformers' own, does not.
    """
    for cls in type(block).__mro__:
        row = ARCHITECTURES.get(cls.__name__)
        if row is None or not cls.__module__.startswith("transformers.models."):
            continue
        return row if _computes(type(block)) is _computes(cls) else None
    return None


def _computes(cls: Any) -> Any:
    """A class's forward without the wrappers of gradient checkpointing and of our own subclasses."""
    return inspect.unwrap(cls.forward)


def locate_decoder(model: nn.Module) -> Decoder:
    """Find the decoder inside a PEFT model, a model with a head, a compiled or wrapped model, or a bare decoder.

    Args:
        model: any ``nn.Module`` that contains exactly one list of known decoder blocks.

    Raises:
        ValueError: the model has no such list (the known architectures are listed), or more than one.
    """
    found: list[Decoder] = []
    for owner in model.modules():
        for name, blocks in owner.named_children():
            if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
                continue
            rows = {architecture_of(block) for block in blocks}
            row = next(iter(rows))
            if len(rows) == 1 and row is not None and row.blocks == name:
                hidden_size = int(owner.config.hidden_size)  # type: ignore[union-attr,arg-type]
                found.append(Decoder(owner, blocks, row, hidden_size, len(blocks)))
    if len(found) == 1:
        return found[0]
    what = f"model: got {type(model).__name__}"
    if found:
        raise ValueError(
            f"{what} with {len(found)} decoders, wanted exactly one; pass the one that is meant."
        )
    known = ", ".join(f"{row.model_type} ({row.block})" for row in ARCHITECTURES.values())
    raise ValueError(
        f"{what}, in which no known decoder was found. Known architectures, as implemented in transformers: "
        f"{known}. docs/architectures.md shows how to add one."
    )
