"""The five operators of ShifCon: one schema each, several backends (see ``docs/operators.md``)."""

from __future__ import annotations

from shifcon_fast.ops import native_backend as _native_backend  # noqa: F401 - registers its backend
from shifcon_fast.ops import reference as _reference  # noqa: F401 - registers its backend
from shifcon_fast.ops import triton_backend as _triton_backend  # noqa: F401 - registers its backend
from shifcon_fast.ops.contrastive_loss import info_nce
from shifcon_fast.ops.norm import add_shift_rms_norm
from shifcon_fast.ops.pooling import masked_mean_pool
from shifcon_fast.ops.projection import subspace_project
from shifcon_fast.ops.registry import (
    BackendReport,
    SlowBackendWarning,
    backend_report,
    call_counts,
    register_backend,
    reset_call_counts,
)
from shifcon_fast.ops.similarity import contrastive_similarity

__all__ = [
    "BackendReport",
    "SlowBackendWarning",
    "add_shift_rms_norm",
    "backend_report",
    "call_counts",
    "contrastive_similarity",
    "info_nce",
    "masked_mean_pool",
    "register_backend",
    "reset_call_counts",
    "subspace_project",
]
