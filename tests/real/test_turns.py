"""On real tokenizers and a real model: a response is learnt behind the prompt of generation, and answers end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import shifcon_fast as sf
from shifcon_fast.data.chat_template import end_of_turn
from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction, Turn
from shifcon_fast.data.prompts import encode_example, encode_prompt

LIMIT = 24
CAPITALS = {
    "en": [("What is the capital of Kenya?", "Nairobi"), ("What is the capital of France?", "Paris")],
    "de": [
        ("Was ist die Hauptstadt von Kenia?", "Nairobi"),
        ("Was ist die Hauptstadt von Frankreich?", "Paris"),
    ],
}
PARALLEL = {
    "en": ["The cat is old.", "She reads a book.", "It rains today.", "We live in a small town."],
    "de": [
        "Die Katze ist alt.",
        "Sie liest ein Buch.",
        "Heute regnet es.",
        "Wir wohnen in einer kleinen Stadt.",
    ],
}
# Gemma's own template, without its images and tools.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role'])"
    " + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The prompt opens the reasoning, as in DeepSeek-R1's distils, and with one line feed, as in Qwen's thinking models.
THINKING = (
    "{% for m in messages %}{% set content = m['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def learnt(tokenizer: PreTrainedTokenizerBase, turns: tuple[Turn, ...]) -> str:
    """What is learnt behind the prompt that generation uses."""
    example = encode_example(tokenizer, Instruction("sw", turns))
    prompt = encode_prompt(tokenizer, turns[:-1])
    assert example.input_ids[: len(prompt)] == prompt
    assert all(example.learnt[len(prompt) :])
    return tokenizer.decode(example.input_ids[len(prompt) :])


@pytest.mark.parametrize("response", ["Nairobi", "\n\nNairobi", "Jibu:\n\n* Nairobi 🙂", "<b>Nairobi</b>"])
def test_chatml(smollm2: Path, response: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == ["<|im_end|>"]
    turns = (Turn("user", "Mji mkuu wa Kenya?"), Turn("assistant", response))
    assert learnt(tokenizer, turns) == response + "<|im_end|>\n"
    tokenizer.chat_template = THINKING
    assert learnt(tokenizer, turns) == response + "<|im_end|>\n"
    reasoned = (turns[0], Turn("assistant", f"<think>\nKenya.\n</think>\n\n{response}"))
    assert learnt(tokenizer, reasoned) == f"Kenya.\n</think>\n\n{response}<|im_end|>\n"


def test_gemma(gemma3: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    turns = (Turn("user", "Mji mkuu wa Kenya?"), Turn("assistant", "Nairobi\n"))
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == ["<eos>"]
    assert learnt(tokenizer, turns) == "Nairobi\n<eos>"
    tokenizer.chat_template = GEMMA
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == ["<end_of_turn>"]
    assert learnt(tokenizer, turns) == "Nairobi<end_of_turn>\n"
    with pytest.raises(DataError, match=r"line 3: .*System role not supported.*first user message"):
        encode_example(tokenizer, Instruction("sw", (Turn("system", "Kwa ufupi."), *turns), "line 3"))


def test_answers_of_a_trained_run_end(smollm2: Path, tmp_path: Path) -> None:
    """ChatML on a model whose own settings end generation at ``<|endoftext|>``, trained in NF4 and loaded again."""
    base = tmp_path / "base"
    base.mkdir()
    for file in smollm2.iterdir():
        if file.is_file():
            (base / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(base)
    document_end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text())
        (base / name).unlink()
        (base / name).write_text(json.dumps({**settings, "eos_token_id": document_end}))

    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = sf.load_quantized(base, lora, "nf4", gradient_checkpointing=False)
    space = sf.estimate_space(model, tokenizer, PARALLEL, subspaces=False, progress=False)
    trainer = sf.ShifConTrainer(
        model,
        sf.ShifConArguments(
            str(tmp_path / "run"),
            forward=10,
            backward=20,
            alpha=0.05,
            w_mcl=0.0,
            w_gen=1.0,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_steps=5,
            logging_steps=1,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        train_dataset=[
            Instruction.single(language, prompt, response)
            for language, pairs in CAPITALS.items()
            for prompt, response in pairs
        ],
        space=space,
    )
    trainer.train()
    steps = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert steps[-1] < steps[0] / 4  # 9.0 before
    del model, trainer

    run = sf.load(tmp_path / "run")
    assert run.get_base_model().is_loaded_in_4bit
    assert run.generation_config.eos_token_id == [turn_end, document_end]
    prompt = torch.tensor([encode_prompt(tokenizer, CAPITALS["de"][0][0])])
    ids = run.shifcon.language_ids("de")
    settings = {"language_ids": ids, "max_new_tokens": LIMIT, "do_sample": False, "pad_token_id": turn_end}
    answer = run.generate(prompt, **settings)[0, prompt.shape[1] :].tolist()
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() in ("Nairobi", "Paris")
    assert len(answer) < LIMIT
    assert answer[-1] == turn_end
    before = run.generate(prompt, eos_token_id=document_end, **settings)[0, prompt.shape[1] :].tolist()
    assert before[: len(answer)] == answer
    assert len(before) == LIMIT  # what the base model's settings alone would do
