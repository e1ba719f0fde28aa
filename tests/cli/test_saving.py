"""What the shifcon command does with what is there already, and with what cannot be finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shifcon_fast as sf
from shifcon_fast import opening, storage
from shifcon_fast.training.trainer import ShifConTrainer
from shifcon_fast.workflow import train_run

Rows = list[dict[str, object]]


def test_a_folder_with_a_run_is_not_overwritten_unasked(workplace, run: Path) -> None:
    before = workplace.snapshot(run)
    refused = workplace.shifcon(*workplace.train_flags(run))
    assert refused.code == 2
    assert "holds a run already; --resume" in refused.text
    assert workplace.snapshot(run) == before


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--pivot", "fr"), "pivot: got 'fr'"),
        (("--lora-target-modules", "no_such_layer"), "no_such_layer"),
        (("--forward", "3", "--backward", "2"), "forward"),
        (("--max-length", "2", "--too-long", "error"), "max_length"),
        (("--resume",), "resume, overwrite: both given"),
    ],
)
def test_overwrite_deletes_nothing_for_a_run_that_is_refused(
    workplace, run: Path, tmp_path: Path, flags: tuple[str, ...], problem: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    before = workplace.snapshot(tmp_path / "run")
    result = workplace.shifcon(*workplace.train_flags(tmp_path / "run", "--overwrite", *flags))
    assert result.code == 2, result.text
    assert problem in result.text
    assert workplace.snapshot(tmp_path / "run") == before


def test_overwrite_leaves_nothing_of_the_old_run_to_be_loaded(
    workplace, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new run dies in its first step."""
    output = tmp_path / "run"
    shutil.copytree(run, output)
    shutil.copytree(output, tmp_path / "copy")
    (tmp_path / "copy").rename(output / "checkpoint-99")
    (output / "notes.txt").write_text("mine")
    (output / "evaluation.json").write_text("of the old run")

    def die(*args: object, **kwargs: object) -> None:
        raise OSError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr(ShifConTrainer, "training_step", die)
        result = workplace.shifcon(*workplace.train_flags(output, "--overwrite"))
    assert result.code == 1
    assert "went away" in result.text
    assert not list(output.rglob("adapter_*"))
    assert not (output / "evaluation.json").exists()
    assert (output / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="not ours; wanted a run folder"):
        sf.load(output)
    result = workplace.shifcon(*workplace.train_flags(output))  # and the folder is free for another try
    assert result.code == 0, result.text
    assert sf.load(output).shifcon.forward == sf.load(run).shifcon.forward


def test_an_adapter_of_someone_else_is_not_overwritten_unasked(workplace, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    result = workplace.shifcon(*workplace.train_flags(tmp_path))
    assert (result.code, workplace.snapshot(tmp_path)) == (2, {"adapter_config.json": b"{}"})
    assert "holds a run already" in result.text


def test_resume_without_a_checkpoint_is_refused(workplace) -> None:
    refused = workplace.shifcon(*workplace.train_flags(workplace.folder / "fresh", "--resume"))
    assert refused.code == 2
    assert "has no checkpoint" in refused.text
    assert not (workplace.folder / "fresh").exists()


def test_a_full_disk_leaves_what_was_there(
    workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "space"
    shutil.copytree(workplace.folder / "space", output)
    before = workplace.snapshot(output)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", no_space)
    refused = workplace.shifcon(
        *("profile", "--model", workplace.base, "--parallel", workplace.folder / "parallel.jsonl"),
        *("--quantization", "none", "--output", output),
    )
    assert refused.code == 1
    assert "no space left on the disk" in refused.text
    assert workplace.snapshot(output) == before


def test_a_loss_that_is_not_a_number_stops_the_run(workplace, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(workplace.base, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.3.mlp.down_proj.weight"))
    weights[name][0, 0] = float("nan")  # above the area: only the generation loss sees it
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    flags = workplace.train_flags(tmp_path / "out", "--final-estimation", "false")
    flags[flags.index("--model") + 1] = str(broken)
    stopped = workplace.shifcon(*flags)
    assert stopped.code == 1
    assert "step 1" in stopped.text
    assert "loss_generation" in stopped.text
    assert not (tmp_path / "out" / "shifcon.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process; POSIX only")
@pytest.mark.slow("waits for processes that are to be ended")
def test_ctrl_c_saves_and_exits_130(workplace, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = workplace.train_flags(output, "--max-steps", "100000", "--logging-steps", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "shifcon_fast", *flags],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "loss_generation" in line:  # training is under way
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 130, text
    assert "interrupted" in text
    saved = list(output.glob("checkpoint-*"))
    assert len(saved) == 1
    step = int(saved[0].name.rpartition("-")[2])
    resumed = workplace.shifcon(*workplace.train_flags(output, "--max-steps", str(step + 1), "--resume"))
    assert resumed.code == 0, resumed.text
    assert f"{step + 1} steps" in resumed.text


def test_resuming_and_evaluating_go_by_the_runs_dtype(
    workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []
    for room in (train_run, opening):
        load = room.load_quantized

        def recorded(*args: Any, load: Any = load, **kwargs: Any) -> Any:
            used.append(kwargs["dtype"])
            return load(*args, **kwargs)

        monkeypatch.setattr(room, "load_quantized", recorded)
    output = tmp_path / "run"
    flags = ("--save-steps", "1", "--max-steps")
    first = workplace.shifcon(*workplace.train_flags(output, *flags, "1", "--dtype", "bfloat16"))
    assert first.code == 0, first.text
    assert json.loads((output / "shifcon.json").read_text())["dtype"] == "bfloat16"
    assert workplace.shifcon(*workplace.train_flags(output, *flags, "2", "--resume")).code == 0
    evaluated = workplace.shifcon(
        *("evaluate", "--model", output, "--against", workplace.base, "--quantization", "none"),
        *("--output", tmp_path / "results", "--parallel", workplace.folder / "parallel.jsonl"),
    )
    assert evaluated.code == 0, evaluated.text
    assert used == [torch.bfloat16] * 3  # train, resume, and the base beside the run
    refused = workplace.shifcon(*workplace.train_flags(tmp_path / "other", "--dtype", "bf16"))
    assert "dtype: got 'bf16'; wanted auto, float32, bfloat16, float16" in refused.text
