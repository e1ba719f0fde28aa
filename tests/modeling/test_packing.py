"""Sentences that share rows against each of them alone, in float64, for every architecture that packs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from shifcon_fast.modeling import packing
from shifcon_fast.modeling.architectures import ARCHITECTURES, locate_decoder
from shifcon_fast.modeling.attach import attach
from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.modeling.packing import best_fit, packing_of
from shifcon_fast.notices import warn_once

LENGTHS = (24, 10, 9, 5, 20, 3)  # beyond the sliding windows of 16, and not in order
IDS = torch.tensor([1, 2, 0, -1, 0, 1])
ONLY_FLOAT32 = {"mixtral", "qwen2_moe", "qwen3_moe"}  # their experts are
# One of each way to make a mask; the others differ from these by names.
REPRESENTATIVES = {
    "llama",
    "mistral",
    "llama4_text",
    "gemma3_text",
    "gemma4_text",
    "olmo2",
    "gpt_neox",
    "gpt2",
}


def make_batch(lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    """Padded on the right; the first token of each sentence and one in its middle are not content."""
    generator = torch.Generator().manual_seed(4)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 128, mask.shape, generator=generator).masked_fill(mask == 0, 0)
    pool = mask.bool()
    pool[:, 0] = pool[:, 2] = False
    return {"input_ids": ids, "attention_mask": mask, "pool_mask": pool}


def alone(model: Any, batch: dict[str, Tensor], boundaries: Sequence[int], ids: Tensor | None) -> Tensor:
    rows = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        one = {name: value[row : row + 1, :length] for name, value in batch.items()}
        language = None if ids is None else ids[row : row + 1]
        rows.append(
            boundary_representations(
                model, **one, boundaries=boundaries, language_ids=language, keep_massive=True
            )
        )
    return torch.cat(rows, dim=1)


def widths(model: Any) -> list[tuple[int, ...]]:
    """The shapes that the first block gets, as a list filled by a hook."""
    seen: list[tuple[int, ...]] = []
    block = locate_decoder(model).blocks[0]
    block.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[:2])))
    return seen


@pytest.mark.every_architecture(
    only=lambda row: row.packs, column="packed translation pairs", quick=REPRESENTATIVES
)
@pytest.mark.parametrize("shifted", [True, False])
def test_sentences_that_share_rows_are_as_if_alone(architecture, shifted, tiny_model, random_space):
    dtype = torch.float32 if architecture in ONLY_FLOAT32 else torch.float64
    model = tiny_model(architecture, dtype=dtype)
    attach(model, random_space(model), forward=1, backward=3)
    batch, ids, boundaries = make_batch(), IDS if shifted else None, [0, 1, 2, 3]
    probe = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(5))

    def together() -> Tensor:
        return boundary_representations(
            model, **batch, boundaries=boundaries, language_ids=ids, keep_massive=True
        )

    seen, found, gradients = widths(model), [], []
    for compute in (together, lambda: alone(model, batch, boundaries, ids)):
        model.zero_grad()
        found.append(compute())
        (found[-1] * probe).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    chunks = architecture == "llama4_text" and not packing._CHUNKS_OF_SENTENCES
    assert seen[0] == ((6, 24) if chunks else (3, 24))
    # Attention weights are float32 in some of them, whatever the model is.
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-6)
    assert len(gradients[0]) > 8
    assert gradients[0].keys() == gradients[1].keys()
    scale = max(float(gradient.abs().max()) for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("architecture", [row.model_type for row in ARCHITECTURES.values() if not row.packs])
def test_other_architectures_keep_padding(architecture, tiny_model):
    model = tiny_model(architecture)
    seen = widths(model)
    with torch.no_grad():
        boundary_representations(model, **make_batch(), boundaries=[1])
    assert seen == [(6, 24)]


@pytest.mark.parametrize("keep_massive", [False, True])
def test_tokens_of_massive_norm_are_left_out_of_packed_sentences(keep_massive, tiny_model):
    model = tiny_model("llama", dtype=torch.float64)
    batch = make_batch()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] *= 100
        batch["input_ids"][0, 4] = batch["input_ids"][3, 3] = 5
        packed = boundary_representations(model, **batch, boundaries=[0, 2], keep_massive=keep_massive)
        found = torch.cat(
            [
                boundary_representations(
                    model,
                    **{name: value[row : row + 1, :length] for name, value in batch.items()},
                    boundaries=[0, 2],
                    keep_massive=keep_massive,
                )
                for row, length in enumerate(LENGTHS)
            ],
            dim=1,
        )
    torch.testing.assert_close(packed, found, rtol=1e-9, atol=1e-9)
    assert (packed[0, 0].norm() > 5 * packed[0, 1].norm()) == keep_massive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sentence_without_content_gives_zeros_and_no_gradient(dtype, tiny_model):
    model = tiny_model("llama", dtype=dtype)
    batch = make_batch()
    batch["pool_mask"][3] = False
    found = boundary_representations(model, **batch, boundaries=[2])
    assert found.dtype == torch.float32
    assert torch.equal(found[0, 3], torch.zeros(32))
    found[0, 3].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def _of_one_row(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any) -> Any:
    """What FlashAttention does with a row whose positions begin again: sentence by sentence."""
    positions = given["position_ids"]
    assert positions.shape[0] == query.shape[0] == 1, (
        "transformers looks for packed sentences in one row only"
    )
    starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), positions.shape[1]]
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    parts = [
        functional.scaled_dot_product_attention(
            *(each[:, :, start:end] for each in (query, key, value)), is_causal=True, scale=module.scaling
        )
        for start, end in itertools.pairwise(starts)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("shifted", [False, True])
def test_implementations_of_attention(attention, shifted, tiny_model, random_space, monkeypatch):
    model = tiny_model("qwen2", dtype=torch.float64)
    batch, ids = make_batch(), IDS if shifted else None
    attach(model, random_space(model), forward=1, backward=3)
    with torch.no_grad():
        expected = alone(model, batch, [1, 2, 3], ids)
        monkeypatch.setattr(model.config, "_attn_implementation_internal", attention)
        if attention.startswith("flash"):
            monkeypatch.setitem(AttentionInterface._global_mapping, attention, _of_one_row)
        seen = widths(model)
        found = boundary_representations(
            model, **batch, boundaries=[1, 2, 3], language_ids=ids, keep_massive=True
        )
    assert seen == [(1, 72) if attention.startswith("flash") else (3, 24)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # eager's weights are float32


def test_an_attention_that_is_not_known_keeps_padding_and_says_so(tiny_model, monkeypatch, caplog):
    warn_once.cache_clear()
    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "paged|sdpa")
    decoder = locate_decoder(model)
    for _ in range(2):
        assert packing_of(make_batch()["attention_mask"], decoder) is None
    (said,) = [record.message for record in caplog.records]
    assert "batches are padded: whether the attention 'paged|sdpa' keeps sentences" in said


def test_chunks_of_attention_are_those_of_a_sentence_or_padding_stays(tiny_model, monkeypatch):
    decoder = locate_decoder(tiny_model("llama4_text"))
    chunk, mask = decoder.module.config.attention_chunk_size, make_batch()["attention_mask"]
    assert mask.shape[1] > chunk
    monkeypatch.setattr(packing, "_CHUNKS_OF_SENTENCES", True)
    assert packing_of(mask, decoder) is not None
    monkeypatch.setattr(packing, "_CHUNKS_OF_SENTENCES", False)
    assert packing_of(mask, decoder) is None
    assert packing_of(make_batch((chunk, 5, 4, 3))["attention_mask"], decoder) is not None  # one chunk a row


def test_padding_stays_where_packing_wins_nothing_or_lengths_are_not_known(tiny_model):
    decoder = locate_decoder(tiny_model("llama"))
    assert packing_of(make_batch()["attention_mask"], decoder) is not None
    assert packing_of(None, decoder) is None
    assert packing_of(torch.ones(3, 5), decoder) is None
    assert packing_of(make_batch((20, 19, 19, 18))["attention_mask"], decoder) is None
    assert packing_of(make_batch((20, 12, 12, 11))["attention_mask"], decoder) is None  # no two fit in a row
    assert packing_of(make_batch()["attention_mask"].flip(1), decoder) is None  # padded on the left
    with_a_hole = make_batch()["attention_mask"]
    with_a_hole[1, 4] = 0
    assert packing_of(with_a_hole, decoder) is None
    with_nothing = make_batch()["attention_mask"]
    with_nothing[1] = 0
    assert packing_of(with_nothing, decoder) is None
    assert packing_of(make_batch()["attention_mask"].to("meta"), decoder) is None


def test_best_fit():
    assert best_fit([96] * 3 + [48] * 4, 96) == [[3, 4], [5, 6], [0], [1], [2]]
    assert best_fit([7, 5, 3, 2, 1], 8) == [[0, 4], [1, 2], [3]]
    lengths = torch.randint(1, 65, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = best_fit(lengths, 64)
    assert sorted(itertools.chain(*rows)) == list(range(200))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 64
    assert len(rows) <= 1.07 * sum(lengths) / 64 + 1
    assert [len(row) for row in rows] == sorted(map(len, rows), reverse=True)
