"""UniPT: a parallel network on the hidden states of all layers of a backbone that is run once, without gradient.

Each layer's states H_i are projected down, Z_i = LayerNorm(W_i H_i); the last are the anchor A. Layers i below it are asked
by the anchor, keep their own tokens as well, and are mixed by a confidence c per sample:

    F_i = (L1-normalised ReLU(A Z_i^T) + I) Z_i,   c_i = w . (mean(A) * mean(Z_i)) + b,   M = sum softmax(c)_i F_i
    out = U ReLU(A + LayerNorm(P M))

in the model's place of the last hidden state ("sequence"). "pooled", for dual encoders: the anchor is the tower's embedding
h, all layers take part through Z_i = W_i ReLU(H_i), the summary token stands in for the identity, and h is the residual,
out = h + U ReLU(M). "conv": stages of a CNN; each cell of q x q pixels that falls on one position of the last stage is
summed with weights 1/q^2 + L1-normalised ReLU(<guide of the last stage, pixel>), then as for sequences with batch norms.

In a causal model attention and means look back only (the paper has no such models): c is then per token.
The hidden states never change, so they can be kept on disk: `cache` and `fit_cached`.

Reference: UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory, CVPR 2024,
    arXiv:2308.14316.
Needs: labels, gradients.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import default_data_collator

from unfused.data.hidden_states import HiddenStates, HiddenStatesWriter, States
from unfused.nn.blocks import module_at, transformer_blocks
from unfused.nn.fingerprint import fingerprint
from unfused.nn.peft_register import register
from unfused.nn.side import (
    SideLayer,
    SideModel,
    Site,
    find_sites,
    first_tensor,
    named_arguments,
    with_first_tensor,
)
from unfused.nn.tuner import TunerConfig, TunerLayer, tuner_layers

__all__ = ["UniPtConfig", "UniPtModel"]


@dataclass
class UniPtConfig(TunerConfig):
    """Configuration of UniPT.

    Parameters
    ----------
    form : {"sequence", "pooled", "conv"}, default="sequence"
        "sequence": adapted last hidden states of BERT, GPT-2, Llama, ViT, AST and their kin. "pooled": an adapted embedding,
        of CLIP's towers or of a model with a pooler. "conv": adapted last stage of ResNet and other CNNs with stages.
    reduction_factor : int, default=2
        r: the network's width is that of its output over r.
    output_size : int, optional
        Of the adapted states, by default the backbone's. Other sizes need a head that takes them.
    wide : bool, default=False
        Joint vision-language encoders: P is `Linear, ReLU, Linear` with the backbone's width inside, and U has no ReLU
        before it.

    Raises
    ------
    ValueError
        Where the model has no such states, or the sizes do not divide.

    Notes
    -----
    The backbone stays in eval mode while the model trains, and only whole sequences can be read: `generate` needs
    `use_cache=False`. "sequence" and "conv" start from random features: compare at the end of training. The paper trains
    by AdamW, 5e-4, weight decay 1e-4; CLIP's towers by 1e-4 with `reduction_factor=1`. `target_modules` may pick one of
    several towers, by the name of the module whose output is adapted.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = get_peft_model(BertModel(BertConfig(vocab_size=30, **sizes)), UniPtConfig())
    >>> out = model(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state
    >>> out.shape, type(out.grad_fn).__name__
    (torch.Size([1, 3, 16]), 'ViewBackward0')
    >>> states = model.cache([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    >>> len(model.fit_cached(states, torch.tensor([0, 1]), nn.Linear(16, 2), epochs=2))
    2
    """

    form: str = field(default="sequence", metadata={"help": "'sequence', 'pooled' or 'conv'."})
    reduction_factor: int = field(default=2, metadata={"help": "Output size over the network's width."})
    output_size: int | None = field(default=None, metadata={"help": "Of the adapted states."})
    wide: bool = field(default=False, metadata={"help": "The variant for joint encoders."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.form in ("sequence", "pooled", "conv"),
            f"form={self.form!r}: choose 'sequence', 'pooled' or 'conv'",
        )
        self.require(self.reduction_factor >= 1, f"reduction_factor={self.reduction_factor}: give at least 1")
        self.require(self.output_size is None or self.output_size >= 1, f"output_size={self.output_size}")
        self.require(
            self.form == "sequence" or not self.wide, f"wide=True with form={self.form!r}: 'sequence' has it"
        )
        self.require(
            self.form != "pooled" or self.output_size is None,
            "output_size is given with form='pooled': the embedding is added to the output, they have one size",
        )
        self.require(
            self.layers_to_transform is None, "layers_to_transform is given: UniPT reads every layer"
        )


# -- the networks ------------------------------------------------------------------------------------------------------


class TokenBatchNorm(nn.BatchNorm1d):
    """A batch norm of the last axis, over all others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)


class SequenceNetwork(nn.Module):
    """Form A: hidden states of all layers to adapted ones."""

    def __init__(
        self, dims: Sequence[int], width: int, size: int, wide: bool, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(nn.Linear(dim, width), norm(width)) for dim in dims)
        self.gate = nn.Linear(width, 1)
        inner = [nn.Linear(width, dims[-1]), nn.ReLU()] if wide else []
        self.mix = nn.Sequential(*inner, nn.Linear(dims[-1] if wide else width, width), norm(width))
        self.up = nn.Linear(width, size) if wide else nn.Sequential(nn.ReLU(), nn.Linear(width, size))

    def forward(self, states: States, causal: bool = False) -> torch.Tensor:
        hidden, dtype = states.hidden, self.gate.weight.dtype
        z = torch.stack([down(h.to(dtype)) for down, h in zip(self.down, hidden, strict=True)], 1)
        anchor, z = z[:, -1:], z[:, :-1]  # (B, 1, N, m), (B, L, N, m)
        items, tokens = len(z), z.shape[2]
        real = z.new_ones(items, tokens) if states.mask is None else states.mask.to(z)
        seen = real[:, None, None]  # (B, 1, 1, N): keys
        if causal:
            seen = seen * z.new_ones(tokens, tokens).tril()
        found = _attend(anchor, z, seen) + z
        mean_a, mean_z = (_means(x, real[:, None, :, None], causal) for x in (anchor, z))
        confidence = self.gate(mean_a * mean_z).softmax(1)  # (B, L, 1, 1); causal: (B, L, N, 1)
        return self.up(anchor[:, 0] + self.mix((confidence * found).sum(1)))


class PooledNetwork(nn.Module):
    """Form B: an embedding and the hidden states of all layers to an adapted embedding."""

    def __init__(self, dims: Sequence[int], width: int, size: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        self.anchor, self.gate, self.up = nn.Linear(size, width), nn.Linear(width, 1), nn.Linear(width, size)

    def forward(self, states: States, causal: bool = False) -> torch.Tensor:
        dtype = self.gate.weight.dtype
        assert states.anchor is not None and states.summary is not None
        downs = zip(self.down, states.hidden, strict=True)
        z = torch.stack([down(F.relu(h.to(dtype))) for down, h in downs], 1)  # (B, L, N, m)
        anchor = self.anchor(F.relu(states.anchor.to(dtype)))[:, None, None]  # (B, 1, 1, m)
        real = z.new_ones(len(z), z.shape[2]) if states.mask is None else states.mask.to(z)
        at = states.summary.to(z.device)[:, None, None, None].expand(-1, z.shape[1], 1, z.shape[3])
        found = _attend(anchor, z, real[:, None, None]) + z.gather(2, at)
        confidence = self.gate(anchor * _means(z, real[:, None, :, None], False)).softmax(1)
        return states.anchor.to(dtype) + self.up(F.relu((confidence * found).sum(1)[:, 0]))


class ConvNetwork(nn.Module):
    """Form C: maps of all stages to an adapted last one."""

    def __init__(self, dims: Sequence[int], width: int, size: int) -> None:
        super().__init__()
        self.guides = nn.ModuleList(nn.Conv2d(dims[-1], dim, 1) for dim in dims[:-1])
        self.mixer = SequenceNetwork(dims, width, size, False, TokenBatchNorm)

    def forward(self, states: States, causal: bool = False) -> torch.Tensor:
        maps = [h.to(self.mixer.gate.weight.dtype) for h in states.hidden]
        last = maps[-1]
        pooled = [_pool_cells(x, F.relu(guide(last))) for guide, x in zip(self.guides, maps, strict=False)]
        out = self.mixer(States([x.flatten(2).mT for x in (*pooled, last)]))
        return out.mT.unflatten(2, last.shape[-2:])


def _attend(queries: torch.Tensor, z: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    weights = F.relu((queries @ z.mT) * seen)
    return (weights @ z) / weights.sum(-1, keepdim=True).clamp_min(1e-6)


def _means(x: torch.Tensor, real: torch.Tensor, causal: bool) -> torch.Tensor:
    """Over the real tokens, or over those so far."""
    if causal:
        return (x * real).cumsum(2) / real.cumsum(2).clamp_min(1)
    return (x * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)


def _pool_cells(x: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) summed to the (B, C, h, w) of the guide; maps that do not divide get zeros at the end."""
    (height, width), (h, w) = x.shape[-2:], guide.shape[-2:]
    q, p = -(-height // h), -(-width // w)
    cells = F.pad(x, (0, w * p - width, 0, h * q - height)).unflatten(3, (w, p)).unflatten(2, (h, q))
    weights = F.relu(torch.einsum("bchw,bchqwp->bhqwp", guide, cells))
    weights = weights / weights.sum((2, 4), keepdim=True).clamp_min(1e-6) + 1 / (q * p)
    return torch.einsum("bhqwp,bchqwp->bchw", weights, cells)


# -- beside the backbone -----------------------------------------------------------------------------------------------


class UniPtLayer(SideLayer):
    """The module whose output is adapted, with the network; hooks show it the hidden states."""

    adapter_modules = ("unfused_unipt_net",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, site: Site, tower: Any, layers: Sequence[nn.Module]
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.site, self.form, self.causal = site, "", False
        self.backbone = (tower,)  # in a tuple: it is no part of this layer
        self.depth = len(layers)
        self.hidden: list[torch.Tensor] = []
        self.inputs: dict[str, Any] = {}
        self.keep: Callable[[States], None] | None = None
        self.handles.append(tower.register_forward_pre_hook(self._begin, with_kwargs=True))
        self.handles.append(layers[0].register_forward_pre_hook(self._first, with_kwargs=True))
        self.handles += [layer.register_forward_hook(self._behind) for layer in layers]

    def update_layer(self, adapter_name: str, config: UniPtConfig) -> None:
        tower = self.backbone[0]
        if config.form == "conv":
            dims = list(tower.config.hidden_sizes)
        else:
            dims = [tower.config.hidden_size] * (self.depth + 1)
        size = config.output_size or dims[-1]
        config.require(
            size == dims[-1] or getattr(tower, "pooler", None) is None,
            f"output_size={size}: the model's pooler takes {dims[-1]}; leave it out, or build the model without a pooler",
        )
        if config.form == "pooled":
            linear = [m for m in self.get_base_layer().modules() if isinstance(m, nn.Linear)]
            size = linear[-1].out_features
        config.require(
            size % config.reduction_factor == 0,
            f"reduction_factor={config.reduction_factor} does not divide the output size {size}",
        )
        width = size // config.reduction_factor
        self.unfused_unipt_net[adapter_name] = (
            SequenceNetwork(dims, width, size, config.wide, nn.LayerNorm)
            if config.form == "sequence"
            else PooledNetwork(dims, width, size)
            if config.form == "pooled"
            else ConvNetwork(dims, width, size)
        )
        self.train(self.training)

    def train(self, mode: bool = True) -> UniPtLayer:
        """The backbone stays in eval mode."""
        super().train(mode)
        networks = set(self.unfused_unipt_net.modules())
        for part in (self.base_layer, *self.backbone) if len(self.unfused_unipt_net) else ():
            for module in part.modules():
                if module not in networks:
                    module.training = False
        return self

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        states = self._states(first_tensor(output))
        if self.keep is not None:
            self.keep(states)
            return output
        net = self.unfused_unipt_net[self.working()]
        return with_first_tensor(output, net(states, self.causal).to(first_tensor(output).dtype))

    def _states(self, output: torch.Tensor) -> States:
        hidden, inputs = self.hidden, self.inputs
        self.hidden, self.inputs = [], {}  # keeps no activations beyond the pass
        if self.form == "conv":
            return States(hidden[1:])
        mask = inputs.get("attention_mask")
        if self.form == "sequence":
            return States([*hidden[:-1], output], mask)  # the last as the model gives it, after its norm
        summary = torch.zeros(len(output), dtype=torch.long, device=output.device)
        if self.site.name.endswith("text_projection"):
            ids, end = inputs["input_ids"], self.backbone[0].config.eos_token_id
            summary = ids.argmax(1) if end == 2 else (ids == end).int().argmax(1)  # as CLIP itself finds it
        return States(hidden, mask, output, summary)

    def _begin(
        self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.working() is None:
            return None
        found = named_arguments(tower, args, kwargs)
        mask = found.get("attention_mask")
        if found.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values is given: UniPT reads whole sequences; generate with use_cache=False"
            )
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: UniPT takes (batch, tokens)")
        if "use_cache" in found or self.causal:
            found["use_cache"] = False
        self.inputs = {name: found.get(name) for name in ("attention_mask", "input_ids")}
        return (), found

    def _first(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.working() is None:
            return None
        found = named_arguments(layer, args, kwargs)
        name = next(iter(found))
        self.hidden = [
            found[name].detach()
        ]  # nothing before it asks for a gradient: the backbone records none
        return (self.hidden[0],), {key: value for key, value in found.items() if key != name}

    def _behind(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self.working() is not None:
            self.hidden.append(first_tensor(output))


class UniPtModel(SideModel):
    """Puts the parallel network where the backbone's last states, or its embedding, come out."""

    layer_types = ((nn.Module, UniPtLayer),)
    not_mergeable = "its network runs beside the backbone, on the states of all layers"

    def default_targets(self, config: Any, model_config: dict) -> set[str]:
        return {site.name for site in self._sites(config)}

    def make_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        sites = {site.name: site for site in self._sites(config)}
        if key not in sites:
            raise ValueError(
                f"target_modules: UniPT of form {config.form!r} goes on {', '.join(sites)}, not on {key!r}"
            )
        site = sites[key]
        layers = [module_at(self.model, name) for name in site.layers]
        layer = UniPtLayer(target, adapter_name, site, self.model.get_submodule(site.tower), layers)
        layer.form = config.form
        attention = [b.attention for b in transformer_blocks(self.model) if b.name == site.layers[0]]
        parts = module_at(self.model, attention[0]).modules() if attention else ()
        layer.causal = any(getattr(part, "is_causal", False) for part in parts)
        return layer

    def extend_layer(self, layer: TunerLayer, adapter_name: str, config: Any, key: str) -> None:
        if isinstance(layer, UniPtLayer) and layer.form != config.form:
            raise ValueError(f"form={config.form!r}: {key!r} has adapters of form {layer.form!r} already")
        super().extend_layer(layer, adapter_name, config, key)

    def _sites(self, config: Any) -> list[Site]:
        if not (sites := find_sites(self.model, config.form)):
            lacks = {
                "sequence": "transformer blocks; a CNN wants form='conv'",
                "pooled": "pooler and no projection after its transformer; try form='sequence'",
                "conv": "list of stages with their sizes in its config",
            }
            raise ValueError(
                f"UniPT, form={config.form!r}: {type(self.model).__name__} has no {lacks[config.form]}"
            )
        return sites

    # -- without the backbone ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cache(
        self,
        dataset: Any,
        folder: str | Path | None = None,
        batch_size: int = 32,
        collate_fn: Callable[[list[Any]], Mapping[str, torch.Tensor]] = default_data_collator,
        dtype: str = "float32",
    ) -> Any:
        """Run the backbone once over a dataset and keep its hidden states on disk.

        Parameters
        ----------
        dataset : sequence of mappings
            Items as the model takes them.
        folder : path, optional
            New or empty; by default a temporary one that goes with the result.
        batch_size : int, default=32
        collate_fn : callable, optional
            Makes a batch of items, which padding needs.
        dtype : {"float32", "float16"}, default="float32"
            On disk; layers times tokens times width numbers an item.

        Returns
        -------
        HiddenStates, or dict of str to HiddenStates
            The latter, by the name of the adapted module, where several towers are adapted.
        """
        temporary = tempfile.TemporaryDirectory(prefix="unfused-unipt-") if folder is None else None
        root, layers = Path(temporary.name if temporary else str(folder)), self._layers()
        writers = {layer.site.name: HiddenStatesWriter(root / layer.site.name, dtype) for layer in layers}
        device = next(self.model.parameters()).device
        try:
            for layer in layers:
                layer.keep = writers[layer.site.name].append
            for batch in torch.utils.data.DataLoader(dataset, batch_size, collate_fn=collate_fn):
                self.model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
        finally:
            for layer in layers:
                layer.keep = None
        backbone = self._backbone()
        found = {
            layer.site.name: writers[layer.site.name].close(
                site=layer.site.name, form=layer.form, backbone=backbone
            )
            for layer in layers
        }
        for states in found.values():
            states.temporary = temporary  # type: ignore[attr-defined]
        return found if len(found) > 1 else next(iter(found.values()))

    def forward_cached(self, states: HiddenStates, chosen: Any) -> tuple[torch.Tensor, States]:
        """Adapted features of some items, and their states: (B, N, d), (B, d) or (B, d, h, w), by form."""
        sites = {layer.site.name: layer for layer in self._layers()}
        layer = sites.get(states.about.get("site", ""))
        if layer is None or layer.form != states.about.get("form"):
            raise ValueError(
                f"states of {states.about}: the active UniPT adapter sits on {', '.join(sites) or 'nothing'}"
            )
        if not getattr(states, "known", False):
            if states.about.get("backbone", "") != self._backbone():
                raise ValueError(
                    "states come from a backbone with other weights: run `cache` again with this one"
                )
            states.known = True  # type: ignore[attr-defined]
        net = layer.unfused_unipt_net[layer.working()]
        batch = states.batch(chosen)
        device = net.gate.weight.device if hasattr(net, "gate") else net.mixer.gate.weight.device
        batch = States(
            [h.to(device) for h in batch.hidden], *(x if x is None else x.to(device) for x in batch[1:])
        )
        return net(batch, layer.causal), batch

    def fit_cached(
        self,
        states: HiddenStates,
        labels: torch.Tensor,
        head: nn.Module,
        *,
        epochs: int = 25,
        batch_size: int = 32,
        lr: float = 5e-4,
        weight_decay: float = 1e-4,
        pooling: str | None = "mean",
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
        seed: int = 0,
    ) -> list[float]:
        """Train the network and a head on kept states; the backbone is not touched.

        Parameters
        ----------
        states : HiddenStates
            From `cache`.
        labels : Tensor
            (items,); without pooling (items, tokens), -100 where there is none.
        head : nn.Module
            Takes the features, and is trained with them.
        pooling : {"mean", "first", "last"} or None, default="mean"
            How the tokens of an item (or positions of a map) become one feature before the head.
        loss : callable (head's output, labels) -> Tensor
            By default the cross-entropy.

        Returns
        -------
        list of float
            Mean loss of each epoch.
        """
        if len(labels) != len(states):
            raise ValueError(f"labels: {len(labels)} for {len(states)} items of hidden states")
        if pooling not in ("mean", "first", "last", None):
            raise ValueError(f"pooling={pooling!r}: choose 'mean', 'first', 'last' or None")
        layers = [layer for layer in self._layers() if layer.site.name == states.about.get("site")]
        parts = [layer.unfused_unipt_net[layer.working()] for layer in layers]
        parameters = [p for part in (*parts, head) for p in part.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
        generator, losses = torch.Generator().manual_seed(seed), []
        was = [(part, part.training) for part in (*parts, head)]
        for part, _ in was:
            part.train()
        for _ in range(epochs):
            total = 0.0
            for rows in torch.randperm(len(states), generator=generator).split(batch_size):
                features, batch = self.forward_cached(states, rows)
                scores = head(_pool(features, batch.mask, pooling))
                wanted = labels[rows].to(scores.device)
                if pooling is None and features.ndim == 3:
                    scores, wanted = scores.flatten(0, 1), wanted[:, : features.shape[1]].flatten()
                value = loss(scores, wanted)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += value.item() * len(rows)
            losses.append(total / len(states))
        for part, training in was:
            part.train(training)
        return losses

    def _backbone(self) -> str:
        """Of all weights but the adapter's and the new head's."""
        ours = ("unfused_unipt_", "modules_to_save.", "original_module.")
        return fingerprint(self.model, lambda name: not any(part in name for part in ours))

    def _layers(self) -> list[UniPtLayer]:
        found = [
            layer for layer in tuner_layers(self.model) if isinstance(layer, UniPtLayer) and layer.working()
        ]
        if not found:
            raise ValueError("no UniPT adapter is active: nothing reads the hidden states")
        return found


def _pool(x: torch.Tensor, mask: torch.Tensor | None, how: str | None) -> torch.Tensor:
    if x.ndim == 4:
        return x if how is None else x.mean((2, 3))
    if how is None or x.ndim == 2:
        return x
    real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x)
    if how == "mean":
        return _means(x[:, None], real[:, None, :, None], False)[:, 0, 0]
    return x[:, 0] if how == "first" else x[torch.arange(len(x)), real.sum(1).long() - 1]


register("unipt", UniPtConfig, UniPtModel)
