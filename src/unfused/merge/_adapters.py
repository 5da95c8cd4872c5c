"""Adapter with adapter: LoRA adapters of one base merged to an adapter.

The mean of A and B is not the mean of B A: every module's changes `scale B A` are merged as dense tensors, with zero as their
base, and the result is factored again by its leading singular directions. With the sum of the ranks (the default) that is exact
for weighted sums; for methods that mask entries it is the best approximation of its rank, and the card says how good.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unfused.data.checkpoint_io import ShardWriter
from unfused.data.files import printable, write_json
from unfused.data.lora_io import PREFIX
from unfused.merge._card import write_card
from unfused.merge._method import MergeMethod
from unfused.merge._sources import AdapterSource, ZeroSource

__all__ = ["merge_adapters"]


def merge_adapters(
    method: MergeMethod,
    models: Sequence[str | os.PathLike[str]],
    parameters: Mapping[str, Any],
    stage: Path,
    target: Path,
    rank: int | None,
    finished: Callable[[Path, Mapping[str, Any]], bool],
    publish: Callable[[Path, Path], None],
) -> Path:
    """Write the merged adapter; see the module."""
    if method.then is not None:
        raise ValueError(f"{method.slug} looks at whole models: give the adapters' base (--base)")
    adapters = [AdapterSource(model) for model in models]
    bases = {adapter.lora.config.get("base_model_name_or_path") for adapter in adapters}
    if len(bases) > 1:
        raise ValueError(
            f"the adapters are of different base models: {', '.join(map(str, sorted(map(str, bases))))}"
        )
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for adapter in adapters:
        if adapter.lora.whole:
            name = next(iter(adapter.lora.whole))
            raise ValueError(
                f"{printable(adapter.label)} brings the whole tensor {name!r}: give the base (--base) to merge to a full model"
            )
        for name, (kind, shape) in adapter.layout.items():
            if layout.setdefault(name, (kind, shape))[1] != shape:
                raise ValueError(
                    f"module {name!r} is {shape} in {printable(adapter.label)} and {layout[name][1]} in another adapter"
                )
    for adapter in adapters:
        adapter.layout = dict(layout)
    zero = ZeroSource(layout) if method.base == "required" else None
    ranks = max(
        sum(a.lora.factors[module]["A"].shape[0] for a in adapters if module in a.lora.factors)
        for module in layout
    )
    wanted = ranks if rank is None else rank
    if isinstance(wanted, bool) or wanted < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    recipe = {
        "unfused": 1,
        "method": method.slug,
        "parameters": {
            k: v if isinstance(v, str | int | float | bool) else list(v) for k, v in parameters.items()
        },
        "base": None,
        "models": [{"source": a.label, "hash": a.fingerprint()} for a in adapters],
        "rank": wanted,
    }
    if finished(target, recipe):
        return target
    names = sorted(layout)
    factors: dict[str, torch.Tensor] = {}
    lost, whole = 0.0, 0.0
    for module in names:
        shape = layout[module][1]
        tensors = [adapter[module] for adapter in adapters]
        merged = method.call(module, None if zero is None else zero[module], tensors, parameters).float()
        transposed = adapters[0].lora.transposed(module)
        matrix = merged.T if transposed else merged.flatten(1)
        b, a = _factor(matrix, wanted)
        lost += float((b @ a - matrix).square().sum())
        whole += float(matrix.square().sum())
        embedding = module in adapters[0].lora.embeddings
        prefix = f"{PREFIX}{module}.lora_{'embedding_' if embedding else ''}"
        suffix = "" if embedding else ".weight"
        factors[f"{prefix}A{suffix}"] = a.view(-1, *shape[1:]) if len(shape) > 2 else a
        factors[f"{prefix}B{suffix}"] = b.view(*b.shape, *[1] * (len(shape) - 2))
    folder = stage / "model"
    writer = ShardWriter(
        folder,
        {name: (t.dtype, tuple(t.shape)) for name, t in factors.items()},
        1 << 62,
        "adapter_model",
    )
    for path in folder.glob("*") if folder.is_dir() else ():
        path.unlink()
    for shard in writer.pending():
        with writer.open(shard) as stream:
            for name in shard.tensors:
                stream.write(factors[name])
    config = dict(adapters[0].lora.config)
    targets = sorted({name for adapter in adapters for name in _targets(adapter)})
    config |= {"r": wanted, "lora_alpha": wanted, "use_rslora": False, "target_modules": targets}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "inference_mode": True}
    write_json(folder / "adapter_config.json", config)
    error = (lost / whole) ** 0.5 if whole else 0.0
    note = f"an adapter of rank {wanted}; relative error of the low-rank form {error:.1e}"
    write_card(folder / "README.md", recipe, [note], target.name, "sampled")
    write_json(folder / "merge.json", recipe)
    publish(stage, target)
    return target


def _factor(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`B (out, rank) @ A (rank, in)` nearest to the matrix, padded with zeros where its sides are shorter."""
    most = min(matrix.shape)
    if most <= max(512, 2 * rank):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank].T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, most), niter=4)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    root = s.clamp(min=0).sqrt()
    b, a = u * root, (v * root).T
    if len(s) < rank:
        pad = rank - len(s)
        b = torch.nn.functional.pad(b, (0, pad))
        a = torch.nn.functional.pad(a, (0, 0, 0, pad))
    return b.contiguous(), a.contiguous()


def _targets(adapter: AdapterSource) -> list[str]:
    named = adapter.lora.config.get("target_modules")
    return list(named) if isinstance(named, list) else list(adapter.lora.factors)
