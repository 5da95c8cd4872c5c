"""LT-SFT: sparse fine-tuning on a lottery ticket, whose differences for tasks, languages, domains add up.

Fine-tune everything once, from theta0 to theta1; keep the K entries with the largest `|theta1 - theta0|` of all tensors
together; rewind; fine-tune again, these entries alone, to theta2. What is left is a sparse vector `phi = theta2 - theta0`,
and vectors that were learned apart compose by addition:

    theta = theta0 + phi_language + phi_task

Both phases may be pulled towards theta0 by `l1_weight / N * sum |theta - theta0|`, N all parameters of the model. Embeddings
are included; norms, the head and an output layer tied to the embedding stay frozen or outside.

Reference: Composable Sparse Fine-Tuning for Cross-Lingual Transfer, ACL 2022, arXiv:2110.07560.
Needs: labels or unlabelled data, gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from unfused.nn.peft_register import register
from unfused.nn.select import magnitude_change, select_global, select_random
from unfused.nn.sparse_delta import SparseDelta
from unfused.nn.sparse_layer import SparseLayer, SparseModel, sparse_deltas
from unfused.nn.state_delta import from_state_dict_delta, to_state_dict_delta
from unfused.nn.tuner import TunerConfig, tuner_layers
from unfused.train.one_source import OneSourceBatches, Sources
from unfused.train.peft import RegularizedTrainer

__all__ = [
    "LtSftConfig",
    "LtSftModel",
    "LtSftTrainer",
    "from_state_dict_delta",
    "lottery_ticket_select",
    "to_state_dict_delta",
]

SOURCE = "unfused_source"


@dataclass
class LtSftConfig(TunerConfig):
    """Configuration of LT-SFT.

    Parameters
    ----------
    target_modules : list of str or str, default="all"
        "all": every Linear, Conv1D, Conv2d and Embedding outside the head, weights and biases.
    density : float, default=0.08
        K as a share of all entries of the targets. The paper: 8 % for tasks, 4.3 % for languages.
    num_entries : int, optional
        K itself, instead of `density`.
    l1_weight : float, default=0.0
        Pull towards the pretrained weights; the paper takes 0.1 for languages, 0 for tasks.
    iterations : int, default=1
        Rounds of both phases; each adds K / iterations entries.
    mask : {"random", "bias"}, default="random"
        Which entries are trained until `lottery_ticket_select` has chosen: K random ones, or all biases. Trained without
        the first phase these are the paper's baselines Random-SFT and BitFit-SFT.
    seed : int, default=0
        Of the random mask.

    Notes
    -----
    The first phase is as dear as full fine-tuning: a trained copy of the targets besides the originals, gradients and
    optimiser state for all. To train a task on top of a language, load the language, activate both
    (`model.base_model.set_adapter(["language", "task"])`) and name the task in `LtSftTrainer` or `lottery_ticket_select`.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> bert = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    >>> model = get_peft_model(bert, LtSftConfig(num_entries=100, modules_to_save=["classifier"]))
    >>> def train(model):  # the first phase, by whatever loop
    ...     optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ...     ids = torch.arange(20).view(2, 10)
    ...     model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    ...     optimizer.step()
    >>> sum(lottery_ticket_select(model, train).values())
    100
    """

    target_modules: list[str] | str | None = field(
        default="all", metadata={"help": "Module name suffixes, a regular expression, 'all-linear' or 'all'."}
    )
    density: float = field(default=0.08, metadata={"help": "Share of the targets' entries that are trained."})
    num_entries: int | None = field(default=None, metadata={"help": "Their number, instead of density."})
    l1_weight: float = field(
        default=0.0, metadata={"help": "Weight of the pull towards the pretrained weights."}
    )
    iterations: int = field(default=1, metadata={"help": "Rounds of both phases."})
    mask: str = field(default="random", metadata={"help": "Entries before the choice: 'random' or 'bias'."})
    seed: int = field(default=0, metadata={"help": "Seed of the random mask."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.density <= 1, f"density={self.density!r}: a share in (0, 1]")
        self.require(
            self.num_entries is None or self.num_entries >= 1, f"num_entries={self.num_entries!r}: at least 1"
        )
        self.require(self.l1_weight >= 0, f"l1_weight={self.l1_weight!r}: at least 0")
        self.require(self.iterations >= 1, f"iterations={self.iterations!r}: at least 1")
        self.require(self.mask in ("random", "bias"), f"mask={self.mask!r}: choose 'random' or 'bias'")


class LtSftLayer(SparseLayer):
    """A module with the adapter's entries, and during the first phase with trained copies of its tensors."""

    adapter_modules = ("unfused_composable_sft_weight", "unfused_composable_sft_bias")
    adapter_settings = ("unfused_composable_sft_l1",)

    dense_for = ""
    pretrained: Mapping[str, nn.Parameter] = {}

    def start_dense(self, adapter_name: str) -> None:
        """Put trainable copies in place of weight and bias. Copies, so that a tied output layer is not trained."""
        base = self.get_base_layer()
        self.dense_for = adapter_name
        self.pretrained = dict(base.named_parameters(recurse=False))
        for part, original in self.pretrained.items():
            setattr(base, part, nn.Parameter(original.detach().clone()))

    def end_dense(self) -> None:
        """Put the original parameters back."""
        for part, original in self.pretrained.items():
            setattr(self.get_base_layer(), part, original)
        self.dense_for, self.pretrained = "", {}

    def moved(self, adapter_name: str) -> list[torch.Tensor]:
        """What the adapter trains, as differences from the pretrained tensors; in the first phase the dense ones."""
        if self.dense_for == adapter_name:
            base = self.get_base_layer()
            return [getattr(base, part) - original for part, original in self.pretrained.items()]
        return [] if self.dense_for else [delta.values for _, delta, _ in self.deltas(adapter_name)]

    def regularization_loss(self, name: str) -> torch.Tensor | None:
        scale = self.unfused_composable_sft_l1.get(name, 0.0)
        if not scale or not (moved := [m for m in self.moved(name) if m.requires_grad]):
            return None
        return scale * torch.stack([m.float().abs().sum() for m in moved]).sum()

    def selectable(self, part: str) -> tuple[int, int, int]:
        """Entries of a tensor that may be chosen, and start and size of those that may not: an embedding's padding row."""
        base = self.get_base_layer()
        size = getattr(base, part).numel()
        if part == "bias" or getattr(base, "padding_idx", None) is None:
            return size, 0, 0
        return size - base.embedding_dim, base.padding_idx * base.embedding_dim, base.embedding_dim


class LtSftModel(SparseModel):
    """Puts `LtSftLayer`s into a model."""

    tuner_layer_cls = LtSftLayer
    layer_types = (((nn.Linear, Conv1D, nn.Conv2d, nn.Embedding), LtSftLayer),)

    def choose(self, config: LtSftConfig, adapter_name: str) -> None:
        found = self.sparse_deltas(adapter_name)
        everything = sum(p.numel() for name, p in self.model.named_parameters() if "unfused_" not in name)
        sizes = {}
        for name, (layer, delta, _) in found.items():
            layer.unfused_composable_sft_l1[adapter_name] = config.l1_weight / everything
            if config.mask == "random":
                sizes[name] = layer.selectable(name.rpartition(".")[2])[0]
            elif name.endswith(".bias"):
                delta.resize_(torch.arange(delta.shape.numel()))
        for name, index in select_random(sizes, _budget(config, sizes.values()), config.seed).items():
            layer, delta, _ = found[name]
            _, start, excluded = layer.selectable(name.rpartition(".")[2])
            delta.resize_(index + excluded * (index >= start))


def lottery_ticket_select(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    adapter_name: str | None = None,
    iteration: int = 0,
) -> dict[str, int]:
    """The first phase: train everything, keep the positions that moved most, rewind.

    Parameters
    ----------
    model : PeftModel, or a transformers model with an adapter
        The targets' weights and biases, and whatever else is trainable (the head), are trained, on top of all active
        adapters; afterwards all of it is exactly what it was.
    train : callable
        Called with the model; trains every parameter that requires a gradient, with an optimiser of its own.
    adapter_name : str, optional
        Whose positions are chosen; may be left out where one adapter is active. Only this one is trainable afterwards.
    iteration : int, default=0
        Round of the iterated form. The first chooses in place of the positions that were there; later ones add to them.

    Returns
    -------
    dict of str to int
        How many positions were chosen in each tensor.
    """
    adapter_name = _one_active(model, adapter_name)
    configs: Any = model.peft_config
    found = sparse_deltas(model, adapter_name)
    config = configs[adapter_name]
    budget = _budget(
        config, [layer.selectable(name.rpartition(".")[2])[0] for name, (layer, _, _) in found.items()]
    )
    count = budget * (iteration + 1) // config.iterations - budget * iteration // config.iterations
    if iteration == 0:
        for _, delta, _ in found.values():
            delta.resize_(delta.index[:0])
    with _rewound(model), _dense(model, adapter_name):
        train(model)
        scores = {
            name: _score(layer, name.rpartition(".")[2], delta) for name, (layer, delta, _) in found.items()
        }
    chosen = select_global(scores, count)
    for name, (_, delta, _) in found.items():
        delta.resize_(torch.cat([delta.index, chosen[name].to(delta.index.device)]).sort().values)
    return {name: len(index) for name, index in chosen.items()}


class LtSftTrainer(RegularizedTrainer):
    """A `Trainer` whose `train()` runs both phases, each with an optimiser and a schedule of its own.

    Parameters
    ----------
    *args, **kwargs
        Of `transformers.Trainer`. A `train_dataset` that is a dict {adapter name: dataset} is multi-source training: each
        batch comes from one source and runs under the sum of that source's vector, frozen, and the trained one.
    adapter_name : str, optional
        The adapter to train; may be left out where one is active. Other active ones are added and stay frozen.
    dense_epochs, sparse_epochs : float, optional
        Lengths of the phases; by default `num_train_epochs` or `max_steps` of the arguments, for each.

    Notes
    -----
    Saving and `load_best_model_at_end` are of the second phase; the first ends with its last weights.
    `resume_from_checkpoint` goes on with the second phase, at the checkpoint's positions.
    """

    def __init__(
        self,
        model: Any,
        *args: Any,
        train_dataset: Any = None,
        adapter_name: str | None = None,
        dense_epochs: float | None = None,
        sparse_epochs: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.sources = list(train_dataset) if isinstance(train_dataset, Mapping) else []
        if self.sources:
            train_dataset = Sources(list(train_dataset.values()))
        super().__init__(model, *args, train_dataset=train_dataset, **kwargs)
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError("optimizers: each phase makes its own; pass optimizer_cls_and_kwargs instead")
        self.dense_epochs, self.sparse_epochs = dense_epochs, sparse_epochs
        self.adapter_name = _one_active(model, adapter_name)
        if unknown := [name for name in self.sources if name not in model.peft_config]:
            raise ValueError(
                f"train_dataset: {unknown[0]!r} is no adapter of the model; load the source's vector first"
            )

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        model: Any = self.model
        if resume_from_checkpoint:
            return self._phase(
                self.sparse_epochs, {}, resume_from_checkpoint=resume_from_checkpoint, **kwargs
            )
        quiet = {"save_strategy": "no", "load_best_model_at_end": False}
        output = None
        for iteration in range(model.peft_config[self.adapter_name].iterations):
            lottery_ticket_select(
                model, lambda _: self._phase(self.dense_epochs, quiet, **kwargs), self.adapter_name, iteration
            )
            output = self._phase(self.sparse_epochs, {}, **kwargs)
        return output

    def _phase(self, epochs: float | None, settings: dict[str, Any], **kwargs: Any) -> Any:
        if epochs is not None:
            settings = {**settings, "num_train_epochs": epochs, "max_steps": -1}
        before = {name: getattr(self.args, name) for name in settings}
        self.optimizer = self.lr_scheduler = None  # no momentum of one phase moves the other's weights
        self.model_wrapped = self.model  # type: ignore[assignment]
        try:
            for name, value in settings.items():
                object.__setattr__(self.args, name, value)
            return super().train(**kwargs)
        finally:
            for name, value in before.items():
                object.__setattr__(self.args, name, value)

    # -- several sources ---------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if not self.sources:
            return super().get_train_dataloader()
        data: Any = self.train_dataset
        collate = self.data_collator
        loader = DataLoader(
            data,
            batch_sampler=OneSourceBatches(data.sizes, self._train_batch_size, self.args.seed),
            collate_fn=lambda rows: {**collate([row for row, _ in rows]), SOURCE: torch.tensor([rows[0][1]])},
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        source = inputs.pop(SOURCE, None)
        if source is None:
            return super().training_step(model, inputs, *args, **kwargs)
        layers = [layer for layer in tuner_layers(model) if isinstance(layer, LtSftLayer)]
        before = [layer._active_adapter for layer in layers]
        try:
            for layer in layers:  # which vectors are added; what is trainable stays
                layer._active_adapter = [self.sources[int(source)], self.adapter_name]
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            for layer, active in zip(layers, before, strict=True):
                layer._active_adapter = active


# -- helpers ---------------------------------------------------------------------------------------------------------


def _one_active(model: nn.Module, adapter_name: str | None) -> str:
    layer = next((layer for layer in tuner_layers(model) if isinstance(layer, LtSftLayer)), None)
    if layer is None:
        raise ValueError("the model has no LT-SFT adapter: add one with LtSftConfig")
    active = list(layer.active_adapters)
    if adapter_name is None and len(active) != 1:
        raise ValueError(
            f"adapter_name is not given, and {len(active)} adapters are active: {', '.join(active)}"
        )
    if adapter_name is not None and adapter_name not in active:
        raise ValueError(
            f"adapter_name={adapter_name!r}: not active; active are {', '.join(active) or 'none'}"
        )
    return adapter_name or active[0]


def _budget(config: LtSftConfig, sizes: Iterable[int]) -> int:
    total = sum(sizes)
    return min(config.num_entries or max(1, round(config.density * total)), total)


def _score(layer: LtSftLayer, part: str, delta: SparseDelta) -> torch.Tensor:
    trained = getattr(layer.get_base_layer(), part)
    score = magnitude_change(trained, layer.pretrained[part]).flatten()
    _, start, excluded = layer.selectable(part)
    score[start : start + excluded] = -torch.inf
    score[delta.index] = -torch.inf  # chosen in an earlier round
    return score


@contextmanager
def _rewound(model: nn.Module) -> Iterator[None]:
    """Trainable parameters and the model's own buffers are the same afterwards as before."""
    tensors: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
    tensors += [b for name, b in model.named_buffers() if "unfused_" not in name]
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


@contextmanager
def _dense(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """All targets of the adapter are trainable copies, and no sparse values are trained."""
    layers = [layer for layer in tuner_layers(model) if isinstance(layer, LtSftLayer)]
    values = [
        delta.values
        for layer in layers
        for name in layer.active_adapters
        for _, delta, _ in layer.deltas(name)
    ]
    targets = [layer for layer in layers if layer.has(adapter_name)]
    for value in values:
        value.requires_grad_(False)
    try:
        for layer in targets:
            layer.start_dense(adapter_name)
        yield
    finally:
        for layer in targets:
            layer.end_dense()
            for _, delta, _ in layer.deltas(adapter_name):
                delta.values.requires_grad_(True)


register("composable_sft", LtSftConfig, LtSftModel)
