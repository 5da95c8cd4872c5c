"""Changes inside the attention of transformers' models: prefix keys and values, corrections of single heads.

Every attention module of transformers 5 hands its projected (and rotated, and cached) queries, keys and values to an
attention function that it looks up by name. `AttentionLayer` wraps the module and, for the time of one call, has it look up
ours, which puts the prefix before keys and values, lets every query see it, calls the model's own function (eager or sdpa)
and adds the heads' corrections to what comes out. So masks, grouped queries, rotary positions and caches stay the model's:
the prefix has no position, never enters the cache, and is added once in every step of generation.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from unfused.nn.blocks import module_at, transformer_blocks
from unfused.nn.bottleneck import Bottleneck, features
from unfused.nn.tuner import TunerLayer, TunerModel

__all__ = [
    "AttentionLayer",
    "HeadBottleneck",
    "PrefixLayer",
    "PrefixModel",
    "PrefixNet",
    "PrefixTrunk",
    "attention_modules",
    "head_sizes",
]

CROSS_ATTENTION = ("encoder_attn", "crossattention", "cross_attn")


def attention_modules(model: nn.Module, cross: bool = True) -> list[str]:
    """Names of the modules that hold the projections, block by block; cross-attention of decoders too, where wanted.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    >>> attention_modules(BertModel(BertConfig(**sizes)))
    ['encoder.layer.0.attention.self']
    """
    found = []
    for block in transformer_blocks(model):
        found.append((block.query or block.fused_qkv).rsplit(".", 1)[0])
        around = module_at(model, block.name)
        for name in CROSS_ATTENTION if cross else ():
            if (outer := getattr(around, name, None)) is not None:
                inner = hasattr(getattr(outer, "base_layer", outer), "self")
                found.append(f"{block.name}.{name}.self" if inner else f"{block.name}.{name}")
    return found


def head_sizes(attention: nn.Module) -> tuple[int, int, int]:
    """(width that the module reads, heads of keys and values, width of a head) of an attention module.

    Raises
    ------
    ValueError
        If it is no attention module of transformers that looks its attention function up.
    """
    if not hasattr(attention, "config") or not any(
        hasattr(sys.modules.get(c.__module__), "ALL_ATTENTION_FUNCTIONS") for c in type(attention).__mro__
    ):
        hint = "; name the module inside it that holds the projections" if hasattr(attention, "self") else ""
        raise ValueError(
            f"a {type(attention).__name__} is not an attention module of transformers that dispatches its attention function: "
            f"heads and prefixes need one (BERT, GPT-2, Llama, ViT, AST, CLIP, wav2vec 2.0, BART, ...){hint}"
        )
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    query, key = (
        next((m for n in names if (m := getattr(attention, n, None)) is not None), None)
        for names in (("q_proj", "query", "q", "q_attn", "c_attn", "qkv"), ("k_proj", "key", "k"))
    )
    if head_dim is None or query is None:
        raise ValueError(
            f"the heads of a {type(attention).__name__} are laid out in a way that is not known here"
        )
    heads: Any = features(key)[1] // head_dim if key is not None else attention.num_heads
    return features(query)[0], int(heads), int(head_dim)


class _Redirected:
    """A module's config during one call: all the same, but for the attention function and what that is to do."""

    _attn_implementation = "unfused_attention"

    def __init__(
        self,
        config: Any,
        prefix: tuple[torch.Tensor, torch.Tensor] | None,
        correction: torch.Tensor | None,
    ) -> None:
        self.config, self.prefix, self.correction = config, prefix, correction

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["config"], name)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that `AttentionLayer` has its module call: (batch, heads, tokens, head_dim) each."""
    redirected: _Redirected = module.config  # type: ignore[assignment]
    own = redirected.config._attn_implementation
    if own not in ("sdpa", "eager", None):
        raise ValueError(
            f"attn_implementation={own!r}: prefixes and heads' corrections need 'sdpa' or 'eager'; load the model with one"
        )
    length = 0
    if redirected.prefix is not None:
        prefix_key, prefix_value = (
            p.to(key.dtype).unflatten(-1, (-1, key.shape[-1])).transpose(0, 1).expand(len(key), -1, -1, -1)
            for p in redirected.prefix
        )  # (length, kv_heads * head_dim) -> (batch, kv_heads, length, head_dim)
        length, queries = prefix_key.shape[2], query.shape[2]
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if attention_mask is None and own == "sdpa" and causal and queries > 1:
            attention_mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=key.device).tril()[
                None, None
            ]
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (length, 0), value=attention_mask.dtype == torch.bool)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (length, 0))
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
    out, weights = _function(module, own)(module, query, key, value, attention_mask, **kwargs)
    if redirected.correction is not None:  # (batch, tokens, heads, head_dim), as `out` is
        out = out + redirected.correction.to(out.dtype).view(out.shape)
    return out, weights if weights is None else weights[..., length:]


def _function(module: nn.Module, name: str | None) -> Callable[..., Any]:
    if name == "sdpa":
        return AttentionInterface()["sdpa"]
    for parent in type(module).__mro__:  # every model file has its own
        if (
            eager := getattr(sys.modules.get(parent.__module__), "eager_attention_forward", None)
        ) is not None:
            return eager
    raise ValueError(
        f"a {type(module).__name__} has no eager attention: load the model with attn_implementation='sdpa'"
    )


AttentionInterface.register("unfused_attention", _attend)
_one_at_a_time = threading.RLock()  # for threads that share a model


class AttentionLayer(TunerLayer):
    """An attention module whose attention function is changed; a subclass says by what."""

    def prefix(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Prefix keys and values of the active adapters, (length, kv_heads * head_dim) each."""
        return None

    def head_correction(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor | None:
        """What is added to the heads' outputs, (batch, tokens, heads * head_dim); x is the module's input."""
        return None

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        x = args[0] if args else kwargs["hidden_states"]
        prefix, correction = self.prefix(names), self.head_correction(names, x)
        with _one_at_a_time:
            config = base.config
            base.config = _Redirected(config, prefix, correction)  # type: ignore[assignment]
            try:
                return self.base_layer(*args, **kwargs)
            finally:
                base.config = config


class PrefixTrunk(nn.Module):
    """What all layers' prefixes have in common while they train: `tanh(W table + b)`, (length, hidden)."""

    def __init__(self, length: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.table = nn.Embedding(length, dim)
        self.linear = nn.Linear(dim, hidden)

    def forward(self) -> torch.Tensor:
        return torch.tanh(self.linear(self.table.weight))


class PrefixNet(nn.Module):
    """One layer's prefix from the trunk: keys and values, (length, kv_dim) each."""

    def __init__(self, trunk: PrefixTrunk, kv_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.linear.out_features, 2 * kv_dim)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.head(self.trunk().to(self.head.weight.device)).chunk(2, dim=-1)
        return key, value


class PrefixLayer(AttentionLayer):
    """Attention with learned keys and values before its own; several active adapters' prefixes are all there.

    A subclass names two containers of parameters (keys, values) and one of modules (`PrefixNet`s); an adapter has the
    ones or the other. The config has `prefix_length`, `prefix_hidden` and `prefix_dropout`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.dim, heads, head_dim = head_sizes(self.get_base_layer())
        self.kv_dim = heads * head_dim
        self._dropout: dict[str, float] = {}
        self._shared: dict[str, PrefixTrunk] = {}  # a plain dict: not this layer's own

    def share(self, adapter_name: str, trunk: PrefixTrunk) -> None:
        """Give an adapter that is about to be made the trunk that it shares with other layers."""
        self._shared[adapter_name] = trunk

    def update_layer(self, adapter_name: str, config: Any) -> None:
        self._dropout[adapter_name] = config.prefix_dropout
        if (trunk := self._shared.pop(adapter_name, None)) is not None:
            self._nets()[adapter_name] = PrefixNet(trunk, self.kv_dim)
            return
        for container in self._parameters_of():
            container[adapter_name] = nn.Parameter(0.02 * torch.randn(config.prefix_length, self.kv_dim))

    def _parameters_of(self) -> tuple[nn.ParameterDict, nn.ParameterDict]:
        keys, values = (getattr(self, name) for name in self.adapter_parameters)
        return keys, values

    def _nets(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_modules[0])

    def prefix(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [self._pair(name) for name in names]
        return torch.cat([key for key, _ in pairs]), torch.cat([value for _, value in pairs])

    def _pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._parameters_of()
        key, value = self._nets()[name]() if name in self._nets() else (keys[name], values[name])
        rate = self._dropout[name]
        return F.dropout(key, rate, self.training), F.dropout(value, rate, self.training)

    def bake(self, name: str, values: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Replace an adapter's network by the keys and values that it gives (or by others of their shape)."""
        if name not in self._nets():
            return
        net: Any = self._nets()[name]
        trainable = net.head.weight.requires_grad
        with torch.no_grad():
            pair = net() if values is None else values
        for container, tensor in zip(self._parameters_of(), pair, strict=True):
            container[name] = nn.Parameter(tensor.detach().clone(), requires_grad=trainable)
        del self._nets()[name]

    def prepare_load(self, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Files hold keys and values."""
        if adapter_name in self._nets():
            like: Any = self._nets()[adapter_name]
            empty = like.head.weight.new_zeros(like.trunk.table.num_embeddings, self.kv_dim)
            self.bake(adapter_name, (empty, empty))

    def baked(self, adapter_name: str, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Entries of this layer for a file, from those of its state dict: networks evaluated."""
        start = f"{self.adapter_modules[0]}.{adapter_name}."
        net = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        if not net:
            return state
        with torch.no_grad():
            pair = torch.func.functional_call(self._nets()[adapter_name], net)
        rest = {key: value for key, value in state.items() if not key.startswith(start)}
        return rest | {
            f"{name}.{adapter_name}": tensor.contiguous()
            for name, tensor in zip(self.adapter_parameters, pair, strict=True)
        }


class HeadBottleneck(nn.Module):
    """A bottleneck for every head, all of which read the sublayer's input: (..., dim) -> (..., heads * head_dim)."""

    def __init__(self, dim: int, heads: int, head_dim: int, config: Any) -> None:
        super().__init__()
        net = Bottleneck(
            dim,
            heads * config.bottleneck_dim,
            config.activation,
            config.init,
            config.layernorm,
            config.dropout,
            dim_out=head_dim,
            bias=config.bottleneck_bias,
        )
        self.scaling, self.norm, self.down = config.scaling, net.norm, net.down
        self.activation, self.dropout = net.activation, net.dropout
        self.up = nn.Parameter(  # (heads, head_dim, bottleneck_dim)
            net.up.weight.detach().unflatten(1, (heads, config.bottleneck_dim)).transpose(0, 1).clone()
        )
        self.bias = nn.Parameter(torch.zeros(heads * head_dim)) if config.bottleneck_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.down(self.norm(x.to(self.down.weight.dtype)))
        hidden = self.dropout(self.activation(hidden)).unflatten(-1, (len(self.up), -1))
        out = torch.einsum("...hr,hdr->...hd", hidden, self.up).flatten(-2)
        return self.scaling * (out if self.bias is None else out + self.bias)


class PrefixModel(TunerModel):
    """A tuner model some of whose layers may be `PrefixLayer`s: makes what they share, bakes it, packs the file."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        self._trunks: dict[str, PrefixTrunk] = {}
        self._attention = attention_modules(self.model)
        return super()._prepare_adapter_config(peft_config, model_config)

    def extend_layer(self, layer: TunerLayer, adapter_name: str, config: Any, key: str) -> None:
        if isinstance(layer, PrefixLayer) and config.prefix_hidden and not config.inference_mode:
            group = re.sub(
                r"\.\d+\b", "", f".{key}"
            )  # of one tower (encoder, decoder) and kind (self, cross)
            if group not in self._trunks:
                self._trunks[group] = PrefixTrunk(config.prefix_length, layer.dim, config.prefix_hidden)
            layer.share(adapter_name, self._trunks[group])
        super().extend_layer(layer, adapter_name, config, key)

    def bake_prefix(self, adapter_name: str = "default") -> None:
        """Replace the network that gives a prefix in training by the keys and values; saving does it in the file."""
        for layer in self.model.modules():
            if isinstance(layer, PrefixLayer):
                layer.bake(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        state = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for name, layer in model.named_modules():
            if isinstance(layer, PrefixLayer):
                own = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
                local = {key.removeprefix(f"{name}."): value for key, value in own.items()}
                state = {key: value for key, value in state.items() if key not in own}
                state |= {f"{name}.{key}": value for key, value in layer.baked(adapter_name, local).items()}
        return state

    def attention_layer(
        self, layer_type: type[AttentionLayer], target: nn.Module, name: str, key: str
    ) -> TunerLayer:
        """Wrap an attention module; the error of one that cannot be says which."""
        try:
            return layer_type(target, name)
        except ValueError as reason:
            raise ValueError(f"target_modules: {key!r}: {reason}") from None
