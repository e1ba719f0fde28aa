"""Which tokens a sentence representation is the mean of: the *content tokens*.

Left out are

* special tokens (BOS, EOS, PAD …);
* the first attended position, whatever stands there: it is the attention sink whether or not it is a BOS
  (Xiao et al. 2023, https://arxiv.org/abs/2309.17453). Without one (SmolLM2, Qwen) the first word stands there;
* at each boundary, tokens of massive norm (Sun et al. 2024, https://arxiv.org/abs/2402.17762): more than
  ``MASSIVE_NORM`` times the median ‖h‖ of the sentence's other content tokens. Sinks also form at blanks, commas
  and repeated tokens, and one of them outweighs a sentence.

Estimation, the contrastive loss, vectors that follow training, retrieval and MEXA all ask here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASSIVE_NORM = 3.0
"""Times the median: in the gap between ordinary tokens and sinks, measured on two models (docs/method.md)."""


def content_mask(
    input_ids: Tensor, attention_mask: Tensor | None, special_ids: Sequence[int] | Tensor
) -> Tensor:
    """Mark what may be content by its position: attended to, not special, and not the first attended position.

    Args:
        input_ids: (B, T) integers.
        attention_mask: (B, T), non-zero where attended to; None for everywhere.
        special_ids: ids of the special tokens, as ``tokenizer.all_special_ids`` gives them.

    Returns:
        (B, T) bool. :func:`ordinary_tokens` takes the tokens of massive norm out of it.
    """
    special = torch.as_tensor(special_ids, dtype=input_ids.dtype, device=input_ids.device)
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    first = attended & (attended.cumsum(dim=1) == 1)
    return attended & ~first & torch.isin(input_ids, special, invert=True)


@torch.no_grad()
def ordinary_tokens(hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a mask that are not of massive norm, and the norms that decide it.

    Args:
        hidden_states: (B, T, d) at one boundary.
        mask: (B, T) bool, see :func:`content_mask`.

    Returns:
        (B, T) bool, at least half of each row's mask; (B,) float32, the median ‖h‖ of each row's mask, NaN for an
        empty row; and (B, T) float32, ‖h‖.
    """
    norms = token_norms(hidden_states)
    return *ordinary_norms(norms, mask), norms


@torch.no_grad()
def token_norms(hidden_states: Tensor) -> Tensor:
    """‖h‖ of each token, (B, T) float32."""
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    return torch.linalg.vector_norm(hidden_states, dim=-1, dtype=wide).float()


@torch.no_grad()
def ordinary_norms(norms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first two of :func:`ordinary_tokens`, from the norms (B, T)."""
    medians = norms.masked_fill(~mask, torch.nan).nanmedian(dim=1).values
    massive = (
        norms > MASSIVE_NORM * medians[:, None]
    ) & norms.isfinite()  # what overflowed must show in the mean
    return mask & ~massive, medians
