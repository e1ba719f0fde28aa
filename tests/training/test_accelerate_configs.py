"""The configurations of examples/accelerate_configs: accelerate reads them, and one starts a run from files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import shifcon_fast as sf

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "accelerate_configs"


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("single_gpu", "NO"),
        ("multi_gpu", "MULTI_GPU"),
        ("fsdp2", "FSDP"),
        ("deepspeed_zero2", "DEEPSPEED"),
        ("deepspeed_zero3", "DEEPSPEED"),
    ],
)
def test_accelerate_reads_it(name: str, engine: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses keys that it does not know
    assert config.distributed_type.value == engine
    if engine == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert not config.fsdp_config["fsdp_activation_checkpointing"]
    if engine == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


@pytest.mark.slow("starts two processes, each of which imports everything, through a third")
def test_a_run_of_the_command_under_accelerate_launch(
    tiny_checkpoint: Path, parallel_text: dict[str, list[str]], tmp_path: Path
) -> None:
    """4-bit weights sharded over two processes on the CPU."""
    rows = [dict(zip(parallel_text, row, strict=True)) for row in zip(*parallel_text.values(), strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    instructions = [
        {"lang": code, "prompt": text.rpartition(" ")[0], "response": text.rpartition(" ")[2]}
        for code, sentences in parallel_text.items()
        for text in sentences[:4]
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, instructions)))
    run = {
        "model": str(tiny_checkpoint),
        "instructions": str(tmp_path / "rows.jsonl"),
        "parallel": str(tmp_path / "pairs.jsonl"),
        "output": str(tmp_path / "run"),
        "forward": 1,
        "backward": 3,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "contrastive_batch_size": 4,
        "gather_across_devices": True,
        "report_to": "none",
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    launch = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--config_file", str(CONFIGS / "fsdp2.yaml")]
    ended = subprocess.run(
        [*launch, "-m", "shifcon_fast", "train", "--config", str(tmp_path / "run.yaml")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert (tmp_path / "run" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file(), "it was not sharded"
    model = sf.load(tmp_path / "run")
    assert model.shifcon.shift.languages == tuple(parallel_text)
