"""Which entries to train: the exact top over all tensors, random draws, scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unfused.nn.select import (
    activation_norms,
    magnitude_change,
    select_global,
    select_random,
    smallest_magnitude,
    squared_gradients,
)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    data=st.data(),
)
def test_select_global_is_the_exact_stable_top(sizes, data):
    numbers = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0])  # many ties
    lists = [data.draw(st.lists(numbers, min_size=n, max_size=n)) for n in sizes]
    count = data.draw(st.integers(0, sum(sizes)))
    found = select_global({str(n): torch.tensor(row) for n, row in enumerate(lists)}, count)
    flat = np.array([v for row in lists for v in row])
    expected = np.sort(np.argsort(-flat, kind="stable")[:count])
    starts = np.cumsum([0, *sizes[:-1]])
    got = np.concatenate([found[str(n)].numpy() + start for n, start in enumerate(starts)])
    np.testing.assert_array_equal(got, expected)


def test_select_global_leaves_excluded_entries_and_refuses():
    scores = {"a": torch.tensor([[1.0, -torch.inf], [2.0, 3.0]])}
    assert select_global(scores, 3)["a"].tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="count=4: 3 entries may be chosen"):
        select_global(scores, 4)
    with pytest.raises(ValueError, match=r"scores\['b'\] holds NaN"):
        select_global({"a": torch.ones(2), "b": torch.tensor([torch.nan])}, 1)
    assert select_global({}, 0) == {}


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), share=st.floats(0, 1), seed=st.integers(0, 5)
)
def test_select_random_draws_distinct_positions(sizes, share, seed):
    named = {str(n): size for n, size in enumerate(sizes)}
    count = int(share * sum(sizes))
    found = select_random(named, count, seed)
    assert sum(len(index) for index in found.values()) == count
    for name, index in found.items():
        assert (index.diff() > 0).all()
        assert not len(index) or (index[0] >= 0 and index[-1] < named[name])
    again = select_random(named, count, seed)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_select_random_is_uniform():
    counts = np.zeros(50)
    for seed in range(400):
        chosen = select_random({"a": 20, "b": 30}, 5, seed)
        counts[chosen["a"]] += 1
        counts[20 + chosen["b"].numpy()] += 1
    assert abs(counts[:20].mean() - 40) < 5 and abs(counts[20:].mean() - 40) < 5
    assert counts.min() > 15 and counts.max() < 70
    with pytest.raises(ValueError, match="count=51: 50"):
        select_random({"a": 20, "b": 30}, 51)


def test_scores():
    start, end = torch.tensor([0.0, 1.0]), torch.tensor([-2.0, 1.5])
    assert magnitude_change(end, start).tolist() == [2.0, 0.5]
    assert smallest_magnitude(end).tolist() == [-2.0, -1.5]


def test_squared_gradients():
    linear, unused = nn.Linear(3, 1, bias=False), nn.Parameter(torch.ones(2))
    batches = torch.randn(4, 3)
    total = squared_gradients({"w": linear.weight, "u": unused}, (linear(x).sum() for x in batches))
    torch.testing.assert_close(total["w"][0], batches.square().sum(0))
    assert total["u"].tolist() == [0, 0] and linear.weight.grad is None


def test_activation_norms():
    linear, other = nn.Linear(3, 2), nn.Linear(3, 2)
    batches = torch.randn(4, 5, 3)
    found = activation_norms({"fc": linear}, lambda: [linear(x) for x in batches])
    torch.testing.assert_close(found["fc"], batches.reshape(-1, 3).norm(dim=0))
    assert not linear._forward_pre_hooks
    with pytest.raises(ValueError, match="'other' never ran"):
        activation_norms({"other": other}, lambda: linear(batches))
