"""The tokenizer's ids against the rows of the model's embedding.

They are not the same number: embeddings are padded to round sizes, and tokenizers gain tokens (a padding token,
tokens of images or of a chat template) that the model has no row for. What is never fed does no harm; what is fed
is checked here, since PyTorch would say "index out of range" on the CPU and kill the process on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def embedding_rows(model: Any) -> int:
    """How many token ids the model's input embedding has rows for."""
    embedding = model.get_input_embeddings()
    for below_adapter in ("original_module", "base_layer"):
        embedding = getattr(embedding, below_adapter, embedding)
    return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])


def padding_id(tokenizer: Any, rows: int | None = None) -> int:
    """A token to fill up with: the tokenizer's padding, else EOS, else 0, whichever the embedding has a row for.

    Filled places are masked everywhere, so any token will do. ``rows`` None takes every id to have one.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and (rows is None or 0 <= candidate < rows):
            return int(candidate)
    return 0


def check_token_ids(ids: Sequence[int], tokenizer: Any, rows: int, where: str) -> None:
    """Raise ValueError, naming the token and ``where`` it is, if the embedding has no row for one of ``ids``."""
    highest = max(ids, default=0)
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ValueError(
            f"{where}: has the token {token!r} with id {highest}; the model's embedding has {rows} rows. Wanted "
            "the model's own tokenizer; if tokens were added to it, call "
            "model.resize_token_embeddings(len(tokenizer)) and save the model and the tokenizer together"
        )


def gives_unknown_ids(tokenizer: Any, rows: int) -> bool:
    """Whether some text could get an id that the embedding has no row for."""
    return max(tokenizer.get_vocab().values(), default=0) >= rows


def within_context(length: int | None, model: Any) -> int:
    """A number of tokens, or the model's context if that is shorter (or nothing is said)."""
    limits = [limit for limit in (length, getattr(model.config, "max_position_embeddings", None)) if limit]
    return min(limits)
