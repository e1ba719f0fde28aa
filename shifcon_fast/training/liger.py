"""Liger kernels (``use_liger_kernel=True``) in a run: what they do there, and why they cannot where they cannot."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from shifcon_fast.modeling.swap import original_class


def check_liger(args: TrainingArguments, model: Any) -> None:
    """Leave the norms to our operator, unless ``liger_kernel_config`` has ``rms_norm``; nothing without Liger.

    Raises:
        ImportError: Liger is not installed. ValueError: a run on the CPU, or a model that it has no kernels for.
    """
    if not args.use_liger_kernel:
        return
    if not is_liger_kernel_available():
        raise ImportError(
            'use_liger_kernel: liger-kernel is not installed: pip install "shifcon-fast[liger]"',
            name="liger_kernel",
        )
    if args.device.type == "cpu":
        raise ValueError(
            "use_liger_kernel: Liger's kernels are Triton's and need a GPU; this run is on the CPU, where the "
            "norms go through compiled operators of ours. Leave it out"
        )
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if model.config.model_type not in known:
        raise ValueError(
            f"use_liger_kernel: Liger has no kernels for model type {model.config.model_type!r}; leave it out"
        )
    args.liger_kernel_config = {"rms_norm": False, **(args.liger_kernel_config or {})}


def name_language_ids(model: Any) -> None:
    """Have an attached model's forward name ``language_ids`` again, which Liger's fused loss has replaced.

    Liger's hands unknown arguments on to the decoder, so that rows are shifted all the same; but ``generate``
    refuses what the signature does not name.

    Args:
        model: the attached Hugging Face model, ``handle.model``.
    """
    forward = model.__dict__.get("forward")
    if not isinstance(forward, MethodType) or original_class(model) is None:
        return
    signature = inspect.signature(forward.__func__)
    if "language_ids" in signature.parameters:
        return
    replaced = forward.__func__

    def named(self: Any, *args: Any, language_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if language_ids is not None:
            kwargs["language_ids"] = language_ids
        return replaced(self, *args, **kwargs)

    parameters = list(signature.parameters.values())
    own = inspect.Parameter("language_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    named.__signature__ = signature.replace(parameters=[*parameters[:-1], own, parameters[-1]])  # type: ignore[attr-defined]
    model.forward = MethodType(named, model)
