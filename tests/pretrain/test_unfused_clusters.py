"""Clustering, the choice of K, label spreading and the queue of items to label."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from unfused.pretrain.unfused import (
    Clusters,
    choose_num_clusters,
    cluster_features,
    cluster_targets,
    label_queue,
    propagate_labels,
)


def blobs(kinds=4, each=30, dim=8, spread=0.05, seed=0):
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(kinds), each)
    return (4 * rng.normal(size=(kinds, dim)))[truth] + spread * rng.normal(size=(len(truth), dim)), truth


def random(*shape):
    return np.random.default_rng(0).random(shape)


# ---- cluster_features


def test_it_finds_well_separated_kinds():
    x, truth = blobs()
    clusters = cluster_features(x, k=4, pca=3)
    assert adjusted_rand_score(truth, clusters.ids) == 1
    assert clusters.centroids.shape == (4, 3) and clusters.features.shape == (120, 3)
    np.testing.assert_allclose(np.linalg.norm(clusters.features, axis=1), 1, rtol=1e-5)


def test_ids_are_the_nearest_centroid_and_distances_are_to_it():
    x, _ = blobs(spread=3.0)
    clusters = cluster_features(x, k=7)
    distances = ((clusters.features[:, None] - clusters.centroids) ** 2).sum(2)
    np.testing.assert_array_equal(clusters.ids, distances.argmin(1))
    np.testing.assert_allclose(clusters.distances, distances.min(1), atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31 - 1), st.integers(2, 12))
def test_same_seed_same_clusters_and_none_is_empty(seed, k):
    x, _ = blobs(spread=2.0)
    a, b = cluster_features(x, k, seed=seed), cluster_features(x, k, seed=seed)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.centroids, b.centroids)
    assert a.sizes.min() > 0 and a.sizes.sum() == len(x)


def test_whitening_makes_it_blind_to_linear_maps_of_the_features():
    x, _ = blobs(dim=4, each=100)
    mapped = x @ np.random.default_rng(1).normal(size=(4, 4)) + 5
    assert adjusted_rand_score(cluster_features(x, 4).ids, cluster_features(mapped, 4).ids) > 0.99


def test_groups_are_standardised_away():
    x, truth = blobs(kinds=3, each=40, spread=0.5)
    group = np.tile([0, 1], 60)
    shifted = x + group[:, None] * 40.0
    grouped = cluster_features(shifted, 3, groups=[f"speaker {g}" for g in group])
    assert adjusted_rand_score(truth, grouped.ids) == 1
    assert adjusted_rand_score(truth, cluster_features(shifted, 3, whiten=False).ids) < 0.9


def test_members_of_tiny_clusters_get_no_label():
    ids = np.array([0] * 5 + [1] * 2 + [2] * 3)
    clusters = Clusters(ids, np.zeros((4, 1)), np.zeros((10, 1)), np.zeros(10))
    assert clusters.sizes.tolist() == [5, 2, 3, 0]
    assert clusters.labels().tolist() == [0] * 5 + [-1] * 2 + [2] * 3


def test_balanced_clusters_are_about_equal():
    x, _ = blobs(kinds=3, each=50, spread=2.0)
    x = np.concatenate([x, x[:50] + 0.01])
    assert np.ptp(cluster_features(x, 8, balanced=True).sizes) < np.ptp(cluster_features(x, 8).sizes)


@pytest.mark.parametrize(
    ("features", "k", "words"),
    [
        (np.ones((10, 3)), 2, "the same"),
        (np.zeros((4, 2)), 5, "k=5"),
        (np.full((9, 2), np.nan), 2, "NaN"),
        (np.zeros(9), 2, "shape"),
        (np.zeros((9, 2)), "auto", "choose_num_clusters"),
    ],
)
def test_bad_input_is_named(features, k, words):
    with pytest.raises(ValueError, match=words):
        cluster_features(features, k, pca=None if k == 5 else 128)


# ---- choose_num_clusters


def test_the_number_of_clusters_is_the_smallest_on_which_two_copies_agree():
    x, _ = blobs(kinds=6, each=40)
    rng = np.random.default_rng(0)
    a, b = x + rng.normal(0, 1.0, (2, *x.shape))
    k, table = choose_num_clusters(a, b, candidates=(24, 3, 6, 12, 6, 1000))
    assert k == 6
    assert [row["k"] for row in table] == [3, 6, 12, 24]
    best = max(table, key=lambda row: row["score"])
    for row in table:
        if row["k"] < k:
            assert row["score"] < best["score"] - best["standard_error"]
    assert choose_num_clusters(a, b, candidates=(3, 6, 12, 24))[1] == table  # the same seed


def test_agreement_about_the_group_does_not_count():
    # Four corners of a square, two of them one group's: equal means and variances, so standardising leaves it.
    corner = np.arange(200) % 4
    x = np.array([[1, 1], [-1, -1], [1, -1], [-1, 1]])[corner] + 0.1 * np.random.default_rng(0).normal(
        size=(200, 2)
    )
    _, (row,) = choose_num_clusters(x, x, candidates=[4], groups=corner // 2)
    assert row["agreement"] > 0.99 and row["group_information"] > 0.6
    assert row["score"] == pytest.approx(row["agreement"] - row["group_information"])
    assert choose_num_clusters(x, x, candidates=[4])[1][0]["score"] > 0.99


def test_copies_of_different_length_are_refused():
    with pytest.raises(ValueError, match="same items"):
        choose_num_clusters(random(30, 3), random(31, 3), candidates=(2,))
    with pytest.raises(ValueError, match="candidates"):
        choose_num_clusters(random(30, 3), random(30, 3), candidates=(20,))


# ---- propagate_labels


def labelled_blobs(per_class=2, **kwargs):
    x, truth = blobs(**kwargs)
    labels = np.full(len(x), -1)
    for kind in np.unique(truth):
        labels[np.flatnonzero(truth == kind)[:per_class]] = kind
    return x, truth, labels


def closed_form(x, labels, classes, neighbors, alpha, power):
    """(1 - alpha) (I - alpha S)^-1 Y with dense matrices."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    near = np.argsort(-cosine, axis=1)[:, :neighbors]
    weights = np.zeros_like(cosine)
    np.put_along_axis(weights, near, np.maximum(np.take_along_axis(cosine, near, 1), 0) ** power, 1)
    weights = np.maximum(weights, weights.T)
    scale = 1 / np.sqrt(weights.sum(1))
    onehot = np.zeros((len(x), classes))
    onehot[labels >= 0, labels[labels >= 0]] = 1
    spread = np.linalg.solve(np.eye(len(x)) - alpha * scale[:, None] * weights * scale, (1 - alpha) * onehot)
    return spread / spread.sum(1, keepdims=True)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31 - 1), st.integers(3, 8), st.floats(0.1, 0.97), st.sampled_from([1.0, 8.0]))
def test_it_is_the_closed_form(seed, neighbors, alpha, power):
    x, _, labels = labelled_blobs(kinds=3, each=20, spread=3.0, seed=seed)
    got, _ = propagate_labels(x, labels, neighbors=neighbors, alpha=alpha, power=power)
    expected = closed_form(x, labels, 3, neighbors, alpha, power)
    reached = (labels < 0) & got.any(1) & np.isfinite(expected).all(1)
    np.testing.assert_allclose(got[reached], expected[reached], atol=2e-3)


def test_it_agrees_with_scikit_learn_on_easy_data():
    from sklearn.semi_supervised import LabelSpreading

    x, truth, labels = labelled_blobs(spread=1.0)
    ours = propagate_labels(x, labels)[0].argmax(1)
    theirs = LabelSpreading("knn", n_neighbors=10, alpha=0.95, max_iter=1000).fit(x, labels).transduction_
    assert (ours == truth).mean() >= (theirs == truth).mean() > 0.9


def test_rows_are_distributions_and_labelled_items_keep_their_label():
    x, _, labels = labelled_blobs(spread=2.0)
    distributions, confidences = propagate_labels(x, labels, num_classes=6)
    np.testing.assert_allclose(distributions.sum(1), 1, rtol=1e-5)
    assert distributions.shape == (120, 6) and not distributions[:, 4:].any()  # classes without labels
    known = labels >= 0
    np.testing.assert_array_equal(distributions[known], np.eye(6)[labels[known]])
    assert (confidences[known] == 1).all() and (confidences >= 0).all() and (confidences <= 1).all()


def test_the_order_of_items_and_the_names_of_classes_do_not_matter():
    x, _, labels = labelled_blobs(spread=2.0)
    base, _ = propagate_labels(x, labels)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_allclose(propagate_labels(x[order], labels[order])[0], base[order], atol=1e-4)
    renamed = np.where(labels >= 0, (labels + 1) % 4, -1)
    np.testing.assert_allclose(propagate_labels(x, renamed)[0], np.roll(base, 1, axis=1), atol=1e-4)


def test_items_that_no_label_reaches_get_rows_of_zeros():
    far = np.eye(3).repeat(20, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(60, 3))
    labels = np.full(60, -1)
    labels[[0, 20]] = 0, 1
    distributions, confidences = propagate_labels(np.abs(far), labels, neighbors=5)
    assert not distributions[40:].any() and not confidences[40:].any()
    assert distributions[:20, 0].min() > 0.99


def test_copies_of_one_item_and_single_classes_work():
    labels = np.array([0] + [-1] * 39)
    distributions, confidences = propagate_labels(np.ones((40, 3)), labels)
    assert np.isfinite(distributions).all() and (confidences[0], distributions[0, 0]) == (1, 1)


@pytest.mark.parametrize(
    ("labels", "more", "words"),
    [
        (np.full(9, -1), {}, "no item is labelled"),
        (np.zeros(8, int), {}, "9 integers"),
        (np.zeros(9), {}, "integers"),
        (np.full(9, 3), {"num_classes": 2}, "num_classes=2"),
        (np.zeros(9, int), {"alpha": 1.0}, "alpha"),
    ],
)
def test_bad_labels_are_named(labels, more, words):
    with pytest.raises(ValueError, match=words):
        propagate_labels(random(9, 2), labels, **more)


def test_cluster_targets_are_the_members_means():
    ids = np.array([0, 0, 1, 1, 2])
    clusters = Clusters(ids, np.zeros((4, 1)), np.zeros((5, 1)), np.zeros(5))
    spread = np.array([[1, 0], [0.5, 0.5], [0, 0], [0, 1], [0, 0]])
    targets = cluster_targets(clusters, spread)
    np.testing.assert_allclose(targets, [[0.75, 0.25], [0, 1], [0, 0], [0, 0]])
    with pytest.raises(ValueError, match="distributions"):
        cluster_targets(clusters, spread[:3])


# ---- label_queue


def test_medoids_come_first_by_cluster_size_then_the_least_sure():
    x, truth = blobs(kinds=3, each=20)
    keep = np.r_[0:20, 20:25, 40:50]  # sizes 20, 5, 10
    clusters = cluster_features(x[keep], 3, pca=2)
    probabilities = np.full((35, 3), 1 / 3)
    probabilities[:, 0] += np.linspace(0, 0.5, 35)  # the margin grows with the index
    queue = label_queue(clusters, probabilities)
    assert sorted(queue.tolist()) == list(range(35))
    assert truth[keep][queue[:3]].tolist() == [0, 2, 1]
    for item in queue[:3]:
        inside = clusters.ids == clusters.ids[item]
        pairwise = ((clusters.features[inside][:, None] - clusters.features[inside]) ** 2).sum((1, 2))
        assert np.flatnonzero(inside)[pairwise.argmin()] == item  # the medoid
    assert (np.diff(queue[3:]) > 0).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31 - 1), st.integers(1, 12), st.booleans())
def test_no_group_comes_twice_before_each_has_come(seed, count, some_labelled):
    rng = np.random.default_rng(seed)
    x, _ = blobs(each=10, spread=2.0)
    groups = [f"g{n}" for n in rng.integers(count, size=len(x))]
    labelled = rng.random(len(x)) < 0.1 if some_labelled else np.zeros(len(x), bool)
    queue = label_queue(cluster_features(x, 5), groups=groups, labelled=labelled)
    assert sorted(queue.tolist()) == np.flatnonzero(~labelled).tolist()
    known = {groups[i] for i in np.flatnonzero(labelled)}
    first = [groups[i] for i in queue[: len(set(groups) - known)]]
    assert set(first) == set(groups) - known


def test_labelled_clusters_are_covered_and_n_cuts():
    x, truth = blobs(kinds=4, each=10)
    clusters = cluster_features(x, 4, pca=3)
    labelled = np.zeros(40, bool)
    labelled[[0, 10]] = True
    assert set(truth[label_queue(clusters, labelled=labelled, n=2)]) == {2, 3}
    assert len(label_queue(clusters, n=7)) == 7
