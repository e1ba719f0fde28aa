"""Liger and hub kernels beside the shift: what engages is ours or theirs, and what does not is said.

No kernel of Liger's runs here (they need a GPU): its loss is stood in for, and its norms are seen before they fail.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.models.llama import modeling_llama

from shifcon_fast.modeling.attach import attach
from shifcon_fast.training.losses import liger
from shifcon_fast.training.losses.liger import check_liger, name_language_ids
from shifcon_fast.training.trainer import ShifConTrainer

liger_kernel = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
llama = pytest.importorskip("liger_kernel.transformers.model.llama")

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


@pytest.fixture
def model(load_model: Callable[..., Any]) -> Any:
    return load_model()


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's fused loss by PyTorch; everything around it is Liger's own."""

    def loss(hidden_states: Any, lm_head_weight: Any, labels: Any, **kwargs: Any) -> Any:
        logits = hidden_states @ lm_head_weight.T
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    monkeypatch.setattr(llama, "LigerForCausalLMLoss", loss)


def apply(model: Any, **settings: bool) -> None:
    """As ``Trainer`` does; without what would patch transformers for the whole process."""
    kept = {"rope": False, "swiglu": False, "rms_norm": False, **settings}
    liger_kernel._apply_liger_kernel_to_instance(model=model.get_base_model(), **kept)


@pytest.mark.usefixtures("_stand_in")
def test_ligers_loss_on_an_attached_model_is_the_shifted_one(model: Any, space: Any) -> None:
    plain = copy.deepcopy(model)
    oracle = attach(plain, space, 1, 3)
    ids = oracle.language_ids(["sw", "en"])
    expected = plain.train()(IDS, labels=IDS, language_ids=ids).loss
    handle = attach(model, space, 1, 3)
    apply(model)
    model.train()
    loss = model(IDS, labels=IDS, language_ids=ids).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model(IDS, labels=IDS, language_ids=torch.tensor([-1, -1])).loss.item() != pytest.approx(
        expected.item(), rel=1e-3
    )
    assert handle.bypassed == {}
    assert all(count for sites in handle.engagements.values() for count in sites.values())
    # generate asks the signature, which is Liger's now
    model.eval()
    with pytest.raises(ValueError, match="language_ids"):
        model.generate(IDS, language_ids=ids, max_new_tokens=2)
    name_language_ids(handle.model)
    name_language_ids(handle.model)  # once is enough
    settings = {"language_ids": ids, "max_new_tokens": 3, "do_sample": False}
    expected_tokens = plain.eval().generate(IDS, **settings)
    assert torch.equal(model.generate(IDS, **settings), expected_tokens)
    assert torch.equal(copy.deepcopy(model).generate(IDS, **settings), expected_tokens)


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("chunked", ["auto", "off"])
def test_the_trainer_gives_generate_its_argument_back_and_says_what_it_does_not_log(
    make_trainer: Callable[..., ShifConTrainer],
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    chunked: str,
) -> None:
    """As on a GPU, but for the kernel. Liger's loss makes no logits; ours beside it has those of the languages."""
    monkeypatch.setattr("shifcon_fast.training.trainer.check_liger", lambda args, model: None)
    trainer = make_trainer(
        model=model,
        use_liger_kernel=True,
        liger_kernel_config={"rope": False, "swiglu": False, "rms_norm": False},
        chunked_cross_entropy=chunked,
        max_steps=1,
    )
    trainer.train()
    assert ("No losses by language" in caplog.text) == (chunked == "off")
    assert ("loss_generation_en" in trainer.state.log_history[0]) == (chunked == "auto")
    ids = trainer.handle.language_ids(["sw", "en"])
    assert trainer.model.eval().generate(IDS, language_ids=ids, max_new_tokens=2).shape == (2, 7)


@pytest.mark.parametrize("first", ["liger", "attach"])
def test_ligers_norms_are_seen_and_named_in_either_order(
    model: Any, space: Any, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", modeling_llama.LlamaRMSNorm)  # Liger sets it for all
    settings = {"rms_norm": True, "fused_linear_cross_entropy": False}
    if first == "liger":
        apply(model, **settings)
    handle = attach(model, space, 1, 3)
    if first == "attach":
        apply(model, **settings)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever Triton says without a GPU
        model(IDS, language_ids=handle.language_ids(["sw", "en"]))
    assert handle.bypassed[0] == {
        "input_layernorm": "its forward was replaced on the instance by LigerRMSNorm.forward"
    }


def test_attaching_to_ligers_forward_is_refused(model: Any, space: Any) -> None:
    apply(model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM was replaced on the instance.*Attach before"):
        attach(model, space, 1, 3)
    assert not hasattr(model, "shifcon")


@pytest.mark.parametrize("first", ["kernels", "attach"])
def test_a_norm_without_a_hub_kernel_is_the_plain_one(model: Any, space: Any, first: str) -> None:
    """``kernelize`` binds the class's own forward on each instance that it has no kernel for."""

    def kernelize() -> None:
        for block in model.get_base_model().model.layers:
            norm = block.input_layernorm
            norm.forward = MethodType(type(norm).forward, norm)

    if first == "kernels":
        kernelize()
    handle = attach(model, space, 1, 3)
    if first == "attach":
        kernelize()
    model(IDS, language_ids=handle.language_ids(["sw", "en"]))
    assert handle.bypassed == {}
    assert handle.engagements[0]["input_layernorm"] == 1
    norm = model.get_base_model().model.layers[0].input_layernorm

    class HubRMSNorm(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states * 2

    norm.forward = MethodType(HubRMSNorm.forward, norm)
    model(IDS, language_ids=handle.language_ids(["sw", "en"]))
    assert handle.bypassed[0]["input_layernorm"].endswith("HubRMSNorm.forward")


def test_what_is_in_the_way_is_said(
    make_trainer: Callable[..., ShifConTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="use_liger_kernel: Liger's kernels are Triton's and need a GPU"):
        make_trainer(use_liger_kernel=True)
    on_gpu = SimpleNamespace(
        use_liger_kernel=True,
        device=torch.device("cuda"),
        liger_kernel_config={"rope": False},
        chunked_cross_entropy="off",
    )
    check_liger(on_gpu, SimpleNamespace(config=SimpleNamespace(model_type="llama")))  # type: ignore[arg-type]
    assert on_gpu.liger_kernel_config == {"rms_norm": False, "rope": False}
    on_gpu.chunked_cross_entropy = "auto"
    check_liger(on_gpu, SimpleNamespace(config=SimpleNamespace(model_type="llama")))  # type: ignore[arg-type]
    assert on_gpu.liger_kernel_config["fused_linear_cross_entropy"] is False
    with pytest.raises(ValueError, match="Liger has no kernels for model type 'bloom'"):
        check_liger(on_gpu, SimpleNamespace(config=SimpleNamespace(model_type="bloom")))  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(liger.metadata, "version", lambda name: "0.7.0")
        with pytest.raises(
            ImportError, match=r"liger-kernel 0\.7\.0 is too old: wanted 0\.8.*pip install -U"
        ):
            make_trainer(use_liger_kernel=True)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match=r"shifcon-fast\[liger\]"):
        make_trainer(use_liger_kernel=True)
