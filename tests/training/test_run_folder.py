"""Run folders: what is loaded computes what was saved, with our code or PEFT's; foreign folders are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import shifcon_fast as sf
from shifcon_fast.training import run_folder
from shifcon_fast.training.trainer import ShifConTrainer

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
    plain = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(sf.load(folder)(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


def test_tokenizer_is_saved_as_it_was(
    run: tuple[Path, ShifConTrainer], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    saved = AutoTokenizer.from_pretrained(run[0])
    text = "Ada lives in Rome"
    assert saved(text).input_ids == word_tokenizer(text).input_ids
    assert saved.special_tokens_map == word_tokenizer.special_tokens_map


def test_log_and_final_space(run: tuple[Path, ShifConTrainer], space: sf.LanguageSpace) -> None:
    folder, trainer = run
    log = json.loads((folder / "training_log.json").read_text())
    assert [row["step"] for row in log["steps"]] == [1, 2, 3]
    first = log["steps"][0]
    assert first["loss"] == pytest.approx(
        0.5 * first["loss_generation"] + 2 * first["loss_contrastive"], rel=1e-6
    )
    assert first["learning_rate"] == 0  # warming up
    final = sf.LanguageSpace.load(folder)
    again = sf.estimate_space(trainer.model, trainer.processing_class, trainer._parallel, progress=False)
    torch.testing.assert_close(final.mean, again.mean, rtol=1e-5, atol=1e-5)
    assert (final.mean[2:] - space.mean[2:]).abs().max() > 1e-3  # the model has changed
    during = sf.LanguageSpace.load(folder / "checkpoint-2")
    assert torch.equal(during.mean, space.mean)  # frozen in training


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
    assert run_folder.read_card(tmp_path / "run")["quantization"] == "nf4"
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
    replace(space, rms=space.rms + 1).save(copy)
    with pytest.raises(ValueError, match=r"language_space\.safetensors: its SHA-256 is not the one"):
        sf.load(copy)
    shutil.copy(folder / "language_space.json", copy)
    shutil.copy(folder / "language_space.safetensors", copy)
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
    with pytest.raises(ValueError, match=r"estimated on .*not on this model"):
        sf.load(run[0], base=tmp_path / "other")
    tiny_model("llama", hidden=32, layers=4).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="its adapter does not fit the base model"):
        sf.load(run[0], base=tmp_path / "narrow")


def test_only_peft_models_are_saved(tiny_model: Callable[..., torch.nn.Module], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model: got LlamaForCausalLM; wanted a PEFT model"):
        run_folder.save_run(tmp_path / "run", tiny_model(), run_folder.RunState())
    assert list((tmp_path / "run").iterdir()) == []
