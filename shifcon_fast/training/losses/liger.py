"""Liger kernels (``use_liger_kernel=True``) in a run: what they do there, and why they cannot where they cannot."""

from __future__ import annotations

import inspect
import re
from importlib import import_module, metadata
from types import MethodType
from typing import Any

from torch import Tensor
from transformers.utils import is_liger_kernel_available

from shifcon_fast.modeling.swap import original_class
from shifcon_fast.training.arguments import ShifConArguments

LEAST = (0, 8)
"""The first version that is tried here; ``pyproject.toml`` asks for it too."""


def liger_problem() -> str | None:
    """Why Liger cannot be used, whatever the device, and what to do; None where it can."""
    try:
        found = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        found = None
    if found is not None and tuple(map(int, re.findall(r"\d+", found)[:2])) < LEAST:
        least = ".".join(map(str, LEAST))
        return (
            f'liger-kernel {found} is too old: wanted {least} or newer: pip install -U "shifcon-fast[liger]"'
        )
    if found is None or not is_liger_kernel_available():
        return 'liger-kernel is not installed: pip install "shifcon-fast[liger]"'
    return None


def check_liger(args: ShifConArguments, model: Any) -> None:
    """Leave the norms to our operator and the loss to ``chunked_cross_entropy``; nothing without Liger.

    ``liger_kernel_config`` overrules both: ``rms_norm``, ``fused_linear_cross_entropy``.

    Raises:
        ImportError: Liger is not installed, or too old. ValueError: a run on the CPU, or a model that it has no
            kernels for.
    """
    if not args.use_liger_kernel:
        return
    if problem := liger_problem():
        raise ImportError(f"use_liger_kernel: {problem}", name="liger_kernel")
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
    ours = {"rms_norm": False}
    if args.chunked_cross_entropy != "off":  # which has the losses by language too
        ours["fused_linear_cross_entropy"] = False
    args.liger_kernel_config = {**ours, **(args.liger_kernel_config or {})}


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
