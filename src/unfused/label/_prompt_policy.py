"""Distributions over discrete prompts, learned from losses alone: one categorical for each place."""

from __future__ import annotations

import numpy as np

__all__ = ["SimplexPolicy", "SoftmaxPolicy", "bdpl_gradient", "project_simplex"]


class _Policy:
    def probabilities(self) -> np.ndarray:
        """P, (m, N)."""
        raise NotImplementedError

    def step(self, sampled: np.ndarray, losses: np.ndarray) -> None:
        """Learn from prompts (I, m), indices into the vocabulary, and their losses (I,)."""
        raise NotImplementedError

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Prompts, (count, m)."""
        cumulated = self.probabilities().cumsum(1)
        uniform = rng.random((count, len(cumulated), 1)) * cumulated[:, -1:]
        return (uniform >= cumulated).sum(-1).clip(max=cumulated.shape[1] - 1)


class SoftmaxPolicy(_Policy):
    """Logits; REINFORCE with the mean of the other losses as baseline, in units of the losses' standard deviation."""

    def __init__(self, places: int, tokens: int, lr: float) -> None:
        self.logits, self.lr = np.zeros((places, tokens)), lr

    def probabilities(self) -> np.ndarray:
        shifted = np.exp(self.logits - self.logits.max(1, keepdims=True, initial=-np.inf))
        return shifted / shifted.sum(1, keepdims=True)

    def step(self, sampled: np.ndarray, losses: np.ndarray) -> None:
        gains = _gains(losses) / max(float(losses.std()), 1e-3)
        self.logits -= self.lr * _sums(sampled, gains, self.logits.shape)


class SimplexPolicy(_Policy):
    """Probabilities themselves; BDPL's gradient, clipped, AdamW (decay 0.1) and the projection of every row."""

    def __init__(self, places: int, tokens: int, lr: float) -> None:
        self.p, self.lr, self.t = np.full((places, tokens), 1 / max(tokens, 1)), lr, 0
        self.mean, self.square = np.zeros_like(self.p), np.zeros_like(self.p)

    def probabilities(self) -> np.ndarray:
        return self.p

    def step(self, sampled: np.ndarray, losses: np.ndarray) -> None:
        gradient = bdpl_gradient(self.p, sampled, losses)
        gradient *= min(1.0, 3 / max(float(np.linalg.norm(gradient)), 1e-12))
        self.t += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.t), self.square / (1 - 0.999**self.t)
        self.p = project_simplex(self.p * (1 - 0.1 * self.lr) - self.lr * mean / (np.sqrt(square) + 1e-8))


def bdpl_gradient(p: np.ndarray, sampled: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """BDPL's: `sum_k A_k d_k` with d = +1/P for the drawn token and -1/P for all others, (m, N)."""
    gains = _gains(losses)
    return (2 * _sums(sampled, gains, p.shape) - gains.sum()) / p.clip(1e-6)


def project_simplex(rows: np.ndarray) -> np.ndarray:
    """The nearest point of the probability simplex to each row: `clip(row - v, 0, 1)` with the v that makes the sum 1.

    Examples
    --------
    >>> project_simplex(np.array([[0.5, 0.5, 0.3], [2.0, 0.0, -1.0]])).round(3).tolist()
    [[0.4, 0.4, 0.2], [1.0, 0.0, 0.0]]
    """
    falling = -np.sort(-rows, axis=1)
    excess = (falling.cumsum(1) - 1) / np.arange(1, rows.shape[1] + 1)
    last = (falling > excess).sum(1) - 1
    return (rows - np.take_along_axis(excess, last[:, None], 1)).clip(0, 1)


def _gains(losses: np.ndarray) -> np.ndarray:
    return (losses - losses.mean()) / (len(losses) - 1)


def _sums(sampled: np.ndarray, gains: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`sum_k gains_k 1[sampled_ki = j]`, (m, N)."""
    found = np.zeros(shape)
    np.add.at(found, (np.arange(shape[0])[None], sampled), gains[:, None])
    return found
