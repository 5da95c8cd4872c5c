from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unfused.workflow import arms
from unfused.workflow.arms import LABEL_SMOOTHING, Bench, Draw, PoolDataset, spread_targets
from unfused.workflow.modality import Inputs


def make_bench(features, truth, pool=None, test=None, groups=None, teacher_features=None):
    n = len(features)
    inputs = Inputs(np.zeros((n, 1, 8, 8), np.float32), np.arange(n), {"mean": 0.0, "std": 1.0})
    modality = SimpleNamespace(
        name="audio", classic_on_one_scale=False, classic_features=lambda corpus: features
    )
    return Bench(
        modality=modality,
        corpus=[None] * n,
        inputs=inputs,
        pool=np.ones(n, bool) if pool is None else pool,
        test=np.zeros(n, bool) if test is None else test,
        classes=["a", "b", "c"],
        groups=groups,
        truth=truth,
        steps={"distil": 2, "fine_tune": 2, "supervised": 4},
        seed=0,
        features=teacher_features,
    )


@pytest.fixture
def blobs():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(3), 40)
    return rng.normal(0, 0.3, (120, 6)) + np.eye(6)[truth] * 3, truth


def draw_of(truth, rows):
    labels = np.full(len(truth), -1)
    labels[rows] = truth[rows]
    return Draw(0, labels)


def test_spread_targets_are_smoothed_classes_that_keep_every_visible_label(blobs):
    features, truth = blobs
    draw = draw_of(truth, [0, 1, 40, 41, 80, 81])
    targets, details = spread_targets(make_bench(features, truth), draw)
    assert targets.shape == (120, 3)
    taught = targets.any(1)
    np.testing.assert_allclose(targets[taught].sum(1), 1, rtol=1e-5)
    assert taught.mean() == pytest.approx(details["targets_taught"]) and taught[draw.visible].all()
    assert set(np.unique(targets[taught].round(6))) == {
        np.float32(round(LABEL_SMOOTHING / 3, 6)),
        np.float32(round(1 - LABEL_SMOOTHING + LABEL_SMOOTHING / 3, 6)),
    }
    assert (targets.argmax(1)[draw.visible] == truth[draw.visible]).all()
    assert taught.mean() > 0.8 and details["targets_correct"] > 0.95


def test_clips_that_the_labels_do_not_decide_get_no_target():
    """Two classes' labels on one and the same blob: its other clips are not taught either of them."""
    rng = np.random.default_rng(0)
    features = rng.normal(0, 0.3, (60, 6)) + np.eye(6)[0] * 3
    labels = np.full(60, -1)
    labels[:10:2], labels[1:10:2] = 0, 1
    targets, details = spread_targets(make_bench(features, np.zeros(60, int)), Draw(0, labels))
    assert details["targets_taught"] < 0.7 and targets[:10].any(1).all()


def test_a_wrong_visible_label_is_kept_as_the_person_gave_it(blobs):
    features, truth = blobs
    draw = draw_of(truth, [0, 1, 40, 41, 80, 81])
    draw.labels[0] = 2
    targets, _ = spread_targets(make_bench(features, truth), draw)
    assert targets[0].argmax() == 2


def test_targets_cover_the_pool_and_nothing_else(blobs):
    features, truth = blobs
    pool = np.arange(120) % 4 != 3
    draw = draw_of(truth, [0, 1, 40, 41, 80, 81])
    targets, _ = spread_targets(make_bench(features, truth, pool=pool), draw)
    assert len(targets) == pool.sum()


def test_held_out_labels_do_not_reach_the_targets(blobs):
    """The truth of hidden clips only enters the report's `targets_correct`."""
    features, truth = blobs
    draw = draw_of(truth, [0, 1, 40, 41, 80, 81])
    first, _ = spread_targets(make_bench(features, truth), draw)
    shuffled = np.where(draw.visible, truth, np.random.default_rng(1).permutation(truth))
    second, _ = spread_targets(make_bench(features, shuffled), draw)
    np.testing.assert_array_equal(first, second)


def test_the_graph_that_recovers_hidden_labels_is_chosen(blobs):
    features, truth = blobs
    noise = np.random.default_rng(2).normal(size=(120, 6))
    draw = draw_of(truth, [0, 1, 2, 40, 41, 42, 80, 81, 82])
    _, details = spread_targets(make_bench(noise, truth, teacher_features=features), draw)
    assert not details["graph"].startswith("classic")
    assert details["recovered"]["teacher, 10 neighbours"] > details["recovered"]["classic, 10 neighbours"]


def test_group_offsets_are_removed_before_the_graph(blobs):
    features, truth = blobs
    groups = np.array(["x", "y"])[np.arange(120) % 2]
    shifted = features + np.where(groups == "y", 40.0, 0.0)[:, None]
    draw = draw_of(truth, [0, 2, 40, 42, 80, 82])  # labels in group x alone
    targets, _ = spread_targets(make_bench(shifted, truth, groups=groups), draw)
    taught = targets.any(1)
    assert taught.mean() > 0.8 and (targets.argmax(1) == truth)[taught].mean() > 0.95


def test_pool_dataset_reads_only_the_rows_of_a_batch():
    values = np.arange(10, dtype=np.float32)[:, None]
    data = PoolDataset(values, np.array([2, 5, 7]), labels=torch.tensor([0, 1, 2]))
    batch = data.__getitems__([2, 0])
    assert (
        len(data) == 3
        and batch["input_values"].flatten().tolist() == [7, 2]
        and batch["labels"].tolist() == [2, 0]
    )


def test_inputs_pool_windows_to_clips():
    inputs = Inputs(np.zeros((4, 1, 1, 1)), np.array([0, 0, 1, 2]), {})
    np.testing.assert_allclose(inputs.pool(np.array([[1.0], [3.0], [5.0], [7.0]]), 3), [[2], [5], [7]])
    assert inputs.of(np.array([True, False, True])).tolist() == [0, 1, 3]


def test_expand_puts_columns_where_the_classes_are():
    model = SimpleNamespace(classes_=np.array([0, 2]), predict_proba=lambda x: np.array([[0.3, 0.7]]))
    np.testing.assert_allclose(arms._expand(model, [None], 3), [[0.3, 0, 0.7]])
