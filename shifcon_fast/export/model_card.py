"""The model card of a run: its README.md with the metadata that the Hugging Face Hub reads.

Nothing of the machine that trained it is in it: a base model in a folder is called by the folder's name.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from shifcon_fast.data.languages import is_code, primary_code
from shifcon_fast.export.shift_vectors import file_stem
from shifcon_fast.export.support import supported_targets
from shifcon_fast.markdown import block, code, prose, table
from shifcon_fast.space.language_shift import LanguageShift, dose_warning
from shifcon_fast.version import __version__

logger = logging.getLogger(__name__)

README = "README.md"
MARK = "<!-- Written by shifcon_fast"
# Cards that say nothing of a run: PEFT's and transformers' own.
_OTHERS = ("[More Information Needed]", "<!-- This model card has been generated automatically")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_TEMPLATE = "model_card.md.j2"
_METHOD = (
    "w_gen",
    "w_mcl",
    "w_replay",
    "w_distillation",
    "w_anchor",
    "learn_alpha",
    "mcl_mode",
    "temperature",
    "anchor_pivot",
    "standardise_contrast",
    "vectors",
    "contrastive_batch_size",
)


@dataclass(frozen=True)
class CardOptions:
    """What a run does not know of itself.

    Attributes:
        base_model: the Hub id of the base model, where the run has a folder.
        repository: the run's own Hub id.
        license, datasets, tags: for the metadata; left out unless given.
        languages: for the metadata; None takes the run's.
        evaluation: Markdown tables, as :func:`.card_tables.evaluation_tables` makes them.
    """

    base_model: str | None = None
    repository: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    languages: Sequence[str] | None = None
    evaluation: str = ""

    def __post_init__(self) -> None:
        named = {
            "base_model": (self.base_model,),
            "repository": (self.repository,),
            "datasets": self.datasets,
        }
        for name, ids in named.items():
            for each in ids:
                if each is not None and not is_hub_id(each):
                    raise ValueError(f"{name}: got {each!r}; wanted the id of a Hub repository (org/name)")


def model_card(
    name: str,
    run: Mapping[str, Any],
    shift: LanguageShift | None,
    adapter: Mapping[str, Any],
    *,
    log: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[str] = (),
    has_tokenizer: bool = True,
    chat_template: bool = False,
    options: CardOptions | None = None,
) -> ModelCard:
    """The card of a run.

    Args:
        name: its title.
        run: its ``shifcon.json``, as ``run_card.read_card`` returns it.
        shift: what it shifts by; None for a run without.
        adapter: its ``adapter_config.json``.
        log: the steps of its training log.
        pictures: names of pictures beside the card.
        has_tokenizer: whether the tokenizer lies beside the card.
        chat_template: whether its tokenizer has one that it was trained with.
    """
    options = options or CardOptions()
    base = _base_of(run, options)
    shifts = shift is not None and bool(shift.alpha) and run["shift"]
    targets = supported_targets(
        run["fingerprint"].get("model_type") or "", shift if shifts else None, adapter
    )
    others = [each for each in run["languages"] if each != run["pivot"]]
    language = others[0] if others else run["pivot"]
    text = _template().render(
        mark=f"{MARK} {__version__}. Take this line away to keep the card as it is. -->",
        name=name,
        run=run,
        shift=shift if shifts else None,
        adapter=adapter,
        kind="LoRA" if adapter.get("peft_type") == "LORA" else adapter.get("peft_type") or "PEFT",
        method={key: run["training"][key] for key in _METHOD if run["training"].get(key) is not None},
        examples=", ".join(
            f"{each} {count}" for each, count in (run["training"].get("examples") or {}).items()
        ),
        translations=run["training"].get("translations"),
        base=base,
        options=options,
        targets=targets,
        language=language,
        others=others,
        stem=file_stem(language) if language else "",
        languages=_language_table(run, shift, shifts),
        warning=(dose_warning(shift) or "") if shift is not None and shifts else "",
        losses=_losses(log),
        pictures=[each for each in pictures if re.fullmatch(r"[\w.-]+", each)],
        has_tokenizer=has_tokenizer,
        chat_template=chat_template,
    )
    data = ModelCardData(
        base_model=base.hub_id,
        library_name="peft",
        pipeline_tag="text-generation",
        language=_metadata_languages(run["languages"] if options.languages is None else options.languages),
        license=options.license,
        datasets=list(options.datasets) or None,
        tags=_tags(base, adapter, options),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")


@functools.cache
def _template() -> jinja2.Template:
    """Compiled once a process: training saves a card with every checkpoint."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    environment.filters.update(prose=prose, code=code, block=block, quote=shlex.quote, python=_python)
    return environment.get_template(_TEMPLATE)


def _python(text: str) -> str:
    """As a string of Python, in double quotes: JSON's are."""
    return json.dumps(text, ensure_ascii=False)


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub: ``org/name``, or ``name`` of the oldest ones."""
    return _HUB_ID.fullmatch(name) is not None


def is_written_by_hand(readme: Path) -> bool:
    """Whether a card that is there was written or changed by a person, and is to be kept."""
    if not readme.is_file():
        return False
    text = readme.read_text(encoding="utf-8", errors="replace")
    return not any(mark in text for mark in (MARK, *_OTHERS))


@dataclass(frozen=True)
class _Base:
    """The base model: its Hub id, or its folder's name; ``elsewhere`` where the run itself names another place."""

    hub_id: str | None
    name: str
    elsewhere: bool


def _base_of(run: Mapping[str, Any], options: CardOptions) -> _Base:
    source = str(run["base_model"])
    is_folder = not is_hub_id(source)
    name = re.split(r"[\\/]", source.rstrip("\\/"))[-1] if is_folder else source
    hub_id = options.base_model or (None if is_folder else source)
    return _Base(hub_id, hub_id or name, elsewhere=is_folder or hub_id != source)


def _metadata_languages(codes: Sequence[str]) -> list[str] | None:
    """ISO 639-1 codes, or 639-3 where there is none, as the Hub wants them."""
    known = list(dict.fromkeys(primary_code(each) for each in codes if is_code(each)))
    if unknown := [each for each in codes if not is_code(each)]:
        logger.warning("The card's metadata leaves out %s: no language codes", ", ".join(map(repr, unknown)))
    return known or None


def _tags(base: _Base, adapter: Mapping[str, Any], options: CardOptions) -> list[str]:
    """As PEFT tags adapters, and ours."""
    kind = str(adapter.get("peft_type") or "").lower()
    own = [f"base_model:adapter:{base.hub_id}"] if base.hub_id else []
    return list(dict.fromkeys([*own, *([kind] if kind else []), "transformers", "shifcon", *options.tags]))


def _language_table(run: Mapping[str, Any], shift: LanguageShift | None, shifts: bool) -> str:
    if shift is None:
        return ""
    sentences = shift.provenance.get("sentences") or {}
    learnt = shifts and shift.alphas is not None
    header = ["language", *(["alpha"] if learnt else []), *(["dose at f", "dose at b"] if shifts else [])]
    header.append("sentences of its vectors")
    rows = []
    for each in shift.languages:
        doses = ("pivot", "pivot") if each == shift.pivot else [f"{dose:.2f}" for dose in shift.dose(each)]
        alpha = [f"{shift.alpha_of(each):.3f}"] if learnt else []
        rows.append([each, *alpha, *(doses if shifts else ()), sentences.get(each, "–")])
    return table(header, rows)


def _losses(log: Sequence[Mapping[str, Any]]) -> str:
    """The first and the last losses that were logged."""
    steps = [row for row in log if "step" in row]
    if not steps:
        return ""
    names = [each for each in ("loss", "loss_generation", "loss_contrastive") if each in steps[-1]]
    rows = [[row["step"], *(f"{row[each]:.4f}" if each in row else "–" for each in names)] for row in
            ([steps[0], steps[-1]] if len(steps) > 1 else steps)]  # fmt: skip
    return table(["step", *(each.replace("_", " ") for each in names)], rows)
