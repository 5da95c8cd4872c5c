"""Weights before and after, one tensor at a time, wherever they are: state dicts, models, folders, adapters."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unfused.data.checkpoint_io import Checkpoint, open_checkpoint
from unfused.data.lora_io import is_adapter, open_lora

__all__ = ["Pair", "Weights", "is_peft", "open_weights", "pairs"]

Source = Any  # Mapping[str, Tensor], nn.Module, path or hub id
HEADS_AND_EMBEDDINGS = re.compile(
    r"(^|\.)(\w*embed\w*|\w*embd|wte|wpe|shared|lm_head|cls|classifier|classification_head|score|qa_outputs|predictions|"
    r"pooler|head|heads|relative_attention_bias|rotary\w*|patch\w*)(\.|$)"
)
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")  # stored as (in, out)


class Weights(Mapping[str, torch.Tensor]):
    """A lazy mapping name -> tensor, in the order of the source; `transposed` names those stored as (in, out)."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], label: str, transposed: Iterable[str] | bool = ()
    ) -> None:
        self.tensors, self.label = tensors, label
        self._transposed = transposed if isinstance(transposed, bool) else frozenset(transposed)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        if isinstance(self.tensors, Checkpoint):
            return self.tensors.infos[name].shape
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Without reading the tensor."""
        if isinstance(self.tensors, Checkpoint):
            return self.tensors.infos[name].dtype
        return self.tensors[name].dtype

    @property
    def folder(self) -> Path | None:
        """Of the checkpoint (with an adapter, the base's)."""
        tensors = self.tensors.base.tensors if isinstance(self.tensors, _WithAdapter) else self.tensors
        return tensors.folder if isinstance(tensors, Checkpoint) else None

    def transposed(self, name: str) -> bool:
        return self._transposed if isinstance(self._transposed, bool) else name in self._transposed


class _WithAdapter(Mapping[str, torch.Tensor]):
    """Base tensors plus a LoRA folder's changes, summed in float32 when asked for."""

    def __init__(self, base: Weights, folder: str | os.PathLike[str]) -> None:
        self.base, self.changes = base, open_lora(folder)
        for name in [*self.changes, *self.changes.saved]:
            if name not in base:
                raise ValueError(
                    f"{os.fspath(folder)!r} changes {name!r}, which the base does not have: give its own base"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.changes.saved:
            return self.changes.checkpoint[self.changes.saved[name]]
        tensor = self.base[name]
        if name not in self.changes:
            return tensor
        change = self.changes[name].dense()
        if change.shape != tensor.shape:
            raise ValueError(
                f"{name!r} has the shape {tuple(tensor.shape)} in the base and {tuple(change.shape)} in the adapter"
            )
        return tensor.float() + change

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


class _AdaptedModel(Mapping[str, torch.Tensor]):
    """Weights of a model with PEFT adapters, adapters on or off; nothing of the model is changed."""

    def __init__(self, model: nn.Module, adapter: str | None, on: bool) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.on, self.adapter = on, adapter
        self.layers: dict[str, Any] = {}
        for name, module in inner.named_modules():
            if isinstance(module, BaseTunerLayer):
                if module.merged:  # type: ignore[truthy-function]
                    raise ValueError(f"{name!r} has its adapter merged: call unmerge_adapter() first")
                weight = getattr(module.get_base_layer(), "weight", None)
                if isinstance(weight, torch.Tensor) and adapter in module.active_adapters:
                    self.layers[f"{name}.weight"] = module
        self.plain: dict[str, torch.Tensor] = {}
        for name, parameter in inner.named_parameters():
            clean = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            if any(part in ("modules_to_save",) for part in name.split(".")) or re.search(
                r"\.(lora_\w+|ia3_l|vera_\w+|adapter_\w+)", name
            ):
                continue
            self.plain[clean] = parameter.detach()

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        layer = self.layers.get(name) if self.on else None
        if layer is None:
            return self.plain[name]
        before = layer.get_base_layer().weight.data
        if _is_plain_lora(layer, self.adapter):
            return before.float() + layer.get_delta_weight(self.adapter).float()
        kept = before.clone()
        try:  # whatever the adapter is: as its own merging has it
            layer.merge(adapter_names=[self.adapter])
            return layer.get_base_layer().weight.data.clone()
        finally:
            layer.get_base_layer().weight.data.copy_(kept)
            layer.merged_adapters.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)


def _is_plain_lora(layer: Any, adapter: str | None) -> bool:
    from peft.tuners.lora.layer import Embedding, Linear

    return isinstance(layer, Linear | Embedding) and not getattr(layer, "use_dora", {}).get(adapter)


def is_peft(model: Any) -> bool:
    """Whether it is a PeftModel (or a model with one adapter injected by transformers)."""
    return isinstance(model, nn.Module) and (
        hasattr(model, "peft_config") or hasattr(model, "get_base_model")
    )


def open_weights(source: Source, base: Weights | None = None, argument: str = "base") -> Weights:
    """Any source of weights as a lazy mapping.

    Parameters
    ----------
    source : mapping, nn.Module, path or hub id
        A folder with `adapter_config.json` needs `base`; of a PeftModel the adapter's weights are merged in.
    base : Weights, optional
        What an adapter folder changes.
    argument : str
        How the user's argument is called.
    """
    if is_peft(source):
        adapter = _active(source)
        return Weights(_AdaptedModel(source, adapter, on=True), argument, _conv1d(source))
    if isinstance(source, nn.Module):
        return Weights(source.state_dict(), argument, _conv1d(source))
    if isinstance(source, Checkpoint | str | os.PathLike):
        if not isinstance(source, Checkpoint) and is_adapter(source):
            if base is None:
                raise ValueError(f"{argument}={os.fspath(source)!r} is an adapter: give a base model")
            return Weights(_WithAdapter(base, source), argument, base._transposed)
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
        kind = checkpoint.config.get("model_type")
        return Weights(checkpoint, argument, kind in CONV1D_MODELS)
    if isinstance(source, Mapping):
        return Weights(source, argument)
    raise TypeError(
        f"{argument} is a {type(source).__name__}: give a state dict, a model, a folder or a hub id"
    )


def _active(model: Any) -> str:
    active = model.active_adapters
    names = active() if callable(active) else active
    if len(names) != 1:
        raise ValueError(f"the model has the active adapters {list(names)}: call set_adapter with one")
    return str(names[0])


def _conv1d(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names = []
    for name, module in inner.named_modules():
        if isinstance(getattr(module, "base_layer", module), Conv1D):
            names.append(f"{name.removesuffix('.base_layer')}.weight")
    return names


@dataclass(frozen=True)
class Pair:
    """A tensor before and after, read when asked for, float32 (float64 where one of them is)."""

    name: str
    sources: tuple[Weights, Weights]

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as (out, in).

        Raises
        ------
        ValueError
            Names the tensor whose shapes differ or whose values are not finite.
        """
        found = []
        for weights in self.sources:
            tensor = weights[self.name]
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            tensor = tensor.detach().to("cpu", wide)
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{weights.label}: tensor {self.name!r} holds values that are not finite")
            found.append(tensor.T if weights.transposed(self.name) else tensor)
        first, second = found
        wide = torch.promote_types(first.dtype, second.dtype)
        return first.to(wide), second.to(wide)


def pairs(
    base: Source,
    tuned: Source | None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> tuple[list[Pair], Weights, Weights]:
    """The matrices of two models, in the base's order, and the opened sources.

    Parameters
    ----------
    base, tuned
        As `open_weights` takes them; of a PeftModel alone (`tuned=None`) the adapter is off and on, and its layers are taken.
    include : sequence of str, optional
        Patterns (`*` is anything) of names; by default all matrices but embeddings, heads and poolers.
    exclude : sequence of str, optional
        Patterns of names that are left out.

    Raises
    ------
    ValueError
        Where a matrix is in one model only, shapes differ, or none is left.
    """
    for name, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise TypeError(f"{name}={patterns!r}: give a list of patterns")
    wanted: Iterable[str]
    if tuned is None:
        if not is_peft(base):
            raise ValueError("tuned is None: give the tuned model, or a PeftModel as base")
        adapter, transposed = _active(base), _conv1d(base)
        first = Weights(_AdaptedModel(base, adapter, on=False), "adapter off", transposed)
        second = Weights(_AdaptedModel(base, adapter, on=True), "adapter on", transposed)
        wanted = second.tensors.layers  # type: ignore[attr-defined]
    else:
        first = (
            Weights(_AdaptedModel(base, _active(base), on=False), "base", _conv1d(base))
            if is_peft(base)
            else open_weights(base)
        )
        second = open_weights(tuned, first, "tuned")
        wanted = first
    chosen = []
    for name in wanted:
        matched = _matches(name, include) if include is not None else not HEADS_AND_EMBEDDINGS.search(name)
        if not matched or (exclude is not None and _matches(name, exclude)) or len(first.shape(name)) != 2:
            continue
        if name not in second:
            raise ValueError(f"tensor {name!r} of the base is missing in the tuned model: is it its base?")
        if first.shape(name) != second.shape(name):
            raise ValueError(
                f"tensor {name!r} has the shape {first.shape(name)} in the base and {second.shape(name)} in the tuned "
                "model: is it its base?"
            )
        if min(first.shape(name)):
            chosen.append(Pair(name, (first, second)))
    if not chosen:
        asked = f"include={list(include)!r} names" if include is not None else "the models share"
        raise ValueError(f"{asked} no matrix: the names begin with {', '.join(list(first)[:3]) or 'nothing'}")
    return chosen, first, second


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
