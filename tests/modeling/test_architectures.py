"""Finding the decoder, and the table's agreement with transformers."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    EncoderDecoderModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from shifcon_fast.modeling.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    locate_decoder,
)
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.notices import warn_once

BY_TYPE = {row.model_type: row for row in ARCHITECTURES.values()}
_TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}


def test_the_table_holds_the_promised_architectures():
    rows = sorted(row.model_type for row in ARCHITECTURES.values())
    assert " ".join(rows) == (
        "apertus bloom cohere cohere2 exaone4 falcon gemma gemma2 gemma3_text gemma4_text gemma4_unified_text "
        "gpt2 gpt_neox gpt_oss granite granitemoehybrid hunyuan_v1_dense lfm2 llama llama4_text ministral "
        "ministral3 mistral mixtral olmo2 olmo3 opt phi3 qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe smollm3 "
        "stablelm starcoder2 xglm"
    )


@pytest.mark.every_architecture
def test_rows_name_what_the_blocks_have(architecture, tiny_model):
    row = BY_TYPE[architecture]
    model = tiny_model(architecture, layers=6)
    decoder = locate_decoder(model)
    assert decoder.architecture is row
    assert any(child is model.get_input_embeddings() for child in decoder.module.children())
    assert decoder.num_boundaries == len(decoder.blocks) == 6
    assert decoder.hidden_size == 32
    for name in row.after_blocks:
        assert isinstance(getattr(decoder.module, name), nn.Module)
    for block in decoder.blocks:
        assert type(block).__name__ == row.block
        sites = row.norm_sites(block)
        norms = [name for name, child in block.named_children() if type(child).__name__.endswith("RMSNorm")]
        assert sorted(sites) == sorted(norms), "every RMSNorm of the block is a site"
        assert {type(getattr(block, site)).__name__ for site in sites} <= {row.norm}
        for name in (row.residual_multiplier, *(row.dropouts or ())):
            assert name is None or hasattr(block, name)


@pytest.mark.every_architecture(heavy=True)
def test_the_decoder_is_found_inside_wrappers(architecture, tiny_model):
    model = tiny_model(architecture)
    decoder = locate_decoder(model).module
    assert isinstance(decoder, PreTrainedModel)
    assert locate_decoder(decoder).module is decoder
    assert locate_decoder(torch.compile(model)).module is decoder
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert locate_decoder(peft_model).module is decoder


@pytest.fixture
def said_anew():
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


# Block lists of several names; blocks of two kinds in one list; with and without keyword arguments; tuples or not.
UNKNOWN = {
    "gptj": {"rotary_dim": 4},
    "gpt_bigcode": {},
    "jamba": {
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,  # older transformers ask to be told
        "num_experts": 2,  # both for every token: no row's arithmetic depends on the others'
    },
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mpt": {"n_layers": 4, "d_model": 32, "n_heads": 4},
    "nemotron": {},
    "olmo": {},
    "phi": {"partial_rotary_factor": 0.5},
    "seed_oss": {"head_dim": 8},
}


@pytest.mark.parametrize("architecture", UNKNOWN)
@pytest.mark.usefixtures("reference_backend", "said_anew")  # bits are compared
def test_an_unknown_architecture_gets_the_shift_alone(
    architecture, tiny_model, random_space, batch, batch_ids, shifted_by_hooks, caplog
):
    model = tiny_model(architecture, **UNKNOWN[architecture])
    decoder = locate_decoder(model)
    assert (decoder.num_boundaries, decoder.hidden_size) == (4, 32)
    assert decoder.architecture.layout == "shift_only"
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("shifcon_fast")]
    assert f"'{architecture}' ({type(decoder.blocks[0]).__name__})" in said
    assert "the shift alone" in said
    caplog.clear()

    space = random_space(model)
    greedy = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": 1_000, "pad_token_id": 0}
    shifts = {1: (1, 0.7), 3: (3, -0.7)}
    with torch.no_grad(), shifted_by_hooks(model, space, batch_ids, shifts) as plain:
        entering = []
        for block in locate_decoder(plain).blocks:  # after the oracle's hooks: sees shifted inputs
            block.register_forward_pre_hook(lambda m, args: entering.append(args[0]))
        expected = plain(**batch).logits
        expected_tokens = plain.generate(**batch, use_cache=False, **greedy)
        before = model(**batch).logits
    classes = [type(module) for module in model.modules()]
    with attach(model, space, forward=1, backward=3, alpha=0.7), torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
        logits = model(**batch, language_ids=batch_ids).logits
        assert torch.equal(model.generate(**batch, language_ids=batch_ids, **greedy), expected_tokens)
        pooling = {"pool_mask": batch["attention_mask"], "language_ids": batch_ids, "keep_massive": True}
        pooled = boundary_representations(model, **batch, **pooling, boundaries=range(4))
        assert torch.equal(boundary_representations(model, **batch, **pooling, boundaries=[0]), pooled[:1])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - before).abs().amax(dim=(1, 2))[[0, 2]].min() > 0.01
    assert torch.equal(logits[[1, 3]], before[[1, 3]])
    weights = batch["attention_mask"][..., None] / batch["attention_mask"].sum(1)[:, None, None]
    means = torch.stack([(hidden * weights).sum(1) for hidden in entering[:4]])
    torch.testing.assert_close(pooled, means, rtol=1e-4, atol=1e-5)
    assert [type(module) for module in model.modules()] == classes
    assert not [record for record in caplog.records if "the shift alone" in record.getMessage()], "said once"


@pytest.mark.usefixtures("said_anew")
def test_a_subclass_that_computes_something_else_gets_the_shift_alone(tiny_model, random_space, caplog):
    model = tiny_model("llama")
    other = type(
        "LlamaDecoderLayer",
        (LlamaDecoderLayer,),
        {"forward": lambda self, hidden_states, **kwargs: hidden_states},
    )
    for block in model.model.layers:
        block.__class__ = other
    handle = attach(model, random_space(model), forward=1, backward=3)
    assert "the shift alone" in caplog.text
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(model.model.embed_tokens(tokens)))
        torch.testing.assert_close(model(tokens, language_ids=torch.tensor([-1])).logits, expected)
        shift = handle.shift_table(1)[1] + handle.shift_table(3)[1]
        moved = model.lm_head(model.model.norm(model.model.embed_tokens(tokens) + shift))
        torch.testing.assert_close(
            model(tokens, language_ids=torch.tensor([1])).logits, moved, rtol=1e-4, atol=1e-4
        )


@pytest.mark.usefixtures("said_anew")
def test_a_stream_that_cannot_be_shifted_row_by_row_is_refused(tiny_model, random_space, batch, batch_ids):
    """Gemma 3n's blocks pass four streams, in a dimension before the batch's: with four rows, the sizes fit."""
    model = tiny_model(
        "gemma3n_text",
        head_dim=8,
        intermediate_size=[64] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    attach(model, random_space(model), forward=1, backward=3)
    with pytest.raises(ValueError, match=r"input of a Gemma3nTextDecoderLayer has shape \(4, 4, 9, 32\)"):
        model(**batch, language_ids=batch_ids)


def test_models_without_one_list_of_decoder_blocks_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"got BertModel, in which no list of decoder blocks") as refusal:
        locate_decoder(BertModel(BertConfig(**_TINY, intermediate_size=16)))
    for row in ARCHITECTURES.values():
        assert f"{row.model_type} ({row.block})" in str(refusal.value)
    with pytest.raises(ValueError, match=r"got Linear, in which no list"):
        locate_decoder(nn.Linear(2, 2))
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=8)
    )
    with pytest.raises(ValueError, match=r"got T5ForConditionalGeneration, an encoder-decoder"):
        locate_decoder(t5)
    gpt2 = tiny_model("gpt2", add_cross_attention=True, is_decoder=True)
    both = EncoderDecoderModel(encoder=BertModel(BertConfig(**_TINY, intermediate_size=16)), decoder=gpt2)
    with pytest.raises(ValueError, match=r"got EncoderDecoderModel, an encoder-decoder"):
        locate_decoder(both)
    several = nn.ModuleList([tiny_model("phi", partial_rotary_factor=0.5), tiny_model("gptj", rotary_dim=4)])
    lists = r"PhiModel.layers \(PhiDecoderLayer\), GPTJModel.h \(GPTJBlock\)"
    with pytest.raises(ValueError, match=f"2 decoders.*{lists}"):
        locate_decoder(several)
    assert locate_decoder(nn.ModuleList([several[0], tiny_model("llama")])).architecture.model_type == "llama"


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
    """docs/architectures.md walks through Seed-OSS."""
    model = tiny_model("seed_oss", head_dim=8)
    assert locate_decoder(model).architecture.layout == "shift_only"
    row = Architecture("seed_oss", "SeedOssDecoderLayer", norm="SeedOssRMSNorm")
    monkeypatch.setitem(ARCHITECTURES, row.block, row)
    with torch.no_grad():
        expected = model(**batch).logits
        handle = attach(model, random_space(model), forward=1, backward=3)
        assert torch.equal(model(**batch).logits, expected)
    once = dict.fromkeys(row.norm_names, 1)
    assert handle.engagements == {k: {**once, "shift": 0} if k in (1, 3) else once for k in range(4)}
