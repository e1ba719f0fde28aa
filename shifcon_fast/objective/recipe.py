"""The two recipes, number by number.

``OFFICIAL`` holds the numbers of the authors' published code (Zhang et al., ACL 2025, arXiv 2410.19453), so that
anybody can compare; ``STABLE`` is the default. Its contrastive loss weighs a fifth of the generation loss, not four
times it: docs/does-it-help.md says what the authors' weights did to real models. Every number can be overridden in
``ShifConArguments``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MclMode = Literal["shifted", "pooled", "unshifted"]
VectorMode = Literal["frozen", "ema", "refresh", "running"]
RecipeName = Literal["stable", "official"]


@dataclass(frozen=True)
class Recipe:
    """What one way of training consists of.

    Attributes:
        name: also the ``recipe`` of ``attach`` and ``estimate_space``: "official" adds the vectors of boundaries f
            and b at the inputs of blocks f-1 and b-1, pools every attended token (BOS too), and averages unit
            vectors.
        w_gen, w_mcl: weights of the generation and the contrastive loss.
        mcl_mode: "shifted" pools a shifted pass; "pooled" re-centres the unit vectors of an unshifted one;
            "unshifted" takes them as they are.
        temperature: τ of the contrastive loss.
        contrastive_batch_size: translation pairs per process and micro-batch, which are each other's negatives.
        mixed_languages: whether the pairs of one contrastive batch are in several languages. "pooled" re-centres
            with the means of the batch, which are those of one language only if the batch is.
        vectors: how language vectors follow the model that is being trained (see ``objective.vectors``).
        max_length_pivot, max_length_other: tokens kept of a sentence, in the pivot and in other languages.
        max_length: tokens kept of an instruction and its response.
        area: (f, b) where nothing else is said; None recommends one. The authors' is for Llama-2-7B.
        learning_rate, lr_scheduler_type, warmup, num_train_epochs: warmup is a share of all steps.
        per_device_train_batch_size: instructions per process and micro-batch; the authors had 4 processes.
        running_sums: with running vectors, shift by sums of batch means that are never divided by their number, so
            that the shift grows through the run, and by means in evaluation. The authors' code does; off.
        running_dtype_of_model: accumulate running vectors in the hidden states' dtype; in bfloat16 they stagnate
            after some 256 additions. The authors' code does; off.
    """

    name: RecipeName
    w_gen: float = 1.0
    w_mcl: float = 0.2
    mcl_mode: MclMode = "shifted"
    temperature: float = 0.05
    contrastive_batch_size: int = 16
    mixed_languages: bool = True
    vectors: VectorMode = "frozen"
    max_length_pivot: int = 256
    max_length_other: int = 256
    max_length: int = 512
    area: tuple[int, int] | None = None
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup: float = 0.03
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    running_sums: bool = False
    running_dtype_of_model: bool = False


STABLE = Recipe(name="stable")

OFFICIAL = Recipe(
    name="official",
    w_gen=0.5,
    w_mcl=2.0,
    mcl_mode="pooled",
    temperature=1.0,
    contrastive_batch_size=12,
    mixed_languages=False,
    vectors="running",
    max_length_pivot=100,
    area=(12, 15),
    learning_rate=1e-5,
    warmup=0.01,
    per_device_train_batch_size=14,
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (STABLE, OFFICIAL)}
