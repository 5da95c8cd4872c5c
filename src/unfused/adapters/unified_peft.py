"""Unified PEFT: adapters, prefixes and LoRA as points of one design space, and its best point, the Mix-And-Match adapter.

Every method adds a change dh to some hidden state h of a frozen transformer. With x the sublayer's input, the points are

    form         f(z W_down) W_up: a bottleneck; softmax(x W_q P_k') P_v: a prefix of the attention's keys and values
    where        a head's output, the attention's, the FFN's; query, key, value projections
    insertion    parallel, z = x; sequential, z = h; Pfeiffer's, z = LN(h + residual)
    composition  h + dh; scaled, h + s dh; gated, (1 - lam) h + lam dh

A prefix is gated by itself: attention over [P_k; K], [P_v; V] is (1 - lam) Attn(q, K, V) + lam softmax(q P_k') P_v per head
and query, lam the prefix's share of the softmax. `BottleneckConfig` is the whole space, `BottleneckConfig.preset(...)` its
named points. `MamConfig`, the point that the paper recommends, puts a short prefix into the attention and a wide scaled
parallel bottleneck beside the FFN.

Supported: the transformers that `unfused.nn.blocks` knows (BERT, GPT-2, Llama, ViT, AST, CLIP, wav2vec 2.0, BART and kin;
T5 is not), with eager or sdpa attention; bottlenecks also on any module with one input and one output that the user names.

Reference: Towards a Unified View of Parameter-Efficient Transfer Learning, ICLR 2022, arXiv:2110.04366.
Needs: labels, gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from unfused.nn.attention import (
    AttentionLayer,
    HeadBottleneck,
    PrefixLayer,
    PrefixModel,
    attention_modules,
    head_sizes,
)
from unfused.nn.bottleneck import SUBLAYERS, BottleneckLayer, SiteModel
from unfused.nn.peft_register import register
from unfused.nn.tuner import TunerConfig, TunerLayer

__all__ = ["BottleneckConfig", "BottleneckModel", "MamConfig", "MamModel"]

PROJECTIONS = ("query", "key", "value", "attention_out")
WHERE = (*SUBLAYERS, "heads", *PROJECTIONS)
INSERTIONS = {"parallel": "input", "sequential": "output", "pfeiffer": "sum", "adaptformer": "stream"}
PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": {
        "sublayers": ["attention", "ffn"],
        "insertion": "sequential",
        "init": "bert",
        "layernorm": True,
    },
    "pfeiffer": {"insertion": "pfeiffer", "init": "bert"},
    "parallel": {},
    "scaled_parallel": {"scaling": 4.0, "bottleneck_dim": 512},
    "mh_pa": {"sublayers": ["heads"], "bottleneck_dim": 16},
    "lora": {
        "sublayers": ["query", "value"],
        "activation": "linear",
        "bottleneck_bias": False,
        "bottleneck_dim": 16,
        "scaling": 2.0,
    },
    "prefix": {"form": "prefix", "sublayers": ["heads"], "composition": "gated", "prefix_length": 200},
}


@dataclass
class _PrefixFields:
    prefix_length: int = field(default=30, metadata={"help": "Keys and values before the attention's own."})
    prefix_hidden: int = field(
        default=800, metadata={"help": "Width of the network that gives the prefix in training; 0 for none."}
    )
    prefix_dropout: float = field(default=0.0, metadata={"help": "On keys and values of the prefix."})


@dataclass
class BottleneckConfig(TunerConfig, _PrefixFields):
    """Configuration of any single point of the design space.

    Parameters
    ----------
    form : {"bottleneck", "prefix"}, default="bottleneck"
    sublayers : list of {"attention", "ffn", "heads", "query", "key", "value", "attention_out"}, default=["ffn"]
        Where, if `target_modules` is not given. "heads": every head's output, before the attention's output projection.
        GPT-2 and others that compute query, key and value in one map get one bottleneck for it.
    insertion : {"parallel", "sequential", "pfeiffer", "adaptformer"}, default="parallel"
        "pfeiffer" reads LN(h + residual), whose LayerNorm is then applied again; on pre-norm blocks, which have none,
        h + residual. "adaptformer" is parallel and reads the residual stream, before the block's norm.
    composition : {"add", "scaled", "gated"}, default="scaled"
        "gated" is what a prefix does, and only that.
    scaling : float, default=1.0
        s, a constant to tune together with the learning rate; the paper takes 4 for generation, 2 for classification.
    bottleneck_dim : int, default=64
        Of each head where `sublayers=["heads"]`.
    activation : str, default="relu"
        A name of transformers' ACT2FN; "linear" for none.
    init : {"lora", "bert"}, default="lora"
        "lora": W_down Kaiming-uniform, W_up 0, so that training starts at the base model; "bert": both N(0, 0.02).
    layernorm : bool, default=False
        A LayerNorm of the adapter's own on its input.
    dropout : float, default=0.0
        Inside the bottleneck.
    bottleneck_bias : bool, default=True
    prefix_length : int, default=30
        For form="prefix", as the next two.
    prefix_hidden : int, default=800
        While training, keys and values come from a table through `Linear, tanh, Linear`, table and first map shared by all
        layers (of one tower, and kind of attention). The adapter's file holds the keys and values alone; loaded again, they
        are what trains. So a run that must be resumable has to train them directly: 0.
    prefix_dropout : float, default=0.0

    Notes
    -----
    A prefix never starts at the base model: it takes some of the attention from the first step on.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> bert = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
    >>> config = BottleneckConfig.preset("scaled_parallel", bottleneck_dim=8, modules_to_save=["classifier"])
    >>> model = get_peft_model(bert, config)
    >>> sum(p.numel() for n, p in model.named_parameters() if "unfused_bottleneck" in n)  # 2 (2 * 16 * 8 + 8 + 16)
    560
    """

    form: str = field(default="bottleneck", metadata={"help": "'bottleneck' or 'prefix'."})
    sublayers: list[str] = field(
        default_factory=lambda: ["ffn"], metadata={"help": "Where, if target_modules is not given."}
    )
    insertion: str = field(
        default="parallel", metadata={"help": "'parallel', 'sequential', 'pfeiffer' or 'adaptformer'."}
    )
    composition: str = field(default="scaled", metadata={"help": "'add', 'scaled' or (prefixes) 'gated'."})
    scaling: float = field(default=1.0, metadata={"help": "Constant factor of the correction."})
    bottleneck_dim: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    activation: str = field(
        default="relu", metadata={"help": "A name of transformers' ACT2FN; 'linear' for none."}
    )
    init: str = field(
        default="lora", metadata={"help": "'lora' (starts at the base model) or 'bert' (near it)."}
    )
    layernorm: bool = field(default=False, metadata={"help": "A LayerNorm on the bottleneck's input."})
    dropout: float = field(default=0.0, metadata={"help": "Inside the bottleneck."})
    bottleneck_bias: bool = field(default=True, metadata={"help": "Biases of the bottleneck."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self, "form", ("bottleneck", "prefix"))
        _one_of(self, "insertion", tuple(INSERTIONS))
        _one_of(self, "composition", ("add", "scaled", "gated"))
        self.require(
            len(self.sublayers) > 0 and set(self.sublayers) <= set(WHERE),
            f"sublayers={self.sublayers!r}: choose from {list(WHERE)}",
        )
        if self.form == "prefix":
            self.require(
                self.composition == "gated" and list(self.sublayers) == ["heads"],
                "a prefix acts on sublayers=['heads'] with composition='gated'; preset('prefix') is that",
            )
        else:
            self.require(
                self.composition != "gated",
                "composition='gated' is a prefix's: its gate is the prefix's share of the softmax; choose 'add' or 'scaled'",
            )
        self.require(
            not {"heads", "attention"} <= set(self.sublayers),
            "sublayers: 'heads' and 'attention' wrap the same module",
        )
        self.require(
            self.composition != "add" or self.scaling == 1,
            f"composition='add' has no scaling={self.scaling}: choose 'scaled'",
        )
        self.require(
            self.insertion == "parallel" or set(self.sublayers) <= set(SUBLAYERS),
            f"insertion={self.insertion!r} is for attention and ffn; heads and projections are adapted in 'parallel'",
        )
        _check_bottleneck(self)
        _check_prefix(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> BottleneckConfig:
        """A named point of the space.

        Parameters
        ----------
        name : {"houlsby", "pfeiffer", "parallel", "scaled_parallel", "mh_pa", "lora", "prefix"}
        **overrides
            Other fields, such as `bottleneck_dim` or `modules_to_save`.

        Examples
        --------
        >>> BottleneckConfig.preset("houlsby", bottleneck_dim=32).insertion
        'sequential'
        """
        if name not in PRESETS:
            raise ValueError(
                f"preset {name!r} is not known: choose from {', '.join(PRESETS)} (and MamConfig for 'mam')"
            )
        return cls(**{**PRESETS[name], **overrides})


@dataclass
class MamConfig(TunerConfig, _PrefixFields):
    """Configuration of the Mix-And-Match adapter: a prefix in the attention, a scaled parallel bottleneck at the FFN.

    Parameters
    ----------
    prefix_length : int, default=30
    bottleneck_dim : int, default=512
        The paper takes 30 and 512 for generation, 16 and 16 for classification.
    scaling : float, default=4.0
        4 for generation, 2 for classification.
    target_attention, target_ffn : list of str, optional
        Suffixes of names of the attention modules (those with the projections) and of the FFNs; by default all that the
        architecture has, cross-attention too.
    activation, init, dropout
        Of the bottleneck, as in `BottleneckConfig`.
    prefix_hidden, prefix_dropout
        Of the prefix, as in `BottleneckConfig`.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    >>> model = get_peft_model(vit, MamConfig(prefix_length=4, bottleneck_dim=8, scaling=2.0, modules_to_save=["classifier"]))
    >>> model(torch.randn(1, 3, 8, 8)).logits.shape
    torch.Size([1, 2])
    """

    bottleneck_dim: int = field(default=512, metadata={"help": "Width of the bottleneck."})
    scaling: float = field(default=4.0, metadata={"help": "Constant factor of the bottleneck."})
    target_attention: list[str] | None = field(
        default=None, metadata={"help": "Suffixes of attention modules."}
    )
    target_ffn: list[str] | None = field(default=None, metadata={"help": "Suffixes of FFNs."})
    activation: str = field(default="relu", metadata={"help": "A name of transformers' ACT2FN."})
    init: str = field(default="lora", metadata={"help": "'lora' (starts at 0) or 'bert' (near it)."})
    dropout: float = field(default=0.0, metadata={"help": "Inside the bottleneck."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bottleneck(self)
        _check_prefix(self)


def _one_of(config: TunerConfig, name: str, choices: Sequence[str]) -> None:
    value = getattr(config, name)
    config.require(value in choices, f"{name}={value!r}: choose from {', '.join(map(repr, choices))}")


def _check_bottleneck(config: Any) -> None:
    _one_of(config, "init", ("lora", "bert"))
    config.require(config.bottleneck_dim >= 1, f"bottleneck_dim={config.bottleneck_dim}: give 1 or more")
    config.require(0 <= config.dropout < 1, f"dropout={config.dropout}: give a number in [0, 1)")
    config.require(
        config.activation in ACT2FN,
        f"activation={config.activation!r} is not in transformers' ACT2FN: 'relu', 'gelu', ...",
    )


def _check_prefix(config: Any) -> None:
    config.require(config.prefix_length >= 1, f"prefix_length={config.prefix_length}: give 1 or more")
    config.require(
        config.prefix_hidden >= 0, f"prefix_hidden={config.prefix_hidden}: give a width, or 0 for no network"
    )
    config.require(
        0 <= config.prefix_dropout < 1, f"prefix_dropout={config.prefix_dropout}: give a number in [0, 1)"
    )


class _SublayerLayer(BottleneckLayer):
    """A sublayer or a projection with bottlenecks."""

    adapter_modules = ("unfused_bottleneck_net",)


class _HeadsLayer(AttentionLayer):
    """Attention whose heads' outputs are corrected."""

    adapter_modules = ("unfused_bottleneck_heads",)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        base: Any = self.get_base_layer()
        dim, _, head_dim = head_sizes(base)
        heads = getattr(base, "num_heads", None) or getattr(base, "num_attention_heads", None)
        heads = heads or base.config.num_attention_heads
        self.unfused_bottleneck_heads[adapter_name] = HeadBottleneck(dim, heads, head_dim, config)

    def head_correction(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.unfused_bottleneck_heads[name](x) for name in names]).sum(0)


class _SinglePrefixLayer(PrefixLayer):
    """Attention with a prefix."""

    adapter_parameters = ("unfused_bottleneck_prefix_key", "unfused_bottleneck_prefix_value")
    adapter_modules = ("unfused_bottleneck_prefix_net",)


class BottleneckModel(PrefixModel, SiteModel):
    """Puts one point of the design space into a model."""

    site_layer = _SublayerLayer
    tuner_layer_cls = TunerLayer

    def reads(self, config: BottleneckConfig) -> str:
        return INSERTIONS[config.insertion]

    def default_targets(self, config: BottleneckConfig, model_config: dict) -> Any:
        sublayers = [name for name in config.sublayers if name in SUBLAYERS]
        found = set(self.sites_of(config, sublayers))
        if "heads" in config.sublayers:
            found |= set(attention_modules(self.model, cross=config.form == "prefix"))
        for block in self._blocks:
            found |= {
                getattr(block, name) or block.fused_qkv for name in config.sublayers if name in PROJECTIONS
            }
        if not found:
            self.sites_of(config, SUBLAYERS)  # says that there are no blocks
        return found

    def make_layer(
        self, config: BottleneckConfig, adapter_name: str, target: nn.Module, key: str
    ) -> TunerLayer:
        if config.form == "prefix":
            return self.attention_layer(_SinglePrefixLayer, target, adapter_name, key)
        if list(config.sublayers) == ["heads"] or ("heads" in config.sublayers and key in self._attention):
            return self.attention_layer(_HeadsLayer, target, adapter_name, key)
        return super().make_layer(config, adapter_name, target, key)

    def _check_merge_allowed(self) -> None:
        if any(isinstance(layer, AttentionLayer) for layer in self.model.modules()):
            raise ValueError(
                "Bottleneck cannot be merged: prefixes and heads' corrections depend on the input"
            )
        super()._check_merge_allowed()


class _MamFfnLayer(BottleneckLayer):
    """An FFN with scaled parallel bottlenecks."""

    adapter_modules = ("unfused_mam_net",)


class _MamPrefixLayer(PrefixLayer):
    """Attention with a prefix."""

    adapter_parameters = ("unfused_mam_prefix_key", "unfused_mam_prefix_value")
    adapter_modules = ("unfused_mam_prefix_net",)


class MamModel(PrefixModel, SiteModel):
    """Puts a prefix into every attention and a bottleneck beside every FFN."""

    site_layer = _MamFfnLayer
    tuner_layer_cls = TunerLayer
    not_mergeable = "prefixes and bottlenecks with a nonlinearity are no change of a weight"

    def reads(self, config: MamConfig) -> str:
        return "input"

    def default_targets(self, config: MamConfig, model_config: dict) -> Any:
        ffn = set(config.target_ffn or self.sites_of(config, ["ffn"]))
        return ffn | set(config.target_attention or self._attention)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        config = super()._prepare_adapter_config(peft_config, model_config)
        parts = {
            self._is_attention(config, name)
            for name, _ in self.model.named_modules()
            if name and self._check_target_module_exists(config, name) is True
        }
        if len(parts) == 1:
            missing = "FFN" if True in parts else "attention"
            raise ValueError(
                f"target_modules={config.target_modules!r} has no {missing}: MAM needs both; leave target_modules out and name "
                "them in target_attention and target_ffn where the defaults do not do"
            )
        return config

    def _is_attention(self, config: MamConfig, key: str) -> bool:
        if config.target_attention:
            return any(f".{key}".endswith(f".{name}") for name in config.target_attention)
        return key in self._attention

    def make_layer(self, config: MamConfig, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        if self._is_attention(config, key):
            return self.attention_layer(_MamPrefixLayer, target, adapter_name, key)
        return super().make_layer(config, adapter_name, target, key)


register("bottleneck", BottleneckConfig, BottleneckModel)
register("mam", MamConfig, MamModel)
