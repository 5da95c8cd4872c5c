"""What scikit-learn promises of an estimator, for every estimator of the family.

A module's own file `cases/NAME.py` holds `ESTIMATORS = [(estimator, {name of an exempted check: reason})]`: small settings,
so that a fit takes milliseconds, and one entry for every variant that takes another path. An estimator that is not on arrays
(it reads files, say) is named in `ELSEWHERE = {class name: reason}` instead.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone, is_classifier, is_clusterer, is_regressor
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

import unfused.label

CASES = Path(__file__).parent / "cases"


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"label_case_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = [load(path) for path in sorted(CASES.glob("*.py"))]
PAIRS = [pair for module in MODULES for pair in getattr(module, "ESTIMATORS", [])]
ELSEWHERE = {name: why for module in MODULES for name, why in getattr(module, "ELSEWHERE", {}).items()}
EXEMPT = {id(estimator): reasons for estimator, reasons in PAIRS}
EACH = pytest.mark.parametrize(
    "estimator", [e for e, _ in PAIRS], ids=lambda e: " ".join(repr(e).split())[:60]
)


@parametrize_with_checks(
    [estimator for estimator, _ in PAIRS], expected_failed_checks=lambda estimator: EXEMPT[id(estimator)]
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_exempted_checks_exist_and_say_why():
    for estimator, reasons in PAIRS:
        for check, reason in reasons.items():
            assert callable(getattr(estimator_checks, check, None)), (
                f"{estimator}: no check is called {check}"
            )
            assert len(reason.split()) > 3, f"{estimator}: {check} needs a reason"


def test_every_estimator_has_a_case():
    named = {type(estimator).__name__ for estimator, _ in PAIRS}
    public = {name: getattr(unfused.label, name) for name in unfused.label.__all__}
    estimators = {
        name for name, value in public.items() if inspect.isclass(value) and issubclass(value, BaseEstimator)
    }
    missing = estimators - named - ELSEWHERE.keys()
    assert not missing, f"cases/ has nothing on {', '.join(sorted(missing))}"


def data(estimator: Any, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(rows) % 3
    return rng.normal(size=(rows, 5)) + 4 * np.eye(3, 5)[y], y


@EACH
def test_it_clones_and_shows_itself(estimator):
    copy = clone(estimator)
    assert repr(copy) == repr(estimator)
    assert "Parameters" in inspect.getdoc(type(estimator)) and "Examples" in inspect.getdoc(type(estimator))
    for name in estimator.get_params(deep=False):
        assert name in inspect.getdoc(type(estimator)), f"{name} is not in the docstring"


@EACH
def test_it_works_in_a_pipeline_a_grid_search_and_cross_validation(estimator):
    if not is_classifier(estimator):
        pytest.skip("not a classifier")
    X, y = data(estimator)
    names = np.array(["ant", "bee", "cow"])[y]
    pipeline = make_pipeline(StandardScaler(), clone(estimator))
    assert cross_val_score(pipeline, X, names, cv=3, error_score="raise").mean() > 0.6
    step = pipeline.steps[-1][0]
    name, value = next(iter(sorted(estimator.get_params(deep=False).items())))
    search = GridSearchCV(pipeline, {f"{step}__{name}": [value]}, cv=3, error_score="raise").fit(X, names)
    assert set(search.predict(X)) <= set(names)


@EACH
@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_it_knows_the_names_of_a_table_s_columns(estimator, library):
    frames = pytest.importorskip(library)
    X, y = data(estimator)
    columns = [f"column {i}" for i in range(X.shape[1])]
    frame = frames.DataFrame(dict(zip(columns, X.T, strict=True)))
    fitted = clone(estimator).fit(frame, y)
    assert list(fitted.feature_names_in_) == columns and fitted.n_features_in_ == len(columns)
    if hasattr(fitted, "predict"):
        assert np.array_equal(fitted.predict(frame), clone(estimator).fit(X, y).predict(X))
        with pytest.raises(ValueError, match="feature names"):
            fitted.predict(frame[columns[::-1]])
    if hasattr(fitted, "set_output") and hasattr(fitted, "transform"):
        out = fitted.set_output(transform=library).transform(frame)
        assert isinstance(out, frames.DataFrame)


@EACH
def test_it_refuses_nan_and_infinity_and_no_rows(estimator):
    X, y = data(estimator)
    for bad in (np.nan, np.inf):
        broken = X.copy()
        broken[3, 2] = bad
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            clone(estimator).fit(broken, y)
    with pytest.raises(ValueError, match="0 sample"):
        clone(estimator).fit(X[:0], y[:0])


@EACH
def test_fitting_twice_gives_the_same(estimator):
    X, y = data(estimator)
    one, two = clone(estimator).fit(X, y), clone(estimator).fit(X, y)
    assert not is_regressor(one)
    if is_clusterer(one):
        assert np.array_equal(one.labels_, two.labels_)
    elif hasattr(one, "predict_proba"):
        assert np.allclose(one.predict_proba(X), two.predict_proba(X), atol=1e-8)
