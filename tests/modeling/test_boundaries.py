"""Sentence representations at boundaries against Hugging Face's own ``hidden_states``."""

# ruff: noqa: PLR0917 - pytest passes fixtures by name

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.boundaries import boundary_representations, representations_and_unshifted
from shifcon_fast.modeling.prefix import _PooledBlock


@pytest.fixture
def pool_mask(batch) -> torch.Tensor:
    """The attended tokens but the first of each row and a hole; the last row has none at all."""
    mask = batch["attention_mask"].clone()
    mask[:, 4] = 0
    for row in mask:
        row[int(row.argmax())] = 0
    mask[3] = 0
    return mask.bool()


def _mean(hidden, mask):
    weights = mask.to(hidden.dtype)
    return torch.einsum("btd,bt->bd", hidden, weights) / weights.sum(1).clamp(min=1)[:, None]


def _blocks_run(model):
    """Which blocks run, as a list filled by forward hooks."""
    runs: list[int] = []
    for index, block in enumerate(locate_decoder(model).blocks):
        block.register_forward_pre_hook(lambda m, args, index=index: runs.append(index))
    return runs


@pytest.mark.every_architecture
@pytest.mark.parametrize("attached", [False, True])
def test_boundary_k_is_hidden_states_k(architecture, attached, tiny_model, random_space, batch, pool_mask):
    model = tiny_model(architecture)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        if attached:
            attach(model, random_space(model), forward=1, backward=3)
        found = boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[3, 0, 2, 1])
    assert found.dtype == torch.float32
    expected = torch.stack([_mean(hidden[k], pool_mask) for k in (3, 0, 2, 1)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, 3], torch.zeros(4, 32))


@pytest.mark.every_architecture
def test_shifted_boundaries_count_as_after_their_shift(
    architecture, tiny_model, random_space, batch, batch_ids, pool_mask, shifted_by_hooks
):
    model = tiny_model(architecture)
    space = random_space(model)
    with shifted_by_hooks(model, space, batch_ids, {1: (1, 0.5), 3: (3, -0.5)}) as plain, torch.no_grad():
        entering = []
        for block in locate_decoder(plain).blocks:  # after the oracle's hooks: sees shifted inputs
            block.register_forward_pre_hook(lambda m, args: entering.append(_mean(args[0], pool_mask)))
        plain(**batch)
    attach(model, space, forward=1, backward=3, alpha=0.5)
    with torch.no_grad():
        found = boundary_representations(
            model, **batch, pool_mask=pool_mask, boundaries=range(4), language_ids=batch_ids
        )
    torch.testing.assert_close(found, torch.stack(entering), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        unshifted = boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=range(4))
    assert torch.equal(found[:, 1], unshifted[:, 1]), "the pivot's row"
    assert (found[1:, 0] - unshifted[1:, 0]).norm(dim=1).min() > 0.1


@pytest.mark.every_architecture
def test_nothing_runs_above_the_last_boundary(architecture, tiny_model, batch, pool_mask):
    model = tiny_model(architecture)
    decoder = locate_decoder(model)
    after_blocks = [getattr(decoder.module, name) for name in decoder.architecture.after_blocks]
    for unused in (*after_blocks, model.get_output_embeddings()):
        unused.register_forward_pre_hook(lambda m, args: pytest.fail(f"{type(m).__name__} ran"))
    runs = _blocks_run(model)
    boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[2, 1])
    assert runs == [0, 1]
    runs.clear()
    boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[0])
    assert runs == []
    assert len(decoder.blocks) == 4
    assert [getattr(decoder.module, name) for name in decoder.architecture.after_blocks] == after_blocks


def test_decoders_still_know_their_blocks_by_class_and_attributes(tiny_model):
    block = tiny_model("gemma3_text").model.layers[1]
    view = _PooledBlock(block, None)
    assert isinstance(view, Gemma3DecoderLayer)
    assert isinstance(view, nn.Module)
    assert not isinstance(view, nn.ModuleList)
    assert view.layer_idx == 1


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "olmo2", "gpt_neox", "bloom"])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_gradients_equal_those_of_the_whole_shifted_forward(
    architecture, checkpointing, tiny_model, random_space, batch, batch_ids, pool_mask, shifted_by_hooks
):
    model = tiny_model(architecture).train()
    space = random_space(model)
    probe = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(5))
    with shifted_by_hooks(model, space, batch_ids, {1: (1, 1.0), 3: (3, -1.0)}) as plain:
        entering = []
        for block in list(locate_decoder(plain).blocks)[1:]:
            block.register_forward_pre_hook(lambda m, args: entering.append(_mean(args[0], pool_mask)))
        plain(**batch)
        (torch.stack(entering) * probe).sum().backward()
        expected = {name: p.grad for name, p in plain.named_parameters()}

    attach(model, space, forward=1, backward=3)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.disable_input_require_grads()  # newer transformers switch it on by themselves
    model.get_input_embeddings().weight.requires_grad_(False)  # as in LoRA training: no input requires grad
    found = boundary_representations(
        model, **batch, pool_mask=pool_mask, boundaries=[1, 2, 3], language_ids=batch_ids
    )
    (found * probe).sum().backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and expected[name] is not None:
            scale = float(expected[name].abs().max())
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5 * scale)
            compared += 1
        else:
            assert parameter.grad is None, name
    assert compared >= 3 * 8


def test_pooling_is_not_repeated_when_blocks_are_recomputed(tiny_model, batch, pool_mask, monkeypatch):
    from shifcon_fast.modeling import boundaries

    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    pools, real = [], boundaries.ops.masked_mean_pool
    monkeypatch.setattr(
        boundaries.ops, "masked_mean_pool", lambda h, mask: pools.append(h.shape) or real(h, mask)
    )
    boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[0, 1, 2]).sum().backward()
    assert len(pools) == 3


def test_bfloat16_means_are_accumulated_in_float32(tiny_model, batch, pool_mask):
    model = tiny_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        found = boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[1, 3])
    for row, k in enumerate((1, 3)):
        torch.testing.assert_close(found[row], _mean(hidden[k].float(), pool_mask), rtol=1e-6, atol=1e-6)


def test_a_four_bit_model_behind_peft(tiny_checkpoint, batch, pool_mask):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, quantization_config=config, dtype=torch.float32
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    model.train()  # in eval mode bitsandbytes takes paths without autograd
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        found = boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[1, 3])
    for row, k in enumerate((1, 3)):
        torch.testing.assert_close(found[row], _mean(hidden[k], pool_mask), rtol=1e-5, atol=1e-5)
    boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[2]).sum().backward()
    reached = {name.split(".layers.")[1][0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"0", "1"}


def test_device_map_hooks_do_not_lead_back_to_the_whole_decoder(tiny_model, batch, pool_mask):
    from accelerate import dispatch_model

    model = tiny_model("llama")
    expected = boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[2])
    dispatched = dispatch_model(copy.deepcopy(model), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "forward" in dispatched.model.__dict__
    runs = _blocks_run(dispatched)
    found = boundary_representations(dispatched, **batch, pool_mask=pool_mask, boundaries=[2])
    assert runs == [0, 1]
    assert torch.equal(found, expected)


def test_bad_arguments_are_named(tiny_model, batch, batch_ids, pool_mask):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"boundaries: got 4, wanted 0 … 3"):
        boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[1, 4])
    with pytest.raises(ValueError, match=r"boundaries: got -1"):
        boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[-1])
    with pytest.raises(ValueError, match=r"boundaries: got none"):
        boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[])
    with pytest.raises(ValueError, match=r"language_ids: the model is not attached"):
        boundary_representations(model, **batch, pool_mask=pool_mask, boundaries=[1], language_ids=batch_ids)
    with pytest.raises(ValueError, match=r"Known architectures"):
        boundary_representations(nn.Linear(2, 2), **batch, pool_mask=pool_mask, boundaries=[1])


LENGTHS = (9, 4, 7, 3)


@pytest.fixture
def sentences() -> dict[str, torch.Tensor]:
    """Padded on the right, so that they may share rows."""
    mask = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(3, 128, mask.shape, generator=torch.Generator().manual_seed(8))
    pool = mask.bool()
    pool[:, 0] = False
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "pool_mask": pool}


@pytest.mark.every_architecture(
    quick=("llama", "gemma4_text", "gpt2", "lfm2"), slow="one way to run a block twice"
)
@pytest.mark.parametrize("mode", ["shifted", "official", "pooled"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_unshifted_pass_beside_another_is_what_it_is_alone(
    architecture, mode, checkpointing, tiny_model, random_space, sentences, batch_ids
):
    model = tiny_model(architecture).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    recipe = "official" if mode == "official" else "stable"
    attach(model, random_space(model), forward=1, backward=3, recipe=recipe)
    ids = None if mode == "pooled" else batch_ids
    boundaries, at = [1, 2], [1, 3]
    runs = _blocks_run(model)
    expected = boundary_representations(model, **sentences, boundaries=boundaries, language_ids=ids)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    (expected * probe).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        expected_unshifted = boundary_representations(model, **sentences, boundaries=at)
    model.zero_grad()
    runs.clear()

    found, unshifted = representations_and_unshifted(
        model, **sentences, boundaries=boundaries, unshifted_at=at, language_ids=ids
    )
    departs = {"shifted": 1, "official": 0, "pooled": 2}[mode]
    assert sorted(runs) == sorted([0, 1, *range(departs, 3)])  # once for both where they are the same
    assert not unshifted.requires_grad
    torch.testing.assert_close(unshifted, expected_unshifted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, expected)
    (found * probe).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
