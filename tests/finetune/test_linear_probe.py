import numpy as np
import pytest
import torch

from unfused.finetune import as_linear, fit_linear_probe


def blobs(classes: int, per_class: int, dim: int, distance: float = 3.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), per_class)
    return rng.normal(size=(classes, dim))[y] * distance / np.sqrt(dim) * 2 + rng.normal(
        size=(len(y), dim)
    ), y


def test_separates_blobs_with_more_dimensions_than_points():
    x, y = blobs(5, 10, 300, distance=8)
    probe = fit_linear_probe(x[::2], y[::2])
    assert (probe.predict(x[1::2]) == y[1::2]).mean() > 0.9


@pytest.mark.parametrize("classes", [2, 4])
def test_as_linear_gives_the_same_probabilities(classes):
    x, y = blobs(classes, 8, 50)
    x[:, 3] = 7.0  # a constant feature must not divide by zero
    probe = fit_linear_probe(x, y)
    linear = as_linear(probe)(torch.tensor(x, dtype=torch.float32)).softmax(-1).detach().numpy()
    np.testing.assert_allclose(linear, probe.predict_proba(x), atol=1e-5)


def test_rotation_does_not_change_the_solution():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from unfused.finetune._logistic import logistic

    x, y = blobs(3, 7, 60)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, tol=1e-8, max_iter=10_000)).fit(x, y)
    ours = logistic(0.03).set_params(logisticregression__tol=1e-8).fit(x, y)
    test = np.random.default_rng(1).normal(size=(20, 60))
    np.testing.assert_allclose(ours.predict_proba(test), plain.predict_proba(test), atol=1e-4)


def test_noise_gets_a_stronger_penalty_than_signal():
    from unfused.finetune._logistic import choose_penalty

    x, y = blobs(4, 12, 40, distance=8)
    noise = np.random.default_rng(2).normal(size=x.shape)
    assert choose_penalty(noise, y, None, 0)[0] < choose_penalty(x, y, None, 0)[0]


def test_same_seed_same_model_and_only_labelled_points_count():
    x, y = blobs(3, 10, 20)
    one, two = fit_linear_probe(x, y, seed=3), fit_linear_probe(x.copy(), y, seed=3)
    assert np.array_equal(one.predict_proba(x), two.predict_proba(x))


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 5, 5], [2, 2, 2]])
def test_works_with_hardly_any_labels(counts):
    x, y = blobs(3, 5, 20)
    keep = np.concatenate([np.flatnonzero(y == c)[:n] for c, n in enumerate(counts)])
    probe = fit_linear_probe(x[keep], y[keep])
    assert list(probe.classes_) == [0, 1, 2] and np.isfinite(probe.predict_proba(x)).all()


def test_groups_are_never_on_both_sides_of_a_fold():
    from unfused.finetune._logistic import folds_of

    y, groups = np.arange(40) % 4, np.repeat(list("abcde"), 8)
    folds = list(folds_of(y, groups, 0))
    assert len(folds) == 5
    assert all(not set(groups[train]) & set(groups[test]) for train, test in folds)
    assert len(list(folds_of(y, np.repeat("a", 40), 0))) == 5  # one group only: plain folds
    assert len(list(folds_of(y[:12], np.arange(12), 0))) == 3  # no more folds than points of a class


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((4, 2)), [0, 0, 0, 0], "one class only"),
        (np.full((4, 2), np.nan), [0, 1, 0, 1], "NaN"),
        (np.zeros((4, 2)), [0, 1], "2 labels"),
    ],
)
def test_mistakes_are_named(x, y, message):
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(x, y)
