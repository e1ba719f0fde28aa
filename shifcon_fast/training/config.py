"""Configuration of a training run: one YAML file, every field of which a flag can override.

The fields are those of :class:`RunConfig` (what to train on what) and of
:class:`~shifcon_fast.training.arguments.ShifConArguments` (how), under the same names in the file
(``max_steps: 100``) and on the command line (``--max-steps 100``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from transformers import HfArgumentParser

from shifcon_fast.data.translation_tasks import Directions
from shifcon_fast.training.arguments import ShifConArguments
from shifcon_fast.training.yaml_file import read_yaml


@dataclass
class RunConfig:
    """What a run reads and writes, and the shape of its adapter.

    Lists may be written as YAML lists, as ``en sw`` or as ``en,sw``.
    """

    model: str = field(metadata={"help": "Hugging Face id or folder of the base model."})
    parallel: str = field(
        metadata={"help": "Parallel sentences: JSON Lines, JSON, CSV, TSV, Parquet or a dataset id."}
    )
    instructions: str = field(
        metadata={"help": "Instructions: JSON Lines, JSON, CSV, TSV, Parquet or a dataset id."}
    )
    space: str | None = field(
        default=None, metadata={"help": "Folder of `shifcon profile`; estimated anew if not given."}
    )
    languages: list[str] | None = field(
        default=None, metadata={"help": "Languages of the parallel data to use; all of them if not given."}
    )
    allow_missing: bool = field(
        default=False,
        metadata={"help": "Drop parallel rows in which a language is missing (null, NaN or blank)."},
    )
    translation_instructions: int = field(
        default=0,
        metadata={
            "help": "Add so many translations of `parallel` as instructions (the fair baseline, as QAlign)."
        },
    )
    translation_directions: str = field(
        default="both", metadata={"help": "Of those: both, to_pivot or from_pivot."}
    )
    translation_temperature: float = field(
        default=1.0,
        metadata={"help": "Of those: languages are drawn by their rows to the power of 1/temperature."},
    )
    quantization: str = field(default="nf4", metadata={"help": "nf4 (4-bit) or none."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "float32, bfloat16 or float16. Default: bfloat16 on CUDA, and what this processor is faster "
            "in; with --resume, that of the checkpoint."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale: updates count lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' inputs."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules that get adapters; all-linear is every linear layer but the LM head."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model. Off unless you trust it."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in the output folder."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Start over in an output folder that holds a run."}
    )

    def __post_init__(self) -> None:
        self.languages = None if self.languages is None else _split(self.languages)
        self.lora_target_modules = _split(self.lora_target_modules)
        if self.translation_instructions < 0:
            raise ValueError(
                f"translation_instructions: got {self.translation_instructions}; wanted 0 or more"
            )
        if not self.translation_temperature > 0:
            raise ValueError(
                f"translation_temperature: got {self.translation_temperature}; wanted a number above 0"
            )
        if self.translation_directions not in get_args(Directions):
            raise ValueError(
                f"translation_directions: got {self.translation_directions!r}; wanted one of "
                f"{', '.join(get_args(Directions))}"
            )


def _split(values: Sequence[str]) -> list[str]:
    return [each for value in values for each in value.replace(",", " ").split()]


# What the file and the flags call by a shorter name than transformers does.
_ALIASES = {"output": "output_dir"}


def _fields() -> dict[str, type]:
    """Every field a file or a flag can set, with the class that it belongs to."""
    known: dict[str, type] = {}
    for owner in (ShifConArguments, RunConfig):
        known.update({each.name: owner for each in dataclasses.fields(owner) if each.init})
    known.update({alias: known[name] for alias, name in _ALIASES.items()})
    return known


def describe_fields() -> list[tuple[str, str, Any]]:
    """``(name, help, default)`` of every field, the run's first, then ours, then transformers'."""
    rows = []
    for owner in (RunConfig, ShifConArguments):
        for each in dataclasses.fields(owner):
            if each.init:
                default = each.default if each.default is not dataclasses.MISSING else None
                rows.append((each.name, str(each.metadata.get("help", "")), default))
    return rows


def parse_config(file: str | Path | None, flags: Sequence[str] = ()) -> tuple[RunConfig, ShifConArguments]:
    """Read a YAML file, then apply ``flags`` (``["--max-steps", "100"]``) on top of it.

    Raises:
        ValueError: not YAML, not a mapping, an unknown field (with the nearest known one) or one that is there
            twice, a missing or ill-typed value.
    """
    known = _fields()
    arguments: list[str] = []
    given: set[str] = set()
    for written, value in read_yaml(file).items() if file else ():
        name = written.replace("-", "_")
        if name not in known:
            raise ValueError(f"{file}: unknown field {name!r}{_suggestion(name, known)}")
        name = _ALIASES.get(name, name)
        if name in given:
            raise ValueError(f"{file}: {name!r} is there twice, the second time as {written!r}")
        given.add(name)
        arguments += _as_flags(name, value, file)  # type: ignore[arg-type]
    if flags and not flags[0].startswith("--"):
        raise ValueError(f"got {flags[0]!r}; wanted flags such as --max-steps 100")
    for flag in flags:
        if not flag.startswith("--"):
            arguments.append(flag)
            continue
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known and not (name.startswith("no_") and name[3:] in known):
            raise ValueError(f"unknown flag --{name.replace('_', '-')}{_suggestion(name, known)}")
        arguments += [f"--{_ALIASES.get(name, name)}", *([value] if equals else [])]
    try:
        return _parse(arguments)
    except Exception as error:  # transformers has many kinds for values that it does not like
        where = f"{file} and the flags: " if file and flags else f"{file}: " if file else ""
        raise ValueError(f"{where}{error}") from error


def _parse(arguments: list[str]) -> tuple[RunConfig, ShifConArguments]:
    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:  # argparse would print the usage of 150 flags and exit
            raise ValueError(message.replace("output_dir", "output"))

    parser = Parser((RunConfig, ShifConArguments), allow_abbrev=False)
    run, training = parser.parse_args_into_dataclasses(arguments)
    training.targets = None if training.targets is None else _split(training.targets)
    if not any(
        each.partition("=")[0] == "--output_dir" for each in arguments
    ):  # transformers would choose a folder by itself
        raise ValueError("output: not given; wanted the folder to write the run to (--output DIR)")
    return run, training


def _as_flags(name: str, value: Any, file: str | Path) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, list):
        if not value or any(isinstance(each, (dict, list, type(None))) for each in value):
            raise ValueError(f"{file}: {name} is {str(value)[:60]}; wanted a list of names or numbers")
        if any(str(each).startswith("--") for each in value):
            raise ValueError(f"{file}: {name} is {value}; wanted values, not flags")
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def _suggestion(name: str, known: dict[str, type]) -> str:
    nearest = get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else "; `shifcon train --help-all` lists every field"
