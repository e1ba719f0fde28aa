"""What the demo does, number by number; how the numbers were chosen is in docs/demo.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shifcon_fast.demo.pretrain import PretrainSettings
from shifcon_fast.demo.world import WorldSettings

BASELINE = "plain QLoRA"
SHIFCON = "ShifCon QLoRA"
_SYSTEMS: dict[str, dict[str, Any]] = {
    BASELINE: {"shift": False, "w_gen": 1.0, "w_mcl": 0.0},
    SHIFCON: {"shift": True, "w_gen": 1.0, "w_mcl": 0.1, "temperature": 0.1},
}


@dataclass(frozen=True)
class DemoSettings:
    """One demo.

    The settings were chosen in world 1, and world 2 was looked at on the way; the demo shows world 3.

    Attributes:
        world, pretrain: who there is to know about, and the model that knows it.
        training: arguments that all systems share, see ``ShifConArguments``.
        systems: name → the arguments in which the systems differ; ``BASELINE`` is among them.
        lora_rank, lora_alpha: of the adapters, on every linear layer of the blocks.
    """

    world: WorldSettings = field(default_factory=lambda: WorldSettings(seed=3))
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    training: Mapping[str, Any] = field(
        default_factory=lambda: {
            "max_steps": 200,
            "per_device_train_batch_size": 64,
            "contrastive_batch_size": 32,
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "warmup_steps": 0.05,
        }
    )
    systems: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: dict(_SYSTEMS))
    lora_rank: int = 8
    lora_alpha: int = 16

    def __post_init__(self) -> None:
        if BASELINE not in self.systems:
            raise ValueError(
                f"systems has {', '.join(self.systems)}; wanted {BASELINE!r}, to compare with, too"
            )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            **asdict(self),
            "training": dict(self.training),
            "systems": {name: dict(arguments) for name, arguments in self.systems.items()},
        }
