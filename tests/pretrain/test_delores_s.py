"""DeLoRes-S's loss, put together again from its parts."""

from __future__ import annotations

import torch

from unfused.nn.losses import barlow_twins
from unfused.pretrain.delores_s import DeLoResS


def test_delores_s_is_barlow_twins_of_the_projections(encoder, inputs, two_views):
    objective = DeLoResS(encoder, two_views, dims=(7, 7, 3), lambd=0.01, scale=2.0).eval()
    z1, z2 = (objective.projector(encoder.embed(x)) for x in (inputs, inputs.flip(3)))
    torch.testing.assert_close(objective(input_values=inputs).loss, barlow_twins(z1, z2, 0.01, 2.0))
