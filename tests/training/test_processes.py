"""Two processes on the CPU (gloo) train what one trains with the same global batch, under DDP and under FSDP2."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

import shifcon_fast as sf
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.trainer import ShifConTrainer

pytestmark = pytest.mark.slow("starts two processes, each of which imports everything")

WORKER = Path(__file__).with_name("worker.py")
# The rows of a process; one process alone has both of them in its batch.
SETTINGS: dict[str, Any] = {
    "forward": 1,
    "backward": 3,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "contrastive_batch_size": 4,
    "contrastive_mini_batch_size": 3,
    "gather_across_devices": True,
    "train_sampling_strategy": "sequential",
    "w_gen": 0.5,
    "w_mcl": 2.0,  # so that the contrastive gradient weighs: AdamW makes a step of a small one's rounding
    "w_anchor": 0.5,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "vectors": "ema",
    "ema_decay": 0.5,
    "final_estimation": False,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
ALONE = {"per_device_train_batch_size": 8, "contrastive_batch_size": 8, "contrastive_mini_batch_size": None}


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not self.gradients:
            self.gradients = {
                name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
            }


def write_data(
    folder: Path, instructions: list[Instruction], parallel_text: dict[str, list[str]], space: LanguageSpace
) -> None:
    # The last batch of an evaluation is filled up with rows of the first process.
    for name, data in (("rows", instructions[:16]), ("few", instructions[:7])):
        lines = [
            {"lang": each.language, "prompt": each.turns[0].content, "response": each.turns[1].content}
            for each in data
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = [dict(zip(parallel_text, row, strict=True)) for row in zip(*parallel_text.values(), strict=True)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    space.save(folder / "space")


def start(folder: Path, checkpoint: Path, *arguments: str, **environment: str) -> list[int]:
    """Run two workers in ``folder``, started as torchrun starts them; how they ended."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        with (folder / f"output-{rank}").open("w") as output:
            command = [sys.executable, "-P", str(WORKER), str(checkpoint), str(folder), *arguments]
            variables = {**os.environ, **{name: str(value) for name, value in place.items()}, **environment}
            running.append(subprocess.Popen(command, env=variables, stdout=output, stderr=output))
    try:
        for each in running:
            each.wait(timeout=250)
    finally:
        for each in running:
            each.kill()
    return [each.wait() for each in running]


def said(folder: Path) -> str:
    return "\n".join((folder / f"output-{rank}").read_text()[-4000:] for rank in (0, 1))


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    space: LanguageSpace,
    instructions: list[Instruction],
    parallel_text: dict[str, list[str]],
) -> Path:
    """A folder with what two processes found; see worker.py."""
    folder = tmp_path_factory.mktemp("together")
    write_data(folder, instructions, parallel_text, space)
    codes = start(folder, tiny_checkpoint)
    assert (folder / "killed.json").is_file(), said(folder)  # the last thing that happens
    (folder / "codes.json").write_text(json.dumps(codes))
    return folder


@pytest.fixture(scope="module")
def alone(
    *,
    tmp_path_factory: pytest.TempPathFactory,
    load_model: Callable[..., Any],
    space: LanguageSpace,
    instructions: list[Instruction],
    parallel_text: dict[str, list[str]],
    word_tokenizer: Any,
) -> tuple[ShifConTrainer, dict[str, float], dict[str, Tensor]]:
    """A trainer that has trained alone, its evaluation and its gradients."""
    recorder = Recorder()
    folder = tmp_path_factory.mktemp("alone")
    trainer = ShifConTrainer(
        load_model(),
        sf.ShifConArguments(output_dir=str(folder), **{**SETTINGS, **ALONE}),
        processing_class=word_tokenizer,
        train_dataset=instructions[:16],
        eval_dataset=instructions[:7],
        parallel=parallel_text,
        space=space,
        callbacks=[recorder],
    )
    trainer.train()
    return trainer, trainer.evaluate(), recorder.gradients


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("engine", "wrapper"), [("ddp", "DistributedDataParallel"), ("fsdp", "FSDPPeftModel")]
)
def test_losses_gradients_vectors_and_runs_are_those_of_one_process(
    engine: str, wrapper: str, together: Path, alone: Any
) -> None:
    same_as_alone(together, engine, wrapper, alone)
    gradients = alone[2]
    stored = load_file(together / f"{engine}.st")
    assert stored.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(stored[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def same_as_alone(together: Path, engine: str, wrapper: str, alone: Any) -> None:
    trainer, evaluation, _ = alone
    found = read(together, engine)
    assert found["processes"] == 2
    assert found["model"] == wrapper
    for step in (0, 1):
        expected = {
            name: value
            for name, value in trainer.state.log_history[step].items()
            if "loss" in name or name == "grad_norm"
        }
        assert {"loss_generation_sw", "loss_contrastive"} <= expected.keys()
        assert {name: found["log"][step][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    losses = {name: value for name, value in evaluation.items() if name.startswith("eval_loss_")}
    assert "eval_loss_sw" in losses
    assert {name: found["evaluation"][name] for name in losses} == pytest.approx(losses, rel=1e-5)
    run = sf.load(together / engine)
    assert isinstance(run, PeftModel)
    torch.testing.assert_close(run.shifcon.shift.vectors, trainer.handle.shift.vectors, rtol=1e-5, atol=1e-6)
    weights = dict(trainer.model.named_parameters())
    for name, parameter in run.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-3, atol=1e-4, msg=name)


def test_alpha_is_learnt_from_the_rows_of_all(
    together: Path, make_trainer: Callable[..., ShifConTrainer], instructions: list[Instruction]
) -> None:
    settings = {**SETTINGS, **ALONE, "learn_alpha": True, "max_steps": 1}
    trainer = make_trainer(train_dataset=instructions[:16], callbacks=[recorder := Recorder()], **settings)
    trainer.train()
    (gradient,) = (each for name, each in recorder.gradients.items() if "alphas" in name)
    found = read(together, "alpha")
    assert found["gradient"] == pytest.approx(gradient.tolist(), rel=1e-4, abs=1e-6)
    assert found["alphas"] == pytest.approx(trainer.handle.shift.alphas_by_language)  # type: ignore[union-attr]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_resumed_run_goes_on_exactly(engine: str, together: Path) -> None:
    goes_on_exactly(together, engine)


def goes_on_exactly(together: Path, engine: str) -> None:
    found = read(together, engine)
    whole, resumed = (
        load_file(together / name / "adapter_model.safetensors") for name in (engine, f"{engine}-resumed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for name in ("loss", "loss_contrastive", "loss_generation", "grad_norm", "step"):
        assert found["resumed"][name] == found["log"][1][name]


def test_fsdp_holds_half_of_the_weights_in_each_process(together: Path) -> None:
    assert read(together, "fsdp")["held"] < 0.51 * read(together, "ddp")["held"]


def test_processes_with_unequal_numbers_of_pairs(together: Path) -> None:
    for rank in (0, 1):
        found = read(together, f"unequal-{rank}")
        assert found["gradients"] > 20
        assert found["apart"] < 1e-5
        # Refused by both alike: one alone would leave the other waiting.
        assert "process 1 has no pair, the processes have [5, 0]" in found["none"]
        assert "[5, 2] pairs, and the most need 5 passes" in found["too_few"]


def test_processes_with_unequal_numbers_of_streamed_rows(together: Path) -> None:
    losses = [read(together, f"stream-{rank}") for rank in (0, 1)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == SETTINGS["max_steps"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cut", "its policy cuts block 0 in two at mlp; wanted .* LlamaDecoderLayer"),
        ("larger", "block 0 is no unit of its own"),
        ("version", "fsdp_version: got 1; wanted 2"),
        ("checkpointing", "fsdp_activation_checkpointing: .* without their shift"),
        ("ram", "fsdp_cpu_ram_efficient_loading: .* have no weights"),
        ("alpha", "learn_alpha: not under FSDP or DeepSpeed"),
        ("distillation", "w_replay, w_distillation: not under FSDP"),
        ("bytes", r"4-bit weight .* is stored as torch.uint8, .* quant_storage"),
    ],
)
def test_sharding_that_would_not_train_what_was_meant_is_refused(
    case: str, message: str, together: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(read(together, "refused").get(case, "nothing was refused"))


def test_fsdp_with_one_process_is_refused(
    make_trainer: Callable[..., ShifConTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which accelerate takes, and trains unsharded."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="fsdp: asked for, but accelerate runs as NO on 1 process"):
        make_trainer()


def test_a_killed_process_ends_the_others_with_an_error(together: Path) -> None:
    first, second = read(together, "codes")
    assert second == -9
    assert first == 1
    found = read(together, "killed")
    assert found["seconds"] < 60
    assert found["error"].startswith(("RuntimeError", "DistBackendError", "DistNetworkError"))


def test_a_process_that_is_asked_to_stop_stops_both_at_the_same_step(together: Path) -> None:
    """SIGTERM to one of them in step 2: what it was asked is known to both after step 3."""
    for rank in (0, 1):
        found = read(together, f"term-{rank}")
        assert found["step"] == 3
        assert found["error"] == f"stopped after step 3; saved as {together / 'term' / 'checkpoint-3'}"
    checkpoint = together / "term" / "checkpoint-3"
    assert sf.load(checkpoint).shifcon.forward == 1
    assert (checkpoint / "language_vectors.safetensors").is_file()
    assert not (together / "term" / "shifcon.json").exists()


def test_a_process_that_is_asked_to_stop_too_late_finishes_the_run_first(together: Path) -> None:
    for rank in (0, 1):
        found = read(together, f"late-{rank}")
        assert found == {"error": f"the run was finished by then; saved as {together / 'late'}", "step": 2}
    assert sf.load(together / "late").shifcon.forward == 1


@pytest.mark.slow("two processes of its own")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_aborted_in_a_save_leaves_the_checkpoint_before(
    *,
    tmp_path: Path,
    tiny_checkpoint: Path,
    space: LanguageSpace,
    instructions: list[Instruction],
    parallel_text: dict[str, list[str]],
    rank: int,
) -> None:
    """Whoever of them writes it; and the other ends with an error, not a hang."""
    write_data(tmp_path, instructions, parallel_text, space)
    assert start(tmp_path, tiny_checkpoint, f"aborts{rank}") == [1, 1], said(tmp_path)
    ended = [(tmp_path / f"output-{each}").read_text().splitlines()[-1] for each in (rank, 1 - rank)]
    assert ended[0].endswith("KeyboardInterrupt")
    assert "Error: " in ended[1]
    run = tmp_path / "aborted"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1"]
    assert sf.load(run / "checkpoint-1").shifcon.forward == 1


@pytest.mark.slow("DeepSpeed compiles an extension, a minute")
def test_deepspeed(
    *,
    tmp_path: Path,
    tiny_checkpoint: Path,
    space: LanguageSpace,
    instructions: list[Instruction],
    parallel_text: dict[str, list[str]],
    alone: Any,
) -> None:
    """On the CPU, for which accelerate has to be told of gloo by hand."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")
    write_data(tmp_path, instructions, parallel_text, space)
    assert start(tmp_path, tiny_checkpoint, "zero2", "zero3", DS_ACCELERATOR="cpu") == [0, 0], said(tmp_path)
    for engine in ("zero2", "zero3"):
        same_as_alone(tmp_path, engine, "DeepSpeedEngine", alone)
        goes_on_exactly(tmp_path, engine)
    assert read(tmp_path, "zero3")["held"] < 0.1 * read(tmp_path, "zero2")["held"], "nothing was sharded"
