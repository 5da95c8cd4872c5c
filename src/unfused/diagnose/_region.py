"""Regions of weights: which entries, what they hold, how they are grafted, compared, kept and held fixed."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from unfused.data.checkpoint_io import open_checkpoint
from unfused.data.files import atomic_write, disk_errors, printable

__all__ = [
    "Indices",
    "compose",
    "concentration",
    "densities",
    "graft",
    "hold",
    "load_region",
    "overlap",
    "random_entries",
    "save_region",
    "top_entries",
]

Indices = dict[str, Tensor]  # name -> flat positions (m,), ascending, int64
State = Mapping[str, Tensor]


def top_entries(magnitudes: Iterable[tuple[str, Tensor]], k: int) -> Indices:
    """Exactly k positions of the largest values over all tensors together; of equal ones the first.

    Two passes over `magnitudes` (call with a list or something that can be gone through twice); one tensor and k values are
    held.
    """
    best = torch.empty(0)
    for _, tensor in magnitudes:
        values = tensor.flatten()
        best = torch.cat([best.to(values), values.topk(min(k, len(values))).values])
        best = best.topk(min(k, len(best))).values
    if not len(best) or k < 1:
        return {}
    threshold, room = best[-1], k - int((best > best[-1]).sum())
    found: Indices = {}
    for name, tensor in magnitudes:
        values = tensor.flatten()
        above = values > threshold
        if room and len(ties := (values == threshold).nonzero().flatten()[:room]):
            above[ties] = True
            room -= len(ties)
        if len(chosen := above.nonzero().flatten()):
            found[name] = chosen.cpu()
    return found


def random_entries(sizes: Mapping[str, int], k: int, seed: int) -> Indices:
    """k positions drawn from all entries alike."""
    ends = np.cumsum(list(sizes.values()))
    chosen = np.sort(np.random.default_rng(seed).choice(int(ends[-1]), k, replace=False, shuffle=False))
    where = np.searchsorted(ends, chosen, side="right")
    starts = ends - np.array(list(sizes.values()))
    return {
        name: torch.from_numpy(chosen[where == i] - starts[i])
        for i, name in enumerate(sizes)
        if (where == i).any()
    }


def graft(base: State, indices: Indices, values: Mapping[str, Tensor], copied: State) -> dict[str, Tensor]:
    """The base with the entries' values put in; tensors without any are shared with it."""
    state = dict(base)
    same: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in base.items():  # tied weights have several names
        if tensor.numel():
            same.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    for name, where in indices.items():
        if name not in state:
            raise ValueError(f"base lacks tensor {name!r}, in which the region has entries")
        old = base[name].detach()
        if len(where) and int(where[-1]) >= old.numel():
            raise ValueError(f"base's tensor {name!r} of shape {tuple(old.shape)} is not the region's")
        new = old.clone(memory_format=torch.contiguous_format)
        new.view(-1)[where.to(new.device)] = values[name].to(new)
        state |= dict.fromkeys(same.get((old.data_ptr(), old.shape), [name]), new)
    return state | dict(copied)


def compose(base: State, parts: Sequence[tuple[Indices, Mapping[str, Tensor], State]]) -> dict[str, Tensor]:
    """Several regions in one base; an entry of several gets the mean of their values."""
    indices: Indices = {}
    values: dict[str, Tensor] = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(part[0] for part in parts)):
        every = torch.cat([part[0][name] for part in parts if name in part[0]])
        what = torch.cat([part[1][name].float() for part in parts if name in part[0]])
        where, place, count = every.unique(return_inverse=True, return_counts=True)
        indices[name] = where
        values[name] = torch.zeros(len(where)).index_add_(0, place, what) / count
    copied: dict[str, Tensor] = {}
    for _, _, extra in parts:
        for name, tensor in extra.items():
            if name in copied and not torch.equal(copied[name], tensor):
                raise ValueError(
                    f"two regions copy tensor {name!r} whole, differently: give each task a head of its own name"
                )
            copied[name] = tensor
    return graft(base, indices, values, copied)


def overlap(one: Indices, other: Indices) -> float:
    """`|one and other| / |one|`."""
    total = sum(len(where) for where in one.values())
    shared = sum(
        int(torch.isin(where, other[name], assume_unique=True).sum())
        for name, where in one.items()
        if name in other
    )
    return shared / total if total else float("nan")


def concentration(changes: Iterable[tuple[str, Tensor]], share: float = 0.01) -> tuple[float, float]:
    """Gini index of |d| over all entries, and the part of |d|^2 that the largest `share` of entries holds.

    From a histogram of 4,096 steps in log |d|, so that no copy of the whole change is made.
    """
    edges = np.r_[0.0, np.geomspace(1e-12, 1e4, 4096)]
    counts, sums, squares = (np.zeros(len(edges)) for _ in range(3))
    for _, tensor in changes:
        d = tensor.detach().abs().float().flatten().cpu().numpy()
        place = np.clip(np.searchsorted(edges, d, side="right") - 1, 0, len(edges) - 1)
        counts += np.bincount(place, minlength=len(edges))
        sums += np.bincount(place, d, minlength=len(edges))
        squares += np.bincount(place, d.astype(np.float64) ** 2, minlength=len(edges))
    if not sums.sum():
        return float("nan"), float("nan")
    lorenz = np.r_[0.0, np.cumsum(sums) / sums.sum()]
    gini = 1 - float(((lorenz[1:] + lorenz[:-1]) * counts / counts.sum()).sum())
    rest, held = share * counts.sum(), 0.0
    for count, square in zip(counts[::-1], squares[::-1], strict=True):
        if count:
            held += square * min(1.0, rest / count)
            rest -= count
        if rest <= 0:
            break
    return gini, held / float(squares.sum())


def densities(indices: Indices, shapes: Mapping[str, Sequence[int]]) -> list[dict[str, object]]:
    """Entries of the region per layer (the first number in a name, or "-") and kind of tensor (the rest of it)."""
    found: dict[tuple[str, str], list[int]] = {}
    for name, shape in shapes.items():
        number = re.search(r"(?:^|\.)(\d+)\.", name)
        layer = number.group(1) if number else "-"
        kind = name[number.end() :] if number else name
        cell = found.setdefault((layer, kind), [0, 0])
        cell[0] += len(indices.get(name, ()))
        cell[1] += int(np.prod(shape, dtype=np.int64))
    return [
        {"layer": layer, "kind": kind, "entries": n, "of": of, "density": n / of if of else 0.0}
        for (layer, kind), (n, of) in found.items()
    ]


@contextmanager
def hold(model: nn.Module, indices: Indices) -> Iterator[None]:
    """Entries that training inside the block does not move: gradients there are 0, and what weight decay does is undone."""
    parameters = dict(model.named_parameters())
    if missing := [name for name in indices if name not in parameters]:
        raise ValueError(f"model lacks parameter {missing[0]!r}, in which the region has entries")
    kept, handles = {}, []
    for name, where in indices.items():
        parameter = parameters[name]
        where = where.to(parameter.device)
        kept[name] = (where, parameter.detach().flatten()[where].clone())
        if parameter.requires_grad:
            handles.append(
                parameter.register_hook(
                    lambda grad, where=where: grad.flatten().index_fill(0, where, 0.0).view_as(grad)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, (where, values) in kept.items():
                parameters[name].view(-1)[where] = values


def save_region(
    path: str | os.PathLike[str],
    indices: Indices,
    values: Mapping[str, Tensor],
    copied: State,
    facts: Mapping[str, object],
) -> None:
    """One safetensors file of positions, values and whole tensors; `facts` (JSON) in its header."""
    from safetensors.torch import save

    tensors = {f"indices.{name}": where.contiguous() for name, where in indices.items()}
    tensors |= {f"values.{name}": values[name].detach().cpu().contiguous() for name in indices}
    tensors |= {f"copied.{name}": tensor.detach().cpu().contiguous() for name, tensor in copied.items()}
    data = save(tensors, metadata={"format": "pt", "unfused-skill": json.dumps(dict(facts))})
    with disk_errors(os.path.dirname(os.path.abspath(path))), atomic_write(path, "wb") as file:
        file.write(data)


def load_region(
    path: str | os.PathLike[str],
) -> tuple[Indices, dict[str, Tensor], dict[str, Tensor], dict[str, object]]:
    """What `save_region` wrote.

    Raises
    ------
    ValueError
        If the file is none of these.
    """
    with open_checkpoint(path) as checkpoint:
        facts = checkpoint.metadata.get("unfused-skill")
        if facts is None:
            raise ValueError(f"{printable(path)} holds no skill region: write one with region.save")
        parts: dict[str, dict[str, Tensor]] = {"indices": {}, "values": {}, "copied": {}}
        for key, tensor in checkpoint.items():
            part, _, name = key.partition(".")
            parts[part][name] = tensor
    return parts["indices"], parts["values"], parts["copied"], json.loads(facts)
