"""Data sets as ``Trainer`` takes them: tables, streams, tokenised rows, collators of others."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerFast

from shifcon_fast.data.errors import DataError
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.training.batches.language_column import LanguageCollator, place_language_ids
from shifcon_fast.training.losses.learnt_tokens import take_learnt
from shifcon_fast.training.trainer import ShifConTrainer

QUICK = {"max_steps": 2, "w_mcl": 0.0, "w_gen": 1.0, "parallel": None}


@pytest.fixture(scope="module")
def rows(instructions: list[Instruction]) -> list[dict[str, str]]:
    return [
        {"lang": each.language, "prompt": each.turns[0].content, "response": each.turns[1].content}
        for each in instructions
    ]


@pytest.fixture(scope="module")
def model(load_model: Callable[..., Any]) -> Any:
    return load_model()


@pytest.fixture
def batches(make_trainer: Callable[..., ShifConTrainer], model: Any) -> Callable[..., list[dict[str, Any]]]:
    """What a run's model is given in its first steps, without the data shuffled."""

    def take(**settings: Any) -> list[dict[str, Any]]:
        trainer = make_trainer(
            **{**QUICK, "model": model, "train_sampling_strategy": "sequential", **settings}
        )
        first = [dict(batch) for batch in itertools.islice(trainer.get_train_dataloader(), 3)]
        for batch in first:
            take_learnt(batch)  # what is for the trainer alone
        return [{name: value.tolist() for name, value in batch.items()} for batch in first]

    return take


@pytest.fixture(scope="module")
def tokenized(rows: list[dict[str, str]], word_tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """The same rows as people who tokenise themselves have them."""

    def encode(row: dict[str, str]) -> dict[str, Any]:
        prompt = word_tokenizer(row["prompt"] + "\n").input_ids
        response = [*word_tokenizer(row["response"], add_special_tokens=False).input_ids, 2]
        return {
            "input_ids": prompt + response,
            "labels": [-100] * len(prompt) + response,
            "lang": row["lang"],
        }

    return [encode(row) for row in rows]


def test_tables_streams_and_tokenised_rows_train_as_lists_do(
    batches: Callable[..., list[dict[str, Any]]],
    rows: list[dict[str, str]],
    tokenized: list[dict[str, Any]],
    space: Any,
) -> None:
    expected = batches(train_dataset=rows)
    table = datasets.Dataset.from_list(rows)
    assert batches(train_dataset=table) == expected
    assert batches(train_dataset=table.to_iterable_dataset()) == expected
    assert batches(train_dataset=datasets.IterableDataset.from_generator(lambda: iter(rows))) == expected
    renamed = table.rename_column("lang", "language")
    assert batches(train_dataset=renamed, language_column="language") == expected
    listed = [
        {"language": row["lang"], **{name: row[name] for name in ("prompt", "response")}} for row in rows
    ]
    assert batches(train_dataset=listed, language_column="language") == expected
    own = datasets.Dataset.from_list(tokenized)
    assert batches(train_dataset=own) == expected
    assert batches(train_dataset=own.to_iterable_dataset()) == expected
    assert batches(train_dataset=own.with_format("torch")) == expected
    ids = [space.language_id(row["lang"]) for row in tokenized]
    per_row = own.remove_columns("lang").add_column("language_ids", ids)
    assert batches(train_dataset=per_row) == expected
    per_token = own.remove_columns("lang").add_column(
        "language_ids", [[each] * len(row["input_ids"]) for each, row in zip(ids, tokenized, strict=True)]
    )
    (first, *_) = batches(train_dataset=per_token)
    assert first["input_ids"] == expected[0]["input_ids"]
    for row, each, mask in zip(
        first["language_ids"], expected[0]["language_ids"], expected[0]["attention_mask"], strict=True
    ):
        assert row == [each if attended else -1 for attended in mask]


def test_other_peoples_collators_get_their_rows_and_the_batch_its_languages(
    batches: Callable[..., list[dict[str, Any]]],
    tokenized: list[dict[str, Any]],
    word_tokenizer: PreTrainedTokenizerFast,
) -> None:
    own = datasets.Dataset.from_list(tokenized)
    expected = batches(train_dataset=own)
    assert batches(train_dataset=own, data_collator=DataCollatorForSeq2Seq(word_tokenizer)) == expected


def test_a_stream_and_a_padding_free_collator_train_the_same_model(
    make_trainer: Callable[..., ShifConTrainer], tokenized: list[dict[str, Any]]
) -> None:
    """All examples of a batch in one row: an id per token, positions that start over."""
    stream = datasets.Dataset.from_list(tokenized).to_iterable_dataset()
    logs = []
    for collator in (None, DataCollatorWithFlattening()):
        trainer = make_trainer(train_dataset=stream, data_collator=collator, **QUICK)
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "loss" in row])
    for padded, flat in zip(*logs, strict=True):
        losses = {name: value for name, value in padded.items() if name.startswith("loss")}
        assert {"loss_generation_en", "loss_generation_sw"} < losses.keys()
        assert {name: flat[name] for name in losses} == pytest.approx(losses, rel=1e-4)


def test_ids_are_placed_by_rows_or_by_tokens() -> None:
    examples = [{"input_ids": [5, 6, 7], "language_id": 2}, {"input_ids": [8], "language_id": -1}]
    assert place_language_ids(examples, (2, 3)).tolist() == [2, -1]
    assert place_language_ids(examples, (1, 6)).tolist() == [[2, 2, 2, -1, -1, -1]]
    assert place_language_ids(examples, (4, 3), repeats=2).tolist() == [2, -1, 2, -1]
    packed = [{"input_ids": [5, 6, 7], "language_ids": [0, 0, 1]}, {"input_ids": [8], "language_ids": [1]}]
    assert place_language_ids(packed, (2, 3)).tolist() == [[0, 0, 1], [1, -1, -1]]
    assert place_language_ids(packed, (1, 4)).tolist() == [[0, 0, 1, 1]]
    with pytest.raises(DataError, match=r"a batch of shape \(3, 3\) of 2 examples"):
        place_language_ids(examples, (3, 3))
    with pytest.raises(DataError, match="an example: has 'input_ids'; wanted 'language_id'"):
        place_language_ids([{"input_ids": [1]}], (1, 1))

    def left(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_ids": torch.zeros(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]])}

    with pytest.raises(DataError, match="pads on the left"):
        LanguageCollator(left)(packed)


def test_tables_are_compact_and_too_long_rows_are_counted(
    make_trainer: Callable[..., ShifConTrainer],
    rows: list[dict[str, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = datasets.Dataset.from_list(rows)
    trainer = make_trainer(train_dataset=table, **QUICK)
    prepared = trainer.train_dataset
    assert sorted(prepared.column_names) == ["input_ids", "labels", "language_id"]
    for name in ("input_ids", "labels"):
        assert prepared.features[name].feature.dtype == "int32"
    lengths = [len(row["input_ids"]) for row in prepared]
    limit = max(lengths) - 1
    longer = sum(length > limit for length in lengths)
    assert 0 < longer < len(rows)
    said = f"{longer} of {len(rows)} instructions have more than {limit} tokens (max_length): "
    cut = make_trainer(train_dataset=table, max_length=limit, **QUICK)
    assert len(cut.train_dataset) == len(rows)
    assert max(len(row["input_ids"]) for row in cut.train_dataset) == limit
    assert said + "cut at the end" in caplog.text
    dropped = make_trainer(train_dataset=table, max_length=limit, too_long="drop", **QUICK)
    assert len(dropped.train_dataset) == len(rows) - longer
    assert said + "left out" in caplog.text
    with pytest.raises(
        DataError, match=rf"row \d+ \(from 0\) of the given rows: has \d+ tokens; wanted at most {limit}"
    ):
        make_trainer(train_dataset=table, max_length=limit, too_long="error", **QUICK)


def test_what_tokenised_data_lacks_is_said(
    make_trainer: Callable[..., ShifConTrainer],
    tokenized: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = datasets.Dataset.from_list(tokenized)
    without = own.remove_columns("lang")
    with pytest.raises(
        DataError, match=r"tokenised and has 'input_ids', 'labels'; .* wanted a code in 'lang'"
    ):
        make_trainer(train_dataset=without, **QUICK)
    make_trainer(train_dataset=without, **{**QUICK, "shift": False})  # nothing needs a language
    with pytest.raises(
        DataError, match=r"row 0 \(from 0\) of the given rows: language: got 'xx'; wanted one of en"
    ):
        make_trainer(train_dataset=without.add_column("lang", ["xx"] * len(own)), **QUICK)
    with pytest.raises(DataError, match=r"row 0 .*: 'lang' is null"):
        make_trainer(train_dataset=without.add_column("lang", [None, *own["lang"][1:]]), **QUICK)
    with pytest.raises(ValueError, match=r"row 0 .*: has the token None with id 999; .* 128 rows"):
        make_trainer(train_dataset=own.map(lambda row: {"input_ids": [999] * len(row["labels"])}), **QUICK)
    make_trainer(train_dataset=own.remove_columns("labels").add_column("note", ["x"] * len(own)), **QUICK)
    assert "has no 'labels': every token is learnt" in caplog.text
    assert "Columns of the tokenised data that are not used: note" in caplog.text
    with pytest.raises(DataError, match=r"has a transform \(with_transform\)"):
        make_trainer(train_dataset=own.with_transform(lambda batch: batch), **QUICK)


def test_evaluation_sets_may_be_given_later_and_streamed(
    make_trainer: Callable[..., ShifConTrainer], rows: list[dict[str, str]]
) -> None:
    table = datasets.Dataset.from_list(rows)
    trainer = make_trainer(eval_dataset={"all": table}, per_device_eval_batch_size=4, **QUICK)
    expected = trainer.evaluate()
    assert expected["eval_all_loss"] > 0
    assert trainer.evaluate(rows)["eval_loss"] == expected["eval_all_loss"]
    assert trainer.evaluate("all")["eval_loss"] == expected["eval_all_loss"]
    streams = datasets.IterableDatasetDict({"all": table.to_iterable_dataset()})
    assert trainer.evaluate(streams)["eval_all_loss"] == pytest.approx(expected["eval_all_loss"])
    assert trainer.predict(table).metrics["test_loss"] == expected["eval_all_loss"]


def test_a_streamed_run_needs_its_number_of_steps(
    make_trainer: Callable[..., ShifConTrainer], rows: list[dict[str, str]]
) -> None:
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(train_dataset=stream, **{**QUICK, "max_steps": -1})
