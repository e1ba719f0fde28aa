"""A model's forward that computes its loss without its logits, for as long as it is asked to.

Three hooks do it, and the model's own forward runs between them, so that whatever is around it (PEFT, DDP, device
maps, a shift) stays: one takes the labels out of the arguments; one takes the hidden states at the LM head and lets
none of them through; one puts the loss into the output, inside of the model, where DDP looks for it.

What the model does to the logits behind its head is read from its config. The first batch tries whether that is
all: two positions of each row go through the model's own head too, and its logits are compared with ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from shifcon_fast.notices import warn_once
from shifcon_fast.training.losses.chunked_cross_entropy import Finish, HeadLoss, chunked_cross_entropy
from shifcon_fast.training.losses.language_losses import IGNORED, LanguageSums, TokenLosses
from shifcon_fast.training.losses.learnt_tokens import LearntTokens

_TRIED = 2  # positions of each row of the first batch


@dataclass
class Found:
    """What a forward found.

    Attributes:
        losses: by token, or in training maybe by language alone; None where no language was asked for.
        problem: why there is no loss, or None.
    """

    losses: TokenLosses | LanguageSums | None = None
    problem: str | None = None


def loss_without_logits(args: Any, model: Any, *, own_loss: str | None) -> LossWithoutLogits | None:
    """What computes the generation loss of a run without logits, as ``args.chunked_cross_entropy`` has it.

    Args:
        args: of the trainer.
        model: its model, PEFT's or a plain one.
        own_loss: an argument of the trainer that computes another loss from the logits, or None.

    Raises:
        ValueError: "on", and something needs the logits.
    """
    if args.chunked_cross_entropy == "off":
        return None
    liger = (args.liger_kernel_config or {}) if args.use_liger_kernel else {}
    problem = None
    if args.label_smoothing_factor:
        problem = "label_smoothing_factor needs the logits"
    elif own_loss is not None:
        problem = f"{own_loss} is given the logits"
    elif liger.get("fused_linear_cross_entropy"):
        problem = "liger_kernel_config asks for Liger's own (fused_linear_cross_entropy)"
    elif args.torch_compile or _is_compiled(model):
        problem = "torch.compile (torch_compile) has made one graph of the model and its own loss"
    elif args.n_gpu > 1:
        problem = "nn.DataParallel runs the model in several threads (accelerate launch does not)"
    else:
        try:
            return LossWithoutLogits(model.get_base_model() if hasattr(model, "get_base_model") else model)
        except ValueError as error:
            problem = str(error)
    say_why_with_logits(args, problem)
    return None


def _is_compiled(model: Any) -> bool:
    """Whether the model is compiled as a whole; blocks that are compiled each for itself do not matter."""
    wrapped = [model, getattr(model, "base_model", None)]
    if hasattr(model, "get_base_model"):
        wrapped.append(model.get_base_model())
    return any(
        isinstance(each, torch._dynamo.OptimizedModule)
        or getattr(each, "_compiled_call_impl", None) is not None
        for each in wrapped
    )


def say_why_with_logits(args: Any, problem: str) -> None:
    """Say once, or where ``chunked_cross_entropy`` is "on" refuse, that the model's own loss is used.

    Raises:
        ValueError: it is "on".
    """
    if args.chunked_cross_entropy == "on":
        raise ValueError(
            f"chunked_cross_entropy: got on, but {problem}; wanted auto, which uses the model's own loss"
        )
    warn_once(
        f"chunked_cross_entropy: the model's own loss is used, with all its logits: {problem}. "
        "chunked_cross_entropy=off says that this is meant."
    )


class LossWithoutLogits:
    """Has a causal language model compute its loss without its logits.

    Args:
        model: the Hugging Face model with the head, inside of PEFT's.

    Raises:
        ValueError: its loss is another one; the message says why.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        if model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has no LM head")
        if getattr(model, "loss_function", ForCausalLMLoss) is not ForCausalLMLoss:
            raise ValueError(f"{type(model).__name__} has a loss of its own")
        if getattr(config, "output_router_logits", False):
            raise ValueError("the model's config adds a loss of its experts (output_router_logits)")
        self._model = model
        self._finish = finish_of(config)
        self._tried = False

    @contextmanager
    def engaged(self, language_ids: Tensor | None, learnt: LearntTokens | None = None) -> Iterator[Found]:
        """Forward passes with labels inside give a loss and no logits; ``problem`` is set where they could not.

        Args:
            language_ids: (B,) or (B, T), -1 for no language, to sum the losses by; None wants none.
            learnt: the learnt tokens of the labels, with or without languages; None counts them here, which waits
                for the device.
        """
        forward = _Forward(self._finish, language_ids, learnt, tries=not self._tried)
        head = self._model.get_output_embeddings()
        with ExitStack() as hooks:
            forward.head, forward.hook = head, head.register_forward_pre_hook(forward.take_hidden)
            hooks.callback(forward.hook.remove)
            before = self._model.register_forward_pre_hook(forward.take_labels, with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(self._model.register_forward_hook(forward.put_loss).remove)
            yield forward.found
        self._tried = self._tried or forward.found.problem is None


class _Forward:
    """The hooks of one forward, and what they pass to each other."""

    def __init__(
        self, finish: Finish, language_ids: Tensor | None, learnt: LearntTokens | None, *, tries: bool
    ) -> None:
        self.found = Found(problem="the forward of the model did not run as a module")
        self.head: Any = None
        self.hook: Any = None
        self._finish, self._language_ids, self._tries = finish, language_ids, tries
        self._learnt = learnt
        self._labels: Tensor | None = None
        self._items: Any = None
        self._hidden: Tensor | None = None

    def take_labels(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("labels") is None or kwargs.get("shift_labels") is not None:
            self.hook.remove()
            self.found.problem = "the labels are shifted already, or there are none"
            return None
        kwargs = dict(kwargs)
        self._labels = kwargs.pop("labels")
        self._items = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("skip_logits", None)  # Liger's argument
        return args, kwargs

    def take_hidden(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        self.hook.remove()  # the loss calls the head again
        (self._hidden, *rest) = args
        if self._tries:
            return _last(self._hidden, _TRIED), *rest
        # Quantised heads may not take what is empty.
        return self._hidden[:, :0] if type(head) is nn.Linear else _last(self._hidden, 1), *rest

    def put_loss(self, model: nn.Module, args: Any, output: Any) -> Any:
        labels, hidden = self._labels, self._hidden
        if labels is None:
            return None
        problem = self._problem(hidden, labels, output)
        self.found.problem = problem
        if problem is None and hidden is not None:
            output["loss"] = self._loss(
                hidden[:, -labels.shape[1] : -1], labels
            )  # virtual tokens are in front
        elif isinstance(output, dict):
            output["loss"] = torch.full((), torch.nan, device=labels.device)  # of a forward that is run again
        return output

    def _problem(self, hidden: Tensor | None, labels: Tensor, output: Any) -> str | None:
        if hidden is None or not isinstance(output, dict) or output.get("logits") is None:
            return "the model does not call its LM head, or gives no logits"
        if hidden.dim() != 3 or hidden.shape[1] < labels.shape[1]:
            return f"the LM head gets {tuple(hidden.shape)} for labels {tuple(labels.shape)}"
        if self._tries and not self._has_logits_like_ours(hidden, output["logits"]):
            return "the model's logits are not those of its head, as far as its config says"
        return None

    def _has_logits_like_ours(self, hidden: Tensor, logits: Tensor) -> bool:
        with torch.no_grad():
            ours = self._finish(self.head(_last(hidden, _TRIED))).float()
            theirs = logits.float()
            tolerance = 4 * torch.finfo(hidden.dtype).eps * theirs.abs().max()
            return bool(ours.shape == theirs.shape and ((ours - theirs).abs() <= tolerance).all())

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        learnt = self._learnt or LearntTokens.of(labels, self._language_ids)
        places = learnt.places.to(hidden.device)
        languages = learnt.languages if self._language_ids is not None else None
        targets = labels[:, 1:].flatten().to(hidden.device)[places]
        rows = hidden.flatten(0, 1)[places]
        loss = chunked_cross_entropy(self.head, rows, targets, languages, self._finish)
        if self._language_ids is not None:
            self.found.losses = _by_language(loss, places, labels)
        items = len(places) if self._items is None else self._items
        return loss.total / (items.to(hidden.device) if isinstance(items, Tensor) else items)


def _last(hidden: Tensor, count: int) -> Tensor:
    """The last positions, contiguous: of others a CPU copies the matrix of the head once a row.

    See :mod:`shifcon_fast.modeling.contiguous_head`.
    """
    return hidden[:, -count:].contiguous()


def _by_language(loss: HeadLoss, places: Tensor, labels: Tensor) -> TokenLosses | LanguageSums:
    if loss.nll is None:
        assert loss.groups is not None
        assert loss.sums is not None
        assert loss.counts is not None
        return LanguageSums(loss.groups, loss.sums, loss.counts)
    targets = labels[:, 1:].to(places.device)
    nll = torch.zeros(targets.numel(), dtype=torch.float32, device=places.device)
    nll = nll.index_copy(0, places, loss.nll.float())
    return TokenLosses(nll.view(targets.shape), targets != IGNORED)


def finish_of(config: Any) -> Finish:
    """What a model of this config does to its head's output; which fields say so is as in TRL 1.16's fused head."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None:
            scale = float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Finish(scale, None if softcap is None else float(softcap))
