"""ShifCon for any Hugging Face decoder: language-subspace shift, contrastive QLoRA, and their kernels.

Names load on first use, so that ``import shifcon_fast`` and ``from shifcon_fast import ops`` stay quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shifcon_fast.version import __version__

if TYPE_CHECKING:
    from shifcon_fast import ops as ops
    from shifcon_fast.data.translation_tasks import translation_instructions as translation_instructions
    from shifcon_fast.evaluation.sweep import sweep_area as sweep_area
    from shifcon_fast.lm_eval_model import ShifConLM as ShifConLM
    from shifcon_fast.modeling.attach import attach as attach
    from shifcon_fast.modeling.estimate_space import estimate_space as estimate_space
    from shifcon_fast.objective.mcl import mcl_loss as mcl_loss
    from shifcon_fast.space.area import recommend_area as recommend_area
    from shifcon_fast.space.language_space import LanguageSpace as LanguageSpace
    from shifcon_fast.training.arguments import ShifConArguments as ShifConArguments
    from shifcon_fast.training.dpo import ShifConDPOTrainer as ShifConDPOTrainer
    from shifcon_fast.training.run.run_folder import load as load
    from shifcon_fast.training.sft import ShifConSFTConfig as ShifConSFTConfig
    from shifcon_fast.training.sft import ShifConSFTTrainer as ShifConSFTTrainer
    from shifcon_fast.training.trainer import ShifConTrainer as ShifConTrainer
    from shifcon_fast.training.weights.quantization import load_quantized as load_quantized

_HOME = {
    "LanguageSpace": "shifcon_fast.space.language_space",
    "ShifConArguments": "shifcon_fast.training.arguments",
    "ShifConDPOTrainer": "shifcon_fast.training.dpo",
    "ShifConLM": "shifcon_fast.lm_eval_model",
    "ShifConSFTConfig": "shifcon_fast.training.sft",
    "ShifConSFTTrainer": "shifcon_fast.training.sft",
    "ShifConTrainer": "shifcon_fast.training.trainer",
    "attach": "shifcon_fast.modeling.attach",
    "estimate_space": "shifcon_fast.modeling.estimate_space",
    "load": "shifcon_fast.training.run.run_folder",
    "load_quantized": "shifcon_fast.training.weights.quantization",
    "mcl_loss": "shifcon_fast.objective.mcl",
    "recommend_area": "shifcon_fast.space.area",
    "sweep_area": "shifcon_fast.evaluation.sweep",
    "translation_instructions": "shifcon_fast.data.translation_tasks",
}

__all__ = ["__version__", "ops", *sorted(_HOME)]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("shifcon_fast.ops")
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'shifcon_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
