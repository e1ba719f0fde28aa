"""What this machine can do: versions, devices, NF4, dtype, compiled libraries, backends (``shifcon doctor``)."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from shifcon_fast import _native, ops
from shifcon_fast.extras import EXTRAS
from shifcon_fast.version import package_version

if TYPE_CHECKING:
    from shifcon_fast.training.weights.step_plan import StepPlan

PACKAGES = (
    "shifcon-fast",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "safetensors",
    "triton",
    "liger-kernel",
)


@dataclass(frozen=True)
class Device:
    """A device that tensors can live on. ``memory`` is in bytes, None where it is not known."""

    name: str
    description: str
    memory: int | None


def versions() -> dict[str, str | None]:
    """Versions of the packages that matter; None for what is not installed."""
    return {package: package_version(package) for package in PACKAGES}


def devices() -> list[Device]:
    """The CPU, then every CUDA device."""
    cpu = Device("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads", _physical_memory())
    found = [cpu]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        found.append(Device(f"cuda:{index}", f"{properties.name}, {capability}", properties.total_memory))
    return found


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def native() -> dict[str, str]:
    """For each compiled library, "works" and with which vector instructions, or why not and what to do."""
    return {
        "cpu": _native.load("cpu") or f"works, with {_native.cpu_level()} instructions",
        "cuda": _native.load("cuda") or "works",
    }


def extras() -> dict[str, str]:
    """For each extra "installed", or what it lacks and what brings it."""
    absent = {
        extra: [module for module in modules if find_spec(module) is None]
        for extra, modules in EXTRAS.items()
    }
    return {
        extra: f'lacks {", ".join(modules)}: pip install "shifcon-fast[{extra}]"' if modules else "installed"
        for extra, modules in absent.items()
    }


def dtypes() -> dict[str, dict[str, Any]]:
    """By quantisation: GFLOP/s in float32 and bfloat16, and "chosen", for checkpoints stored in 16 bits."""
    from shifcon_fast.training.weights import linear_speed
    from shifcon_fast.training.weights.quantization import nf4_problem

    found: dict[str, dict[str, Any]] = {}
    for quantization in ("none",) if nf4_problem(torch.device("cpu")) else ("nf4", "none"):
        speed = linear_speed.measure(quantization)
        native_bfloat16 = linear_speed.has_native_bfloat16()
        chosen = linear_speed.faster_dtype(speed) if native_bfloat16 else torch.float32
        found[quantization] = {
            "float32": speed["float32"],
            "bfloat16": speed["bfloat16"],
            "chosen": str(chosen).removeprefix("torch."),
            "kept": linear_speed.keep(speed, overwrite=True),
        }
    return found


def examine() -> dict[str, Any]:
    """Everything ``shifcon doctor`` prints, ready for JSON.

    "nf4" maps each device to "works" or to what is wrong; it is found by quantising a matrix and reading it back.
    "dtype" has what the CPU's linear layers reach in float32 and bfloat16, measured now and kept for
    ``load_quantized``. "native" maps each compiled library to what :func:`native` says, "extras" each extra to what
    :func:`extras` says.
    """
    # transformers, peft and bitsandbytes come with it, which the rest of this file does without.
    from shifcon_fast.training.weights.quantization import nf4_problem

    present = devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "extras": extras(),
        "devices": [asdict(device) for device in present],
        "nf4": {device.name: nf4_problem(torch.device(device.name)) or "works" for device in present},
        "dtype": dtypes(),
        "native": native(),
        "operators": [asdict(report) for report in ops.backend_report()],
    }


def plan(
    model: str,
    *,
    quantization: str = "nf4",
    dtype: str | None = None,
    forward: int | None = None,
    backward: int | None = None,
    trust_remote_code: bool = False,
    **shape: Any,
) -> StepPlan:
    """What a training step of a model takes here; ``shape`` is that of :class:`.StepShape`.

    Raises:
        ValueError: a value out of range, no such model, or one boundary without the other.
    """
    from shifcon_fast.training.weights.quantization import read_dtype
    from shifcon_fast.training.weights.step_plan import StepShape, plan_step

    if (forward is None) != (backward is None):
        raise ValueError(f"forward, backward: got {forward} and {backward}; wanted both, or neither")
    return plan_step(
        model,
        StepShape(**shape),
        quantization=quantization,  # type: ignore[arg-type]
        dtype=read_dtype(dtype),
        area=None if forward is None or backward is None else (forward, backward),
        trust_remote_code=trust_remote_code,
    )


def describe_plan(plan: StepPlan) -> str:
    """The result of :func:`plan` as text for a terminal."""
    shape = plan.shape
    lines = [
        f"a step on {plan.device}, {plan.threads} threads, {plan.quantization} in {plan.dtype}: "
        f"{shape.batch} x {shape.length} tokens, {shape.learnt:.0%} learnt; "
        f"{shape.contrastive_batch} pairs of {shape.length_pivot} and {shape.length_other}; "
        f"f, b = {plan.area[0]}, {plan.area[1]}; rank {shape.lora_r}",
        "",
        f"time             {plan.step:8.2f} s",
    ]
    lines += [f"  {name:14} {each:8.2f} s {each / plan.step:5.0%}" for name, each in plan.seconds.items()]
    lines += [
        "",
        f"peak memory      {plan.peak / 2**20:8.0f} MiB of tensors, and what the process has besides",
    ]
    lines += [f"  {name:14} {each / 2**20:8.0f} MiB" for name, each in plan.bytes.items()]
    if plan.device != "cpu":
        lines += ["", "predictions for GPUs follow the same formula; they were not compared with one yet"]
    return "\n".join(lines)


def describe(found: dict[str, Any]) -> str:
    """The result of :func:`examine` as text for a terminal."""
    lines = [f"Python {found['python']} on {found['platform']}", "", "packages"]
    lines += [f"  {name:14} {version or 'not installed'}" for name, version in found["versions"].items()]
    lines += ["", "extras"]
    lines += [f"  {extra:14} {verdict}" for extra, verdict in found["extras"].items()]
    lines += ["", "devices"]
    for device in found["devices"]:
        memory = f", {device['memory'] / 2**30:.1f} GiB" if device["memory"] else ""
        lines.append(f"  {device['name']:14} {device['description']}{memory}")
    lines += ["", "4-bit (NF4)"]
    lines += [f"  {device:14} {verdict}" for device, verdict in found["nf4"].items()]
    lines += ["", "dtype on the CPU (of checkpoints stored in 16 bits; --dtype overrules)"]
    for name, each in found["dtype"].items():
        speeds = f"{each['float32']:.0f} GFLOP/s in float32, {each['bfloat16']:.0f} in bfloat16"
        lines.append(f"  {name:14} {each['chosen']}: {speeds}")
    lines += ["", "compiled extension"]
    lines += [f"  {library:14} {verdict}" for library, verdict in found["native"].items()]
    lines += ["", "operators"]
    for report in found["operators"]:
        lines.append(f"  {report['operator']:24} {report['device']:6} {report['chosen']}")
        for backend, reason in report["reasons"].items():
            said = reason in found["native"].values()
            lines.append(f"    {backend}: {'see the compiled extension above' if said else reason}")
    return "\n".join(lines)
