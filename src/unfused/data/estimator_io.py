"""Saved estimators that are not pickles: arrays in safetensors, everything else in JSON.

    folder/estimator.json              class, parameters and learned attributes, as a tree of plain values
    folder/arrays-DIGEST.safetensors   the arrays in it

Loading a file runs no code of it: an estimator is built by a class of `unfused.label` or of a short list of scikit-learn's,
looked up by name there and nowhere else, and its attributes are numbers, texts, arrays and further such estimators. What is
anything else (a function, a tree of scikit-learn's, a torch module) is refused when saving. The JSON is renamed into place
last and names the arrays by their digest, so that a kill leaves the old estimator or the new one.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import warnings
from collections import UserList
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from unfused.data.files import atomic_write, digest, printable, read_json, write_json

__all__ = ["load", "save"]

FORMAT = 1
FILE = "estimator.json"
SCIKIT_LEARN = {  # whose attributes are arrays, numbers and texts
    "cluster": ("AgglomerativeClustering", "Birch", "KMeans", "MiniBatchKMeans", "SpectralClustering"),
    "compose": ("ColumnTransformer",),
    "decomposition": ("NMF", "PCA", "TruncatedSVD"),
    "discriminant_analysis": ("LinearDiscriminantAnalysis", "QuadraticDiscriminantAnalysis"),
    "feature_extraction.text": ("TfidfTransformer",),
    "feature_selection": ("SelectKBest", "VarianceThreshold"),
    "impute": ("MissingIndicator", "SimpleImputer"),
    "linear_model": (
        "LogisticRegression",
        "LogisticRegressionCV",
        "Perceptron",
        "RidgeClassifier",
        "RidgeClassifierCV",
        "SGDClassifier",
    ),
    "mixture": ("GaussianMixture",),
    "naive_bayes": ("BernoulliNB", "GaussianNB", "MultinomialNB"),
    "neighbors": ("NearestCentroid",),
    "neural_network": ("MLPClassifier",),
    "pipeline": ("FeatureUnion", "Pipeline"),
    "preprocessing": (
        "FunctionTransformer",  # of a ColumnTransformer that passes columns through; its function is refused
        "LabelBinarizer",
        "LabelEncoder",
        "MaxAbsScaler",
        "MinMaxScaler",
        "Normalizer",
        "OneHotEncoder",
        "OrdinalEncoder",
        "PowerTransformer",
        "QuantileTransformer",
        "RobustScaler",
        "StandardScaler",
    ),
    "svm": ("LinearSVC", "SVC"),
}
# Of use to further training only; it starts anew without them.
LEFT_OUT = {"MLPClassifier": {"_optimizer"}, "SGDClassifier": {"loss_function_", "_loss_function_"}}
# A folder whose files scikit-learn unpickles.
NEVER = {"Pipeline": {"memory"}, "AgglomerativeClustering": {"memory"}}
_KINDS = "biuf"


def save(estimator: Any, path: str | os.PathLike[str]) -> Path:
    """Write an estimator, fitted or not, into a folder.

    Parameters
    ----------
    estimator : estimator of `unfused.label`, or a scikit-learn Pipeline, scaler, ... with one inside
    path : path
        Folder; made if missing. An estimator that is there is replaced.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    TypeError
        If it holds something that is not data; the message names the attribute.

    Examples
    --------
    >>> import tempfile
    >>> from unfused.label import GDAClassifier
    >>> X, y = np.random.default_rng(0).normal(size=(20, 4)), np.array(["hum", "hiss"] * 10)
    >>> clf = GDAClassifier().fit(X, y)
    >>> folder = save(clf, tempfile.mkdtemp())
    >>> bool((load(folder).predict(X) == clf.predict(X)).all())
    True
    """
    from safetensors.numpy import save as to_bytes

    arrays: dict[str, np.ndarray] = {}
    tree = _Writer(arrays).estimator(estimator, type(estimator).__name__)
    folder = Path(path)
    record: dict[str, Any] = {"format": FORMAT, "versions": _versions(), "arrays": None, "estimator": tree}
    if arrays:
        content = to_bytes(arrays)
        name = f"arrays-{hashlib.blake2b(content, digest_size=20).hexdigest()}.safetensors"
        with atomic_write(folder / name, "wb") as file:
            file.write(content)
        record["arrays"] = name
    write_json(folder / FILE, record)
    for old in folder.glob("arrays-*.safetensors"):
        if old.name != record["arrays"]:
            old.unlink(missing_ok=True)
    return folder


def load(path: str | os.PathLike[str]) -> Any:
    """The estimator that `save` wrote into a folder.

    Parameters
    ----------
    path : path
        The folder.

    Raises
    ------
    ValueError
        If there is none, it is damaged, of a newer format, or of a class that is not on the list.
    """
    folder = Path(path)
    if not (folder / FILE).is_file():
        raise ValueError(f"{printable(folder)}: no saved estimator is here ({FILE} is missing)")
    record = read_json(folder / FILE)
    if not isinstance(record, dict) or not isinstance(record.get("format"), int) or "estimator" not in record:
        raise ValueError(f"{printable(folder / FILE)}: not the file of a saved estimator")
    if record["format"] > FORMAT:
        raise ValueError(
            f"{printable(folder)}: saved by a newer unfused (format {record['format']}): upgrade unfused"
        )
    arrays = _arrays(folder, record.get("arrays"))
    reader = _Reader(arrays, printable(folder))
    try:
        found = reader.estimator(record["estimator"])
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{printable(folder)}: damaged ({type(error).__name__}: {error})") from error
    saved, here = record.get("versions", {}).get("scikit-learn", ""), _versions()["scikit-learn"]
    if reader.scikit_learn and saved.split(".")[:2] != here.split(".")[:2]:
        warnings.warn(f"{folder}: saved with scikit-learn {saved}, loaded with {here}", stacklevel=2)
    return found


def _arrays(folder: Path, name: Any) -> dict[str, np.ndarray]:
    if name is None:
        return {}
    from safetensors import safe_open

    path = folder / str(name)
    if PurePath(str(name)).name != name or not path.is_file():
        raise ValueError(f"{printable(folder)}: damaged ({printable(str(name))} is missing)")
    if f"arrays-{digest(path)}.safetensors" != name:
        raise ValueError(f"{printable(path)}: damaged (its content is not what was saved)")
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import unfused

    return {"unfused": unfused.__version__, "scikit-learn": version("scikit-learn"), "numpy": np.__version__}


def _label_class(name: str) -> type | None:
    """A class that `unfused.label` exports."""
    family = importlib.import_module("unfused.label")
    found = getattr(family, name) if name in family.__all__ else None
    return found if isinstance(found, type) and hasattr(found, "get_params") else None


def _scikit_learn_class(name: str) -> type | None:
    module = next((module for module, names in SCIKIT_LEARN.items() if name in names), None)
    return None if module is None else getattr(importlib.import_module(f"sklearn.{module}"), name)


class _Writer:
    """Values to JSON; every value that JSON has no word for becomes `{"$": kind, ...}`."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.seen: dict[int, tuple[Any, str]] = {}  # the array is kept so that its id is not given to another

    def estimator(self, value: Any, where: str) -> dict[str, Any]:
        cls = type(value)
        if _label_class(cls.__name__) is cls:
            family = "unfused.label"
        elif _scikit_learn_class(cls.__name__) is cls:
            family = "sklearn"
        else:
            raise TypeError(
                f"{where} is a {cls.__module__}.{cls.__name__}, which cannot be saved without pickle: only estimators of "
                f"unfused.label and these of scikit-learn can: {', '.join(sorted(sum(SCIKIT_LEARN.values(), ())))}"
            )
        parameters = value.get_params(deep=False)
        state = value.__getstate__()
        skipped = (
            parameters.keys() | LEFT_OUT.get(cls.__name__, set()) | {"_sklearn_version", "_metadata_request"}
        )
        for name in NEVER.get(cls.__name__, set()):
            if parameters.get(name) is not None:
                raise TypeError(f"{where}.{name} is a cache of pickles: set it to None before saving")
        tree = {
            "$": "estimator",
            "class": f"{family}.{cls.__name__}",
            "parameters": {name: self(item, f"{where}.{name}") for name, item in parameters.items()},
            "state": {
                name: self(item, f"{where}.{name}") for name, item in state.items() if name not in skipped
            },
        }
        if requests := getattr(value, "_metadata_request", None):
            tree["requests"] = {m: self(r, where) for m, r in requests._serialize().items()}
        return tree

    def __call__(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$": "float", "value": repr(value)}
        if isinstance(value, np.ma.MaskedArray):
            mask = np.ma.getmaskarray(value)
            return {
                "$": "masked",
                "data": self(value.filled(_filler(value)), where),
                "mask": self(mask, where),
            }
        if isinstance(value, np.ndarray):
            return self.array(value, where)
        if isinstance(value, np.generic):
            return {"$": "scalar", "value": self.array(np.asarray(value), where)}
        if isinstance(value, list | tuple | set | frozenset | UserList):
            kind = {tuple: "tuple", set: "set", frozenset: "set"}.get(type(value), "list")
            items = [self(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return items if kind == "list" else {"$": kind, "items": items}
        if isinstance(value, Mapping):
            pairs = [[self(key, where), self(item, f"{where}[{key!r}]")] for key, item in value.items()]
            return {"$": "dict", "items": pairs}
        if isinstance(value, slice):
            return {
                "$": "slice",
                "items": [self(part, where) for part in (value.start, value.stop, value.step)],
            }
        if isinstance(value, range):
            return {"$": "range", "items": [value.start, value.stop, value.step]}
        if isinstance(value, PurePath):
            return {"$": "path", "value": str(value)}
        if isinstance(value, np.dtype):
            return {"$": "dtype", "value": value.str}
        if isinstance(value, type) and issubclass(value, np.generic):
            return {"$": "numpy type", "value": value.__name__}
        if isinstance(value, np.random.RandomState):
            return {"$": "random state", "value": self(value.get_state(), where)}
        if isinstance(value, np.random.Generator):
            state = value.bit_generator.state
            return {
                "$": "generator",
                "class": type(value.bit_generator).__name__,
                "value": self(state, where),
            }
        if hasattr(value, "tocsr") and hasattr(value, "nnz"):
            rows = value.tocsr()
            parts = [self(part, where) for part in (rows.data, rows.indices, rows.indptr, tuple(rows.shape))]
            return {
                "$": "sparse",
                "array": not hasattr(value, "getrow"),
                "format": value.format,
                "items": parts,
            }
        if hasattr(value, "get_params") and not isinstance(value, type):
            return self.estimator(value, where)
        if hasattr(value, "detach") and hasattr(value, "numpy"):
            return {"$": "tensor", "value": self.array(value.detach().cpu().numpy(), where)}
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__name__}: only numbers, texts, arrays and estimators can "
            "be saved without pickle"
        )

    def array(self, value: np.ndarray, where: str) -> dict[str, Any]:
        value = np.asarray(value)
        if value.dtype.kind in _KINDS and value.dtype.itemsize <= 8:
            held, name = self.seen.get(id(value), (None, ""))
            if held is not value:
                name = str(len(self.arrays))
                self.seen[id(value)] = value, name
                self.arrays[name] = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
                self.arrays[name] = self.arrays[name].reshape(
                    value.shape
                )  # ascontiguousarray makes () a (1,)
            return {"$": "array", "name": name}
        if value.dtype.kind == "U":
            return {
                "$": "texts",
                "dtype": value.dtype.str,
                "shape": list(value.shape),
                "items": value.ravel().tolist(),
            }
        if value.dtype.kind == "O":
            items = [self(item, where) for item in value.ravel().tolist()]
            return {"$": "objects", "shape": list(value.shape), "items": items}
        raise TypeError(
            f"{where} is an array of {value.dtype}: only numbers and texts can be saved without pickle"
        )


def _filler(value: np.ma.MaskedArray) -> Any:
    return None if value.dtype.kind == "O" else value.dtype.type(0)


class _Reader:
    """The way back."""

    def __init__(self, arrays: Mapping[str, np.ndarray], where: str) -> None:
        self.arrays, self.where, self.scikit_learn = arrays, where, False

    def estimator(self, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("$") != "estimator":
            raise TypeError("an estimator was expected")
        family, _, name = str(tree["class"]).rpartition(".")
        look = {"unfused.label": _label_class, "sklearn": _scikit_learn_class}.get(family)
        cls = look(name) if look else None
        if cls is None:
            raise ValueError(
                f"{self.where}: class {tree['class']!r} is not one that a saved estimator may have"
            )
        self.scikit_learn |= family == "sklearn"
        parameters = {
            key: self(value) for key, value in tree["parameters"].items() if key not in NEVER.get(name, set())
        }
        known = cls._get_param_names() if hasattr(cls, "_get_param_names") else list(parameters)
        if unknown := parameters.keys() - set(known):
            raise ValueError(
                f"{self.where}: {name} has no parameter {min(unknown)!r} here: it was saved by another version"
            )
        found = cls(**parameters)
        vars(found).update(
            {key: self(value) for key, value in tree["state"].items() if not key.startswith("__")}
        )
        if tree.get("requests"):
            import sklearn

            with sklearn.config_context(enable_metadata_routing=True):
                for method, names in tree["requests"].items():
                    getattr(found, f"set_{method}_request")(**self(names))
        return found

    def __call__(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        kind = tree["$"]
        if kind == "estimator":
            return self.estimator(tree)
        if kind == "array":
            return self.arrays[tree["name"]]
        if kind in ("texts", "objects"):
            items = tree["items"] if kind == "texts" else [self(item) for item in tree["items"]]
            flat = np.empty(len(items), tree["dtype"] if kind == "texts" else object)
            flat[:] = items
            return flat.reshape(tree["shape"])
        if kind == "scalar":
            return self(tree["value"])[()]
        if kind == "masked":
            return np.ma.MaskedArray(self(tree["data"]), self(tree["mask"]))
        if kind == "float":
            return float(tree["value"])
        if kind == "path":
            return Path(tree["value"])
        if kind == "dtype":
            return np.dtype(tree["value"])
        if kind == "numpy type":
            return np.dtype(tree["value"]).type
        if kind == "random state":
            state = np.random.RandomState()
            state.set_state(self(tree["value"]))
            return state
        if kind == "generator":
            bits = {"PCG64": np.random.PCG64, "MT19937": np.random.MT19937, "Philox": np.random.Philox}[
                tree["class"]
            ]()
            bits.state = self(tree["value"])
            return np.random.Generator(bits)
        if kind == "tensor":
            import torch

            return torch.from_numpy(self(tree["value"]).copy())
        items = self(tree["items"])
        if kind == "sparse":
            from scipy import sparse

            make = sparse.csr_array if tree["array"] else sparse.csr_matrix
            return make(tuple(items[:3]), shape=items[3]).asformat(tree["format"])
        makers: dict[str, Any] = {
            "tuple": tuple,
            "set": set,
            "dict": dict,
            "slice": lambda parts: slice(*parts),
        }
        makers["range"] = lambda parts: range(*parts)
        return makers[kind](items)
