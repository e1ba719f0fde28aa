"""Train a small English-dominant Llama on the training part of the project's real text, and write its splits.

    python base_model.py --data ../../../shared/data --output out

writes ``out/base`` (a checkpoint with a byte-level BPE tokenizer) and, for the CLI, ``out/parallel.jsonl``,
``out/instructions.jsonl`` (training), ``out/parallel_dev.jsonl`` (held-out articles of the training set) and
``out/questions.jsonl`` (MGSM, evaluation only).

English sees every sentence, solution and question; another language one sentence in ``--share``. FLORES-200,
MGSM and MSVAMP are for evaluation and never enter the training text (see the data's README).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

LANGUAGES = ["en", "de", "es", "fr", "ru", "zh", "ja", "sw"]  # those that the training questions have
CONTEXT = 256
ANSWER = 56  # tokens that an answer may take; run.sh generates up to 48


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def split_by_article(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """NTREX-128 rows for training and for development: whole articles, every tenth held out."""
    article = {row["row"]: row["doc"] for row in read(data / "ntrex128_docs.jsonl")}
    held_out = set(sorted(set(article.values()))[::10])
    rows = [
        {"row": row["row"], **{language: row[language] for language in LANGUAGES}}
        for row in read(data / "ntrex128.jsonl")
    ]
    train = [row for row in rows if article[row["row"]] not in held_out]
    return train, [row for row in rows if article[row["row"]] in held_out]


def worked_answer(row: dict[str, Any]) -> str:
    """A solution without words, the same in every language: its equations and the answer."""
    return "\n".join([*row["equations"], f"#### {row['answer']}"])


def base_corpus(
    parallel: list[dict[str, Any]], problems: list[dict[str, Any]], share: int, seed: int
) -> list[str]:
    """English in full; one in ``share`` sentences and questions of every other language."""
    texts = [row["en"] for row in parallel]
    texts += [f"{row['en']}\n{row['response_en']}" for row in problems]
    texts += [f"{row['en']}\n{worked_answer(row)}" for row in problems]
    for place, language in enumerate(LANGUAGES[1:]):
        texts += [row[language] for row in parallel[place % share :: share]]
        texts += [f"{row[language]}\n{worked_answer(row)}" for row in problems[place % share :: share]]
    random.Random(seed).shuffle(texts)
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts one after the other, each closed by EOS, cut into rows of ``CONTEXT`` tokens."""
    stream: list[int] = []
    for ids in tokenizer(texts, truncation=True, max_length=CONTEXT - 1)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    rows = len(stream) // CONTEXT
    return torch.tensor(stream[: rows * CONTEXT]).view(rows, CONTEXT)


def write_tasks(
    output: Path,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[dict[str, Any]],
    mgsm: list[dict[str, Any]],
) -> None:
    """Instructions and questions, without the few that leave this small context no room for an answer."""

    def fits(texts: list[str], room: int) -> bool:
        return max(map(len, tokenizer(texts)["input_ids"])) <= CONTEXT - room

    kept = [row for row in problems if fits([f"{row[x]}\n{worked_answer(row)}" for x in LANGUAGES], room=2)]
    write(
        output / "instructions.jsonl",
        [
            {"lang": language, "prompt": row[language], "response": worked_answer(row)}
            for row in kept
            for language in LANGUAGES
        ],
    )
    asked = [row for row in mgsm if fits([row[language] for language in LANGUAGES], room=ANSWER)]
    write(
        output / "questions.jsonl",
        [{key: row[key] for key in ("row", "answer", *LANGUAGES)} for row in asked],
    )


class Packed(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--share", type=int, default=6, help="another language sees one sentence in so many")
    parser.add_argument("--vocabulary", type=int, default=6144)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.data / "ntrex128.jsonl").is_file():
        parser.error(f"--data {options.data}: no ntrex128.jsonl there; wanted the folder of the real text")
    set_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)

    train, dev = split_by_article(options.data)
    problems = read(options.data / "gsm8k_train_multi.jsonl")
    write(options.output / "parallel.jsonl", train)
    write(options.output / "parallel_dev.jsonl", dev)
    texts = base_corpus(train, problems, options.share, options.seed)
    tokenizer = train_tokenizer(texts, options.vocabulary)
    write_tasks(options.output, tokenizer, problems[:800], read(options.data / "mgsm.jsonl"))
    rows = pack(tokenizer, texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {rows.numel() / 1e6:.2f} M tokens an epoch")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output / "base-training"),
            per_device_train_batch_size=16,
            num_train_epochs=options.epochs,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.1,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Packed(rows),
    )
    trainer.train()
    model.save_pretrained(options.output / "base")
    tokenizer.save_pretrained(options.output / "base")
    print(f"base model: {options.output / 'base'}")


if __name__ == "__main__":
    main()
