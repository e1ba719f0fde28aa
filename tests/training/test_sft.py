"""TRL's SFTTrainer with the shift: every row, packed or not, is shifted by its language, and that is proven."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import shifcon_fast as sf
from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.modeling.attach import attach
from shifcon_fast.training.sft import ShifConSFTConfig, ShifConSFTTrainer

LANGUAGES = ("en", "de", "sw", "tr")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}: "
    "{% generation %}{{ message['content'] }} </s>{% endgeneration %}"
    "{% else %}? {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}: {% endif %}"
)


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def rows(instructions: list[Instruction]) -> list[dict[str, str]]:
    return [
        {"lang": each.language, "prompt": each.turns[0].content, "completion": " " + each.turns[1].content}
        for each in instructions[:12]
    ]


@pytest.fixture(scope="module")
def tokenizer(word_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(word_tokenizer)  # TRL sets its padding token


@pytest.fixture
def make_sft(  # noqa: PLR0917 - pytest passes fixtures by name
    load_model: Callable[..., Any],
    space: Any,
    tokenizer: PreTrainedTokenizerFast,
    parallel_text: dict[str, list[str]],
    rows: list[dict[str, str]],
    tmp_path: Path,
) -> Callable[..., ShifConSFTTrainer]:
    """A trainer that sees all rows in its one step and, unless it is told to, learns nothing."""

    def make(*, train: Any = None, **settings: Any) -> ShifConSFTTrainer:
        inputs: dict[str, Any] = {
            "model": None,
            "processing_class": tokenizer,
            "eval_dataset": None,
            "space": space,
            "parallel": parallel_text if settings.get("w_mcl") else None,
        }
        inputs.update({name: settings.pop(name) for name in list(settings) if name in inputs})
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "forward": 1,
            "backward": 3,
            "w_gen": 1.0,
            "w_mcl": 0.0,
            "contrastive_batch_size": 4,
            "max_steps": 1,
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        model = inputs.pop("model") or load_model()
        train = datasets.Dataset.from_list(rows) if train is None else train
        args = ShifConSFTConfig(**{**defaults, **settings})
        return ShifConSFTTrainer(model, args, train_dataset=train, **inputs)

    return make


def naive(
    model: Any, examples: list[tuple[str, list[int], list[int]]], *, shifted: bool = True
) -> dict[str, tuple[float, int]]:
    """Language → summed loss and number of learnt tokens of (language, ids, labels), a sentence at a time."""
    sums: dict[str, tuple[float, int]] = {}
    for language, ids, labels in examples:
        settings = {"language_ids": model.shifcon.language_ids(language)} if shifted else {}
        with torch.no_grad():
            logits = model.base_model.model.model(torch.tensor([ids]), **settings).last_hidden_state
            logits = model.base_model.model.lm_head(logits)[0, :-1].double()
        target = torch.tensor(labels[1:])
        before, tokens = sums.get(language, (0.0, 0))
        loss = functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        sums[language] = before + float(loss), tokens + int((target != -100).sum())
    return sums


def completions(tokenizer: Any, rows: list[dict[str, str]]) -> list[tuple[str, list[int], list[int]]]:
    examples = []
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = [*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id]
        examples.append((row["lang"], ids, [-100] * len(prompt) + ids[len(prompt) :]))
    return examples


def assert_losses(trainer: ShifConSFTTrainer, examples: list[Any]) -> None:
    """The logged losses are those of the shifted model, in all and by language, and not the unshifted one's."""
    log = trainer.state.log_history[0]
    sums = naive(trainer.model, examples)
    total, tokens = (sum(each) for each in zip(*sums.values(), strict=True))
    assert log["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert log["loss_generation"] == pytest.approx(total / tokens, rel=1e-5)
    assert {name for name in log if name.startswith("loss_generation_")} == {
        f"loss_generation_{language}" for language in sums
    }
    for language, (loss, count) in sums.items():
        assert log[f"loss_generation_{language}"] == pytest.approx(loss / count, rel=1e-5)
    with trainer.handle.suspended():
        unshifted = naive(trainer.model, examples, shifted=False)
    assert unshifted["en"] == pytest.approx(sums["en"], rel=1e-5)
    for language in set(sums) - {"en"}:
        assert abs(unshifted[language][0] - sums[language][0]) > 1e-3 * sums[language][0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": True, "max_length": 40},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing": True, "packing": True, "max_length": 40},
    ],
    ids=["padded", "packed", "padding-free", "packed and checkpointed"],
)
def test_completions_of_mixed_batches_are_learnt_shifted(
    make_sft: Callable[..., ShifConSFTTrainer],
    tokenizer: Any,
    rows: list[dict[str, str]],
    settings: dict[str, Any],
) -> None:
    trainer = make_sft(**settings)
    if settings.get("packing"):
        packed = trainer.train_dataset[:]
        assert max(len(set(row)) for row in packed["language_ids"]) > 1  # several languages in a row
        assert len(packed["input_ids"]) < len(rows)
    trainer.train()
    assert_losses(trainer, completions(tokenizer, rows))


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_tokens_keep_their_language(
    make_sft: Callable[..., ShifConSFTTrainer],
    tokenizer: Any,
    rows: list[dict[str, str]],
    strategy: str,
) -> None:
    limit = 6
    trainer = make_sft(packing=True, packing_strategy=strategy, max_length=limit)
    expected: Counter[tuple[int, int, int]] = Counter()
    for language, ids, labels in completions(tokenizer, rows):
        kept = slice(limit if strategy == "bfd" else None)
        for token, label in zip(ids[kept], labels[kept], strict=True):
            expected[LANGUAGES.index(language), token, label] += 1
    found: Counter[tuple[int, int, int]] = Counter()
    for row in trainer.train_dataset:
        found.update(zip(row["language_ids"], row["input_ids"], row["labels"], strict=True))
    assert found == expected
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["language_ids"].shape == batch["input_ids"].shape


def test_text_streams_and_tokenised_rows(
    make_sft: Callable[..., ShifConSFTTrainer], tokenizer: Any, rows: list[dict[str, str]]
) -> None:
    text = [{"lang": row["lang"], "text": row["prompt"] + row["completion"]} for row in rows]
    encoded = [[*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id] for row in text]
    examples = [(row["lang"], ids, ids) for row, ids in zip(text, encoded, strict=True)]
    stream = datasets.Dataset.from_list(text).to_iterable_dataset()
    tokenised = datasets.Dataset.from_list(
        [{"language": row["lang"], "input_ids": ids} for row, ids in zip(text, encoded, strict=True)]
    )
    for train, settings in (
        (stream, {}),
        (stream, {"packing": True, "max_length": 40, "gradient_accumulation_steps": 1}),
        (tokenised, {"language_column": "language"}),
    ):
        trainer = make_sft(train=train, **settings)
        trainer.train()
        assert_losses(trainer, examples)


@pytest.mark.parametrize("packing", [False, True])
def test_chat_templates_and_assistant_only_loss(
    make_sft: Callable[..., ShifConSFTTrainer],
    tokenizer: Any,
    rows: list[dict[str, str]],
    packing: bool,
) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    talks = [
        {
            "language": row["lang"],
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ],
        }
        for row in rows
    ]
    examples = []
    for talk in talks:
        made = chatty.apply_chat_template(
            talk["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        labels = [
            token if mark else -100
            for token, mark in zip(made["input_ids"], made["assistant_masks"], strict=True)
        ]
        examples.append((talk["language"], made["input_ids"], labels))
    assert {label for *_, labels in examples for label in labels} > {-100, tokenizer.eos_token_id}
    trainer = make_sft(
        train=datasets.Dataset.from_list(talks),
        processing_class=chatty,
        language_column="language",
        assistant_only_loss=True,
        packing=packing,
        max_length=60,
    )
    trainer.train()
    assert_losses(trainer, examples)


def test_the_contrastive_loss_is_added_and_the_run_loads_and_resumes(
    make_sft: Callable[..., ShifConSFTTrainer], rows: list[dict[str, str]], tmp_path: Path
) -> None:
    settings = {
        "w_gen": 0.5,
        "w_mcl": 2.0,
        "learning_rate": 1e-2,
        "packing": True,
        "max_length": 40,
        "eval_dataset": {"few": datasets.Dataset.from_list(rows[:4])},
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
    }
    trainer = make_sft(max_steps=2, **settings)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.5 * log["loss_generation"] + 2 * log["loss_contrastive"], rel=1e-5)
    metrics = trainer.evaluate()
    assert {"eval_few_loss", "eval_few_loss_sw", "eval_few_loss_en"} < metrics.keys()
    assert trainer.evaluate(datasets.Dataset.from_list(rows[:4]))["eval_loss"] == metrics["eval_few_loss"]
    written = json.loads((tmp_path / "run" / "training_log.json").read_text())["steps"]
    assert [row["step"] for row in written] == [1, 2]
    assert "loss_generation_sw" in written[0]
    model = sf.load(tmp_path / "run")
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        for language in ("sw", "en"):
            given = {"language_ids": model.shifcon.language_ids(language)}
            assert torch.equal(model(ids, **given).logits, trainer.model.eval()(ids, **given).logits)
    again = make_sft(max_steps=2, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert again.state.log_history[1]["loss"] == trainer.state.log_history[1]["loss"]
    for name, value in again.model.named_parameters():
        assert torch.equal(value, trainer.model.get_parameter(name)), name


def test_what_does_not_fit_is_refused(
    make_sft: Callable[..., ShifConSFTTrainer], rows: list[dict[str, str]], load_model: Any
) -> None:
    with pytest.raises(ValueError, match="too_long: got 'drop'; here TRL's max_length and truncation_mode"):
        make_sft(too_long="drop")
    with pytest.raises(ValueError, match="use_chat_template: got False; here TRL's"):
        make_sft(use_chat_template=False)
    without = datasets.Dataset.from_list([{"text": row["prompt"]} for row in rows])
    with pytest.raises(DataError, match=r"has 'text'; .* wanted a code in 'lang' \(language_column\)"):
        make_sft(train=without)
    with pytest.raises(DataError, match=r"row 1 \(from 0\) .*: 'lang' is null"):
        make_sft(train=without.add_column("lang", ["en", None, *["sw"] * 10]))
    with pytest.raises(DataError, match=r"row 0 .*got 'xx'; wanted one of en, de, sw, tr"):
        make_sft(train=without.add_column("lang", ["xx"] * 12))
    model = load_model()
    with pytest.raises(ValueError, match="peft_config: not taken here"):
        ShifConSFTTrainer(model, ShifConSFTConfig(output_dir="x"), peft_config=object())
    assert not hasattr(model, "shifcon")
    make_sft(train=without, shift=False)  # nothing is shifted, and no language is needed


def test_an_attached_model_in_plain_sft_is_warned_of(
    load_model: Callable[..., Any], space: Any, tokenizer: Any, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """TRL's fused head calls the decoder itself, without the language."""
    model = load_model()
    attach(model, space, 1, 3)
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True
    )
    trainer = SFTTrainer(
        model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    with pytest.warns(UserWarning, match="runs unshifted"):
        trainer.train()
    assert model.shifcon.engagements[1]["shift"] == model.shifcon.engagements[3]["shift"] == 0
    # Where all rows are in one language, saying it is enough.
    model.shifcon.language = "sw"
    trainer.train()
    assert model.shifcon.engagements[1]["shift"] == model.shifcon.engagements[3]["shift"] > 0


def test_ours_is_not_warned_of_and_counts_its_shifts(make_sft: Callable[..., ShifConSFTTrainer]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unshifted")
        trainer = make_sft(packing=True, max_length=40, gradient_accumulation_steps=1)
        trainer.handle.reset_engagements()
        trainer.train()
    # One batch, and once more when checkpointing recomputes the blocks.
    assert {
        block: sites["shift"] for block, sites in trainer.handle.engagements.items() if "shift" in sites
    } == {
        1: 2,
        3: 2,
    }


def test_alpha_is_learnt_in_float32_beside_adapters_in_bfloat16(
    make_sft: Callable[..., ShifConSFTTrainer], load_model: Callable[..., Any]
) -> None:
    trainer = make_sft(
        model=load_model(quantization="nf4"),
        learn_alpha=True,
        alpha_learning_rate=1e-3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    trainer.train()
    assert trainer.handle is not None
    learnt = trainer.handle.learnt_alphas
    assert learnt is not None
    assert learnt.dtype == torch.float32
    for code in ("sw", "de"):  # bfloat16 would have rounded such a step away
        step = abs(trainer.handle.shift.alphas_by_language[code] - 1)
        assert step == pytest.approx(1e-3, rel=1e-3)
