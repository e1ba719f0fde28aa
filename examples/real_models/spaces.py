#!/usr/bin/env python
"""What sentence representations are made of on a real model, and what distances between languages depend on.

    python examples/real_models/spaces.py MODEL_FOLDER --parallel ntrex128.jsonl --output results/
    python examples/real_models/spaces.py --plot results/ --picture spaces.png

Reads the first sentences of a multi-parallel file through the model once, unshifted, and writes ``spaces-
NAME.json``: at every boundary the norms of the first position and of the other tokens against the sentence's
median, what a plain mean ("plain": attended to and not special) and the content tokens ("content") are made of,
and for both the rank that holds 90 % of the variance and the subspace distance at that rank and at equal ranks,
with its noise floor. docs/method.md says what was concluded from it.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from cldr_accuracy import processor
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from shifcon_fast.data.parallel import read_parallel
from shifcon_fast.evaluation.plot_style import LIGHT
from shifcon_fast.evaluation.sentences import SentenceBatch, sentence_batches
from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.boundaries import visit_boundaries
from shifcon_fast.modeling.content import content_mask, ordinary_tokens
from shifcon_fast.space.accumulator import split_halves
from shifcon_fast.space.subspace import common_ridge, principal_subspace, subspace_distance
from shifcon_fast.version import __version__

THRESHOLDS = (2, 2.5, 3, 3.5, 4, 5, 6, 8, 10)
QUANTILES = (0.01, 0.99, 0.999)
RANKS = (8, 16, 32)
DEFINITIONS = ("plain", "content")
PIVOT = "en"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="model folder")
    parser.add_argument("--parallel", type=Path, help="multi-parallel JSON Lines")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the JSON file")
    parser.add_argument("--languages", default="en,de,fr,es,sw,tr,hi,id,ru,zh")
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--plot", type=Path, help="draw the JSON files of this folder instead")
    parser.add_argument("--picture", type=Path, default=Path("spaces.png"))
    options = parser.parse_args()
    if options.plot:
        draw(options.plot, options.picture)
    elif options.model and options.parallel:
        found = measure(options)
        path = options.output / f"spaces-{Path(options.model).name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(path)
    else:
        parser.error("wanted MODEL_FOLDER and --parallel, or --plot FOLDER")


class Collected:
    """What one pass over the sentences leaves at each of L boundaries.

    Attributes:
        ratios, firsts: ‖h‖ of every token but the first, and of the first, over the sentence's median.
        medians, shares: language → (L, N), the median itself, and the share of tokens that only "plain" counts.
        vectors: definition → language → (L, N, d) means.
        massive: which tokens are of massive norm, and how often.
    """

    def __init__(self, languages: Sequence[str], boundaries: int, sentences: int, hidden_size: int) -> None:
        shape = (boundaries, sentences)
        self.ratios: list[list[Tensor]] = [[] for _ in range(boundaries)]
        self.firsts: list[list[Tensor]] = [[] for _ in range(boundaries)]
        self.massive: list[Counter[str]] = [Counter() for _ in range(boundaries)]
        self.medians = {language: torch.zeros(shape) for language in languages}
        self.shares = {language: torch.zeros(shape) for language in languages}
        self.vectors = {
            name: {language: torch.zeros(*shape, hidden_size) for language in languages}
            for name in DEFINITIONS
        }

    def visitor(self, language: str, batch: SentenceBatch, tokenizer: Any) -> Callable[[int, Tensor], None]:
        """What to call with a boundary and its (B, T, d) hidden states of a batch."""
        special = torch.tensor(tokenizer.all_special_ids)
        attended = batch.attention_mask != 0
        plain = attended & torch.isin(batch.input_ids, special, invert=True)
        later = content_mask(batch.input_ids, batch.attention_mask, special)
        first = attended & (attended.cumsum(1) == 1)

        def visit(k: int, hidden: Tensor) -> None:
            hidden = hidden.float()
            content, median, norms = ordinary_tokens(hidden, later)
            ratio = norms / median[:, None]
            self.ratios[k].append(ratio[later])
            self.firsts[k].append(ratio[first])
            self.medians[language][k, batch.rows] = median
            self.massive[k].update(tokenizer.decode([token]) for token in batch.input_ids[later & ~content])
            for name, mask in (("plain", plain), ("content", content)):
                self.vectors[name][language][k, batch.rows] = _sum(hidden, mask) / mask.sum(1, keepdim=True)
            out, kept = (_sum(hidden, mask).norm(dim=-1) for mask in (plain & ~content, content))
            self.shares[language][k, batch.rows] = out / (out + kept)

        return visit

    def usable(self) -> Tensor:
        """The rows that have content tokens in every language: (N,) bool."""
        return torch.stack([each.isfinite().all(0) for each in self.medians.values()]).all(0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the module's docstring names, for one model."""
    languages = options.languages.split(",")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    text = read_parallel(options.parallel, languages=languages)
    decoder = locate_decoder(model)
    boundaries = range(decoder.num_boundaries)
    found = Collected(languages, len(boundaries), options.sentences, decoder.hidden_size)
    for language in tqdm(languages, desc=Path(options.model).name):
        sentences = text[language][: options.sentences]
        for batch in sentence_batches(model, tokenizer, sentences, batch_size=16, what=language):
            visit = found.visitor(language, batch, tokenizer)
            with torch.no_grad():
                visit_boundaries(model, batch.input_ids, batch.attention_mask, boundaries, visit)
    usable = found.usable()
    return {
        "kind": "spaces",
        "model": Path(options.model).name,
        "data": options.parallel.name,
        "sentences": int(usable.sum()),
        "left_out": int((~usable).sum()),
        "languages": languages,
        "dtype": options.dtype,
        "processor": processor(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "shifcon_fast": __version__,
        },
        "boundaries": [_row(k, found, usable) for k in tqdm(boundaries, desc="distances")],
    }


def _row(k: int, found: Collected, usable: Tensor) -> dict[str, Any]:
    ratio, start = torch.cat(found.ratios[k]), torch.cat(found.firsts[k])
    median = {language: float(each[k, usable].mean()) for language, each in found.medians.items()}
    data = {
        name: {language: each[k, usable] for language, each in vectors.items()}
        for name, vectors in found.vectors.items()
    }
    means = {name: {code: x.mean(0) for code, x in each.items()} for name, each in data.items()}
    return {
        "boundary": k,
        "median_norm": _round(_mean(list(median.values()))),
        "first_position": _round(float(start[start.isfinite()].mean())),
        "quantiles": {str(q): _round(float(ratio.quantile(q))) for q in QUANTILES},
        "largest": _round(float(ratio.max())),
        "share_above": {str(t): _round(float((ratio > t).float().mean())) for t in THRESHOLDS},
        "massive_tokens": found.massive[k].most_common(5),
        "share_of_plain_mean": {
            code: _round(float(each[k, usable].mean())) for code, each in found.shares.items()
        },
        "plain_vector_off_by": {
            code: _round(float((plain - means["content"][code]).norm() / means["content"][code].norm()))
            for code, plain in means["plain"].items()
        },
        **{
            name: {
                "dose": {
                    code: _round(float((mean - means[name][PIVOT]).norm()) / median[code])
                    for code, mean in means[name].items()
                    if code != PIVOT
                },
                "variance_0.9": _distances(data[name], rank=None),
                **{f"rank_{rank}": _distances(data[name], rank=rank) for rank in RANKS},
            }
            for name in DEFINITIONS
        },
    }


def _sum(hidden: Tensor, mask: Tensor) -> Tensor:
    return torch.einsum("btd,bt->bd", hidden, mask.float())


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _distances(data: dict[str, Tensor], rank: int | None) -> dict[str, float]:
    """Mean over the other languages: distance to the pivot, and from halves with its noise floor."""
    others = [language for language in data if language != PIVOT]
    whole = {language: principal_subspace(x, rank=rank) for language, x in data.items()}
    ridge = common_ridge(whole.values())
    halves = {
        language: [principal_subspace(x[half], rank=rank) for half in split_halves(len(x))]
        for language, x in data.items()
    }
    first, second = halves[PIVOT]
    crossed = [
        (subspace_distance(halves[o][0], second, ridge) + subspace_distance(halves[o][1], first, ridge)) / 2
        for o in others
    ]
    floors = [subspace_distance(*halves[o], ridge) for o in others]
    return {
        "rank": _round(sum(each.rank for each in whole.values()) / len(whole)),
        "distance": _round(_mean([subspace_distance(whole[o], whole[PIVOT], ridge) for o in others])),
        "split": _round(_mean(crossed)),
        "floor": _round(_mean(floors)),
        "excess": _round(_mean([c / f - 1 for c, f in zip(crossed, floors, strict=True)])),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def draw(folder: Path, picture: Path) -> None:
    """Two rows of panels, a row for each model: share of a plain mean, rank, distance at that rank, excess."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("spaces-*.json"))]
    if not found:
        raise SystemExit(f"{folder}: has no spaces-*.json; run this script on a model first")
    outer = Figure(figsize=(12.5, 3.3 * len(found)), layout="constrained")
    colours = dict(zip(DEFINITIONS, (LIGHT.series[1], LIGHT.series[0]), strict=True))
    labels = {"plain": "all tokens but special ones", "content": "content tokens"}
    for each, part in zip(found, outer.subfigures(len(found), 1, squeeze=False)[:, 0], strict=True):
        part.suptitle(each["model"], fontsize=11, color=LIGHT.ink, x=0.01, ha="left")
        axes = part.subplots(1, 4)
        rows = each["boundaries"]
        ks = [row["boundary"] for row in rows]
        share = [_mean(list(row["share_of_plain_mean"].values())) for row in rows]
        axes[0].plot(ks, share, color=colours["plain"], marker="o", markersize=3)
        axes[0].set(ylim=(0, 1), title="share of a plain mean that is\nfirst position or massive")
        for name in DEFINITIONS:
            own = [row[name]["variance_0.9"] for row in rows]
            axes[1].plot(ks, [o["rank"] for o in own], color=colours[name], marker="o", markersize=3)
            axes[2].plot(ks, [o["distance"] for o in own], color=colours[name], marker="o", markersize=3)
            excess = [row[name]["rank_32"]["excess"] for row in rows]
            axes[3].plot(ks, excess, color=colours[name], marker="o", markersize=3, label=labels[name])
        axes[1].set(title="rank that holds 90 % of the variance", ylim=(0, None))
        axes[2].set(title="distance D to English at that rank", ylim=(0, None))
        axes[3].set(title="excess over the noise floor, rank 32", ylim=(0, None))
        for each_axes in axes:
            each_axes.set_xlabel("boundary")
            each_axes.title.set_fontsize(9.5)
            each_axes.grid(color=LIGHT.grid)
            each_axes.tick_params(colors=LIGHT.ink, labelsize=8.5, length=0)
            for side, spine in each_axes.spines.items():
                spine.set_visible(side == "bottom")
        handles = axes[3].get_legend_handles_labels()[0]
    outer.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    picture.parent.mkdir(parents=True, exist_ok=True)
    outer.savefig(picture, dpi=130, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
