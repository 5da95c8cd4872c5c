"""SimCLR's loss, put together again from its parts."""

from __future__ import annotations

import pytest
import torch

from unfused.nn.losses import nt_xent
from unfused.pretrain.contrastive import Contrastive


def test_contrastive_is_nt_xent_of_the_projections(encoder, inputs, two_views):
    objective = Contrastive(encoder, two_views, dims=(7, 3), temperature=0.2).eval()
    z1, z2 = (objective.projector(encoder.embed(x)) for x in (inputs, inputs.flip(3)))
    torch.testing.assert_close(objective(input_values=inputs).loss, nt_xent(z1, z2, 0.2))
    assert z1.shape == (24, 3)


def test_a_temperature_of_zero_is_refused(encoder, noise):
    with pytest.raises(ValueError, match="temperature"):
        Contrastive(encoder, noise, temperature=0.0)
