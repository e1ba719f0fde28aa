"""Shared fixtures: tiny random models of every architecture, a word tokenizer, aligned text, the real data."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
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


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the garbage collector need not walk it after every test."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # or nanobind calls leaks what Python would take away at its end
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

# What each architecture needs beyond the common sizes. Where blocks differ, four of them have each kind.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_EXTRA: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 16},
    "ministral": {"head_dim": 8, "layer_types": [_FULL, _SLIDING] * 2, "sliding_window": 16},
    "ministral3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1]},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8, "mlp_only_layers": [1]},
    "qwen3_5_text": {
        "head_dim": 8,
        "layer_types": ["linear_attention", _FULL] * 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "llama4_text": {
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 4,
        "attention_chunk_size": 16,
        "layer_types": ["chunked_attention", _FULL] * 2,
        "no_rope_layers": [1, 0] * 2,
    },
    "gpt_oss": {
        "head_dim": 8,
        "layer_types": [_SLIDING, _FULL] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
    "phi3": {"pad_token_id": 0},
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.35, "logits_scaling": 2.0},
    "granitemoehybrid": {
        "residual_multiplier": 0.5,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "lfm2": {"layer_types": ["conv", _FULL] * 2, "block_auto_adjust_ff_dim": False},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "gemma4_text": {  # like E2B: an input of its own for each layer; the last two share keys and values
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "layer_types": [_SLIDING, _FULL] * 2,
        "num_kv_shared_layers": 2,
        "sliding_window": 16,
    },
    "gemma4_unified_text": {
        "head_dim": 8,
        "global_head_dim": 8,
        "layer_types": [_SLIDING, _FULL] * 2,
        "sliding_window": 16,
    },
    "olmo3": {"layer_types": [_SLIDING, _FULL] * 2, "sliding_window": 16},
    "exaone4": {"layer_types": [_SLIDING, _FULL] * 2, "sliding_window": 16},
    "cohere2": {"head_dim": 8, "layer_types": [_SLIDING, _FULL] * 2, "sliding_window": 16},
    "starcoder2": {"sliding_window": 16},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"word_embed_proj_dim": 16, "dropout": 0.0},
    "xglm": {"scale_embedding": False, "dropout": 0.0, "attention_dropout": 0.0},
}
_COMMON_NAMES = {
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "gpt2": {"max_position_embeddings": "n_positions"},
    "opt": {"intermediate_size": "ffn_dim"},
    "xglm": {"intermediate_size": "ffn_dim"},
}


def build_tiny_model(
    architecture: str = "llama",
    *,
    layers: int = 4,
    hidden: int = 32,
    seed: int = 0,
    vocab: int = 128,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> PreTrainedModel:
    """A random causal language model in eval mode; the norm weights are random too: no norm is the identity.

    Args:
        options: further fields of the configuration.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if architecture not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not have {architecture}")
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
    if architecture in ("gpt_neox", "bloom", "gpt2", "falcon", "opt", "xglm"):
        sizes.pop("num_key_value_heads")
    extra = dict(_EXTRA.get(architecture, {}))
    for name in ("layer_types", "no_rope_layers"):
        if name in extra:
            extra[name] = list(itertools.islice(itertools.cycle(extra[name]), layers))
    config = AutoConfig.for_model(architecture, **{**sizes, **extra, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif parameter.dim() >= 2:  # the library's 0.02 would make every block nearly the identity
                    parameter.normal_(0.0, 0.15)
            for name, buffer in model.named_buffers():
                if name.endswith("layer_scalar"):
                    buffer.uniform_(0.5, 1.5)
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


def _settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["padding"], backend["truncation"]  # each call sets them anew
    return {"shown": repr(tokenizer), "chat_template": tokenizer.chat_template, "backend": backend}


@pytest.fixture(autouse=True)
def _tests_leave_the_process_alone() -> Iterator[None]:
    """A test that leaves a state of the process changed fails itself, and no other one in another order."""
    before = _state_of_the_process()
    yield
    assert _state_of_the_process() == before, "undo it in the test, or in what it calls"


def _state_of_the_process() -> dict[str, object]:
    return {
        **{number.name: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
        "folder": os.getcwd(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def _tests_leave_the_shared_tokenizer_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that changes the session's tokenizer fails itself, and no other one in another order."""
    if "word_tokenizer" not in request.fixturenames:
        yield
        return
    tokenizer = request.getfixturevalue("word_tokenizer")
    before = _settings(tokenizer)
    yield
    assert _settings(tokenizer) == before, "work on copy.deepcopy(word_tokenizer)"


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
