"""DVPT: prompts that look at the image, through one bottleneck shared by neighbouring blocks of a frozen transformer.

m learned tokens (with learned positions of their own) travel with the [CLS] token and the patches. After the attention of
each block the residual stream x, (B, N + m, d), goes through a narrow module beside the frozen MLP. In d' dimensions the
prompts q ask the other tokens t, so what they carry on depends on the image:

    [t; q] = QuickGELU(Down x),   q' = softmax(q t^T / sqrt(d')) t,   g(x) = gate * Up [t; q']
    x <- x + MLP(LayerNorm x) + g(x)

One g per `share_every` consecutive blocks; the gate starts at 0 (so it learns first, Down and Up a step later). The head
sees the mean of the final LayerNorm of prompts and [CLS].

Swin and SegFormer have no room for tokens in their windows. There each block has m free queries P that read the map,
`softmax(P x^T / sqrt(d)) x`, and their answers are added to it (at its first m positions, as published, or their mean
everywhere: `aggregate="broadcast"`); g is then the bottleneck alone, shared inside a stage.

The released ViT code computes the attention and then discards it: there the method is static prompts with a shared gated
bottleneck, `cross_attention=False` here. We append the prompts where the paper prepends them; attention does not see it.

Reference: DVPT: Dynamic Visual Prompt Tuning of Large Pre-trained Models for Medical Image Analysis, Neural Networks 2025,
    arXiv:2307.09787.
Needs: labels, gradients.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn

from unfused.nn.blocks import Block, transformer_blocks
from unfused.nn.bottleneck import features
from unfused.nn.peft_register import register
from unfused.nn.towers import find_tower
from unfused.nn.tuner import TunerConfig, TunerLayer, TunerModel

__all__ = ["DvptConfig", "DvptModel", "cross_entropy_dice"]

SHARED_BY = {"SwinLayer": 3, "SegformerLayer": 2}
"""Hierarchical backbones, by the class of their blocks -> blocks of a stage that share a module."""


@dataclass
class DvptConfig(TunerConfig):
    """Configuration of DVPT.

    Parameters
    ----------
    num_virtual_tokens : int, optional
        m, the prompts; by default 50, and 10 queries a block in Swin and SegFormer.
    bottleneck_size : int, optional
        d'; by default 20, and 10 in Swin and SegFormer.
    share_every : int, optional
        Consecutive blocks (of one stage) that share a module; by default 3, and 2 in SegFormer.
    cross_attention : bool, default=True
        False: the prompts never look at the image (and Swin and SegFormer have none): the ablation, and the released code.
    aggregate : {"corner", "broadcast"}, default="corner"
        Swin and SegFormer: each answer to a position of its own, from the map's corner on, or their mean to all.
    layers_to_transform : list of int or int, optional
        Indices of the blocks that get modules; by default all. Leave `target_modules` alone, the places follow from these.

    Raises
    ------
    ValueError
        Where the model is no vision transformer with a [CLS] token (ViT, DeiT, DINO, CLIP's vision tower, AST), no Swin and no
        SegFormer.

    Notes
    -----
    Trained in the paper by AdamW, rate 5e-4, weight decay 1e-4, 5 epochs of warm-up (from a fifth of the rate, rather than 0),
    half a cosine, gradients clipped at norm 1; segmentation by `cross_entropy_dice`, with the decoder in `modules_to_save`
    unless it is pretrained. The prompts start as N(0, 1), so except in SegFormer the adapted model does not start as the
    pretrained one. CLIP's `last_hidden_state` keeps the prompts at its end; `pooler_output` is the readout.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    >>> vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    >>> model = get_peft_model(vit, DvptConfig(num_virtual_tokens=5, bottleneck_size=4, modules_to_save=["classifier"]))
    >>> sum(p.numel() for n, p in model.named_parameters() if "unfused_dvpt" in n)  # 2 * 5 * 16 + 2 * (2 * 4 * 16 + 4 + 16 + 1)
    458
    >>> model(torch.zeros(1, 3, 8, 8)).logits.shape
    torch.Size([1, 2])
    """

    num_virtual_tokens: int | None = field(
        default=None, metadata={"help": "Prompts; 50, or 10 queries a block."}
    )
    bottleneck_size: int | None = field(
        default=None, metadata={"help": "Inner width of the module; 20, or 10."}
    )
    share_every: int | None = field(
        default=None, metadata={"help": "Blocks that share a module; 3, or 2 in SegFormer."}
    )
    cross_attention: bool = field(default=True, metadata={"help": "Whether the prompts look at the image."})
    aggregate: str = field(
        default="corner", metadata={"help": "Swin, SegFormer: 'corner' (published) or 'broadcast'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_virtual_tokens", "bottleneck_size", "share_every"):
            value = getattr(self, name)
            self.require(value is None or value >= 1, f"{name}={value!r}: give at least 1")
        self.require(
            self.aggregate in ("corner", "broadcast"),
            f"aggregate={self.aggregate!r}: choose 'corner' or 'broadcast'",
        )


class SharedModule(nn.Module):
    """g: the gated bottleneck, in which the last `prompts` tokens attend to all others."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, size), nn.Linear(size, dim)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, prompts: int = 0) -> torch.Tensor:
        z = self.down(x.to(self.down.weight.dtype))
        z = z * torch.sigmoid(1.702 * z)  # (B, N + m, d')
        if prompts:
            z = torch.cat([z[:, :-prompts], _attend(z[:, -prompts:], z[:, :-prompts])], 1)
        return (self.gate * self.up(z)).to(x.dtype)


def _attend(queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """One head without projections: (..., m, d) of (B, N, d) -> (B, m, d)."""
    scores = queries @ tokens.mT * tokens.shape[-1] ** -0.5
    return scores.softmax(-1) @ tokens


class Handover:
    """What the wrapped parts of a block, or of a whole tower, leave for each other within one forward pass."""

    stream: torch.Tensor | None = None  # after the attention, with the hierarchical prompts in it
    added: torch.Tensor | None = None  # those prompts: the block's own residual lacks them
    prompts: torch.Tensor | None = None  # after the last block, where the final norm sees [CLS] alone

    def take(self, name: str) -> Any:
        value = getattr(self, name)
        setattr(self, name, None)  # keeps no activations beyond the pass
        return value


@dataclass
class Place:
    """Where a wrapped module stands.

    `leader`: the layer that owns each adapter's shared module, filled as the first of a group is wrapped. `tower` is given
    to the last block of a tower whose final norm does not see the prompts.
    """

    layer_type: type[DvptLayer]
    dim: int = 0
    leader: dict[str, MlpLayer] = field(default_factory=dict)
    block: Handover = field(default_factory=Handover)
    tower: Any = None
    hierarchical: str = ""  # the blocks' class
    class_tokens: int = 1


class DvptLayer(TunerLayer):
    """A part of the backbone in its `place`."""

    adapter_settings = ("unfused_dvpt_config", "unfused_dvpt_leader")
    place: Place

    def update_layer(self, adapter_name: str, config: Any) -> None:
        self.unfused_dvpt_config[adapter_name] = config

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        if len(names) > 1:
            raise ValueError(
                f"adapters {', '.join(names)}: DVPT's prompts cannot be mixed; activate one adapter at a time"
            )
        return self.prompted(names[0], self.unfused_dvpt_config[names[0]], *args, **kwargs)

    def prompted(self, name: str, config: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class EmbeddingsLayer(DvptLayer):
    """The embedding of [CLS] and patches, with the prompts behind."""

    adapter_parameters = ("unfused_dvpt_prompt", "unfused_dvpt_position")

    def update_layer(self, adapter_name: str, config: Any) -> None:
        super().update_layer(adapter_name, config)
        shape = (config.num_virtual_tokens, self.place.dim)
        self.unfused_dvpt_prompt[adapter_name] = nn.Parameter(torch.randn(shape))  # (m, d)
        self.unfused_dvpt_position[adapter_name] = nn.Parameter(torch.randn(shape) * self.place.dim**-0.5)

    def prompted(self, name: str, config: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = self.base_layer(*args, **kwargs)
        prompts = self.unfused_dvpt_prompt[name] + self.unfused_dvpt_position[name]
        return torch.cat([tokens, prompts.to(tokens.dtype).expand(len(tokens), -1, -1)], 1)  # (B, N + m, d)

    def __getattr__(self, name: str) -> Any:
        """The model looks into its embeddings, at `patch_embeddings` say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class NormLayer(DvptLayer):
    """The norm before the MLP: sees the residual stream, and in a hierarchical backbone adds its block's prompts."""

    adapter_parameters = ("unfused_dvpt_query", "unfused_dvpt_query_gate")

    def update_layer(self, adapter_name: str, config: Any) -> None:
        super().update_layer(adapter_name, config)
        if self.place.hierarchical and config.cross_attention:
            query = torch.empty(config.num_virtual_tokens, self.place.dim)
            self.unfused_dvpt_query[adapter_name] = nn.Parameter(nn.init.trunc_normal_(query, std=0.02))
            if self.place.hierarchical == "SegformerLayer":
                self.unfused_dvpt_query_gate[adapter_name] = nn.Parameter(torch.zeros(1))

    def prompted(self, name: str, config: Any, x: torch.Tensor) -> torch.Tensor:
        handover = self.place.block
        if name in self.unfused_dvpt_query:
            answers = _attend(self.unfused_dvpt_query[name].to(x.dtype), x)  # (B, m, d)
            if name in self.unfused_dvpt_query_gate:
                answers = answers * self.unfused_dvpt_query_gate[name].to(x.dtype)
            if config.aggregate == "broadcast":
                handover.added = answers.mean(1, keepdim=True).expand_as(x)
            else:  # a small map may have fewer than m positions
                answers = answers[:, : x.shape[1]]
                handover.added = nn.functional.pad(answers, (0, 0, 0, x.shape[1] - answers.shape[1]))
            x = x + handover.added
        handover.stream = x
        return self.base_layer(x)


class MlpLayer(DvptLayer):
    """The MLP with g beside it; g itself is kept by the first block of its group."""

    adapter_modules = ("unfused_dvpt_shared",)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        super().update_layer(adapter_name, config)
        leader = self.place.leader.setdefault(adapter_name, self)
        self.unfused_dvpt_leader[adapter_name] = leader
        if leader is self:
            self.unfused_dvpt_shared[adapter_name] = SharedModule(self.place.dim, config.bottleneck_size)

    def prompted(self, name: str, config: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        stream, added = self.place.block.take("stream"), self.place.block.take("added")
        shared = self.unfused_dvpt_leader[name].unfused_dvpt_shared[name]
        prompts = 0 if self.place.hierarchical else config.num_virtual_tokens
        out = self.base_layer(*args, **kwargs)
        out = out + shared(stream, prompts if config.cross_attention else 0)
        if self.place.tower is not None:
            self.place.tower.prompts = (stream + out)[:, -prompts:]
        return out if added is None else out + added


class ReadoutLayer(DvptLayer):
    """The final norm: each [CLS] becomes the mean of all [CLS] and prompts, and the prompts are dropped."""

    def prompted(self, name: str, config: Any, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 2:  # (B, d), CLIP
            prompts = self.place.tower.take("prompts")
            if torch.is_grad_enabled() and not prompts.requires_grad:
                raise ValueError(
                    "gradient checkpointing with use_reentrant=True hides DVPT's prompts: use use_reentrant=False"
                )
            return self.base_layer(torch.cat([x[:, None], prompts], 1)).mean(1)
        m, k = config.num_virtual_tokens, self.place.class_tokens
        x = self.base_layer(x)  # (B, N + m, d)
        mean = torch.cat([x[:, :k], x[:, -m:]], 1).mean(1, keepdim=True)
        return torch.cat([mean.expand(-1, k, -1), x[:, k:-m]], 1)


class DvptModel(TunerModel):
    """Puts `DvptLayer`s around the embeddings, norms and MLPs of a vision transformer."""

    tuner_layer_cls = DvptLayer
    not_mergeable = "it adds tokens to the sequence and a nonlinear module; serve the model with its adapter"

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> DvptConfig:
        places = _places(self.model, peft_config)
        targets = "|".join(map(re.escape, places))
        if peft_config.target_modules not in (None, targets):
            raise ValueError(
                f"target_modules={peft_config.target_modules!r}: DVPT finds its places itself; leave it out and choose blocks "
                "by layers_to_transform"
            )
        peft_config.target_modules = targets
        self.__dict__["_places"] = places
        return peft_config

    def make_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> DvptLayer:
        return self._places[key].layer_type(target, adapter_name)

    def extend_layer(self, layer: TunerLayer, adapter_name: str, config: Any, key: str) -> None:
        layer.place = self._places[key]  # a second adapter may share in other groups
        super().extend_layer(layer, adapter_name, config, key)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if isinstance(adapter_name, list) and len(adapter_name) > 1:
            raise ValueError(
                f"adapters {adapter_name}: DVPT's prompts cannot be mixed; activate one adapter at a time"
            )
        super().set_adapter(adapter_name, inference_mode)


def _hierarchical(model: nn.Module) -> tuple[str, list[Block]]:
    """The class of a hierarchical backbone's blocks, and those; ("", []) in all other models."""
    for kind in SHARED_BY:
        blocks = [b for b in transformer_blocks(model) if type(model.get_submodule(b.name)).__name__ == kind]
        if blocks:
            return kind, blocks
    return "", []


def _places(model: nn.Module, config: Any) -> dict[str, Place]:
    """Full name -> place of all that is wrapped; sizes that the config leaves open are filled in."""
    kind, blocks = _hierarchical(model)
    tower = None if kind else find_tower(model)
    if tower is not None:
        blocks = tower.blocks
    elif not kind:
        raise ValueError(
            f"{type(model).__name__} is no vision transformer that DVPT knows: one with [CLS] token, embeddings and final "
            "norm (ViT, DeiT, CLIP, AST), Swin or SegFormer"
        )
    config.num_virtual_tokens = config.num_virtual_tokens or (10 if kind else 50)
    config.bottleneck_size = config.bottleneck_size or (10 if kind else 20)
    config.share_every = config.share_every or SHARED_BY.get(kind, 3)
    wanted, last = config.layers_to_transform, len(blocks) - 1
    chosen = range(last + 1) if wanted is None else sorted({wanted} if isinstance(wanted, int) else {*wanted})
    if not chosen or chosen[0] < 0 or chosen[-1] > last:
        raise ValueError(f"layers_to_transform={wanted}: give indices from 0 to {last}")
    places: dict[str, Place] = {}
    for _, stage in groupby((blocks[i] for i in chosen), key=lambda block: block.name.rpartition(".")[0]):
        for position, block in enumerate(stage):
            if position % config.share_every == 0:
                leader: dict[str, MlpLayer] = {}
            dim, handover = features(model.get_submodule(block.norm2))[0], Handover()
            places[block.norm2] = Place(NormLayer, dim, block=handover, hierarchical=kind)
            places[block.mlp] = Place(MlpLayer, dim, leader, handover, hierarchical=kind)
    if tower is not None:
        places[tower.embeddings] = Place(EmbeddingsLayer, dim)
        places[tower.norm] = Place(ReadoutLayer, class_tokens=tower.class_tokens)
        if tower.norm.endswith("post_layernorm"):  # CLIP applies it to [CLS] alone
            if chosen[-1] != last:
                raise ValueError(f"layers_to_transform={wanted}: CLIP's readout needs the last block, {last}")
            places[tower.norm].tower = places[blocks[-1].mlp].tower = Handover()
    return places


def cross_entropy_dice(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = 255) -> torch.Tensor:
    """The paper's loss for segmentation: cross-entropy plus one minus the mean soft Dice coefficient of the classes.

    Parameters
    ----------
    logits : Tensor, shape (B, C, H, W)
    labels : LongTensor, shape (B, H, W)
    ignore_index : int, default=255
        Label of pixels that do not count.

    Examples
    --------
    >>> labels = torch.tensor([[[0, 1]]])
    >>> sure = 50 * nn.functional.one_hot(labels, 2).movedim(-1, 1).float()
    >>> cross_entropy_dice(sure, labels).item(), cross_entropy_dice(sure, 1 - labels).item()
    (0.0, 51.0)
    """
    counts = labels != ignore_index  # (B, H, W)
    truth = nn.functional.one_hot(labels.where(counts, 0), logits.shape[1]).movedim(-1, 1) * counts[:, None]
    chance = logits.float().softmax(1) * counts[:, None]
    axes = (0, 2, 3)
    dice = 2 * (chance * truth).sum(axes) / (chance.sum(axes) + truth.sum(axes)).clamp_min(1e-6)  # (C,)
    present = truth.sum(axes) > 0  # a class that is not in the batch has no overlap to reward
    dice_loss = 1 - dice[present].mean() if present.any() else logits.sum() * 0
    return nn.functional.cross_entropy(logits.float(), labels, ignore_index=ignore_index) + dice_loss


register("dvpt", DvptConfig, DvptModel)
