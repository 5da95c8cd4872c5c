"""SVFit: a weight's own singular directions stay, its largest singular values are trained: one number a direction.

With the thin decomposition `W = U diag(S) V^T` and the first r directions,

    W' = W + U_r diag(sigma - S_r) V_r^T,   dL/dsigma_i = u_i^T (dL/dW') v_i

What is trained and saved is t, zero at the start, so that the adapted model is the pretrained one exactly and weight decay
pulls towards it: sigma is `S_r + t` ("absolute"), `S_r (1 + t)` ("relative") or `S_r exp(t)` ("exp"). The directions are
recomputed from the base weights at load. Convolutions are unfolded to (out, in * k * k), each group by itself; a fused
query-key-value matrix is split into three first.

Reference: SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values, 2024, arXiv:2409.05926.
Needs: labels, gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from unfused.nn.blocks import transformer_blocks
from unfused.nn.peft_register import register
from unfused.nn.tuner import TunerConfig, TunerLayer, TunerModel, tuner_layers

__all__ = ["SvFitConfig", "SvFitModel"]

PARAMETERIZATIONS = ("absolute", "relative", "exp")
FUSED = {"c_attn": "blocks", "qkv": "blocks", "query_key_value": "heads"}  # how q, k and v lie in the output


@dataclass
class SvFitConfig(TunerConfig):
    """Configuration of SVFit.

    Parameters
    ----------
    target_modules : list of str or str, optional
        Linear, Conv1D and Conv2d layers. By default query and value of every attention, all four projections in vision
        transformers and in a diffusion U-Net.
    r : int, optional
        How many of the largest singular values are trained, at most all of a matrix. None: as many as `energy` asks for.
    energy : float, default=0.99
        Where `r` is None: the fewest values with this share of `sum(S ** power)`; 1.0 trains all of them.
    power : {2, 1}, default=2
        Whether energy is counted in squares or in the values themselves.
    parameterization : {"absolute", "relative", "exp"}, default="absolute"
        Adam moves all absolute values by the same step, which is small for the largest and large for the rest; the others
        move them in proportion. Only "exp" keeps their signs: a value that went below 0 flips its direction, which
        merging logs.
    fused_parts : str, default="qv"
        Which of query, key and value are trained where one layer makes all three (GPT-2's `c_attn`, `qkv`,
        `query_key_value`).
    save_basis : bool, default=False
        Save the directions too, `r * (in + out)` numbers a matrix: for values so close to each other that another
        machine's decomposition may rotate their directions.

    Notes
    -----
    The values want a large learning rate, 1e-3 to 3e-2 (`unfused.train.peft.param_groups`). Only the strength of existing
    directions changes: a domain that needs new ones is out of reach. SVDiff (2023) trains the same numbers in diffusion
    models.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> bert = BertForSequenceClassification(BertConfig(vocab_size=99, **sizes))
    >>> model = get_peft_model(bert, SvFitConfig(r=4, modules_to_save=["classifier"]))
    >>> sum(p.numel() for n, p in model.named_parameters() if "unfused_svfit" in n)  # query and value of two blocks
    16
    >>> type(model.merge_and_unload()).__name__
    'BertForSequenceClassification'
    """

    r: int | None = field(default=None, metadata={"help": "How many singular values; None: by energy."})
    energy: float = field(
        default=0.99, metadata={"help": "Share of sum(S ** power) to train where r is None."}
    )
    power: int = field(default=2, metadata={"help": "2 or 1: energy in squares, or in the values."})
    parameterization: str = field(
        default="absolute", metadata={"help": "'absolute', 'relative' or 'exp': how t moves the values."}
    )
    fused_parts: str = field(default="qv", metadata={"help": "Which of q, k, v to train in a fused layer."})
    save_basis: bool = field(default=False, metadata={"help": "Save the singular directions too."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.r is None or self.r >= 1, f"r={self.r}: at least 1, or None to choose it by energy")
        self.require(0 < self.energy <= 1, f"energy={self.energy}: choose a share in (0, 1]")
        self.require(self.power in (1, 2), f"power={self.power}: choose 1 or 2")
        self.require(
            self.parameterization in PARAMETERIZATIONS,
            f"parameterization={self.parameterization!r}: choose one of {', '.join(PARAMETERIZATIONS)}",
        )
        self.require(
            0 < len(self.fused_parts) == len(set(self.fused_parts) & set("qkv")),
            f"fused_parts={self.fused_parts!r}: choose letters of 'qkv', each once",
        )


class SingularBasis(nn.Module):
    """Leading singular triples of the parts of a weight: u (parts, rows, r), s (parts, r), v (parts, r, columns)."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor

    def __init__(self, u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, save: bool) -> None:
        super().__init__()
        for name, tensor in (("u", u), ("s", s), ("v", v)):
            self.register_buffer(name, tensor.contiguous(), persistent=save)


class SvFitLayer(TunerLayer):
    """A linear layer or convolution with trained singular values."""

    adapter_parameters = ("unfused_svfit_t",)
    adapter_modules = ("unfused_svfit_basis",)
    adapter_settings = ("unfused_svfit_settings",)
    fused: torch.Tensor | None = None  # (3, rows): the rows of query, key and value in the weight's matrix

    def update_layer(self, adapter_name: str, config: SvFitConfig) -> None:
        self.unfused_svfit_settings[adapter_name] = config
        self._decompose(adapter_name, config.r)

    def _decompose(self, adapter_name: str, r: int | None) -> None:
        config = self.unfused_svfit_settings[adapter_name]
        weight = (self._unmerged[0] if self._unmerged else self.get_base_layer().weight).detach()
        u, s, v = torch.linalg.svd(self._parts(adapter_name, weight).float(), full_matrices=False)
        if r is None:
            energy = s**config.power
            share = energy.cumsum(-1) / energy.sum(-1, keepdim=True).clamp_min(1e-30)
            r = 1 + int((share < config.energy - 1e-6).sum(-1).max())  # the same for all parts
        r = min(r, s.shape[-1])
        dtype = weight.dtype if weight.is_floating_point() else u.dtype
        basis = SingularBasis(
            u[..., :r].to(dtype), s[..., :r], v[..., :r, :].to(dtype), save=config.save_basis
        )
        self.unfused_svfit_basis[adapter_name] = basis
        self.unfused_svfit_t[adapter_name] = nn.Parameter(torch.zeros(basis.s.numel(), device=weight.device))

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        basis = self.unfused_svfit_basis[adapter_name]
        values = basis.s
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        basis.s = values.to(basis.u.device)  # in float32, whatever the weights are

    def prepare_load(self, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
        t = state.get("unfused_svfit_t")
        if t is None or not self.has(adapter_name):
            return
        mine = self.unfused_svfit_t[adapter_name]
        parts, full = len(self.unfused_svfit_basis[adapter_name].u), self._max_rank()
        if t.shape != mine.shape and self.unfused_svfit_settings[adapter_name].r is None:
            if t.ndim != 1 or t.numel() % parts or not 1 <= t.numel() // parts <= full:
                raise ValueError(
                    f"unfused_svfit_t has shape {tuple(t.shape)}: a vector of {parts} times 1 to {full} values fits"
                )
            self._decompose(adapter_name, t.numel() // parts)  # as many as were chosen when it was trained
            self._move_adapter_to_device_of_base_layer(adapter_name)
            self.unfused_svfit_t[adapter_name].requires_grad_(mine.requires_grad)

    # -- the mathematics ---------------------------------------------------------------------------------------------

    def change(self, adapter_name: str) -> torch.Tensor:
        """sigma - S_r, of shape (parts, r), in float32."""
        s = self.unfused_svfit_basis[adapter_name].s
        t = self.unfused_svfit_t[adapter_name].float().view_as(s)
        kind = self.unfused_svfit_settings[adapter_name].parameterization
        return t if kind == "absolute" else s * t if kind == "relative" else s * torch.expm1(t)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        basis = self.unfused_svfit_basis[adapter_name]
        base = self.get_base_layer()
        scaled = basis.u * self.change(adapter_name).to(basis.u.dtype).unsqueeze(1)
        delta = torch.bmm(scaled, basis.v).flatten(0, 1)  # (rows of all parts, columns)
        if self.fused is not None:
            rows = self._rows(adapter_name).flatten()
            delta = delta.new_zeros(self.fused.numel(), delta.shape[1]).index_copy(0, rows, delta)
        return delta.T if isinstance(base, Conv1D) else delta.view(base.weight.shape)

    def adapted(self, names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.get_base_layer()
        if isinstance(base, nn.Conv2d):
            return base._conv_forward(x, self._weight(names), base.bias)
        if self._through_weight(names, x):
            weight = self._weight(names)
            return linear(x, weight.T if isinstance(base, Conv1D) else weight, base.bias)
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            basis = self.unfused_svfit_basis[name]
            z = linear(x.to(basis.v.dtype), basis.v[0]) * self.change(name)[0].to(basis.v.dtype)  # (..., r)
            y = y + linear(z.to(basis.u.dtype), basis.u[0]).to(y.dtype)
        return y

    def _weight(self, names: Sequence[str]) -> torch.Tensor:
        weight = self.get_base_layer().weight
        for name in names:
            weight = weight + self.get_delta_weight(name).to(weight.dtype)
        return weight

    def _through_weight(self, names: Sequence[str], x: torch.Tensor) -> bool:
        """Whether to change the weight is cheaper than to go through the r directions token by token."""
        if self.fused is not None:
            return True
        _, _, columns = self.unfused_svfit_basis[names[0]].v.shape
        rows = self.unfused_svfit_basis[names[0]].u.shape[1]
        r = sum(self.unfused_svfit_basis[name].s.shape[-1] for name in names)
        tokens = x.numel() // columns
        if torch.is_grad_enabled():  # the weight's gradient is one more product of its size
            return 2 * rows * columns * r + tokens * rows * columns < 2 * tokens * r * (rows + columns)
        return rows * columns * r < tokens * r * (rows + columns)

    # -- a weight as matrices ----------------------------------------------------------------------------------------

    def _parts(self, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
        """(parts, rows, columns), rows being outputs."""
        matrix = weight.T if isinstance(self.get_base_layer(), Conv1D) else weight.flatten(1)
        if self.fused is not None:
            return matrix[self._rows(adapter_name)]
        groups = getattr(self.get_base_layer(), "groups", 1)
        return matrix.view(groups, -1, matrix.shape[1]) if groups > 1 else matrix[None]

    def _rows(self, adapter_name: str) -> torch.Tensor:
        assert self.fused is not None
        chosen = ["qkv".index(part) for part in self.unfused_svfit_settings[adapter_name].fused_parts]
        return self.fused[chosen].to(self.get_base_layer().weight.device)

    def _max_rank(self) -> int:
        name = next(iter(self.unfused_svfit_basis))
        return min(self._parts(name, self.get_base_layer().weight).shape[1:])


class SvFitModel(TunerModel):
    """Puts `SvFitLayer`s into a model."""

    tuner_layer_cls = SvFitLayer
    layer_types = (((nn.Linear, Conv1D, nn.Conv2d), SvFitLayer),)

    def singular_values(self, adapter_name: str = "default") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Per adapted module: the pretrained values (S_r) and what training made of them, both of shape (parts, r)."""
        return {
            name: (layer.unfused_svfit_basis[adapter_name].s, _values(layer, adapter_name))
            for name, layer in self.model.named_modules()
            if isinstance(layer, SvFitLayer) and layer.has(adapter_name)
        }

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """All but the directions, which are frozen like the weights and as large."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in tuner_layers(self.model):
            if isinstance(layer, SvFitLayer) and layer.has(adapter_name):
                basis = layer.unfused_svfit_basis[adapter_name]
                weight = layer.get_base_layer().weight
                basis.u, basis.v = (
                    m.to(weight.dtype) if weight.is_floating_point() else m for m in (basis.u, basis.v)
                )

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        negative = sum(
            int((_values(layer, name) < 0).sum())
            for layer in tuner_layers(self.model)
            if isinstance(layer, SvFitLayer)
            for name in layer.unfused_svfit_t
        )
        if negative:
            logging.getLogger(__name__).warning(
                "SVFit: %d singular values went below 0 in training: their directions are flipped", negative
            )

    def default_targets(self, config: SvFitConfig, model_config: dict) -> set[str]:
        blocks = transformer_blocks(self.model)
        vision = getattr(self.model, "main_input_name", "") == "pixel_values"
        found = {
            name.removeprefix(f"{block.name}.")
            for block in blocks
            for name in (
                block.query,
                block.value,
                block.fused_qkv,
                *((block.key, block.attention_out) if vision else ()),
            )
            if name
        }
        if not blocks:  # diffusers' attention
            ends = ("to_q", "to_k", "to_v", "to_out.0")
            found = {
                end for end in ends for name, _ in self.model.named_modules() if name.endswith(f".{end}")
            }
        return found or super().default_targets(config, model_config)

    def make_layer(self, config: SvFitConfig, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        layer = super().make_layer(config, adapter_name, target, key)
        layout, parts = FUSED.get(key.rpartition(".")[2]), 3
        if layout and isinstance(target, nn.Linear | Conv1D) and isinstance(layer, SvFitLayer):
            columns, outputs = (
                target.weight.shape if isinstance(target, Conv1D) else target.weight.shape[::-1]
            )
            if outputs == parts * columns:
                rows = torch.arange(outputs)
                heads = 1 if layout == "blocks" else self.model.config.num_attention_heads
                layer.fused = rows.view(heads, parts, -1).transpose(0, 1).reshape(parts, -1)
        return layer


def _values(layer: SvFitLayer, adapter_name: str) -> torch.Tensor:
    with torch.no_grad():
        return layer.unfused_svfit_basis[adapter_name].s + layer.change(adapter_name)


register("svfit", SvFitConfig, SvFitModel)
