"""The reference backend: every operator in plain PyTorch, computed in float32. CPU fallback and test oracle."""

from __future__ import annotations

from shifcon_fast.ops.reference import contrastive_loss, norm, pooling, projection, similarity
from shifcon_fast.ops.registry import register_backend

for _operator, _module in {
    "add_shift_rms_norm": norm,
    "masked_mean_pool": pooling,
    "info_nce": contrastive_loss,
    "contrastive_similarity": similarity,
    "subspace_project": projection,
}.items():
    register_backend(_operator, "reference", forward=_module.forward, backward=_module.backward)
