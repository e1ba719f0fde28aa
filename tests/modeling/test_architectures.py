"""Finding the decoder, and the table's agreement with transformers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from shifcon_fast.modeling.architectures import ARCHITECTURES, Architecture, architecture_of, locate_decoder
from shifcon_fast.modeling.attach import attach

every_row = pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=lambda row: row.model_type)


def test_the_table_holds_the_promised_architectures():
    rows = sorted(row.model_type for row in ARCHITECTURES.values())
    assert " ".join(rows) == (
        "bloom gemma2 gemma3_text gpt_neox granite llama mistral olmo2 phi3 qwen2 qwen3"
    )


@every_row
def test_rows_name_what_the_blocks_have(row, tiny_model):
    model = tiny_model(row.model_type, layers=3)
    decoder = locate_decoder(model)
    assert decoder.architecture is row
    assert decoder.module is model.base_model
    assert decoder.num_boundaries == len(decoder.blocks) == 3
    assert decoder.hidden_size == 32
    assert isinstance(getattr(decoder.module, row.final_norm), nn.Module)
    block = decoder.blocks[0]
    assert type(block).__name__ == row.block
    norms = [name for name, child in block.named_children() if type(child).__name__.endswith("RMSNorm")]
    assert sorted(row.norm_sites) == sorted(norms), "every RMSNorm of the block is a site"
    assert {type(getattr(block, site)).__name__ for site in row.norm_sites} <= {row.norm}
    for name in (row.residual_multiplier, *(row.dropouts or ())):
        assert name is None or hasattr(block, name)


@every_row
def test_the_decoder_is_found_inside_wrappers(row, tiny_model):
    model = tiny_model(row.model_type)
    decoder = model.base_model
    assert locate_decoder(decoder).module is decoder
    assert locate_decoder(torch.compile(model)).module is decoder
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert locate_decoder(peft_model).module is decoder


def test_unknown_architectures_are_refused_with_the_known_ones():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8))
    with pytest.raises(ValueError, match=r"model: got GPT2LMHeadModel") as refusal:
        locate_decoder(model)
    for row in ARCHITECTURES.values():
        assert f"{row.model_type} ({row.block})" in str(refusal.value)


def test_two_decoders_are_one_too_many(tiny_model):
    both = nn.ModuleList([tiny_model("llama"), tiny_model("bloom")])
    with pytest.raises(ValueError, match="with 2 decoders, wanted exactly one"):
        locate_decoder(both)


def test_subclasses_match_unless_they_compute_something_else(tiny_model):
    block = tiny_model("llama").model.layers[0]

    class FSDPBlock(LlamaDecoderLayer):
        """What FSDP2 makes at run time: another class, the same forward."""

    class OtherBlock(LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    block.__class__ = FSDPBlock
    assert architecture_of(block) is ARCHITECTURES["LlamaDecoderLayer"]
    block.__class__ = OtherBlock
    assert architecture_of(block) is None


def test_code_from_a_checkpoint_is_not_taken_for_transformers_own():
    remote = type("Phi3DecoderLayer", (nn.Module,), {"__module__": "transformers_modules.phi3.modeling_phi3"})
    assert architecture_of(remote()) is None


@pytest.mark.usefixtures("reference_backend")  # bits are compared
def test_the_row_that_the_documentation_adds_works(tiny_model, random_space, batch, monkeypatch):
    """docs/architectures.md walks through SmolLM3."""
    model = tiny_model("smollm3")
    with pytest.raises(ValueError, match="Known architectures"):
        locate_decoder(model)
    row = Architecture("smollm3", "SmolLM3DecoderLayer", norm="SmolLM3RMSNorm")
    monkeypatch.setitem(ARCHITECTURES, row.block, row)
    with torch.no_grad():
        expected = model(**batch).logits
        handle = attach(model, random_space(model), forward=1, backward=3)
        assert torch.equal(model(**batch).logits, expected)
    assert handle.engagements == {k: dict.fromkeys(row.norm_sites, 1) for k in range(4)}
