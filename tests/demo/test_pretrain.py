"""The tiny Llama: it learns, it is cached by what made it, and the cache is whole or absent."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shifcon_fast.demo import pretrain as pretraining
from shifcon_fast.demo.muon import Muon, orthogonalise
from shifcon_fast.demo.pretrain import PretrainSettings, cache_key, pretrain, train
from shifcon_fast.demo.tokenizer import build_tokenizer
from shifcon_fast.demo.world import World, WorldSettings, build_world
from shifcon_fast.storage import cache_root

MICRO = PretrainSettings(hidden=64, intermediate=64, blocks=2, heads=2, tokens=12_000, batch_tokens=256)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(WorldSettings(seed=4, stated=3, english_only=3, parallel=4))


@pytest.fixture(scope="module")
def cached(world, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return cache, pretrain(world, MICRO, cache=cache, progress=False)


def test_training_learns_the_corpus(world) -> None:
    """Below the loss of the best model that knows nothing but how often each word occurs."""
    tokenizer = build_tokenizer()
    ids = [
        i for row in world.corpus for i in [*tokenizer(row["text"])["input_ids"][1:], tokenizer.eos_token_id]
    ]
    counts = torch.bincount(torch.tensor(ids)).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * shares.log()).sum())
    _, loss = train(world.corpus, tokenizer, replace(MICRO, tokens=60_000), progress=False)
    assert loss < 0.5 * entropy


def test_the_returned_loss_is_that_of_the_corpus(world) -> None:
    """With a learning rate of zero the model stays as it was drawn, so its loss can be computed afterwards."""
    settings = replace(MICRO, learning_rate=0.0, matrix_lr=0.0, tokens=1)
    tokenizer = build_tokenizer()
    model, loss = train(world.corpus[:40], tokenizer, settings, progress=False)
    total, count = 0.0, 0
    for row in world.corpus[:40]:
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(ids).logits.double().log_softmax(-1)
        total -= float(logits[0, :-1].gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert loss == pytest.approx(total / count, rel=0.02)  # batches of unequal length weigh the same


def test_the_model_comes_from_the_cache_the_second_time(world, cached, monkeypatch) -> None:
    cache, folder = cached
    monkeypatch.setattr(pretraining, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert pretrain(world, MICRO, cache=cache, progress=False) == folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == len(build_tokenizer())


def test_training_again_gives_the_same_weights(world, cached, tmp_path) -> None:
    again = pretrain(world, MICRO, cache=tmp_path, progress=False)
    first, second = (load_file(folder / "model.safetensors") for folder in (cached[1], again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_key_follows_the_corpus_and_every_setting(world) -> None:
    keys = {cache_key(world, MICRO), cache_key(build_world(WorldSettings(seed=6)), MICRO)}
    keys |= {
        cache_key(world, replace(MICRO, **change)) for change in ({"seed": 1}, {"tokens": 1}, {"blocks": 3})
    }
    assert len(keys) == 5
    assert cache_key(world, MICRO) == cache_key(build_world(world.settings), replace(MICRO))


@pytest.mark.parametrize("when", ["train", "write_json"])
def test_an_interruption_leaves_no_model_behind(world, tmp_path, monkeypatch, when) -> None:
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, when, interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain(world, replace(MICRO, tokens=1), cache=tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))
    folder = pretrain(world, replace(MICRO, tokens=1), cache=tmp_path, progress=False)
    assert (folder / "model.safetensors").is_file()


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("SHIFCON_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("SHIFCON_CACHE")
    assert cache_root().parts[-2:] == (".cache", "shifcon_fast")


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 32), (2, 32, 96)])
def test_orthogonalise_brings_singular_values_near_one_and_keeps_their_vectors(shape) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    found = torch.linalg.svdvals(orthogonalise(matrices).double())
    far = s > 0.1 * s[:, :1]  # the iteration reaches small singular values last
    assert found[far].min() > 0.6
    assert found.max() < 1.3
    rotated = u.mT @ orthogonalise(matrices).double() @ v.mT
    off_diagonal = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-4


def test_muon_steps_as_its_formula_says() -> None:
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(8, 4, generator=generator) for _ in range(2)]
    parameters = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.5)
    expected, momentum = [p.clone() for p in start], [torch.zeros(8, 4) for _ in start]
    for _ in range(3):
        gradients = [torch.randn(8, 4, generator=generator) for _ in start]
        for index, gradient in enumerate(gradients):
            parameters[index].grad = gradient.clone()
            momentum[index] = 0.9 * momentum[index] + 0.1 * gradient
            nesterov = 0.1 * gradient + 0.9 * momentum[index]
            update = orthogonalise(nesterov[None])[0] * 0.2 * math.sqrt(8)
            expected[index] = expected[index] * (1 - 0.1 * 0.5) - 0.1 * update
        optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"params: got a tensor of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
