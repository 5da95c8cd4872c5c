"""SPT: measures which weights this task needs most, and spends a budget of trained numbers there.

First a plan, from a few batches. The squared gradient of the loss, summed over batches, scores every weight of the chosen
matrices, their biases and the norms (one gradient step changes the loss by about the square). The T best entries of all are
spread over the tensors unevenly, c_k to tensor k:

    matrix   c_k >= P_k / alpha: a LoRA pair or an adapter of P_k numbers instead;   else its c_k entries themselves
    vector   c_k >= length / beta: all of it;                                        else its c_k entries

What that costs grows with T; the T whose cost comes closest to the budget is taken (class token included, head not).
Then the plan is trained: `y = (W + sparse) x + up(down(x))`, or, for the adapter, `z + up(GELU(down(z)))` on z = W x + b.
All but the adapter folds into the weights.

Entries of norms that are not tuned whole are trained too; the paper's code counts them and leaves them out. The sweep over T
is ten times finer than the paper's, since it costs nothing.

Reference: Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning, ICCV 2023, arXiv:2303.08566.
Needs: labels, gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge, check_target_module_exists
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from unfused.nn.blocks import linear_shape, transformer_blocks
from unfused.nn.norms import NORMS
from unfused.nn.peft_register import register
from unfused.nn.select import squared_gradients
from unfused.nn.sparse_delta import SparseDelta
from unfused.nn.sparse_layer import SparseLayer
from unfused.nn.towers import CLASS_TOKENS, find_tower
from unfused.nn.tuner import HEADS, TunerConfig, TunerLayer, TunerModel

__all__ = ["SptConfig", "SptModel", "SptPlan", "allocate_spt"]

MATRICES = ("query", "key", "value", "fused_qkv", "attention_out", "mlp_in", "mlp_gate", "mlp_out")
STEPS_TO_BUDGET, MOST = 500, 4  # the sweep: T in steps of budget / 500, up to 4 budgets


@dataclass
class SptConfig(TunerConfig):
    """Configuration of SPT. `allocate_spt` has to fill in the plan before `get_peft_model`.

    Parameters
    ----------
    target_modules : list of str or str, optional
        The matrices to choose from; by default all of every block. A fused query-key-value projection counts as one.
    budget : int, default=400_000
        Numbers to train, without the head.
    r : int, default=8
        Rank of the LoRA pairs, width of the adapters.
    structured : {"lora", "adapter"}, default="lora"
        "lora" runs beside its matrix and can be merged, "adapter" after it and cannot.
    structured_ratio : float, default=10.0
        alpha: how much easier than by count (1, the paper's text) a matrix gets a module. 0: never.
    vector_ratio : float, default=5.0
        beta: the same for vectors that are tuned whole. 0: never.
    dropout, drop_path : float, default=0.1
        Of the input of a LoRA pair, and of whole samples in what a module adds.
    allocation : dict, optional
        Filled in: module name -> `{"structured": bool, "weight": entries, "bias": entries}` or `{"token": count}`.
    positions : dict of str to int64 tensor, optional
        Filled in: which entries. Not saved with the config but with the weights.

    Notes
    -----
    The paper: AdamW at 1e-3 with decay 1e-4, batch 64, 100 epochs, cosine with warm-up; the budget chosen among 0.05 M to
    1 M (for ViT-B) by validation.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes))
    >>> batch = {"pixel_values": torch.randn(4, 1, 8, 8), "labels": torch.tensor([0, 1, 1, 0])}
    >>> config = SptConfig(budget=300, r=2, modules_to_save=["classifier"])
    >>> plan = allocate_spt(vit, config, [batch])
    >>> model = get_peft_model(vit, config)
    >>> plan.cost == sum(p.numel() for n, p in model.named_parameters() if "unfused_spt" in n)
    True
    >>> type(model.merge_and_unload()).__name__
    'ViTForImageClassification'
    """

    budget: int = field(default=400_000, metadata={"help": "Numbers to train, without the head."})
    r: int = field(default=8, metadata={"help": "Rank of LoRA pairs, width of adapters."})
    structured: str = field(default="lora", metadata={"help": "'lora' or 'adapter'."})
    structured_ratio: float = field(default=10.0, metadata={"help": "alpha; 0: no modules."})
    vector_ratio: float = field(default=5.0, metadata={"help": "beta; 0: no vector is tuned whole."})
    dropout: float = field(default=0.1, metadata={"help": "Of the input of a LoRA pair or adapter."})
    drop_path: float = field(default=0.1, metadata={"help": "Of whole samples in what a module adds."})
    allocation: dict[str, dict[str, int]] | None = field(
        default=None, metadata={"help": "The plan; allocate_spt fills it in."}
    )
    positions: dict[str, torch.Tensor] | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={"help": "The plan's entries; not saved here but with the weights."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.budget >= 1, f"budget={self.budget}: at least 1 is needed")
        self.require(self.r >= 1, f"r={self.r}: at least 1 is needed")
        self.require(
            self.structured in ("lora", "adapter"),
            f"structured={self.structured!r}: choose 'lora' or 'adapter'",
        )
        for name in ("structured_ratio", "vector_ratio"):
            self.require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: 0 or more is needed")
        for name in ("dropout", "drop_path"):
            self.require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)}: give 0 to less than 1")

    def to_dict(self) -> dict[str, Any]:
        positions, self.positions = self.positions, None
        try:
            return super().to_dict()
        finally:
            self.positions = positions


@dataclass(frozen=True)
class SptPlan:
    """Where the budget goes.

    Attributes
    ----------
    budget, cost : int
        Asked for, and what the plan trains.
    entries : int
        T, the number of best entries that it was made from.
    modules : dict of str to dict
        As in `SptConfig.allocation`.
    costs : dict of str to dict of str to int
        The numbers trained in each module, by part: "structured", "weight", "bias", "token".
    sweep : tuple of (int, int)
        Every T that was tried, and its cost.
    """

    budget: int
    cost: int
    entries: int
    modules: dict[str, dict[str, int]]
    costs: dict[str, dict[str, int]]
    sweep: tuple[tuple[int, int], ...] = field(repr=False, default=())

    def summary(self) -> str:
        """A line per module: what it trains and how many numbers that is."""
        wide = max(map(len, self.costs), default=6)
        lines = [f"{'module':{wide}} {'structured':>10} {'direct':>8} {'bias':>6} {'token':>6}"]
        columns = {"structured": 10, "weight": 8, "bias": 6, "token": 6}
        for name, parts in self.costs.items():
            cells = (f"{parts.get(part, 0) or '':>{width}}" for part, width in columns.items())
            lines.append(f"{name:{wide}} {' '.join(cells)}".rstrip())
        lines.append(f"{self.cost:,} of {self.budget:,} numbers, from the best {self.entries:,} entries")
        return "\n".join(lines)


class SptLayer(SparseLayer):
    """A linear map or norm with up to three parts: entries of the weight, entries of the bias, a low-rank module or adapter."""

    adapter_modules = ("unfused_spt_weight", "unfused_spt_bias")
    adapter_parameters = (
        "unfused_spt_down",
        "unfused_spt_up",
        "unfused_spt_down_bias",
        "unfused_spt_up_bias",
    )
    adapter_settings = ("unfused_spt_options", "unfused_spt_waiting")
    key = ""

    def update_layer(self, adapter_name: str, config: SptConfig) -> None:
        parts, device = config.allocation[self.key], self.originals()[0].device  # type: ignore[index]
        for part, container, tensor in zip(
            ("weight", "bias"), self.adapter_modules, self.originals(), strict=True
        ):
            if count := parts.get(part):
                if tensor is None or count > tensor.numel():
                    raise ValueError(f"SptConfig: allocation[{self.key!r}] does not fit this model")
                index = (config.positions or {}).get(f"{self.key}.{part}")
                index = torch.arange(count) if index is None else index
                getattr(self, container)[adapter_name] = SparseDelta(tensor.shape, index.to(device))
        self.unfused_spt_waiting[adapter_name] = config.positions is None
        self.unfused_spt_options[adapter_name] = (config.dropout, config.drop_path)
        if parts.get("structured"):
            out, into = linear_shape(self.get_base_layer())
            lora = config.structured == "lora"
            down = torch.empty(config.r, into if lora else out)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.unfused_spt_down[adapter_name] = nn.Parameter(down)  # (r, in), or (r, out)
            self.unfused_spt_up[adapter_name] = nn.Parameter(torch.zeros(out, config.r))
            if not lora:
                self.unfused_spt_down_bias[adapter_name] = nn.Parameter(torch.zeros(config.r))
                self.unfused_spt_up_bias[adapter_name] = nn.Parameter(torch.zeros(out))

    def prepare_load(self, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
        super().prepare_load(adapter_name, state)
        self.unfused_spt_waiting[adapter_name] = False

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.training and any(self.unfused_spt_waiting[name] for name in names):
            raise RuntimeError(
                "SPT does not know which entries to train: call allocate_spt(model, config, dataloader) on the config that "
                "get_peft_model takes"
            )
        y = super().adapted(names, *args, **kwargs)
        for name in names:
            if name in self.unfused_spt_down:
                down, up = self.unfused_spt_down[name], self.unfused_spt_up[name]
                dropout, drop_path = self.unfused_spt_options[name]
                if name in self.unfused_spt_down_bias:
                    z = F.dropout(y.to(down.dtype), dropout, self.training)
                    hidden = F.gelu(F.linear(z, down, self.unfused_spt_down_bias[name]))
                    change = F.linear(hidden, up, self.unfused_spt_up_bias[name])
                else:
                    x = F.dropout(args[0].to(down.dtype), dropout, self.training)
                    change = F.linear(F.linear(x, down), up)
                if self.training and drop_path:
                    keep = change.new_empty(len(change), *(1,) * (change.ndim - 1)).bernoulli_(1 - drop_path)
                    change = change * keep / (1 - drop_path)
                y = y + change.to(y.dtype)
        return y

    def merged_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = super().merged_weights(name, weight, bias)
        if name in self.unfused_spt_down:
            product = self.unfused_spt_up[name] @ self.unfused_spt_down[name]
            product = product.t() if isinstance(self.get_base_layer(), Conv1D) else product
            weight = weight + product.to(weight.dtype)
        return weight, bias

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # biases and norms change too


class SptTokenLayer(TunerLayer):
    """The module that holds the class tokens, with a change of these."""

    adapter_parameters = ("unfused_spt_token",)
    key = ""

    def update_layer(self, adapter_name: str, config: SptConfig) -> None:
        tokens = self._tokens()
        width = next(iter(tokens.values())).shape[-1]
        self.unfused_spt_token[adapter_name] = nn.Parameter(torch.zeros(len(tokens), width))

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        return functional_call(self.base_layer, self._changed(names), args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        if not names:
            return
        changed = self._changed(names)
        if safe_merge and not all(value.isfinite().all() for value in changed.values()):
            raise ValueError(
                f"NaNs detected in the merged class token. The adapter {names[0]} seems to be broken"
            )
        tokens = self._tokens()
        self._originals = self.__dict__.get("_originals") or {name: p.data for name, p in tokens.items()}
        for name, value in changed.items():
            tokens[name].data = value.detach()
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        for name, value in (self.__dict__.pop("_originals", None) or {}).items():
            self._tokens()[name].data = value
        self.merged_adapters.clear()

    def _tokens(self) -> dict[str, nn.Parameter]:
        base = self.get_base_layer()
        return {name: getattr(base, name) for name in CLASS_TOKENS if hasattr(base, name)}

    def _changed(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        change = torch.stack([self.unfused_spt_token[name] for name in names]).sum(0)  # (tokens, width)
        return {
            name: token + row.view_as(token).to(token.dtype)
            for (name, token), row in zip(self._tokens().items(), change, strict=True)
        }

    def __getattr__(self, name: str) -> Any:
        """Also what the embeddings have: models ask them for their parts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class SptModel(TunerModel):
    """Puts the layers of a plan into a model."""

    tuner_layer_cls = TunerLayer
    layer_types = (((nn.Linear, Conv1D, *NORMS), SptLayer),)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if not peft_config.allocation:
            raise ValueError(
                "SptConfig: there is no plan yet: call allocate_spt(model, config, dataloader) before get_peft_model"
            )
        names = {name for name, _ in self.model.named_modules()}
        if unknown := [name for name in peft_config.allocation if name not in names]:
            raise ValueError(
                f"SptConfig: the plan is for another model: it has {unknown[0]!r}, this one has not"
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def default_targets(self, config: Any, model_config: dict) -> set[str]:
        return set(config.allocation)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.allocation

    def make_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        layer: Any = (
            SptTokenLayer(target, adapter_name)
            if "token" in config.allocation[key]
            else super().make_layer(config, adapter_name, target, key)
        )
        layer.key = key
        return layer

    def _check_merge_allowed(self) -> None:
        for name, config in self.peft_config.items():
            if config.structured == "adapter" and any(  # type: ignore[attr-defined]
                parts.get("structured")
                for parts in config.allocation.values()  # type: ignore[attr-defined]
            ):
                raise ValueError(
                    f"SPT cannot be merged: the adapter {name!r} has modules with a nonlinearity; structured='lora' has none"
                )
        super()._check_merge_allowed()


def allocate_spt(
    model: nn.Module,
    config: SptConfig,
    dataloader: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    num_batches: int = 16,
    grad_square: str = "batch",
    warmup_head_steps: int = 0,
    scores: Mapping[str, torch.Tensor] | None = None,
) -> SptPlan:
    """Measure sensitivities and fill in `config.allocation` and `config.positions`. The model stays as it was.

    With several processes, give all of them the same batches, or load the plan of one.

    Parameters
    ----------
    model : nn.Module
        The pretrained model with its new head.
    config : SptConfig
        Modules in its `modules_to_save`, and what is usually called a head, are left out.
    dataloader : iterable of dict
        Labelled batches; of 32 in the paper. Not needed with `scores`.
    loss_fn : callable, optional
        `loss_fn(model, batch)`; by default `model(**batch).loss`.
    num_batches : int, default=16
        How many to use at most.
    grad_square : {"batch", "sample"}, default="batch"
        Sum the squares of the gradients of batch means (the paper's) or of single samples (the Fisher information).
    warmup_head_steps : int, default=0
        Train the head alone for so many steps of AdamW at 1e-3 first, on the same batches; afterwards it is what it was.
        The paper measures under a random head, whose weights scale all scores.
    scores : dict of str to tensor, optional
        Another ranking of the entries, by parameter name, in place of the measurement.

    Returns
    -------
    SptPlan
    """
    if grad_square not in ("batch", "sample"):
        raise ValueError(f"grad_square={grad_square!r}: choose 'batch' or 'sample'")
    candidates = _candidates(model, config)
    if scores is None:
        batches = list(islice(dataloader or (), num_batches))
        if not batches:
            raise ValueError("dataloader gives no batch")
        device = next(model.parameters()).device
        batches = [{k: v.to(device) if hasattr(v, "to") else v for k, v in b.items()} for b in batches]
        loss_fn = loss_fn or (lambda m, b: m(**b).loss)
        with torch.enable_grad():
            scores = _sensitivity(
                model, config, candidates, batches, loss_fn, grad_square == "sample", warmup_head_steps
            )
    elif missing := [
        name for name, p in candidates.items() if name not in scores or scores[name].shape != p.shape
    ]:
        raise ValueError(f"scores has no tensor of the right shape for {missing[0]!r}")
    return _plan(model, config, {name: scores[name] for name in candidates})


def _head(name: str, config: SptConfig) -> bool:
    return bool({*HEADS, *(config.modules_to_save or ())} & set(name.split(".")))


def _candidates(model: nn.Module, config: SptConfig) -> dict[str, nn.Parameter]:
    """Weights and biases of the matrices, then of the norms."""
    if config.target_modules is None:
        names = {getattr(block, part) for block in transformer_blocks(model) for part in MATRICES} - {""}
        matrices = [name for name, _ in model.named_modules() if name in names]
    else:
        matrices = [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]
    matrices = [name for name in matrices if name and not _head(name, config)]
    if not matrices:
        raise ValueError(
            f"SptConfig: target_modules={config.target_modules} names no matrix of this {type(model).__name__}"
        )
    for name in matrices:
        if not isinstance(model.get_submodule(name), nn.Linear | Conv1D):
            kind = type(model.get_submodule(name)).__name__
            raise ValueError(
                f"target_modules: {name!r} is a {kind}; SptConfig chooses from Linear and Conv1D"
            )
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, NORMS) and not _head(name, config)
    ]
    return {
        f"{name}.{part}": parameter
        for name in (*matrices, *norms)
        for part in ("weight", "bias")
        if (parameter := getattr(model.get_submodule(name), part, None)) is not None
    }


def _sensitivity(
    model: nn.Module,
    config: SptConfig,
    candidates: Mapping[str, nn.Parameter],
    batches: Sequence[dict[str, Any]],
    loss_fn: Callable,
    by_sample: bool,
    warmup_steps: int,
) -> dict[str, torch.Tensor]:
    head = [p for name, p in model.named_parameters() if _head(name, config)]
    before = [p.detach().clone() for p in head]
    required = {p: p.requires_grad for p in model.parameters()}
    training = {module: module.training for module in model.modules()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}  # running statistics
    try:
        model.train()
        if warmup_steps and head:
            for p in model.parameters():
                p.requires_grad_(False)
            optimizer = torch.optim.AdamW([p.requires_grad_(True) for p in head], lr=1e-3)
            for batch in islice(cycle(batches), warmup_steps):
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
            optimizer.zero_grad()
        for p in candidates.values():
            p.requires_grad_(True)
        pieces = _samples(batches) if by_sample else iter(batches)
        return squared_gradients(candidates, (loss_fn(model, piece) for piece in pieces))
    finally:
        for p, was in required.items():
            p.requires_grad_(was)
        for module, was in training.items():
            module.training = was
        with torch.no_grad():
            for p, value in zip(head, before, strict=True):
                p.copy_(value)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _samples(batches: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        size = max(len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim)
        for i in range(size):
            yield {
                k: v[i : i + 1] if isinstance(v, torch.Tensor) and v.ndim and len(v) == size else v
                for k, v in batch.items()
            }


def _plan(model: nn.Module, config: SptConfig, scores: dict[str, torch.Tensor]) -> SptPlan:
    tower = find_tower(model)
    tokens = 0 if tower is None else tower.class_tokens
    token_cost = tokens and tokens * _width(model.get_submodule(tower.embeddings))  # type: ignore[union-attr]
    names, lengths = list(scores), np.array([score.numel() for score in scores.values()])
    structured_cost = np.array([_structured_cost(model, config, name) for name in names])  # inf for vectors
    with np.errstate(divide="ignore"):
        easy = structured_cost / np.float64(config.structured_ratio)
        whole = np.where(np.isinf(structured_cost), lengths / np.float64(config.vector_ratio), np.inf)

    def spend(counts: np.ndarray) -> np.ndarray:  # (..., tensors) -> numbers trained in each
        spent = np.where(counts >= whole, lengths, counts)
        return np.where(counts >= easy, structured_cost, spent)

    step = max(1, config.budget // STEPS_TO_BUDGET)
    most = min(MOST * config.budget, int(lengths.sum()))
    flat = torch.cat([score.detach().reshape(-1).float() for score in scores.values()])
    if flat.isnan().any():
        raise ValueError("scores hold NaN: the loss of a batch is not finite")
    best = flat.topk(most).indices.cpu().numpy()  # descending
    ends = lengths.cumsum()
    tensor = np.searchsorted(ends, best, side="right")  # which tensor an entry is of
    tried = np.minimum(np.arange(1, -(-most // step) + 1) * step, most)  # T
    counts = np.zeros((len(tried), len(names)), dtype=np.int64)
    np.add.at(counts, (np.arange(most) // step, tensor), 1)
    counts = counts.cumsum(0)
    totals = spend(counts).sum(1) + token_cost
    chosen = int(np.abs(totals - config.budget).argmin())

    count, top = counts[chosen], int(tried[chosen])
    allocation: dict[str, dict[str, int]] = {}
    costs: dict[str, dict[str, int]] = {}
    positions: dict[str, torch.Tensor] = {}
    for k, name in enumerate(names):
        if not count[k]:
            continue
        module, _, part = name.rpartition(".")
        parts, cost = allocation.setdefault(module, {}), costs.setdefault(module, {})
        if count[k] >= easy[k]:
            parts["structured"], cost["structured"] = True, int(structured_cost[k])
            continue
        mine = np.sort(best[:top][tensor[:top] == k]) - (ends[k] - lengths[k])
        mine = np.arange(lengths[k]) if count[k] >= whole[k] else mine
        parts[part] = cost[part] = len(mine)
        positions[name] = torch.from_numpy(mine)
    if tower is not None:
        allocation[tower.embeddings], costs[tower.embeddings] = {"token": tokens}, {"token": token_cost}
    config.allocation, config.positions = allocation, positions
    sweep = tuple((int(t), int(c)) for t, c in zip(tried, totals, strict=True))
    return SptPlan(config.budget, int(totals[chosen]), top, allocation, costs, sweep)


def _structured_cost(model: nn.Module, config: SptConfig, name: str) -> float:
    module = model.get_submodule(name.rpartition(".")[0])
    if name.endswith(".bias") or isinstance(module, NORMS):
        return np.inf
    out, into = linear_shape(module)
    return config.r * (into + out) if config.structured == "lora" else 2 * config.r * out + config.r + out


def _width(embeddings: nn.Module) -> int:
    return next(getattr(embeddings, name) for name in CLASS_TOKENS if hasattr(embeddings, name)).shape[-1]


register("spt", SptConfig, SptModel)
