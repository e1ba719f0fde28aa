"""``estimate_space`` against a naive float64 pass: one sentence at a time, unpadded, every hidden state kept."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

import shifcon_fast
from shifcon_fast.data.errors import DataError
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.modeling.fingerprint import model_fingerprint
from shifcon_fast.space.accumulator import split_halves
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.space.subspace import common_ridge, principal_subspace, subspace_distance

Text = dict[str, list[str]]
TinyModel = Callable[..., PreTrainedModel]

# A float32 forward differs from the float64 one by a few of float32's 1e-7, relative to hidden states of about 5.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def model(tiny_model: TinyModel) -> PreTrainedModel:
    return tiny_model()


@pytest.fixture
def tokenizer(word_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(word_tokenizer)


def run(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, text: object, *arguments: object, **options: object
) -> LanguageSpace:
    return estimate_space(model, tokenizer, text, *arguments, progress=False, **options)  # type: ignore[arg-type]


def states(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, sentence: str, length: int | None = None
) -> Tensor:
    """(L, T, d) float64: Hugging Face's hidden states of one sentence, the one after the final norm left out."""
    ids = torch.tensor([tokenizer(sentence)["input_ids"][:length]])
    with torch.no_grad():
        return torch.cat(model(ids, output_hidden_states=True).hidden_states[:-1]).double()


def sentence_means(model: nn.Module, tokenizer: PreTrainedTokenizerFast, text: Text) -> dict[str, Tensor]:
    """language → (L, n, d) float64 means over the tokens after BOS, the only special token here."""
    return {
        language: torch.stack([states(model, tokenizer, s)[:, 1:].mean(1) for s in sentences], dim=1)
        for language, sentences in text.items()
    }


def language_vectors(means: dict[str, Tensor]) -> Tensor:
    return torch.stack([x.mean(1) for x in means.values()], dim=1).float()


def assert_close(a: LanguageSpace, b: LanguageSpace) -> None:
    assert a.languages == b.languages
    for name in ("mean", "rms", "median_norm", "sink_share"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **CLOSE)
    for name in ("floors", "split_distances"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "bloom"])
def test_language_vectors_are_means_of_sentence_means(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text, architecture: str
) -> None:
    model = tiny_model(architecture)
    space = run(model, tokenizer, parallel_text, batch_size=7)
    expected = language_vectors(sentence_means(copy.deepcopy(model).double(), tokenizer, parallel_text))
    assert space.languages == ("en", "de", "sw", "tr")
    assert space.pivot == "en"
    assert space.counts == dict.fromkeys(space.languages, 24)
    assert space.num_boundaries == 4
    torch.testing.assert_close(space.mean, expected, **CLOSE)


def test_norms_and_sink_shares_are_those_of_the_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    space = run(model, tokenizer, parallel_text)
    oracle = copy.deepcopy(model).double()
    every = {
        language: [states(oracle, tokenizer, s) for s in text] for language, text in parallel_text.items()
    }
    content = torch.cat([h[:, 1:] for language in every.values() for h in language], dim=1)
    torch.testing.assert_close(space.rms, content.square().sum(2).mean(1).sqrt().float(), **CLOSE)
    for position, sentences in enumerate(every.values()):
        shares = [
            h[:, 0].norm(dim=-1) / (h[:, 0].norm(dim=-1) + h[:, 1:].sum(1).norm(dim=-1)) for h in sentences
        ]
        torch.testing.assert_close(
            space.sink_share[:, position], torch.stack(shares).mean(0).float(), **CLOSE
        )
        medians = torch.stack([h[:, 1:].norm(dim=-1).median(dim=1).values for h in sentences]).mean(0)
        torch.testing.assert_close(space.median_norm[:, position], medians.float(), **CLOSE)


def test_distances_and_floors_are_those_of_the_sentence_means(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    space = run(model, tokenizer, parallel_text, rank=5)
    means = sentence_means(copy.deepcopy(model).double(), tokenizer, parallel_text)
    first, second = split_halves(24)
    for k in range(space.num_boundaries):
        subspaces = {language: principal_subspace(x[k], rank=5) for language, x in means.items()}
        ridge = common_ridge(subspaces.values())
        expected = subspace_distance(subspaces["sw"], subspaces["en"], ridge)
        assert space.distance(k, "sw", "en") == pytest.approx(expected, rel=1e-3)
        one, other = (principal_subspace(means["tr"][k, half], rank=5) for half in (first, second))
        assert space.noise_floor(k, "tr") == pytest.approx(subspace_distance(one, other, ridge), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_batch_size_does_not_show(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text, batch_size: int
) -> None:
    reference = run(model, tokenizer, parallel_text)
    assert_close(run(model, tokenizer, parallel_text, batch_size=batch_size), reference)


def test_order_of_sentences_does_not_show_in_the_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    reverse = {language: sentences[::-1] for language, sentences in parallel_text.items()}
    one, other = run(model, tokenizer, parallel_text), run(model, tokenizer, reverse)
    torch.testing.assert_close(one.mean, other.mean, **CLOSE)
    assert one.distance(2, "tr", "en") == pytest.approx(other.distance(2, "tr", "en"), rel=1e-3)


def test_two_runs_agree_bit_for_bit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    one, other = (run(model, tokenizer, parallel_text) for _ in range(2))
    for name in ("mean", "rms", "median_norm", "sink_share", "ridge", "floors", "split_distances"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert all(torch.equal(basis, other.bases[key]) for key, basis in one.bases.items())


def test_padding_side_and_a_missing_padding_token_do_not_show(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    reference = run(model, tokenizer, parallel_text)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = None
    assert_close(run(model, tokenizer, parallel_text), reference)
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "left"


def test_memory_limit_means_more_passes_not_another_result(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    reference = run(model, tokenizer, parallel_text, batch_size=24)
    assert len(calls) == 4  # one pass: a batch for each language
    two_boundaries = 2 * 4 * 24 * 32 * 4 / 2**30
    ranged = run(model, tokenizer, parallel_text, batch_size=24, memory_gib=two_boundaries)
    assert len(calls) == 4 + 2 * 4
    for name in ("mean", "rms", "median_norm", "sink_share", "floors"):
        assert torch.equal(getattr(ranged, name), getattr(reference, name)), name
    run(model, tokenizer, parallel_text, batch_size=24, memory_gib=1e-9, subspaces=False)
    assert len(calls) == 4 + 2 * 4 + 4


def test_some_boundaries_only(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    calls: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    space = run(model, tokenizer, parallel_text, boundaries=[2, 1], subspaces=False)
    assert space.boundaries == (1, 2)
    assert set(calls) == {0, 1}  # boundary 2 is the output of block 1
    torch.testing.assert_close(space.mean[1:3], run(model, tokenizer, parallel_text).mean[1:3], **CLOSE)
    assert space.mean[[0, 3]].isnan().all()
    assert space.bases == {}


@pytest.mark.parametrize("batch_size", [5, 24])
def test_official_recipe_written_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text, batch_size: int
) -> None:
    space = run(model, tokenizer, parallel_text, batch_size=batch_size, recipe="official")
    oracle = copy.deepcopy(model).double()
    for position, sentences in enumerate(parallel_text.values()):
        means = torch.stack([states(oracle, tokenizer, s).mean(1) for s in sentences])  # BOS included
        units = means / means.norm(dim=-1, keepdim=True)
        running = torch.zeros_like(units[0])
        for batches, batch in enumerate(units.split(batch_size), start=1):
            running += (batch.mean(0) - running) / batches
        torch.testing.assert_close(space.mean[:, position], running.float(), **CLOSE)
        assert (space.mean[:, position].norm(dim=-1) <= 1 + 1e-6).all()
    assert space.card["recipe"] == "official"


def test_modes_gradients_and_dropout_are_left_alone(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    model = tiny_model()
    reference = run(model, tokenizer, parallel_text)
    for block in model.model.layers:
        block.mlp.down_proj = nn.Sequential(block.mlp.down_proj, nn.Dropout(0.5))
    model.train()
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    space = run(model, tokenizer, parallel_text)
    assert_close(space, reference)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not space.mean.requires_grad

    with pytest.raises(ValueError, match="NaN or infinity in 'en'"):
        model.get_input_embeddings().weight.data.fill_(float("nan"))
        run(model, tokenizer, parallel_text)
    assert [module.training for module in model.modules()] == modes  # after an error as well


def test_adapters_count(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        lora_dropout=0.5,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    base = run(tiny_model(), tokenizer, parallel_text)
    model = get_peft_model(tiny_model(), config).train()
    space = run(model, tokenizer, parallel_text)
    oracle = copy.deepcopy(model).eval().double()
    torch.testing.assert_close(
        space.mean, language_vectors(sentence_means(oracle, tokenizer, parallel_text)), **CLOSE
    )
    assert (space.mean[1:] - base.mean[1:]).norm() > 0.1


def test_an_attached_model_is_estimated_unshifted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    reference = run(model, tokenizer, parallel_text)
    handle = attach(model, reference, forward=1, backward=3)
    assert_close(run(model, tokenizer, parallel_text), reference)
    handle.detach()


def test_a_four_bit_model_is_estimated_and_can_still_be_trained(
    tiny_checkpoint: Path, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, quantization_config=config, dtype=torch.float32
    )
    four_bit = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(four_bit) == 4 * 7
    packed = [module.weight.data.clone() for module in four_bit]
    repacking: list[bool] = []
    four_bit[0].register_forward_hook(lambda module, *_: repacking.append(not module.training))

    space = run(model.eval(), tokenizer, parallel_text)

    # In evaluation mode bitsandbytes may repack the weights in place, after which training has no gradients.
    assert set(repacking) == {False}
    assert all(
        torch.equal(module.weight.data, before) for module, before in zip(four_bit, packed, strict=True)
    )
    assert not any(module.training for module in model.modules())
    model.train()
    embeddings = model.get_input_embeddings()(torch.tensor([[1, 20, 30]])).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.logsumexp(-1).sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.norm() > 0
    expected = language_vectors(sentence_means(model, tokenizer, parallel_text))
    torch.testing.assert_close(space.mean, expected, rtol=1e-4, atol=1e-4)


def test_without_bos_the_first_word_is_left_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer("Ada")["input_ids"] == [tokenizer.convert_tokens_to_ids("Ada")]
    assert (run(model, tokenizer, parallel_text).sink_share > 0.05).all()
    expected = states(copy.deepcopy(model).double(), tokenizer, parallel_text["en"][0])[:, 1:].mean(1)
    one = run(
        model, tokenizer, {language: [sentences[0]] * 2 for language, sentences in parallel_text.items()}
    )
    torch.testing.assert_close(one.mean[:, 0], expected.float(), **CLOSE)


def test_a_sentence_longer_than_the_context_is_named_and_max_length_truncates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    text = {language: list(sentences[:4]) for language, sentences in parallel_text.items()}
    text["sw"][2] = "Ada " * 130
    with pytest.raises(
        ValueError,
        match=r"sentence 3 \(from 1\) of 'sw' has 131 tokens, more than the model's context of 128; .*max_length",
    ):
        run(model, tokenizer, text)
    space = run(model, tokenizer, text, max_length=4)
    oracle = copy.deepcopy(model).double()
    expected = torch.stack([states(oracle, tokenizer, s, 4)[:, 1:].mean(1) for s in text["sw"]]).mean(0)
    torch.testing.assert_close(space.mean[:, 2], expected.float(), **CLOSE)
    at_the_context = run(model, tokenizer, text, max_length=500)
    expected = torch.stack([states(oracle, tokenizer, s, 128)[:, 1:].mean(1) for s in text["sw"]]).mean(0)
    torch.testing.assert_close(at_the_context.mean[:, 2], expected.float(), **CLOSE)


def test_a_sentence_without_content_is_named(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    text = {language: list(sentences) for language, sentences in parallel_text.items()}
    text["tr"][1] = "qwerty uiop"
    with pytest.raises(
        ValueError, match=r"sentence 2 \(from 1\) of 'tr', 'qwerty uiop', has no content token"
    ):
        run(model, tokenizer, text)


def test_a_sentence_of_one_token_has_no_content_without_bos(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    parallel_text: Text,
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = {language: list(sentences[:8]) for language, sentences in parallel_text.items()}
    text["de"][3] = text["tr"][3] = text["en"][6] = "Ada"
    assert run(model, tokenizer, text).counts["de"] == 8  # with BOS in front, the word counts
    assert not caplog.records
    tokenizer.backend_tokenizer.post_processor = None
    space = run(model, tokenizer, text)
    assert "2 row(s) are left out" in caplog.text
    assert "(first: sentence 7 (from 1) of 'en', 'Ada')" in caplog.text
    rest = {language: [*each[:3], *each[4:6], each[7]] for language, each in text.items()}
    assert_close(space, run(model, tokenizer, rest))
    assert space.counts == dict.fromkeys(text, 6)
    assert run(model, tokenizer, text, recipe="official").counts["de"] == 8  # every token counts


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        (
            {"de": ["Rom"] * 3, "sw": ["paka"] * 3},
            {},
            ValueError,
            "pivot: 'en' has no sentences; found de, sw",
        ),
        ({"en": ["cat"], "sw": ["paka"]}, {}, DataError, "at least two sentences"),
        ({"en": ["cat", "red"]}, {}, ValueError, "got only 'en'"),
        ({"en": ["cat", ""], "sw": ["paka", "ana"]}, {}, DataError, "empty"),
        (None, {"languages": ["de", "sw"]}, ValueError, "pivot: 'en' has no sentences; found de, sw"),
        (None, {"languages": ["en", "fr"]}, DataError, "'fr'"),
        (None, {"pivot": "fr"}, ValueError, "pivot: 'fr' has no sentences; found en, de, sw, tr"),
        (None, {"boundaries": [4]}, ValueError, r"boundaries: got \[4\]; wanted some of 0 … 3"),
        (None, {"boundaries": []}, ValueError, r"boundaries: got \[\]"),
        (None, {"recipe": "fast"}, ValueError, "recipe: got 'fast'; wanted 'stable' or 'official'"),
        (None, {"batch_size": 0}, ValueError, "batch_size: got 0"),
        (None, {"memory_gib": 0}, ValueError, "memory_gib: got 0"),
        (None, {"max_length": 0}, ValueError, "max_length: got 0"),
        (None, {"rank": 0}, ValueError, "rank: got 0"),
    ],
)
def test_bad_input_is_refused(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    parallel_text: Text,
    *,
    text: Text | None,
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(model, tokenizer, parallel_text if text is None else text, **options)


def test_languages_are_read_in_the_order_asked_for_and_from_a_file(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text, tmp_path: Path
) -> None:
    path = tmp_path / "parallel.jsonl"
    rows = [dict(zip(parallel_text, row, strict=True)) for row in zip(*parallel_text.values(), strict=True)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    space = run(model, tokenizer, path, "sw", languages=["tr", "sw"])
    whole = run(model, tokenizer, parallel_text)
    assert (space.languages, space.pivot) == (("tr", "sw"), "sw")
    torch.testing.assert_close(space.mean, whole.mean[:, [3, 2]], **CLOSE)


def test_the_card_describes_model_tokenizer_and_versions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text, tmp_path: Path
) -> None:
    space = run(model, tokenizer, parallel_text, rank=3)
    space.save(tmp_path)
    card = LanguageSpace.load(tmp_path).card
    assert card == space.card  # everything in it survives JSON
    assert card["model"]["fingerprint"] == model_fingerprint(model)
    assert card["model"]["class"] == "LlamaForCausalLM"
    assert card["tokenizer"]["bos_token"] == "<s>"
    assert card["tokenizer"]["vocabulary_size"] == len(tokenizer)
    assert card["versions"]["shifcon_fast"] == shifcon_fast.__version__
    assert card["versions"]["torch"] == torch.__version__
    assert (card["recipe"], card["rank"], card["variance"]) == ("stable", 3, None)
    before = card["tokenizer"]["vocabulary_sha256"]
    tokenizer.add_tokens(["neu"])
    after = run(model, tokenizer, parallel_text, subspaces=False).card["tokenizer"]["vocabulary_sha256"]
    assert before != after


def test_another_model_refuses_the_space(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerFast, parallel_text: Text
) -> None:
    space = run(tiny_model(), tokenizer, parallel_text)
    attach(tiny_model(), space, forward=1, backward=2).detach()
    with pytest.raises(ValueError, match="it was estimated on another model"):
        attach(tiny_model(seed=1), space, forward=1, backward=2)


def test_large_bases_are_announced(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    parallel_text: Text,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        run(model, tokenizer, parallel_text)
        assert caplog.records == []
        run(model, tokenizer, parallel_text, rank=2, memory_gib=1e-6)
    assert "rank= (--rank) caps them (median rank: 2)" in caplog.text


def test_progress_is_shown_on_request(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    parallel_text: Text,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(model, tokenizer, parallel_text)
    assert capsys.readouterr().err == ""
    estimate_space(model, tokenizer, parallel_text)
    assert "96/96" in capsys.readouterr().err
