"""lm-evaluation-harness: a run as its ``--model shifcon``.

https://github.com/EleutherAI/lm-evaluation-harness, whose models are found in a registry that has no plug-ins: the
class is registered when this file is imported. So the harness is called through us, with its own arguments
(``shifcon lm-eval --model_args pretrained=run/,language=sw --tasks mgsm_direct_sw``), or from Python
(``lm_eval.simple_evaluate(model=ShifConLM("run/", language="sw"), tasks=[...])``).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from shifcon_fast.data.languages import position_of
from shifcon_fast.extras import needed_for
from shifcon_fast.modeling.handle import ShiftHandle
from shifcon_fast.modeling.spoken import AUTO, NO_ROUTER
from shifcon_fast.opening import is_run, run_tokenizer
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.training.run.run_card import RunCard, read_card
from shifcon_fast.training.run.run_folder import load
from shifcon_fast.training.run.shift_file import read_shift
from shifcon_fast.version import package_versions

with needed_for("lm-evaluation-harness's --model shifcon"):
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

logger = logging.getLogger(__name__)

NAME = "shifcon"
# Of HFLM, and not of a run: what it would load, or load by, is in the run's card.
_NOT_FOR_RUNS = ("peft", "delta", "autogptq", "gptqmodel", "gguf_file", "subfolder", "tp_plan")
_MEMORY = ("max_memory_per_gpu", "max_cpu_memory", "offload_folder")


@register_model(NAME)
class ShifConLM(HFLM):  # type: ignore[misc, unused-ignore]
    """A run in lm-evaluation-harness, every prompt and answer shifted by one language.

    The model is quantised as it was trained, generation ends where the run's answers do (and at the task's
    ``until``), prompts go through the run's tokenizer. After the first batch it is checked that blocks f and b have
    added the shift.

    Args:
        pretrained: the folder of a run; or an attached model, with ``tokenizer``.
        language: that of the tasks, in any form (``swh_Latn`` for ``sw``). The pivot's is never shifted: naming it
            asks for the unshifted model. ``"auto"`` has each request find its own, from its prompt (and from the
            choice, where one is scored); nothing is then proven of the first batch.
        base: the run's base model, if it is no longer where it was trained from.
        quantization: "nf4" or "none"; None takes what the run was trained with.
        tokenizer, device, dtype, batch_size, max_length, add_bos_token, parallelize, ...: as for ``HFLM``; device
            None is the GPU if there is one.

    Raises:
        ValueError: no run, no language or an unknown one (those that the run knows are listed), an argument of
            ``HFLM`` that has no meaning for a run.
    """

    def __init__(
        self,
        pretrained: Any,
        language: str | None = None,
        *,
        base: str | None = None,
        quantization: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        refused = [name for name in (*_NOT_FOR_RUNS, *_MEMORY) if options.get(name)]
        if options.get("revision", "main") != "main":
            refused.append("revision")
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: not for --model {NAME}, which loads a run as its {NAME} card says; "
                "wanted pretrained, language, base, quantization, dtype, device, parallelize, ..."
            )
        self._card: RunCard | None = None
        known: Sequence[str]
        pivot: str | None
        self._base, self._quantization = base, quantization
        if isinstance(pretrained, torch.nn.Module):
            handle: ShiftHandle | None = getattr(pretrained, "shifcon", None)
            if handle is None:
                raise ValueError("pretrained: got a model that is not attached; wanted one, or --model hf")
            if (base, quantization) != (None, None):
                raise ValueError("base, quantization: got one with a model that is loaded")
            shift: LanguageShift | None = handle.shift
            known, pivot = list(handle.shift.languages), handle.shift.pivot
        else:
            pretrained = str(pretrained)
            if not is_run(pretrained):
                raise ValueError(f"pretrained: {pretrained} is no run; --model hf takes other models")
            self._card = read_card(pretrained)
            shift = read_shift(Path(pretrained), self._card)
            known, pivot = self._card["languages"], self._card["pivot"]
        self.language = checked_language(language, known, pivot)
        if self.language == AUTO and (shift is None or shift.router is None):
            raise ValueError(NO_ROUTER)
        self._engaged = False
        super().__init__(
            pretrained=pretrained,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            **options,
        )
        self._handle: ShiftHandle | None = getattr(self.model, "shifcon", None)
        if self._handle is None or not self._handle.alpha:
            logger.warning("%s was trained without the shift: it is measured unshifted", pretrained)
        if self._handle is not None and self._card is not None:
            self._handle.language = self.language  # for who calls `lm.model`

    def _get_config(self, pretrained: str, *, trust_remote_code: bool = False, **_: Any) -> None:
        assert self._card is not None
        source = self._base or self._card["base_model"]
        try:
            self._config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{pretrained}: its base model {source!r} cannot be loaded; pass base= if it moved: {error}"
            ) from error

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **settings: Any) -> None:
        if tokenizer is None and self._card is not None:
            trust = bool(settings.get("trust_remote_code"))
            self.tokenizer = run_tokenizer(pretrained, self._card, base=self._base, trust_remote_code=trust)
        else:
            super()._create_tokenizer(pretrained, tokenizer, **settings)

    def _create_model(
        self,
        pretrained: str,
        *,
        dtype: Any = "auto",
        trust_remote_code: bool = False,
        parallelize: bool = False,
        device_map: Any = None,
        **settings: Any,
    ) -> None:
        ours = ("revision", "gpus", "quantization_config", *_NOT_FOR_RUNS, *_MEMORY)
        if unknown := settings.keys() - {*ours}:
            raise ValueError(f"{', '.join(sorted(unknown))}: unknown arguments of --model {NAME}")
        self._model = load(
            pretrained,
            base=self._base,
            quantization=self._quantization,
            dtype=None if dtype in ("auto", None) else getattr(torch, str(dtype).removeprefix("torch.")),
            device_map=device_map or ("auto" if parallelize else {"": str(self.device)}),
            trust_remote_code=bool(trust_remote_code),
        )

    def _model_call(self, inps: Any, *inputs: Any, **options: Any) -> Any:
        if self.language == AUTO and len(inps) > 1:
            raise ValueError(
                "language: got 'auto' for tasks that are scored by log-likelihood in batches, which lm-eval pads "
                "without saying where; wanted batch_size=1, or the language of the tasks"
            )
        with self._shifted():
            return super()._model_call(inps, *inputs, **options)

    def _model_generate(self, *inputs: Any, **options: Any) -> Any:
        with self._shifted():
            return super()._model_generate(*inputs, **options)

    @contextmanager
    def _shifted(self) -> Iterator[None]:
        """Rows are in our language inside, also where the model is shared; the first time, that is proven.

        Raises:
            RuntimeError: the language is shifted and a block that shifts it has not.
        """
        handle = self._handle
        if handle is None:
            yield
            return
        before = _additions(handle)
        with handle.use(self.language):
            yield
        if self._engaged or self.language in (AUTO, handle.shift.pivot) or not handle.alpha:
            return
        still = [block for block, count in _additions(handle).items() if count == before[block]]
        if still:
            raise RuntimeError(
                f"The shift of {self.language} did not engage in blocks {still}: what was measured is not the run. "
                "Please report this with the output of `shifcon doctor`."
            )
        self._engaged = True

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results say of the model; nothing is asked of the Hub."""
        info: dict[str, Any] = {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": self.model.dtype,
            "shifcon_language": self.language,
            "shifcon_versions": package_versions(),
        }
        if self._handle is not None:
            shift = self._handle.shift
            info["shifcon_area"] = [shift.forward, shift.backward]
            info["shifcon_alpha"], info["shifcon_recipe"] = shift.alpha, shift.recipe
            info["shifcon_intervention"] = shift.intervention
            if alphas := shift.alphas_by_language:
                info["shifcon_alphas"] = alphas
        if self._card is not None:
            info["shifcon_files"] = dict(self._card["files"])
        return info


def _additions(handle: ShiftHandle) -> dict[int, int]:
    """block → in how many calls it has added a shift, for the two that do."""
    engagements = handle.engagements
    return {block: engagements[block]["shift"] for block in handle.shift.blocks}


def checked_language(language: object, known: Sequence[str], pivot: str | None) -> str:
    """The language as the run writes it; whatever was given for a run that knows none.

    Raises:
        ValueError: none, or one that the run does not know.
    """
    if language is None or language == "":
        listed = ", ".join(known) or "none"
        raise ValueError(
            f"language: none given; wanted the language of the tasks, one of {listed}"
            + (f" ({pivot}, the pivot, is the unshifted model)" if pivot else "")
        )
    code = str(language)  # lm-eval reads `nan` (Min Nan Chinese) as a number
    return code if not known or code == AUTO else known[position_of(code, known)]


def run_command(arguments: Sequence[str]) -> None:
    """lm-eval's own command, where ``--model shifcon`` is known, and the default.

    Raises:
        SystemExit: as it ends.
    """
    own = sys.argv
    sys.argv = ["lm-eval", *with_our_model(arguments)]
    try:
        cli_evaluate()
    finally:
        sys.argv = own


def with_our_model(arguments: Sequence[str]) -> list[str]:
    """With ``--model shifcon``, unless a model, a file that may name one, or a command other than run is given."""
    given = {argument.partition("=")[0] for argument in arguments}
    if given & {"--model", "-M", "--config", "-C"} or arguments[:1] in (["ls"], ["validate"]):
        return list(arguments)
    rest = list(arguments[1:] if arguments[:1] == ["run"] else arguments)
    return ["run", "--model", NAME, *rest] if rest else ["run"]
