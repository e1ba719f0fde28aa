"""The mode that everything is measured in."""

from __future__ import annotations

from torch import nn

from shifcon_fast.modeling.evaluation_mode import evaluation_mode


class Linear4bit(nn.Linear):
    """Stands for bitsandbytes' own, which may repack its weights in its first forward in evaluation mode."""


def test_every_module_but_4_bit_layers_is_in_evaluation_mode_and_goes_back_to_its_own() -> None:
    model = nn.Sequential(nn.Dropout(), Linear4bit(2, 2), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[2][0].eval()  # as somebody left it
    before = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert [isinstance(module, Linear4bit) for module in model.modules()] == [
            module.training for module in model.modules()
        ]
    assert [module.training for module in model.modules()] == before
    try:
        with evaluation_mode(model):
            raise KeyError
    except KeyError:
        assert [module.training for module in model.modules()] == before
