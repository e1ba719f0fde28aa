"""Attaching, detaching, copying, saving, refusing."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import pickle
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from shifcon_fast.modeling import installation
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.attachment import Attachment
from shifcon_fast.modeling.blocks import SHIFT_TABLE
from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.modeling.fingerprint import model_fingerprint
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.space.language_shift import LanguageShift


def _snapshot(model: nn.Module) -> list[tuple[object, ...]]:
    """Everything attach touches: classes, instance attributes, buffers, in the order of the modules."""
    return [
        (
            name,
            type(module),
            sorted(module.__dict__),
            sorted(module._buffers),
            sorted(module._non_persistent_buffers_set),
            inspect.signature(module.forward),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.every_architecture(column="detaching without a trace")
def test_detach_leaves_no_trace(architecture, tiny_model, random_space, batch, batch_ids):
    model = tiny_model(architecture)
    model(**batch)  # transformers caches on first use
    before, keys = _snapshot(model), list(model.state_dict())
    handle = attach(model, random_space(model), forward=1, backward=2)
    assert model.shifcon is handle
    assert _snapshot(model) != before
    assert list(model.state_dict()) == keys
    names = [(type(m).__module__, type(m).__qualname__, type(m).__name__) for m in model.modules()]
    model(**batch, language_ids=batch_ids)
    handle.detach()
    assert names == [(type(m).__module__, type(m).__qualname__, type(m).__name__) for m in model.modules()]
    assert _snapshot(model) == before
    handle.detach()
    assert _snapshot(model) == before


def test_the_context_manager_detaches_after_an_exception(tiny_model, random_space):
    model = tiny_model("llama")
    before = _snapshot(model)
    with (
        pytest.raises(RuntimeError, match="inside"),
        attach(model, random_space(model), forward=1, backward=2),
    ):
        raise RuntimeError("inside")
    assert _snapshot(model) == before


def test_a_failure_half_way_leaves_the_model_as_it_was(tiny_model, random_space, monkeypatch):
    model = tiny_model("llama")
    before = _snapshot(model)
    monkeypatch.setattr(installation, "decoder_class", lambda original: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attach(model, random_space(model), forward=1, backward=2)
    assert _snapshot(model) == before


def test_a_bare_decoder_can_be_attached(tiny_model, random_space, batch, batch_ids):
    model = tiny_model("llama")
    space = random_space(model)
    with attach(model, space, forward=1, backward=3), torch.no_grad():
        expected = model.model(**batch, language_ids=batch_ids).last_hidden_state
    handle = attach(model.model, space, forward=1, backward=3)
    assert model.model.shifcon is handle
    with torch.no_grad():
        assert torch.equal(model.model(**batch, language_ids=batch_ids).last_hidden_state, expected)
        logits = model(**batch, language_ids=batch_ids).logits  # Llama's head passes the ids on
    torch.testing.assert_close(logits, model.lm_head(expected))


def test_a_deep_copy_is_attached_by_itself(tiny_model, random_space, batch, batch_ids):
    for architecture in ("llama", "bloom"):
        model = tiny_model(architecture)
        space = random_space(model)
        handle = attach(model, space, forward=1, backward=2)
        with torch.no_grad():
            expected = model(**batch, language_ids=batch_ids).logits
            twin = copy.deepcopy(model)
            assert twin.shifcon is not handle
            assert twin.shifcon.model is twin
            handle.set_shift(random_space(model, seed=7).shift(handle.forward, handle.backward))
            handle.reset_engagements()
            assert torch.equal(twin(**batch, language_ids=batch_ids).logits, expected)
            assert not any(count for sites in handle.engagements.values() for count in sites.values())
            handle.detach()
            assert torch.equal(twin(**batch, language_ids=batch_ids).logits, expected)
            twin.shifcon.detach()
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_a_pickled_model_is_attached_by_itself(architecture, tiny_model, random_space, batch, batch_ids):
    model = tiny_model(architecture)
    attach(model, random_space(model), forward=1, backward=2, alpha=0.5)
    with torch.no_grad():
        expected = model(**batch, language_ids=batch_ids).logits
        twin = pickle.loads(pickle.dumps(model))  # noqa: S301 - made a moment ago
        assert twin.shifcon is not model.shifcon
        assert torch.equal(twin(**batch, language_ids=batch_ids).logits, expected)
    assert (twin.shifcon.alpha, twin.shifcon.shift.languages) == (0.5, ("en", "sw", "de"))
    twin.shifcon.detach()
    assert [type(m) for m in twin.modules()] == [type(m) for m in tiny_model(architecture).modules()]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_a_model_is_freed_with_its_last_reference(  # noqa: PLR0917 - pytest passes fixtures by name
    architecture, wrap, tiny_model, random_space, batch, batch_ids
):
    """Without the garbage collector: two models must not be in memory where one is used after the other."""
    model = tiny_model(architecture)
    if wrap:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    gc.collect()
    gc.disable()
    try:
        attach(model, random_space(model), forward=1, backward=2)
        handle = model.shifcon
        with torch.no_grad():
            model(**batch, language_ids=batch_ids)
        model.generate(**batch, language_ids=batch_ids, do_sample=False, max_new_tokens=2, pad_token_id=0)
        weight = weakref.ref(locate_decoder(model).blocks[0])
        del model
        assert weight() is not None, "a handle holds its model"
        assert handle.engagements.keys() == {0, 1, 2, 3}
        del handle
        assert weight() is None
    finally:
        gc.enable()


def test_a_handle_that_is_not_kept_is_made_anew(tiny_model, random_space):
    model = tiny_model("llama")
    attach(model, random_space(model), forward=1, backward=3, alpha=0.5)
    gc.collect()
    again = model.shifcon
    assert (again.forward, again.backward, again.alpha, again.recipe) == (1, 3, 0.5, "stable")
    assert again.model is model
    assert model.shifcon is again
    with pytest.raises(AttributeError, match="shifcon"):
        model.model.shifcon  # noqa: B018
    again.detach()
    assert not hasattr(model, "shifcon")


def test_a_handle_of_an_earlier_attachment_changes_nothing(tiny_model, random_space, batch, batch_ids):
    model = tiny_model("llama")
    old = attach(model, random_space(model), forward=1, backward=3)
    old.detach()
    attach(model, random_space(model), forward=1, backward=3)
    with torch.no_grad():
        expected = model(**batch, language_ids=batch_ids).logits
        with pytest.raises(ValueError, match="handle: it was detached"):
            old.set_shift(random_space(model, seed=1).shift(old.forward, old.backward))
        old.detach()
        assert torch.equal(model(**batch, language_ids=batch_ids).logits, expected)


def test_save_pretrained_writes_what_it_writes_without(tiny_model, random_space, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "plain")
    attach(model, random_space(model), forward=1, backward=2)
    model.save_pretrained(tmp_path / "attached")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "attached" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert model.load_state_dict(again.state_dict(), strict=True).missing_keys == []


def test_shift_tables_are_the_formula_and_stay_float32(tiny_model, random_space):
    model = tiny_model("llama")
    space = random_space(model)
    handle = attach(model, space, 1, 3, 0.5)
    mean = space.mean.double()
    toward, back = 0.5 * (mean[1, 2] - mean[1]), 0.5 * (mean[3] - mean[3, 2])
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for block, expected in ((1, toward), (3, back)):
        table = handle.shift_table(block)
        assert table.dtype == torch.float32
        torch.testing.assert_close(table.double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(table[2], torch.zeros(32))
    assert handle.shift_table(0) is None
    assert handle.shift_table(2) is None
    model.to("meta")
    assert handle.shift_table(1).device.type == "meta", "tables move with the model"


def test_set_shift_changes_the_vectors_in_place(tiny_model, random_space, batch, batch_ids):
    model = tiny_model("llama")
    first, second = (random_space(model, seed=seed).shift(1, 3, 0.3) for seed in (0, 1))
    with attach(model, second), torch.no_grad():
        expected = model(**batch, language_ids=batch_ids).logits
    handle = attach(model, first)
    table = handle.shift_table(1)
    handle.set_shift(second)
    assert handle.shift is second
    assert handle.shift_table(1).data_ptr() == table.data_ptr()
    with torch.no_grad():
        assert torch.equal(model(**batch, language_ids=batch_ids).logits, expected)
    with pytest.raises(ValueError, match=r"shift: got languages \('en', 'tr', 'de'\), wanted"):
        handle.set_shift(random_space(model, languages=("en", "tr", "de")).shift(1, 3))
    with pytest.raises(ValueError, match=r"shift: got pivot en, wanted de"):
        handle.set_shift(replace(second, pivot="en"))
    with pytest.raises(ValueError, match=r"shift: got forward 2, wanted 1"):
        handle.set_shift(replace(second, forward=2))
    handle.set_shift(replace(second, alpha=0.6))
    torch.testing.assert_close(handle.shift_table(1), 2 * second.tables()[1])
    handle.detach()
    with pytest.raises(ValueError, match=r"handle: it was detached"):
        handle.set_shift(first)


def test_suspended_passes_are_unshifted_and_still_counted(tiny_model, random_space, batch, batch_ids):
    model = tiny_model("llama")
    handle = attach(model, random_space(model), forward=1, backward=3)
    with torch.no_grad():
        plain = model(**batch).logits
        shifted = model(**batch, language_ids=batch_ids).logits
        handle.reset_engagements()
        with handle.suspended():
            assert torch.equal(model(**batch, language_ids=batch_ids).logits, plain)
            with handle.suspended():
                pass
            assert torch.equal(model(**batch, language_ids=batch_ids).logits, plain)
        assert handle.engagements[3] == {"input_layernorm": 2, "post_attention_layernorm": 2, "shift": 0}
        assert torch.equal(model(**batch, language_ids=batch_ids).logits, shifted)


@pytest.mark.every_architecture(heavy=True)
def test_a_call_without_ids_is_warned_of_once(architecture, tiny_model, random_space, batch, batch_ids):
    model = tiny_model(architecture)
    attach(model, random_space(model), forward=1, backward=3)
    greedy = {"do_sample": False, "max_new_tokens": 2, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch, language_ids=batch_ids)
        model.generate(**batch, language_ids=torch.full((4,), -1), **greedy)
        with model.shifcon.suspended():  # said to be meant
            model(**batch)
        boundary_representations(model, batch["input_ids"], None, batch["attention_mask"], [0, 2])
    with pytest.warns(UserWarning, match="without a language: it runs unshifted"):
        model.generate(**batch, **greedy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)


def test_without_a_shift_nothing_is_warned_of(tiny_model, random_space, batch):
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, random_space(model), forward=1, backward=3, alpha=0.0):
            model(**batch)
        model(**batch)


@pytest.mark.parametrize("hooks_first", [True, False])
def test_device_map_hooks_do_not_hide_the_operators(hooks_first, tiny_model, random_space, batch, batch_ids):
    """accelerate's hooks keep the forward they wrap in the instance, out of reach of a class swap alone."""
    model = tiny_model("llama")
    space = random_space(model)
    with attach(model, space, forward=1, backward=3), torch.no_grad():
        expected = model(**batch, language_ids=batch_ids).logits
    hook = {"device_map": {"": "cpu"}, "main_device": "cpu", "force_hooks": True}
    if hooks_first:
        dispatch_model(model, **hook)
        before = _snapshot(model)
        assert "_old_forward" in model.model.layers[0].__dict__
    handle = attach(model, space, forward=1, backward=3)
    if not hooks_first:
        dispatch_model(model, **hook)
    assert "language_ids" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        assert torch.equal(model(**batch, language_ids=batch_ids).logits, expected)
    assert handle.bypassed == {}
    assert all(count == 1 for sites in handle.engagements.values() for count in sites.values())
    greedy = {"do_sample": False, "max_new_tokens": 2, "pad_token_id": 0}
    generated = model.generate(**batch, language_ids=batch_ids, **greedy)
    assert torch.equal(generated[:, 9], expected[:, -1].argmax(-1))
    handle.detach()
    if hooks_first:
        assert _snapshot(model) == before
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, expected)
    assert "language_ids" not in inspect.signature(model.forward).parameters


def test_offloaded_norms_are_called_so_that_their_weights_are_loaded(
    tiny_model, random_space, batch, batch_ids
):
    model = tiny_model("llama")
    space = random_space(model)
    with attach(model, space, forward=1, backward=3), torch.no_grad():
        expected = model(**batch, language_ids=batch_ids).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].input_layernorm.weight.is_meta
    handle = attach(model, space, forward=1, backward=3)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, language_ids=batch_ids).logits, expected)
    assert "replaced on the instance" in handle.bypassed[0]["input_layernorm"]


@pytest.fixture
def fresh_accelerate():
    """Accelerate has one state a process, and the Trainer of an earlier test has set it without mixed precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_detach_after_accelerate_has_prepared_the_model_for_mixed_precision(
    tiny_model, random_space, batch, batch_ids
):
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        unshifted = model(**batch).logits.float()
    handle = attach(model, random_space(model), forward=1, backward=3)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert "forward" in prepared.__dict__
    with torch.no_grad():
        shifted = prepared(**batch, language_ids=batch_ids).logits
        assert shifted.dtype == torch.float32
        assert (shifted - unshifted)[0].abs().max() > 0.1
        greedy = {"do_sample": False, "max_new_tokens": 1, "pad_token_id": 0}
        generated = prepared.generate(**batch, language_ids=batch_ids, **greedy)
        # generate numbers the positions of padded rows from their first token, which bfloat16 can tell
        assert torch.equal(generated[:2, 9], shifted[:2, -1].argmax(-1))
        handle.detach()
        assert torch.equal(prepared(**batch).logits, unshifted)


def test_detach_refuses_to_undo_another_change_of_class(tiny_model, random_space):
    model = tiny_model("llama")
    handle = attach(model, random_space(model), forward=1, backward=3)
    block = model.model.layers[1]
    ours = type(block)
    block.__class__ = type("FSDPLlamaDecoderLayer", (ours,), {})
    during = _snapshot(model)
    with pytest.raises(ValueError, match="FSDPLlamaDecoderLayer was given another class"):
        handle.detach()
    assert _snapshot(model) == during
    block.__class__ = ours
    handle.detach()
    assert type(block).__mro__[1] is ours.__mro__[2]


def test_a_replaced_forward_is_refused_not_ignored(tiny_model, random_space):
    model = tiny_model("llama")
    block = model.model.layers[2]
    block.forward = lambda *args, **kwargs: args[0]
    before = _snapshot(model)
    with pytest.raises(ValueError, match="the forward of a LlamaDecoderLayer was replaced"):
        attach(model, random_space(model), forward=1, backward=3)
    assert _snapshot(model) == before


@pytest.mark.parametrize(
    "architecture",
    ["llama", pytest.param("bloom", marks=pytest.mark.slow("torch.compile of one more model"))],
)
def test_compiled_models_equal_eager_ones(architecture, tiny_model, random_space, batch, batch_ids):
    model = tiny_model(architecture)
    attach(model, random_space(model), forward=1, backward=3)
    operators = []

    def backend(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes if "add_shift" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for ids in (batch_ids, None, batch_ids.flip(0)):
            kwargs = {} if ids is None else {"language_ids": ids}
            expected = model(**batch, **kwargs).logits
            torch.testing.assert_close(compiled(**batch, **kwargs).logits, expected, rtol=1e-5, atol=1e-5)
    if architecture == "llama":
        assert len(operators) >= 2 * 4, "the operators must be in the compiled graph"
    torch._dynamo.reset()


@pytest.mark.every_architecture(
    quick={"lfm2"}, slow="torch.compile of one more model", column="`torch.compile` in one graph"
)
def test_a_compiled_model_is_one_graph(architecture, tiny_model, random_space, batch, batch_ids):
    model = tiny_model(architecture)
    plain = copy.deepcopy(model)
    attach(model, random_space(model), forward=1, backward=3)
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            expected = model(**batch, language_ids=batch_ids).logits
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(**batch, language_ids=batch_ids).logits, expected)
    except torch._dynamo.exc.TorchDynamoException as error:
        torch._dynamo.reset()
        with pytest.raises(type(error)), torch.no_grad():
            torch.compile(plain, backend="eager", fullgraph=True)(**batch)
        pytest.skip(f"transformers {transformers.__version__}'s own {architecture} is not one graph")
    finally:
        torch._dynamo.reset()


def test_language_ids_of_codes(tiny_model, random_space):
    model = tiny_model("llama")
    handle = attach(model, random_space(model), forward=1, backward=3)
    ids = handle.language_ids(["sw", "de", "en", "sw"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [1, 2, 0, 1]
    assert handle.language_ids("sw").tolist() == [1]
    with pytest.raises(ValueError, match=r"'fr'.*en, sw, de"):
        handle.language_ids(["en", "fr"])


def test_the_pivot_counts_as_left_alone():
    """Not by adding its zero vector, which would turn -0.0 into 0.0 and cost a pass over the row."""
    shift = LanguageShift(("en", "sw", "de"), "de", 1, 3, torch.zeros(2, 3, 5), torch.ones(2, 3), 4)
    attachment = Attachment({None: shift}, forwards_kwargs=True, make_handle=ShiftHandle)
    ids = torch.tensor([0, 2, -1, 1])
    assert attachment.prepare(ids, torch.zeros(4, 5)).tolist() == [0, -1, -1, 1]
    assert ids.tolist() == [0, 2, -1, 1], "the caller's ids are not changed"


@pytest.mark.every_architecture(heavy=True)
def test_bad_language_ids_are_refused(architecture, tiny_model, random_space, batch):
    model = tiny_model(architecture)
    attach(model, random_space(model), forward=1, backward=3)
    with pytest.raises(TypeError, match=r"language_ids: got list"):
        model(**batch, language_ids=[0, 1, 2, 0])
    with pytest.raises(TypeError, match=r"language_ids: got dtype torch.float32"):
        model(**batch, language_ids=torch.zeros(4))
    with pytest.raises(TypeError, match=r"language_ids: got dtype torch.bool"):
        model(**batch, language_ids=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"language_ids: got shape \(3,\).*\(4,\)"):
        model(**batch, language_ids=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"language_ids: got shape \(4, 1\)"):
        model(**batch, language_ids=torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"an id of 3, wanted 0 … 2"):
        model(**batch, language_ids=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"an id of -2"):
        model(**batch, language_ids=torch.tensor([0, 1, -2, 1]))
    with torch.no_grad():  # a refused call leaves nothing behind
        with model.shifcon.suspended():
            expected = model(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
        int32 = model(**batch, language_ids=torch.tensor([1, 2, 0, -1], dtype=torch.int32)).logits
        assert torch.equal(int32, model(**batch, language_ids=torch.tensor([1, 2, 0, -1])).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": 3, "backward": 1}, r"forward, backward: got 3 and 1, wanted forward < backward"),
        ({"forward": 2, "backward": 2}, r"forward, backward: got 2 and 2"),
        ({"forward": -1, "backward": 2}, r"forward: got boundary -1, wanted 0 … 3"),
        ({"forward": 1, "backward": 4}, r"backward: got boundary 4, wanted 0 … 3 \(the model has 4 blocks\)"),
        ({"forward": 0, "backward": 2, "recipe": "official"}, r"forward: got boundary 0, wanted 1 … 3"),
        ({"forward": 1, "backward": 2, "recipe": "fast"}, r"recipe: got 'fast'"),
    ],
)
def test_bad_areas_are_refused(arguments, message, tiny_model, random_space):
    model = tiny_model("llama")
    before = _snapshot(model)
    with pytest.raises(ValueError, match=message):
        attach(model, random_space(model), **arguments)
    assert _snapshot(model) == before


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_an_alpha_that_is_not_finite_is_refused(alpha, tiny_model, random_space):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"alpha: got -?(nan|inf), wanted a finite number"):
        attach(model, random_space(model), forward=1, backward=3, alpha=alpha)
    assert not hasattr(model, "shifcon")


def test_boundaries_must_be_whole_numbers(tiny_model, random_space):
    model = tiny_model("llama")
    with pytest.raises(TypeError, match=r"forward: got 1.5"):
        attach(model, random_space(model), forward=1.5, backward=3)


def test_spaces_of_other_models_are_refused(tiny_model, random_space):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"space: got vectors of size 64, wanted .* 32"):
        attach(model, random_space(tiny_model("llama", hidden=64)), forward=1, backward=2)
    with pytest.raises(ValueError, match=r"space: got 3 boundaries, wanted 4"):
        attach(model, random_space(tiny_model("llama", layers=3)), forward=1, backward=2)
    foreign = replace(
        random_space(model), card={"model": {"fingerprint": model_fingerprint(tiny_model("llama", seed=1))}}
    )
    with pytest.raises(ValueError, match=r"another model.*embedding.*check_fingerprint=False"):
        attach(model, foreign, forward=1, backward=2)
    attach(model, foreign, forward=1, backward=2, check_fingerprint=False).detach()
    own = replace(foreign, card={"model": {"fingerprint": model_fingerprint(model)}})
    attach(model, own, forward=1, backward=2).detach()
    assert "shifcon" not in model.__dict__


def test_attaching_twice_is_refused_through_any_wrapper(tiny_model, random_space):
    model = tiny_model("llama")
    space = random_space(model)
    handle = attach(model, space, forward=1, backward=2)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for again in (model, model.model, wrapped):
        with pytest.raises(ValueError, match=r"attached already.*detach"):
            attach(again, space, forward=1, backward=3)
    handle.detach()
    attach(wrapped, space, forward=1, backward=3).detach()


def test_no_table_reaches_a_state_dict_of_a_block(tiny_model, random_space):
    model = tiny_model("llama")
    attach(model, random_space(model), forward=1, backward=2)
    block = locate_decoder(model).blocks[1]
    assert SHIFT_TABLE in dict(block.named_buffers())
    assert SHIFT_TABLE not in block.state_dict()
