from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.nn.graph import cosine_graph, spread


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.integers(1, 8))
def test_the_graph_is_symmetric_without_loops_and_normalised(seed, neighbors):
    graph = cosine_graph(normal(40, 3, seed=seed), neighbors).toarray()
    np.testing.assert_allclose(graph, graph.T)
    assert not graph.diagonal().any() and graph.min() >= 0
    assert np.abs(np.linalg.eigvalsh(graph)).max() <= 1 + 1e-9
    assert (graph > 0).sum(1).max() < 40


def test_each_item_has_its_neighbours_also_among_copies():
    x = np.repeat(normal(2, 5), 30, axis=0)
    edges = (cosine_graph(x, 4).toarray() > 0).sum(1)
    assert edges.min() >= 4


def test_scale_does_not_matter_and_more_neighbours_than_items_are_fine():
    x = normal(6, 3)
    scaled = x * np.arange(1, 7)[:, None]
    np.testing.assert_allclose(
        cosine_graph(x, 50).toarray(), cosine_graph(scaled.astype(np.float32), 50).toarray(), atol=1e-5
    )


def test_a_row_of_zeros_is_isolated():
    x = normal(20, 3)
    x[0] = 0
    graph = cosine_graph(x, 3)
    assert graph[[0]].sum() < 1e-6 and np.isfinite(graph.data).all()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.floats(0, 0.99))
def test_spreading_is_the_closed_form_and_linear(seed, alpha):
    graph = cosine_graph(normal(30, 4, seed=seed), 5)
    values = np.random.default_rng(seed).random((30, 3))
    values[:, 1] = 0
    expected = np.linalg.solve(np.eye(30) - alpha * graph.toarray(), (1 - alpha) * values)
    np.testing.assert_allclose(spread(graph, values, alpha), expected, atol=1e-8)
    np.testing.assert_allclose(spread(graph, 2 * values, alpha), 2 * expected, atol=1e-8)
