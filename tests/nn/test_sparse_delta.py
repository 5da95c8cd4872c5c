"""Sparse changes of weights: against the dense computation, in every layout and type; what backward stores."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from unfused.nn.sparse_delta import (
    SparseDelta,
    add_sparse,
    check_sparse,
    sparse_conv2d,
    sparse_embedding,
    sparse_linear,
)


def positions(size, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[: round(share * size)].sort().values


def stored_bytes(function):
    """Distinct storages that autograd keeps, and the result."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return seen, result


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 9),
    inp=st.integers(1, 9),
    lead=st.lists(st.integers(0, 3), max_size=2),
    share=st.floats(0, 1),
    second=st.booleans(),
    transposed=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_linear_equals_dense(out, inp, lead, share, second, transposed, bias, seed):
    torch.manual_seed(seed)
    shape = (inp, out) if transposed else (out, inp)
    weight = torch.randn(shape, dtype=torch.float64)
    b = torch.randn(out, dtype=torch.float64, requires_grad=True) if bias else None
    index = [positions(out * inp, share, seed)]
    if second:
        index.append(positions(out * inp, 0.5, seed + 1))
    values = [torch.randn(len(i), dtype=torch.float64, requires_grad=True) for i in index]
    x = torch.randn(*lead, inp, dtype=torch.float64, requires_grad=True)
    y = sparse_linear(x, weight, b, values, index, fan_in_fan_out=transposed)
    g = torch.randn_like(y)
    wanted = [t for t in (x, b, *values) if t is not None]
    found = torch.autograd.grad((y * g).sum(), wanted)

    changed = weight
    for v, i in zip(values, index, strict=True):
        changed = changed + torch.zeros(out * inp, dtype=torch.float64).index_put((i,), v).view(shape)
    expected = F.linear(x, changed.t() if transposed else changed, b)
    torch.testing.assert_close(y, expected)
    reference = torch.autograd.grad((expected * g).sum(), wanted, allow_unused=True)
    for a, r in zip(found, reference, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if r is None else r)


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_in_float32_at_every_density(share, transposed):
    """Few entries are computed one by one, many by a dense product: the same numbers."""
    torch.manual_seed(0)
    weight, x, g = torch.randn(40, 50), torch.randn(3, 7, 40 if transposed else 50), torch.randn(3, 7, 1)
    index = positions(2000, share)
    values = torch.randn(len(index), requires_grad=True)
    y = sparse_linear(x, weight, None, values, index, fan_in_fan_out=transposed)
    (y * g).sum().backward()
    changed = SparseDelta(weight.shape, index, values.detach().clone())
    w = changed.add_to(weight)
    z = F.linear(x, w.t() if transposed else w)
    (z * g).sum().backward()
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(values.grad, changed.values.grad, atol=1e-4, rtol=1e-4)


def test_gradcheck():
    torch.manual_seed(0)
    index = positions(12, 0.5)
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, v: sparse_linear(x, weight, None, v, index), (x, values))


def test_backward_stores_needed_input_channels_and_no_weight():
    weight, x = torch.randn(64, 100), torch.randn(32, 100, requires_grad=True)
    index = (torch.arange(64)[:, None] * 100 + torch.tensor([3, 50])).flatten()  # two columns
    values = torch.zeros(128, requires_grad=True)
    seen, y = stored_bytes(lambda: sparse_linear(x, weight, None, values, index))
    own = {t.untyped_storage().data_ptr() for t in (weight, values, index)}
    kept = [t for pointer, t in seen.items() if pointer not in own]
    assert [tuple(t.shape) for t in kept] == [(32, 2)]
    y.sum().backward()
    assert weight.grad is None and values.grad.shape == (128,)

    seen, _ = stored_bytes(lambda: sparse_linear(x, weight, None, values.detach(), index))
    assert x.untyped_storage().data_ptr() not in seen, "frozen changes need no input"


def test_stored_inputs_are_shared_when_all_channels_are_needed():
    weight, x = torch.randn(6, 10), torch.randn(4, 10, requires_grad=True)
    index, values = positions(60, 0.8), torch.zeros(48, requires_grad=True)
    seen, _ = stored_bytes(lambda: sparse_linear(x, weight, None, values, index))
    assert x.untyped_storage().data_ptr() in seen
    assert sum(t.numel() for t in seen.values()) == 60 + 40 + 48 + 48


def test_trainable_weight_takes_the_dense_path():
    weight, x = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    values, index = torch.zeros(2, requires_grad=True), torch.tensor([0, 5])
    sparse_linear(x, weight, None, values, index).square().sum().backward()
    torch.testing.assert_close(values.grad, weight.grad.flatten()[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_base_keeps_values_wide(dtype):
    linear = nn.Linear(8, 8, bias=False).to(dtype)
    delta = SparseDelta((8, 8), positions(64, 0.5)).to(dtype)
    assert delta.values.dtype == torch.float32 and delta.index.dtype == torch.int64
    delta.values.data.fill_(1e-3)
    x = torch.randn(4, 8, dtype=dtype, requires_grad=True)
    y = sparse_linear(x, linear.weight.detach(), None, delta.values, delta.index)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert delta.values.grad.dtype == torch.float32 and x.grad.dtype == dtype
    exact = linear.weight.detach().float() + delta.dense()
    torch.testing.assert_close(delta.add_to(linear.weight.detach()), exact.to(dtype), rtol=0, atol=0)


def test_autocast():
    weight, x, bias = torch.randn(6, 5), torch.randn(4, 5, requires_grad=True), torch.randn(6)
    index = positions(30, 0.4)
    values = torch.randn(12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_linear(x, weight, bias, values, index)
        z = F.linear(x, add_sparse(weight, values.detach(), index), bias)
        assert y.dtype == z.dtype == torch.bfloat16
        torch.testing.assert_close(y, z)
        y.float().sum().backward()
    assert values.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    torch.testing.assert_close(values.grad, x.detach().sum(0)[index % 5], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    weight, x = torch.randn(6, 5), torch.randn(4, 5, requires_grad=True)
    index = positions(30, 0.4)
    values = torch.randn(12, requires_grad=True)
    plain = torch.autograd.grad(sparse_linear(x, weight, None, values, index).square().sum(), (x, values))
    y = checkpoint(lambda x: sparse_linear(x, weight, None, values, index), x, use_reentrant=reentrant)
    y.square().sum().backward()
    torch.testing.assert_close((x.grad, values.grad), plain)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"groups": 2},
    ],
)
def test_conv2d_equals_dense(options):
    torch.manual_seed(0)
    base = nn.Conv2d(4, 6, 3, bias=False, **options).double().requires_grad_(False)
    index = positions(base.weight.numel(), 0.3)
    delta = SparseDelta(base.weight.shape, index, torch.randn(len(index), dtype=torch.float64))
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    changed = copy.deepcopy(base)
    dense = nn.Parameter(base.weight + delta.dense().detach())
    changed.weight = dense
    y, z = sparse_conv2d(x, base, delta.values, delta.index), changed(x)
    torch.testing.assert_close(y, z)
    found = torch.autograd.grad(y.square().sum(), (x, delta.values))
    expected = torch.autograd.grad(z.square().sum(), (x, dense))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1].flatten()[index])


def test_conv2d_stores_no_changed_weight():
    base = nn.Conv2d(4, 6, 3, bias=False).requires_grad_(False).to(memory_format=torch.channels_last)
    index = positions(base.weight.numel(), 0.3)
    values = torch.randn(len(index), requires_grad=True)
    x = torch.randn(2, 4, 8, 8)
    seen, y = stored_bytes(lambda: sparse_conv2d(x, base, values, index))
    known = {t.untyped_storage().data_ptr() for t in (x, base.weight, values, index)}
    assert set(seen) <= known
    plain = F.conv2d(x, (base.weight + SparseDelta(base.weight.shape, index, values.detach()).dense()))
    torch.testing.assert_close(y, plain, atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 8),
    dim=st.integers(1, 4),
    share=st.floats(0, 1),
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    pad=st.booleans(),
)
def test_embedding_equals_dense(rows, dim, share, shape, pad):
    torch.manual_seed(rows)
    padding_idx = 0 if pad else None
    ids = torch.randint(rows, tuple(shape))
    delta = SparseDelta((rows, dim), positions(rows * dim, share))
    delta.values.data.normal_()
    y = sparse_embedding(ids, delta.shape, delta.values, delta.index, padding_idx)
    table = delta.dense().detach().requires_grad_()
    z = F.embedding(ids, table, padding_idx=padding_idx)
    torch.testing.assert_close(y, z)
    g = torch.randn_like(y)
    found = torch.autograd.grad((y * g).sum(), delta.values)[0]
    expected = torch.autograd.grad((z * g).sum(), table)[0]
    torch.testing.assert_close(found, expected.flatten()[delta.index])


def test_vectors_and_several_changes():
    bias = torch.zeros(5)
    index = [torch.tensor([1, 4]), torch.tensor([4])]
    values = [torch.ones(2, requires_grad=True), torch.full((1,), 2.0)]
    changed = add_sparse(bias, values, index)
    assert changed.tolist() == [0, 1, 0, 0, 3]
    changed.sum().backward()
    assert values[0].grad.tolist() == [1, 1] and bias.tolist() == [0] * 5


def test_empty_change_takes_part_in_the_graph():
    """Distributed training wants every trainable parameter to be used."""
    values, index = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    y = sparse_linear(torch.randn(2, 4), torch.randn(3, 4), None, values, index)
    y.sum().backward()
    assert values.grad.shape == (0,)


def test_resize_keeps_what_stays_and_the_object():
    delta = SparseDelta((2, 4), torch.tensor([1, 3, 6]), torch.tensor([1.0, 2.0, 3.0]))
    parameter = delta.values
    delta.values.grad = torch.ones(3)
    delta.resize_(torch.tensor([0, 3, 6, 7]))
    assert delta.values is parameter and parameter.grad is None
    assert delta.values.tolist() == [0, 2, 3, 0]
    assert delta.resize_(torch.zeros(0, dtype=torch.int64)).values.shape == (0,)
    assert delta.resize_(torch.tensor([2])).values.tolist() == [0]


def test_state_dict_deepcopy_and_meta():
    delta = SparseDelta((4, 50), positions(200, 0.05))
    sparse_linear(torch.randn(3, 50), torch.randn(4, 50), None, delta.values, delta.index).sum().backward()
    assert set(delta.state_dict()) == {"values", "index"}
    twin = copy.deepcopy(delta)
    twin.index.copy_(
        positions(200, 0.05, seed=1)
    )  # what was cached for the old positions does not count any more
    twin.values.data.normal_()
    weight, x = torch.randn(4, 50), torch.randn(3, 50)
    y = sparse_linear(x, weight, None, twin.values, twin.index)
    (grad,) = torch.autograd.grad(y.sum(), twin.values)
    torch.testing.assert_close(y, F.linear(x, twin.add_to(weight)))
    torch.testing.assert_close(grad, x.sum(0)[twin.index % 50], atol=1e-5, rtol=1e-5)
    with torch.device("meta"):
        empty = SparseDelta((4, 50), torch.zeros(0, dtype=torch.int64))
    assert empty.resize_(positions(200, 0.05)).values.shape == (10,)


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        (torch.tensor([0, 6]), torch.zeros(2), "positions from 0 to 6"),
        (torch.tensor([-1, 2]), torch.zeros(2), "positions from -1 to 2"),
        (torch.tensor([2, 2]), torch.zeros(2), "ascending without duplicates"),
        (torch.tensor([3, 1]), torch.zeros(2), "ascending"),
        (torch.tensor([1]), torch.zeros(2), "shape"),
        (torch.tensor([[1]]), torch.zeros(1, 1), "vector of int64"),
        (torch.tensor([1.0]), torch.zeros(1), "vector of int64"),
        (torch.tensor([2**62, 2**63 - 1]), torch.zeros(2), "positions"),
    ],
)
def test_hostile_positions(index, values, message):
    with pytest.raises(ValueError, match=message):
        check_sparse(index, values, (2, 3))
    with pytest.raises(ValueError, match=message):
        SparseDelta((2, 3), index, values)
