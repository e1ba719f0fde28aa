"""What a training step is predicted to take, against what it takes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from shifcon_fast.training.weights import step_plan
from shifcon_fast.training.weights.step_plan import StepShape, plan_step

TINY = StepShape(
    batch=2, length=24, learnt=0.5, contrastive_batch=3, length_pivot=6, length_other=10, lora_r=4
)


def tiny_config(blocks: int, **settings: Any) -> Any:
    return AutoConfig.for_model(
        "llama",
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": blocks,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **settings,
        },
    )


def sample_of(config: Any, shape: StepShape, quantization: str) -> Any:
    settings: dict[str, Any] = {"quantization": quantization, "dtype": torch.float32}
    return step_plan._Sample(
        config, config.num_hidden_layers, shape, torch.device("cpu"), trust_remote_code=False, **settings
    )


@pytest.mark.parametrize(
    "quantization", [pytest.param("nf4", marks=pytest.mark.slow("a second model to count")), "none"]
)
def test_bytes_are_those_of_the_whole_model(quantization: Any) -> None:
    """Sizes to the byte; what a step needs beside them within 15 %, from five blocks of twelve."""
    config = tiny_config(12, tie_word_embeddings=True)
    plan = plan_step(config, TINY, quantization=quantization, dtype=torch.float32, area=(4, 8))
    whole = sample_of(config, TINY, quantization)
    weights = adapters = 0
    for parameter in whole.model.parameters():
        size = parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            size += state.absmax.nbytes + state.state2.absmax.nbytes
        if parameter.requires_grad:
            adapters += 4 * size
        else:
            weights += size
    assert plan.bytes["weights"] == weights
    assert plan.bytes["adapters"] == adapters
    whole._handle.detach()
    whole._handle = step_plan.attach(whole.model, step_plan._space(whole._decoder), 4, 8)
    generation, head, contrastive = whole.generation(), whole.head(), whole.contrastive()

    contrastive().backward()  # gradients have their place already
    cpu = torch.device("cpu")
    _, first = step_plan._bytes_of(contrastive, cpu)
    _, then = step_plan._bytes_of(lambda: generation() + head(), cpu)
    peak = max(first, then)
    assert plan.peak - weights - adapters == pytest.approx(peak, rel=0.15)


@pytest.mark.slow("plans six steps, each of which is measured")
def test_more_of_everything_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(6)
    plans = {
        name: plan_step(config, StepShape(**{**vars(TINY), **more}), dtype=torch.float32, area=(2, 4))
        for name, more in {
            "as it is": {},
            "batch": {"batch": 8},
            "pairs": {"contrastive_batch": 12},
            "none": {"contrastive_batch": 0},
            "not checkpointed": {"gradient_checkpointing": False},
        }.items()
    }
    base = plans["as it is"]
    assert plans["batch"].bytes["generation"] > 2 * base.bytes["generation"]
    assert plans["pairs"].bytes["contrastive"] > 2 * base.bytes["contrastive"]
    assert plans["none"].bytes["contrastive"] == 0 == plans["none"].seconds["contrastive"]
    assert plans["not checkpointed"].bytes["generation"] > base.bytes["generation"]
    assert base.step == pytest.approx(sum(base.seconds.values()))
    assert min(base.seconds.values()) > 0
    assert json.loads(json.dumps(base.as_json()))["shape"]["lora_r"] == 4
    deeper = plan_step(config, TINY, dtype=torch.float32, area=(2, 5))
    assert deeper.bytes["contrastive"] > base.bytes["contrastive"]


@pytest.mark.parametrize(
    "name",
    [
        "gemma3_text",
        *(
            pytest.param(name, marks=pytest.mark.slow("plans a step of one more model"))
            for name in ("gpt2", "qwen3")
        ),
    ],
)
def test_other_architectures(name: str, tiny_model: Callable[..., Any]) -> None:
    plan = plan_step(tiny_model(name, layers=6).config, TINY, quantization="none", dtype=torch.bfloat16)
    assert plan.dtype == "bfloat16"
    assert plan.area == (2, 4)
    assert plan.peak > plan.bytes["weights"] > 0


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for wrong, message in (
        ({"batch": 0}, "batch: got 0; wanted 1 or more"),
        ({"contrastive_batch": 1}, "contrastive_batch: got 1; wanted 2 or more, or 0"),
        ({"length_other": 1}, "length_other: got 1; wanted 2 or more"),
        ({"learnt": 0.0}, r"learnt: got 0\.0; wanted a share"),
    ):
        with pytest.raises(ValueError, match=message):
            StepShape(**wrong)
    with pytest.raises(
        ValueError, match=r"forward, backward: got \(3, 6\); wanted 0 <= forward < backward < 6"
    ):
        plan_step(tiny_config(6), TINY, dtype=torch.float32, area=(3, 6))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        plan_step(tmp_path, TINY)


# --- against a whole model of a real shape: a process of its own, one thread, processor time ----------------------

SIZES = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "step" / "shapes.py"))["SIZES"]


@pytest.mark.slow("builds models of two real shapes and takes training steps with them")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["smollm2"])  # gemma3 takes several minutes: python test_step_plan.py gemma3
def test_the_memory_of_a_step_of_a_real_shape_is_predicted_within_15_percent(name: str) -> None:
    """Memory of the process. How far predicted times are off is measured, and not tested (docs/training.md)."""
    done = subprocess.run(
        [sys.executable, "-P", __file__, name],
        # Freed memory goes back to the system at once, so that the resident set is what tensors take.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted_bytes"] == pytest.approx(found["bytes"], rel=0.15)


def _measure(name: str) -> dict[str, float]:
    """In a process of its own: a step of the whole model through its own forward, its peak and its time."""
    import time

    from shifcon_fast.objective.mcl import mcl_loss
    from shifcon_fast.training.losses.loss_without_logits import LossWithoutLogits

    step_plan._clock = time.process_time
    size = SIZES[name]
    config = AutoConfig.for_model(size.model_type, **size.config)
    shape = StepShape(learnt=0.25)
    plan = plan_step(config, shape, dtype=torch.float32, area=size.area)
    before = _resident("VmRSS")
    whole = sample_of(config, shape, "nf4")
    whole._handle.detach()
    model = whole.model
    handle = step_plan.attach(model, step_plan._space(whole._decoder), *size.area)
    whole._handle = handle
    contrastive = whole.contrastive()
    tokens = whole._tokens(shape.batch, shape.length)
    labels = tokens.masked_fill(torch.arange(shape.length) < (1 - shape.learnt) * shape.length, -100)
    ids = torch.ones(shape.batch, dtype=torch.long)
    chunked = LossWithoutLogits(model.get_base_model())
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.0)
    assert mcl_loss is step_plan.mcl_loss

    def step() -> None:
        optimizer.zero_grad()
        (2.0 * contrastive()).backward()  # before the generation pass, as the trainer does
        with chunked.engaged(ids):
            loss = model(input_ids=tokens, labels=labels, language_ids=ids, use_cache=False).loss
        (0.5 * loss).backward()
        optimizer.step()

    step()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again
    seconds = float("inf")
    for _ in range(3):
        start = time.process_time()
        step()
        seconds = min(seconds, time.process_time() - start)
    return {
        "bytes": _resident("VmHWM") - before,
        "predicted_bytes": plan.peak,
        "seconds": seconds,
        "predicted_seconds": plan.step,
    }


def _resident(which: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(which))


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
