"""Every operator inside of gradient checkpointing: saved tensors are unpacked once, and gradients stay the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shifcon_fast import ops

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([1, -1])
TABLE = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
BASIS = torch.linalg.qr(torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(2))).Q

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "add_shift_rms_norm": lambda x: torch.cat(ops.add_shift_rms_norm(x, torch.ones(8), x, TABLE, IDS), -1),
    "masked_mean_pool": lambda x: ops.masked_mean_pool(x, torch.ones(2, 3, dtype=torch.bool), True),
    "info_nce": lambda x: ops.info_nce(x, x.flip(1), scale=2.0),
    "contrastive_similarity": lambda x: ops.contrastive_similarity(x, x.flip(1)),
    "subspace_project": lambda x: ops.subspace_project(x, TABLE, BASIS, IDS, torch.tensor([0, -1])),
}


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_under_checkpointing(operator: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = OPERATORS[operator]
    if impl == "reference":
        original = getattr(ops, operator)
        monkeypatch.setattr(ops, operator, lambda *args, **kwargs: original(*args, **kwargs, impl=impl))
    gradients = []
    for run in (function, lambda x: checkpoint(function, x, use_reentrant=False)):
        x = X.clone().requires_grad_()
        run(x * 1.5).pow(3).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert gradients[0].abs().sum() > 0
