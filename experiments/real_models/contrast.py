#!/usr/bin/env python
"""What the contrastive loss sees before any training: representations as they are, shifted, centred, standardised.

    python experiments/real_models/contrast.py [--out experiments/real_models/contrast.json]

For every model and language, at f and at b: the loss over batches of eight translation pairs (ln 8 = 2.08 tells
nothing apart), how often a sentence is nearest to its own translation, and the mean cosine of sentences that are no
translations of each other. *Centred* takes each language's vector away, *standardised* divides by the standard
deviation of each dimension over all sentences besides; *standardised by batch* knows the eight pairs alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from arms import AREAS, ATTENTION, MODELS, PIVOT, WEAK
from one_run import prepare, space_folder
from run import DATA, WORK
from texts import translations
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from shifcon_fast.modeling.boundaries import boundary_representations
from shifcon_fast.modeling.content import content_mask
from shifcon_fast.modeling.evaluation_mode import evaluation_mode
from shifcon_fast.objective.mcl import mcl_from_representations, standardised
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.storage import write_json
from shifcon_fast.training.weights.quantization import load_quantized

PAIRS, SENTENCES, TEMPERATURE = 8, 64, 0.05


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("contrast.json"))
    options = parser.parse_args()
    found = {model: of_model(model, options.data, options.work) for model in MODELS}
    sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from machine import machine

    about = {"pairs": PAIRS, "sentences": SENTENCES, "temperature": TEMPERATURE}
    write_json(options.out, {"machine": machine("cpu"), **about, "models": found})


def of_model(name: str, data: Path, work: Path) -> list[dict[str, Any]]:
    """A row for every boundary, language and way of looking at the representations."""
    folder = prepare(name, data=data, work=work)
    model = load_quantized(folder, None, "nf4", dtype=torch.bfloat16)
    model.set_attn_implementation(ATTENTION)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    space = LanguageSpace.load(space_folder(work, name, "stable", data=data))
    text = translations(data)
    with torch.no_grad(), evaluation_mode(model):
        seen = {code: represent(model, tokenizer, text[code][:SENTENCES], AREAS[name]) for code in text}
    rows = []
    for place, boundary in enumerate(AREAS[name]):
        mean = {code: space.mean[boundary, space.languages.index(code)] for code in seen}
        centred = {code: each[place] - mean[code] for code, each in seen.items()}
        deviation = torch.cat(list(centred.values())).std(0)
        for code in WEAK:
            pivot, other = seen[PIVOT][place], seen[code][place]
            ways = {
                "as they are": (pivot, other),
                "shifted": (pivot, other - mean[code] + mean[PIVOT]),
                "centred": (centred[PIVOT], centred[code]),
                "standardised": (centred[PIVOT] / deviation, centred[code] / deviation),
            }
            found = {way: contrast(*both) for way, both in ways.items()}
            found["standardised by batch"] = contrast(pivot, other, standardise=True)
            for way, values in found.items():
                rows.append({"boundary": boundary, "language": code, "way": way, **values})
                print(name, rows[-1], flush=True)
    return rows


def represent(model: Any, tokenizer: Any, sentences: list[str], area: tuple[int, int]) -> Tensor:
    """(2, n, d) float32, at f and b."""
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    mask = content_mask(batch.input_ids, batch.attention_mask, tokenizer.all_special_ids)
    return boundary_representations(model, batch.input_ids, batch.attention_mask, mask, area)


def contrast(pivot: Tensor, other: Tensor, *, standardise: bool = False) -> dict[str, float]:
    """Loss, share of nearest translations and mean cosine of strangers, over batches, in both directions."""
    batches = [side.unflatten(0, (-1, PAIRS)) for side in (pivot, other)]
    loss = mcl_from_representations(*batches, temperature=TEMPERATURE, standardise=standardise)
    a, b = (
        functional.normalize(side, dim=-1) for side in (standardised(*batches) if standardise else batches)
    )
    cosine = a @ b.mT
    own = torch.arange(PAIRS)
    nearest = torch.stack([way.argmax(-1) == own for way in (cosine, cosine.mT)]).float().mean()
    strangers = cosine[:, ~torch.eye(PAIRS, dtype=torch.bool)].mean()
    values = {"loss": loss, "nearest": nearest, "cosine of strangers": strangers}
    return {name: round(float(each), 4) for name, each in values.items()}


if __name__ == "__main__":
    main()
