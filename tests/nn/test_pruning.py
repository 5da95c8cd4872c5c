from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from unfused.nn.grebsmo import grebsmo
from unfused.nn.pruning import (
    SparseLowRankLinear,
    add_sparse_product,
    masked_linear,
    pack_mask,
    shrink_linear,
    unpack_mask,
)


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (16, 7)])
def test_masks_pack_into_bits(shape):
    on = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_mask(on)
    assert packed.tolist() == np.packbits(on.flatten().numpy()).tolist()
    assert torch.equal(unpack_mask(packed, shape), on)


@pytest.mark.parametrize("transposed", [False, True])
def test_masked_linear_is_the_dense_product(transposed):
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 6).double(), torch.randn(4).double().requires_grad_()
    on = torch.rand(4, 6) < 0.5
    x = torch.randn(2, 3, 6).double().requires_grad_()
    packed = pack_mask(on.t() if transposed else on)

    def run(x, bias):
        return masked_linear(x, weight.t() if transposed else weight, bias, packed, transposed)

    assert torch.allclose(run(x, bias), F.linear(x, weight * on, bias))
    assert torch.autograd.gradcheck(run, (x, bias))


def test_masked_linear_keeps_no_copy_of_the_weight():
    weight, kept = torch.randn(64, 64), []
    x, packed = torch.randn(5, 64, requires_grad=True), pack_mask(torch.ones(64, 64, dtype=torch.bool))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_linear(x, weight, None, packed, False)
    assert (
        sum(t.untyped_storage().nbytes() for t in kept if t.data_ptr() != weight.data_ptr()) == 64 * 64 // 8
    )


def test_sparse_product():
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 6).double().requires_grad_(), torch.randn(2, 3, 4).double()
    values, index = torch.randn(3).double().requires_grad_(), torch.tensor([1, 7, 23])
    dense = torch.zeros(24).double().index_put((index,), values.detach()).view(4, 6)
    assert torch.allclose(add_sparse_product(y, x, values, index), y + x @ dense.t())
    assert torch.autograd.gradcheck(lambda x, v: add_sparse_product(y, x, v, index), (x, values))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "path"])
def test_shrunk_maps_are_the_rows_and_columns_that_stay(kind):
    torch.manual_seed(0)
    linear = Conv1D(4, 6) if kind == "conv1d" else nn.Linear(6, 4)
    if kind == "path":
        index = torch.tensor([0, 4, 9, 14, 23])
        linear = SparseLowRankLinear(linear, torch.randn(4, 2), torch.randn(2, 6), torch.randn(5), index)
    rows = torch.tensor([True, False, True, True])
    columns = torch.tensor([True, True, False, False, True, True])
    x = torch.randn(3, 6) * columns
    with torch.no_grad():
        expected = linear(x)[:, rows]
        shrink_linear(linear, rows, columns)
        assert torch.allclose(linear(x[:, columns]), expected, atol=1e-6)


@pytest.mark.parametrize("max_rank", [6, 20, None])
def test_grebsmo_finds_planted_spikes(max_rank):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(64, 4, generator=generator) @ torch.randn(4, 48, generator=generator) * 0.05
    at = torch.randperm(64 * 48, generator=generator)[:20]
    spikes = torch.zeros(64 * 48)
    spikes[at] = 2 * torch.randn(20, generator=generator).sign()
    left = grebsmo(low + spikes.view(64, 48), max_rank=max_rank)
    assert {*left.abs().flatten().topk(20).indices.tolist()} == {*at.tolist()}
    assert torch.equal(left, grebsmo(low + spikes.view(64, 48), max_rank=max_rank))  # seeded


def test_grebsmo_leaves_something_of_small_matrices():
    weight = 0.02 * torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    assert int((grebsmo(weight).abs() >= 0.01).sum()) > 64
