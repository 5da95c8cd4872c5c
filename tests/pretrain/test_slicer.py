"""SLICER's loss, put together again from its parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from unfused.nn.losses import info_nce
from unfused.pretrain.slicer import SLICER


def test_slicer_is_symmetric_moco_plus_contrast_of_assignment_columns(encoder, inputs, two_views):
    objective = SLICER(encoder, two_views, dim=4, num_clusters=5, queue_size=16).eval()
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


def test_the_key_encoder_follows_and_the_queue_fills(encoder, inputs, noise):
    objective = SLICER(encoder, noise, dim=4, queue_size=100, momentum=0.5)
    start = objective.key.module.head.weight.clone()
    torch.testing.assert_close(start, objective.query.head.weight)
    objective(input_values=inputs).loss.backward()
    assert all(p.grad is None for p in objective.key.parameters())
    with torch.no_grad():
        objective.query.head.weight += 1
    before = objective.queue.keys.clone()
    objective(input_values=inputs)
    torch.testing.assert_close(objective.key.module.head.weight, start + 0.5)
    assert objective.queue.position == 2 * 24 * 2 % 100
    assert not torch.equal(before, objective.queue.keys)

    objective.eval()
    frozen = {name: value.clone() for name, value in objective.state_dict().items()}
    objective(input_values=inputs)
    for name, value in objective.state_dict().items():
        torch.testing.assert_close(value, frozen[name], rtol=0, atol=0)
