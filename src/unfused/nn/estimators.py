"""Small parts of scikit-learn estimators: seeds from one source, labels of which some are unknown."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["check_whole", "draw_seed", "read_known", "seeded"]


def check_whole(estimator: Any, **least: int) -> None:
    """A ValueError unless these parameters are whole numbers, at least so large.

    Examples
    --------
    >>> from sklearn.cluster import KMeans
    >>> check_whole(KMeans(n_clusters=0), n_clusters=1)
    Traceback (most recent call last):
    ValueError: n_clusters=0: give a whole number from 1 on
    """
    for name, minimum in least.items():
        value = getattr(estimator, name)
        if not isinstance(value, int | np.integer) or value < minimum:
            raise ValueError(f"{name}={value!r}: give a whole number from {minimum} on")


def draw_seed(rng: Any) -> int:
    """An integer from a numpy RandomState, to seed something else with."""
    return int(rng.randint(2**31 - 1))


def seeded(model: Any, rng: Any) -> Any:
    """`model` with every `random_state` that is None set, nested ones too, so that one seed decides everything.

    Examples
    --------
    >>> from sklearn.cluster import KMeans
    >>> seeded(KMeans(), np.random.RandomState(0)).random_state is None, seeded(KMeans(random_state=3), None).random_state
    (False, 3)
    """
    parameters = model.get_params()
    free = [
        key for key, value in parameters.items() if key.split("__")[-1] == "random_state" and value is None
    ]
    return model.set_params(**{key: draw_seed(rng) for key in sorted(free)}) if free else model


def read_known(y: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The known classes in order, and the number of each row's class, -1 where it has no label.

    Parameters
    ----------
    y : array of shape (n,) or None
        -1 marks a row without label; NaN does too, and among strings None or "-1". None: no row has one.
    n : int
        Rows.

    Raises
    ------
    ValueError
        For another number of labels, several columns, numbers that are no classes, mixed kinds.

    Examples
    --------
    >>> read_known([7, -1, 3], 3)
    (array([3, 7]), array([ 1, -1,  0]))
    >>> read_known(["b", None, "a"], 3)[1].tolist()
    [1, -1, 0]
    """
    from sklearn.utils import column_or_1d
    from sklearn.utils.multiclass import check_classification_targets

    if y is None:
        return np.empty(0, dtype=int), np.full(n, -1)
    y = column_or_1d(y, warn=True)
    if len(y) != n:
        raise ValueError(
            f"y has {len(y)} labels for {n} rows of X: give one for each, -1 where it is unknown"
        )
    if y.dtype.kind == "O":
        import pandas as pd

        unknown = pd.isna(y) | (y == -1) | (y == "-1")
    elif y.dtype.kind in "US":
        unknown = y == ("-1" if y.dtype.kind == "U" else b"-1")
    else:
        unknown = (y == -1) | np.isnan(y) if y.dtype.kind == "f" else y == -1
    labels, codes = y[~unknown], np.full(n, -1)
    if not len(labels):
        return labels, codes
    try:
        classes, codes[~unknown] = np.unique(labels, return_inverse=True)
    except TypeError:
        raise ValueError(
            "y mixes labels that cannot be sorted: make them all strings or all numbers"
        ) from None
    check_classification_targets(labels)
    return classes, codes
