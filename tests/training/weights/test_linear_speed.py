"""How fast the processor is in each dtype: measured once, kept, and the same for all processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shifcon_fast.training.weights import linear_speed
from shifcon_fast.training.weights.linear_speed import LinearSpeed, faster_dtype, keep, known_speed, measure


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SHIFCON_CACHE", str(tmp_path))
    known_speed.cache_clear()
    yield
    known_speed.cache_clear()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_both_dtypes_are_measured_in_little_time(quantization: str) -> None:
    start = time.perf_counter()
    speed = measure(quantization)
    assert time.perf_counter() - start < 10  # a quarter of a second on a machine of its own
    assert speed["quantization"] == quantization
    assert min(speed["float32"], speed["bfloat16"]) > 0.01
    assert speed["versions"]["torch"] == torch.__version__
    assert speed["processor"]


def of(bfloat16: float) -> LinearSpeed:
    return {
        "processor": linear_speed.processor(),
        "versions": {},
        "quantization": "none",
        "float32": 100.0,
        "bfloat16": bfloat16,
    }


def test_noise_does_not_choose() -> None:
    assert faster_dtype(of(124.0)) == torch.float32
    assert faster_dtype(of(125.0)) == torch.bfloat16


def test_it_is_measured_once_for_all_processes_until_the_doctor_measures_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(linear_speed, "measure", lambda quantization: of(300.0))
    assert known_speed("none") == of(300.0)
    known_speed.cache_clear()  # another process, which another would find faster
    monkeypatch.setattr(linear_speed, "measure", lambda quantization: of(50.0))
    assert known_speed("none") == of(300.0)
    assert keep(of(50.0), overwrite=False)  # came second
    known_speed.cache_clear()
    assert known_speed("none") == of(300.0)
    assert keep(of(50.0), overwrite=True)
    known_speed.cache_clear()
    assert known_speed("none") == of(50.0)
    (kept,) = (tmp_path / "linear_speed").iterdir()
    assert json.loads(kept.read_text()) == of(50.0)
    kept.write_text("{")  # damaged
    known_speed.cache_clear()
    assert known_speed("none") == of(50.0)


def test_processes_that_cannot_agree_do_not_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHIFCON_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(linear_speed, "measure", lambda quantization: of(300.0))
    assert known_speed("none") == of(300.0)
    known_speed.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert known_speed("none") is None
