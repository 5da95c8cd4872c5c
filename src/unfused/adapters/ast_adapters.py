"""AST adapters: a bottleneck with a gated convolution over the patches beside the FFN of an audio spectrogram transformer.

The Conformer adapter reads a sublayer's input u, (B, T, d), and unlike a plain bottleneck mixes neighbouring tokens:

    z = GLU(Linear(d -> 2b) u)                               # (B, T, b), b = d / reduction
    z = SiLU(BatchNorm(DepthwiseConv(z, kernel 31)))         # over the T tokens
    A(u) = Linear(b -> d) z

beside the sublayer without a skip, y + A(u), or behind it with one, y + A(y); "auto" keeps to that rule of the paper.
`block="bottleneck"` is the plain A(u) = W_up GELU(W_down u). The adapted sublayers' LayerNorms and the final one are trained,
as differences from the frozen ones. BatchNorm's statistics belong to the adapter: saved with it, and still in a frozen one.

The convolution runs over the flattened patches (of AST, the times of one mel band after another, behind [CLS] and [DIST]);
`layout="2d"` is ours: a square kernel over the grid, which the class tokens pass by. Ours, too, is the initial value 0 of
the last map, so that training starts at the pretrained model; `init="released"` draws it as the release does.

Reference: Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers, IEEE MLSP 2024, arXiv:2312.03694.
Needs: labels, gradients.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from unfused.nn.blocks import transformer_blocks
from unfused.nn.bottleneck import SUBLAYERS, Bottleneck, Site, SiteLayer, SiteModel
from unfused.nn.norms import NORMS
from unfused.nn.peft_register import register
from unfused.nn.towers import final_norms, find_tower
from unfused.nn.tuner import TunerConfig, TunerLayer

__all__ = ["AstAdapterConfig", "AstAdapterModel"]


@dataclass
class AstAdapterConfig(TunerConfig):
    """Configuration of the AST adapters.

    Parameters
    ----------
    block : {"conformer", "bottleneck"}, default="conformer"
        A causal decoder takes the bottleneck only: the convolution would look at tokens to come.
    placement : {"parallel", "sequential"}, default="parallel"
        Reads the sublayer's input, or its output.
    sublayers : list of {"ffn", "attention"}, default=["ffn"]
        The paper's "Pfeiffer"; both are its "Houlsby".
    reduction : float, default=96
        The inner width is `round(d / reduction)`, 8 for d = 768.
    kernel_size : int, default=31
        Odd; of each side with `layout="2d"`, where 3 is plenty.
    residual : {"auto"} or bool, default="auto"
        A skip around the adapter; "auto": in the sequential placement alone.
    inner_norm : bool, default=False
        A LayerNorm of the adapter's own. (The release has one and overwrites its output.)
    norm : {"batch", "group"}, default="batch"
        After the convolution. "group" (one group) for batches below 8, whose statistics would be poor.
    layout : {"1d", "2d"}, default="1d"
    dropout : float, default=0.0
        On the inner width.
    init : {"zero-up", "released"}, default="zero-up"
        "released": a convolution's default for all (Conformer), or N(0, 0.02) for both matrices (bottleneck).
    train_layernorm : bool, default=True
        The norms of the adapted sublayers and the final one. Norms inside a wrapped module (BERT's `output`) stay frozen.
    pooling : {"model", "mean"}, default="model"
        "mean", the paper's: the class tokens, which the head reads, become the mean of all tokens after the final norm.

    Raises
    ------
    ValueError
        For a Conformer adapter in a causal decoder, and for "2d" or "mean" in a model without class tokens and patches.

    Notes
    -----
    Trained in the paper by AdamW (rate 5e-3, betas 0.9 and 0.98, weight decay 0.1), a cosine to 0, batches of 32 to 128, 20
    to 75 epochs. In CLIP the Conformer goes into the vision tower alone. The convolution does not know an attention mask:
    pad clips always to the same length. Gradient checkpointing lets BatchNorm see each batch twice, which does no harm.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import ASTConfig, ASTForAudioClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> ast = ASTForAudioClassification(ASTConfig(max_length=32, num_mel_bins=16, **sizes))
    >>> model = get_peft_model(ast, AstAdapterConfig(reduction=4, modules_to_save=["classifier"]))
    >>> model(torch.zeros(3, 32, 16)).logits.shape
    torch.Size([3, 2])
    >>> model.merge_and_unload()
    Traceback (most recent call last):
    ...
    ValueError: AstAdapter cannot be merged: a nonlinear adapter cannot be folded into the backbone
    """

    block: str = field(default="conformer", metadata={"help": "'conformer' or 'bottleneck'."})
    placement: str = field(default="parallel", metadata={"help": "'parallel' or 'sequential'."})
    sublayers: list[str] = field(
        default_factory=lambda: ["ffn"], metadata={"help": "'ffn', 'attention' or both."}
    )
    reduction: float = field(default=96, metadata={"help": "Width of the backbone over the inner width."})
    kernel_size: int = field(default=31, metadata={"help": "Of the depthwise convolution; odd."})
    residual: bool | str = field(
        default="auto", metadata={"help": "A skip around the adapter; 'auto': if sequential."}
    )
    inner_norm: bool = field(default=False, metadata={"help": "A LayerNorm of the adapter's own."})
    norm: str = field(default="batch", metadata={"help": "After the convolution: 'batch' or 'group'."})
    layout: str = field(default="1d", metadata={"help": "Convolution over the flattened patches, or '2d'."})
    dropout: float = field(default=0.0, metadata={"help": "On the inner width."})
    init: str = field(default="zero-up", metadata={"help": "'zero-up' or 'released'."})
    train_layernorm: bool = field(
        default=True, metadata={"help": "Train the norms of sublayers and the final one."}
    )
    pooling: str = field(default="model", metadata={"help": "'model', or 'mean' of all tokens."})

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "block": ("conformer", "bottleneck"),
            "placement": ("parallel", "sequential"),
            "norm": ("batch", "group"),
            "layout": ("1d", "2d"),
            "init": ("zero-up", "released"),
            "pooling": ("model", "mean"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            self.require(value in known, f"{name}={value!r}: choose {' or '.join(map(repr, known))}")
        self.require(
            isinstance(self.sublayers, list)
            and 0 < len(self.sublayers)
            and set(self.sublayers) <= set(SUBLAYERS),
            f"sublayers={self.sublayers!r}: give a list of 'ffn', 'attention' or both",
        )
        self.require(self.reduction > 0, f"reduction={self.reduction}: give a positive number")
        self.require(
            self.kernel_size >= 1 and self.kernel_size % 2 == 1,
            f"kernel_size={self.kernel_size}: give an odd number",
        )
        self.require(
            self.residual in ("auto", True, False),
            f"residual={self.residual!r}: choose 'auto', True or False",
        )
        self.require(0 <= self.dropout < 1, f"dropout={self.dropout}: give a number in [0, 1)")


class ConformerAdapter(nn.Module):
    """(B, T, dim) -> (B, T, dim_out); `grid` is that of the last rows * columns tokens, for a 2-D convolution."""

    def __init__(
        self, dim: int, dim_out: int, size: int, config: AstAdapterConfig, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        k = config.kernel_size
        self.grid = grid
        self.inner_norm = nn.LayerNorm(dim) if config.inner_norm else nn.Identity()
        self.down = nn.Linear(dim, 2 * size)
        self.conv = (nn.Conv2d if grid else nn.Conv1d)(size, size, k, padding=k // 2, groups=size)
        self.norm = nn.BatchNorm1d(size) if config.norm == "batch" else nn.GroupNorm(1, size)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(size, dim_out)
        if config.init == "zero-up":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 3:
            raise ValueError(
                f"a Conformer adapter reads (batch, tokens, width), not {tuple(x.shape)}: use block='bottleneck'"
            )
        z = nn.functional.glu(self.down(self.inner_norm(x.to(self.down.weight.dtype))))
        z = self._normalise(self._convolve(z.mT))  # (B, b, T)
        return self.up(self.dropout(nn.functional.silu(z)).mT)

    def _convolve(self, z: torch.Tensor) -> torch.Tensor:
        if self.grid is None:
            return self.conv(z)
        others = z.shape[2] - self.grid[0] * self.grid[1]
        if others < 0:
            raise ValueError(
                f"layout='2d': {z.shape[2]} tokens are fewer than the {self.grid} patches of the model's config"
            )
        patches = self.conv(z[:, :, others:].unflatten(2, self.grid)).flatten(2)
        return torch.cat([z[:, :, :others], patches], 2)

    def _normalise(self, z: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        if (
            isinstance(norm, nn.BatchNorm1d) and not norm.weight.requires_grad
        ):  # a frozen adapter stays as it is
            return nn.functional.batch_norm(
                z, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        return norm(z)


class AdapterLayer(SiteLayer):
    """A sublayer with an adapter beside or behind it."""

    adapter_modules = ("unfused_ast_adapters_block",)
    grid: tuple[int, int] | None = None

    def make(self, site: Site, config: AstAdapterConfig) -> nn.Module:
        size = max(1, round(site.dim_in / config.reduction))
        sequential = config.placement == "sequential"
        residual = sequential if config.residual == "auto" else bool(config.residual)
        skip = int(residual) - int(
            sequential
        )  # y + A(u), y + A(u) + u; and y + A(y), of which y goes without residual
        if skip and site.dim_in != site.dim_out:
            raise ValueError(
                f"residual={config.residual}: {site.name!r} has {site.dim_in} inputs and {site.dim_out} outputs; use 'auto'"
            )
        adapter: Any
        if config.block == "conformer":
            adapter = ConformerAdapter(site.dim_in, site.dim_out, size, config, self.grid)
        else:
            adapter = Bottleneck(
                site.dim_in,
                size,
                activation="gelu",
                init="lora" if config.init == "zero-up" else "bert",
                layernorm=config.inner_norm,
                dropout=config.dropout,
                dim_out=site.dim_out,
            )
        adapter.skip = skip
        return adapter

    def correction(self, name: str, x: torch.Tensor) -> torch.Tensor:
        adapter = self.unfused_ast_adapters_block[name]
        return adapter(x) + adapter.skip * x if adapter.skip else adapter(x)


class NormLayer(TunerLayer):
    """A norm with trained differences of weight and bias; the final one may pool all tokens into the class tokens."""

    adapter_parameters = ("unfused_ast_adapters_weight", "unfused_ast_adapters_bias")
    adapter_settings = ("unfused_ast_adapters_pooled",)

    def update_layer(self, adapter_name: str, config: AstAdapterConfig) -> None:
        self.unfused_ast_adapters_pooled[adapter_name] = 0
        for name, parameter in self._parameters_of_base().items() if config.train_layernorm else ():
            getattr(self, f"unfused_ast_adapters_{name}")[adapter_name] = nn.Parameter(
                torch.zeros_like(parameter)
            )

    def adapted(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        values = self._parameters_of_base()
        for kind in values:
            changes = getattr(self, f"unfused_ast_adapters_{kind}")
            values[kind] = values[kind] + sum(
                changes[n].to(values[kind].dtype) for n in names if n in changes
            )
        y = torch.func.functional_call(self.base_layer, values, (x,))
        if count := max(self.unfused_ast_adapters_pooled[name] for name in names):
            y = torch.cat([y.mean(1, keepdim=True).expand(-1, count, -1), y[:, count:]], 1)
        return y

    def _parameters_of_base(self) -> dict[str, Any]:
        base = self.get_base_layer()
        return {k: v for k in ("weight", "bias") if (v := getattr(base, k, None)) is not None}


class AstAdapterModel(SiteModel):
    """Puts `AdapterLayer`s around sublayers and `NormLayer`s around norms."""

    tuner_layer_cls = TunerLayer
    site_layer = AdapterLayer
    not_mergeable = "a nonlinear adapter cannot be folded into the backbone"

    def reads(self, config: AstAdapterConfig) -> str:
        return "input" if config.placement == "parallel" else "output"

    def default_targets(self, config: AstAdapterConfig, model_config: dict) -> str:
        blocks, tower = transformer_blocks(self.model), find_tower(self.model)
        if tower is not None and config.block == "conformer":  # not CLIP's text tower: it is causal
            blocks = tower.blocks
        wanted, last = config.layers_to_transform, len(blocks) - 1
        if wanted is not None:
            chosen = {wanted} if isinstance(wanted, int) else {*wanted}
            if not chosen or min(chosen) < 0 or max(chosen) > last:
                raise ValueError(f"layers_to_transform={wanted}: give indices from 0 to {last}")
            blocks = [blocks[i] for i in sorted(chosen)]
        inside = tuple(f"{block.name}." for block in blocks)
        names = [name for name in self.sites_of(config, config.sublayers) if name.startswith(inside)]
        if config.train_layernorm:
            norms = [block.norm2 if s == "ffn" else block.norm1 for block in blocks for s in config.sublayers]
            norms += final_norms(self.model, blocks)
            wrapped = tuple(f"{name}." for name in names)
            names += [norm for norm in norms if norm and not norm.startswith(wrapped)]
        if config.pooling == "mean":
            names.append(self._pooled_norm())
        return "|".join(map(re.escape, dict.fromkeys(names)))

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.block == "conformer":
            self._refuse_causal()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _refuse_causal(self) -> None:
        for block in transformer_blocks(self.model):
            attention = self.model.get_submodule(block.attention)
            if getattr(getattr(attention, "base_layer", attention), "is_causal", False):
                raise ValueError(
                    f"block='conformer': {type(self.model).__name__} is causal and the convolution looks at tokens to come; "
                    "use block='bottleneck'"
                )

    def _pooled_norm(self) -> str:
        tower = find_tower(self.model)
        if tower is None or tower.norm.endswith("post_layernorm"):  # CLIP applies it to [CLS] alone
            raise ValueError(
                "pooling='mean' needs class tokens behind a final norm of all tokens (AST, ViT); use 'model'"
            )
        return tower.norm

    def make_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        if isinstance(target, NORMS):
            return NormLayer(target, adapter_name)
        return super().make_layer(config, adapter_name, target, key)

    def extend_layer(self, layer: TunerLayer, adapter_name: str, config: Any, key: str) -> None:
        if isinstance(layer, AdapterLayer):
            layer.grid = self._grid() if config.layout == "2d" and config.block == "conformer" else None
        super().extend_layer(layer, adapter_name, config, key)
        if isinstance(layer, NormLayer) and config.pooling == "mean" and key == self._pooled_norm():
            layer.unfused_ast_adapters_pooled[adapter_name] = find_tower(self.model).class_tokens  # type: ignore[union-attr]

    def _grid(self) -> tuple[int, int]:
        """Rows (mel bands) and columns (times) of patches."""
        tower = find_tower(self.model)
        if tower is None:
            raise ValueError(f"layout='2d': {type(self.model).__name__} has no grid of patches; use '1d'")
        embeddings: Any = self.model.get_submodule(tower.embeddings)
        if hasattr(embeddings, "get_shape"):  # AST
            return embeddings.get_shape(embeddings.config)
        patches = getattr(embeddings, "patch_embeddings", embeddings)
        size, patch = ((s, s) if isinstance(s, int) else s for s in (patches.image_size, patches.patch_size))
        return size[0] // patch[0], size[1] // patch[1]


register("ast_adapters", AstAdapterConfig, AstAdapterModel)
