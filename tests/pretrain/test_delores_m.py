"""DeLoRes-M's loss, put together again from its parts."""

from __future__ import annotations

import torch

from unfused.nn.losses import barlow_twins, info_nce
from unfused.pretrain.delores_m import DeLoResM


def test_delores_m_is_moco_plus_barlow_at_every_depth(encoder, inputs, two_views):
    objective = DeLoResM(encoder, two_views, dim=4, dims=(5, 5, 5), queue_size=16).eval()
    q, q_blocks = objective.query(inputs)
    k, k_blocks = objective.key.module(inputs.flip(3))
    expected = info_nce(q, k, objective.queue.keys, 0.07)
    for head, a, b in zip(objective.projectors, q_blocks, k_blocks, strict=True):
        expected = expected + barlow_twins(head(a), head(b), 5e-5, 1 / 32)
    torch.testing.assert_close(objective(input_values=inputs).loss, expected)
    assert len(objective.projectors) == 2


def test_the_key_encoder_follows_and_the_queue_fills(encoder, inputs, noise):
    objective = DeLoResM(encoder, noise, dim=4, queue_size=100, momentum=0.5)
    start = objective.key.module.head.weight.clone()
    torch.testing.assert_close(start, objective.query.head.weight)
    objective(input_values=inputs).loss.backward()
    assert all(p.grad is None for p in objective.key.parameters())
    with torch.no_grad():
        objective.query.head.weight += 1
    before = objective.queue.keys.clone()
    objective(input_values=inputs)
    torch.testing.assert_close(objective.key.module.head.weight, start + 0.5)
    assert objective.queue.position == 2 * 24
    assert not torch.equal(before, objective.queue.keys)

    objective.eval()
    frozen = {name: value.clone() for name, value in objective.state_dict().items()}
    objective(input_values=inputs)
    for name, value in objective.state_dict().items():
        torch.testing.assert_close(value, frozen[name], rtol=0, atol=0)
