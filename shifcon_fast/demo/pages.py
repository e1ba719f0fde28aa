"""The demo's report: what the world is, what came out, where the model was shifted."""

from __future__ import annotations

from pathlib import Path

from shifcon_fast.demo.words import LANGUAGES
from shifcon_fast.demo.world import World
from shifcon_fast.evaluation.page import Section, Table, Text
from shifcon_fast.evaluation.report import write_report
from shifcon_fast.evaluation.result import EvaluationResult
from shifcon_fast.evaluation.sections import (
    area_section,
    comparison_sections,
    retrieval_section,
    settings_section,
)
from shifcon_fast.evaluation.system_comparison import SystemComparison
from shifcon_fast.space.area import Area
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.storage import read_json


def write_page(
    output: Path,
    comparison: SystemComparison,
    *,
    world: World,
    space: LanguageSpace,
    area: Area,
    before: EvaluationResult,
    after: EvaluationResult,
) -> Path:
    """Write ``report.html`` into the demo's folder and return where it is.

    ``before`` is the untrained model's evaluation, ``after`` that of one run, for the retrieval matrices.
    """
    summary, *details = comparison_sections(comparison)
    demo = read_json(output / "demo.json", "the settings of a demo")
    return write_report(
        output,
        "ShifCon on a generated world",
        [
            summary,
            _world_section(world),
            *details,
            area_section(space, area),
            retrieval_section(after, before),
            settings_section(
                {
                    "world": demo["world"],
                    "pretraining": demo["pretrain"],
                    "fine-tuning": {
                        **demo["training"],
                        "lora_rank": demo["lora_rank"],
                        "lora_alpha": demo["lora_alpha"],
                    },
                    **demo["systems"],
                    "versions": after.versions,
                }
            ),
        ],
        subtitle="A tiny Llama, pretrained here on made-up people in four languages; English states every fact, "
        "the other languages only some.",
    )


def _world_section(world: World) -> Section:
    settings = world.settings
    people = settings.stated + settings.english_only + settings.parallel
    example = next(row for row in world.questions if row["group"] == "english_only")
    asked = {row["lang"]: row for row in world.questions if row["row"] == example["row"]}
    return Section(
        "The world",
        [
            Text(
                [
                    f"{people} made-up people, four facts each. English states all of them; the other languages "
                    f"state those of {settings.stated} people. Fine-tuning asks every language about these and "
                    f"about {settings.parallel} more people, of whom the translations speak, and English about "
                    "everybody.",
                    f"Nobody ever tells the other languages about the remaining {settings.english_only} people: "
                    "what they answer about those they can only know through English.",
                ]
            ),
            Table(
                ["language", "question", "right answer"],
                [[code, asked[code]["question"], asked[code]["answer"]] for code in LANGUAGES],
                "One question about a fact that was seen only in English.",
            ),
        ],
    )
