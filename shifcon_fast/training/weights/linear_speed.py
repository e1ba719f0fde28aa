"""How fast this processor multiplies in float32 and in bfloat16, which decides the dtype of a model on the CPU.

A linear layer, plain or in NF4, runs forward and backward in both. What was measured is kept in a folder of the
user's (``storage.cache_root``), by processor and versions: all later runs, and all processes of one, choose alike.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn
from typing_extensions import TypedDict

from shifcon_fast.storage import cache_root, read_json
from shifcon_fast.training.weights.nf4_linear import nf4_linear
from shifcon_fast.version import package_version

WORTH_IT = 1.25
"""How many times as fast bfloat16 must be to be chosen: less is noise, or lost again around the products."""

_WIDTH, _TOKENS, _ROUNDS = 1024, 256, 3


class LinearSpeed(TypedDict):
    """GFLOP/s of a linear layer's forward and backward, by dtype, and what they were measured with."""

    processor: str
    versions: dict[str, str]
    quantization: str
    float32: float
    bfloat16: float


def has_native_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 (AVX512-BF16, AMX); emulated products are far slower."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def faster_dtype(speed: LinearSpeed) -> torch.dtype:
    """bfloat16 where it is worth it, else float32."""
    return torch.bfloat16 if speed["bfloat16"] >= WORTH_IT * speed["float32"] else torch.float32


def measure(quantization: str) -> LinearSpeed:
    """The fastest of a few rounds of each dtype in turns: about a quarter of a second."""
    layers = {dtype: _layer(quantization, dtype) for dtype in (torch.float32, torch.bfloat16)}
    fastest = dict.fromkeys(layers, float("inf"))
    for _ in range(_ROUNDS + 1):  # the first warms up
        for dtype, layer in layers.items():
            hidden = torch.ones(_TOKENS, _WIDTH, dtype=dtype, requires_grad=True)
            start = time.perf_counter()
            with torch.enable_grad():
                out = layer(hidden)
                out.backward(torch.ones_like(out))
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
    operations = 4 * _TOKENS * _WIDTH * _WIDTH / 1e9
    return {
        **_measured_with(quantization),  # type: ignore[typeddict-item]
        "float32": round(operations / fastest[torch.float32], 1),
        "bfloat16": round(operations / fastest[torch.bfloat16], 1),
    }


def _layer(quantization: str, dtype: torch.dtype) -> Any:
    layer = nn.Linear(_WIDTH, _WIDTH, bias=False, dtype=dtype).requires_grad_(False)
    return nf4_linear(layer) if quantization == "nf4" else layer


@functools.cache
def known_speed(quantization: str) -> LinearSpeed | None:
    """What is known of this processor, measured and kept where nothing is.

    None in one of several processes where nothing can be kept: each would measure, and might choose, for itself.
    """
    file = _file(quantization)
    with suppress(ValueError):  # damaged, or not there
        return _read(file)
    speed = measure(quantization)
    if keep(speed, overwrite=False):
        with suppress(ValueError):
            return _read(file)  # another process may have been first
    return None if int(os.environ.get("WORLD_SIZE", "1")) > 1 else speed


def keep(speed: LinearSpeed, *, overwrite: bool) -> bool:
    """Keep a measurement for later; whether one is kept now."""
    file = _file(speed["quantization"])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        staged = file.with_name(f"{file.name}.{uuid4().hex}")
        staged.write_text(json.dumps(speed, indent=1) + "\n", encoding="utf-8")
        try:
            if overwrite:
                staged.replace(file)
            else:
                with suppress(FileExistsError):
                    os.link(staged, file)
        finally:
            staged.unlink(missing_ok=True)
    except OSError:  # a home that is not there or not ours, a file system without links
        return False
    return True


def _read(file: Path) -> LinearSpeed:
    return read_json(file, "the speed of this processor", LinearSpeed)


def _file(quantization: str) -> Path:
    key = json.dumps(_measured_with(quantization), sort_keys=True).encode()
    return cache_root() / "linear_speed" / f"{hashlib.sha256(key).hexdigest()[:16]}.json"


def _measured_with(quantization: str) -> dict[str, Any]:
    versions = {name: package_version(name) for name in ("torch", "bitsandbytes")}
    return {"processor": processor(), "versions": versions, "quantization": quantization}


def processor() -> str:
    """The name of the processor, as far as the system says it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
