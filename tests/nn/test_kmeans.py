from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unfused.nn.kmeans import kmeans, nearest, standardize_groups, whiten


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- kmeans


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.integers(2, 9))
def test_its_inertia_is_scikit_learns(seed, k):
    from sklearn.cluster import KMeans

    x = normal(200, 5, seed=seed)
    ours = kmeans(x, k, iterations=50, seed=seed)[2].sum()
    theirs = KMeans(k, n_init=1, random_state=0, max_iter=50).fit(x).inertia_
    assert ours <= 1.1 * theirs


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.booleans())
@example(12274979, 9, True)  # once left an empty cluster
@example(3015, 28, True)  # once split a cluster that was new itself
def test_every_cluster_has_a_member_and_ids_are_nearest(seed, k, outliers):
    x = normal(80, 3, seed=seed)
    if outliers:
        x[:5] *= 1000
    centroids, ids, distances = kmeans(x, k, seed=seed)
    assert np.bincount(ids, minlength=k).min() >= 1
    full = ((x[:, None].astype(float) - centroids) ** 2).sum(2)
    tolerance = 1e-3 * np.maximum(full.max(), 1)
    np.testing.assert_allclose(full[np.arange(80), ids], full.min(1), atol=tolerance)
    np.testing.assert_allclose(distances, full.min(1), atol=tolerance)


def test_copies_of_few_points_end():
    x = np.repeat(normal(3, 4), 20, axis=0)
    centroids, ids, distances = kmeans(x, 5)
    assert np.isfinite(centroids).all() and distances.max() < 1e-4 and len(np.unique(ids)) == 3


def test_a_large_set_is_started_on_a_sample_and_finished_on_all():
    x = normal(20_000, 4)
    centroids, ids, _ = kmeans(x, 12)
    means = np.stack([x[ids == c].mean(0) for c in range(12)])
    np.testing.assert_allclose(centroids, means, atol=0.05)


def test_the_number_of_threads_changes_nothing():
    import faiss
    from threadpoolctl import threadpool_limits

    x = normal(3000, 64)

    def run(threads):
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads)
        try:
            with threadpool_limits(threads):
                white = whiten(x, 16)
                return white, *kmeans(white, 20)
        finally:
            faiss.omp_set_num_threads(before)

    for one, two in zip(run(1), run(2), strict=True):
        np.testing.assert_array_equal(one, two)


def test_nearest_two_are_sorted():
    distances, ids = nearest(normal(10, 3), normal(5, 3, seed=1), 2)
    assert (distances[:, 0] <= distances[:, 1]).all() and ids.shape == (10, 2)


# ---- whiten


@pytest.mark.parametrize("items", [200, 12])  # covariance, Gram matrix
def test_whitening_is_exact_pca(items):
    x = normal(items, 20) @ normal(20, 20, seed=1) + 7
    white = whiten(x, 5)
    centred = white - white.mean(0)
    np.testing.assert_allclose(centred.T @ centred / (items - 1), np.eye(5), atol=1e-3)
    rotated = whiten(x, 5, power=0.0)
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)[:5]
    np.testing.assert_allclose(np.linalg.norm(rotated - rotated.mean(0), axis=0), singular, rtol=1e-3)


def test_both_ways_to_whiten_agree():
    x = normal(30, 30)
    wide = np.concatenate([x, np.zeros((30, 1), np.float32)], axis=1)  # 31 columns: the Gram matrix
    np.testing.assert_allclose(np.abs(whiten(x, 6)), np.abs(whiten(wide, 6)), atol=1e-2)


def test_components_without_variance_are_dropped():
    x = normal(50, 2) @ normal(2, 6, seed=1)
    assert whiten(x, 6).shape == (50, 2)


# ---- standardize_groups


def test_each_group_is_standardised():
    x = normal(60, 3) * [1, 10, 100] + 5
    groups = np.repeat(["a", "b", "c"], 20)
    x[groups == "b"] *= 3
    y = standardize_groups(x, groups)
    for group in "abc":
        np.testing.assert_allclose(y[groups == group].mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(y[groups == group].std(0), 1, rtol=1e-4)
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(standardize_groups(x[order], groups[order]), y[order], atol=1e-5)


def test_small_groups_and_items_without_one_are_standardised_together():
    x = normal(40, 2)
    groups = ["a"] * 20 + ["b"] * 3 + ["c"] * 3 + [None] * 14
    y = standardize_groups(x, groups)
    np.testing.assert_allclose(y[20:].mean(0), 0, atol=1e-6)
    assert np.abs(y[20:23].mean(0)).max() > 0.01  # not zero for b alone


def test_a_constant_dimension_becomes_zero():
    x = np.column_stack([np.full(30, 1e4), np.arange(30)]).astype(np.float32)
    y = standardize_groups(x)
    assert not y[:, 0].any() and y[:, 1].std() == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kmeans(normal(3, 2), 4), "k=4"),
        (lambda: whiten(np.ones((5, 2)), 2), "the same"),
        (lambda: standardize_groups(normal(5, 2), ["a"]), "groups"),
        (lambda: standardize_groups(np.full((5, 2), np.inf)), "infinity in 5 of 5"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
