"""HST: a small pyramid network beside a frozen plain ViT, which reads the pixels and every block, for four scales.

Before each block l a token e_l of its own is put in front of the sequence and taken off behind it, as g_l; v_l are the patch
tokens there. The blocks are split into as many groups as the side network has stages, T is the bridge of a stage, and the
side block that block l feeds is, with tokens y of the stage's map,

    k = [LayerNorm_l(T g_l); mean(f)],   f = T(v_l) resized to the stage's map
    y <- y + Attention(LayerNorm y, k),   y <- y + f,   y <- y + MLP(LayerNorm y)

Keys and values are two tokens, so a block costs as much as the map is large. Stages start with a convolution of the image
(stride 4) or of the stage before (stride 2), and give the maps of strides 4, 8, 16, 32: for a dense head all of them, for
classes the mean of the last one, normalised over the batch, and a linear map. The ViT's own LayerNorms are trained as well,
so the gradient runs through the whole ViT: this is no way to save memory.

Reference: Hierarchical Side-Tuning for Vision Transformers, 2023, arXiv:2310.05393.
Needs: labels, gradients.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput

from unfused.nn.blocks import module_at, transformer_blocks
from unfused.nn.norms import NORMS
from unfused.nn.peft_register import register
from unfused.nn.side import SideLayer, SideModel, first_tensor, named_arguments, with_first_tensor
from unfused.nn.tuner import TunerConfig, TunerLayer, tuner_layers

__all__ = ["HstConfig", "HstModel"]

SHARE_OF_WIDTH = (1 / 24, 1 / 16, 1 / 12, 3 / 32)
"""The paper's widths 32, 48, 64, 72 as parts of ViT-B's 768."""


@dataclass
class HstConfig(TunerConfig):
    """Configuration of HST, for ViT, DeiT, DINO, AST and CLIP's vision tower.

    Parameters
    ----------
    hidden_sizes : list of int, optional
        Width of each stage, and so their number. By default 32, 48, 64, 72 for a ViT of width 768, and as much narrower or
        wider as the ViT is.
    num_heads : list of int, default=[2, 4, 8, 12]
        Of each stage's attention.
    num_meta_tokens : int, default=1
        Tokens put before each block.
    mlp_ratio : float, default=4.0
    drop_path : float, default=0.0
        Chance of the last side block's attention or MLP to be left out for a sample; rises from 0 at the first block. The
        paper chooses from 0, 0.1, 0.2.
    train_layernorm : bool, default=True
        Train (copies of) the two norms of each ViT block.
    num_labels : int, optional
        Of the head. By default the model's own, where it is a classifier; an encoder without head then gives maps, for a
        dense task: `model(x).feature_maps`.

    Raises
    ------
    ValueError
        Where stages and heads do not fit each other, where the model has fewer blocks than there are stages, or where it is
        no plain vision transformer.

    Notes
    -----
    The side network has its own head: leave `target_modules` alone, and the classifier out of `modules_to_save`. Its loss is
    the cross-entropy, also with soft labels (B, C). AdamW with 1e-3 to 1e-2, cosine, 10 of 100 epochs of warm-up, and weight
    decay 5e-5 to 5e-2 on matrices alone. Batches of at least two, for the batch norms.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTModel
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    >>> vit = ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes))
    >>> model = get_peft_model(vit, HstConfig(hidden_sizes=[4, 8], num_heads=[1, 2], num_labels=5)).eval()
    >>> model(pixel_values=torch.zeros(2, 3, 32, 32)).logits.shape
    torch.Size([2, 5])
    >>> [tuple(one.shape) for one in model.pyramid(torch.zeros(2, 3, 32, 32))]
    [(2, 4, 8, 8), (2, 8, 4, 4)]
    """

    hidden_sizes: list[int] | None = field(default=None, metadata={"help": "Width of each stage."})
    num_heads: list[int] = field(
        default_factory=lambda: [2, 4, 8, 12], metadata={"help": "Attention heads of each stage."}
    )
    num_meta_tokens: int = field(default=1, metadata={"help": "Tokens before each ViT block."})
    mlp_ratio: float = field(default=4.0, metadata={"help": "Inner width of the MLPs, over the stage's."})
    drop_path: float = field(default=0.0, metadata={"help": "Stochastic depth at the last side block."})
    train_layernorm: bool = field(default=True, metadata={"help": "Train the norms of the ViT blocks."})
    num_labels: int | None = field(default=None, metadata={"help": "Classes; by default the model's."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for sizes in (self.num_heads, self.hidden_sizes or self.num_heads):
            self.require(
                len(sizes) == len(self.num_heads) > 0 and all(size > 0 for size in sizes),
                f"hidden_sizes={self.hidden_sizes}, num_heads={self.num_heads}: give one positive number a stage to each",
            )
        for size, heads in zip(self.hidden_sizes or (), self.num_heads, strict=False):
            self.require(size % heads == 0, f"hidden_sizes: {size} is no multiple of its {heads} heads")
        self.require(self.num_meta_tokens >= 1, f"num_meta_tokens={self.num_meta_tokens}: give at least 1")
        self.require(self.mlp_ratio > 0, f"mlp_ratio={self.mlp_ratio}: give a positive number")
        self.require(0 <= self.drop_path < 1, f"drop_path={self.drop_path}: give a chance below 1")
        self.require(
            self.num_labels is None or self.num_labels > 0, f"num_labels={self.num_labels}: give at least 1"
        )
        self.require(
            self.layers_to_transform is None,
            "layers_to_transform is given: the side network reads every block",
        )


# -- the side network --------------------------------------------------------------------------------------------------


class SideBlock(nn.Module):
    """Cross-attention to two keys, the ViT's map, an MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, drop
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )
        inner = round(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, y: torch.Tensor, meta: torch.Tensor, bridged: torch.Tensor) -> torch.Tensor:
        keys = torch.cat([meta, bridged.mean(1, keepdim=True)], 1)  # (B, M + 1, d)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(self.norm1(y)), *self.key_value(keys).chunk(2, -1))
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y + self._drop_path(self.out(attended)) + bridged
        return y + self._drop_path(self.mlp(self.norm2(y)))

    def _drop_path(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop == 0:
            return x
        keep = torch.rand(len(x), *(1,) * (x.ndim - 1), device=x.device) >= self.drop
        return x * keep / (1 - self.drop)


class Stage(nn.Module):
    """Makes the map of a stage, and runs its blocks on it."""

    def __init__(self, make_map: nn.Module, bridge: nn.Linear, blocks: Sequence[SideBlock]) -> None:
        super().__init__()
        dim = bridge.out_features
        self.make_map, self.bridge, self.blocks = make_map, bridge, nn.ModuleList(blocks)
        self.norm, self.end_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.meta_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in blocks)

    def forward(
        self,
        image: torch.Tensor,
        seen: Sequence[tuple[torch.Tensor, torch.Tensor]],
        grid: tuple[int, int],
    ) -> torch.Tensor:
        image = self.make_map(image)
        size = image.shape[-2:]
        y = self.norm(image.flatten(2).mT)  # (B, N_s, d)
        for (meta, patches), block, meta_norm in zip(seen, self.blocks, self.meta_norms, strict=True):
            f = self.bridge(patches).mT.unflatten(2, grid)  # projecting first: the same, and cheaper
            f = F.interpolate(f, size=size, mode="bilinear", align_corners=False)
            y = block(y, meta_norm(self.bridge(meta)), f.flatten(2).mT)
        return self.end_norm(y).mT.unflatten(2, size)  # (B, d, H_s, W_s)


class SideNetwork(nn.Module):
    """The trained part, but for the ViT's norms: tokens of all blocks, stages, head."""

    def __init__(
        self, config: HstConfig, dim: int, depth: int, channels: int, num_labels: int | None
    ) -> None:
        super().__init__()
        sizes = config.hidden_sizes or [
            heads * max(1, round(dim * SHARE_OF_WIDTH[min(stage, 3)] / heads))
            for stage, heads in enumerate(config.num_heads)
        ]
        self.meta_tokens = nn.Parameter(torch.empty(depth, config.num_meta_tokens, dim))  # (L, M, D)
        for token in self.meta_tokens.data:
            nn.init.xavier_uniform_(token[None])
        drops = [config.drop_path * index / max(1, depth - 1) for index in range(depth)]
        ends = [round(depth * stage / len(sizes)) for stage in range(len(sizes) + 1)]
        self.groups = list(pairwise(ends))
        stem = nn.Sequential(
            nn.Conv2d(channels, sizes[0], 3, 2, 1, bias=False),
            nn.BatchNorm2d(sizes[0]),
            nn.ReLU(),
            nn.Conv2d(sizes[0], sizes[0], 2, 2),
        )
        merges = [nn.Conv2d(before, size, 3, 2, 1) for before, size in pairwise(sizes)]
        self.stages = nn.ModuleList(
            Stage(
                make_map,
                nn.Linear(dim, size),
                [SideBlock(size, heads, config.mlp_ratio, drops[i]) for i in range(*group)],
            )
            for make_map, size, heads, group in zip(
                [stem, *merges], sizes, config.num_heads, self.groups, strict=True
            )
        )
        self.head_norm = nn.BatchNorm1d(sizes[-1], eps=1e-6, affine=False) if num_labels else None
        self.head = nn.Linear(sizes[-1], num_labels) if num_labels else None

    def forward(
        self,
        image: torch.Tensor,
        seen: Sequence[tuple[torch.Tensor, torch.Tensor]],
        grid: tuple[int, int],
    ) -> list[torch.Tensor]:
        dtype, maps = self.meta_tokens.dtype, [image]
        seen = [(meta.to(dtype), patches.to(dtype)) for meta, patches in seen]
        for stage, (start, end) in zip(self.stages, self.groups, strict=True):
            maps.append(stage(maps[-1].to(dtype), seen[start:end], grid))
        return maps[1:]

    def logits(self, maps: Sequence[torch.Tensor]) -> torch.Tensor | None:
        if self.head is None or self.head_norm is None:
            return None
        return self.head(self.head_norm(maps[-1].flatten(2).mean(2)))


# -- beside the ViT ----------------------------------------------------------------------------------------------------


class HstNorm(TunerLayer):
    """A norm of the ViT, replaced by a trained copy."""

    adapter_modules = ("unfused_hst_norm",)

    def update_layer(self, adapter_name: str, config: HstConfig) -> None:
        self.unfused_hst_norm[adapter_name] = copy.deepcopy(self.get_base_layer()).requires_grad_(True)

    def adapted(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        norm = self.unfused_hst_norm[names[-1]]
        return norm(x.to(norm.weight.dtype)).to(x.dtype)


class HstSide(SideLayer):
    """The patch projection, which sees pixels and grid, with the side network; hooks show it the blocks' tokens."""

    adapter_modules = ("unfused_hst_net",)

    def __init__(
        self, projection: nn.Module, adapter_name: str, top: Any, blocks: Sequence[nn.Module]
    ) -> None:
        super().__init__(projection, adapter_name)
        self.depth, self.only_maps = len(blocks), False
        self.num_labels: Any = top.config.num_labels if hasattr(top, "classifier") else None
        self.image: torch.Tensor | None = None
        self.grid = (0, 0)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.targets: dict[str, Any] = {}
        self.handles.append(top.register_forward_pre_hook(self._begin, with_kwargs=True))
        self.handles.append(top.register_forward_hook(self._end))
        for index, block in enumerate(blocks):
            self.handles.append(
                block.register_forward_pre_hook(partial(self._before, index), with_kwargs=True)
            )
            self.handles.append(block.register_forward_hook(self._behind))

    def update_layer(self, adapter_name: str, config: HstConfig) -> None:
        base = self.get_base_layer()
        self.unfused_hst_net[adapter_name] = SideNetwork(
            config, base.out_channels, self.depth, base.in_channels, config.num_labels or self.num_labels
        )

    def adapted(self, names: Sequence[str], pixels: torch.Tensor) -> torch.Tensor:
        patches = self.base_layer(pixels)
        self.image, self.grid, self.seen = pixels, tuple(patches.shape[-2:]), []
        return patches

    def _begin(
        self, top: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The loss is ours: the ViT's own head must not see the labels."""
        if self.working() is None:
            return None
        found = named_arguments(top, args, kwargs)
        self.targets = {name: found.pop(name, None) for name in ("labels", "num_items_in_batch")}
        return (), found

    def _before(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if (name := self.working()) is None:
            return None
        found = named_arguments(block, args, kwargs)
        if found.get("attention_mask") is not None:
            raise ValueError("attention_mask is given: HST's tokens have no place in it; images need none")
        first = next(iter(found))
        meta = self.unfused_hst_net[name].meta_tokens[index].to(found[first].dtype)
        x = torch.cat([meta.expand(len(found[first]), -1, -1), found.pop(first)], 1)  # (B, M + N, D)
        return (x,), found

    def _behind(self, block: nn.Module, args: Any, output: Any) -> Any:
        if (name := self.working()) is None:
            return None
        size = self.unfused_hst_net[name].meta_tokens.shape[1]
        x = first_tensor(output)
        meta, x = x[:, :size], x[:, size:]
        self.seen.append((meta, x[:, -self.grid[0] * self.grid[1] :]))  # class tokens come first
        return with_first_tensor(output, x)

    def _end(self, top: nn.Module, args: Any, output: Any) -> Any:
        if (name := self.working()) is None:
            return None
        image, seen, targets = self.image, self.seen, self.targets
        self.image, self.seen, self.targets = None, [], {}  # keeps no activations beyond the pass
        net = self.unfused_hst_net[name]
        maps = net(image, seen, self.grid)
        if self.only_maps:
            return tuple(maps)
        more = {key: getattr(output, key, None) for key in ("hidden_states", "attentions")}
        if (logits := net.logits(maps)) is None:
            found: Any = BackboneOutput(feature_maps=tuple(maps), **more)
        else:
            found = ImageClassifierOutput(loss=_loss(top, logits, **targets), logits=logits, **more)
        return found.to_tuple() if isinstance(output, tuple) else found


def _loss(
    top: Any, logits: torch.Tensor, labels: torch.Tensor | None = None, num_items_in_batch: Any = None
) -> torch.Tensor | None:
    if labels is None:
        return None
    labels, logits = labels.to(logits.device), logits.float()
    if top.config.problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


class HstModel(SideModel):
    """Puts the side network on a model's patch projection, and trained copies on its norms."""

    layer_types = ((nn.Conv2d, HstSide), (NORMS, HstNorm))
    not_mergeable = "its side network reads pixels and every block, and does not fold into the ViT"

    def pyramid(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """The maps (B, d_s, H_s, W_s) of all stages, fine to coarse, for images given as the model takes them."""
        side = next(layer for layer in tuner_layers(self.model) if isinstance(layer, HstSide))
        if side.working() is None:
            raise ValueError("pyramid: no HST adapter is active; the ViT alone has no pyramid")
        with _only_maps(side):
            return self.model(*args, **kwargs)

    def default_targets(self, config: Any, model_config: dict) -> set[str]:
        _, projection, _, norms = self._places()
        return {projection, *(norms if config.train_layernorm else ())}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        depth = len(self._places()[2])
        peft_config.require(
            depth >= len(peft_config.num_heads),
            f"{len(peft_config.num_heads)} stages for a model of {depth} blocks: give shorter hidden_sizes and num_heads",
        )
        return super()._prepare_adapter_config(peft_config, model_config)

    def make_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        top, projection, blocks, norms = self._places()
        if key == projection:
            return HstSide(target, adapter_name, top, [module_at(self.model, name) for name in blocks])
        if key in norms:
            return HstNorm(target, adapter_name)
        raise ValueError(f"target_modules: HST finds its places itself, and {key!r} is none; leave it out")

    def _places(self) -> tuple[nn.Module, str, list[str], list[str]]:
        """The model whose output is ours, and names of the patch projection, the blocks, their norms."""
        blocks = transformer_blocks(self.model)
        lists = {block.name.rpartition(".")[0] for block in blocks}
        tops = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, PreTrainedModel) and all(block.name.startswith(name) for block in blocks)
        ]
        projections = [
            name
            for name, module in self.model.named_modules()
            if isinstance(getattr(module, "base_layer", module), nn.Conv2d)
            and not name.endswith(".base_layer")
            and ".unfused_hst_" not in name
        ]
        if len(lists) != 1 or not tops or not projections:
            raise ValueError(
                f"HST goes beside one plain vision transformer of transformers (ViT, AST, CLIP's vision tower); "
                f"{type(self.model).__name__} is none"
                + (": it has several transformers, adapt the vision model" if len(lists) > 1 else "")
            )
        norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
        return tops[0], projections[0], [block.name for block in blocks], norms


@contextlib.contextmanager
def _only_maps(side: HstSide) -> Iterator[None]:
    side.only_maps = True
    try:
        yield
    finally:
        side.only_maps = False


register("hst", HstConfig, HstModel)
