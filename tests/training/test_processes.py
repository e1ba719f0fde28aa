"""Losses by language over two processes are those of one: each token counts once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shifcon_fast.data.instructions import Instruction
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.trainer import ShifConTrainer

SETTINGS = {
    "forward": 1,
    "backward": 3,
    "max_steps": 2,
    "logging_steps": 2,
    "logging_first_step": False,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "train_sampling_strategy": "sequential",
    "learning_rate": 0.0,
    "w_gen": 1.0,
    "w_mcl": 0.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
SCRIPT = """
import json, sys, torch
from peft import LoraConfig
from transformers import AutoTokenizer
import shifcon_fast as sf

checkpoint, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.manual_seed(11)
lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
trainer = sf.ShifConTrainer(
    sf.load_quantized(checkpoint, lora, "none"),
    sf.ShifConArguments(output_dir=folder + "/run", **settings),
    processing_class=AutoTokenizer.from_pretrained(checkpoint),
    train_dataset=folder + "/rows.jsonl",
    eval_dataset=folder + "/few.jsonl",
    space=sf.LanguageSpace.load(folder + "/space"),
)
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    found = {"train": trainer.state.log_history[0], "evaluation": metrics, "processes": trainer.args.world_size}
    open(folder + "/found.json", "w").write(json.dumps(found))
"""


@pytest.mark.slow("starts two processes, each of which imports everything")
def test_two_processes_log_what_one_logs(
    make_trainer: Callable[..., ShifConTrainer],
    tiny_checkpoint: Path,
    space: LanguageSpace,
    instructions: list[Instruction],
    tmp_path: Path,
) -> None:
    few = instructions[:7]  # the last batch of the second process is filled up with rows of the first
    for name, data in (("rows", instructions[:16]), ("few", few)):
        lines = [
            {"lang": each.language, "prompt": each.turns[0].content, "response": each.turns[1].content}
            for each in data
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    space.save(tmp_path / "space")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(tiny_checkpoint), str(tmp_path), json.dumps(SETTINGS)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(tmp_path / "script.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["processes"] == 2

    alone = make_trainer(
        folder="alone",
        train_dataset=instructions[:16],
        eval_dataset=few,
        parallel=None,
        **{**SETTINGS, "per_device_train_batch_size": 8},
    )
    alone.train()
    for place, expected, prefix in (
        ("train", alone.state.log_history[0], "loss"),
        ("evaluation", alone.evaluate(), "eval_loss_"),
    ):
        losses = {name: value for name, value in expected.items() if name.startswith(prefix)}
        assert any(name.endswith("_sw") for name in losses)
        assert {name: found[place][name] for name in losses} == pytest.approx(losses, rel=1e-5)
