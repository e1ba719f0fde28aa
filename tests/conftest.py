"""Shared fixtures: tiny random models of every architecture, a word tokenizer, aligned text, the real data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shifcon_fast.ops import registry

# transformers is imported where it is needed: it takes seconds, and some tests start pytest anew for operators.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[1]


# --- tests marked slow: each says why, and what `make test` leaves out is said at its end -------------------------

_LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT_OUT] = Counter()


def _why_slow(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("slow")
    if marker is None:
        return None
    reason = marker.kwargs.get("reason") or next(iter(marker.args), None)
    if not isinstance(reason, str):
        raise pytest.UsageError(f'{item.nodeid}: wanted @pytest.mark.slow("why it is slow"), with a reason')
    return reason


@pytest.hookimpl(tryfirst=True)  # before -m takes them out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        _why_slow(item)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.config.option.markexpr and (reason := _why_slow(item)) is not None:
            item.config.stash[_LEFT_OUT][reason] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist, where the tests are collected
        session.config.workeroutput["left_out"] = dict(session.config.stash[_LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All processes collect the same tests."""
    node.config.stash[_LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash[_LEFT_OUT]
    if left_out:
        terminalreporter.section(f"{left_out.total()} slow tests left out; make test-all runs them")
        for reason, count in sorted(left_out.items()):
            terminalreporter.line(f"{count:4} {reason}")


# --- models, text, data -------------------------------------------------------------------------------------------

# What each architecture needs beyond the common sizes.
_EXTRA: dict[str, dict[str, object]] = {
    "gemma2": {"head_dim": 8, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "qwen3": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.35, "logits_scaling": 2.0},
    "gpt_neox": {"rotary_pct": 0.5},
}
_COMMON_NAMES = {"bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}}


def build_tiny_model(
    architecture: str = "llama",
    *,
    layers: int = 4,
    hidden: int = 32,
    seed: int = 0,
    vocab: int = 128,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A random causal language model in eval mode; the norm weights are random too: no norm is the identity."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, object] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    names = _COMMON_NAMES.get(architecture, {})
    sizes = {names.get(name, name): value for name, value in sizes.items()}
    if architecture in ("gpt_neox", "bloom"):
        sizes.pop("num_key_value_heads")
    config = AutoConfig.for_model(architecture, **{**sizes, **_EXTRA.get(architecture, {})})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif parameter.dim() == 2:  # the library's 0.02 would make every block nearly the identity
                    parameter.normal_(0.0, 0.15)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    return build_tiny_model


_SENTENCES = {
    "en": ["{} lives in Rome", "{} has a red cat", "the cat of {} is old", "{} eats bread and fish"],
    "de": ["{} wohnt in Rom", "{} hat eine rote Katze", "die Katze von {} ist alt", "{} isst Brot und Fisch"],
    "sw": ["{} anaishi Roma", "{} ana paka mwekundu", "paka wa {} ni mzee", "{} anakula mkate na samaki"],
    "tr": ["{} Romada yaşıyor", "{} kırmızı kedi besliyor", "kedisi yaşlı {}", "{} ekmek ve balık yiyor"],
}
_NAMES = ["Ada", "Ben", "Cem", "Dina", "Eva", "Femi"]


@pytest.fixture(scope="session")
def parallel_text() -> dict[str, list[str]]:
    """24 aligned sentences in each of en, de, sw, tr."""
    return {
        language: [template.format(name) for name in _NAMES for template in templates]
        for language, templates in _SENTENCES.items()
    }


@pytest.fixture(scope="session")
def word_tokenizer(parallel_text: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """Whitespace words as tokens (ids < 128), digits apart; prepends ``<s>``; pads with ``<pad>``."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = sorted(
        {word for sentences in parallel_text.values() for text in sentences for word in text.split()}
    )
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *"0123456789", "?", ":", *words])}
    assert len(vocabulary) <= 128
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A folder with a tiny Llama (d = 64, so that NF4 blocks fit) and its tokenizer, for ``from_pretrained``."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build_tiny_model("llama", hidden=64, layers=4).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shifcon_data() -> Path:
    """The folder of real multi-parallel text: ``SHIFCON_DATA``, else ``../shared/data`` beside the checkout."""
    folder = Path(os.environ.get("SHIFCON_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "ntrex128.jsonl").is_file():
        pytest.skip(
            f"no real text at {folder}: set SHIFCON_DATA to a folder with ntrex128.jsonl to run this test"
        )
    return folder


@pytest.fixture
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``impl="auto"`` is the reference backend, whose norm is transformers' own bit for bit."""
    own = {key: backend for key, backend in registry._backends.items() if key[1] == "reference"}
    monkeypatch.setattr(registry, "_backends", own)
    monkeypatch.setattr(registry, "_warned", True)
    registry.select.cache_clear()
    yield
    registry.select.cache_clear()
