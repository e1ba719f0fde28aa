"""Language vectors in training, each update by hand in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from shifcon_fast.objective.recipe import OFFICIAL, STABLE
from shifcon_fast.objective.vectors import LanguageVectors
from shifcon_fast.space.language_space import LanguageSpace

AREA = (2, 4)


@pytest.fixture
def space(random_space: Callable[..., LanguageSpace]) -> LanguageSpace:
    return random_space(6, 8)


def sentences(seed: int, rows: int = 4) -> torch.Tensor:
    return 3 * torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(seed))


def test_frozen_vectors_stay(space: LanguageSpace) -> None:
    vectors = LanguageVectors(space.shift(*AREA))
    vectors.add(sentences(0), torch.tensor([0, 0, 1, 1]))
    assert not vectors.step()
    assert torch.equal(vectors.shift(training=True).vectors, space.mean[list(AREA)])


def test_ema_moves_the_languages_of_the_step(space: LanguageSpace) -> None:
    vectors = LanguageVectors(space.shift(*AREA), "ema", decay=0.75)
    first, second = sentences(0), sentences(1)
    vectors.add(first, torch.tensor([0, 0, 2, 2]))  # two micro-batches of one step
    vectors.add(second, torch.tensor([0, 0, 2, 3]))
    assert vectors.step()
    mean = vectors.shift(training=True).vectors
    start = space.mean[list(AREA)].double()
    expected = start.clone()
    groups = {0: [first[:, :2], second[:, :2]], 2: [first[:, 2:], second[:, 2:3]], 3: [second[:, 3:]]}
    for language, parts in groups.items():
        average = torch.cat(parts, dim=1).double().mean(1)
        expected[:, language] = 0.75 * start[:, language] + 0.25 * average
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(mean[:, 1], space.mean[list(AREA), 1])  # no sentence of language 1
    assert not vectors.step()  # nothing new


def test_ema_over_processes_is_ema_over_all_their_sentences(space: LanguageSpace) -> None:
    rows, languages = sentences(0), torch.tensor([0, 0, 2, 2])
    alone = LanguageVectors(space.shift(*AREA), "ema")
    alone.add(rows, languages)
    alone.step()
    ranks = [LanguageVectors(space.shift(*AREA), "ema") for _ in range(2)]
    for rank, vectors in enumerate(ranks):
        vectors.add(rows[:, rank::2], languages[rank::2])
    totals = [ranks[0]._sums + ranks[1]._sums, ranks[0]._counts + ranks[1]._counts]
    for vectors in ranks:
        queue = iter(totals)
        vectors.step(lambda _, queue=queue: next(queue).clone())
        torch.testing.assert_close(
            vectors.shift(training=True).vectors, alone.shift(training=True).vectors, rtol=1e-6, atol=1e-6
        )


def official_means(batches: list[torch.Tensor]) -> torch.Tensor:
    units = [batch.double() / batch.double().norm(dim=-1, keepdim=True) for batch in batches]
    return torch.stack([unit.mean(1) for unit in units]).mean(0)


def test_running_is_the_mean_of_batch_means_of_unit_vectors(space: LanguageSpace) -> None:
    vectors = LanguageVectors(space.shift(*AREA), "running", unit=True)
    batches = [sentences(seed) for seed in range(3)]
    for batch in batches:
        vectors.add(batch, torch.tensor([1, 1, 1, 1]))
        vectors.step()
    mean = vectors.shift(training=True).vectors
    expected = official_means(batches)
    torch.testing.assert_close(mean[:, 1].double(), expected, rtol=1e-6, atol=1e-6)
    assert (mean[:, 1].norm(dim=-1) <= 1).all()
    assert torch.equal(mean[:, 3], space.mean[list(AREA), 3])  # unseen languages keep the space's vector


def test_running_sums_grow_in_training_and_are_divided_in_evaluation(space: LanguageSpace) -> None:
    vectors = LanguageVectors(space.shift(*AREA), "running", unit=True, running_sums=True)
    batches = [sentences(seed) for seed in range(5)]
    for batch in batches:
        vectors.add(batch, torch.tensor([1, 1, 1, 1]))
        vectors.step()
    expected = official_means(batches)
    torch.testing.assert_close(
        vectors.shift(training=True).vectors[:, 1].double(), 5 * expected, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        vectors.shift(training=False).vectors[:, 1].double(), expected, rtol=1e-6, atol=1e-6
    )


def test_bfloat16_sums_stagnate_and_float64_do_not(space: LanguageSpace) -> None:
    batch = torch.zeros(2, 1, 8)
    batch[..., 0] = 1
    norms = {}
    for dtype in (torch.bfloat16, torch.float64):
        vectors = LanguageVectors(space.shift(*AREA), "running", unit=True, running_sums=True, dtype=dtype)
        for _ in range(300):
            vectors.add(batch, torch.tensor([1]))
            vectors.step()
        norms[dtype] = vectors.shift(training=True).vectors[0, 1, 0].item()
    assert norms == {torch.bfloat16: 256.0, torch.float64: 300.0}


@pytest.mark.parametrize("mode", ["ema", "running"])
def test_state_goes_on_exactly(space: LanguageSpace, mode: str) -> None:
    straight = LanguageVectors(space.shift(*AREA), mode)  # type: ignore[arg-type]
    resumed = LanguageVectors(space.shift(*AREA), mode)  # type: ignore[arg-type]
    for seed in range(4):
        straight.add(sentences(seed), torch.tensor([0, 1, 2, 3]))
        straight.step()
        if seed == 1:
            resumed.load_state_dict(straight.state_dict())
        if seed > 1:
            resumed.add(sentences(seed), torch.tensor([0, 1, 2, 3]))
            resumed.step()
    assert torch.equal(resumed.state_dict()["vectors"], straight.state_dict()["vectors"])
    with pytest.raises(ValueError, match=r"vectors: the saved state has nothing; wanted torch\.float64"):
        resumed.load_state_dict({})


def test_refresh_takes_a_new_estimate(space: LanguageSpace) -> None:
    vectors = LanguageVectors(space.shift(*AREA), "refresh")
    fresh = replace(space, mean=space.mean + 1).shift(*AREA)
    vectors.start_again(fresh)
    assert torch.equal(vectors.shift(training=True).vectors, fresh.vectors)


def test_bad_arguments(space: LanguageSpace) -> None:
    with pytest.raises(ValueError, match="vectors: got 'live'"):
        LanguageVectors(space.shift(*AREA), "live")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ema_decay: got 1\.0"):
        LanguageVectors(space.shift(*AREA), "ema", decay=1.0)


def test_recipes_hold_the_documented_numbers() -> None:
    assert (STABLE.w_gen, STABLE.w_mcl, STABLE.temperature) == (1.0, 0.2, 0.05)
    official = {
        "w_gen": 0.5,
        "w_mcl": 2.0,
        "mcl_mode": "pooled",
        "temperature": 1.0,
        "contrastive_batch_size": 12,
        "mixed_languages": False,
        "vectors": "running",
        "max_length_pivot": 100,
        "max_length_other": 256,
        "max_length": 512,
        "area": (12, 15),
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "warmup": 0.01,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 14,
        "running_sums": False,
        "running_dtype_of_model": False,
    }
    assert {name: getattr(OFFICIAL, name) for name in official} == official
    assert (STABLE.mcl_mode, STABLE.vectors, STABLE.area) == ("shifted", "frozen", None)
