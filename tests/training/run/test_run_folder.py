"""Run folders: what is loaded computes what was saved, with our code or PEFT's; foreign folders are refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import shifcon_fast as sf
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.notices import warn_once
from shifcon_fast.training.run import run_card, run_folder
from shifcon_fast.training.run.shift_file import write_shift
from shifcon_fast.training.trainer import ShifConTrainer
from shifcon_fast.training.weights.quantization import load_quantized

IDS = torch.randint(4, 70, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(make_trainer: Callable[..., ShifConTrainer], tmp_path: Path) -> tuple[Path, ShifConTrainer]:
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    return tmp_path / "run", trainer


def test_loaded_run_computes_what_the_trained_model_does(run: tuple[Path, ShifConTrainer]) -> None:
    folder, trainer = run
    trained = trainer.model.eval()
    loaded = sf.load(folder)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    ids = loaded.shifcon.language_ids(["sw", "en"])
    with torch.no_grad():
        shifted = loaded(IDS, language_ids=ids).logits
        assert torch.equal(shifted, trained(IDS, language_ids=ids).logits)
        unshifted = loaded(IDS).logits
    assert (shifted[0] - unshifted[0]).abs().max() > 1e-3
    assert torch.equal(shifted[1], unshifted[1])  # the pivot's row
    output = loaded.generate(IDS, language_ids=ids, max_new_tokens=3, do_sample=False)
    assert output.shape == (2, 12)


def test_plain_peft_loads_it_too(run: tuple[Path, ShifConTrainer], tiny_checkpoint: Path) -> None:
    folder, _ = run
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with pytest.warns(UserWarning, match=r"shifcon_shift_is_left_out_unless_loaded_with_shifcon_fast"):
        plain = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(sf.load(folder)(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


def test_who_loads_the_shift_too_is_not_warned(
    run: tuple[Path, ShifConTrainer], make_trainer: Callable[..., ShifConTrainer], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*shifcon")
        sf.load(run[0])
        make_trainer(save_strategy="steps", save_steps=2).train(
            resume_from_checkpoint=run[0] / "checkpoint-2"
        )
        make_trainer(folder="unshifted", shift=False).save_model()
        unshifted = load_quantized(run_card.read_card(run[0])["base_model"], quantization="none")
        PeftModel.from_pretrained(unshifted, tmp_path / "unshifted")  # loses nothing


class Forced(LogitsProcessor):
    """Makes a model say one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


@pytest.mark.parametrize(
    ("template", "eos", "use", "end"),
    [
        ("{% for m in messages %}{{ m['content'] + ' <unk> ' }}{% endfor %}", "</s>", True, "<unk>"),
        (
            "{% for m in messages %}{{ m['content'] + ' ' + eos_token + ' ' }}{% endfor %}",
            "<unk>",
            True,
            "<unk>",
        ),
        ("{% for m in messages %}{{ m['content'] + ' <unk> ' }}{% endfor %}", "</s>", False, "</s>"),
        (None, "<unk>", True, "<unk>"),
    ],
)
def test_a_run_stops_where_its_turns_end(
    *,
    make_trainer: Callable[..., ShifConTrainer],
    word_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    template: str | None,
    eos: str,
    use: bool,
    end: str,
) -> None:
    """The base model's own EOS is ``</s>``; what ends a turn is what the data was rendered with."""
    tokenizer = deepcopy(word_tokenizer)
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    trainer = make_trainer(
        processing_class=tokenizer, use_chat_template=use, save_strategy="steps", save_steps=3
    )
    trainer.train()
    token, own = tokenizer.convert_tokens_to_ids([end, "</s>"])
    learnt = trainer.train_dataset[0]["labels"]
    assert token in learnt
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-3"):
        assert run_card.read_card(folder)["end_of_turn"] == [token]
        stops = list(dict.fromkeys([token, own]))
        assert GenerationConfig.from_pretrained(folder).eos_token_id == stops
        loaded = sf.load(folder)
        assert loaded.generation_config.eos_token_id == stops
        for said in stops:
            answer = loaded.generate(
                IDS,
                language_ids=loaded.shifcon.language_ids(["sw", "en"]),
                max_new_tokens=5,
                logits_processor=LogitsProcessorList([Forced(said)]),
            )
            assert answer.shape == (2, 10)


def test_a_run_without_an_end_says_so(
    make_trainer: Callable[..., ShifConTrainer],
    word_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_once.cache_clear()
    tokenizer = deepcopy(word_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    for _ in range(2):
        trainer = make_trainer(processing_class=tokenizer)
    trainer.save_model()
    assert caplog.text.count("Nothing ends a response") == 1
    assert run_card.read_card(tmp_path / "run")["end_of_turn"] == []
    assert sf.load(tmp_path / "run").generation_config.eos_token_id == [2]  # the base model's own


def test_generation_settings_that_cannot_be_written_do_not_end_a_run(
    make_trainer: Callable[..., ShifConTrainer], load_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = load_model()
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.5  # transformers reads such settings, and refuses to write them
    make_trainer(model=model).save_model()
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [2]


def test_tokenizer_is_saved_as_it_was(
    run: tuple[Path, ShifConTrainer], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    saved = AutoTokenizer.from_pretrained(run[0])
    text = "Ada lives in Rome"
    assert saved(text).input_ids == word_tokenizer(text).input_ids
    assert saved.special_tokens_map == word_tokenizer.special_tokens_map


def test_log(run: tuple[Path, ShifConTrainer]) -> None:
    folder, _ = run
    log = json.loads((folder / "training_log.json").read_text())
    assert [row["step"] for row in log["steps"]] == [1, 2, 3]
    first = log["steps"][0]
    assert first["loss"] == pytest.approx(
        first["loss_generation"] + 0.2 * first["loss_contrastive"], rel=1e-6
    )
    assert first["learning_rate"] == 0  # warming up


@pytest.mark.parametrize(
    "estimate",
    [None, *(pytest.param(each, marks=pytest.mark.slow("trains in one more way")) for each in (True, False))],
)
@pytest.mark.parametrize("vectors", ["frozen", "ema", "refresh", "running"])
def test_what_is_evaluated_is_what_is_loaded(
    *,
    make_trainer: Callable[..., ShifConTrainer],
    space: sf.LanguageSpace,
    instructions: list[Instruction],
    tmp_path: Path,
    vectors: str,
    estimate: bool | None,
) -> None:
    """The loss of ``evaluate()`` after training is the saved run's, and the last checkpoint is the run."""
    trainer = make_trainer(
        vectors=vectors,
        refresh_every=2,
        final_estimation=estimate,
        eval_dataset=instructions[:6],
        per_device_eval_batch_size=6,
        save_strategy="steps",
        save_steps=3,
    )
    trainer.train()
    told = trainer.evaluate()["eval_loss"]
    batch = trainer.data_collator([trainer.eval_dataset[row] for row in range(6)])
    served = []
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-3"):
        loaded = sf.load(folder)
        with torch.no_grad():
            served.append(loaded(**batch))
        assert served[-1].loss.item() == pytest.approx(told, rel=1e-6)
    assert torch.equal(served[0].logits, served[1].logits)

    saved = loaded.shifcon.shift.vectors
    again = sf.estimate_space(trainer.model, trainer.processing_class, trainer._parallel, progress=False)
    assert (again.mean[2:] - space.mean[2:]).abs().max() > 1e-3  # the model has changed
    if estimate or (estimate is None and vectors != "frozen"):
        torch.testing.assert_close(saved, again.mean[[1, 3]], rtol=1e-5, atol=1e-5)
    elif vectors == "frozen":
        assert torch.equal(saved, space.mean[[1, 3]])


def test_a_run_that_ends_early_is_estimated_on_the_model_that_is_kept(
    make_trainer: Callable[..., ShifConTrainer], tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    trainer = make_trainer(vectors="ema", max_steps=5, callbacks=[Stop()])
    trainer.train()
    again = sf.estimate_space(trainer.model, trainer.processing_class, trainer._parallel, progress=False)
    saved = sf.load(tmp_path / "run").shifcon.shift.vectors
    torch.testing.assert_close(saved, again.mean[[1, 3]], rtol=1e-5, atol=1e-5)


def test_a_failing_final_estimation_keeps_the_trained_model(
    make_trainer: Callable[..., ShifConTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(vectors="ema")
    monkeypatch.setattr(trainer, "_estimate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    ids = {"language_ids": trainer.handle.language_ids(["sw", "en"])}
    with torch.no_grad():
        kept = sf.load(tmp_path / "run")(IDS, **ids).logits
        assert torch.equal(kept, trainer.model.eval()(IDS, **ids).logits)


def test_a_shift_that_training_leaves_next_to_nothing_of_is_said(
    make_trainer: Callable[..., ShifConTrainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make_trainer(vectors="ema", max_steps=1)
    shift = trainer.handle.shift
    assert min(max(shift.dose(code)) for code in ("de", "sw", "tr")) > 0.01
    monkeypatch.setattr(trainer, "_estimate", lambda: replace(shift, vectors=shift.vectors / 1000))
    trainer.train()
    said = "".join(record.getMessage() for record in caplog.records)
    assert said.count("After training: The shift of") == 1
    assert "moves next to nothing" in said


def test_unshifted_run_is_attached_without_effect(
    make_trainer: Callable[..., ShifConTrainer], tmp_path: Path
) -> None:
    make_trainer(shift=False).train()
    loaded = sf.load(tmp_path / "run")
    ids = loaded.shifcon.language_ids(["sw", "de"])
    with torch.no_grad():
        assert torch.equal(loaded(IDS, language_ids=ids).logits, loaded(IDS).logits)
    make_trainer(
        folder="plain", shift=False, w_mcl=0.0, space=None, parallel=None, forward=None, backward=None
    ).train()
    plain = sf.load(tmp_path / "plain")
    assert not hasattr(plain, "shifcon")
    assert plain(IDS).logits.shape == (2, 9, 128)


def test_quantised_run_round_trip(make_trainer: Callable[..., ShifConTrainer], tmp_path: Path) -> None:
    trainer = make_trainer(quantization="nf4")
    trainer.train()
    assert run_card.read_card(tmp_path / "run")["quantization"] == "nf4"
    loaded = sf.load(tmp_path / "run")
    ids = loaded.shifcon.language_ids(["tr", "sw"])
    with torch.no_grad():
        expected = trainer.model.eval()(IDS, language_ids=ids).logits
        torch.testing.assert_close(loaded(IDS, language_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    wide = sf.load(tmp_path / "run", quantization="none")
    assert not getattr(wide.get_base_model(), "is_loaded_in_4bit", False)


def test_save_is_all_or_nothing(run: tuple[Path, ShifConTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, trainer = run
    before = {path: path.read_bytes() for path in folder.glob("*") if path.is_file()}
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).add_(1)

    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()
    assert {path: path.read_bytes() for path in folder.glob("*") if path.is_file()} == before


def test_foreign_and_damaged_folders(
    run: tuple[Path, ShifConTrainer], tiny_checkpoint: Path, tmp_path: Path, space: sf.LanguageSpace
) -> None:
    folder, _ = run
    with pytest.raises(ValueError, match=r"nowhere: no such folder; wanted a run folder"):
        sf.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not ours; wanted a run folder with shifcon\.json"):
        sf.load(tiny_checkpoint)
    space.save(tmp_path / "space")
    with pytest.raises(ValueError, match=r"a language space .*; wanted a run folder"):
        sf.load(tmp_path / "space")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert not list(copy.rglob("language_space*")), "bases are read by nobody who loads a run"
    write_shift(copy, replace(space, mean=space.mean + 1).shift(1, 3))
    with pytest.raises(ValueError, match=r"shift\.safetensors: its SHA-256 is not the one"):
        sf.load(copy)
    shutil.copy(folder / "shift.safetensors", copy)
    card = json.loads((copy / "shifcon.json").read_text())
    (copy / "shifcon.json").write_text(json.dumps({**card, "base_model": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"copy: its base model '.*gone' cannot be loaded; pass base="):
        sf.load(copy)
    assert sf.load(copy, base=tiny_checkpoint).shifcon.forward == 1
    (copy / "shifcon.json").write_text(json.dumps({**card, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version is 99"):
        sf.load(copy)
    (copy / "adapter_config.json").replace(copy / "x.json")
    (copy / "shifcon.json").unlink()
    (copy / "x.json").replace(copy / "adapter_config.json")
    shutil.rmtree(copy / "checkpoint-2")
    shutil.rmtree(copy / "checkpoint-3")
    with pytest.raises(ValueError, match="a PEFT adapter that was not trained here"):
        sf.load(copy)


def test_another_base_model_is_noticed(
    run: tuple[Path, ShifConTrainer], tiny_model: Callable[..., torch.nn.Module], tmp_path: Path
) -> None:
    tiny_model("llama", hidden=64, layers=4, seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"its adapter was trained on .*, not on .*other \(sampled embedding"
    ):
        sf.load(run[0], base=tmp_path / "other")
    tiny_model("llama", hidden=32, layers=4).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="its adapter does not fit the base model"):
        sf.load(run[0], base=tmp_path / "narrow")


def test_only_peft_models_are_saved(tiny_model: Callable[..., torch.nn.Module], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model: got LlamaForCausalLM; wanted a PEFT model"):
        run_folder.save_run(tmp_path / "run", tiny_model(), run_folder.RunState())
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_is_trained_on(run: tuple[Path, ShifConTrainer]) -> None:
    model = sf.load(run[0], is_trainable=True)
    assert model.training
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in run[1].model.named_parameters() if parameter.requires_grad}
    with model.shifcon.use("sw"):
        model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_two_runs_in_one_model(
    run: tuple[Path, ShifConTrainer], make_trainer: Callable[..., ShifConTrainer], tmp_path: Path
) -> None:
    """Each is what it is alone, and shifts in its own area while it is the active one."""
    make_trainer(folder="second", forward=2, backward=3, seed=7).train()
    folders = {"default": run[0], "second": tmp_path / "second"}
    expected = {}
    for name, folder in folders.items():
        alone = sf.load(folder)
        alone.shifcon.language = "sw"
        with torch.no_grad():
            expected[name] = alone(IDS).logits
    model = sf.load(run[0])
    with pytest.raises(ValueError, match="adapter_name: 'default' is an adapter of the model already"):
        sf.load(folders["second"], into=model)
    with pytest.raises(ValueError, match="got one with into="):
        sf.load(folders["second"], into=model, adapter_name="second", quantization="none")
    assert sf.load(folders["second"], into=model, adapter_name="second") is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.shifcon.language = "sw"
    for name in ("default", "second", "default"):
        model.set_adapter(name, inference_mode=True)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, expected[name], rtol=1e-5, atol=1e-5)
        assert model.shifcon.forward == {"default": 1, "second": 2}[name]
