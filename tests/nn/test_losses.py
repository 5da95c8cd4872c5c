"""Each loss against a naive numpy version, and what must hold for any input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.nn import losses as L

ARRAYS = st.tuples(st.integers(2, 7), st.integers(2, 6), st.integers(0, 2**31 - 1))


def pair(case, scale=2.0):
    batch, dim, seed = case
    rng = np.random.default_rng(seed)
    return tuple(
        torch.from_numpy((scale * rng.normal(size=(batch, dim))).astype(np.float32)) for _ in range(2)
    )


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@settings(deadline=None, max_examples=25)
@given(ARRAYS)
def test_soft_cross_entropy(case):
    logits, other = pair(case)
    targets = softmax(other.numpy())
    losses = -(targets * np.log(softmax(logits.numpy().astype(float)))).sum(1)
    weights = np.arange(len(losses), dtype=np.float32)
    got = L.soft_cross_entropy(logits, torch.from_numpy(targets))
    assert got.item() == pytest.approx(losses.mean(), rel=1e-4)
    got = L.soft_cross_entropy(logits, torch.from_numpy(targets), torch.from_numpy(weights))
    assert got.item() == pytest.approx(np.average(losses, weights=weights), rel=1e-4)


def test_soft_cross_entropy_of_nothing_is_zero_with_zero_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = L.soft_cross_entropy(logits, torch.zeros(3, 4), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@settings(deadline=None, max_examples=25)
@given(ARRAYS)
def test_kl_from_logits(case):
    teacher, student = pair(case)
    p, q = softmax(teacher.numpy().astype(float)), softmax(student.numpy().astype(float))
    expected = (p * (np.log(p) - np.log(q))).sum(1).mean()
    assert L.kl_from_logits(teacher, student).item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # The same function, whatever is added to all logits of an item; never negative; 0 for equal arguments.
    torch.testing.assert_close(
        L.kl_from_logits(teacher + 3, student - 1), L.kl_from_logits(teacher, student), atol=1e-4, rtol=1e-4
    )
    assert L.kl_from_logits(teacher, student) >= 0
    assert L.kl_from_logits(teacher, teacher) == 0


@settings(deadline=None, max_examples=25)
@given(ARRAYS)
def test_cosine_mse(case):
    a, b = pair(case)
    expected = ((unit(a.numpy()) - unit(b.numpy())) ** 2).sum(1).mean()
    assert L.cosine_mse(a, b).item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert L.cosine_mse(5 * a, 0.1 * b).item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def naive_nt_xent(z1, z2, temperature):
    z = unit(np.concatenate([z1, z2]).astype(float))
    n, total = len(z1), 0.0
    for i in range(2 * n):
        similar = {k: np.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i}
        total -= np.log(similar[(i + n) % (2 * n)] / sum(similar.values()))
    return total / (2 * n)


@settings(deadline=None, max_examples=25)
@given(ARRAYS, st.sampled_from([0.1, 0.5, 1.0]))
def test_nt_xent(case, temperature):
    z1, z2 = pair(case)
    loss = L.nt_xent(z1, z2, temperature)
    assert loss.item() == pytest.approx(naive_nt_xent(z1.numpy(), z2.numpy(), temperature), rel=1e-3)
    order = torch.randperm(len(z1))
    for same in (L.nt_xent(z1[order], z2[order], temperature), L.nt_xent(z2, 7 * z1, temperature)):
        torch.testing.assert_close(same, loss, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(ARRAYS)
def test_info_nce(case):
    q, k = pair(case)
    negatives = torch.randn(9, q.shape[1])
    a, b, c = (unit(x.numpy().astype(float)) for x in (q, k, negatives))
    expected = np.mean(
        [
            -np.log(np.exp(x @ y / 0.2) / (np.exp(x @ y / 0.2) + np.exp(c @ x / 0.2).sum()))
            for x, y in zip(a, b, strict=True)
        ]
    )
    loss = L.info_nce(q, k, negatives, temperature=0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(L.info_nce(q, k, negatives.flip(0), temperature=0.2), loss)


@settings(deadline=None, max_examples=25)
@given(st.tuples(st.integers(3, 8), st.integers(2, 6), st.integers(0, 2**31 - 1)))
def test_barlow_twins(case):
    z1, z2 = pair(case)
    a, b = (
        (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
        for z in (z1.numpy().astype(float), z2.numpy().astype(float))
    )
    expected = 0.0
    c = a.T @ b / len(a)
    for i in range(len(c)):
        for j in range(len(c)):
            expected += (c[i, j] - 1) ** 2 if i == j else 0.1 * c[i, j] ** 2
    loss = L.barlow_twins(z1, z2, lambd=0.1, scale=0.5)
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-3)
    # Order of the items and of the dimensions, and the views' roles, change nothing.
    items, dims = torch.randperm(z1.shape[0]), torch.randperm(z1.shape[1])
    for same in (
        L.barlow_twins(z1[items], z2[items], 0.1, 0.5),
        L.barlow_twins(z1[:, dims], z2[:, dims], 0.1, 0.5),
        L.barlow_twins(z2, z1, 0.1, 0.5),
    ):
        torch.testing.assert_close(same, loss, atol=1e-4, rtol=1e-4)


def test_only_the_off_diagonal_is_weighted_by_lambda():
    z1, z2 = torch.randn(2, 16, 4).unbind()
    small, none = L.barlow_twins(z1, z2, lambd=5e-5), L.barlow_twins(z1, z2, lambd=0.0)
    assert none > 0.9 * small > 0


def test_losses_are_float32_under_autocast():
    z1, z2 = torch.randn(2, 32, 16).unbind()
    exact = L.nt_xent(z1, z2), L.barlow_twins(z1, z2), L.info_nce(z1, z2, z2.flip(0))
    with torch.autocast("cpu", torch.bfloat16):
        cast = L.nt_xent(z1, z2), L.barlow_twins(z1, z2), L.info_nce(z1, z2, z2.flip(0))
    for a, b in zip(exact, cast, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def _two_process_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        from unfused.nn.queue import MemoryQueue

        for name, loss in DISTRIBUTED.items():
            weight, x1, x2 = distributed_problem()
            mine = slice(4 * rank, 4 * rank + 4)
            value = loss(x1[mine] @ weight, x2[mine] @ weight)
            value.backward()
            gradient, value = weight.grad / 2, value.detach() / 2  # averaged, as DDP does
            torch.distributed.all_reduce(gradient)
            torch.distributed.all_reduce(value)
            if rank == 0:
                np.savez(f"{folder}/{name}.npz", gradient=gradient, value=value)
        queue = MemoryQueue(dim=3, size=10)
        queue.enqueue(x1[mine])
        np.save(f"{folder}/queue-{rank}.npy", queue.keys[:8])
    finally:
        torch.distributed.destroy_process_group()


def distributed_problem():
    generator = torch.Generator().manual_seed(0)
    weight, x1, x2 = torch.randn(3, 5, generator=generator), *torch.randn(2, 8, 3, generator=generator)
    return weight.requires_grad_(), x1, x2


DISTRIBUTED = {"nt_xent": L.nt_xent, "barlow_twins": L.barlow_twins}


def test_two_processes_compute_what_one_would(tmp_path):
    torch.multiprocessing.spawn(_two_process_worker, args=(str(tmp_path),), nprocs=2)
    for name, loss in DISTRIBUTED.items():
        weight, x1, x2 = distributed_problem()
        value = loss(x1 @ weight, x2 @ weight)
        value.backward()
        with np.load(tmp_path / f"{name}.npz") as two:
            np.testing.assert_allclose(two["value"], value.item(), rtol=1e-5)
            np.testing.assert_allclose(two["gradient"], weight.grad.numpy(), rtol=1e-4, atol=1e-6)
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"queue-{rank}.npy"), unit(x1.numpy()), rtol=1e-5)
