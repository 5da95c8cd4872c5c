"""What is merged: state dicts, modules, checkpoints on disk and LoRA adapters, all as lazy mappings name -> tensor."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unfused.data.checkpoint_io import Checkpoint, fetch, open_checkpoint
from unfused.data.files import printable, read_json
from unfused.data.lora_io import PREFIX, scale_of

__all__ = ["AdapterSource", "FileSource", "LoraSource", "Source", "StateSource", "ZeroSource", "open_source"]

Tensor = torch.Tensor
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Source(Mapping[str, Tensor]):
    """One input. `read` gives a piece; subclasses fill `layout`.

    Attributes
    ----------
    label : str
        For messages and the model card.
    layout : dict of str to (dtype, shape)
    folder : Path or None
        With config and tokenizer.
    """

    label: str
    layout: Layout
    folder: Path | None = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop`, flat; whole rows where the tensor has rows. Not to be changed."""
        raise NotImplementedError

    def where(self, name: str) -> str:
        """The file (or object) that holds a tensor, for messages."""
        return self.label

    def fingerprint(self, full: bool = False) -> str:
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        path = self.folder / "config.json" if self.folder else None
        return dict(read_json(path)) if path is not None and path.is_file() else {}

    @property
    def paths(self) -> list[Path]:
        """Folders that hold this input."""
        return [self.folder] if self.folder else []

    def shape(self, name: str) -> tuple[int, ...]:
        return self.layout[name][1]

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name).view(self.layout[name][1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __contains__(self, name: object) -> bool:
        return name in self.layout


class StateSource(Source):
    """A state dict in memory."""

    def __init__(self, state: Mapping[str, Tensor], label: str) -> None:
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{label}: {name!r} is a {type(value).__name__}, not a tensor")
        self._state, self.label = state, label
        self.layout = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._state[name].detach().cpu().reshape(-1)[start:stop]

    def fingerprint(self, full: bool = False) -> str:
        hasher = hashlib.sha256()
        for name, tensor in self._state.items():
            flat = tensor.detach().cpu().contiguous().view(-1)
            hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            hasher.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        return hasher.hexdigest()


class FileSource(Source):
    """A checkpoint on disk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.label, self.folder = checkpoint, checkpoint.source, checkpoint.folder
        self.layout = {name: (info.dtype, info.shape) for name, info in checkpoint.infos.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.checkpoint.read(name, start, stop)

    def where(self, name: str) -> str:
        info = self.checkpoint.infos.get(name)
        return printable(info.file if info else self.label)

    def fingerprint(self, full: bool = False) -> str:
        return self.checkpoint.fingerprint(full)


class _Lora:
    """The content of a LoRA adapter: per module its factors and scale; whole tensors that it brings along."""

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.label = os.fspath(source)
        checkpoint = open_checkpoint(source)
        self.folder = checkpoint.folder
        self.checkpoint = checkpoint
        path = self.folder / "adapter_config.json"
        self.config = config = read_json(path)
        where = printable(path)
        if config.get("peft_type") != "LORA":
            raise ValueError(
                f"{where}: peft_type {config.get('peft_type')!r} is not merged here: only LORA is"
            )
        for key in ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices"):
            if config.get(key):
                raise ValueError(f"{where}: {key} is set: merge this adapter into its base with PEFT first")
        self.factors: dict[str, dict[str, Tensor]] = {}
        self.whole: dict[str, str] = {}  # name in the model -> name in the adapter's file
        self.embeddings: set[str] = set()
        for key in checkpoint:
            name = key.removeprefix(PREFIX)
            if found := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", name):
                self.factors.setdefault(found[1], {})[found[3]] = checkpoint[key].float()
                if found[2]:
                    self.embeddings.add(found[1])
            elif "lora_" in name:
                raise ValueError(
                    f"{self.where(key)}: tensor {key!r} is of a kind of LoRA that is not merged here"
                )
            else:
                self.whole[name.replace(".base_layer.", ".")] = key
        for module, pair in self.factors.items():
            if set(pair) != {"A", "B"}:
                raise ValueError(
                    f"{printable(self.label)}: module {module!r} has only one of lora_A and lora_B"
                )
            for tensor in pair.values():
                if not bool(tensor.isfinite().all()):
                    raise ValueError(
                        f"{printable(self.label)}: the factors of {module!r} hold NaN or infinities"
                    )

    def where(self, key: str) -> str:
        return printable(self.checkpoint.infos[key].file)

    def scale(self, module: str) -> float:
        return scale_of(self.config, module, self.factors[module]["A"].shape[0])

    def transposed(self, module: str) -> bool:
        return module in self.embeddings or bool(self.config.get("fan_in_fan_out"))

    def delta(self, module: str, rows: slice = slice(None)) -> Tensor:
        """Rows of the change of a module's weight, as (rows, entries)."""
        a = self.factors[module]["A"].flatten(1)  # (rank, in)
        b = self.factors[module]["B"].flatten(1)  # (out, rank)
        left, right = (a.T, b.T) if self.transposed(module) else (b, a)
        return (left[rows] @ right).mul_(self.scale(module))

    def shape(self, module: str) -> tuple[int, ...]:
        a, b = self.factors[module]["A"], self.factors[module]["B"]
        if a.ndim > 2:
            return (b.shape[0], *a.shape[1:])
        return (a.shape[1], b.shape[0]) if self.transposed(module) else (b.shape[0], a.shape[1])


class LoraSource(Source):
    """A LoRA adapter merged into its base, piece by piece."""

    def __init__(self, base: Source, adapter: str | os.PathLike[str]) -> None:
        self.base, self.lora = base, _Lora(adapter)
        self.label, self.folder = self.lora.label, base.folder
        self.layout = dict(base.layout)
        self._modules: dict[str, str] = {}
        for module in self.lora.factors:
            name = self._in_base(f"{module}.weight")
            if self.lora.shape(module) != base.shape(name):
                raise ValueError(
                    f"{printable(self.label)}: the adapter changes {module!r} as {self.lora.shape(module)}, and tensor "
                    f"{name!r} in {base.where(name)} is {base.shape(name)}: another base?"
                )
            self._modules[name] = module
        self._whole: dict[str, str] = {}
        for name, key in self.lora.whole.items():
            info = self.lora.checkpoint.infos[key]
            name = name if self._matches(name) is None else self._in_base(name)
            self.layout[name] = (info.dtype, info.shape)  # a head that the base lacks is the adapter's own
            self._whole[name] = key

    def _matches(self, name: str) -> str | None:
        if name in self.base:
            return name
        # PEFT names modules as the model has them; a checkpoint may have a prefix more or less.
        found = [n for n in self.base if n.endswith("." + name) or name.endswith("." + n)]
        return found[0] if len(found) == 1 else None

    def _in_base(self, name: str) -> str:
        found = self._matches(name)
        if found is None:
            raise ValueError(
                f"{printable(self.label)}: the adapter changes {name!r}, which {printable(self.base.label)} lacks: other base?"
            )
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name in self._whole:
            return self.lora.checkpoint.read(self._whole[name], start, stop)
        piece = self.base.read(name, start, stop)
        if name in self._modules:
            shape = self.base.shape(name)
            entries = math.prod(shape[1:])
            rows = slice(start // entries, None if stop is None else stop // entries)
            piece = self.lora.delta(self._modules[name], rows).view(-1).add_(piece.float())
        return piece

    def where(self, name: str) -> str:
        changed = name in self._modules or name in self._whole
        return printable(self.label) if changed else self.base.where(name)

    def fingerprint(self, full: bool = False) -> str:
        return f"{self.lora.checkpoint.fingerprint(full)} on {self.base.fingerprint(full)}"

    @property
    def paths(self) -> list[Path]:
        return [self.lora.folder, *self.base.paths]


class AdapterSource(Source):
    """A LoRA adapter by itself: the changes of the weights, as dense tensors of their own."""

    def __init__(self, adapter: str | os.PathLike[str]) -> None:
        self.lora = _Lora(adapter)
        self.label, self.folder = self.lora.label, self.lora.folder
        self.layout = {m: (torch.float32, self.lora.shape(m)) for m in self.lora.factors}
        for name, key in self.lora.whole.items():
            info = self.lora.checkpoint.infos[key]
            self.layout[name] = (info.dtype, info.shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name in self.lora.whole:
            return self.lora.checkpoint.read(self.lora.whole[name], start, stop)
        if name not in self.lora.factors:  # a module that only other adapters change
            return torch.zeros(math.prod(self.layout[name][1]))[start:stop]
        return self.lora.delta(name).view(-1)[start:stop]

    def fingerprint(self, full: bool = False) -> str:
        return self.lora.checkpoint.fingerprint(full)


class ZeroSource(Source):
    """The base of adapters: no change."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.label = dict(layout), "the base"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return torch.zeros(math.prod(self.layout[name][1]))[start:stop]

    def fingerprint(self, full: bool = False) -> str:
        return "none"


def is_adapter(source: Any) -> bool:
    """Whether this is the folder (or hub id) of a PEFT adapter."""
    if not isinstance(source, str | os.PathLike):
        return False
    if os.path.exists(source) or "+" not in os.fspath(source):
        path = fetch(source)
        return (path / "adapter_config.json").is_file() or path.name == "adapter_model.safetensors"
    return False


def open_source(source: Any, label: str, base: Source | None = None) -> Source:
    """Open one input.

    Parameters
    ----------
    source : mapping, nn.Module, path or str
        A path or hub id of a checkpoint or a PEFT adapter, or `CHECKPOINT+ADAPTER`.
    label : str
        What to call an object in memory.
    base : Source, optional
        What adapters are merged into; by default the base that their config names.

    Raises
    ------
    ValueError, TypeError
        If it is none of these.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, nn.Module):
        return StateSource(source.state_dict(), label)
    if isinstance(source, Checkpoint):
        return FileSource(source)
    if isinstance(source, Mapping):
        return StateSource(source, label)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{label} is a {type(source).__name__}: give a state dict, a module or a folder")
    text = os.fspath(source)
    if not os.path.exists(text) and "+" in text:
        below, _, adapter = text.partition("+")
        found = LoraSource(open_source(below, label), adapter)
        found.label = text
        return found
    if is_adapter(source):
        if base is None:
            named = read_json(fetch(source) / "adapter_config.json").get("base_model_name_or_path")
            if not named:
                raise ValueError(
                    f"{printable(text)} is an adapter that names no base model: give base (--base)"
                )
            base = open_source(named, label)
        return LoraSource(base, source)
    return FileSource(open_checkpoint(source))
