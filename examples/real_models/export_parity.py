#!/usr/bin/env python
"""Export a shifted real model to every target, and measure how far each is from float64.

    python examples/real_models/export_parity.py smollm2-135m-instruct --parallel ntrex128.jsonl --area 15,20
    python examples/real_models/export_parity.py gemma-3-270m --parallel ntrex128.jsonl --area 6,9 --no-adapter

The language vectors are estimated on 24 sentences; the adapter is random and small, since parity does not ask
what was learnt. Everything is in float32 on the CPU. "plain" is the rounding of Hugging Face's own model in
float32 with the vectors added by hooks; an export may be off by twice that. llama.cpp runs a float32 GGUF of the
very weights that transformers runs, and the quantised file that they were unpacked from.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import float32_gguf
import peft
import torch
from cldr_accuracy import processor
from fetch import MODELS, fetch, fetch_gguf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import shifcon_fast as sf
from shifcon_fast.data import read_parallel
from shifcon_fast.export.control_vector import export_control_vector
from shifcon_fast.export.llama_cpp import LlamaCpp, read_control_vector
from shifcon_fast.export.merged import export_merged
from shifcon_fast.export.peft_alone import export_peft
from shifcon_fast.export.shift_vectors import shift_vectors
from shifcon_fast.export.vllm import export_vllm
from shifcon_fast.modeling.architectures import locate_decoder

LANGUAGES = ("en", "de", "sw")
QUESTIONS = {
    "de": ["Was ist die Hauptstadt von Frankreich?", "Nenne drei Farben.", "Warum ist der Himmel blau?"],
    "sw": ["Mji mkuu wa Kenya ni upi?", "Taja rangi tatu.", "Kwa nini anga ni la buluu?"],
}
_NEW_TOKENS = 24
_PACKAGES = ("torch", "transformers", "peft", "gguf", "llama-cpp-py-sync", "xllamacpp", "hotwire-vllm")


def attached_model(folder: Path, parallel: Path, area: tuple[int, int], *, adapter: bool) -> tuple[Any, Any]:
    """A model with its shift (and a small random adapter), and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.003)
    text = {code: each[:24] for code, each in read_parallel(parallel, languages=list(LANGUAGES)).items()}
    space = sf.estimate_space(model, tokenizer, text, progress=False)
    sf.attach(model, space, *area)
    return model, tokenizer


def prompts(tokenizer: Any) -> dict[str, list[list[int]]]:
    """language → token ids of each question, in the chat template where there is one."""
    if tokenizer.chat_template is None:
        return {code: [tokenizer(text)["input_ids"] for text in texts] for code, texts in QUESTIONS.items()}
    return {
        code: [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for text in texts
        ]
        for code, texts in QUESTIONS.items()
    }


@torch.no_grad()
def by_hooks(model: Any, added: Mapping[int, Tensor], tokens: list[int], dtype: torch.dtype) -> Tensor:
    """(T, V) logits of a copy without ShifCon in ``dtype``, with vectors added to the inputs of blocks by hooks."""
    plain = copy.deepcopy(model)
    plain.shifcon.detach()
    plain.to(dtype)
    for block, vector in added.items():
        moved = vector.to(dtype)
        locate_decoder(plain).blocks[block].register_forward_pre_hook(
            lambda module, args, moved=moved: (args[0] + moved, *args[1:])
        )
    return plain(input_ids=torch.tensor([tokens])).logits[0].double()  # type: ignore[no-any-return]


@torch.no_grad()
def greedy(model: Any, tokens: list[int], language: str) -> tuple[list[int], float]:
    """Hugging Face's tokens with the shift on, and the smallest margin between a token and the next best."""
    output = model.generate(
        torch.tensor([tokens]),
        language_ids=model.shifcon.language_ids(language),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [logits[0].float().topk(2).values for logits in output.logits]
    return output.sequences[0, len(tokens) :].tolist(), min(float(each[0] - each[1]) for each in best)


def greedy_in_llama_cpp(server: LlamaCpp, tokens: list[int], count: int) -> list[int]:
    """llama.cpp's tokens, with its cache in use."""
    last, new = server.logits(tokens)[-1], []
    for position in range(len(tokens), len(tokens) + count):
        new.append(int(last.argmax()))
        last = server.logits([new[-1]], start=position)[-1]
    return new


class Parity:
    """What the logits of some prompts should be, and how far others are from that."""

    def __init__(self, model: Any, asked: Mapping[str, list[list[int]]]) -> None:
        self.asked = [(code, tokens) for code, each in asked.items() for tokens in each]
        self.shifted, self.unshifted, self.plain, self.effect = [], [], [], 0.0
        for code, tokens in self.asked:
            added = shift_vectors(model, code).at
            self.shifted.append(by_hooks(model, added, tokens, torch.float64))
            self.plain.append(by_hooks(model, added, tokens, torch.float32))
            self.unshifted.append(by_hooks(model, {}, tokens, torch.float64))
            self.effect = max(self.effect, float((self.shifted[-1] - self.unshifted[-1]).abs().max()))

    def error(self, logits: list[Tensor], *, shifted: bool = True) -> float:
        """The largest difference from float64."""
        pairs = zip(self.shifted if shifted else self.unshifted, logits, strict=True)
        return max(float((wanted - got.double()).abs().max()) for wanted, got in pairs)


def llama_cpp(model: Any, parity: Parity, gguf_model: Path, folder: Path) -> dict[str, Any]:
    """Control vectors in llama.cpp: logits and greedy tokens against Hugging Face's."""
    logits, unshifted, same, margins, checks = [], [], [], [], {}
    with LlamaCpp(gguf_model) as server:
        for code, tokens in parity.asked:
            if code not in checks:
                found = export_control_vector(model, code, folder, gguf_model=gguf_model)
                assert found is not None
                checks[code] = {"effect": found.effect, "error": found.error}
            server.set_control_vector(None)
            unshifted.append(server.logits(tokens))
            server.set_control_vector(read_control_vector(folder / f"{code}.gguf", server.hidden_size))
            logits.append(server.logits(tokens))
            wanted, margin = greedy(model, tokens, code)
            same.append(greedy_in_llama_cpp(server, tokens, len(wanted)) == wanted)
            margins.append(margin)
    return {
        "error": parity.error(logits),
        "error_without_vector": parity.error(unshifted, shifted=False),
        "greedy_equal": same,
        "smallest_margin": margins,
        "checks": checks,
        "bytes": (folder / f"{code}.gguf").stat().st_size,
    }


def measure(name: str, parallel: Path, area: tuple[int, int], *, adapter: bool, work: Path) -> dict[str, Any]:
    """Every figure of one model."""
    folder = fetch(name)
    model, tokenizer = attached_model(folder, parallel, area, adapter=adapter)
    parity = Parity(model, prompts(tokenizer))
    attached = []
    for code, tokens in parity.asked:
        with torch.no_grad():
            ids = model.shifcon.language_ids(code)
            attached.append(model(input_ids=torch.tensor([tokens]), language_ids=ids).logits[0])
    found: dict[str, Any] = {
        "effect": parity.effect,
        "plain_error": parity.error(parity.plain),
        "attached_error": parity.error(attached),
    }
    print(json.dumps(found), flush=True)
    if adapter:
        found["peft"] = _peft(model, parity, folder, work)
        print(json.dumps(found["peft"]), flush=True)
        found["merged"] = _merged(model, parity, work)
        print(json.dumps(found["merged"]), flush=True)
        export_merged(model, None, work / "unshifted", tokenizer=tokenizer)
        merged = AutoModelForCausalLM.from_pretrained(work / "unshifted")
        float32_gguf.from_checkpoint(merged, tokenizer, work / "float32.gguf")
        del merged
    else:
        float32_gguf.from_gguf(fetch_gguf(name), work / "float32.gguf")
    found["gguf_float32"] = llama_cpp(model, parity, work / "float32.gguf", work / "vectors")
    print(json.dumps(found["gguf_float32"]), flush=True)
    found["gguf_quantised"] = {
        "file": MODELS[name].gguf,
        "checks": {
            code: vars(export_control_vector(model, code, work / "vectors", gguf_model=fetch_gguf(name)))
            for code in QUESTIONS
        },
    }
    found["vllm"] = {
        "engine": "not run: no GPU; the file is read as hotwire reads it, and its rows are added by hooks",
        "checks": {code: vars(export_vllm(model, code, work / "vectors")) for code in QUESTIONS},
        "bytes": (work / "vectors" / "sw.pt").stat().st_size,
    }
    return found


def _peft(model: Any, parity: Parity, folder: Path, work: Path) -> dict[str, Any]:
    logits, checks = [], {}
    for code in QUESTIONS:
        checks[code] = vars(export_peft(model, code, work / code))
    for code, tokens in parity.asked:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(base, work / code).eval()
        with torch.no_grad():
            logits.append(loaded(input_ids=torch.tensor([tokens])).logits[0])
    trained = sum(each.numel() * 4 for key, each in model.state_dict().items() if "lora_" in key)
    size = (work / "sw" / "adapter_model.safetensors").stat().st_size
    return {
        "error": parity.error(logits),
        "checks": checks,
        "bytes": size,
        "bytes_of_trained_adapter": trained,
    }


def _merged(model: Any, parity: Parity, work: Path) -> dict[str, Any]:
    logits, checks = [], {}
    for code in QUESTIONS:
        checks[code] = vars(export_merged(model, code, work / "merged"))
        loaded = AutoModelForCausalLM.from_pretrained(work / "merged").eval()
        with torch.no_grad():
            logits += [
                loaded(input_ids=torch.tensor([t])).logits[0] for each, t in parity.asked if each == code
            ]
    return {"error": parity.error(logits), "checks": checks}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=tuple(MODELS))
    parser.add_argument("--parallel", type=Path, required=True, help="multi-parallel JSON Lines")
    parser.add_argument("--area", required=True, help="boundaries f,b")
    parser.add_argument("--no-adapter", action="store_true", help="the shift alone: no peft, no merged")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the JSON file")
    options = parser.parse_args()
    forward, backward = map(int, options.area.split(","))
    with tempfile.TemporaryDirectory() as work:
        found = measure(
            options.model,
            options.parallel,
            (forward, backward),
            adapter=not options.no_adapter,
            work=Path(work),
        )
    result = {
        "kind": "export_parity",
        "model": options.model,
        "area": [forward, backward],
        "adapter": not options.no_adapter,
        "dtype": "float32",
        "data": options.parallel.name,
        "questions": QUESTIONS,
        **found,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "versions": {
            "shifcon_fast": sf.__version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }
    path = options.output / f"{options.model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
