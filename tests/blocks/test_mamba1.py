"""What the block r starts with, and what its keys may not be."""

from __future__ import annotations

import pytest
import torch

from zexp.blocks.init import Draw
from zexp.blocks.layer import Place
from zexp.blocks.mamba1.layer import Layer
from zexp.blocks.mamba1.spec import Spec


def test_it_starts_as_published():
    layer = Layer(Spec(heads=2).completed(40), 40, 1e-5, Place(0, 1))
    layer.initialise(Draw(torch.Generator().manual_seed(0), writes=4))
    torch.testing.assert_close(layer._rates(), -torch.arange(1.0, 17.0).expand(80, 16))
    steps = torch.nn.functional.softplus(layer.dt_bias)
    assert 1e-3 <= steps.min() < 2e-3 and 5e-2 < steps.max() <= 1e-1
    assert 0.95 * 3**-0.5 < layer.dt_proj.abs().max() <= 3**-0.5  # rank 3 = ceil(40 / 16)
    assert layer.D.eq(1).all()


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"heads": 3}, "arch.blocks.r.heads = 3: the inner width 80 (expand 2 × width 40) cannot be cut"),
        ({"dt_rank": 0}, "arch.blocks.r.dt_rank = 0: it must be at least 1."),
        ({"conv_width": 0, "state_size": -1}, "arch.blocks.r.state_size = -1: it must be at least 1."),
    ],
)
def test_illegal_values_are_named(keys, text):
    found = Spec(**keys).problems(40, "arch.blocks.r")
    assert len(found) == len(keys) and found[0].startswith(text)
