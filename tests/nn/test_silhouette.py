from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import silhouette_score

from unfused.nn.silhouette import silhouettes


def test_as_scikit_learn_s():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    clusterings = [rng.integers(k, size=60) for k in (2, 3, 7, 30)]  # the last has clusters of one point
    expected = [silhouette_score(x, labels) for labels in clusterings]
    assert silhouettes(cdist(x, x), clusterings) == pytest.approx(expected)


def test_degenerate_clusterings_count_nothing():
    x = np.zeros((5, 1))
    found = silhouettes(
        cdist(x, x), [np.zeros(5, int), np.arange(5), np.array([0, 0, 1, 1, 1]), np.array([2, 2, 0, 0, 0])]
    )
    assert found.tolist() == [0, 0, 0, 0]
