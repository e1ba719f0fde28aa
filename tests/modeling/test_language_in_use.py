"""A model that is told its language: by attribute, by context, by adapter; each thread and stream on its own."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import pipeline

from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.attach import attach

ADAPTER = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


@pytest.fixture
def attached(tiny_model, random_space):
    model = tiny_model("llama").eval()
    return model, attach(model, random_space(model), forward=1, backward=3)


@torch.no_grad()
def logits(model, batch, **arguments):
    return model(**batch, **arguments).logits


def test_the_language_of_a_model_is_the_ids_of_its_rows(attached, batch):
    model, handle = attached
    rows = len(batch["input_ids"])
    expected = logits(model, batch, language_ids=handle.language_ids(["sw"] * rows))
    mixed = ["sw", "de", "en", "sw"]
    expected_mixed = logits(model, batch, language_ids=handle.language_ids(mixed))
    with handle.suspended():
        unshifted = logits(model, batch)
    assert not torch.equal(expected, unshifted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.language = "swh_Latn"  # in whatever form
        assert handle.language == "sw"
        assert torch.equal(logits(model, batch), expected)
        with handle.use(mixed):
            assert torch.equal(logits(model, batch), expected_mixed)
            with handle.use("de"):  # the pivot
                assert torch.equal(logits(model, batch), unshifted)
            assert torch.equal(
                logits(model, batch, language_ids=handle.language_ids(["sw"] * rows)), expected
            )
        assert torch.equal(logits(model, batch), expected)
        handle.language = mixed
        assert torch.equal(logits(model, batch), expected_mixed)
    handle.language = None
    with pytest.warns(UserWarning, match="without a language"):
        assert torch.equal(logits(model, batch), unshifted)


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gpt_neox", "bloom"])
def test_ids_per_token(architecture, tiny_model, random_space, batch):
    """A packed row holds several languages: each token is shifted by its own."""
    model = tiny_model(architecture).eval()
    plain, space = copy.deepcopy(model), random_space(model)
    handle = attach(model, space, forward=1, backward=3)
    ids = torch.tensor([[0, 1, 2, -1, 0, 1, 2, -1, 1]]).repeat(4, 1)
    ids[1] = ids[1].flip(0)
    for block, table in space.shift(1, 3).tables().items():
        vectors = torch.where((ids >= 0)[..., None], table[ids.clamp(min=0)], 0)
        locate_decoder(plain).blocks[block].register_forward_pre_hook(
            lambda module, args, vectors=vectors: (args[0] + vectors, *args[1:])
        )
    torch.testing.assert_close(
        logits(model, batch, language_ids=ids), logits(plain, batch), rtol=1e-4, atol=1e-5
    )
    rows = torch.tensor([1, 2, 0, -1])
    torch.testing.assert_close(
        logits(model, batch, language_ids=rows[:, None].expand(-1, 9)),
        logits(model, batch, language_ids=rows),
    )
    with pytest.raises(ValueError, match=r"language_ids: got shape \(4, 3\), wanted one id per row"):
        model(**batch, language_ids=ids[:, :3])
    assert handle.engagements[1]["shift"] == 3


def test_a_generation_needs_no_further_argument(attached):
    model, handle = attached
    prompt = torch.tensor([[3, 4, 5, 6]])
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, language_ids=handle.language_ids("sw"), **greedy)
    beams = {**greedy, "num_beams": 3, "num_return_sequences": 2}
    two = prompt.repeat(2, 1)
    expected_beams = model.generate(two, language_ids=handle.language_ids(["sw", "en"]), **beams)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*language")
        with handle.use("sw"):
            assert torch.equal(model.generate(prompt, **greedy), expected)
        with handle.use(["sw", "en"]):
            assert torch.equal(model.generate(two, **beams), expected_beams)
    with (
        handle.use(["sw", "en", "de"]),
        pytest.raises(ValueError, match="3 are in use for a batch of 2 rows"),
    ):
        model(two)


@pytest.mark.slow("torch.compile of one more model")
def test_compiled_code_does_not_depend_on_the_languages(attached):
    """One graph for one language or another, one for a list of them; the pivot's rows need none of the shift."""
    model, handle = attached
    tokens = torch.randint(3, 100, (3, 6), generator=torch.Generator().manual_seed(0))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for languages, count in (
            ("sw", 1),
            ("en", 1),
            (["sw", "de", "en"], 2),
            (["en", "sw", "de"], 2),
            ("de", 3),
        ):
            with handle.use(languages):
                found, expected = (call(tokens, use_cache=False).logits for call in (compiled, model))
            torch.testing.assert_close(found, expected)
            assert len(graphs) == count, languages
    torch._dynamo.reset()


def test_threads_have_their_own_languages(attached, batch):
    model, handle = attached
    rows = len(batch["input_ids"])
    expected = {
        code: logits(model, batch, language_ids=handle.language_ids([code] * rows))
        for code in ("sw", "en", "de")
    }
    wrong = []
    start = threading.Barrier(3)

    def run(code):
        start.wait()
        with handle.use(code):
            for _ in range(20):
                if not torch.equal(logits(model, batch), expected[code]):
                    wrong.append(code)

    threads = [threading.Thread(target=run, args=(code,)) for code in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_unknown_languages_are_refused(attached):
    _, handle = attached
    for refused in ("fr", ["sw", "fr"]):
        with pytest.raises(ValueError, match=r"language: got 'fr'; wanted one of en, sw, de"):
            handle.language = refused
        with pytest.raises(ValueError, match=r"language: got 'fr'"), handle.use(refused):
            pass
    with pytest.raises(ValueError, match=r"language: got none"):
        handle.language = []
    assert handle.language is None


def test_shifts_are_counted_where_they_are_added(attached, batch):
    model, handle = attached
    assert "shift" not in handle.engagements[0]
    with handle.suspended():
        logits(model, batch)
    assert handle.engagements[1]["shift"] == handle.engagements[3]["shift"] == 0
    with handle.use("sw"):
        logits(model, batch)
    with handle.use("de"):
        logits(model, batch)  # the pivot's rows are left alone
    assert handle.engagements[1]["shift"] == handle.engagements[3]["shift"] == 1


@pytest.fixture
def two_adapters(tiny_model, random_space):
    """Two adapters with shifts at other boundaries, of other languages, and the same models one by one."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama").eval(), LoraConfig(**ADAPTER), adapter_name="first")
    model.add_adapter("second", LoraConfig(**ADAPTER))
    model.add_adapter("plain", LoraConfig(**ADAPTER))
    base = model.get_base_model()
    shifts = {
        "first": random_space(base).shift(1, 3),
        "second": random_space(base, seed=5, languages=("de", "tr", "sw", "fr")).shift(1, 2, 0.5),
    }
    handle = attach(model, shifts["first"], adapter="first")
    handle.add_shift(shifts["second"], "second")
    return model.eval(), handle, shifts


def test_the_shift_follows_its_adapter(two_adapters, batch):
    model, handle, shifts = two_adapters
    handle.detach()
    expected = {}
    for adapter in ("first", "second", "plain"):
        model.set_adapter(adapter)
        with attach(model, shifts.get(adapter, shifts["first"])) as alone:
            with alone.use("sw") if adapter in shifts else alone.suspended():
                expected[adapter] = logits(model, batch)
            with alone.suspended(), model.disable_adapter():
                expected[None] = logits(model, batch)
    handle = attach(model, shifts["first"], adapter="first")
    handle.add_shift(shifts["second"], "second")
    with handle.use("swh_Latn"):
        for adapter in ("second", "first", "plain", "first"):
            model.set_adapter(adapter)
            assert torch.equal(logits(model, batch), expected[adapter]), adapter
            assert handle.shift is shifts.get(adapter, shifts["first"])
        with model.disable_adapter():
            assert torch.equal(logits(model, batch), expected[None])
        assert torch.equal(logits(model, batch), expected["first"])
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), expected["first"], rtol=1e-4, atol=1e-4)
    model.base_model.shifcon.detach()


def test_an_adapter_without_a_shift_is_said_once(two_adapters, batch):
    model, handle, _ = two_adapters
    model.set_adapter("plain")
    with handle.use("sw"):
        with pytest.warns(
            UserWarning, match="adapter 'plain' has no shift of its own, only 'first', 'second' has"
        ):
            model(**batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**batch)
            with model.disable_adapter():
                model(**batch)


def test_tables_of_the_shift_in_use(two_adapters):
    model, handle, shifts = two_adapters
    for adapter, shift in shifts.items():
        model.set_adapter(adapter)
        for block, table in shift.tables().items():
            assert torch.equal(handle.shift_table(block), table)
        assert handle.shift_table(0) is None
    assert handle.shift_table(3) is None  # the first's, which is not in use
    model.set_adapter("first")
    handle.set_shift(random := shifts["first"].__class__(**{**vars(shifts["first"]), "alpha": 2.0}))
    torch.testing.assert_close(handle.shift_table(3), 2 * shifts["first"].tables()[3])
    assert handle.shifts == {"first": random, "second": shifts["second"]}


def test_adapters_that_cannot_be_told_apart_are_refused(two_adapters, batch):
    model, handle, shifts = two_adapters
    model.base_model.set_adapter(["first", "second"])
    with handle.use("sw"), pytest.raises(ValueError, match="'first', 'second' are active"):
        model(**batch)
    model.set_adapter("first")
    with pytest.raises(ValueError, match="attached with that of 'first' already"):
        handle.add_shift(shifts["first"], "first")
    with pytest.raises(ValueError, match="got 'third'; the model has no such PEFT adapter"):
        handle.add_shift(shifts["first"], "third")
    handle.detach()
    with pytest.raises(ValueError, match="got 'third'; the model has no such PEFT adapter"):
        attach(model, shifts["first"], adapter="third")
    handle = attach(model, shifts["first"])
    with pytest.raises(ValueError, match="attached with one whatever the adapter already"):
        handle.add_shift(shifts["second"], "second")


def test_a_shift_has_its_area_and_a_space_has_none(tiny_model, random_space):
    model = tiny_model("llama")
    space = random_space(model)
    with pytest.raises(TypeError, match="forward, backward: got None and None; wanted two boundaries"):
        attach(model, space)
    with pytest.raises(TypeError, match="got one with a LanguageShift"):
        attach(model, space.shift(1, 3), alpha=0.5)
    assert not hasattr(model, "shifcon")


def test_a_pipeline_is_shifted(attached, word_tokenizer):
    model, handle = attached
    model.resize_token_embeddings(max(len(word_tokenizer), 128))
    tokenizer = copy.deepcopy(word_tokenizer)  # a pipeline turns its padding side
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompt = "Ada Ben"
    settings = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    handle.reset_engagements()
    with handle.use("sw"):
        generator(prompt, **settings)
    assert handle.engagements[1]["shift"] == handle.engagements[1]["input_layernorm"] > 0
