"""What a training step of a model will take, before there is one: peak memory, and where the time goes.

The sizes of the weights are those of the model's config, counted on the meta device. What a step does with them is
measured on this machine with a sample of the model: its embedding and head, and a few of its blocks, with random
weights. Blocks cost alike, so that

    seconds = t_generation · L / n + t_head + t_contrastive · (b - 1) / m + t_optimizer · L / n
    bytes   = weights + adapters + max(kept + head, kept + block, kept_contrastive + block_contrastive)

where n blocks of L were sampled, m of them in the contrastive pass, whose whole has b - 1; *kept* is what the
forward passes leave for the backward pass, *head* and *block* are what is there for a moment beside it. Adapters
count four times: values, gradients and AdamW's two moments.
"""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from shifcon_fast.modeling.architectures import locate_decoder
from shifcon_fast.modeling.attach import attach
from shifcon_fast.objective.mcl import ContrastiveBatch, mcl_loss
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.losses.chunked_cross_entropy import chunked_cross_entropy
from shifcon_fast.training.losses.loss_without_logits import finish_of
from shifcon_fast.training.weights.checkpointing import enable_gradient_checkpointing
from shifcon_fast.training.weights.nf4_linear import BLOCK, quantise_blocks
from shifcon_fast.training.weights.quantization import (
    Quantization,
    choose_dtype,
    read_config,
)

_BLOCKS = 5
"""Blocks of the sample; its contrastive pass ends at boundary b = 4 and runs three of them."""

_clock = time.perf_counter
_FORWARD_ENDS = "shifcon_fast: the forward pass ends"
_NESTED = 256  # NF4 scales that share a scale of their own


@dataclass(frozen=True)
class StepShape:
    """One micro-batch.

    Attributes:
        batch, length: instructions and their tokens.
        learnt: share of those tokens that is learnt.
        contrastive_batch: translation pairs; 0 for a run without them.
        length_pivot, length_other: their tokens.
        lora_r: rank of the adapters, on every linear layer of the blocks.
        gradient_checkpointing: whether the blocks are run again in the backward pass.
    """

    batch: int = 4
    length: int = 128
    learnt: float = 0.5
    contrastive_batch: int = 8
    length_pivot: int = 48
    length_other: int = 96
    lora_r: int = 16
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("length", 2), ("contrastive_batch", 0), ("lora_r", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; wanted {least} or more")
        for name in ("length_pivot", "length_other"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: got {getattr(self, name)}; wanted 2 or more")
        if not 0 < self.learnt <= 1:
            raise ValueError(f"learnt: got {self.learnt}; wanted a share, 0 < learnt <= 1")
        if self.contrastive_batch == 1:
            raise ValueError("contrastive_batch: got 1; wanted 2 or more, or 0 for none")


@dataclass(frozen=True)
class StepPlan:
    """What a step will take. Seconds by part, bytes by part; ``peak`` is less than their sum.

    Attributes:
        seconds: "generation" (forward and backward of the blocks), "head and loss", "contrastive", "optimizer".
        bytes: "weights", "adapters" (with gradients and moments), "generation", "head and loss", "contrastive".
        peak: bytes of all tensors at the worst moment. The process itself (Python, libraries) comes on top.
        shape, area, quantization, dtype, device: what was asked about.
    """

    seconds: dict[str, float]
    bytes: dict[str, int]
    peak: int
    shape: StepShape
    area: tuple[int, int]
    quantization: str
    dtype: str
    device: str
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "step": self.step}


def plan_step(
    model: str | Path | Any,
    shape: StepShape = StepShape(),
    *,
    quantization: Quantization = "nf4",
    dtype: torch.dtype | None = None,
    area: tuple[int, int] | None = None,
    trust_remote_code: bool = False,
) -> StepPlan:
    """Predict a step's time and memory on this machine.

    Args:
        model: a Hugging Face id or folder, of which only the config is read; or a config.
        shape: the batch.
        quantization, dtype, trust_remote_code: as for ``load_quantized``.
        area: (f, b); None takes a third and two thirds of the blocks.

    Raises:
        ValueError: no such model, or an area that it does not have.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = read_config(model, trust_remote_code) if isinstance(model, (str, Path)) else model
    dtype = dtype or choose_dtype(device, config.dtype, quantization)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    decoder = locate_decoder(whole)
    blocks = decoder.num_boundaries
    area = area or (max(1, blocks // 3), max(2, 2 * blocks // 3))
    if not 0 <= area[0] < area[1] < blocks:
        raise ValueError(f"forward, backward: got {area}; wanted 0 <= forward < backward < {blocks}")
    weights, adapters = _sizes(whole, decoder.blocks, quantization, dtype, shape.lora_r)
    del whole
    count = min(_BLOCKS, blocks)
    settings: dict[str, Any] = {"quantization": quantization, "dtype": dtype}
    sample = _Sample(config, count, shape, device, trust_remote_code=trust_remote_code, **settings)
    share = blocks / count
    generation = sample.measure(sample.generation)
    head = sample.measure(sample.head)
    contrastive, run = _NOTHING, 0.0
    if shape.contrastive_batch and area[1] > 1:
        contrastive = sample.measure(sample.contrastive)
        run = (area[1] - 1) / (sample.backward - 1)
    optimizer = sample.seconds_of_optimizer()
    kept = round(generation.kept * share)
    kept_contrastive = round(contrastive.kept * run)
    # The contrastive loss goes through backward before the generation pass begins (objective/early_gradient).
    working = max(
        kept + head.kept + max(head.moment, generation.moment), kept_contrastive + contrastive.moment
    )
    return StepPlan(
        seconds={
            "generation": generation.seconds * share,
            "head and loss": head.seconds,
            "contrastive": contrastive.seconds * run,
            "optimizer": optimizer * share,
        },
        bytes={
            "weights": weights,
            "adapters": adapters,
            "generation": kept + generation.moment,
            "head and loss": head.kept + head.moment,
            "contrastive": kept_contrastive + contrastive.moment,
        },
        peak=weights + adapters + working,
        shape=shape,
        area=area,
        quantization=quantization,
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    )


def _sizes(
    model: nn.Module, blocks: nn.Module, quantization: str, dtype: torch.dtype, rank: int
) -> tuple[int, int]:
    """Bytes of a model's weights, and of adapters on its blocks with their gradients and moments."""
    packed: dict[int, int] = {}
    adapters = 0
    for linear in blocks.modules():
        if isinstance(linear, (nn.Linear, Conv1D)):
            adapters += 4 * 4 * rank * sum(linear.weight.shape)
            quantised = quantization == "nf4" and isinstance(linear, nn.Linear)
            if quantised and linear.in_features % BLOCK == 0:
                numbers = linear.weight.numel()
                scales = -(-numbers // BLOCK)
                packed[id(linear.weight)] = numbers // 2 + scales + 4 * -(-scales // _NESTED)
    plain = {id(each): each.numel() * dtype.itemsize for each in model.parameters()}
    return sum({**plain, **packed}.values()), adapters


@dataclass(frozen=True)
class _Measured:
    """Seconds; bytes that the forward pass leaves; bytes that are there beside them for a moment."""

    seconds: float
    kept: int
    moment: int


_NOTHING = _Measured(0.0, 0, 0)


class _Sample:
    """A few blocks of a model, with its embedding and head, attached and with adapters."""

    def __init__(
        self,
        config: Any,
        count: int,
        shape: StepShape,
        device: torch.device,
        *,
        quantization: str,
        dtype: torch.dtype,
        trust_remote_code: bool,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self._shape, self._device = shape, device
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                _shortened(config, count), dtype=dtype, trust_remote_code=trust_remote_code
            )
        if quantization == "nf4":
            quantise_blocks(locate_decoder(model).blocks)
            model.is_loaded_in_4bit = True  # what tells PEFT to put its 4-bit LoRA layers there
        model.requires_grad_(False)
        if shape.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        lora = LoraConfig(r=shape.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, lora).train()
        self._decoder = locate_decoder(self.model)
        self._finish = finish_of(model.config.get_text_config())
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self.backward = max(2, count - 1)
        self._handle = attach(self.model, _space(self._decoder), self.backward - 1, self.backward)

    def generation(self) -> Callable[[], Tensor]:
        """The blocks on the instructions."""
        shape = self._shape
        tokens = self._tokens(shape.batch, shape.length)
        ids = torch.ones(shape.batch, dtype=torch.long, device=self._device)

        def forward() -> Tensor:
            out = self._decoder.module(input_ids=tokens, language_ids=ids, use_cache=False)
            return out.last_hidden_state.float().mean()

        return forward

    def head(self) -> Callable[[], Tensor]:
        """The head and the loss of the learnt tokens."""
        shape = self._shape
        learnt = max(1, round(shape.learnt * shape.batch * (shape.length - 1)))
        head = self.model.get_base_model().get_output_embeddings()
        dtype = self.model.get_base_model().get_input_embeddings().weight.dtype
        hidden = torch.randn(
            learnt, self._decoder.hidden_size, device=self._device, dtype=dtype
        ).requires_grad_()
        targets = self._tokens(learnt)
        languages = torch.arange(learnt, device=self._device) * min(shape.batch, 4) // learnt

        def forward() -> Tensor:
            return chunked_cross_entropy(head, hidden, targets, languages, self._finish).total / learnt

        return forward

    def contrastive(self) -> Callable[[], Tensor]:
        """The contrastive pass over the pairs, through blocks 0 … b-2."""
        shape = self._shape
        pairs, longest = shape.contrastive_batch, max(shape.length_pivot, shape.length_other)
        lengths = torch.tensor([shape.length_pivot] * pairs + [shape.length_other] * pairs)
        mask = (torch.arange(longest) < lengths[:, None]).long().to(self._device)
        languages = torch.tensor([0] * pairs + [1] * pairs, device=self._device)
        batch: ContrastiveBatch = {
            "input_ids": self._tokens(2 * pairs, longest) * mask,
            "attention_mask": mask,
            "pool_mask": mask.bool(),
            "language_ids": languages,
        }
        return lambda: mcl_loss(self.model, batch, self._handle)

    def measure(self, part: Callable[[], Callable[[], Tensor]]) -> _Measured:
        """The median of three forward and backward passes; the memory of another.

        The fastest would be too fast on a busy machine: a whole step takes many times as long as one of these, and
        meets neighbours that one of three of these may miss.
        """
        forward = part()
        forward().backward()
        seconds = []
        for _ in range(3):
            start = self._now()
            forward().backward()
            seconds.append(self._now() - start)
        kept, peak = _bytes_of(forward, self._device)
        return _Measured(median(seconds), kept, peak - kept)

    def seconds_of_optimizer(self) -> float:
        """Of AdamW on the sample's adapters, all of which have gradients by now."""
        trained = [each for each in self.model.parameters() if each.grad is not None]
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        seconds = []
        for _ in range(4):
            start = self._now()
            optimizer.step()
            seconds.append(self._now() - start)
        return median(seconds[1:])  # the first makes the moments

    def _tokens(self, *shape: int) -> Tensor:
        return torch.randint(3, self._vocabulary, shape).to(self._device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return _clock()


def _shortened(config: Any, count: int) -> Any:
    """The config of a model with as many blocks, the first kinds of them."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return config


def _space(decoder: Any) -> LanguageSpace:
    shape = (decoder.num_boundaries, 2, decoder.hidden_size)
    return LanguageSpace(
        languages=("en", "sw"),
        pivot="en",
        mean=0.02 * torch.randn(shape),
        counts={"en": 2, "sw": 2},
        rms=torch.ones(shape[0]),
        median_norm=torch.ones(shape[:2]),
        sink_share=torch.zeros(shape[:2]),
    )


def _bytes_of(forward: Callable[[], Tensor], device: torch.device) -> tuple[int, int]:
    """(what tensors take after a forward pass, the most that they take until its backward pass is over)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = forward()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return kept, torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes its own start and end to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss = forward()
        with record_function(_FORWARD_ENDS):
            pass
        loss.backward()
    events = record.profiler.kineto_results.events()
    end = next(each.start_ns() for each in events if each.name() == _FORWARD_ENDS)
    total = kept = peak = 0
    for when, change in sorted(
        (each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"
    ):
        total += change
        peak = max(peak, total)
        kept = total if when <= end else kept
    return kept, peak
