"""A tiny encoder by the contract of the real ones, so that these tests need none of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

MELS, FRAMES = 8, 8


class TinyEncoder(nn.Module):
    """Two blocks on (batch, 1, 8, 8): frames (batch, 2, 6), block features of 16 and 12, embedding of 6."""

    block_dims = [16, 12]
    embedding_dim = 6

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in ((1, 4), (4, 6))
        )
        self.frame = nn.Linear(12, 6)

    def forward(self, x):
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x.mean(-1).flatten(1))
        return self.frame(x.flatten(1, 2).transpose(1, 2)), features

    def pool(self, frames):
        return frames.mean(1) + frames.amax(1)

    def embed(self, x):
        return self.pool(self(x)[0])


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.3 * torch.randn_like(x) if self.training else x


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TinyEncoder()


@pytest.fixture
def noise():
    return Noise()


@pytest.fixture
def inputs():
    """(24, 1, 8, 8): four kinds of pattern, six noisy copies each."""
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(4, 1, MELS, FRAMES, generator=generator)
    return kinds.repeat_interleave(6, 0) + 0.3 * torch.randn(24, 1, MELS, FRAMES, generator=generator)


class TwoViews(torch.nn.Module):
    """Gives the input at the first call and its mirror image at the second."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x if self.calls % 2 else x.flip(3)


@pytest.fixture
def two_views():
    return TwoViews()
