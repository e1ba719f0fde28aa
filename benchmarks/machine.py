"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from shifcon_fast.version import package_version

LEVELS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")


def machine(device: str) -> dict[str, Any]:
    """Device, processor, instruction sets and the one PyTorch uses, cores, threads and versions, for a record."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "processor": facts.get("model name", platform.machine()),
        "instructions": [level for level in LEVELS if level in flags],
        "level": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {
            name: package_version(name)
            for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
        },
    }
