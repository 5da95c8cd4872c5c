"""MoSA: one bottleneck adapter is split into sparse parts that train in turns, and merged into one again.

Every entry of W_up belongs to one of E parts, at random. In training each block draws a part i anew in every forward pass,

    a = s * (W_up^i f(W_down LN(h)) + b^i),    W_up^i = W_up where part = i, else 0

and two passes with logits p and q make the loss

    CE(p, y) + w * (KL(sg(q) || p) + KL(sg(p) || q)) / 2 + w_2 * CE(q, y) + w_h * MSE(hidden states of p, of q).

The merged adapter, the mean of the parts W_up / E, is what the expectation of the training pass is: an ordinary bottleneck,
which evaluates, is saved, and loads as a `BottleneckConfig`. One matrix and a map of parts hold all E of them. With
`share="none"` W_down is split as well and drawn by itself; its parts keep their common initial value outside their entries.

`model.train()` and `model.eval()` switch between a random part and the merged adapter. Part maps come from `seed` and the
module's name, so that a run goes on from a checkpoint although the parts are not in it.

Reference: Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training, 2023, arXiv:2312.02923.
Needs: labels, gradients.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from unfused.nn.bottleneck import Bottleneck, BottleneckLayer, Site, SiteModel, find_sites
from unfused.nn.peft_register import peft_type, register
from unfused.nn.tuner import TunerConfig
from unfused.train.peft import RegularizedTrainer

__all__ = ["MosaConfig", "MosaModel", "MosaTrainer", "mosa_loss"]

STYLES: dict[str, dict[str, Any]] = {
    "adaptformer": {
        "sublayers": ["ffn"],
        "insertion": "adaptformer",
        "activation": "gelu",
        "layernorm": True,
    },
    "pfeiffer": {"sublayers": ["ffn"], "insertion": "sequential", "activation": "relu", "layernorm": True},
    "houlsby": {
        "sublayers": ["attention", "ffn"],
        "insertion": "sequential",
        "activation": "silu",
        "layernorm": False,
    },
    "lora": {
        "sublayers": ["query", "key", "value", "attention_out"],
        "insertion": "parallel",
        "activation": "linear",
        "layernorm": False,
        "bottleneck_bias": False,
    },
}
READS = {"adaptformer": "stream", "pfeiffer": "output", "houlsby": "output", "lora": "input"}
SHARES = ("down", "up", "none")


@dataclass
class MosaConfig(TunerConfig):
    """Configuration of MoSA.

    Parameters
    ----------
    target_modules : list of str, str or None
        By default the modules of the style: FFNs ("adaptformer", "pfeiffer"), attentions and FFNs ("houlsby"), or the four
        projections of the attention ("lora").
    style : {"adaptformer", "pfeiffer", "houlsby", "lora"}, default="adaptformer"
        "adaptformer": parallel to the FFN, from the residual stream through a LayerNorm of its own, GELU. "pfeiffer":
        after the FFN, own LayerNorm, ReLU. "houlsby": after attention and FFN, SiLU. "lora": linear, beside projections.
    bottleneck_dim : int, default=64
    num_experts : int, default=4
        Parts E.
    share : {"down", "up", "none"}, default="down"
        Which matrix is dense, and trains in every pass; the other one is split, or both.
    split_bias : bool, default=True
        Biases of split maps are split too; False gives them whole to every part.
    scaling : float, default=0.1
    dropout : float, default=0.1
        Inside the bottleneck.
    consistency_weight : float, default=1.0
        w. Used by `MosaTrainer` and `mosa_loss`, as the next three.
    second_loss_weight : float, default=0.0
        w_2, of the second pass's own loss.
    hidden_weight : float, default=0.0
        w_h, over the first `hidden_layers` hidden states.
    hidden_layers : int, default=6
    seed : int, default=0
        Of the split.

    Notes
    -----
    An entry trains in one pass of E: compare with a plain adapter when both have converged, at an equal number of passes.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    >>> model = get_peft_model(vit, MosaConfig(bottleneck_dim=4, modules_to_save=["classifier"]))
    >>> loss = mosa_loss(model, {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])})
    >>> loss.requires_grad
    True
    """

    style: str = field(
        default="adaptformer", metadata={"help": "'adaptformer', 'pfeiffer', 'houlsby' or 'lora'."}
    )
    bottleneck_dim: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    num_experts: int = field(default=4, metadata={"help": "Parts that the adapter is split into."})
    share: str = field(default="down", metadata={"help": "The dense matrix: 'down', 'up' or 'none'."})
    split_bias: bool = field(default=True, metadata={"help": "Split biases of split maps too."})
    scaling: float = field(default=0.1, metadata={"help": "Constant factor of the correction."})
    dropout: float = field(default=0.1, metadata={"help": "Inside the bottleneck."})
    consistency_weight: float = field(default=1.0, metadata={"help": "Of the divergence between two passes."})
    second_loss_weight: float = field(default=0.0, metadata={"help": "Of the second pass's own loss."})
    hidden_weight: float = field(default=0.0, metadata={"help": "Of the distance between hidden states."})
    hidden_layers: int = field(default=6, metadata={"help": "Hidden states that hidden_weight is for."})
    seed: int = field(default=0, metadata={"help": "Of the split."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.style in STYLES, f"style={self.style!r}: choose from {', '.join(map(repr, STYLES))}"
        )
        self.require(self.share in SHARES, f"share={self.share!r}: choose 'down', 'up' or 'none'")
        for name in ("bottleneck_dim", "num_experts", "hidden_layers"):
            self.require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: give 1 or more")
        self.require(self.num_experts <= 255, f"num_experts={self.num_experts}: give 255 at most")
        self.require(0 <= self.dropout < 1, f"dropout={self.dropout}: give a number in [0, 1)")
        for name in ("consistency_weight", "second_loss_weight", "hidden_weight"):
            self.require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: give 0 or more")

    def plain(self) -> TunerConfig:
        """The `BottleneckConfig` of the merged adapter."""
        from peft.mapping import (
            PEFT_TYPE_TO_CONFIG_MAPPING,  # where the other module of this family is found lazily
        )

        common = {
            name: getattr(self, name)
            for name in (
                *(
                    "target_modules",
                    "exclude_modules",
                    "modules_to_save",
                    "layers_to_transform",
                    "layers_pattern",
                ),
                *("bottleneck_dim", "scaling", "dropout"),
                *("task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"),
            )
        }
        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type("bottleneck")]
        return config(**{**STYLES[self.style], **common})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        self.plain().save_pretrained(save_directory, **kwargs)


class SplitBottleneck(Bottleneck):
    """A `Bottleneck` in parts: a random one in training, all of them, divided by their number, otherwise."""

    def __init__(self, site: Site, config: MosaConfig) -> None:
        style = STYLES[config.style]
        super().__init__(
            site.dim_in,
            config.bottleneck_dim,
            style["activation"],
            "lora",
            style["layernorm"],
            config.dropout,
            config.scaling,
            site.dim_out,
            style.get("bottleneck_bias", True),
        )
        self.experts = config.num_experts
        self.split = tuple(side for side in ("down", "up") if side != config.share)
        generator = torch.Generator().manual_seed(config.seed ^ zlib.crc32(site.name.encode()))
        if (
            "down" in self.split
        ):  # every part starts from this, so a checkpoint has to be able to draw it again
            start = torch.empty(config.bottleneck_dim, site.dim_in, device="cpu")
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                self.down.weight.copy_(start)
            self.register_buffer("down_start", start, persistent=False)
        for side in self.split:
            linear = getattr(self, side)
            self.register_buffer(
                f"{side}_part", _parts(linear.weight.shape, self.experts, generator), persistent=False
            )
            if linear.bias is not None and config.split_bias:
                parts = _parts(linear.bias.shape, self.experts, generator)
                self.register_buffer(f"{side}_bias_part", parts, persistent=False)

    def weights(self, side: str, part: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of "down" or "up" in one part, or merged."""
        linear = getattr(self, side)
        weight, bias = linear.weight, linear.bias
        if side not in self.split or self.experts == 1:
            return weight, bias
        start: Any = self.down_start if side == "down" else None
        weight = self._take(weight if start is None else weight - start, getattr(self, f"{side}_part"), part)
        if bias is not None and hasattr(self, f"{side}_bias_part"):
            bias = self._take(bias, getattr(self, f"{side}_bias_part"), part)
        return weight if start is None else weight + start, bias

    def _take(self, values: torch.Tensor, parts: torch.Tensor, part: torch.Tensor | None) -> torch.Tensor:
        return values / self.experts if part is None else values * (parts == part)

    def scaled(self, side: str, kind: str, value: torch.Tensor, factor: float) -> torch.Tensor:
        """The stored tensor `side.kind` with what its parts learned multiplied: by 1 / E for a file, by E from one."""
        if side not in self.split or (kind == "bias" and not hasattr(self, f"{side}_bias_part")):
            return value
        if side == "down" and kind == "weight":
            start: Any = self.down_start
            start = start.to(value)
            return start + (value - start) * factor
        return value * factor

    def merge_experts(self) -> None:
        """Become the merged adapter, for good."""
        if self.experts > 1:
            with torch.no_grad():
                for side in self.split:
                    linear = getattr(self, side)
                    for kind, value in linear.named_parameters():
                        value.copy_(self.scaled(side, kind, value, 1 / self.experts))
            self.experts, self.split = 1, ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        draw = self.training and self.experts > 1
        part = {s: torch.randint(self.experts, (), device=x.device) if draw else None for s in ("down", "up")}
        x = self.norm(x.to(self.down.weight.dtype))
        hidden = self.dropout(self.activation(F.linear(x, *self.weights("down", part["down"]))))
        return self.scaling * F.linear(hidden, *self.weights("up", part["up"]))


def _parts(shape: torch.Size, experts: int, generator: torch.Generator) -> torch.Tensor:
    """The part of every entry: ranks of random scores, cut into E equal pieces."""
    rank = torch.randperm(shape.numel(), generator=generator)
    return (rank * experts // shape.numel()).to(torch.uint8).view(shape)


class MosaLayer(BottleneckLayer):
    """A module with split bottlenecks."""

    adapter_modules = ("unfused_mosa_net",)

    def make(self, site: Site, config: MosaConfig) -> nn.Module:
        return SplitBottleneck(site, config)

    def linear_map(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        net: Any = self.unfused_mosa_net[name]
        (down, _), (up, _) = net.weights("down", None), net.weights("up", None)
        return net.scaling * up @ down, None

    def rescaled(
        self, name: str, state: Mapping[str, torch.Tensor], merging: bool
    ) -> dict[str, torch.Tensor]:
        """This layer's entries with all parts' values merged, or from that."""
        net: Any = self.unfused_mosa_net[name]
        factor = 1 / net.experts if merging else float(net.experts)
        found = {}
        for key, value in state.items():
            side, _, kind = key.rpartition(f".{name}.")[2].partition(".")
            found[key] = net.scaled(side, kind, value, factor) if side in ("down", "up") else value
        return found


class MosaModel(SiteModel):
    """Puts split adapters into a model."""

    site_layer = MosaLayer
    tuner_layer_cls = MosaLayer

    def reads(self, config: MosaConfig) -> str:
        return READS[config.style]

    def default_targets(self, config: MosaConfig, model_config: dict) -> Any:
        sublayers = STYLES[config.style]["sublayers"]
        if config.style != "lora":
            return set(self.sites_of(config, sublayers))
        find_sites(self.model, "attention")  # says so where there are no blocks
        return {getattr(block, name) or block.fused_qkv for block in self._blocks for name in sublayers}

    def merge_experts(self, adapter_name: str | None = None) -> None:
        """Fold the parts of an adapter (by default of the active ones) into one; it trains on as a plain adapter."""
        for name in self.active_adapters if adapter_name is None else [adapter_name]:
            for layer in self.model.modules():
                if isinstance(layer, MosaLayer) and layer.has(name):
                    net: Any = layer.unfused_mosa_net[name]
                    net.merge_experts()
            settings: Any = self.peft_config[name]
            settings.num_experts = 1

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
            if isinstance(layer, MosaLayer) and layer.has(adapter_name):
                own = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
                state.update(layer.rescaled(adapter_name, own, merging=True))
        return {
            key.replace("unfused_mosa_net", "unfused_bottleneck_net"): value for key, value in state.items()
        }

    @classmethod
    def unpack_file(cls, config: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            key.replace("unfused_bottleneck_net", "unfused_mosa_net"): value for key, value in state.items()
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in model.named_modules():
            if isinstance(layer, MosaLayer) and layer.has(adapter_name):
                own = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
                state.update(layer.rescaled(adapter_name, own, merging=False))
        return state


def mosa_loss(model: nn.Module, inputs: Mapping[str, Any], config: MosaConfig | None = None) -> torch.Tensor:
    """The loss of two passes, for a training loop of one's own.

    Parameters
    ----------
    model : nn.Module
        A PEFT model with MoSA in training mode, whose output has `loss` and `logits`.
    inputs : mapping
        The batch, with `labels`; in logits of several positions, those whose label is -100 do not count.
    config : MosaConfig, optional
        By default that of the model's active adapter.

    Returns
    -------
    Tensor
        A scalar.
    """

    def own(inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        outputs = model(**inputs)
        return outputs.loss, outputs

    loss, extra, _ = _two_passes(own, inputs, config or _settings(model))
    return loss + extra


def _two_passes(
    loss_of: Callable[[dict[str, Any]], tuple[torch.Tensor, Any]],
    inputs: Mapping[str, Any],
    config: MosaConfig,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Loss on the labels, terms between the two passes, outputs of the first."""
    inputs = {**inputs, "output_hidden_states": True} if config.hidden_weight else inputs
    (loss, one), (second, two) = loss_of(dict(inputs)), loss_of(dict(inputs))
    extra = config.consistency_weight * _divergence(one["logits"], two["logits"], inputs.get("labels"))
    if config.hidden_weight:
        pairs = list(zip(one["hidden_states"][1:], two["hidden_states"][1:], strict=True))[
            : config.hidden_layers
        ]
        extra = extra + config.hidden_weight * torch.stack([F.mse_loss(a, b) for a, b in pairs]).mean()
    return loss + config.second_loss_weight * second if config.second_loss_weight else loss, extra, one


def _divergence(p: torch.Tensor, q: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """(KL(sg(q) || p) + KL(sg(p) || q)) / 2, mean over the items."""
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    both = F.kl_div(log_p, log_q.detach(), reduction="none", log_target=True)
    both = both + F.kl_div(log_q, log_p.detach(), reduction="none", log_target=True)
    each = both.sum(-1) / 2
    if labels is None or labels.shape != each.shape or each.ndim == 1:
        return each.mean()
    keep = labels != -100
    return (each * keep).sum() / keep.sum().clamp(min=1)


def _settings(model: Any) -> MosaConfig:
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapter", None)
    chosen = [configs[active]] if isinstance(active, str) and active in configs else configs.values()
    for config in chosen:
        if isinstance(config, MosaConfig):
            return config
    raise ValueError(f"a {type(model).__name__} without MoSA: give get_peft_model(model, MosaConfig(...))")


class MosaTrainer(RegularizedTrainer):
    """A `transformers.Trainer` whose training step makes two passes; it evaluates, and saves, the merged adapter.

    Examples
    --------
    ``MosaTrainer(get_peft_model(vit, MosaConfig()), args, train_dataset=data).train()``
    """

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        once = functools.partial(super().compute_loss, model, return_outputs=True, **kwargs)
        loss, extra, outputs = _two_passes(once, inputs, _settings(self.accelerator.unwrap_model(model)))
        if self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None:
            extra = (
                extra / self.current_gradient_accumulation_steps
            )  # the loss itself is normalised by the items
        loss = loss + extra.to(loss.dtype)
        return (loss, outputs) if return_outputs else loss


register("mosa", MosaConfig, MosaModel)
