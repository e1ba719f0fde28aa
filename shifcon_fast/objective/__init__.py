"""The ShifCon objective: multilingual contrastive learning, its recipes, and the vectors it shifts by."""

from shifcon_fast.objective.mcl import ContrastiveBatch, mcl_from_representations, mcl_loss
from shifcon_fast.objective.recipe import OFFICIAL, RECIPES, STABLE, Recipe

__all__ = [
    "OFFICIAL",
    "RECIPES",
    "STABLE",
    "ContrastiveBatch",
    "Recipe",
    "mcl_from_representations",
    "mcl_loss",
]
