"""What another intervention than the mean shift costs, on SmolLM2's shape: entering a block, a step, decoding.

"ours" is ``subspace``, x′ = μ_t + V_t V_tᵀ (x - μ_s) through ``ops.subspace_project``, in the backend used here.
Its peers: the same through the reference backend; the mean shift; a map in plain PyTorch (``affine``); no shift.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import shifcon_fast as sf
from shifcon_fast import ops
from shifcon_fast.objective.early_gradient import with_gradient_now
from shifcon_fast.training.losses.loss_without_logits import LossWithoutLogits

sys.path.insert(0, str(Path(__file__).resolve().parent / "step"))
STEP_MODEL, VARIANTS = importlib.import_module("model"), importlib.import_module("variants")
SIZES = importlib.import_module("shapes").SIZES
RANK = 32
NEW_TOKENS, PROMPT = 16, 16
LANGUAGES = 5
INTERVENTIONS = {"ours": "subspace", "reference": "subspace", "mean shift": "mean", "affine": "affine"}


def space_with_subspaces(model: Any, area: tuple[int, int], rank: int) -> sf.LanguageSpace:
    """Random language vectors, and random subspaces at f and b."""
    space = VARIANTS.make_space(model, languages=LANGUAGES)
    generator = torch.Generator().manual_seed(3)
    keys = [(k, code) for k in area for code in space.languages]

    def basis() -> torch.Tensor:
        return torch.linalg.qr(torch.randn(space.hidden_size, rank, generator=generator))[0].contiguous()

    return replace(
        space,
        bases={key: basis() for key in keys},
        variances={key: torch.linspace(1, 0.1, rank) for key in keys},
        covariances={key: 0.1 * torch.eye(rank) for key in keys},
        ridge=torch.full((space.num_boundaries,), 0.01),
    )


def through_reference(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function, with ``subspace_project`` in plain PyTorch while it runs."""

    @functools.wraps(function)
    def run() -> Any:
        operator = ops.subspace_project
        ops.subspace_project = functools.partial(operator, impl="reference")  # type: ignore[assignment]
        try:
            return function()
        finally:
            ops.subspace_project = operator  # type: ignore[assignment]

    return run


def peers(
    model: Any, area: tuple[int, int], rank: int, call: Callable[[Any, Any], Callable[[], Any]]
) -> dict[str, Any]:
    """A call for each intervention, each with a copy of the model; ``call`` gets the copy and its handle."""
    space, found = space_with_subspaces(model, area, rank), {}
    for name, intervention in INTERVENTIONS.items():
        own = copy.deepcopy(model)
        run = call(own, sf.attach(own, space, *area, intervention=intervention))
        found[name] = [through_reference(run) if name == "reference" else run]
    found["shift off"] = [call(model, None)]
    return found


def check_backends(calls: dict[str, Any]) -> str:
    """The backend that "ours" runs in; ours and the reference are what they are called."""
    backends = {}
    for name in ("ours", "reference"):
        ops.reset_call_counts()
        calls[name][0]()
        backends[name] = {
            backend for operator, backend in ops.call_counts() if operator == "subspace_project"
        }
    assert backends["reference"] == {"reference"}, backends
    (ours,) = backends["ours"]
    return ours


@pytest.mark.parametrize("tokens", [(4, 128), (1, 1)])
def test_entry(take_turns: Any, device: torch.device, smoke: bool, tokens: tuple[int, int]) -> None:
    """A shifted block's input and its first norm: forward and backward of a batch, forward of one token."""
    hidden, rank = (64, 8) if smoke else (576, RANK)
    trains = tokens != (1, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*tokens, hidden, generator=generator).to(device).requires_grad_(trains)
    weight, upper = torch.ones(hidden, device=device), torch.ones(*tokens, hidden, device=device)
    mean = torch.randn(LANGUAGES, hidden, generator=generator).to(device)
    basis = (
        torch.linalg.qr(torch.randn(LANGUAGES, hidden, rank, generator=generator))[0].contiguous().to(device)
    )
    table = mean[0] - mean
    ids = 1 + torch.arange(tokens[0], device=device) % (LANGUAGES - 1)
    pivot = torch.zeros_like(ids)

    def projected(impl: str) -> Any:
        return ops.add_shift_rms_norm(ops.subspace_project(x, mean, basis, ids, pivot, impl=impl), weight)

    ways = {
        "ours": lambda: projected("auto"),
        "reference": lambda: projected("reference"),
        "mean shift": lambda: ops.add_shift_rms_norm(x, weight, None, table, ids),
        "shift off": lambda: ops.add_shift_rms_norm(x, weight),
    }

    def run(way: Callable[[], Any]) -> Callable[[], Any]:
        if not trains:
            return way

        def both() -> Any:
            return torch.autograd.grad(way(), x, (upper, upper))

        return both

    calls = {name: [run(way)] for name, way in ways.items()}
    backend = check_backends(calls)
    what = f"{tokens[0]}x{tokens[1]}, forward and backward" if trains else "one token, forward"
    take_turns(calls, case=f"the entry of a block, {what}, rank {RANK}", backend=backend, several=20)


def test_decoding(take_turns: Any, device: torch.device, smoke: bool) -> None:
    """One row, greedy; every token is moved at f and at b."""
    size = SIZES["tiny" if smoke else "smollm2"]
    config = AutoConfig.for_model(size.model_type, **{**size.config, "eos_token_id": None})
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    prompt = torch.randint(3, config.vocab_size, (1, PROMPT), device=device)
    options = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
    }
    ids = torch.ones(1, dtype=torch.long, device=device)

    def call(own: Any, handle: Any) -> Callable[[], Any]:
        told = {} if handle is None else {"language_ids": ids}
        return lambda: own.generate(prompt, **told, **options)

    calls = peers(model, size.area, 8 if smoke else RANK, call)
    backend = check_backends(calls)
    take_turns(calls, case=f"decoding {NEW_TOKENS} tokens, subspaces of rank {RANK}", backend=backend)


def test_step(take_turns: Any, device: torch.device, smoke: bool) -> None:
    """Both losses and their gradients, NF4 and LoRA; the contrastive pass is shifted too, but for "shift off"."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    size = SIZES["tiny" if smoke else "smollm2"]
    model = STEP_MODEL.build(size, device, checkpointing=False)
    batch = VARIANTS.make_batch(size, device, languages=LANGUAGES - 1)
    ids = 1 + torch.arange(batch.generation.shape[0], device=device) % (LANGUAGES - 1)

    def call(own: Any, handle: Any) -> Callable[[], Any]:
        weights = [weight for weight in own.parameters() if weight.requires_grad]
        losses = LossWithoutLogits(own.get_base_model())
        inputs = {"input_ids": batch.generation, "labels": batch.generation, "use_cache": False}
        if handle is not None:
            inputs["language_ids"] = ids

        def step() -> float:
            total = torch.zeros((), device=device)
            if handle is not None:
                total = with_gradient_now(sf.mcl_loss(own, batch.pairs, handle, temperature=0.05), weights)
            with losses.engaged(None):
                total = total + own(**inputs).loss
            total.backward()
            for weight in weights:
                weight.grad = None
            return float(total.detach())

        return step

    calls = peers(model, size.area, 8 if smoke else RANK, call)
    for name in ("shift off", "affine"):  # another step, which test_step.py has; seconds for little
        del calls[name]
    backend = check_backends(calls)
    ours, reference = (calls[name][0]() for name in ("ours", "reference"))
    assert abs(ours - reference) < 1e-3 * abs(reference), (ours, reference)
    rows, length = batch.generation.shape
    take_turns(calls, case=f"a step of {rows}x{length} and its pairs, rank {RANK}", backend=backend)
