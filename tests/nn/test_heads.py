from __future__ import annotations

import pytest
import torch

from unfused.nn.heads import projector


def kinds(head):
    return [type(layer).__name__ for layer in head]


def test_three_layer_projector_has_the_papers_layers():
    head = projector((8, 6, 5, 4))
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert all(layer.bias is None for layer in head if isinstance(layer, torch.nn.Linear))
    assert head(torch.randn(3, 8)).shape == (3, 4)


def test_a_single_layer_is_linear():
    assert kinds(projector((8, 4), bias=True)) == ["Linear"]


def test_norm_last_standardises_the_output():
    out = projector((8, 6, 4), norm_last=True)(torch.randn(64, 8))
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(0, correction=0), torch.ones(4), atol=1e-2, rtol=0)


def test_one_width_is_refused():
    with pytest.raises(ValueError, match="dims"):
        projector((8,))
