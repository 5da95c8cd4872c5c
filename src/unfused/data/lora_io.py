"""LoRA adapters as folders hold them: the change of each weight of the base, without the base model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unfused.data.checkpoint_io import Checkpoint, fetch, open_checkpoint
from unfused.data.files import printable, read_json

__all__ = ["LoraChanges", "LowRank", "is_adapter", "open_lora", "scale_of"]

PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class LowRank:
    """`scale B A`, of a base weight (transposed where that is stored so).

    Attributes
    ----------
    b : Tensor (out, r)
    a : Tensor (r, in)
    scale : float, default=1.0
    transposed : bool, default=False
        Whether the weight is stored as (in, out): embeddings, and `fan_in_fan_out`.
    """

    b: torch.Tensor
    a: torch.Tensor
    scale: float = 1.0
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        sides = self.b.shape[0], self.a.shape[1]
        return torch.Size(sides[::-1] if self.transposed else sides)

    def dense(self) -> torch.Tensor:
        """In float32, in the shape of the weight."""
        product = self.scale * (self.b.float() @ self.a.float())
        return product.T if self.transposed else product


class LoraChanges(Mapping[str, LowRank]):
    """A lazy mapping from the name of a base weight to its change.

    Attributes
    ----------
    checkpoint : Checkpoint
    saved : dict of str to str
        Tensors that replace the base's (`modules_to_save`, trained biases): the base's name -> the adapter's.
    base : str or None
        What the adapter's config names as its base.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        path = fetch(folder)
        where = printable(path / "adapter_config.json")
        config = read_json(path / "adapter_config.json")
        if config.get("peft_type") != "LORA":
            raise ValueError(
                f"{where}: an adapter of type {config.get('peft_type')!r}; LoRA is read here, "
                "others after merge_and_unload()"
            )
        for flag in ("use_dora", "lora_bias", "target_parameters", "arrow_config"):
            if config.get(flag):
                raise ValueError(f"{where}: {flag} is set: merge the adapter with merge_and_unload() first")
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.base: str | None = config.get("base_model_name_or_path")
        self.saved: dict[str, str] = {}
        self._config = config
        self._found: dict[str, tuple[str, str]] = {}
        for name in self.checkpoint.names:
            short = name.removeprefix(PREFIX)
            for a, b in ((".lora_A.", ".lora_B."), (".lora_embedding_A", ".lora_embedding_B")):
                if a in short:
                    partner = name.replace(a, b)
                    if partner not in self.checkpoint:
                        raise ValueError(
                            f"{printable(self.checkpoint.folder)}: tensor {name!r} has no {b.strip('.')}"
                        )
                    self._found[short.split(a)[0] + ".weight"] = (name, partner)
                    break
                if b in short:
                    break
            else:
                self.saved[short] = name

    def __getitem__(self, name: str) -> LowRank:
        a_name, b_name = self._found[name]
        a, b = self.checkpoint[a_name], self.checkpoint[b_name]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{printable(self.checkpoint.folder)}: {a_name!r} of shape {tuple(a.shape)} and {tuple(b.shape)} beside it "
                "are no factors of a matrix"
            )
        scale = scale_of(self._config, name.removesuffix(".weight"), a.shape[0])
        embedding = ".lora_embedding_A" in a_name
        return LowRank(b, a, scale, embedding or bool(self._config.get("fan_in_fan_out")))

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of `B A` in a module, from an adapter's config.

    Examples
    --------
    >>> scale_of({"lora_alpha": 16, "alpha_pattern": {"up": 4}}, "layers.0.up", 8)
    0.5
    """
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.get("lora_alpha") or 8)  # PEFT's default
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def is_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds a PEFT adapter."""
    return (Path(source) / "adapter_config.json").is_file()


def open_lora(folder: str | os.PathLike[str]) -> LoraChanges:
    """The adapter's changes, name of the base weight -> `LowRank`; tensors are read when they are asked for.

    Raises
    ------
    ValueError
        For adapters that are no plain LoRA, or lack a factor.

    Examples
    --------
    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(
    ...     torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
    ... )
    >>> folder = tempfile.mkdtemp()
    >>> model.save_pretrained(folder)
    >>> changes = open_lora(folder)
    >>> list(changes), changes["0.weight"].scale, tuple(changes["0.weight"].dense().shape)
    (['0.weight'], 2.0, (3, 4))
    """
    return LoraChanges(folder)
