from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unfused.nn.matching import clustering_accuracy, match_clusters

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(LABELS)
def test_best_of_all_matchings(pairs):
    labels, clusters = np.array(pairs).T
    best = max((np.array(order)[clusters] == labels).mean() for order in permutations(range(4)))
    assert clustering_accuracy(labels, clusters) == pytest.approx(best)


def test_names_and_left_over_clusters():
    assert clustering_accuracy(["b", "b", "a"], [7, 7, 3]) == 1
    assert match_clusters([0, 1], [1, 0], n_clusters=4).tolist() == [1, 0, -1, -1]
    assert match_clusters([0, 0], [0, 0], n_classes=3).tolist() == [0]


@pytest.mark.parametrize("labels, clusters", [([0, 1], [0]), ([], []), ([[0]], [[0]])])
def test_shapes_must_agree(labels, clusters):
    with pytest.raises(ValueError, match="clusters"):
        match_clusters(labels, clusters)
