"""Checkpoints that a kill cannot spoil: safetensors and JSON, written beside their place and then renamed.

A checkpoint is a folder `checkpoint-STEP` (the Trainer's naming) with `model.safetensors`,
`optimizer.safetensors`, `rng.safetensors`, `trainer_state.json` and `run.json`; the last holds the digests of
the others, so that a damaged one is told from a good one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unfused.data.files import digest, disk_errors, read_json, write_json

PREFIX = "checkpoint-"
_TEMPORARY = ".writing-"


# ---- tensors of a module, an optimizer, the random generators


def save_module(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Write a module's state (weights and persistent buffers) as safetensors; tied tensors once."""
    state = module.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"state {name!r} of {type(module).__name__} is a {kind}: only tensors are saved")
    stored = {name: state[name] for name, first in _first_names(state).items() if name == first}
    save_tensors(path, stored, {"format": "pt"})


def load_module(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Load what `save_module` wrote, strictly: the same names and shapes, in the module's own layout."""
    state = load_file(path)
    for name, first in _first_names(module.state_dict()).items():
        if name not in state and first in state:
            state[name] = state[first]
    module.load_state_dict(state, strict=True)


def _first_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each name the first one of the same tensor."""
    firsts: dict[tuple[Any, ...], str] = {}
    return {
        name: firsts.setdefault((t.device, t.data_ptr(), t.shape, t.stride(), t.dtype), name)
        if t.numel()
        else name
        for name, t in state.items()
    }


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    # Cloned where tensors share memory without being the same (safetensors refuses overlaps).
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        start = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if start in seen else tensor
        seen.add(start)
    save_file(stored, path, metadata)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as tensors (`INDEX.NAME`) and the rest for JSON."""
    state = optimizer.state_dict()
    tensors, rest = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                rest[f"{index}.{name}"] = value
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]
) -> None:
    """Restore what `pack_optimizer` took."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**rest["state"], **tensors}.items():
        index, name = key.split(".", 1)
        if isinstance(value, torch.Tensor):  # a copy, as `load_file` may give views of the file
            # In the parameter's memory layout (channels_last): fused kernels read both in storage order.
            like = parameters[int(index)] if value.shape == parameters[int(index)].shape else value
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    groups = [
        {**now, **{k: tuple(v) if isinstance(now.get(k), tuple) else v for k, v in saved.items()}}
        for now, saved in zip(optimizer.state_dict()["param_groups"], rest["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_state() -> dict[str, torch.Tensor]:
    """The state of Python's, NumPy's (legacy) and torch's global generators, as tensors."""
    _, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]  # noqa: NPY002
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(key).tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, torch.Tensor]) -> None:
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    *key, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(  # noqa: NPY002
        ("MT19937", np.array(key, np.uint32), position, has_gauss, state["numpy_gauss"].item())
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the global random generators as they were, whatever happens inside."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


# ---- folders


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends, and is removed when it fails.

    Raises
    ------
    DiskFull
        When the disk or the quota is full; `target` is then not there.
    """
    temporary = target.with_name(f"{_TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(target.parent):
            temporary.mkdir(parents=True)
            yield temporary
            for path in [*temporary.iterdir(), temporary]:
                _sync(path)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # which syncs no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name[len(PREFIX) :].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]), reverse=True)


def seal(folder: Path, run: Mapping[str, Any]) -> None:
    """Write `run.json` with the digests of all that lies in `folder`."""
    digests = {path.name: digest(path) for path in sorted(folder.iterdir())}
    write_json(folder / "run.json", {**run, "digests": digests})


def read_sealed(folder: Path) -> dict[str, Any] | None:
    """`run.json` of a folder whose files are what they were when it was sealed, else None."""
    try:
        run = read_json(folder / "run.json")
        intact = all(digest(folder / name) == value for name, value in run["digests"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return run if intact else None


def keep_newest(folder: Path, count: int) -> None:
    for old in checkpoints(folder)[count:]:
        remove(old)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left, and of a finished run the checkpoints."""
    if (folder / "done.json").exists():
        keep_newest(folder, 0)
    for path in [*folder.glob(f"{_TEMPORARY}*"), *folder.glob(".tmp-*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_final(
    folder: Path, module: nn.Module, history: list[dict[str, Any]], done: Mapping[str, Any]
) -> None:
    """`model.safetensors`, `history.json` and last `done.json`, each atomically; then the checkpoints go."""
    temporary = folder / f"{_TEMPORARY}model.safetensors"
    with disk_errors(folder):
        try:
            save_module(temporary, module)
            model_digest = digest(temporary)
            _sync(temporary)
            os.replace(temporary, folder / "model.safetensors")
        finally:
            temporary.unlink(missing_ok=True)
    write_json(folder / "history.json", history)
    write_json(folder / "done.json", {**done, "model": model_digest})
    remove_leftovers(folder)


def read_final(folder: Path) -> dict[str, Any] | None:
    """`done.json` of a finished run whose weights are undamaged, with its history, else None."""
    try:
        done = read_json(folder / "done.json")
        intact = digest(folder / "model.safetensors") == done["model"]
        return {**done, "history": read_json(folder / "history.json")} if intact else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words.

    Examples
    --------
    >>> differences({"lr": 0.1, "model": {"w": [2]}}, {"lr": 0.1, "model": {"w": [3], "b": [3]}})
    ['model w was [2], is [3]', 'model b was absent, is [3]']
    """
    found = []
    for name in [*saved, *(name for name in now if name not in saved)]:
        old, new = saved.get(name, "absent"), now.get(name, "absent")
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name} {inner}" for inner in differences(old, new)]
        elif old != new:
            found.append(f"{name} was {_short(old)}, is {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def remove(path: Path) -> None:
    """Remove a checkpoint or file; renamed first, so that a kill leaves no half of it under its name."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name}")
    if doomed.is_dir():
        shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    if doomed.is_dir():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink()
