"""The minimum spanning tree without a matrix of distances: against scipy's single linkage, and a plain Prim."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.nn.spanning_tree import tree_edges


def prim(X):
    """The card's four lines."""
    D = np.linalg.norm(X[:, None] - X[None], axis=2)
    unvisited, d, edges = np.ones(len(X), bool), D[0].copy(), []
    unvisited[0] = False
    for _ in range(len(X) - 1):
        i = np.flatnonzero(unvisited)[d[unvisited].argmin()]
        edges.append(d[i])
        unvisited[i], d = False, np.minimum(d, D[i])
    return np.sort(edges)


def clouds(kind, n, d, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    if kind == "groups":
        X = 0.05 * X + 5 * rng.normal(size=(7, d))[rng.integers(7, size=n)]
    if kind == "copies":
        X = X[rng.integers(n // 3, size=n)]
    if kind == "grid":  # every distance many times
        X = rng.integers(0, 4, size=(n, d)).astype(float)
    if kind == "far":
        X = X + 1e4
    return X


@pytest.mark.parametrize("kind", ["cloud", "groups", "copies", "grid", "far"])
@pytest.mark.parametrize(("n", "d"), [(300, 3), (300, 24), (30, 2)])
def test_both_ways_are_prim(kind, n, d):
    X = clouds(kind, n, d, seed=n + d)
    expected = prim(X)
    np.testing.assert_allclose(tree_edges(X), expected, atol=1e-9)
    np.testing.assert_allclose(tree_edges(X, dense=2), expected, atol=1e-6)
    np.testing.assert_allclose(tree_edges(X, dense=2).sum(), expected.sum(), rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 60), st.integers(1, 5), st.integers(0, 10_000), st.booleans())
def test_any_rows(n, d, seed, coarse):
    X = np.random.default_rng(seed).normal(size=(n, d)).round(0 if coarse else 8)
    np.testing.assert_allclose(tree_edges(X, dense=2), tree_edges(X), atol=1e-7)


def test_few_rows_and_bad_ones():
    assert tree_edges(np.zeros((1, 3))).shape == tree_edges(np.zeros((0, 3))).shape == (0,)
    assert tree_edges(np.zeros((9, 2)), dense=2).tolist() == [0.0] * 8
    with pytest.raises(ValueError, match="finite rows"):
        tree_edges(np.array([[np.nan], [1.0]]))


def test_memory_stays_below_the_matrix_of_distances(monkeypatch):
    import unfused.nn.spanning_tree as module

    monkeypatch.setattr(
        module, "BLOCK_BYTES", 1 << 20
    )  # torch's blocks are not traced: they are bounded by this
    X = clouds("groups", 3000, 8, seed=0)
    tracemalloc.start()
    tree_edges(X, dense=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(X) ** 2 * 8 / 8
