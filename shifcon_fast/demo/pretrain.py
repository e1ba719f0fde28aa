"""Train the demo's tiny Llama on its world's corpus, once: later calls find it in a cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shifcon_fast.demo.muon import Muon
from shifcon_fast.demo.tokenizer import build_tokenizer
from shifcon_fast.demo.world import World, to_jsonl
from shifcon_fast.storage import cache_root, read_json, replacing, write_json

_CARD = "pretraining.json"
_REVISION = 1  # part of the cache key; raise it when the same settings no longer give the same model


@dataclass(frozen=True)
class PretrainSettings:
    """The tiny Llama and its training. Sizes are multiples of 64, the weights that share one NF4 scale.

    ``tokens`` is how many are trained on in all, ``batch_tokens`` how many a step, about; ``matrix_lr`` is Muon's
    for the matrices in the blocks, ``learning_rate`` AdamW's for the rest.
    """

    hidden: int = 128
    intermediate: int = 256
    blocks: int = 8
    heads: int = 4
    tokens: int = 700_000
    batch_tokens: int = 768
    learning_rate: float = 3e-3
    matrix_lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    seed: int = 0


def cache_key(world: World, settings: PretrainSettings) -> str:
    """SHA-256 of all that decides the trained model: the corpus and the settings."""
    digest = hashlib.sha256(to_jsonl(world.corpus))
    digest.update(json.dumps({"revision": _REVISION, **asdict(settings)}, sort_keys=True).encode())
    return digest.hexdigest()


def find_pretrained(world: World, settings: PretrainSettings, cache: str | Path | None = None) -> Path | None:
    """The folder that :func:`pretrain` returns, if it is there."""
    folder = _folder(world, settings, cache)
    if not (folder / _CARD).is_file():
        return None
    card = read_json(folder / _CARD, "the card of a demo model")
    return folder if card.get("key") == cache_key(world, settings) else None


def _folder(world: World, settings: PretrainSettings, cache: str | Path | None) -> Path:
    return Path(cache if cache is not None else cache_root()) / "demo" / cache_key(world, settings)[:16]


def pretrain(
    world: World,
    settings: PretrainSettings | None = None,
    *,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """The folder of a Llama (with its tokenizer) that was trained on ``world.corpus``; trained now if need be.

    A folder in the cache is complete or absent: an interrupted training leaves nothing.

    Args:
        world: see :func:`shifcon_fast.demo.world.build_world`.
        settings: None takes the demo's.
        cache: where models are kept; None takes :func:`cache_root`.
        progress: show a bar.
    """
    settings = settings or PretrainSettings()
    if (folder := find_pretrained(world, settings, cache)) is not None:
        return folder
    key, folder = cache_key(world, settings), _folder(world, settings, cache)
    tokenizer = build_tokenizer()
    started = time.monotonic()
    model, loss = train(world.corpus, tokenizer, settings, progress=progress)
    with replacing(folder, _CARD) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_json(
            staging / _CARD,
            {
                "key": key,
                "world": asdict(world.settings),
                "settings": asdict(settings),
                "loss": loss,
                "seconds": round(time.monotonic() - started, 1),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            },
        )
    return folder


def train(
    corpus: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    settings: PretrainSettings,
    *,
    progress: bool = True,
) -> tuple[LlamaForCausalLM, float]:
    """Next-token training on whole sentences, each between ``<s>`` and ``</s>``; the model and its last loss.

    Sentences of one length make a batch, so that nothing is padded. The loss is in nats a token, the mean of the
    last pass over the corpus.
    """
    sentences = [
        torch.tensor([*ids, tokenizer.eos_token_id])
        for ids in tokenizer([row["text"] for row in corpus])["input_ids"]
    ]
    random = torch.Generator().manual_seed(settings.seed)
    passes = max(1, round(settings.tokens / sum(map(len, sentences))))
    batches = [_batches(sentences, settings.batch_tokens, random) for _ in range(passes)]
    steps = sum(map(len, batches))
    model = _new_model(tokenizer, settings).train()
    optimizers = _optimizers(model, settings)
    schedules = [
        LambdaLR(each, lambda step: _learning_rate(step / steps, settings.warmup)) for each in optimizers
    ]
    mean_loss = math.inf
    with tqdm(total=steps, desc="pretraining", unit="step", disable=not progress) as bar:
        for batches_of_pass in batches:
            losses = []
            for batch in batches_of_pass:
                logits = model(batch).logits[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                losses.append(float(loss.detach()))
                bar.update()
            mean_loss = sum(losses) / len(losses)
            bar.set_postfix(loss=f"{mean_loss:.3f}")
    return model.eval(), mean_loss


def _new_model(tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def _optimizers(model: LlamaForCausalLM, settings: PretrainSettings) -> list[Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(matrices, lr=settings.matrix_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(
            rest,
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            fused=True,
        ),
    ]


def _learning_rate(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to 2 %; a share of the peak."""
    if progress < warmup:
        return progress / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _batches(sentences: Sequence[Tensor], tokens: int, random: torch.Generator) -> list[Tensor]:
    """All sentences in random order, in batches of one length each and about ``tokens`` tokens."""
    by_length: dict[int, list[Tensor]] = {}
    for index in torch.randperm(len(sentences), generator=random).tolist():
        by_length.setdefault(len(sentences[index]), []).append(sentences[index])
    batches = []
    for length, same in by_length.items():
        count = max(1, round(len(same) * length / tokens))
        batches += [torch.stack(same[start::count]) for start in range(count)]
    return [batches[index] for index in torch.randperm(len(batches), generator=random).tolist()]
