"""A resumed run equals an uninterrupted one bit for bit; a save that is killed leaves the previous checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

import shifcon_fast as sf
from shifcon_fast.data.instructions import Instruction
from shifcon_fast.training.losses.loss_meter import NonFiniteLossError
from shifcon_fast.training.run import run_folder
from shifcon_fast.training.run.checkpoints import list_checkpoints, rotate
from shifcon_fast.training.trainer import ShifConTrainer

STEPS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 10}


def adapters(trainer: ShifConTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class StopAt(TrainerCallback):
    """Ends a run as a crash would: in the middle, with an exception."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step = step
        self.action = action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def crash() -> None:
    raise OSError("the machine went away")


@pytest.mark.parametrize(
    "settings",
    [
        {"vectors": "ema", "dropout": 0.2, "gradient_accumulation_steps": 2, "ema_decay": 0.5},
        pytest.param(
            {"vectors": "running", "recipe": "official", "running_sums": True, "max_steps": 10},
            marks=pytest.mark.slow("trains twice, in one more way"),
        ),
        {"vectors": "refresh", "refresh_every": 3, "quantization": "nf4"},
    ],
    ids=["ema-dropout-accumulation", "official-running-over-an-epoch", "refresh-nf4"],
)
def test_resume_equals_an_uninterrupted_run(
    make_trainer: Callable[..., ShifConTrainer], settings: dict[str, Any]
) -> None:
    settings = {"max_steps": 6, **STEPS, **settings}
    straight = make_trainer(folder="straight", **settings)
    straight.train()

    interrupted = make_trainer(
        folder="resumed", callbacks=[StopAt(settings["max_steps"] - 1, crash)], **settings
    )
    with pytest.raises(OSError, match="went away"):
        interrupted.train()
    torch.manual_seed(12345)  # nothing may depend on the state that a new process happens to have
    resumed = make_trainer(folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=True)

    expected, found = adapters(straight), adapters(resumed)
    assert expected.keys() == found.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
    assert straight.handle is not None
    assert resumed.handle is not None
    assert torch.equal(straight.handle.shift.vectors, resumed.handle.shift.vectors)
    keys = ("step", "loss", "loss_generation", "loss_contrastive", "learning_rate")
    logs = [
        [{key: row[key] for key in keys} for row in each.state.log_history if "loss" in row]
        for each in (straight, resumed)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == settings["max_steps"]
    last = f"checkpoint-{settings['max_steps']}/language_vectors.safetensors"
    states = [load_file(Path(each.args.output_dir) / last) for each in (straight, resumed)]
    assert torch.equal(states[0]["vectors"], states[1]["vectors"])
    assert not torch.equal(
        states[0]["vectors"][0, 0], make_trainer(folder="x").handle.shift.vectors[0, 0].double()
    )  # type: ignore[union-attr]


def test_resume_says_what_is_trained_otherwise(
    make_trainer: Callable[..., ShifConTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(max_steps=2, w_mcl=2.0, **STEPS).train()
    make_trainer(max_steps=3, w_mcl=2.0, **STEPS).train(resume_from_checkpoint=True)
    assert not any("was trained with" in each for each in caplog.messages)
    make_trainer(max_steps=4, w_gen=3.0, **STEPS).train(resume_from_checkpoint=True)
    (said,) = (each for each in caplog.messages if "was trained with" in each)
    assert (
        "was trained with w_gen 1.0 (here 3.0), w_mcl 2.0 (here 0.2); the run goes on with those here" in said
    )


def test_resume_refuses_another_area(make_trainer: Callable[..., ShifConTrainer]) -> None:
    make_trainer(max_steps=2, **STEPS).train()
    other = make_trainer(max_steps=4, forward=2, backward=3, **STEPS)
    with pytest.raises(
        ValueError, match=r"shifcon\.json: area is .*'forward': 1.* here it is .*'forward': 2"
    ):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "broken", ["_save_optimizer_and_scheduler", "write_run_files", "_save_rng_state", "fsync", "rename"]
)
def test_failed_save_leaves_the_previous_checkpoint(
    make_trainer: Callable[..., ShifConTrainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    """A full disk at different points of the second save."""
    run = tmp_path / "run"
    trainer = make_trainer(max_steps=4, **STEPS)
    owner: Any = {"write_run_files": run_folder, "fsync": os, "rename": os}.get(broken, trainer)
    name = "replace" if broken == "rename" else broken
    original = getattr(owner, name)

    def fail_late(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 4 and (
            broken != "rename" or str(args[1]).startswith(str(run / "checkpoint-4"))
        ):
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_late)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2"]
    assert not list(run.glob(".*"))
    resumed = make_trainer(max_steps=4, **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert sf.load(run / "checkpoint-4").shifcon.forward == 1


KILLED = """
    import os, sys
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from shifcon_fast import LanguageSpace, ShifConArguments, ShifConTrainer, load_quantized
    from shifcon_fast.data import Instruction

    base, space, run = sys.argv[1:]
    model = load_quantized(base, LoraConfig(r=2, target_modules="all-linear"), "none")
    trainer = ShifConTrainer(
        model,
        ShifConArguments(
            output_dir=run, forward=1, backward=3, max_steps=4, save_steps=2, w_mcl=0.0, report_to="none",
            per_device_train_batch_size=1, use_cpu=True, disable_tqdm=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=[Instruction.single("en", "Ada lives in", "Rome")] * 4,
        space=LanguageSpace.load(space),
    )
    replace = os.replace

    def die(source, target):
        if str(target).endswith("checkpoint-4/shifcon.json") and ".saving" not in str(target):
            os.kill(os.getpid(), 9)
        replace(source, target)

    os.replace = die
    trainer.train()
"""


@pytest.mark.slow("waits for processes that are to be ended")
def test_kill_in_the_middle_of_a_save(tiny_checkpoint: Path, space: sf.LanguageSpace, tmp_path: Path) -> None:
    """At the worst moment: everything of the checkpoint is in place but its card."""
    space.save(tmp_path / "space")
    run = tmp_path / "run"
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), tiny_checkpoint, tmp_path / "space", run],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (run / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2"]
    with pytest.raises(ValueError, match=r"checkpoint-4: .*wanted a run folder with shifcon\.json"):
        sf.load(run / "checkpoint-4")
    assert sf.load(run / "checkpoint-2").shifcon.backward == 3


def test_a_resumed_run_goes_on_with_its_callbacks(
    make_trainer: Callable[..., ShifConTrainer], instructions: list[Instruction], tmp_path: Path
) -> None:
    """Early stopping counts evaluations without an improvement, over the end of a process."""
    settings: dict[str, Any] = {
        "max_steps": 6,
        "eval_dataset": instructions[:4],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "eval_loss",
        "load_best_model_at_end": True,
        "learning_rate": 0.0,  # so that nothing improves
    }
    trainer = make_trainer(callbacks=[EarlyStoppingCallback(9), StopAt(3, crash)], **settings)
    with pytest.raises(OSError, match="went away"):
        trainer.train()
    run = tmp_path / "run"
    saved = json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())
    counter = saved["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]
    assert counter == {"early_stopping_patience_counter": 2}  # the first evaluation is the best
    assert saved["best_model_checkpoint"] == str(run / "checkpoint-1")

    resumed = make_trainer(callbacks=[EarlyStoppingCallback(9)], **settings)
    resumed.train(resume_from_checkpoint=True)
    (callback,) = (
        each for each in resumed.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)
    )
    assert callback.early_stopping_patience_counter == 5
    assert resumed.state.best_model_checkpoint == str(run / "checkpoint-1")
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-1", "checkpoint-6"]  # best and last


def test_the_best_checkpoint_is_named_where_it_lies(
    make_trainer: Callable[..., ShifConTrainer], instructions: list[Instruction], tmp_path: Path
) -> None:
    """It is written elsewhere first; what its own state says must hold after the move."""
    make_trainer(
        max_steps=2,
        eval_dataset=instructions[:4],
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        **STEPS,
    ).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(checkpoint)
    assert not list((tmp_path / "run").rglob(".saving*"))


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in (2, 4, 10, 6):
        write_json_card(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-12").mkdir()  # killed before its card was there
    outside = tmp_path / "outside"
    write_json_card(outside)
    (tmp_path / "checkpoint-3").symlink_to(outside)
    assert [path.name for path in list_checkpoints(tmp_path)][-1] == "checkpoint-10"
    rotate(tmp_path, 2, keep=[tmp_path / "checkpoint-2", None])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    assert (outside / "shifcon.json").is_file()  # only the link went
    rotate(tmp_path, None, keep=[])
    assert len(list_checkpoints(tmp_path)) == 2


def write_json_card(folder: Path) -> None:
    folder.mkdir()
    (folder / "shifcon.json").write_text("{}")


def test_first_interrupt_saves_and_stops(make_trainer: Callable[..., ShifConTrainer], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt = StopAt(1, lambda: signal.raise_signal(signal.SIGINT))
    trainer = make_trainer(max_steps=6, callbacks=[interrupt])
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 2; saved as .*checkpoint-2"):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert not (
        tmp_path / "run" / "shifcon.json"
    ).exists()  # an unfinished run is not passed off as a finished one
    with pytest.raises(ValueError, match=r"did not finish; its last checkpoint is .*checkpoint-2"):
        sf.load(tmp_path / "run")
    straight = make_trainer(max_steps=6, folder="straight")
    straight.train()
    resumed = make_trainer(max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in adapters(straight).items():
        assert torch.equal(adapters(resumed)[name], parameter), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_without_a_step_left_finishes_the_run(
    make_trainer: Callable[..., ShifConTrainer], tmp_path: Path, number: int
) -> None:
    class TooLate(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            signal.raise_signal(number)

    trainer = make_trainer(max_steps=2, callbacks=[TooLate()])
    with pytest.raises(KeyboardInterrupt, match=r"the run was finished by then; saved as .*run"):
        trainer.train()
    assert sf.load(tmp_path / "run").shifcon.forward == 1


def test_sigterm_saves_and_stops_unless_somebody_else_handles_it(
    make_trainer: Callable[..., ShifConTrainer],
) -> None:
    """As torchrun and schedulers send it; and transformers' own way, which asks no other process, is not used."""
    term = StopAt(1, lambda: signal.raise_signal(signal.SIGTERM))
    trainer = make_trainer(max_steps=6, callbacks=[term], enable_jit_checkpoint=True)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 2; saved as .*checkpoint-2"):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        make_trainer(max_steps=2, callbacks=[term], folder="other").train()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


def test_second_interrupt_aborts_at_once(make_trainer: Callable[..., ShifConTrainer], tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer = make_trainer(max_steps=6, callbacks=[StopAt(1, twice)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert list_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("which", ["loss_generation", "loss_contrastive", "gradient norm"])
def test_what_is_not_finite_stops_the_run(
    make_trainer: Callable[..., ShifConTrainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, which: str
) -> None:
    trainer = make_trainer(max_steps=6, **STEPS)
    if which == "loss_generation":
        head = trainer.model.base_model.model.lm_head
        head.register_forward_hook(
            lambda module, args, out: out * float("nan") if trainer.state.global_step == 3 else out
        )
    elif which == "loss_contrastive":
        original = trainer._contrastive_loss
        monkeypatch.setattr(
            trainer,
            "_contrastive_loss",
            lambda *args: original(*args) * (float("inf") if trainer.state.global_step == 3 else 1),
        )
    else:
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda g: g * float("nan") if trainer.state.global_step == 3 else g)
    with pytest.raises(NonFiniteLossError, match=f"step 4.*{which} is (nan|inf)"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    weights = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
