"""SimCLR, DeLoRes-S, DeLoRes-M and SLICER: each loss put together again from its parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from unfused.nn.losses import barlow_twins, info_nce, nt_xent
from unfused.pretrain.contrastive import Contrastive
from unfused.pretrain.delores_m import DeLoResM
from unfused.pretrain.delores_s import DeLoResS
from unfused.pretrain.slicer import SLICER


class TwoViews(torch.nn.Module):
    """Gives the input at the first call and its mirror image at the second."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x if self.calls % 2 else x.flip(3)


def test_contrastive_is_nt_xent_of_the_projections(encoder, inputs):
    objective = Contrastive(encoder, TwoViews(), dims=(7, 3), temperature=0.2).eval()
    z1, z2 = (objective.projector(encoder.embed(x)) for x in (inputs, inputs.flip(3)))
    torch.testing.assert_close(objective(input_values=inputs).loss, nt_xent(z1, z2, 0.2))
    assert z1.shape == (24, 3)


def test_delores_s_is_barlow_twins_of_the_projections(encoder, inputs):
    objective = DeLoResS(encoder, TwoViews(), dims=(7, 7, 3), lambd=0.01, scale=2.0).eval()
    z1, z2 = (objective.projector(encoder.embed(x)) for x in (inputs, inputs.flip(3)))
    torch.testing.assert_close(objective(input_values=inputs).loss, barlow_twins(z1, z2, 0.01, 2.0))


def test_delores_m_is_moco_plus_barlow_at_every_depth(encoder, inputs):
    objective = DeLoResM(encoder, TwoViews(), dim=4, dims=(5, 5, 5), queue_size=16).eval()
    q, q_blocks = objective.query(inputs)
    k, k_blocks = objective.key.module(inputs.flip(3))
    expected = info_nce(q, k, objective.queue.keys, 0.07)
    for head, a, b in zip(objective.projectors, q_blocks, k_blocks, strict=True):
        expected = expected + barlow_twins(head(a), head(b), 5e-5, 1 / 32)
    torch.testing.assert_close(objective(input_values=inputs).loss, expected)
    assert len(objective.projectors) == 2


def test_slicer_is_symmetric_moco_plus_contrast_of_assignment_columns(encoder, inputs):
    objective = SLICER(encoder, TwoViews(), dim=4, num_clusters=5, queue_size=16).eval()
    views = inputs, inputs.flip(3)
    (h1, q1), (h2, q2) = (objective.query(x) for x in views)
    (_, k1), (_, k2) = (objective.key.module(x) for x in views)
    expected = info_nce(q1, k2, objective.queue.keys) + info_nce(q2, k1, objective.queue.keys)
    p1, p2 = (objective.cluster_head(h).softmax(1) for h in (h1, h2))
    columns = F.normalize(torch.cat([p1.T, p2.T]), dim=1)  # (2 * clusters, batch)
    similar = columns @ columns.T
    contrast = 0.0
    for i in range(10):
        others = torch.cat([similar[i, :i], similar[i, i + 1 :]])
        contrast = contrast + (others.logsumexp(0) - similar[i, (i + 5) % 10]) / 10
    torch.testing.assert_close(objective(input_values=inputs).loss, expected + contrast)


@pytest.mark.parametrize("kind", [DeLoResM, SLICER])
def test_the_key_encoder_follows_and_the_queue_fills(kind, encoder, inputs, noise):
    objective = kind(encoder, noise, dim=4, queue_size=100, momentum=0.5)
    start = objective.key.module.head.weight.clone()
    torch.testing.assert_close(start, objective.query.head.weight)
    objective(input_values=inputs).loss.backward()
    assert all(p.grad is None for p in objective.key.parameters())
    with torch.no_grad():
        objective.query.head.weight += 1
    before = objective.queue.keys.clone()
    objective(input_values=inputs)
    torch.testing.assert_close(objective.key.module.head.weight, start + 0.5)
    assert objective.queue.position == 2 * 24 * (1 if kind is DeLoResM else 2) % 100
    assert not torch.equal(before, objective.queue.keys)

    objective.eval()
    frozen = {name: value.clone() for name, value in objective.state_dict().items()}
    objective(input_values=inputs)
    for name, value in objective.state_dict().items():
        torch.testing.assert_close(value, frozen[name], rtol=0, atol=0)


def test_a_temperature_of_zero_is_refused(encoder, noise):
    with pytest.raises(ValueError, match="temperature"):
        Contrastive(encoder, noise, temperature=0.0)
