"""What an attached model computes, for every architecture, against hooks on an untouched copy."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

from shifcon_fast import ops
from shifcon_fast.modeling import norms
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.attach import attach


@pytest.mark.every_architecture(column="unshifted logits equal to transformers' own bit for bit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("reference_backend")
def test_unshifted_logits_are_those_of_the_model_bit_for_bit(
    architecture, dtype, tiny_model, random_space, batch
):
    model = tiny_model(architecture, dtype=dtype)
    with torch.no_grad():
        expected, *states = _logits_and_states(model, batch)
        with attach(model, random_space(model), forward=1, backward=3) as handle:
            plain, *states_attached = _logits_and_states(model, batch)
            pivot = model(**batch, language_ids=handle.language_ids(["de"] * 4)).logits
            nobody = model(**batch, language_ids=torch.full((4,), -1)).logits
        after = model(**batch).logits
    for logits in (plain, pivot, nobody, after):
        assert torch.equal(logits, expected)
    assert len(states) == len(states_attached) == 5
    assert all(map(torch.equal, states_attached, states))


def _logits_and_states(model, batch):
    output = model(**batch, output_hidden_states=True)
    return output.logits, *output.hidden_states


def _exact_logits(model, tokens):
    """In float64, for which grouped matrix products do not exist, and which XGLM mixes with the default dtype."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"
    torch.set_default_dtype(torch.float64)
    try:
        return model(tokens).logits
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.every_architecture(heavy=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unshifted_logits_are_as_accurate_as_the_models(architecture, dtype, tiny_model, random_space, batch):
    """A fast backend sums in its own order."""
    model = tiny_model(architecture, dtype=dtype)
    tokens = batch["input_ids"]  # without padding, whose rows are NaN in float64 for some architectures
    with torch.no_grad():
        exact = _exact_logits(model, tokens)
        theirs = (model(tokens).logits.double() - exact).norm()
        with attach(model, random_space(model), forward=1, backward=3):
            unshifted = model(tokens).logits
            nobody = model(tokens, language_ids=torch.full((4,), -1)).logits
    assert torch.equal(unshifted, nobody)
    assert (unshifted.double() - exact).norm() <= 2 * theirs


@pytest.mark.every_architecture(column="the shift against hooks on a copy")
def test_shifted_logits_equal_the_oracle(
    architecture, tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    model = tiny_model(architecture)
    space = random_space(model)
    with torch.no_grad():
        with shifted_by_hooks(model, space, batch_ids, {1: (1, 0.7), 3: (3, -0.7)}) as plain:
            expected = plain(**batch).logits
        unshifted = model(**batch).logits
        attach(model, space, forward=1, backward=3, alpha=0.7)
        logits = model(**batch, language_ids=batch_ids).logits
        attached = model(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - unshifted).abs().amax(dim=(1, 2))[[0, 2]].min() > 0.1
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        # One product does all tokens of an expert; how it rounds depends on how many the other rows send there.
        torch.testing.assert_close(logits[[1, 3]], attached[[1, 3]], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits[[1, 3]], attached[[1, 3]])


def _once(sites, *, shifted):
    """The engagements of a block each of whose norms ran once, and whose input was shifted once or never."""
    return {**dict.fromkeys(sites, 1), **({"shift": 1} if shifted else {})}


# What the same block class computes under other configurations.
VARIANTS = {
    "gemma4_text-experts": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "granitemoehybrid-dense": {"num_local_experts": 0},
    "falcon-alibi": {"alibi": True, "parallel_attn": False, "multi_query": False},
    "falcon-new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "opt-norm_after": {"do_layer_norm_before": False},
    "stablelm-parallel": {"use_parallel_residual": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("reference_backend")  # bits are compared
def test_what_a_configuration_changes_in_a_block_is_kept(
    variant, tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    model = tiny_model(variant.partition("-")[0], **VARIANTS[variant])
    usual = tiny_model(variant.partition("-")[0])
    space = random_space(model)
    shifts = {1: (1, 0.7), 3: (3, -0.7)}
    with torch.no_grad(), shifted_by_hooks(model, space, batch_ids, shifts) as plain:
        expected, unshifted = plain(**batch).logits, model(**batch).logits
        assert not torch.allclose(unshifted, usual(**batch).logits, rtol=0.1), "the configuration counts"
        handle = attach(model, space, forward=1, backward=3, alpha=0.7)
        assert torch.equal(model(**batch).logits, unshifted)
        handle.reset_engagements()
        logits = model(**batch, language_ids=batch_ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - unshifted)[[0, 2]].abs().amax(dim=(1, 2)).min() > 0.1
    decoder = locate_decoder(model)
    for k, block in enumerate(decoder.blocks):
        norms_of_block = [
            name for name, child in block.named_children() if type(child).__name__.endswith("RMSNorm")
        ]
        assert sorted(decoder.architecture.norm_sites(block)) == sorted(norms_of_block)
        assert handle.engagements[k] == _once(norms_of_block, shifted=k in (1, 3))
    assert handle.bypassed == {}


_TOWER = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGES = {**_TOWER, "image_size": 28, "patch_size": 14}
_PROJECTIONS = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
# A model of images and text → the text decoder inside it and the rest of its configuration.
WITH_IMAGES = {
    "mistral3": ("ministral3", {"vision_config": _IMAGES}),
    "gemma3": ("gemma3_text", {"vision_config": _IMAGES}),
    "llama4": ("llama4_text", {"vision_config": {**_IMAGES, **_PROJECTIONS}}),
    "gemma4": ("gemma4_text", {"vision_config": None, "audio_config": None}),
    "gemma4_unified": ("gemma4_unified_text", {"vision_config": None, "audio_config": None}),
    "llava": ("llama", {"vision_config": _IMAGES}),
}


@pytest.mark.parametrize("architecture", WITH_IMAGES)
def test_the_text_decoder_of_a_model_with_images_is_shifted(
    architecture, tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    if architecture not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not have {architecture}")
    text, rest = WITH_IMAGES[architecture]
    config = AutoConfig.for_model(architecture, text_config=tiny_model(text).config.to_dict(), **rest)
    try:
        model = AutoModelForImageTextToText.from_config(config).eval()
        model(**batch)
    except AttributeError as error:
        if "image_outputs" not in str(error) and "pad_token_id" not in str(error):
            raise
        pytest.skip(
            f"transformers {transformers.__version__} itself cannot run {architecture} on text: {error}"
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15, generator=torch.Generator().manual_seed(parameter.numel()))
    assert locate_decoder(model).architecture.model_type == text
    space = random_space(model)
    greedy = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": 1_000, "pad_token_id": 0}
    shifts = {1: (1, 1.0), 3: (3, -1.0)}
    with torch.no_grad(), shifted_by_hooks(model, space, batch_ids, shifts) as plain:
        expected, tokens = plain(**batch).logits, plain.generate(**batch, use_cache=False, **greedy)
        attach(model, space, forward=1, backward=3)
        logits = model(**batch, language_ids=batch_ids).logits
        assert torch.equal(model.generate(**batch, language_ids=batch_ids, **greedy), tokens)
        unshifted = model(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - unshifted)[[0, 2]].abs().amax(dim=(1, 2)).min() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "olmo2", "bloom"])
def test_shifted_bfloat16_logits_are_as_accurate_as_the_oracle(
    architecture, tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    model = tiny_model(architecture)
    space = random_space(model)
    shifts = {1: (1, 1.0), 3: (3, -1.0)}
    tokens = batch["input_ids"]
    low = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        with shifted_by_hooks(copy.deepcopy(low).double(), space, batch_ids, shifts) as plain:
            exact = plain(tokens).logits
        with shifted_by_hooks(low, space, batch_ids, shifts) as plain:
            theirs = (plain(tokens).logits.double() - exact).norm()
        attach(low, space, forward=1, backward=3)
        ours = (low(tokens, language_ids=batch_ids).logits.double() - exact).norm()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_official_recipe_adds_at_the_block_before(
    architecture, tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    model = tiny_model(architecture)
    space = random_space(model)
    with torch.no_grad():
        with shifted_by_hooks(model, space, batch_ids, {0: (1, 1.0), 2: (3, -1.0)}) as plain:
            expected = plain(**batch).logits
        attach(model, space, 1, 3, recipe="official")
        logits = model(**batch, language_ids=batch_ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.every_architecture(column="gradients")
def test_gradients_equal_the_oracle(
    architecture, tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    model = tiny_model(architecture)
    space = random_space(model)
    probe = torch.randn(4, 9, 128, generator=torch.Generator().manual_seed(3))
    with shifted_by_hooks(model, space, batch_ids, {0: (0, 1.0), 2: (2, -1.0)}) as plain:
        (plain(**batch).logits * probe).sum().backward()
    attach(model, space, forward=0, backward=2)
    (model(**batch, language_ids=batch_ids).logits * probe).sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        scale = expected[name].grad.abs().max()
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4 * float(scale))


@pytest.mark.every_architecture(only=lambda row: row.norm)
def test_every_norm_site_of_every_block_runs_in_the_operator(
    architecture, tiny_model, random_space, batch, batch_ids, monkeypatch
):
    model = tiny_model(architecture)
    decoder = locate_decoder(model)
    handle = attach(model, random_space(model), forward=1, backward=2)
    calls, modules_called = [], []
    real = ops.add_shift_rms_norm

    def spy(x, weight, residual, shift, index, **kwargs):
        calls.append((weight, shift is not None))
        return real(x, weight, residual, shift, index, **kwargs)

    monkeypatch.setattr(norms.ops, "add_shift_rms_norm", spy)
    row = decoder.architecture
    sites = [row.norm_sites(block) for block in decoder.blocks]
    norm_class = type(getattr(decoder.blocks[0], sites[0][0]))
    module_forward = norm_class.forward

    def noticed(self, x):
        modules_called.append(self)
        return module_forward(self, x)

    monkeypatch.setattr(norm_class, "forward", noticed)
    handle.reset_engagements()
    with torch.no_grad():
        model(**batch, language_ids=batch_ids)

    expected = [
        getattr(b, site).weight for b, names in zip(decoder.blocks, sites, strict=True) for site in names
    ]
    assert len(calls) == len(expected)
    assert all(weight is other for (weight, _), other in zip(calls, expected, strict=True))
    in_blocks = {
        id(getattr(b, site)) for b, names in zip(decoder.blocks, sites, strict=True) for site in names
    }
    assert modules_called, "the final norm is a module of the same class"
    assert not in_blocks & {id(module) for module in modules_called}
    assert handle.engagements == {k: _once(names, shifted=k in (1, 2)) for k, names in enumerate(sites)}
    assert handle.bypassed == {}
    if row.layout != "post_norm":  # the shift rides along with the norm at the block's entry
        per_block = len(sites[0])
        assert [k for k, (_, shifted) in enumerate(calls) if shifted] == [per_block, 2 * per_block]


def test_a_norm_with_a_hook_is_called_and_reported(tiny_model, random_space, batch, batch_ids):
    model = tiny_model("llama")
    handle = attach(model, random_space(model), forward=1, backward=2)
    expected = model(**batch, language_ids=batch_ids).logits
    handle.reset_engagements()
    seen = []
    model.model.layers[1].input_layernorm.register_forward_hook(lambda m, args, out: seen.append(out))
    model.model.layers[2].post_attention_layernorm = nn.Sequential(
        model.model.layers[2].post_attention_layernorm
    )
    logits = model(**batch, language_ids=batch_ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    assert handle.engagements[1] == {"input_layernorm": 0, "post_attention_layernorm": 1, "shift": 1}
    assert "hooks" in handle.bypassed[1]["input_layernorm"]
    assert "Sequential" in handle.bypassed[2]["post_attention_layernorm"]
    assert set(handle.bypassed) == {1, 2}


def test_float32_norm_weights_beside_bfloat16_activations(tiny_model, random_space, batch, batch_ids):
    """PEFT's prepare_model_for_kbit_training casts norm weights up; the blocks' hidden states stay bfloat16."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    handle = attach(model, random_space(model), forward=1, backward=2)
    with torch.no_grad():
        expected = model(**batch, language_ids=batch_ids).logits
        for block in model.model.layers:
            for site in ("input_layernorm", "post_attention_layernorm"):
                norm = getattr(block, site)
                norm.weight.data = norm.weight.data.float()
        dtypes = set()
        for block in model.model.layers:
            block.mlp.register_forward_pre_hook(lambda m, args: dtypes.add(args[0].dtype))
        handle.reset_engagements()
        logits = model(**batch, language_ids=batch_ids).logits
    assert dtypes == {torch.bfloat16}
    assert handle.bypassed == {}
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1)


def test_autocast_keeps_the_float32_residual_stream(
    tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    """Under autocast the branches are bfloat16 and the residual stream float32, which the fused add must keep."""
    model = tiny_model("llama")
    space = random_space(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with shifted_by_hooks(model, space, batch_ids, {1: (1, 1.0), 2: (2, -1.0)}) as plain:
            expected = plain(**batch).logits
        handle = attach(model, space, forward=1, backward=2)
        streams = []
        model.model.layers[3].register_forward_pre_hook(lambda m, args: streams.append(args[0].dtype))
        logits = model(**batch, language_ids=batch_ids).logits
    assert streams == [torch.float32]
    assert handle.bypassed == {}
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)


def test_hidden_states_and_attentions_are_still_returned(
    tiny_model, random_space, batch, batch_ids, shifted_by_hooks
):
    for architecture in ("llama", "gemma3_text", "bloom"):
        model = tiny_model(architecture)
        model.set_attn_implementation("eager")
        space = random_space(model)
        with torch.no_grad():
            attach(model, space, forward=1, backward=3)
            out = model(**batch, language_ids=batch_ids, output_hidden_states=True, output_attentions=True)
        assert len(out.hidden_states) == 5
        assert len(out.attentions) == 4
        entering = []
        remove = (
            locate_decoder(model)
            .blocks[2]
            .register_forward_pre_hook(lambda m, args, entering=entering: entering.append(args[0]))
        )
        with torch.no_grad():
            model(**batch, language_ids=batch_ids)
        remove.remove()
        assert torch.equal(out.hidden_states[2], entering[0])


@pytest.mark.parametrize("architecture", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_routers_are_still_heard(architecture, tiny_model, random_space, batch, batch_ids):
    """The loss that keeps experts in balance comes from the routers of the attached model's blocks."""
    model = tiny_model(architecture)
    with torch.no_grad():
        expected = model(**batch, output_router_logits=True)
        attach(model, random_space(model), forward=1, backward=3)
        found = model(**batch, output_router_logits=True)
        shifted = model(**batch, language_ids=batch_ids, output_router_logits=True)
    assert len(found.router_logits) == len(expected.router_logits) > 0
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    assert not torch.allclose(shifted.router_logits[-1], found.router_logits[-1], rtol=0.1)


@pytest.mark.every_architecture(heavy=True)
def test_ids_per_token_of_one_language_a_row_are_ids_per_row(
    architecture, tiny_model, random_space, batch, batch_ids
):
    model = tiny_model(architecture)
    tokens = batch["input_ids"]
    with torch.no_grad(), attach(model, random_space(model), forward=1, backward=3):
        rows = model(tokens, language_ids=batch_ids).logits
        each = model(tokens, language_ids=batch_ids[:, None].expand_as(tokens)).logits
    assert torch.equal(rows, each)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "olmo2"])
def test_a_packed_row_of_several_languages_is_its_sentences_shifted_apart(
    architecture, tiny_model, random_space, batch
):
    """As trainers pack: one row, positions starting over, no attention mask, an id for every token."""
    model = tiny_model(architecture)
    sentences = [batch["input_ids"][:1, :length] for length in (9, 4, 6)]
    ids = [1, 2, 0]
    lengths = [sentence.shape[1] for sentence in sentences]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    per_token = torch.cat([torch.full((length,), each) for length, each in zip(lengths, ids, strict=True)])
    with torch.no_grad(), attach(model, random_space(model), forward=1, backward=3):
        apart = [
            model(sentence, language_ids=torch.tensor([each])).logits
            for sentence, each in zip(sentences, ids, strict=True)
        ]
        packed = torch.cat(sentences, dim=1)
        settings = {"position_ids": positions, "use_cache": False}  # a cache is of one sequence
        together = model(packed, **settings, language_ids=per_token[None]).logits
        unshifted = model(packed, **settings, language_ids=torch.full((1, 19), -1)).logits
    torch.testing.assert_close(together, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-4)
    assert (together - unshifted).abs()[:, :9].max() > 0.1
