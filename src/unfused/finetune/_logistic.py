"""Logistic regression with a penalty cross-validated on the labelled points: shared by the baselines."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

PENALTIES = tuple(10.0**exponent for exponent in range(-5, 2))  # of C, the inverse strength
DEFAULT_C = 0.01  # where there are too few points to choose
FOLDS = 5


def logistic(C: float) -> Pipeline:
    """Standardise, rotate, classify.

    With all components kept, PCA leaves the penalty and so the solution as they are, and shrinks thousands of
    features to as many as there are points.
    """
    return make_pipeline(StandardScaler(), PCA(svd_solver="full"), LogisticRegression(C=C, max_iter=1000))


def choose_penalty(x: np.ndarray, y: np.ndarray, groups: Any, seed: int) -> tuple[float, float]:
    """The C with the lowest cross-validated log loss, and that loss: infinite where there are no folds."""
    best, loss = lowest([_losses(x, y, train, test) for train, test in folds_of(y, groups, seed)])
    return (DEFAULT_C if best is None else PENALTIES[best]), loss


def lowest(losses: list[np.ndarray]) -> tuple[int | None, float]:
    """Which choice has the lowest mean loss, and that loss: None and infinity where there are no folds.

    Parameters
    ----------
    losses : list of arrays of shape (points, choices), one for each fold
    """
    if not losses:
        return None, float("inf")
    mean = np.concatenate(losses).mean(0)
    best = int(mean.argmin())
    return best, float(mean[best])


def check(x: Any, y: Any, name: str = "features") -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y)
    if x.ndim != 2 or len(x) != len(y):
        raise ValueError(f"{name} of shape {x.shape} with {len(y)} labels: give (n, d) and n labels")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} hold NaN or infinity: look at what made them")
    check_classes(y)
    return x, y


def check_classes(y: np.ndarray) -> None:
    if len(np.unique(y)) < 2:
        raise ValueError(f"labels have one class only ({y[0]!r}): at least 2 are needed")


def folds_of(y: np.ndarray, groups: Any, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    folds = min(FOLDS, int(np.unique(y, return_counts=True)[1].max()))
    whole = len(np.unique(groups)) if groups is not None else 0
    if folds < 2:
        return
    if whole > 1:  # whole groups: the penalty must suit an unseen one
        splits = StratifiedGroupKFold(min(folds, whole), shuffle=True, random_state=seed)
    else:
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a class with fewer points than folds is no mistake here
        found = list(splits.split(np.zeros(len(y)), y, groups if whole > 1 else None))
    for train, test in found:
        if len(np.unique(y[train])) > 1:
            yield train, test


def _losses(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Log loss of each test point (rows) for each penalty (columns)."""
    scale, rotate, classify = (step for _, step in logistic(DEFAULT_C).steps)
    seen = rotate.fit_transform(scale.fit_transform(x[train]))
    unseen = rotate.transform(scale.transform(x[test]))
    columns = []
    for C in PENALTIES:
        classify.set_params(C=C, warm_start=True).fit(seen, y[train])
        columns.append(losses_of(classify.predict_proba(unseen), classify.classes_, y[test]))
    return np.stack(columns, 1)


def losses_of(probabilities: np.ndarray, classes: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Log loss of each point; that of a class that was not in the training folds is the floor."""
    of_truth = (y[:, None] == classes) * probabilities
    return -np.log(np.maximum(of_truth.sum(1), 1e-6))
