"""Gradient dropout against a naive loop, and its probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unfused.train.gradient_dropout import gradient_dropout


def naive(a, b, u, lam):
    out = np.zeros_like(a)
    for i in range(len(a)):
        sign = (a[i] > 0) * 1.0 - (a[i] < 0)
        probability = 0.5 * (1 + sign * (a[i] + b[i]) / (abs(a[i]) + abs(b[i]) + 1e-8))
        out[i] = a[i] * ((1 - lam) + lam * (probability > u[i]))
    return out


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_against_a_loop(lam):
    a, b = torch.randn(500, generator=torch.Generator().manual_seed(0)), torch.randn(500)
    w = torch.zeros(500, requires_grad=True)
    gradient_dropout([w], [a], [b], lam, torch.Generator().manual_seed(7))
    u = torch.rand(500, generator=torch.Generator().manual_seed(7)).numpy()
    np.testing.assert_allclose(w.grad.numpy(), naive(a.numpy(), b.numpy(), u, lam), rtol=1e-6)


def test_probabilities():
    """Where signs agree nothing is dropped; where they do not, the share kept is |a| / (|a| + |b|)."""
    n = 20_000
    w = torch.zeros(n, requires_grad=True)
    gradient_dropout([w], [torch.full((n,), 1.0)], [torch.full((n,), -3.0)])
    assert (w.grad != 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    gradient_dropout([w], [torch.full((n,), -1.0)], [torch.full((n,), -3.0)])
    assert (w.grad == -1).all()


def test_missing_gradients():
    one, two = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    gradient_dropout([one, two], [None, torch.ones(2)], [torch.ones(2), None])
    assert one.grad is None and torch.equal(two.grad, torch.ones(2))


def test_errors():
    w = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"lam=1\.5"):
        gradient_dropout([w], [torch.ones(2)], [torch.ones(2)], 1.5)
    with pytest.raises(ValueError, match="zip"):
        gradient_dropout([w], [torch.ones(2)], [])
