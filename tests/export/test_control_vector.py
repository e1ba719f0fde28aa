"""GGUF control vectors, read and run by llama.cpp itself on a tiny model."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from shifcon_fast.export import llama_cpp
from shifcon_fast.export.control_vector import export_control_vector
from shifcon_fast.export.llama_cpp import LlamaCpp, read_control_vector
from shifcon_fast.export.merged import export_merged
from shifcon_fast.extras import MissingExtraError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def float32_gguf() -> ModuleType:
    """examples/real_models/float32_gguf.py as a module."""
    path = REPOSITORY / "examples" / "real_models" / "float32_gguf.py"
    spec = importlib.util.spec_from_file_location("float32_gguf", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(attached: Callable[..., Any]) -> Any:
    return attached("llama")


@pytest.fixture(scope="module")
def served(
    model: Any, float32_gguf: ModuleType, word_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The GGUF of the merged model without the shift, made by way of the checkpoint, as a user makes it."""
    folder = tmp_path_factory.mktemp("served")
    export_merged(model, None, folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    float32_gguf.from_checkpoint(merged, word_tokenizer, folder / "model.gguf")
    return folder / "model.gguf"


def run(server: LlamaCpp, tokens: Tensor) -> Tensor:
    return torch.stack([server.logits(row) for row in tokens.tolist()])


def test_llama_cpp_computes_the_shifted_logits(
    model: Any, served: Path, oracle: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    found = export_control_vector(model, "sw", tmp_path, gguf_model=served)
    assert found is not None
    assert found.effect > 0.5
    assert found.error < 1e-4
    with LlamaCpp(served) as server:
        # llama.cpp's own sums are in another order: allowed is what it is off by without a vector, twice over.
        off = (run(server, tokens).double() - oracle(model, None, tokens).logits).abs().max()
        server.set_control_vector(read_control_vector(tmp_path / "sw.gguf", 32))
        wanted = oracle(model, "sw", tokens)
        assert (run(server, tokens).double() - wanted.logits).abs().max() <= max(
            2 * off, 2 * wanted.plain_error
        )
        server.set_control_vector(None)
        assert (run(server, tokens).double() - oracle(model, None, tokens).logits).abs().max() == off


def test_greedy_generation_is_the_same_token_by_token(
    model: Any, served: Path, tokens: Tensor, tmp_path: Path
) -> None:
    """With llama.cpp's cache in use. The margin between the first two tokens is far above the rounding."""
    export_control_vector(model, "zh/Hans:x", tmp_path, gguf_model=served)
    prompt = tokens[:1]
    ids = model.shifcon.language_ids("zh/Hans:x")
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        wanted = model.generate(prompt, language_ids=ids, **settings)[0, 10:].tolist()
        plain = model.generate(prompt, language_ids=torch.tensor([-1]), **settings)[0, 10:].tolist()
    assert wanted != plain
    with LlamaCpp(served) as server:
        server.set_control_vector(read_control_vector(tmp_path / "zh%2FHans%3Ax.gguf", 32))
        last, got = server.logits(prompt[0].tolist())[-1], []
        for position in range(10, 26):
            first, second = last.topk(2).values.tolist()
            assert first - second > 1e-3
            got.append(int(last.argmax()))
            last = server.logits([got[-1]], start=position)[-1]
    assert got == wanted


def test_the_file_is_what_readers_of_control_vectors_want(model: Any, tmp_path: Path) -> None:
    export_control_vector(model, "sw", tmp_path)
    file = gguf.GGUFReader(tmp_path / "sw.gguf")
    assert file.fields["general.architecture"].contents() == "controlvector"
    assert file.fields["controlvector.model_hint"].contents() == "llama"
    assert file.fields["controlvector.layer_count"].contents() == 3
    assert file.fields["shifcon.language"].contents() == "sw"
    rows = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    assert {name for name, row in rows.items() if row.any()} == {"direction.1", "direction.2"}
    assert rows.keys() == {"direction.1", "direction.2", "direction.3"}
    table = model.shifcon.shift_table(2)
    assert torch.equal(rows["direction.1"], table[model.shifcon.language_ids("sw")[0]])


def test_without_a_model_to_check_on_that_is_said(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="shifcon_fast"):
        assert export_control_vector(model, "sw", tmp_path) is None
    assert "not checked in llama.cpp" in caplog.text


def test_a_boundary_out_of_reach_is_refused(attached: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shifts at boundary 1; wanted 2 or later.*--to peft, --to merged"):
        export_control_vector(attached("llama", forward=1), "sw", tmp_path)
    with pytest.raises(ValueError, match="shifts at boundary 1; wanted 2"):  # f - 1 of the official recipe
        export_control_vector(attached("llama", recipe="official"), "sw", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 5}, "its number of blocks is 5, the run's model has 4"),
        ({"hidden": 48}, "its hidden size is 48, the run's model has 32"),
    ],
)
def test_a_gguf_of_another_shape_is_refused_by_name(
    *,
    sizes: dict[str, int],
    message: str,
    model: Any,
    tiny_model: Callable[..., Any],
    float32_gguf: ModuleType,
    word_tokenizer: Any,
    tmp_path: Path,
) -> None:
    float32_gguf.from_checkpoint(tiny_model("llama", **sizes), word_tokenizer, tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=message):
        export_control_vector(model, "sw", tmp_path / "out", gguf_model=tmp_path / "other.gguf")
    assert not (tmp_path / "out").exists()


def test_a_gguf_of_another_architecture_or_none_at_all_is_refused(
    attached: Callable[..., Any], model: Any, served: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="its architecture is llama, the run's model has qwen2"):
        export_control_vector(attached("qwen2"), "sw", tmp_path, gguf_model=served)
    with pytest.raises(ValueError, match="no such file"):
        export_control_vector(model, "sw", tmp_path, gguf_model=tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ValueError, match=r"llama.cpp does not load it \(.+\)"):
        export_control_vector(model, "sw", tmp_path, gguf_model=tmp_path / "text.gguf")
    with pytest.raises(ValueError, match=r"holds no direction\.K"):
        read_control_vector(served, 32)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("direction.0", [0.0] * 32, r"direction\.0: llama\.cpp takes direction\.1 and up"),
        ("direction.1", [0.0] * 31, r"direction\.1: wanted one dimension of 32 float32, got \(1, 31\)"),
        ("direction.1", [[0.0] * 32] * 2, r"got \(2, 64\)"),
    ],
)
def test_a_control_vector_that_llama_cpp_would_refuse_is_refused(
    name: str, row: list[Any], message: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "bad.gguf"), "controlvector")
    writer.add_tensor(name, torch.tensor(row).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=message):
        read_control_vector(tmp_path / "bad.gguf", 32)


@pytest.mark.parametrize("found", [None, "another build"])
def test_where_no_library_of_llama_cpp_loads_that_is_said(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel's library is for newer systems, and its stand-in is missing, or declared otherwise."""
    from llama_cpp_py_sync import _cffi_bindings as bindings

    def too_old() -> None:
        raise RuntimeError("version GLIBC_2.38 not found")

    class Shuffled:
        """Its structures have their fields elsewhere, so that defaults come out wrong."""

        def llama_context_default_params(self) -> Any:
            return SimpleNamespace(n_ctx=0, n_batch=512, n_ubatch=0, type_k=0, type_v=1, op_offload=True)

        def llama_model_default_params(self) -> Any:
            return SimpleNamespace(split_mode=1, use_extra_bufts=True)

    monkeypatch.setattr(bindings, "get_lib", too_old)
    monkeypatch.setattr(bindings, "ffi", SimpleNamespace(dlopen=lambda path: Shuffled()))
    if found is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = (
        "GLIBC_2.38 not found; wanted a newer system, or the wheel xllamacpp" if found is None else found
    )
    with pytest.raises(MissingExtraError, match=message):
        llama_cpp._library.__wrapped__()


def test_a_vector_that_llama_cpp_ignores_is_not_kept(
    model: Any, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the architectures that leave control vectors out of their graph."""
    monkeypatch.setattr(LlamaCpp, "set_control_vector", lambda self, directions: None)
    with pytest.raises(
        ValueError, match="does not engage where it is loaded: it moves the logits by up to 0,"
    ):
        export_control_vector(model, "sw", tmp_path, gguf_model=served)
    assert list(tmp_path.iterdir()) == []


def test_one_block_off_is_noticed(
    model: Any, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LlamaCpp.set_control_vector
    monkeypatch.setattr(
        LlamaCpp, "set_control_vector", lambda self, directions: original(self, directions.roll(1, dims=0))
    )
    with pytest.raises(ValueError, match="does not engage where it is loaded"):
        export_control_vector(model, "sw", tmp_path, gguf_model=served)


def test_a_merged_checkpoint_takes_the_shift_into_its_gguf(
    *,
    model: Any,
    float32_gguf: ModuleType,
    word_tokenizer: Any,
    oracle: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    """llama.cpp reads the biases that ``mlp_bias`` gives; no control vector is needed."""
    export_merged(model, "sw", tmp_path / "merged")
    assert any(key.endswith("down_proj.bias") for key in load_file(tmp_path / "merged" / "model.safetensors"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    float32_gguf.from_checkpoint(merged, word_tokenizer, tmp_path / "model.gguf")
    wanted = oracle(model, "sw", tokens)
    with LlamaCpp(tmp_path / "model.gguf") as server:
        assert (run(server, tokens).double() - wanted.logits).abs().max() < 1e-4
