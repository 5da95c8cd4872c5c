"""A model's fingerprint changes with its weights and with nothing else."""

import copy

import torch
from torch import nn

from unfused.nn.fingerprint import fingerprint


def test_it_follows_the_weights():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    first = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == first
    assert fingerprint(model.eval()) == first
    model[1].running_mean.add_(1)
    assert fingerprint(model) != first
    assert fingerprint(model, lambda name: "running" not in name) == fingerprint(
        copy.deepcopy(model).to(memory_format=torch.preserve_format), lambda name: "running" not in name
    )


def test_types_and_shapes_count():
    layer = nn.Linear(2, 2, bias=False)
    assert fingerprint(layer) != fingerprint(copy.deepcopy(layer).to(torch.bfloat16))
    flat = nn.Linear(4, 1, bias=False)
    flat.weight = nn.Parameter(layer.weight.detach().reshape(1, 4))
    assert fingerprint(flat) != fingerprint(layer)


def test_scalars_and_empty_tensors():
    class Odd(nn.Module):
        def __init__(self, steps):
            super().__init__()
            self.register_buffer("steps", torch.tensor(steps))
            self.register_buffer("none", torch.empty(0))

    assert fingerprint(Odd(1)) != fingerprint(Odd(2))
