"""One of two processes that train together on the CPU: python worker.py CHECKPOINT FOLDER [zero2] [zero3] [aborts0]

What test_processes.py looks at is written into FOLDER. Everything is in one process, since starting one takes
longer than all that it does: DDP, then FSDP2, then what is refused, and at the end one process is killed. Or else
what needs processes of its own: DeepSpeed, and process 0 or 1 that is aborted in the middle of a save.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from accelerate.utils import memory
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, TrainerCallback

import shifcon_fast as sf
from shifcon_fast.objective.mcl import mcl_loss

CHECKPOINT, FOLDER = sys.argv[1], Path(sys.argv[2])
SETTINGS = json.loads((FOLDER / "settings.json").read_text())
TOKENIZER = AutoTokenizer.from_pretrained(CHECKPOINT)


class Recorder(TrainerCallback):
    """The gradients of the first optimizer step, whole; and what of the weights this process holds."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.held = 0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.gradients:
            return
        model = model.module if hasattr(model, "module") else model
        for name, parameter in model.named_parameters():
            self.held += local(parameter).numel()
            if parameter.grad is not None:
                self.gradients[name] = whole(parameter.grad).clone()


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load(quantization: str = "none", **settings: Any) -> Any:
    torch.manual_seed(11)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return sf.load_quantized(CHECKPOINT, lora, quantization, **settings)


def make(
    name: str, model: Any = None, callbacks: Any = (), train_dataset: Any = None, **settings: Any
) -> sf.ShifConTrainer:
    return sf.ShifConTrainer(
        model or load(),
        sf.ShifConArguments(output_dir=str(FOLDER / name), **{**copy.deepcopy(SETTINGS), **settings}),
        processing_class=TOKENIZER,
        train_dataset=train_dataset or str(FOLDER / "rows.jsonl"),
        eval_dataset=str(FOLDER / "few.jsonl"),
        parallel=str(FOLDER / "pairs.jsonl"),
        space=sf.LanguageSpace.load(FOLDER / "space"),
        callbacks=list(callbacks),
    )


def write(name: str, found: Any) -> None:
    if dist.get_rank() == 0:
        (FOLDER / f"{name}.json").write_text(json.dumps(found))


def train(name: str, **settings: Any) -> None:
    """A run with an evaluation, and what a second one goes on with from the first one's checkpoint."""
    recorder = Recorder()
    models = [load(), load()]  # before the arguments, which have transformers load for ZeRO-3
    trainer = make(name, models[0], [recorder], **settings)
    trainer.train()
    metrics = trainer.evaluate()
    resumed = make(f"{name}-resumed", models[1], **settings)
    resumed.train(resume_from_checkpoint=str(FOLDER / name / "checkpoint-1"))
    log = trainer.state.log_history
    write(
        name,
        {
            "log": log,
            "evaluation": metrics,
            "processes": trainer.args.world_size,
            "held": recorder.held,
            "model": type(trainer.model_wrapped).__name__,
            "resumed": resumed.state.log_history[1],
        },
    )
    if dist.get_rank() == 0 and recorder.gradients:  # DeepSpeed keeps them to itself
        save_file({key: each.contiguous() for key, each in recorder.gradients.items()}, FOLDER / f"{name}.st")


def learnt_alpha() -> None:
    """A step that learns alpha: rows of a language may be with one process alone."""
    recorder = Recorder()
    trainer = make("alpha", callbacks=[recorder], learn_alpha=True, max_steps=1)
    trainer.train()
    assert trainer.handle is not None
    (found,) = (each for name, each in recorder.gradients.items() if "alphas" in name)
    write("alpha", {"gradient": found.tolist(), "alphas": trainer.handle.shift.alphas_by_language})


def unequal_numbers_of_pairs() -> None:
    """Five pairs of one process and two of the other, contrasted with each other."""
    model = load()
    handle = sf.attach(model, sf.LanguageSpace.load(FOLDER / "space"), 1, 3)
    trainer = make("unequal", max_steps=1)
    assert trainer._sampler is not None
    sampler = trainer._sampler
    sampler._batch_size, sampler._processes = 7, 1
    everything = sampler.batch(0)
    mine = slice(0, 5) if dist.get_rank() == 0 else slice(5, 7)
    batch = {key: torch.cat([half[mine] for half in each.chunk(2)]) for key, each in everything.items()}
    gradients = []
    for part, settings in (
        (batch, {"gather_across_devices": True, "mini_batch_size": 3}),
        (everything, {}),
    ):
        model.zero_grad()
        loss = mcl_loss(model, part, handle, **settings)
        loss.backward()
        gradients.append(
            {"loss": loss.detach()}
            | {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
        )
    for each in gradients[0].values():
        dist.all_reduce(each)
        each /= 2
    apart = max(
        float((gradients[0][key] - each).abs().max() / each.abs().max()) for key, each in gradients[1].items()
    )
    none = {key: each[:0] for key, each in batch.items()} if dist.get_rank() else batch
    found = {"apart": apart, "gradients": len(gradients[0])}
    for name, part, settings in (
        ("none", none, {}),
        ("too_few", batch, {"mini_batch_size": 1}),
    ):
        try:
            mcl_loss(model, part, handle, gather_across_devices=True, **settings)
        except ValueError as error:
            found[name] = str(error)
    (FOLDER / f"unequal-{dist.get_rank()}.json").write_text(json.dumps(found))


def refusals() -> None:
    found = {}
    cases = {
        "cut": ({"transformer_layer_cls_to_wrap": ["LlamaMLP"]}, {}),
        "larger": ({"auto_wrap_policy": "NO_WRAP"}, {}),
        "version": ({"version": 1}, {}),
        "checkpointing": ({"activation_checkpointing": True}, {}),
        "ram": ({"cpu_ram_efficient_loading": True}, {}),
        "bytes": ({}, {"quantization": "nf4", "quant_storage": torch.uint8}),
        "alpha": ({}, {}),
        "distillation": ({}, {}),
    }
    asked: dict[str, dict[str, Any]] = {
        "alpha": {"learn_alpha": True},
        "distillation": {"w_distillation": 1.0},
    }
    for name, (fsdp, model) in cases.items():
        try:
            make(name, load(**model), fsdp=True, fsdp_config=fsdp, **asked.get(name, {})).train()
        except ValueError as error:
            found[name] = str(error)
    write("refused", found)


def short_stream() -> None:
    """Three rows for four places a step, two of each process: they begin again, and no process waits for rows."""
    rows = [json.loads(line) for line in (FOLDER / "rows.jsonl").read_text().splitlines()[:3]]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = make(
        "stream",
        train_dataset=stream,
        per_device_train_batch_size=2,
        save_strategy="no",
        train_sampling_strategy="random",
    )
    trainer.train()
    found = [row["loss_generation"] for row in trainer.state.log_history if "loss" in row]
    (FOLDER / f"stream-{dist.get_rank()}.json").write_text(json.dumps(found))


class Signalled(TrainerCallback):
    """One process gets signals at some moment of a run: a method of callbacks, at a step."""

    def __init__(self, number: int, moment: str, step: int, times: int = 1) -> None:
        def send(args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if dist.get_rank() == 1 and state.global_step == step:
                for _ in range(times):
                    signal.raise_signal(number)

        setattr(self, moment, send)


def interrupted() -> None:
    """Whatever process is asked to stop; when there is a step left, and when there is none."""
    for name, callback in (
        ("term", Signalled(signal.SIGTERM, "on_step_begin", 1)),
        ("late", Signalled(signal.SIGINT, "on_train_end", 2)),
    ):
        steps = {"term": 5, "late": 2}[name]
        trainer = make(name, callbacks=[callback], max_steps=steps, save_strategy="no")
        error = None
        try:
            trainer.train()
        except KeyboardInterrupt as stopped:
            error = str(stopped)
        found = {"error": error, "step": trainer.state.global_step}
        (FOLDER / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(found))


class Dies(TrainerCallback):
    """One process is killed in the middle of a run, and cannot say so."""

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed() -> None:
    trainer = make("killed", callbacks=[Dies()], gradient_accumulation_steps=2, fsdp=True)
    start = time.monotonic()
    try:
        trainer.train()
    except Exception as error:
        write("killed", {"seconds": time.monotonic() - start, "error": f"{type(error).__name__}: {error}"})
        raise


def aborted(rank: int) -> None:
    """Ctrl-C twice in one process, in the middle of the second save."""
    trainer = make("aborted")
    original = trainer._save_rng_state

    def interrupt(folder: str) -> None:
        original(folder)
        if trainer.state.global_step == 2 and dist.get_rank() == rank:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

    trainer._save_rng_state = interrupt
    trainer.train()


def deepspeed(stage: int) -> None:
    zero = {
        # Parameters as small as these would otherwise stay whole.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    train(f"zero{stage}", deepspeed=zero, use_cpu=False)


def tell_accelerate_of_gloo() -> None:
    """With DeepSpeed it takes each process on the CPU for the only one, which the trainer refuses."""
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


if __name__ == "__main__":
    memory.clear_device_cache = lambda garbage_collection=False: None  # half a second of every training
    stages = [int(argument.removeprefix("zero")) for argument in sys.argv[3:] if argument.startswith("zero")]
    if sys.argv[3:] and not stages:
        aborted(int(sys.argv[3].removeprefix("aborts")))
    elif stages:
        tell_accelerate_of_gloo()
        for stage in stages:
            deepspeed(stage)
    else:
        train("ddp")
        learnt_alpha()
        unequal_numbers_of_pairs()
        short_stream()
        interrupted()
        train("fsdp", fsdp=True)
        refusals()
        killed()
