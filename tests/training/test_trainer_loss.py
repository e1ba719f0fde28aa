"""The training loss and its gradients, against a naive float64 walk through sentences and hidden states."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, TrainerCallback

from shifcon_fast.data.instructions import Instruction
from shifcon_fast.modeling.attach import attach
from shifcon_fast.space.language_shift import LanguageShift
from shifcon_fast.space.language_space import LanguageSpace
from shifcon_fast.training.run.run_card import read_card
from shifcon_fast.training.trainer import ShifConTrainer

F, B = 1, 3


class Recorder(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def walk(model: Any, ids: Tensor, shifts: dict[int, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Hidden states (T, d) at every boundary, after the shift added there, and the logits (T, vocabulary)."""
    decoder = model.base_model.model.model
    h = decoder.embed_tokens(ids[None])
    position = torch.arange(len(ids))[None]
    rotary = decoder.rotary_emb(h, position)
    seen = []
    for k, block in enumerate(decoder.layers):
        if k in shifts:
            h = h + shifts[k]
        seen.append(h[0])
        h = block(h, position_embeddings=rotary, position_ids=position, attention_mask=None)
    return seen, model.base_model.model.lm_head(decoder.norm(h))[0]


def shifts_of(shift: LanguageShift, language: str, earlier: int) -> dict[int, Tensor]:
    at_f, at_b = shift.vectors.double()
    language_id = shift.languages.index(language)
    return {
        F - earlier: at_f[0] - at_f[language_id],
        B - earlier: at_b[language_id] - at_b[0],
    }


def naive_total(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    language_shift: LanguageShift,
    instructions: list[Instruction],
    pairs: list[list[tuple[str, str, str]]],
    *,
    mode: str,
    temperature: float,
    shift: bool,
    official: bool,
    standardise: bool,
) -> tuple[Tensor, Tensor]:
    """(L_gen, L_mcl) of one optimizer step: all its instructions, and its contrastive batches of
    (pivot sentence, other sentence, language)."""
    earlier = 1 if official else 0
    losses = []
    for instruction in instructions:
        prompt, response = (turn.content for turn in instruction.turns)
        prompt_ids = tokenizer(prompt + "\n").input_ids
        response_ids = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor(prompt_ids + response_ids)
        _, logits = walk(
            model, ids, shifts_of(language_shift, instruction.language, earlier) if shift else {}
        )
        for position in range(len(prompt_ids), len(ids)):
            losses.append(functional.cross_entropy(logits[position - 1], ids[position]))
    generation = torch.stack(losses).mean()

    contrastive = []
    for batch in pairs:
        represented: dict[str, list[Tensor]] = {"pivot": [], "other": []}
        for pivot_text, other_text, language in batch:
            for side, text, code in (("pivot", pivot_text, "en"), ("other", other_text, language)):
                ids = torch.tensor(tokenizer(text).input_ids)
                shifts = shifts_of(language_shift, code, earlier) if mode == "shifted" else {}
                seen, _ = walk(model, ids, shifts)
                first = 0 if official else 1  # BOS
                represented[side].append(torch.stack([seen[k][first:].mean(0) for k in range(F, B)]))
        for k in range(B - F):
            a, t = (torch.stack([r[k] for r in represented[side]]) for side in ("pivot", "other"))
            if standardise:
                a, t = a - a.mean(0), t - t.mean(0)
                variance = torch.cat([a, t]).var(0, correction=0)
                deviation = (variance + 1e-6 * variance.mean()).sqrt()
                a, t = a / deviation, t / deviation
            a, t = functional.normalize(a, dim=-1), functional.normalize(t, dim=-1)
            if mode == "pooled":
                t = t - t.mean(0) + a.mean(0)
            logits = a @ t.T / temperature
            target = torch.arange(len(a))
            contrastive.append(
                (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
            )
    return generation, torch.stack(contrastive).mean()


@pytest.mark.parametrize(
    ("recipe", "mode", "shift", "standardise"),
    [
        ("stable", "shifted", True, False),
        ("stable", "shifted", True, True),
        ("stable", "pooled", False, False),
        ("official", "pooled", True, False),
        ("official", "shifted", True, False),
    ],
)
def test_total_loss_and_gradients_over_accumulated_mixed_batches(
    *,
    make_trainer: Callable[..., ShifConTrainer],
    instructions: list[Instruction],
    word_tokenizer: PreTrainedTokenizerFast,
    parallel_text: dict[str, list[str]],
    recipe: str,
    mode: str,
    shift: bool,
    standardise: bool,
) -> None:
    recorder = Recorder()
    rows = (
        instructions[:4] + instructions[9:11]
    )  # several languages and lengths; 4 + 2 rows in two micro-batches
    trainer = make_trainer(
        recipe=recipe,
        mcl_mode=mode,
        shift=shift,
        standardise_contrast=standardise,
        temperature=0.2,
        w_gen=0.7,
        w_mcl=1.3,
        train_dataset=rows,
        max_steps=1,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        vectors="frozen",
        final_estimation=False,
        callbacks=[recorder],
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    log = trainer.state.log_history[0]

    assert trainer.handle is not None
    space = trainer.handle.shift
    model = trainer.model
    trainer.handle.detach()
    model.load_state_dict(start)
    model.zero_grad()
    model.double().eval()
    assert trainer._sampler is not None
    pairs = [
        [
            (parallel_text["en"][row], parallel_text[code][row], code)
            for row, code in trainer._sampler.pairs(0, micro)
        ]
        for micro in range(2)
    ]
    generation, contrastive = naive_total(
        model,
        word_tokenizer,
        space,
        rows,
        pairs,
        mode=mode,
        temperature=0.2,
        shift=shift,
        official=recipe == "official",
        standardise=standardise,
    )
    total = 0.7 * generation + 1.3 * contrastive
    total.backward()
    assert log["loss_generation"] == pytest.approx(generation.item(), rel=1e-5)
    assert log["loss_contrastive"] == pytest.approx(contrastive.item(), rel=1e-5)
    assert log["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert recorder.gradients
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                recorder.gradients[name].double(), parameter.grad, rtol=1e-3, atol=1e-5, msg=name
            )


def test_contrastive_mini_batches_change_nothing(make_trainer: Callable[..., ShifConTrainer]) -> None:
    """On 4-bit weights, with checkpointed blocks, accumulated."""
    found = []
    for size in (None, 3):
        recorder = Recorder()
        trainer = make_trainer(
            folder=f"mini-batches-of-{size}",
            quantization="nf4",
            contrastive_batch_size=8,
            contrastive_mini_batch_size=size,
            standardise_contrast=True,  # over all pairs, whatever the passes
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            max_grad_norm=0.0,
            max_steps=1,
            final_estimation=False,
            callbacks=[recorder],
        )
        trainer.train()
        log = trainer.state.log_history[0]
        losses = {name: torch.tensor(log[name]) for name in ("loss", "loss_generation", "loss_contrastive")}
        found.append({**losses, **recorder.gradients})
    assert len(found[0]) > 20
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_padding_side_of_the_tokenizer_does_not_matter(
    make_trainer: Callable[..., ShifConTrainer], word_tokenizer: PreTrainedTokenizerFast
) -> None:
    losses = []
    tokenizer = copy.deepcopy(word_tokenizer)
    for side in ("right", "left"):
        tokenizer.padding_side = side
        trainer = make_trainer(max_steps=1, processing_class=tokenizer)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


def test_plain_run_has_one_pass_and_no_shift(
    make_trainer: Callable[..., ShifConTrainer], instructions: list[Instruction]
) -> None:
    plain = make_trainer(
        shift=False, w_mcl=0.0, w_gen=1.0, space=None, parallel=None, forward=None, backward=None
    )
    assert plain.handle is None
    plain.train()
    log = plain.state.log_history[0]
    assert "loss_contrastive" not in log
    assert log["loss"] == pytest.approx(log["loss_generation"], rel=1e-6)
    unshifted = make_trainer(shift=False, w_mcl=0.0, w_gen=1.0, folder="with-space")
    unshifted.train()
    # The same function, through the operators' norms.
    assert unshifted.state.log_history[0]["loss"] == pytest.approx(log["loss"], rel=1e-5)
    shifted = make_trainer(shift=True, w_mcl=0.0, w_gen=1.0, folder="shifted")
    shifted.train()
    assert abs(shifted.state.log_history[0]["loss"] - log["loss"]) > 1e-3


def test_contrastive_pass_leaves_upper_blocks_and_head_alone(
    make_trainer: Callable[..., ShifConTrainer],
) -> None:
    trainer = make_trainer(max_steps=1, final_estimation=False, chunked_cross_entropy="off")
    causal = trainer.model.base_model.model
    runs = dict.fromkeys(["block 0", "block 1", "block 2", "block 3", "head"], 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    trainer.model.base_model.model.model.gradient_checkpointing = False
    for block in causal.model.layers:
        block.gradient_checkpointing = False
    for index, block in enumerate(causal.model.layers):
        block.register_forward_hook(count(f"block {index}"))
    causal.lm_head.register_forward_hook(count("head"))
    trainer.train()
    # Generation runs everything once; the contrastive pass ends with boundary b-1 = 2, the output of block 1.
    assert runs == {"block 0": 2, "block 1": 2, "block 2": 1, "block 3": 1, "head": 1}


def test_evaluation_is_the_shifted_generation_loss(
    make_trainer: Callable[..., ShifConTrainer],
    instructions: list[Instruction],
    word_tokenizer: PreTrainedTokenizerFast,
    parallel_text: dict[str, list[str]],
) -> None:
    trainer = make_trainer(eval_dataset=instructions[:6], per_device_eval_batch_size=6)
    metrics = trainer.evaluate()
    assert trainer.handle is not None
    space, model = trainer.handle.shift, trainer.model
    trainer.handle.detach()
    pairs = [[(parallel_text["en"][row], parallel_text["de"][row], "de") for row in range(2)]]
    generation, _ = naive_total(
        model.double(),
        word_tokenizer,
        space,
        instructions[:6],
        pairs,
        mode="pooled",
        temperature=1.0,
        shift=True,
        official=False,
        standardise=False,
    )
    assert metrics["eval_loss"] == pytest.approx(generation.item(), rel=1e-5)


def test_missing_inputs_are_named(make_trainer: Callable[..., ShifConTrainer]) -> None:
    with pytest.raises(ValueError, match="space: none given"):
        make_trainer(space=None)
    with pytest.raises(ValueError, match=r"parallel: none given; wanted translations, for w_mcl is 0\.2"):
        make_trainer(parallel=None)
    with pytest.raises(ValueError, match="parallel: none given; vectors='refresh'"):
        make_trainer(parallel=None, w_mcl=0.0, vectors="refresh")
    with pytest.raises(
        ValueError, match="parallel: none given; final_estimation estimates from its sentences"
    ):
        make_trainer(parallel=None, w_mcl=0.0, final_estimation=True)
    with pytest.raises(ValueError, match="pivot: got 'de'; the space was estimated with 'en'"):
        make_trainer(pivot="de")
    with pytest.raises(ValueError, match="no row has 'tr'; found en, de, sw"):
        make_trainer(parallel={"en": ["Ada", "Ben"], "de": ["Ada", "Ben"], "sw": ["Ada", "Ben"]})
    with pytest.raises(ValueError, match=r"an instruction: language: got 'xx'; wanted one of en, de"):
        make_trainer(train_dataset=[Instruction.single("xx", "Ada", "Ben")])


def test_a_model_that_was_refused_is_not_left_attached(
    make_trainer: Callable[..., ShifConTrainer], load_model: Callable[..., Any]
) -> None:
    model = load_model()
    with pytest.raises(ValueError, match="parallel: none given"):
        make_trainer(model=model, parallel=None)
    assert not hasattr(model, "shifcon")
    trainer = make_trainer(model=model)
    assert model.shifcon is trainer.handle
    with pytest.raises(ValueError, match="parallel: none given"):
        make_trainer(model=model, parallel=None)
    assert model.shifcon is trainer.handle  # attached by somebody else
    with pytest.raises(ValueError, match=r"it is attached at \[1, 3\)"):
        make_trainer(model=model, forward=2, backward=3)


def test_a_trainer_that_transformers_refuses_leaves_the_model_as_it_came(
    make_trainer: Callable[..., ShifConTrainer], load_model: Callable[..., Any], space: LanguageSpace
) -> None:
    model = load_model()
    with pytest.raises(ValueError, match="eval_dataset"):  # of transformers' Trainer
        make_trainer(model=model, eval_strategy="steps", eval_steps=1)
    assert not hasattr(model, "shifcon")
    handle = attach(model, space, 1, 3, 0.5)
    other = space.replace_means(space.mean + 1)
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer(model=model, space=other, eval_strategy="steps", eval_steps=1)
    assert torch.equal(handle.shift.vectors, space.mean[[1, 3]])
    assert model.shifcon is handle


def test_alpha_is_the_attachments_and_no_other(
    make_trainer: Callable[..., ShifConTrainer],
    load_model: Callable[..., Any],
    space: LanguageSpace,
    tmp_path: Path,
) -> None:
    model = load_model()
    attach(model, space, 1, 3, 0.5)
    with pytest.raises(ValueError, match=r"alpha: got 1\.0; the model is attached with 0\.5"):
        make_trainer(model=model, alpha=1.0)
    for given in (None, 0.5):
        trainer = make_trainer(model=model, alpha=given)
        assert trainer.handle.alpha == 0.5
    trainer.save_model()
    card = read_card(tmp_path / "run")
    assert card["alpha"] == 0.5
    assert "alpha" not in card["training"]
    assert make_trainer().handle.alpha == 1.0
    assert make_trainer(alpha=0.25).handle.alpha == 0.25


def test_unshifted_passes_of_training_are_not_warned_of(
    make_trainer: Callable[..., ShifConTrainer], instructions: list[Instruction]
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unshifted")
        trainer = make_trainer(shift=False, mcl_mode="pooled", vectors="ema", eval_dataset=instructions[:2])
        trainer.train()
        trainer.evaluate()
    with pytest.warns(UserWarning, match="runs unshifted"):
        trainer.model(torch.tensor([[4, 5]]))
