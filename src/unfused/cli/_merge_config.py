"""Recipes of merges as YAML: our own keys, or mergekit's for the methods that both have.

    method: breadcrumbs                 merge_method: breadcrumbs
    base: BASE                          base_model: BASE
    models: [A, B]                      models:
    parameters: {scale: 0.3}              - {model: A, parameters: {weight: 0.3, density: 0.15, gamma: 0.01}}
                                          - {model: B, parameters: {weight: 0.3, density: 0.15, gamma: 0.01}}

Of mergekit's settings, numbers, gradients over the layers (`[0, 0.5, 1]`) and conditions (`- filter: mlp` `  value: 0.5`) are
read; slices only where they are whole models. Its `density` is our `keep`, `gamma` is `drop_top`, `weight` times `lambda` is
`scale`; its breadcrumbs rank entries over the whole tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unfused.data.files import printable

__all__ = ["Recipe", "read_recipe"]

_OWN = {
    "method",
    "base",
    "models",
    "parameters",
    "dtype",
    "vocab",
    "copy",
    "out",
    "hashes",
    "rank",
    "shard_size",
}
_THEIRS = {
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
}
_METHODS = {
    "linear": "linear",
    "slerp": "slerp",
    "task_arithmetic": "task-arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare",
    "breadcrumbs": "breadcrumbs",
}
_SETTINGS = {
    "linear": {"weight", "normalize"},
    "slerp": {"t"},
    "task_arithmetic": {"weight", "normalize", "lambda"},
    "ties": {"weight", "density", "normalize", "lambda"},
    "dare_linear": {"weight", "density", "normalize", "lambda", "rescale"},
    "dare_ties": {"weight", "density", "normalize", "lambda", "rescale"},
    "breadcrumbs": {"weight", "density", "gamma", "normalize", "lambda"},
}
_LAYER = re.compile(r"\.(\d+)\.")
_FIRST = re.compile(r"embed|wte|wpe")


@dataclass
class Recipe:
    """What to merge and how.

    Attributes
    ----------
    method, base, models, parameters
        As for `unfused.merge.merge_to_folder`.
    options : dict
        The rest: dtype, vocab, copy, out ...
    per_tensor : callable (name, layers) -> parameters, optional
        Where settings differ from tensor to tensor.
    description : the settings as they were written
    """

    method: str
    base: str | None
    models: list[str]
    parameters: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    per_tensor: Callable[[str, int], dict[str, Any]] | None = None
    description: Any = None


def read_recipe(path: str) -> Recipe:
    """Read a YAML file.

    Raises
    ------
    ValueError
        One line that names the file and the key.
    """
    import yaml

    where = printable(path)
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{where} must be a mapping with `method` (or mergekit's `merge_method`) and `models`"
        )
    if "merge_method" in content:
        return _theirs(where, content)
    if other := sorted(set(content) - _OWN):
        raise ValueError(f"{where}: key {other[0]!r} is unknown; known are {', '.join(sorted(_OWN))}")
    if not isinstance(content.get("method"), str) or not isinstance(content.get("models"), list):
        raise ValueError(f"{where} needs `method` and a list `models`")
    parameters = content.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{where}: parameters must be a mapping")
    rest = {k: v for k, v in content.items() if k not in ("method", "base", "models", "parameters")}
    models = [str(model) for model in content["models"]]
    return Recipe(content["method"], content.get("base"), models, parameters, rest)


# ---- mergekit's


def _theirs(where: str, content: Mapping[str, Any]) -> Recipe:
    method = content["merge_method"]
    if method not in _METHODS:
        raise ValueError(
            f"{where}: merge_method {method!r} is not one of those read here: {', '.join(_METHODS)}"
        )
    content = dict(content)
    if isinstance(content.get("tokenizer"), dict):
        tokenizer = dict(content.pop("tokenizer"))
        content["tokenizer_source"] = tokenizer.pop("source", None)
        if tokenizer:
            raise ValueError(f"{where}: tokenizer.{next(iter(tokenizer))} is not read here: remove it")
    if other := sorted(set(content) - _THEIRS):
        raise ValueError(f"{where}: {other[0]} is not read here: remove it")
    sources, shared = _inputs(where, content)
    base = _name(where, content["base_model"]) if content.get("base_model") else None
    models = [model for model, _ in sources]
    own = [settings for _, settings in sources]
    if method == "slerp":
        if base is not None and base not in models:
            models, own = [base, *models], [{}, *own]
        if base is not None and models[0] != base:  # t = 0 is the base
            models, own = models[::-1], own[::-1]
        base = None
    elif method == "linear":
        base = None
    else:
        if base is None:
            raise ValueError(f"{where}: {method} needs base_model")
        left = [i for i, model in enumerate(models) if model != base]
        models, own = [models[i] for i in left], [own[i] for i in left]
    known = _SETTINGS[method] | {"int8_mask"}
    for settings in (shared, *own):
        if other := sorted(set(settings) - known):
            raise ValueError(
                f"{where}: parameter {other[0]!r} of {method} is not read here; known are {sorted(known)}"
            )

    def settle(name: str, layers: int) -> dict[str, Any]:
        return _translated(where, method, shared, own, name, _depth(name, layers))

    varies = any(isinstance(v, list | dict) for settings in (shared, *own) for v in settings.values())
    source = content.get("tokenizer_source")
    if source not in (None, "base", "union"):
        if _name(where, source) != (base or models[0]):
            raise ValueError(f"{where}: tokenizer_source {source!r} must be 'base' or 'union' here")
        source = "base"
    options = {"dtype": content.get("out_dtype") or content.get("dtype"), "vocab": source}
    return Recipe(
        _METHODS[method],
        base,
        models,
        settle("", 1),
        {key: value for key, value in options.items() if value is not None},
        settle if varies else None,
        {"shared": shared, "own": own} if varies else None,
    )


def _inputs(
    where: str, content: Mapping[str, Any]
) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """Models with their settings, and the settings of all."""
    shared = dict(content.get("parameters") or {})
    entries = content.get("models")
    if entries is None:
        slices = content.get("slices")
        if not isinstance(slices, list) or len(slices) != 1:
            raise ValueError(
                f"{where}: give `models`, or one slice of whole models: parts of models are not merged here"
            )
        entries = slices[0].get("sources")
        for entry in entries or ():
            _whole(where, entry)
        shared |= slices[0].get("parameters") or {}
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "model" in e for e in entries):
        raise ValueError(f"{where}: models must be a list of entries with `model`")
    return [(_name(where, e["model"]), dict(e.get("parameters") or {})) for e in entries], shared


def _name(where: str, model: Any) -> str:
    """`PATH`, `PATH+ADAPTER`, or the same as a mapping."""
    if isinstance(model, str):
        return model
    if isinstance(model, dict) and isinstance(model.get("model"), dict | str):
        inner = model["model"]
        path = inner if isinstance(inner, str) else str(inner.get("path"))
        lora = model.get("lora")
        return path + (f"+{lora['path'] if isinstance(lora, dict) else lora}" if lora else "")
    raise ValueError(f"{where}: model {model!r} must be a path or hub id")


def _whole(where: str, entry: Any) -> None:
    from unfused.data.checkpoint_io import fetch
    from unfused.data.files import read_json

    first, last = entry.get("layer_range", (0, None))
    config = read_json(fetch(_name(where, entry["model"])) / "config.json")
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if first != 0 or last not in (None, layers):
        raise ValueError(
            f"{where}: layer_range [{first}, {last}] is a part of {entry['model']}, which has {layers} layers: parts of models "
            "are not merged here"
        )


def _depth(name: str, layers: int) -> float:
    """Where a tensor is in the model, from 0 (embeddings, first layer) to 1 (last layer, head)."""
    if found := _LAYER.search(name):
        return int(found[1]) / (layers - 1) if layers > 1 else 1.0
    return 0.0 if _FIRST.search(name) or not name else 1.0


def _evaluate(setting: Any, name: str, depth: float) -> Any:
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if all(isinstance(entry, dict) for entry in setting):
        for entry in setting:
            if entry.get("filter") in (None, "*") or (name and entry["filter"] in name):
                return _evaluate(entry.get("value"), name, depth)
        return None
    place = depth * (len(setting) - 1)
    before = min(int(place), len(setting) - 1)
    after = min(before + 1, len(setting) - 1)
    if not all(isinstance(v, int | float) for v in setting):
        return setting[before]
    return setting[before] + (place - before) * (setting[after] - setting[before])


def _translated(
    where: str,
    method: str,
    shared: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
    name: str,
    depth: float,
) -> dict[str, Any]:
    """Our parameters for one tensor."""

    def one(key: str, default: Any) -> Any:
        found = _evaluate(shared.get(key), name, depth)
        return default if found is None else found

    def each(key: str, default: Any = None) -> list[float]:
        values = [_evaluate(settings.get(key), name, depth) for settings in own]
        values = [one(key, default) if value is None else value for value in values]
        if None in values:
            if not name and any(isinstance(s.get(key), list | dict) for s in (shared, *own)):
                return [1.0] * len(values)  # asked for no tensor in particular
            raise ValueError(f"{where}: {method} needs the parameter {key!r} for each model")
        return [float(value) for value in values]

    if method == "slerp":
        if (t := one("t", None)) is None and name:
            raise ValueError(f"{where}: slerp needs the parameter 't' (tensor {name!r} has none)")
        return {"t": 0.5 if t is None else float(t)}
    weights = each("weight")
    if method == "linear":
        return {"weights": weights, "normalize": bool(one("normalize", True))}
    normalize, factor = bool(one("normalize", method == "ties")), float(one("lambda", 1.0))
    if method == "ties":
        return {"weights": weights, "keep": each("density", 1.0), "normalize": normalize, "scale": factor}
    if normalize and method == "dare_ties":
        raise ValueError(f"{where}: normalize of dare_ties is not read here: remove it")
    total = math.fsum(weights) if normalize else 1.0
    scale = [weight * factor / (total if abs(total) > 1e-8 else 1.0) for weight in weights]
    if method == "task_arithmetic":
        return {"scale": scale}
    found: dict[str, Any] = {"scale": scale, "keep": each("density", 1.0)}
    if method == "breadcrumbs":
        return found | {"drop_top": each("gamma", 0.01), "granularity": "tensor"}
    return found | {"rescale": bool(one("rescale", True)), "elect_sign": method == "dare_ties"}
