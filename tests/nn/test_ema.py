from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from unfused.nn.ema import EMA


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def change(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    module(torch.randn(5, 3))  # moves the buffers of batch norm


def test_update_is_the_formula_and_buffers_are_copied():
    online = network()
    ema = EMA(online, momentum=0.9)
    for _ in range(3):
        before = [p.clone() for p in ema.module.parameters()]
        change(online)
        ema.update()
        for old, new, target in zip(before, ema.module.parameters(), online.parameters(), strict=True):
            torch.testing.assert_close(new, 0.9 * old + 0.1 * target)
        for mine, theirs in zip(ema.module.buffers(), online.buffers(), strict=True):
            assert torch.equal(mine, theirs)
    assert ema.updates == 3


def test_nothing_of_it_is_trained_and_the_online_module_is_not_in_its_state():
    online = network()
    ema = EMA(online)
    assert not any(p.requires_grad for p in ema.parameters())
    assert not ema(torch.randn(5, 3)).requires_grad
    assert {key.split(".")[0] for key in ema.state_dict()} == {"module", "updates"}


def test_a_schedule_resumes_from_the_state_dict():
    online = network()
    seen = []

    def schedule(step):
        seen.append(step)
        return 1 - 1 / (step + 2)

    ema = EMA(online, schedule)
    for _ in range(2):
        change(online)
        ema.update()
    resumed = EMA(online, schedule)
    resumed.load_state_dict(ema.state_dict())
    change(online)
    ema.update()
    resumed.update()
    assert seen == [0, 1, 2, 2]
    for a, b in zip(ema.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_deep_copy_follows_the_copied_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.online = network()
            self.ema = EMA(self.online, momentum=0.0)

    twin = deepcopy(Model())
    change(twin.online)
    twin.ema.update()
    assert torch.equal(twin.ema.module[0].weight, twin.online[0].weight)


def test_a_momentum_out_of_range_is_refused():
    with pytest.raises(ValueError, match="momentum"):
        EMA(network(), momentum=1.5)
