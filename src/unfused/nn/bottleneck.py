"""Bottleneck corrections of a transformer's sublayers: the small network, and where it goes in.

A correction `A(z) = s * W_up f(W_down z)` is added to a sublayer (attention or FFN) with input x, output y and residual
stream h. What it reads is one of

    "input"   z = x          parallel adapter: y + A(x)
    "output"  z = y          sequential adapter: y + A(y)
    "stream"  z = h          AdaptFormer: y + A(h), h before the block's own norm
    "sum"     z = LN(h + y)  Pfeiffer: LN(h + y + A(z)), the same norm twice; a pre-norm block has none: y + A(h + y)

and always comes before the residual sum, so before a post-norm block's LayerNorm. `find_sites` knows for each architecture
which module has to be wrapped for that; `SiteLayer` and `SiteModel` are the PEFT classes that do it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from unfused.nn.blocks import Block, module_at, transformer_blocks
from unfused.nn.tuner import TunerLayer, TunerModel

__all__ = [
    "READS",
    "SUBLAYERS",
    "Bottleneck",
    "BottleneckLayer",
    "Site",
    "SiteLayer",
    "SiteModel",
    "features",
    "find_sites",
]

READS = ("input", "output", "stream", "sum")
SUBLAYERS = ("attention", "ffn")
LINEAR = type(ACT2FN["linear"])


class Bottleneck(nn.Module):
    """The correction alone, without a skip: `scaling * (W_up dropout(f(W_down LN(x) + b_down)) + b_up)`.

    Parameters
    ----------
    dim : int
        Width of the input.
    bottleneck_dim : int
    activation : str, default="relu"
        A name of transformers' ACT2FN; "linear" for none.
    init : {"lora", "bert"}, default="lora"
        "lora": W_down Kaiming-uniform (a = sqrt 5), the rest 0, so that the correction is 0 at first. "bert": matrices from
        N(0, 0.02), biases 0.
    layernorm : bool, default=False
        A LayerNorm of its own on the input.
    dropout : float, default=0.0
        After the activation.
    scaling : float, default=1.0
    dim_out : int, optional
        Width of the output; by default `dim`.
    bias : bool, default=True

    Examples
    --------
    >>> bottleneck = Bottleneck(6, bottleneck_dim=2)
    >>> bottleneck(torch.randn(3, 5, 6)).abs().max().item()
    0.0
    >>> sum(p.numel() for p in bottleneck.parameters())
    32
    """

    def __init__(
        self,
        dim: int,
        bottleneck_dim: int,
        activation: str = "relu",
        init: str = "lora",
        layernorm: bool = False,
        dropout: float = 0.0,
        scaling: float = 1.0,
        dim_out: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.norm = nn.LayerNorm(dim) if layernorm else nn.Identity()
        self.down = nn.Linear(dim, bottleneck_dim, bias=bias)
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck_dim, dim_out or dim, bias=bias)
        self.reset_parameters(init)

    def reset_parameters(self, init: str) -> None:
        """Draw the weights anew."""
        if init == "lora":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        elif init == "bert":
            nn.init.normal_(self.down.weight, std=0.02)
            nn.init.normal_(self.up.weight, std=0.02)
        else:
            raise ValueError(f"init={init!r}: choose 'lora' or 'bert'")
        for linear in (self.down, self.up):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., dim) -> (..., dim_out)
        hidden = self.down(self.norm(x.to(self.down.weight.dtype)))
        return self.scaling * self.up(self.dropout(self.activation(hidden)))


@dataclass(frozen=True)
class Site:
    """Where a correction goes in.

    Attributes
    ----------
    name : str
        Of the module to wrap.
    kind : {"output", "residual", "norm"}
        How: its output gets the correction (first element of a tuple); or it is called with (hidden, residual), as BERT's
        `output` modules are, and the residual gets it, which is the same and spares a hook; or it is a norm u -> LN(u),
        called again as LN(u + A(LN(u))).
    reads : {"input", "output", "stream", "sum"}
    source : str
        Name of the module whose input is what the correction reads (FFNs of two siblings, residual streams); empty for the
        wrapped module's own.
    dim_in, dim_out : int
        Widths of what is read and of what is corrected.
    """

    name: str
    kind: str
    reads: str
    source: str
    dim_in: int
    dim_out: int


def features(module: nn.Module) -> tuple[int, int]:
    """Widths of input and output: of a linear map, of a norm, or from the first to the last linear map of a module.

    Raises
    ------
    ValueError
        Where there is no linear map inside.
    """
    module = getattr(module, "base_layer", module)
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    inside = [m for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]
    if inside:
        return features(inside[0])[0], features(inside[-1])[1]
    if (weight := getattr(module, "weight", None)) is not None and weight.ndim == 1:
        return weight.numel(), weight.numel()
    raise ValueError(
        f"a {type(module).__name__} has no linear map inside: the width of its correction is unknown"
    )


def find_sites(model: nn.Module, sublayer: str, reads: str = "input") -> dict[str, Site]:
    """The sites of all blocks for corrections of one sublayer, by the name of the module to wrap, in order.

    Parameters
    ----------
    model : nn.Module
        BERT, GPT-2, Llama, ViT, AST, CLIP, wav2vec 2.0, BART and their kin; see `unfused.nn.blocks`.
    sublayer : {"attention", "ffn"}
        Self-attention or FFN.
    reads : {"input", "output", "stream", "sum"}
        See the module's docstring.

    Raises
    ------
    ValueError
        If the model has no transformer blocks that we know.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    >>> bert = BertModel(BertConfig(**sizes))
    >>> [[*find_sites(bert, "ffn", reads)] for reads in ("input", "output", "sum")]
    [['encoder.layer.0.output'], ['encoder.layer.0.output.dropout'], ['encoder.layer.0.output.LayerNorm']]
    """
    blocks = transformer_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no transformer blocks that are known here: name target_modules, each with one input"
        )
    sites = [_site(model, block, sublayer, reads) for block in blocks]
    return {site.name: site for site in sites}


def _site(model: nn.Module, block: Block, sublayer: str, reads: str) -> Site:
    ffn = sublayer == "ffn"
    norm = block.norm2 if ffn else block.norm1
    last = block.mlp_out if ffn else block.attention_out
    name = (block.mlp or last) if ffn else block.attention
    first = block.mlp_in if ffn else block.query or block.fused_qkv
    dim_in, dim_out = features(module_at(model, first))[0], features(module_at(model, last))[1]

    def site(name: str, kind: str = "output", source: str = "") -> Site:
        return Site(name, kind, reads, source, dim_in, dim_out)

    if reads == "sum" and not norm:
        raise ValueError(
            f"block {block.name!r} has no norm that is known here: choose one that reads input or output"
        )
    if last.endswith(
        ".output.dense"
    ):  # BERT: output(hidden, residual) = LN(dropout(dense(hidden)) + residual)
        output = last.removesuffix(".dense")
        if reads in ("input", "stream"):
            return site(output, "residual")
        if reads == "output":
            return site(f"{output}.dropout" if hasattr(module_at(model, output), "dropout") else last)
        return site(norm, "norm")
    if reads == "sum" and block.post_norm:
        return site(norm, "norm")
    if reads in ("stream", "sum") and not block.post_norm:
        return site(name, source=norm)
    if reads != "output" and ffn and not block.mlp:  # BART: fc1 and fc2 are siblings
        return site(name, source=block.mlp_in)
    return site(name)


class _Memory:
    """A pre-hook that remembers what a module was given, for each thread that runs the model."""

    def __init__(self) -> None:
        self.values: dict[int, torch.Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.values[threading.get_ident()] = _first(args, kwargs)

    def recall(self) -> torch.Tensor | None:
        return self.values.get(threading.get_ident())

    def forget(self) -> None:
        self.values.pop(threading.get_ident(), None)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (
        args[0]
        if args
        else kwargs["hidden_states"]
        if "hidden_states" in kwargs
        else next(iter(kwargs.values()))
    )


class SiteLayer(TunerLayer):
    """A module wrapped at a `Site`, with the corrections of its adapters.

    A subclass names one container of modules, which map what the site reads to the correction, and makes them:

        class PaLayer(SiteLayer):
            adapter_modules = ("unfused_pa_bottleneck",)
            def make(self, site, config):
                return Bottleneck(site.dim_in, config.bottleneck_dim, dim_out=site.dim_out)

    Active adapters that read the same are summed; those that read an output or a sum read it as the ones before left it.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.sites: dict[str, Site] = {}
        self._memories: dict[str, _Memory] = {}

    def make(self, site: Site, config: Any) -> nn.Module:
        """The trainable module of one adapter: (..., dim_in) -> (..., dim_out)."""
        raise NotImplementedError

    def place(self, adapter_name: str, site: Site, source: nn.Module | None) -> None:
        """Say where an adapter's correction goes; `source` is the module named in `site.source`."""
        self.sites[adapter_name] = site
        if source is not None and site.source not in self._memories:
            self._memories[site.source] = memory = _Memory()
            source.register_forward_pre_hook(memory, with_kwargs=True)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        getattr(self, self.adapter_modules[0])[adapter_name] = self.make(self.sites[adapter_name], config)

    def why_not_merge(self, name: str) -> str:
        """Why an adapter does not fold into the wrapped module; empty where it does."""
        return "corrections are no change of a weight"

    def correction(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The correction of one adapter, of x as its site reads it."""
        return getattr(self, self.adapter_modules[0])[name](x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward(*args, **kwargs)
        finally:
            for memory in self._memories.values():  # do not hold activations longer than this
                memory.forget()

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        kinds = {
            kind: [n for n in names if self.sites[n].kind == kind] for kind in ("residual", "norm", "output")
        }
        if kinds["residual"]:
            hidden, residual = args
            x = residual
            for name in kinds["residual"]:
                residual = residual + self.correction(name, x).to(residual.dtype)
            args = (hidden, residual)
        y = self.base_layer(*args, **kwargs)
        for name in kinds["norm"]:
            args = (args[0] + self.correction(name, y).to(y.dtype),)
            y = self.base_layer(*args, **kwargs)
        if not kinds["output"]:
            return y
        rest: tuple[Any, ...] | None = None
        if isinstance(y, tuple):
            y, rest = y[0], y[1:]
        for name in kinds["output"]:
            y = y + self.correction(name, self._read(self.sites[name], y, args, kwargs)).to(y.dtype)
        return y if rest is None else (y, *rest)

    def _read(
        self, site: Site, y: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        x = self._memories[site.source].recall() if site.source else None
        if x is None:
            x = _first(args, kwargs)
        return y if site.reads == "output" else x + y if site.reads == "sum" else x

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.sites.pop(adapter_name, None)


class BottleneckLayer(SiteLayer):
    """A module with `Bottleneck`s; a linear one, parallel to a linear map, can be merged.

    A subclass names its container. The config has `bottleneck_dim`, `activation`, `init`, `dropout`, `scaling` and, where
    they are not False and True, `layernorm` and `bottleneck_bias`.
    """

    def make(self, site: Site, config: Any) -> nn.Module:
        return Bottleneck(
            site.dim_in,
            config.bottleneck_dim,
            config.activation,
            config.init,
            getattr(config, "layernorm", False),
            config.dropout,
            config.scaling,
            site.dim_out,
            getattr(config, "bottleneck_bias", True),
        )

    def linear_map(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (dim_out, dim_in) and bias of a linear correction."""
        net: Any = getattr(self, self.adapter_modules[0])[name]
        weight = net.scaling * net.up.weight @ net.down.weight
        return weight, None if net.up.bias is None else net.scaling * (
            net.up.weight @ net.down.bias + net.up.bias
        )

    def why_not_merge(self, name: str) -> str:
        net, site = getattr(self, self.adapter_modules[0])[name], self.sites[name]
        if not isinstance(net.activation, LINEAR) or not isinstance(net.norm, nn.Identity):
            return "a bottleneck with a nonlinearity is no change of a weight (activation='linear' without LayerNorm is)"
        linear = (
            isinstance(self.get_base_layer(), nn.Linear | Conv1D)
            and site.reads == "input"
            and not site.source
        )
        return "" if linear else f"{site.name!r} is no linear map that the bottleneck is parallel to"

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        delta = self.linear_map(adapter_name)[0]
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merged_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, _ = super().merged_weights(name, weight, bias)
        if (shift := self.linear_map(name)[1]) is not None:
            bias = shift.to(weight.dtype) if bias is None else bias + shift.to(weight.dtype)
        return weight, bias


class SiteModel(TunerModel):
    """Injects `SiteLayer`s: at the sites of `config.sublayers` where `target_modules` is not given.

    A subclass names its layer in `site_layer`; what its adapters read is `reads(config)`.
    """

    site_layer: ClassVar[type[SiteLayer]] = SiteLayer

    def reads(self, config: Any) -> str:
        """One of READS."""
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        self._known: dict[
            tuple[str, str], dict[str, Site]
        ] = {}  # of this injection: names stay as they are during it
        self._blocks = transformer_blocks(self.model)
        return super()._prepare_adapter_config(peft_config, model_config)

    def sites_of(self, config: Any, sublayers: Sequence[str]) -> dict[str, Site]:
        """All sites of these sublayers for this config, by name."""
        found: dict[str, Site] = {}
        for sublayer in sublayers:
            key = (sublayer, self.reads(config))
            if key not in self._known:
                self._known[key] = find_sites(self.model, *key)
            found |= self._known[key]
        return found

    def default_targets(self, config: Any, model_config: dict) -> Any:
        return set(self.sites_of(config, config.sublayers))

    def site(self, config: Any, name: str, module: nn.Module) -> Site:
        """The site of a module that the user named: one that we know, or any module with one input and one output."""
        reads = self.reads(config)
        blocks = self._blocks
        if any(name == block.attention and block.attention_out.endswith(".output.dense") for block in blocks):
            raise ValueError(
                f"target_modules: {name!r} ends with the LayerNorm that a correction has to come before: leave target_modules "
                f"out, or name {name.rsplit('.', 1)[-1]}.output"
            )
        if (known := self.sites_of(config, SUBLAYERS if blocks else ()).get(name)) is not None:
            return known
        if reads not in ("input", "output"):
            raise ValueError(
                f"target_modules: the residual stream around {name!r} is not known; leave target_modules out, or choose an "
                "adapter that reads a module's own input or output"
            )
        dim_in, dim_out = features(module)
        return Site(name, "output", reads, "", dim_in if reads == "input" else dim_out, dim_out)

    def make_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        return self.site_layer(target, adapter_name)

    def extend_layer(self, layer: TunerLayer, adapter_name: str, config: Any, key: str) -> None:
        if isinstance(layer, SiteLayer):
            site = self.site(config, key, layer.get_base_layer())
            layer.place(adapter_name, site, module_at(self.model, site.source) if site.source else None)
        super().extend_layer(layer, adapter_name, config, key)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self.model.modules():
            for name in layer.active_adapters if isinstance(layer, SiteLayer) else ():
                if layer.has(name) and (why := layer.why_not_merge(name)):
                    raise ValueError(f"{type(self).__name__.removesuffix('Model')} cannot be merged: {why}")

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[func-returns-value]
        for module in self.model.modules():
            for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, _Memory)]:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        return model
