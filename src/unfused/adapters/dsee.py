"""DSEE: a low-rank and very sparse update, and a pruned network under it.

The update of a matrix is `s (U V + S2)`, s = alpha / r. S2 learns on N positions that low rank explains worst: GreBsmo, a
greedy decomposition of the pretrained weight into low rank plus sparse, finds them, and only its positions are kept. After
some training `dsee_prune` removes weights, and training goes on:

    W_eff = W * S1 + s (U V + S2)

with S1 = 0 at the smallest weights of key, output and FFN matrices, and, of the adapted query and value matrices, where the
UPDATE is smallest; two global rankings. Or it removes the heads whose query and value rows were updated least, the same
number in every layer. An earlier version of the method, also here, learns a coefficient for every head and FFN neuron under
an L1 penalty (`l1`) and removes the smallest.

S1 lives in the adapter, one bit a weight, and multiplies the frozen weight on its way: the base model stays what it was.
Merging fills S1's zeros with U V again; `merge_and_unload(keep_sparse=True)` keeps `W * S1` and the update apart, as the
paper's count of operations assumes, and `remove_heads=True` takes removed heads and neurons out for good.

Reference: DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models, ACL 2023, arXiv:2111.00160.
Needs: labels, gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from unfused.nn.blocks import Block, attention_heads, linear_shape, module_at, transformer_blocks
from unfused.nn.grebsmo import grebsmo
from unfused.nn.peft_register import register
from unfused.nn.pruning import (
    SparseLowRankLinear,
    add_sparse_product,
    masked,
    masked_linear,
    pack_mask,
    set_heads,
    shrink_linear,
    unpack_mask,
)
from unfused.nn.select import select_global, select_random
from unfused.nn.sparse_delta import SparseDelta, check_sparse
from unfused.nn.tuner import HEADS, TunerConfig, TunerLayer, TunerModel

__all__ = ["DseeConfig", "DseeModel", "DseeReport", "dsee_prune"]

SUPPORTS = ("grebsmo", "magnitude", "random")
SCORES = ("update", "sum", "low_rank", "weight", "random")
MASK, ROWS, COLUMNS = "mask", "rows", "columns"


@dataclass
class DseeConfig(TunerConfig):
    """Configuration of DSEE.

    Parameters
    ----------
    target_modules : list of str or str, optional
        By default the query and value projections of all blocks.
    r : int, default=16
    lora_alpha : float, default=32
        The update is scaled by `lora_alpha / r`, S2 too.
    num_sparse : int, default=64
        N, trained entries of S2 in each matrix. The paper uses 16 to 128.
    sparse_support : {"grebsmo", "magnitude", "random"}, default="grebsmo"
        How S2's positions are found: what low rank explains worst, the largest weights, or by chance. GreBsmo takes
        seconds for a matrix of width 768, minutes for much larger ones.
    l1 : float, default=0.0
        Penalty of coefficients of heads and FFN neurons, 1e-4 say; 0: no coefficients. Training needs
        `unfused.train.peft.RegularizedTrainer`.
    seed : int, default=0
        Of the positions.
    pruned, coefficients, support_saved
        Filled in: what is pruned, by module; groups of the coefficients; whether positions come from a file.

    Notes
    -----
    The paper: rates of 2e-4 to 6e-4, 5 epochs, `dsee_prune`, then 5 to 10 epochs; batch 32.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> bert = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
    >>> model = get_peft_model(bert, DseeConfig(r=2, lora_alpha=4, num_sparse=8, modules_to_save=["classifier"]))
    >>> sum(p.numel() for n, p in model.named_parameters() if "unfused_dsee" in n)  # 4 matrices: 2 * 32 and 8
    288
    >>> report = dsee_prune(model, amount=0.5, score="weight")
    >>> round(report.sparsity, 2)
    0.5
    >>> type(model.merge_and_unload()).__name__
    'BertForSequenceClassification'
    """

    r: int = field(default=16, metadata={"help": "Rank of U V."})
    lora_alpha: float = field(default=32, metadata={"help": "The update is scaled by lora_alpha / r."})
    num_sparse: int = field(default=64, metadata={"help": "Trained entries of S2 in each matrix."})
    sparse_support: str = field(default="grebsmo", metadata={"help": "'grebsmo', 'magnitude' or 'random'."})
    l1: float = field(default=0.0, metadata={"help": "Penalty of head and neuron coefficients; 0: none."})
    seed: int = field(default=0, metadata={"help": "Of the positions of S2."})
    pruned: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "Filled in: 'mask', 'rows', 'columns' by module."}
    )
    coefficients: dict[str, int] | None = field(
        default=None, metadata={"help": "Filled in: number of coefficients by module."}
    )
    support_saved: bool = field(
        default=False, metadata={"help": "Filled in when saved: S2's positions are in the adapter file."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.r >= 1, f"r={self.r}: at least 1 is needed")
        self.require(self.num_sparse >= 0, f"num_sparse={self.num_sparse}: 0 or more is needed")
        self.require(self.l1 >= 0, f"l1={self.l1}: 0 or more is needed")
        self.require(
            self.sparse_support in SUPPORTS,
            f"sparse_support={self.sparse_support!r}: choose one of {', '.join(SUPPORTS)}",
        )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "support_saved": True}


class DseeLayer(TunerLayer):
    """A linear map with a mask on its weight, removed rows and columns, coefficients of its inputs, and the update.

    Adapters that are not the update's target hold the rest alone. S2's positions are of the (out, in) matrix.
    """

    adapter_parameters = ("unfused_dsee_up", "unfused_dsee_down", "unfused_dsee_coefficient")
    adapter_modules = ("unfused_dsee_sparse",)
    adapter_buffers = ("unfused_dsee_mask", "unfused_dsee_rows", "unfused_dsee_columns")
    adapter_settings = ("unfused_dsee_scale", "unfused_dsee_l1", "unfused_dsee_waiting")
    key = ""

    def update_layer(self, adapter_name: str, config: DseeConfig, targeted: bool = True) -> None:
        weight = self._weight()
        if not weight.is_floating_point():
            raise ValueError(f"DseeConfig: {self.key!r} is quantised ({weight.dtype}): it cannot be pruned")
        out, into = linear_shape(self.get_base_layer())
        self.unfused_dsee_scale[adapter_name] = config.lora_alpha / config.r
        self.unfused_dsee_l1[adapter_name] = config.l1
        if targeted:
            self.unfused_dsee_up[adapter_name] = nn.Parameter(torch.zeros(out, config.r))  # U
            self.unfused_dsee_down[adapter_name] = nn.Parameter(0.02 * torch.randn(config.r, into))  # V
            count = min(config.num_sparse, weight.numel())
            index = torch.arange(count) if config.support_saved else self._support(config, count)
            self.unfused_dsee_sparse[adapter_name] = SparseDelta((out, into), index.to(weight.device))
            self.unfused_dsee_waiting[adapter_name] = config.support_saved and count > 0
        if groups := (config.coefficients or {}).get(self.key):
            self.unfused_dsee_coefficient[adapter_name] = nn.Parameter(torch.ones(groups))
        self.prune(adapter_name, (config.pruned or {}).get(self.key, ()))

    def prune(self, adapter_name: str, parts: Sequence[str]) -> None:
        """Make the buffers of these parts, with nothing pruned, where they are not there yet."""
        weight, (out, into) = self._weight(), linear_shape(self.get_base_layer())
        sizes = {MASK: -(-weight.numel() // 8), ROWS: out, COLUMNS: into}
        for part in parts:
            buffers = getattr(self, f"unfused_dsee_{part}")
            if adapter_name not in buffers:
                new = torch.full((sizes[part],), 255, dtype=torch.uint8, device=weight.device)
                buffers[adapter_name] = new if part == MASK else new.bool()

    def _weight(self) -> torch.Tensor:
        """As it is without any adapter, merged or not."""
        return self._unmerged[0] if self._unmerged else self.get_base_layer().weight

    def _support(self, config: DseeConfig, count: int) -> torch.Tensor:
        weight = self._weight().detach().float()
        weight = weight.t() if isinstance(self.get_base_layer(), Conv1D) else weight
        if config.sparse_support == "random":
            return select_random({"": weight.numel()}, count, config.seed)[""]
        if config.sparse_support == "grebsmo" and count:
            weight = grebsmo(weight, seed=config.seed)
        return select_global({"": weight.abs()}, count)[""].cpu()

    def prepare_load(self, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
        for part in (MASK, ROWS, COLUMNS):
            entry = state.get(f"unfused_dsee_{part}")
            wanted = torch.uint8 if part == MASK else torch.bool
            if entry is not None and entry.dtype != wanted:
                raise ValueError(f"unfused_dsee_{part} is of type {entry.dtype}, not {wanted}")
        index, values = (state.get(f"unfused_dsee_sparse.{part}") for part in ("index", "values"))
        if adapter_name in self.unfused_dsee_sparse and index is not None and values is not None:
            check_sparse(index, values, self.unfused_dsee_sparse[adapter_name].shape)
            self.unfused_dsee_waiting[adapter_name] = False

    def regularization_loss(self, name: str) -> torch.Tensor | None:
        if name not in self.unfused_dsee_coefficient or name in self.unfused_dsee_columns:
            return None  # nothing is left to choose
        return self.unfused_dsee_l1[name] * self.unfused_dsee_coefficient[name].abs().sum()

    def adapted(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        if len(names) > 1:
            self.check_together(names)
        if self.training and any(self.unfused_dsee_waiting.get(name) for name in names):
            raise RuntimeError(
                "DSEE's positions are in the adapter file: load it, or start anew with support_saved=False"
            )
        base = self.get_base_layer()
        for name in names:
            if (factor := self._input_factor(name)) is not None:
                x = x * factor.to(x.dtype)
        masks = [self.unfused_dsee_mask[name] for name in names if name in self.unfused_dsee_mask]
        if masks:
            y = masked_linear(x, base.weight, base.bias, masks[0], isinstance(base, Conv1D))
        else:
            y = self.base_layer(x)
        for name in names:
            if name in self.unfused_dsee_up:
                scale, down, up = (
                    self.unfused_dsee_scale[name],
                    self.unfused_dsee_down[name],
                    self.unfused_dsee_up[name],
                )
                y = y + scale * F.linear(F.linear(x.to(down.dtype), down), up).to(y.dtype)
                sparse = self.unfused_dsee_sparse[name]
                y = add_sparse_product(y, x, scale * sparse.values, sparse.index)
            if name in self.unfused_dsee_rows:
                y = y * self.unfused_dsee_rows[name]
        return y

    def merged_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.pruned_weights(name, weight, bias)
        if name in self.unfused_dsee_up:
            delta = self._oriented(self._structured(name, self.update(name)))
            weight = weight + delta.to(weight.dtype)
        return weight, bias

    def pruned_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W * S1, removed rows and columns zero, coefficients multiplied in; and the bias."""
        if name in self.unfused_dsee_mask:
            weight = masked(weight, self.unfused_dsee_mask[name])
        weight = self._oriented(self._structured(name, self._oriented(weight)))
        if bias is not None and name in self.unfused_dsee_rows:
            bias = bias * self.unfused_dsee_rows[name]
        return weight, bias

    def update(self, name: str) -> torch.Tensor:
        """s (U V + S2), (out, in), float32."""
        product = self.unfused_dsee_up[name] @ self.unfused_dsee_down[name]
        return self.unfused_dsee_scale[name] * self.unfused_dsee_sparse[name].add_to(product)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        return self._oriented(self.update(adapter_name))

    def check_together(self, names: Sequence[str]) -> None:
        changed = (MASK, ROWS, COLUMNS, "coefficient")
        for name in names:
            if any(name in getattr(self, f"unfused_dsee_{part}") for part in changed):
                raise ValueError(
                    f"DSEE: the adapter {name!r} is pruned or has coefficients: it cannot be active or merged with others"
                )

    def _oriented(self, matrix: torch.Tensor) -> torch.Tensor:
        """(out, in) <-> the layout of the weight."""
        return matrix.t() if isinstance(self.get_base_layer(), Conv1D) else matrix

    def _structured(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        if (factor := self._input_factor(name)) is not None:
            matrix = matrix * factor.to(matrix.dtype)
        return matrix * self.unfused_dsee_rows[name][:, None] if name in self.unfused_dsee_rows else matrix

    def _input_factor(self, name: str) -> torch.Tensor | None:
        """(in,): coefficients of the inputs, 0 where they are removed."""
        factor = None
        if name in self.unfused_dsee_coefficient:
            factor = self.unfused_dsee_coefficient[name]
            factor = factor.repeat_interleave(linear_shape(self.get_base_layer())[1] // len(factor))
        if name in self.unfused_dsee_columns:
            kept = self.unfused_dsee_columns[name]
            factor = kept.float() if factor is None else factor * kept
        return factor


class DseeModel(TunerModel):
    """Puts `DseeLayer`s into a model."""

    tuner_layer_cls = DseeLayer
    layer_types = (((nn.Linear, Conv1D), DseeLayer),)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.l1 and peft_config.coefficients is None:
            blocks = self.blocks()
            heads = {block.attention_out: attention_heads(self.model, block) for block in blocks}
            neurons = {
                block.mlp_out: linear_shape(module_at(self.model, block.mlp_out))[1] for block in blocks
            }
            peft_config.coefficients = {**heads, **neurons}
        return super()._prepare_adapter_config(peft_config, model_config)

    def default_targets(self, config: Any, model_config: dict) -> set[str]:
        blocks = self.blocks()
        return {name for block in blocks for name in (block.query, block.value, block.fused_qkv) if name}

    def blocks(self) -> list[Block]:
        if not (blocks := transformer_blocks(self.model)):
            kind = type(getattr(self.model, "base_layer", self.model)).__name__
            raise ValueError(
                f"DSEE: {kind} has no transformer blocks that are known here: name target_modules"
            )
        return blocks

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        more = {*(peft_config.pruned or ()), *(peft_config.coefficients or ())}
        return TunerModel._check_target_module_exists(peft_config, key) or key in more

    def make_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        layer: Any = super().make_layer(config, adapter_name, target, key)
        layer.key = key
        return layer

    def extend_layer(self, layer: Any, adapter_name: str, config: Any, key: str) -> None:
        layer.update_layer(adapter_name, config, bool(TunerModel._check_target_module_exists(config, key)))

    def layers_of(self, adapter_name: str) -> dict[str, DseeLayer]:
        return {
            key: module
            for key, module in self.model.named_modules()
            if isinstance(module, DseeLayer) and module.has(adapter_name)
        }

    def _names(self, adapter_names: list[str] | None) -> list[str]:
        names = adapter_names or self.active_adapters
        if len(names) > 1:
            for name in names:
                for layer in self.layers_of(name).values():
                    layer.check_together([name])
        return names

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        super().merge_adapter(self._names(adapter_names), safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        keep_sparse: bool = False,
        remove_heads: bool = False,
    ) -> nn.Module:
        """The model without adapters.

        Parameters
        ----------
        progressbar, safe_merge, adapter_names
            As in PEFT.
        keep_sparse : bool, default=False
            Write `W * S1` into the weights and leave the update as a path of its own
            (`unfused.nn.pruning.SparseLowRankLinear`), so that zeros stay zeros. Otherwise all is summed, and the zeros
            of updated matrices are filled.
        remove_heads : bool, default=False
            Make matrices smaller by the heads and neurons that were removed. A config cannot describe such a model: keep it
            as a whole, or the adapter.
        """
        names = self._names(adapter_names)
        layers = self.layers_of(names[0])
        kept = {key: _kept(layer, names[0]) for key, layer in layers.items()}
        paths: dict[str, dict[str, torch.Tensor]] = {}
        if keep_sparse:
            if len(names) > 1:
                raise ValueError(f"keep_sparse=True takes one adapter, not {names}")
            with torch.no_grad():
                for key, layer in layers.items():
                    layer.unmerge()
                    base: Any = layer.get_base_layer()
                    weight, bias = layer.pruned_weights(
                        names[0], base.weight.data, base.bias if base.bias is None else base.bias.data
                    )
                    layer._set_weights(weight, bias)
                    if names[0] in layer.unfused_dsee_up:
                        paths[key] = _path(layer, names[0])
            model = self.unload()
        else:
            model = super().merge_and_unload(progressbar, safe_merge, names)
        for key, path in paths.items():
            outer, _, inner = key.rpartition(".")
            setattr(model.get_submodule(outer), inner, SparseLowRankLinear(model.get_submodule(key), **path))
        if remove_heads:
            for key, (rows, columns) in kept.items():
                shrink_linear(model.get_submodule(key), rows, columns)
            set_heads(model, kept)
        return model


@dataclass(frozen=True)
class DseeReport:
    """What an adapter prunes, after `dsee_prune`.

    Attributes
    ----------
    pruned, prunable : int
        Weights that are zero now, and all weights of the matrices that are pruned.
    weights : int
        All of the base model's.
    groups : dict of str to tuple of (int, int)
        (pruned, prunable) of "updated" and "other" matrices.
    heads : dict of str to list of int
        Removed heads, by attention module.
    neurons : dict of str to int
        Number of removed FFN neurons, by the FFN's last matrix.
    """

    pruned: int
    prunable: int
    weights: int
    groups: dict[str, tuple[int, int]]
    heads: dict[str, list[int]]
    neurons: dict[str, int]

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of pruned matrices."""
        return self.pruned / max(1, self.prunable)

    @property
    def sparsity_of_all(self) -> float:
        """Share of zeros among all weights of the base model, embeddings and head included."""
        return self.pruned / self.weights


def dsee_prune(
    peft_model: nn.Module,
    amount: float = 0.0,
    score: str = "update",
    other_modules: Sequence[str] | None = None,
    heads: int = 0,
    neurons: float = 0.0,
    seed: int = 0,
    adapter_name: str | None = None,
) -> DseeReport:
    """Prune the weights under a trained adapter; then train on.

    Parameters
    ----------
    peft_model : nn.Module
        With a DSEE adapter.
    amount : float, default=0.0
        Share of the weights to prune, of updated and of other matrices each, whatever layer they are in. What is pruned
        already counts.
    score : {"update", "sum", "low_rank", "weight", "random"}, default="update"
        Of the updated matrices' weights, smallest first: |s (UV + S2)|, |W + s (UV + S2)|, |s UV|, |W|, or by chance. Other
        matrices go by |W| (or by chance).
    other_modules : list of str, optional
        Suffixes of other matrices to prune, inside the blocks; by default keys, attention outputs and FFNs. [] for none.
    heads : int, default=0
        Heads to remove from every layer: those of the smallest coefficients, or the smallest sum of |UV + S2| over the rows
        of query and value.
    neurons : float, default=0.0
        Share of every FFN's neurons to remove, of the smallest coefficients; needs `DseeConfig(l1=...)`.
    seed : int, default=0
        For score="random".
    adapter_name : str, optional
        By default the active one.

    Raises
    ------
    ValueError
        Where nothing is asked for, the adapter is not trained yet but is to score, or heads cannot be told apart.
    """
    tuner = next((m for m in peft_model.modules() if isinstance(m, DseeModel)), None)
    if tuner is None:
        raise ValueError("peft_model has no DSEE adapter: call get_peft_model(model, DseeConfig(...)) first")
    name = adapter_name or tuner.active_adapters[0]
    config: Any = tuner.peft_config[name]
    if score not in SCORES:
        raise ValueError(f"score={score!r}: choose one of {', '.join(SCORES)}")
    if not (0 <= amount < 1 and 0 <= neurons < 1 and heads >= 0 and amount + neurons + heads > 0):
        raise ValueError(
            f"amount={amount}, heads={heads}, neurons={neurons}: ask for something, shares below 1"
        )
    layers = tuner.layers_of(name)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the adapter is merged: call unmerge_adapter() first")
    updated = [key for key, layer in layers.items() if name in layer.unfused_dsee_up]
    if (amount and score in ("update", "low_rank")) or (heads and not config.coefficients):
        if not any(layers[key].unfused_dsee_up[name].any() for key in updated):
            raise ValueError("the update is still zero, so that it cannot score: train the adapter first")
    parts: dict[str, set[str]] = {key: set(found) for key, found in (config.pruned or {}).items()}
    others = _others(tuner, config, other_modules, updated) if amount else []
    for key in (*updated, *others) if amount else ():
        parts.setdefault(key, set()).add(MASK)
    for rows, columns in _structures(tuner, config, name, layers, updated, heads, neurons):
        for key in rows:
            parts.setdefault(key, set()).add(ROWS)
        parts.setdefault(columns, set()).add(COLUMNS)
    config.pruned = {key: sorted(found) for key, found in parts.items()}
    for key, found in parts.items():
        module = tuner.model.get_submodule(key)
        if key in layers:
            layers[key].prune(name, sorted(found))
        else:
            outer, _, inner = key.rpartition(".")
            tuner._create_and_replace(config, name, module, inner, tuner.model.get_submodule(outer), key)
            tuner.model.get_submodule(key).train(module.training)
    layers = tuner.layers_of(name)
    with torch.no_grad():
        if heads:
            _remove_heads(tuner, name, layers, heads)
        if neurons:
            _remove_neurons(tuner, name, layers, neurons)
        if amount:
            _mask(layers, name, updated, amount, score, seed)
            _mask(layers, name, others, amount, "random" if score == "random" else "weight", seed + 1)
    return _report(tuner, name, layers, updated)


def _others(
    tuner: DseeModel, config: Any, suffixes: Sequence[str] | None, updated: Sequence[str]
) -> list[str]:
    blocks = transformer_blocks(tuner.model)
    if suffixes is None:
        fields = ("key", "attention_out", "mlp_in", "mlp_gate", "mlp_out")
        found = [getattr(block, f) for block in blocks for f in fields if getattr(block, f)]
        return [key for key in found if key not in updated]
    outside = {*HEADS, *(config.modules_to_save or ())}
    found = []
    for key, module in tuner.model.named_modules():
        inside = not blocks or any(key.startswith(f"{block.name}.") for block in blocks)
        named = any(key == suffix or key.endswith(f".{suffix}") for suffix in suffixes)
        if inside and named and not outside & set(key.split(".")) and key not in updated:
            if not isinstance(module, nn.Linear | Conv1D | DseeLayer):
                raise ValueError(f"other_modules: {key!r} is a {type(module).__name__}, not Linear or Conv1D")
            found.append(key)
    if suffixes and not found:
        raise ValueError(f"other_modules={list(suffixes)} names no matrix of the blocks")
    return found


def _structures(
    tuner: DseeModel,
    config: Any,
    name: str,
    layers: Mapping[str, DseeLayer],
    updated: Sequence[str],
    heads: int,
    neurons: float,
) -> list[tuple[list[str], str]]:
    """(matrices that lose rows, the matrix that loses columns) of each block."""
    found = []
    if neurons and not config.coefficients:
        raise ValueError(
            f"neurons={neurons}: neurons go by their coefficients, which DseeConfig(l1=...) makes"
        )
    for block in tuner.blocks() if heads or neurons else ():
        if heads:
            sizes = {
                linear_shape(module_at(tuner.model, n))[0] for n in (block.query, block.key, block.value) if n
            }
            if block.fused_qkv or len(sizes) != 1:
                raise ValueError(
                    f"heads={heads}: {block.attention!r} has a fused projection or shares keys among heads; its heads "
                    "cannot be removed one by one"
                )
            left = total = attention_heads(tuner.model, block)
            if block.attention_out in layers:
                left = int(_kept(layers[block.attention_out], name)[1].view(total, -1).any(1).sum())
            if heads >= left:
                raise ValueError(f"heads={heads}: {block.attention!r} has {left}, and one has to stay")
            if not config.coefficients and not {block.query, block.value} & set(updated):
                raise ValueError(f"heads={heads}: neither query nor value of {block.attention!r} is adapted")
            found.append(([block.query, block.key, block.value], block.attention_out))
        if neurons:
            found.append(([n for n in (block.mlp_in, block.mlp_gate) if n], block.mlp_out))
    return found


def _remove_heads(tuner: DseeModel, name: str, layers: Mapping[str, DseeLayer], count: int) -> None:
    for block in tuner.blocks():
        out, total = layers[block.attention_out], attention_heads(tuner.model, block)
        kept = out.unfused_dsee_columns[name]
        if name in out.unfused_dsee_coefficient:
            scores = out.unfused_dsee_coefficient[name].abs()
        else:
            adapted = [n for n in (block.query, block.value) if name in layers[n].unfused_dsee_up]
            sums = [layers[n].update(name).abs().view(total, -1).sum(1) for n in adapted]
            scores = torch.stack(sums).sum(0)  # (heads,)
        scores = scores.masked_fill(~kept.view(total, -1).any(1), torch.inf)
        gone = scores.argsort(stable=True)[:count]
        rows = [layers[n].unfused_dsee_rows[name] for n in (block.query, block.key, block.value)]
        for buffer in (kept, *rows):
            buffer.view(total, -1)[gone] = False


def _remove_neurons(tuner: DseeModel, name: str, layers: Mapping[str, DseeLayer], share: float) -> None:
    for block in tuner.blocks():
        out = layers[block.mlp_out]
        kept = out.unfused_dsee_columns[name]
        scores = out.unfused_dsee_coefficient[name].abs().masked_fill(~kept, -torch.inf)  # gone stays gone
        gone = scores.argsort(stable=True)[: max(int(share * len(scores)), int((~kept).sum()))]
        rows = [layers[n].unfused_dsee_rows[name] for n in (block.mlp_in, block.mlp_gate) if n]
        for buffer in (kept, *rows):
            buffer[gone] = False


def _mask(
    layers: Mapping[str, DseeLayer], name: str, keys: Sequence[str], amount: float, score: str, seed: int
) -> None:
    """Prune the lowest scores of these matrices together."""
    generator = torch.Generator().manual_seed(seed)
    pool, allowed, already = {}, 0, 0
    for key in keys:
        layer = layers[key]
        weight = layer.get_base_layer().weight
        if score == "random":
            value = torch.rand(weight.shape, generator=generator).to(weight.device)
        elif score == "low_rank":
            value = layer._oriented(layer.unfused_dsee_up[name] @ layer.unfused_dsee_down[name]).abs()
        else:
            terms = [weight.float()] if score in ("weight", "sum") else []
            terms += [layer.get_delta_weight(name)] if score in ("update", "sum") else []
            value = torch.stack(terms).sum(0).abs()
        on = unpack_mask(layer.unfused_dsee_mask[name], weight.shape)
        exists = layer._oriented(_existing(layer, name))
        pool[key] = (-value).masked_fill(~on, torch.inf).masked_fill(~exists, -torch.inf)
        allowed += int(exists.sum())
        already += int((exists & ~on).sum())
    if (count := round(amount * allowed)) < already:
        raise ValueError(f"amount={amount}: {already / allowed:.3f} of these weights are pruned already")
    for key, index in select_global(pool, count).items():
        on = torch.ones(layers[key].get_base_layer().weight.shape, dtype=torch.bool, device=index.device)
        on.view(-1)[index] = False
        layers[key].unfused_dsee_mask[name].copy_(pack_mask(on))


def _kept(layer: DseeLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(out,) and (in,): which rows and columns are there."""
    base = layer.get_base_layer()
    sizes, device = linear_shape(base), base.weight.device
    rows, columns = layer.unfused_dsee_rows, layer.unfused_dsee_columns
    return (
        rows[name] if name in rows else torch.ones(sizes[0], dtype=torch.bool, device=device),
        columns[name] if name in columns else torch.ones(sizes[1], dtype=torch.bool, device=device),
    )


def _existing(layer: DseeLayer, name: str) -> torch.Tensor:
    rows, columns = _kept(layer, name)
    return rows[:, None] & columns  # (out, in)


def _report(
    tuner: DseeModel, name: str, layers: Mapping[str, DseeLayer], updated: Sequence[str]
) -> DseeReport:
    groups = {"updated": (0, 0), "other": (0, 0)}
    for key in tuner.peft_config[name].pruned:  # type: ignore[attr-defined]
        layer, group = layers[key], "updated" if key in updated else "other"
        on = layer._oriented(_existing(layer, name))
        if name in layer.unfused_dsee_mask:
            on = on & unpack_mask(layer.unfused_dsee_mask[name], on.shape)
        groups[group] = (groups[group][0] + int((~on).sum()), groups[group][1] + on.numel())
    heads, neurons = {}, {}
    for block in transformer_blocks(tuner.model):
        for key in (block.attention_out, block.mlp_out):
            if key in layers and name in layers[key].unfused_dsee_columns:
                kept = layers[key].unfused_dsee_columns[name]
                if key == block.mlp_out:
                    neurons[key] = int((~kept).sum())
                else:
                    on = kept.view(attention_heads(tuner.model, block), -1).any(1)
                    heads[block.attention] = (~on).nonzero().squeeze(1).tolist()
    weights = sum(
        p.numel()
        for n, p in tuner.model.named_parameters()
        if "unfused_" not in n and ".modules_to_save." not in n
    )
    pruned, prunable = (sum(part) for part in zip(*groups.values(), strict=True))
    return DseeReport(pruned, prunable, weights, groups, heads, neurons)


def _path(layer: DseeLayer, name: str) -> dict[str, torch.Tensor]:
    """The update as `SparseLowRankLinear` takes it: scaled, and without removed rows and columns."""
    sparse, into = layer.unfused_dsee_sparse[name], linear_shape(layer.get_base_layer())[1]
    factor, (rows, _) = layer._input_factor(name), _kept(layer, name)
    factor = torch.ones(into, device=rows.device) if factor is None else factor
    values = sparse.values * rows[sparse.index // into] * factor[sparse.index % into]
    scale = layer.unfused_dsee_scale[name]
    return {
        "up": scale * layer.unfused_dsee_up[name] * rows[:, None],
        "down": layer.unfused_dsee_down[name] * factor,
        "values": scale * values,
        "index": sparse.index.clone(),
    }


register("dsee", DseeConfig, DseeModel)
