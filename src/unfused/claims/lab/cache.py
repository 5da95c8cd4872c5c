"""Results on disk: JSON, or safetensors with a JSON header where there are arrays. Never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unfused.data.files import atomic_write

_ARRAY, _TENSOR = "__array__", "__tensor__"


def key(name: str, params: Mapping[str, Any], code: str) -> str:
    """File name of a cached result: readable, and different for different arguments or code."""
    try:
        text = json.dumps([params, code], sort_keys=True, default=_plain)
    except TypeError as error:
        raise TypeError(
            f"params of {name!r} must be JSON-able (numbers, text, lists, dicts): {error}"
        ) from None
    return f"{name}-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


def save(stem: Path, value: Any, seconds: float) -> Path:
    """Write `value`, a nest of dicts, lists, scalars, arrays and tensors, and the seconds it took."""
    arrays: dict[str, Any] = {}
    text = json.dumps({"seconds": seconds, "value": _strip(value, arrays)})
    stem.parent.mkdir(parents=True, exist_ok=True)
    if arrays:
        from safetensors.torch import save as to_bytes

        path = stem.with_name(stem.name + ".safetensors")
        with atomic_write(path, "wb") as file:
            file.write(to_bytes(arrays, metadata={"json": text}))
    else:
        path = stem.with_name(stem.name + ".json")
        with atomic_write(path) as file:
            file.write(text)
    return path


def load(stem: Path) -> tuple[Any, float] | None:
    """(value, seconds) as saved under `stem`, or None. A damaged file counts as absent."""
    plain, packed = (stem.with_name(stem.name + end) for end in (".json", ".safetensors"))
    try:
        if plain.exists():
            record, arrays = json.loads(plain.read_text()), {}
        elif packed.exists():
            from safetensors import safe_open

            with safe_open(packed, "pt") as file:
                record = json.loads(file.metadata()["json"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        else:
            return None
        return _restore(record["value"], arrays), record["seconds"]
    except Exception:  # whatever is wrong with a cache file, the answer is to compute it again
        return None


def _strip(value: Any, arrays: dict[str, Any]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        arrays[str(len(arrays))] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: str(len(arrays) - 1)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        arrays[str(len(arrays))] = torch.from_numpy(np.ascontiguousarray(value).copy()).reshape(value.shape)
        return {_ARRAY: str(len(arrays) - 1)}
    if isinstance(value, Mapping):
        return {str(k): _strip(v, arrays) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strip(v, arrays) for v in value]
    return _plain(value) if not isinstance(value, str | int | float | bool | type(None)) else value


def _restore(value: Any, arrays: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_restore(v, arrays) for v in value]
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return arrays[value[_TENSOR]]
        if value.keys() == {_ARRAY}:
            return arrays[value[_ARRAY]].numpy()
        return {k: _restore(v, arrays) for k, v in value.items()}
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is neither JSON nor an array")
