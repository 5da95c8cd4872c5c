"""Saved estimators: they come back the same, nothing is pickled, no code in a file runs, a kill spoils nothing."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import sklearn
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC

import unfused.label
from unfused.data import estimator_io
from unfused.data.estimator_io import load, save
from unfused.label import GDAClassifier, MAdapterClassifier, TFUPTClassifier


def cases():
    found = []
    for path in sorted((Path(__file__).parent / "cases").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"label_io_case_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [estimator for estimator, _ in getattr(module, "ESTIMATORS", [])]
    return found


def data(rows=60):
    rng = np.random.default_rng(0)
    y = np.arange(rows) % 3
    return rng.normal(size=(rows, 5)) + 4 * np.eye(3, 5)[y], y


def same(one, two, X):
    for method in ("decision_function", "predict_proba", "transform", "predict"):
        if hasattr(one, method):
            try:
                expected = getattr(one, method)(X)
            except (ValueError, TypeError):  # it needs more than X
                continue
            found = getattr(two, method)(X)
            assert np.asarray(found).dtype == np.asarray(expected).dtype
            assert np.array_equal(found, expected), method


def equal(one, two):
    """Deeply the same, types included."""
    assert type(one) is type(two), (one, two)
    if isinstance(one, BaseEstimator):
        one, two = one.__getstate__(), two.__getstate__()
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            equal(a, b)
    elif isinstance(one, np.ndarray):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert np.array_equal(np.ma.getmaskarray(one), np.ma.getmaskarray(two))
        if one.dtype.kind == "O":
            equal(one.tolist(), two.tolist())
        else:
            np.testing.assert_array_equal(one, two)
    elif sp.issparse(one):
        assert one.format == two.format and (one != two).nnz == 0
    elif hasattr(one, "__dict__") and not isinstance(one, type):
        pass
    else:
        assert one == two or (one != one and two != two)


@pytest.mark.parametrize("estimator", cases(), ids=lambda e: " ".join(repr(e).split())[:60])
def test_every_estimator_of_the_family_comes_back(estimator, tmp_path):
    X, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = np.array(["ant", "bee", "cow"])[y] if is_classifier(estimator) else y
        fitted = clone(estimator).fit(X, labels)
        again = load(save(fitted, tmp_path / "fitted"))
        same(fitted, again, X)
        equal(fitted, again)
        assert repr(again) == repr(fitted) and again.n_features_in_ == 5
        bare = load(save(clone(estimator), tmp_path / "bare"))
        assert repr(bare) == repr(estimator)
        assert repr(clone(again)) == repr(estimator)
    assert {p.suffix for p in (tmp_path / "fitted").iterdir()} <= {".json", ".safetensors"}


@pytest.mark.parametrize(
    "nested",
    [
        MLPClassifier((4,), max_iter=5, random_state=np.random.RandomState(3)),
        KMeans(3, n_init=1, random_state=0),
        LogisticRegression(),
        GaussianNB(),
        SVC(probability=False),
        make_pipeline(StandardScaler(), PCA(2), LogisticRegression()),
        make_column_transformer((StandardScaler(), [0, 1]), (OneHotEncoder(), [2]), remainder="passthrough"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_scikit_learn_estimators_on_the_list(nested, tmp_path):
    X, y = data()
    X[:, 2] = X[:, 2].round()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = clone(nested).fit(X, y)
        again = load(save(fitted, tmp_path))
        same(fitted, again, X)
        same(
            clone(again).fit(X, y), clone(again).fit(X, y), X[:0] if isinstance(nested, MLPClassifier) else X
        )


def test_a_pipeline_with_names_routing_and_output_settings(tmp_path):
    pandas = pytest.importorskip("pandas")
    X, y = data()
    frame = pandas.DataFrame(X, columns=list("abcde"))
    W = np.eye(3, 5)
    with sklearn.config_context(enable_metadata_routing=True):
        inner = GDAClassifier(W, classes=["x", "y", "z"]).set_fit_request(groups=True, sample_weight=False)
        pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), inner).fit(
            frame, np.array(list("xyz"))[y]
        )
        again = load(save(pipeline, tmp_path))
        assert again[-1].get_metadata_routing()._serialize() == inner.get_metadata_routing()._serialize()
    assert list(again.feature_names_in_) == list("abcde")
    assert list(again[0].transform(frame).columns) == list("abcde")
    same(pipeline, again, frame)
    with pytest.raises(TypeError, match=r"Pipeline.memory is a cache of pickles"):
        save(pipeline.set_params(memory="somewhere"), tmp_path)


def test_values_of_all_kinds_come_back(tmp_path):
    clf = GDAClassifier()
    clf.values_ = {
        "scalars": [
            None,
            True,
            3,
            2.5,
            "text \udce9",
            np.float32(0.1),
            np.int64(7),
            np.bool_(True),
            np.str_("s"),
        ],
        "not finite": [float("nan"), float("inf"), -float("inf")],
        "arrays": [np.arange(6, dtype=t).reshape(2, 3) for t in ("i1", "u2", "f2", "f4", ">f8", "i8")],
        "odd": [np.zeros((0, 3)), np.array(5.0), np.array([True, False]), np.asfortranarray(np.ones((2, 3)))],
        "texts": [
            np.array(["a", "long"]),
            np.array([["a", None, 3]], dtype=object),
            np.array([], dtype="U1"),
        ],
        "masked": np.ma.MaskedArray([1.0, 2.0], [False, True]),
        "sparse": [sp.csr_matrix(np.eye(3)), sp.csc_array(np.eye(2))],
        "containers": [
            (1, (2,)),
            {3, 4},
            {1: "int key", "a": {"$": "array"}, (1, 2): None},
            slice(1, None),
            range(3),
        ],
        "types": [np.dtype("f4"), np.float64, Path("some/where")],
    }
    clf.rng_ = np.random.default_rng(5)
    clf.state_ = np.random.RandomState(5)
    again = load(save(clf, tmp_path))
    for name, value in clf.values_.items():
        if name == "arrays":
            value = [a.astype(a.dtype.newbyteorder("=")) for a in value]
        equal(value, again.values_[name])
    assert np.array_equal(again.rng_.random(3), np.random.default_rng(5).random(3))
    assert np.array_equal(again.state_.rand(3), np.random.RandomState(5).rand(3))


def test_one_array_is_stored_once(tmp_path):
    X, y = data()
    W = np.random.default_rng(0).normal(size=(3, 5))
    clf = MAdapterClassifier(W).fit(X, y)
    clf.copy_ = clf.keys_
    again = load(save(clf, tmp_path))
    assert again.copy_ is again.keys_


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (len, "GDAClassifier.odd_ is a builtins.builtin_function_or_method"),
        ([1, {"f": np.exp}], r"GDAClassifier.odd_\[1\]\['f'\] is a numpy.ufunc"),
        (
            RandomForestClassifier(),
            "odd_ is a sklearn.ensemble._forest.RandomForestClassifier, which cannot be saved",
        ),
        (FunctionTransformer(np.exp), "odd_.func is a numpy.ufunc"),
        (np.array(["2020-01-01"], "M8[D]"), r"odd_ is an array of datetime64\[D\]"),
        (1j, "odd_ is a builtins.complex"),
    ],
)
def test_what_is_not_data_is_refused_and_the_old_one_stays(value, message, tmp_path):
    save(GDAClassifier(alpha=3.0), tmp_path)
    clf = GDAClassifier()
    clf.odd_ = value
    with pytest.raises(TypeError, match=message):
        save(clf, tmp_path)
    assert load(tmp_path).alpha == 3.0


def test_an_estimator_of_someone_else_is_refused(tmp_path):
    class GDAClassifier(BaseEstimator):  # the name alone does not do
        pass

    with pytest.raises(TypeError, match=r"GDAClassifier is a .*test_io.GDAClassifier, which cannot be saved"):
        save(GDAClassifier(), tmp_path)


def edit(folder, change):
    path = folder / "estimator.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["estimator"].update({"class": "os.system"}), "class 'os.system' is not one"),
        (lambda r: r["estimator"].update({"class": "sklearn.RandomForestClassifier"}), "RandomForestClassifier' is not one"),
        (lambda r: r["estimator"].update({"class": "unfused.label.encode_views"}), "encode_views' is not one"),
        (lambda r: r["estimator"].update({"class": "unfused.label.__class__"}), "is not one"),
        (lambda r: r["estimator"]["parameters"].update({"strange": 1}), "has no parameter 'strange' here"),
        (lambda r: r["estimator"].pop("state"), "damaged"),
        (lambda r: r["estimator"]["state"].update({"x_": {"$": "code"}}), "damaged"),
        (lambda r: r["estimator"]["state"].update({"x_": {"$": "array", "name": "99"}}), "damaged"),
        (lambda r: r.update(format=99), "saved by a newer unfused"),
        (lambda r: r.update(arrays="../other.safetensors"), "is missing"),
        (lambda r: r.update(estimator=[]), "damaged"),
        (lambda r: r.pop("estimator"), "not the file of a saved estimator"),
    ],
)  # fmt: skip
def test_a_file_that_was_tampered_with(change, message, tmp_path):
    X, y = data()
    save(GDAClassifier().fit(X, y), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_damage_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"no saved estimator is here \(estimator.json is missing\)"):
        load(tmp_path)
    X, y = data()
    save(GDAClassifier().fit(X, y), tmp_path)
    (arrays,) = tmp_path.glob("*.safetensors")
    content = bytearray(arrays.read_bytes())
    content[-1] ^= 1
    arrays.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="its content is not what was saved"):
        load(tmp_path)
    arrays.unlink()
    with pytest.raises(ValueError, match="is missing"):
        load(tmp_path)
    (tmp_path / "estimator.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(tmp_path)


def test_a_kill_before_the_last_rename_leaves_the_old_one(tmp_path, monkeypatch):
    X, y = data()
    old = GDAClassifier().fit(X, y)
    save(old, tmp_path)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(estimator_io, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            save(GDAClassifier().fit(2 - X, y), tmp_path)
    same(old, load(tmp_path), X)
    new = GDAClassifier().fit(2 - X, y)
    save(new, tmp_path)
    same(new, load(tmp_path), X)
    assert len(list(tmp_path.iterdir())) == 2  # what the killed one left is gone


def test_another_scikit_learn_is_said_where_it_matters(tmp_path):
    X, y = data()
    for estimator, warned in (
        (GDAClassifier().fit(X, y), False),
        (make_pipeline(StandardScaler(), GDAClassifier()).fit(X, y), True),
    ):
        save(estimator, tmp_path)
        edit(tmp_path, lambda r: r["versions"].update({"scikit-learn": "1.2.3"}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(tmp_path)
        assert bool(caught) == warned


def test_nested_settings_and_further_training(tmp_path):
    X, y = data()
    clf = TFUPTClassifier(
        np.eye(3, 5), tfup=unfused.label.TFUPClassifier(beta=4.0), epochs=2, warmup_epochs=1, random_state=0
    )
    again = load(save(clf.fit(X), tmp_path))
    assert again.tfup.beta == again.tfup_.beta == 4.0
    half = GDAClassifier().partial_fit(X[:30], y[:30], classes=[0, 1, 2])
    rest = load(save(half, tmp_path)).partial_fit(X[30:], y[30:])
    assert np.allclose(rest.coef_, GDAClassifier().fit(X, y).coef_)


def test_the_family_offers_it():
    assert unfused.label.save is save and unfused.label.load is load
    assert {"save", "load"} <= set(unfused.label.__all__)
