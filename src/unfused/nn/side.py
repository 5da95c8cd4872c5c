"""What tuners share that put a network beside the backbone instead of changing its layers (HST, UniPT).

The network is one module of one `TunerLayer`, and that layer follows the backbone by hooks: on the model for its inputs, on
its blocks for their tokens. Hooks move no module and rename no weight, and they stop with `unload`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from unfused.nn.blocks import transformer_blocks
from unfused.nn.tuner import TunerLayer, TunerModel, tuner_layers

__all__ = [
    "SideLayer",
    "SideModel",
    "Site",
    "find_sites",
    "first_tensor",
    "named_arguments",
    "with_first_tensor",
]

FINAL_NORMS = ("layernorm", "ln_f", "norm", "final_layer_norm")
PROJECTIONS = {"pixel_values": "visual_projection", "input_ids": "text_projection"}


class SideLayer(TunerLayer):
    """A layer that hooks into other modules than the one it wraps; one adapter works at a time."""

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.handles: list[RemovableHandle] = []

    def working(self) -> str | None:
        """The adapter that a hook has to work for, or None."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if self.has(name)]
        if len(names) > 1:
            raise ValueError(
                f"adapters {', '.join(names)}: networks beside the backbone cannot be mixed; activate one adapter at a time"
            )
        return names[0] if names else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("a network beside the backbone cannot be merged into its weights")


class SideModel(TunerModel):
    """A tuner with `SideLayer`s."""

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Running statistics, too: PEFT casts parameters alone, and a batch norm cannot mix the two."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in tuner_layers(self.model) if autocast_adapter_dtype else ():
            for kind in layer.adapter_modules:
                parts = getattr(layer, kind)
                for buffer in parts[adapter_name].buffers() if adapter_name in parts else ():
                    if buffer.dtype in (torch.float16, torch.bfloat16):
                        buffer.data = buffer.data.float()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for layer in tuner_layers(self.model):
            for handle in layer.handles if isinstance(layer, SideLayer) else ():
                handle.remove()
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `module` by name, for a hook that hands them on as keywords.

    Examples
    --------
    >>> named_arguments(nn.Embedding(2, 2), (3,), {})
    {'input': 3}
    """
    signature = inspect.signature(module.forward)
    found = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update(found.pop(name, {}))
    return found


def first_tensor(value: Any) -> Any:
    """The hidden states that a block gives, alone or as the first of a tuple."""
    return value[0] if isinstance(value, tuple) else value


def with_first_tensor(value: Any, tensor: Any) -> Any:
    """The same with other hidden states."""
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


@dataclass(frozen=True)
class Site:
    """Where a backbone's output comes out.

    Attributes
    ----------
    name, tower : str
        Names of the module that gives the output, and of the transformers model whose layers lead to it.
    layers : list of str
        Names of these layers.
    """

    name: str
    tower: str
    layers: list[str]


def find_sites(model: nn.Module, form: str) -> list[Site]:
    """Where the backbones inside a model give their output, one site each.

    Parameters
    ----------
    model : nn.Module
    form : {"sequence", "pooled", "conv"}
        The last hidden states of a transformer (from its final norm, or from its last block where that is the end); its
        embedding (from its pooler, or the projection beside it, as in CLIP); the last stage of a CNN.

    Examples
    --------
    >>> from transformers import ViTConfig, ViTModel
    >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    >>> [site.name for form in ("sequence", "pooled") for site in find_sites(vit, form)]
    ['layernorm', 'pooler']
    """
    lists: dict[str, list[str]] = {}
    if form == "conv":
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "stages":
                lists[name] = [f"{name}.{index}" for index in range(len(module))]
    else:
        for block in transformer_blocks(model):
            lists.setdefault(block.name.rpartition(".")[0], []).append(block.name)
    return [site for name, layers in lists.items() if (site := _site(model, form, name, layers))]


def _site(model: nn.Module, form: str, list_name: str, layers: list[str]) -> Site | None:
    tower = list_name
    while tower and not isinstance(model.get_submodule(tower), PreTrainedModel):
        tower = tower.rpartition(".")[0]
    module = model.get_submodule(tower)
    if not isinstance(module, PreTrainedModel):
        return None

    def inside(outer: str, *names: str) -> list[str]:
        around = model.get_submodule(outer)
        found = [name for name in names if isinstance(getattr(around, name, None), nn.Module)]
        return [f"{outer}.{name}" if outer else name for name in found]

    if form == "conv":
        fits = len(getattr(module.config, "hidden_sizes", ())) == len(layers)
        return Site(layers[-1], tower, layers) if fits else None
    if form == "pooled":
        projection = PROJECTIONS.get(module.main_input_name, "")
        found = inside(tower, "pooler") + inside(tower.rpartition(".")[0], projection)
        return Site(found[0], tower, layers) if found else None
    norms = inside(tower, *FINAL_NORMS) + inside(list_name.rpartition(".")[0], *FINAL_NORMS)
    return Site([*norms, layers[-1]][0], tower, layers)
