"""S2FT: trains a few whole attention heads and FFN channels, a small dense block of columns in every second matrix.

The matrices of a transformer come in pairs: channel j of an FFN ties row j of its up and gate projections to column j of
its down projection; a head ties rows of the query, key and value projections to columns of the output projection. Some
channels and heads are chosen once, out of all layers together, and their columns in the second matrix of the pair learn:

    y = W x + S x[idx],   S of shape (out, n), zero at the start

The paper moves the chosen channels to the front so that `x[idx]` is a slice; here they stay where they are and are gathered,
the same function, which needs no permuted checkpoint and works with grouped queries. Backward keeps `x[idx]` alone, n
channels instead of all. Merged, `W[:, idx] += S`; adapters that chose different channels do not touch each other.

Row-type targets (up, gate, value projections), the paper's inferior ablation, learn whole rows: `y[idx] += S x`.

Reference: S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity, NeurIPS 2024, arXiv:2412.06289.
Needs: labels, gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from unfused.nn.blocks import Block, attention_heads, linear_shape, module_at, transformer_blocks
from unfused.nn.peft_register import register
from unfused.nn.select import select_global, squared_gradients
from unfused.nn.tuner import TunerConfig, TunerLayer, TunerModel, tuner_layers

__all__ = ["S2ftConfig", "S2ftModel", "initialize_s2ft"]

FROM_DATA = ("activation", "product", "gradient")
SELECTIONS = ("random", "weight", *FROM_DATA)
COLUMNS = ("attention_out", "mlp_out")
ROWS = ("query", "key", "value", "mlp_in", "mlp_gate")
BY_HEADS = ("attention_out", "query", "key", "value")
PAPER = {"attention_out": 0.052, "mlp_out": 0.02}


@dataclass
class S2ftConfig(TunerConfig):
    """Configuration of S2FT.

    Parameters
    ----------
    ratio : float or dict of str to float, default={"attention_out": 0.052, "mlp_out": 0.02}
        Share of the heads or channels to train, at least one. Keys are suffixes of module names ("down_proj"), or parts of
        a block: "attention_out", "mlp_out" (columns), "query", "key", "value", "mlp_in", "mlp_gate" (rows). The share
        is drawn from all layers of a key together, so that layers differ in what they get.
    target_modules : list of str or str, optional
        By default the keys of `ratio`; with a single number, output and down projections of all blocks.
    selection : {"random", "weight", "activation", "product", "gradient"}, default="random"
        By chance, norm of the weight, mean size of the activation, the product of these two, norm of the gradient. Where not
        by chance, each layer's scores are divided by their mean, so that layers compare. The last three need
        `initialize_s2ft` before training. The paper's best are "random" and small activations.
    select_largest : bool, default=False
        Take the highest scores instead of the lowest.
    num_heads : int or "auto", default="auto"
        Heads of the attention, whose channels are chosen together; "auto" asks the model, 0 chooses single channels.
    disjoint : bool, default=False
        Leave out the channels of adapters that the model has already, so that the two can be added without interference.
    seed : int, default=0
        Of the random selection. Adapters of different seeds must not be averaged.

    Notes
    -----
    Rates of 1e-4 to 1e-3 for large language models, larger ones for small models; no weight decay.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> llm = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    >>> model = get_peft_model(llm, S2ftConfig(ratio={"down_proj": 0.05, "o_proj": 0.25}))
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 16 * (4 channels of 80, and 2 heads of 8)
    192
    >>> type(model.merge_and_unload()).__name__
    'LlamaForCausalLM'
    """

    ratio: float | dict[str, float] = field(
        default_factory=lambda: dict(PAPER), metadata={"help": "Share of channels and heads to train."}
    )
    selection: str = field(default="random", metadata={"help": f"One of {', '.join(SELECTIONS)}."})
    select_largest: bool = field(default=False, metadata={"help": "Highest scores instead of lowest."})
    num_heads: int | str = field(default="auto", metadata={"help": "Heads, 'auto', or 0: single channels."})
    disjoint: bool = field(default=False, metadata={"help": "Leave out channels of other adapters."})
    seed: int = field(default=0, metadata={"help": "Of the random selection."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.selection in SELECTIONS,
            f"selection={self.selection!r}: choose one of {', '.join(SELECTIONS)}",
        )
        ratios = self.ratio if isinstance(self.ratio, dict) else {"": self.ratio}
        self.require(
            bool(ratios) and all(0 < r <= 1 for r in ratios.values()),
            f"ratio={self.ratio}: give shares above 0 and at most 1; leave out what is not to be trained",
        )
        self.require(
            self.num_heads == "auto" or (isinstance(self.num_heads, int) and self.num_heads >= 0),
            f"num_heads={self.num_heads!r}: give 'auto' or a number",
        )


class S2ftLayer(TunerLayer):
    """A linear map with a trained block of columns (or rows) at stored positions."""

    adapter_parameters = ("unfused_s2ft_delta",)
    adapter_buffers = ("unfused_s2ft_index",)
    adapter_settings = ("unfused_s2ft_waiting",)
    role = ""

    @property
    def rows(self) -> bool:
        return self.role in ROWS

    def channels(self) -> int:
        """Of the side that is chosen from."""
        return linear_shape(self.get_base_layer())[0 if self.rows else 1]

    def update_layer(self, adapter_name: str, config: S2ftConfig) -> None:
        self.unfused_s2ft_waiting[adapter_name] = True
        self.choose(adapter_name, torch.empty(0, dtype=torch.int64))

    def choose(self, adapter_name: str, index: torch.Tensor) -> None:
        """Train these channels, from zero."""
        base = self.get_base_layer().weight
        out, into = linear_shape(self.get_base_layer())
        shape = (len(index), into) if self.rows else (out, len(index))
        delta = torch.zeros(shape, device=base.device, dtype=torch.promote_types(base.dtype, torch.float32))
        old = self.unfused_s2ft_delta[adapter_name] if adapter_name in self.unfused_s2ft_delta else None
        self.unfused_s2ft_delta[adapter_name] = nn.Parameter(
            delta, requires_grad=old is None or old.requires_grad
        )
        self.unfused_s2ft_index[adapter_name] = index.to(base.device)

    def prepare_load(self, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
        index = state.get("unfused_s2ft_index")
        if index is None or not self.has(adapter_name):
            return
        if index.dtype != torch.int64 or index.ndim != 1 or (index.diff() <= 0).any():
            raise ValueError("unfused_s2ft_index must be a vector of ascending int64 positions")
        if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < self.channels():
            raise ValueError(f"unfused_s2ft_index goes beyond the {self.channels()} channels")
        self.unfused_s2ft_waiting[adapter_name] = False
        self.choose(adapter_name, index)

    def adapted(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        if self.training and any(self.unfused_s2ft_waiting.get(name) for name in names):
            raise RuntimeError(
                "S2FT has chosen no channels yet: this selection needs initialize_s2ft(model, dataloader) first"
            )
        base, axis = self.get_base_layer(), 0 if self.rows else 1
        index = torch.cat([self.unfused_s2ft_index[name] for name in names])
        delta = torch.cat([self.unfused_s2ft_delta[name] for name in names], axis)
        if self.rows or base.weight.requires_grad or not base.weight.is_floating_point():
            y = self.base_layer(x)
            if self.rows:
                change = F.linear(x, delta.to(x.dtype))
                return y.index_add(-1, index, change.to(y.dtype))
            return y + F.linear(x.index_select(-1, index), delta.to(x.dtype)).to(y.dtype)
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        return column_linear(x, weight, base.bias, delta, index)

    def merged_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        transposed = isinstance(self.get_base_layer(), Conv1D)
        delta, axis = self.unfused_s2ft_delta[name].to(weight.dtype), 0 if self.rows else 1
        axis, delta = (1 - axis, delta.t()) if transposed else (axis, delta)
        return weight.index_add(axis, self.unfused_s2ft_index[name], delta), bias


class S2ftModel(TunerModel):
    """Puts `S2ftLayer`s into a model and chooses their channels, out of all layers together."""

    tuner_layer_cls = S2ftLayer
    layer_types = (((nn.Linear, Conv1D), S2ftLayer),)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        self._parts = _parts(self.model)
        config = super()._prepare_adapter_config(peft_config, model_config)
        for key in [key for key, _ in self.model.named_modules() if key]:
            if self._check_target_module_exists(
                config, key
            ):  # what cannot be is said before the model is changed
                _ratio_key(config, key, self._role(key))
                self._head_size(config, key)
        return config

    def default_targets(self, config: S2ftConfig, model_config: dict) -> set[str]:
        keys = config.ratio if isinstance(config.ratio, dict) else PAPER
        roles = {name: role for name, (role, _) in self._parts.items()}
        if missing := [key for key in keys if key in (*COLUMNS, *ROWS) and key not in roles.values()]:
            raise ValueError(f"S2ftConfig: the model has no {missing[0]!r} that we know: give target_modules")
        suffixes = {key for key in keys if key not in (*COLUMNS, *ROWS)}
        return suffixes | {name for name, role in roles.items() if role in keys}

    def make_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        layer: Any = super().make_layer(config, adapter_name, target, key)
        layer.role = self._role(key)
        return layer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        if config.selection not in FROM_DATA:
            layers = self.layers_of(adapter_name)
            self.select(config, adapter_name, {key: _weight_norms(layer) for key, layer in layers.items()})

    def layers_of(self, adapter_name: str) -> dict[str, S2ftLayer]:
        return {
            key: m
            for key, m in self.model.named_modules()
            if isinstance(m, S2ftLayer) and m.has(adapter_name)
        }

    def select(self, config: S2ftConfig, adapter_name: str, scores: Mapping[str, torch.Tensor]) -> None:
        """Choose channels by these scores, one for each channel of each layer."""
        generator = torch.Generator().manual_seed(config.seed)
        layers, pools = self.layers_of(adapter_name), {}  # type: ignore[var-annotated]
        for key in layers:
            pools.setdefault(_ratio_key(config, key, layers[key].role), []).append(key)
        for ratio_key, keys in pools.items():
            share = config.ratio[ratio_key] if isinstance(config.ratio, dict) else config.ratio
            pool = {}
            for key in keys:
                size = self._head_size(config, key)
                score = scores[key].float().cpu().view(-1, size).sum(1)  # a head's channels go together
                score = score / score.mean().clamp(min=1e-30) * (1 if config.select_largest else -1)
                if config.selection == "random":
                    score = torch.rand(len(score), generator=generator)
                if config.disjoint:
                    for index in (i for a, i in layers[key].unfused_s2ft_index.items() if a != adapter_name):
                        score[index.cpu() // size] = -torch.inf
                pool[key] = score
            count = max(1, int(share * sum(len(score) for score in pool.values())))
            for key, chosen in select_global(pool, count).items():
                size = self._head_size(config, key)
                index = (chosen[:, None] * size + torch.arange(size)).reshape(-1)
                layers[key].choose(adapter_name, index)
                layers[key].unfused_s2ft_waiting[adapter_name] = False

    def _role(self, key: str) -> str:
        return self._parts[key][0] if key in self._parts else ""

    def _head_size(self, config: S2ftConfig, key: str) -> int:
        if self._role(key) not in BY_HEADS or config.num_heads == 0:
            return 1
        block = self._parts[key][1]
        width = linear_shape(module_at(self.model, block.attention_out))[1]
        heads = attention_heads(self.model, block) if config.num_heads == "auto" else int(config.num_heads)
        if width % heads:
            raise ValueError(
                f"S2ftConfig: num_heads={heads} does not divide the {width} channels of {block.attention_out!r}"
            )
        return width // heads


def initialize_s2ft(
    peft_model: nn.Module,
    dataloader: Iterable[Any],
    num_batches: int = 16,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    adapter_name: str | None = None,
) -> None:
    """Choose channels by what data do to the pretrained model: for `selection` "activation", "product" and "gradient".

    Parameters
    ----------
    peft_model : nn.Module
        With an S2FT adapter, not trained yet.
    dataloader : iterable of dict
        Batches as the model takes them.
    num_batches : int, default=16
        How many to use at most.
    loss_fn : callable, optional
        `loss_fn(model, batch)`; by default `model(**batch).loss`. For "gradient" alone.
    adapter_name : str, optional
        By default the active one.

    Raises
    ------
    ValueError
        If the selection needs no data, the adapter is trained already, or there is no batch.
    """
    tuner = next((m for m in peft_model.modules() if isinstance(m, S2ftModel)), None)
    if tuner is None:
        raise ValueError("peft_model has no S2FT adapter: call get_peft_model(model, S2ftConfig(...)) first")
    adapter_name = adapter_name or tuner.active_adapters[0]
    config: Any = tuner.peft_config[adapter_name]
    layers = tuner.layers_of(adapter_name)
    if config.selection not in FROM_DATA:
        raise ValueError(f"selection={config.selection!r} needs no data: the channels are chosen already")
    if any(layer.unfused_s2ft_delta[adapter_name].any() for layer in layers.values()):
        raise ValueError(f"the adapter {adapter_name!r} is trained already: add a new one")
    batches = list(islice(dataloader, num_batches))
    if not batches:
        raise ValueError("dataloader gives no batch")
    device = next(peft_model.parameters()).device
    batches = [{k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()} for batch in batches]
    disabled = {layer: layer.disable_adapters for layer in tuner_layers(peft_model)}
    training = {module: module.training for module in peft_model.modules()}
    try:
        peft_model.eval()
        for layer in disabled:
            layer.enable_adapters(False)
        if config.selection == "gradient":
            with torch.enable_grad():
                scores = _gradient_norms(peft_model, layers, batches, loss_fn or (lambda m, b: m(**b).loss))
        else:
            scores = _activations(peft_model, layers, batches)
        if config.selection == "product":
            scores = {key: score * _weight_norms(layers[key]) for key, score in scores.items()}
    finally:
        for layer, was in disabled.items():
            layer.enable_adapters(not was)
        for module, was in training.items():
            module.training = was
    tuner.select(config, adapter_name, scores)


def _ratio_key(config: S2ftConfig, key: str, role: str) -> str:
    """The entry of `ratio` that speaks of a module: the longest suffix of its name, or its part of the block."""
    if not isinstance(config.ratio, dict):
        return role
    found = [k for k in config.ratio if key == k or key.endswith(f".{k}")] or [
        k for k in config.ratio if k == role
    ]
    if not found:
        raise ValueError(f"S2ftConfig: ratio has no entry for the target {key!r}")
    return max(found, key=len)


def _parts(model: nn.Module) -> dict[str, tuple[str, Block]]:
    """Module name -> its part in a block, and the block."""
    return {
        getattr(block, role): (role, block)
        for block in transformer_blocks(model)
        for role in (*COLUMNS, *ROWS)
        if getattr(block, role)
    }


def _weight_norms(layer: S2ftLayer) -> torch.Tensor:
    weight = layer.get_base_layer().weight.detach().float()
    weight = weight.t() if isinstance(layer.get_base_layer(), Conv1D) else weight
    return weight.norm(dim=1 if layer.rows else 0)


def _activations(model: nn.Module, layers: Mapping[str, S2ftLayer], batches: Sequence[Any]) -> dict:
    """Mean size of each chosen-from channel: of a layer's input, or its output for row-type layers."""
    found: dict[str, torch.Tensor] = {}

    def hook(key: str) -> Callable:
        def add(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            z = output if layers[key].rows else args[0]
            size = z.detach().float().abs().reshape(-1, z.shape[-1])
            total = torch.cat([size.sum(0), size.new_tensor([len(size)])])
            found[key] = found[key] + total if key in found else total

        return add

    handles = [layer.get_base_layer().register_forward_hook(hook(key)) for key, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if silent := [key for key in layers if key not in found]:
        raise ValueError(f"{silent[0]!r} never ran on these batches, so that it has no activations")
    return {key: total[:-1] / total[-1] for key, total in found.items()}


def _gradient_norms(
    model: nn.Module, layers: Mapping[str, S2ftLayer], batches: Sequence[Any], loss_fn: Callable
) -> dict[str, torch.Tensor]:
    weights = {key: layer.get_base_layer().weight for key, layer in layers.items()}
    required = {key: weight.requires_grad for key, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        squares = squared_gradients(weights, (loss_fn(model, batch) for batch in batches))
    finally:
        for key, weight in weights.items():
            weight.requires_grad_(required[key])
    axes = {
        key: int(layer.rows != isinstance(layer.get_base_layer(), Conv1D)) for key, layer in layers.items()
    }
    return {key: square.sum(axes[key]).sqrt() for key, square in squares.items()}


def column_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, delta: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """`x W^T + b + x[..., index] S^T`, which keeps of x only the indexed channels for backward.

    Parameters
    ----------
    x : tensor (..., in)
    weight : tensor (out, in)
        Frozen.
    bias : tensor (out,), optional
    delta : tensor (out, n)
    index : int64 tensor (n,)
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _ColumnLinear.apply(x, weight, bias, delta.to(x.dtype), index)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        delta: torch.Tensor,
        index: torch.Tensor,
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            few = x.reshape(-1, x.shape[-1]).index_select(1, index)  # (tokens, n)
            y = F.linear(x, weight, bias)
            y.view(-1, len(weight)).addmm_(few, delta.t())
        ctx.save_for_backward(weight, delta, index, few if ctx.needs_input_grad[3] else few[:0])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, delta, index, few = ctx.saved_tensors
        outer = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_x = grad_bias = grad_delta = None
        if ctx.needs_input_grad[0]:
            grad_x = (outer @ weight).index_add_(1, index, outer @ delta).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[2]:
            grad_bias = outer.sum(0)
        if ctx.needs_input_grad[3]:
            grad_delta = outer.t() @ few
        return grad_x, None, grad_bias, grad_delta, None


register("s2ft", S2ftConfig, S2ftModel)
