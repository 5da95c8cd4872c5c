"""SSF: a learned scale and shift after every operation of a frozen network, folded into its weights afterwards.

Each chosen operation with output x (channels C) is followed by `y = scale * x + shift`, two vectors of length C. Nothing
depends on the input, so a linear operation absorbs both:

    W' = diag(scale) W,   b' = scale * b + shift

and the served model is the original architecture. Several active adapters compose in activation order.

Reference: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, NeurIPS 2022, arXiv:2210.08823.
Needs: labels, gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from unfused.nn.norms import NORMS, is_rms_norm
from unfused.nn.peft_register import register
from unfused.nn.tuner import TunerConfig, TunerLayer, TunerModel

__all__ = ["SsfConfig", "SsfModel"]

CHANNELS_FIRST = (nn.Conv2d, nn.GroupNorm, nn.BatchNorm2d)


@dataclass
class SsfConfig(TunerConfig):
    """Configuration of SSF.

    Parameters
    ----------
    target_modules : list of str or str, default="all"
        "all": every Linear, Conv1D, Conv2d, LayerNorm and RMSNorm outside the head, the paper's choice.
    init_weights : {"normal", "identity"}, default="normal"
        "normal" draws scales from N(1, 0.02) and shifts from N(0, 0.02), as the paper's code does, so that the adapted
        model starts near, not at, the pretrained one; "identity" starts at it exactly.
    shift : bool, default=True
        False learns scales alone. An RMSNorm has no bias that could absorb a shift: its layers must have `shift=False` to
        be merged.

    Notes
    -----
    The vectors want a large learning rate, 1e-3 to 3e-2, and no weight decay (it would pull the features to zero);
    `unfused.train.peft.param_groups` makes such groups.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    >>> model = get_peft_model(vit, SsfConfig(init_weights="identity", modules_to_save=["classifier"]))
    >>> sum(p.numel() for n, p in model.named_parameters() if "unfused_ssf" in n)  # (22 per block and 4) * width
    768
    >>> type(model.merge_and_unload()).__name__
    'ViTForImageClassification'
    """

    target_modules: list[str] | str | None = field(
        default="all", metadata={"help": "Module name suffixes, a regular expression, 'all-linear' or 'all'."}
    )
    init_weights: str = field(default="normal", metadata={"help": "'normal' (the paper's) or 'identity'."})
    shift: bool = field(default=True, metadata={"help": "Learn shifts besides the scales."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.init_weights in ("normal", "identity"),
            f"init_weights={self.init_weights!r}: choose 'normal' or 'identity'",
        )


class SsfLayer(TunerLayer):
    """An operation followed by a scale and a shift of its channels."""

    adapter_parameters = ("unfused_ssf_scale", "unfused_ssf_shift")

    def update_layer(self, adapter_name: str, config: SsfConfig) -> None:
        channels, std = self._channels(), 0.02 if config.init_weights == "normal" else 0.0
        self.unfused_ssf_scale[adapter_name] = nn.Parameter(1 + std * torch.randn(channels))  # (C,)
        if config.shift:
            self.unfused_ssf_shift[adapter_name] = nn.Parameter(std * torch.randn(channels))

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        x = self.base_layer(*args, **kwargs)
        shape = (
            (-1, 1, 1) if isinstance(self.get_base_layer(), CHANNELS_FIRST) else (-1,)
        )  # channels first, or last
        for name in names:
            x = x * self.unfused_ssf_scale[name].to(x.dtype).view(shape)
            if name in self.unfused_ssf_shift:
                x = x + self.unfused_ssf_shift[name].to(x.dtype).view(shape)
        return x

    def merged_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scale = self.unfused_ssf_scale[name].to(weight.dtype)
        outputs_first = not isinstance(self.get_base_layer(), Conv1D)
        axes = (-1, *(1,) * (weight.ndim - 1)) if outputs_first else (-1,)
        weight = weight * scale.view(axes)
        bias = bias if bias is None else bias * scale
        if name in self.unfused_ssf_shift:
            shift = self.unfused_ssf_shift[name].to(weight.dtype)
            if is_rms_norm(self.get_base_layer()):
                raise ValueError(
                    "SSF cannot be merged: an RMSNorm has no bias to hold the shift; configure it with shift=False"
                )
            bias = shift if bias is None else bias + shift
        return weight, bias

    def _channels(self) -> int:
        base = self.get_base_layer()
        is_norm = isinstance(base, NORMS)
        if base.weight is None or (is_norm and base.weight.ndim != 1):
            raise ValueError(
                f"target_modules: SSF needs one weight per channel to merge into, {base} has none; name it in exclude_modules"
            )
        return base.weight.shape[-1] if isinstance(base, Conv1D) else base.weight.shape[0]


class SsfModel(TunerModel):
    """Puts `SsfLayer`s into a model."""

    tuner_layer_cls = SsfLayer
    layer_types = (((nn.Linear, Conv1D, nn.Conv2d, *NORMS), SsfLayer),)


register("ssf", SsfConfig, SsfModel)
