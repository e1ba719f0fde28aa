"""QLoRA training on the device: NF4 weights from bitsandbytes, adapters that learn, the whole trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import shifcon_fast as sf
from shifcon_fast import ops
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.modeling.estimate_space import estimate_space
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.trainer import ShifConTrainer
from shifcon_fast.training.weights.quantization import nf4_problem

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; put its wheel into wheels/")
FORWARD, BACKWARD = 1, 3


def load(checkpoint: Any, **settings: Any) -> Any:
    torch.manual_seed(11)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return sf.load_quantized(checkpoint, lora, "nf4", **settings)


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in adapters(model).items()}


def test_nf4_works_and_the_model_lies_on_the_device(device, tiny_checkpoint):
    assert nf4_problem(device) is None
    model = load(tiny_checkpoint)
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
    quantised = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(quantised) == 4 * 7
    if device.type == "cuda":
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_gradients_equal_those_of_the_cpu(device, tiny_checkpoint):
    """Same weights and adapters, float32 on both; what bitsandbytes dequantises may differ in a last bit."""
    ids = torch.randint(4, 100, (2, 9))
    on_cpu = load(tiny_checkpoint, device_map={"": "cpu"}, dtype=torch.float32)
    expected = gradients(on_cpu, ids)
    model = load(tiny_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            parameter.copy_(adapters(on_cpu)[name])
    for name, gradient in gradients(model, ids.to(device)).items():
        error = (gradient.cpu() - expected[name]).norm() / expected[name].norm()
        assert error < 2e-2, f"{name} is off by {error:.1e}"


def test_training_after_an_evaluation_has_the_same_gradients(device, tiny_checkpoint):
    model = load(tiny_checkpoint)
    ids = torch.randint(4, 100, (2, 9), device=device)
    before = gradients(model, ids)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    for name, gradient in gradients(model, ids).items():
        assert before[name].abs().max() > 0, name
        # Attention's own backward adds up in no fixed order on CUDA, in bfloat16.
        assert (gradient - before[name]).norm() <= 1e-2 * before[name].norm(), name


def test_both_losses_fall_and_only_adapters_change(device, tiny_checkpoint, random_space, only_fast):
    model = load(tiny_checkpoint)
    handle = sf.attach(model, random_space(model), FORWARD, BACKWARD)
    ids = torch.randint(4, 100, (4, 9), device=device)
    pairs = torch.randint(4, 100, (8, 7), device=device)
    mask = torch.ones_like(pairs)
    contrastive = {
        "input_ids": pairs,
        "attention_mask": mask,
        "pool_mask": mask,
        "language_ids": torch.tensor([2] * 4 + [0, 1, 0, 1], device=device),
    }
    languages = torch.tensor([0, 1, 2, -1], device=device)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=5e-3)
    ops.reset_call_counts()
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        generation = model(input_ids=ids, labels=ids, language_ids=languages, use_cache=False).loss
        contrast = sf.mcl_loss(model, contrastive, handle)
        (0.5 * generation + 2 * contrast).backward()
        for name, parameter in adapters(model).items():
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name
        optimizer.step()
        history.append((generation.item(), contrast.item()))
    assert history[-1][0] < 0.8 * history[0][0], history
    assert history[-1][1] < 0.5 * history[0][1], history
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert only_fast(ops.call_counts())
    assert handle.bypassed == {}


def test_the_trainer_end_to_end(device, tiny_checkpoint, word_tokenizer, parallel_text, tmp_path):
    """Space on the quantised model, training with both losses and a following space, a run folder that loads."""
    instructions = [
        Instruction.single(language, *text.rpartition(" ")[::2])
        for language, sentences in parallel_text.items()
        for text in sentences[:8]
    ]
    model = load(tiny_checkpoint)
    space = estimate_space(model, word_tokenizer, parallel_text, progress=False)
    trainer = ShifConTrainer(
        model,
        ShifConArguments(
            output_dir=str(tmp_path / "run"),
            forward=FORWARD,
            backward=BACKWARD,
            max_steps=12,
            per_device_train_batch_size=8,
            contrastive_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            vectors="ema",
            use_cpu=device.type == "cpu",
        ),
        processing_class=word_tokenizer,
        train_dataset=instructions,
        parallel=parallel_text,
        space=space,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss_generation" in row]
    assert len(rows) == 12
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss_generation", "loss_contrastive"))
    early, late = (sum(row["loss"] for row in part) for part in (rows[:4], rows[-4:]))
    assert late < early
    loaded = sf.load(tmp_path / "run")
    tokens = word_tokenizer(["Ada anaishi Roma"], return_tensors="pt").to(device)
    ids = loaded.shifcon.language_ids(["sw"], device=device)
    generated = loaded.generate(**tokens, language_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > tokens["input_ids"].shape[1]
