"""Linear probes on layers: they find what was put in, and judge by the metrics they name."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from unfused.nn import layer_probe as module
from unfused.nn.layer_probe import layer_probe, pooled

LAYERS, DIM, CLASSES = 3, 8, 4


class Staged(nn.Module):
    """Hidden states in which the token's class is noise in layers 0 and 1 and plain in layer 2, and noise again in 3."""

    def forward(self, input_ids, output_hidden_states=True, attention_mask=None):
        draw = torch.Generator().manual_seed(int(input_ids.sum()))
        noise = [torch.randn(*input_ids.shape, DIM, generator=draw) for _ in range(LAYERS + 1)]
        noise[2] = 3 * nn.functional.one_hot(input_ids, DIM).float() + 0.3 * noise[2]
        return SimpleNamespace(hidden_states=noise)


def ids(n=240, tokens=5, seed=0, same=False):
    draw = torch.Generator().manual_seed(seed)
    found = torch.randint(0, CLASSES, (n, tokens), generator=draw)
    return found[:, :1].expand(n, tokens).contiguous() if same else found


def check(probe, chance):
    assert probe.values.argmax() == 2 and probe.values[2] > 0.95
    assert all(probe.values[layer] < chance for layer in (0, 1, 3))
    assert probe.weights.argmax() == 2 and probe.weights.sum() == pytest.approx(1, abs=1e-5)
    assert probe.weighted > 0.85


def test_token():
    x = ids()
    labels = x.clone()
    labels[:, 3] = -100
    probe = layer_probe(Staged(), {"input_ids": x, "labels": labels}, "token")
    check(probe, 0.45)
    assert probe.metric == "accuracy" and probe.table().count("\n") == 5
    assert probe.plot().get_ylabel() == "accuracy"


def test_sequence():
    x = ids(same=True)
    check(layer_probe(Staged(), {"input_ids": x, "labels": x[:, 0]}, "sequence"), 0.5)


def test_pair():
    first, second = ids(600, same=True), ids(600, seed=1, same=True)
    half = torch.arange(600) % 2 == 0
    second[half] = first[half]
    labels = (first[:, 0] == second[:, 0]).long()
    data = {"first": {"input_ids": first}, "second": {"input_ids": second}, "labels": labels}
    probe = layer_probe(Staged(), data, "pair")
    assert probe.values.argmax() == 2 and probe.values[2] > 0.9 and probe.weights.argmax() == 2


def test_group():
    x = ids(same=True)
    probe = layer_probe(Staged(), {"input_ids": x, "labels": x[:, 0]}, "group")
    assert probe.metric == "MAP"
    check(probe, 0.5)


def test_mean_average_precision_is_sklearns():
    torch.manual_seed(0)
    outputs, labels = torch.randn(20, 1, 2, 5), torch.arange(20) % 4
    found = module._mean_average_precision(outputs, labels)
    for probe in range(2):
        z = nn.functional.normalize(outputs[:, 0, probe], dim=-1).numpy()
        scores = []
        for i in range(20):
            others = np.arange(20) != i
            scores.append(average_precision_score((labels == labels[i])[others], (z @ z[i])[others]))
        assert found[probe].item() == pytest.approx(np.mean(scores), abs=1e-5)


def test_pooling_leaves_padding_out():
    states = torch.arange(6.0).view(1, 1, 3, 2)
    mask = torch.tensor([[1, 1, 0]])
    assert torch.equal(pooled(states, {"attention_mask": mask}), torch.tensor([[[1.0, 2.0]]]))
    assert torch.equal(pooled(states, {}), torch.tensor([[[2.0, 3.0]]]))


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind='word'"):
        layer_probe(Staged(), {"labels": [0]}, "word")
