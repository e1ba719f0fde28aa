"""Exports of two real models in llama.cpp itself, on float32 GGUFs of the very weights that transformers runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shifcon_fast.export.control_vector import export_control_vector
from shifcon_fast.export.llama_cpp import LlamaCpp, read_control_vector
from shifcon_fast.export.merged import export_merged

REPOSITORY = Path(__file__).resolve().parents[2]
# The prompts have no near ties: the closest two candidates of any step are this far apart, rounding a hundredth
# of it.
LEAST_MARGIN = 0.02

pytestmark = pytest.mark.timeout(1800)  # real models on a busy machine


@pytest.fixture(scope="module")
def parity() -> Iterator[ModuleType]:
    """examples/real_models/export_parity.py as a module, with the scripts beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "examples" / "real_models"))
        yield importlib.import_module("export_parity")


@pytest.fixture(scope="module")
def served(
    parity: ModuleType, smollm2: Path, shifcon_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, Path]:
    """SmolLM2 with an adapter and a shift, its tokenizer, and the GGUF of the merged model without the shift."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = parity.attached_model(smollm2, shifcon_data / "ntrex128.jsonl", (15, 20), adapter=True)
    export_merged(model, None, folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    parity.float32_gguf.from_checkpoint(merged, tokenizer, folder / "model.gguf")
    return model, tokenizer, folder / "model.gguf"


@pytest.mark.parametrize("language", ["de", "sw"])
def test_llama_cpp_generates_what_hugging_face_does_with_the_shift_on(
    parity: ModuleType, served: tuple[Any, Any, Path], language: str, tmp_path: Path
) -> None:
    model, tokenizer, gguf_model = served
    found = export_control_vector(model, language, tmp_path, gguf_model=gguf_model)
    assert found is not None
    assert found.effect > 1
    assert found.error < 1e-3 * found.effect
    tokens = parity.prompts(tokenizer)[language][0]
    wanted, margin = parity.greedy(model, tokens, language)
    assert margin > LEAST_MARGIN
    with LlamaCpp(gguf_model) as server:
        unshifted = parity.greedy_in_llama_cpp(server, tokens, len(wanted))
        server.set_control_vector(read_control_vector(tmp_path / f"{language}.gguf", server.hidden_size))
        assert parity.greedy_in_llama_cpp(server, tokens, len(wanted)) == wanted
    assert unshifted != wanted


def test_the_published_quantised_file_engages_too(
    fetching: ModuleType, served: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    """Its weights are the same; llama.cpp rounds what they are multiplied with to 8 bits."""
    found = export_control_vector(
        served[0], "de", tmp_path, gguf_model=fetching.fetch_gguf("smollm2-135m-instruct")
    )
    assert found is not None
    assert found.error < 0.5 * found.effect


def test_gemma_takes_a_control_vector(
    parity: ModuleType, fetching: ModuleType, gemma3: Path, shifcon_data: Path, tmp_path: Path
) -> None:
    """Its norm behind the MLP leaves no place for a bias; this is the export that the others' refusal names."""
    model, _ = parity.attached_model(gemma3, shifcon_data / "ntrex128.jsonl", (6, 9), adapter=False)
    parity.float32_gguf.from_gguf(fetching.fetch_gguf("gemma-3-270m"), tmp_path / "model.gguf")
    found = export_control_vector(model, "de", tmp_path, gguf_model=tmp_path / "model.gguf")
    assert found is not None
    assert found.effect > 0.5
    assert found.error < 0.02 * found.effect  # llama.cpp looks GELU up in a table of 16 bits
