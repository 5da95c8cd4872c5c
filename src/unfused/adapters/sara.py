"""SaRA: trains the smallest weights of a network, kept low-rank, and half way only those that are still small.

Weights with `|theta0| < threshold`, one threshold for all tensors, hardly matter to what a pretrained (diffusion) model does.
Their values v are what is trained, in place, with a penalty on the rank of the matrix they form:

    L = L_task + nuclear_weight * || theta * M ||_*        M the trained positions; one matrix, drawn anew each step

At step `reselect_at` those that have grown past the threshold are frozen at what they have learned, and training goes on, with
a fresh optimiser state, on those that have not. The released code starts from |theta0| instead of theta0 and loses the
penalty's gradient in its memory-saving optimiser; here the model starts as the base model, and the penalty reaches v.

Reference: SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation, ICLR 2025,
arXiv:2409.06633.
Needs: labels or unlabelled data, gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from unfused.nn.norms import NORMS
from unfused.nn.peft_register import register
from unfused.nn.sparse_delta import SparseDelta
from unfused.nn.sparse_layer import SparseLayer, SparseModel
from unfused.nn.tuner import HEADS, TunerConfig
from unfused.train.peft import UnfusedPeftCallback

__all__ = ["SaraCallback", "SaraConfig", "SaraModel"]

MIN_ENTRIES = 100
"""Matrices with fewer trained entries are not penalised, as in the paper's code."""


@dataclass
class SaraConfig(TunerConfig):
    """Configuration of SaRA.

    Parameters
    ----------
    target_modules : list of str or str, default="all"
        "all": linear maps, convolutions, embeddings and norms, weights and biases.
    threshold : float, optional
        Weights below it in magnitude are trained. By default 2e-3, the paper's for Stable Diffusion 1.5 (about 50 million
        weights), unless `density` is given.
    density : float, optional
        Share of the targets' entries to train; sets `threshold` accordingly when the adapter is made.
    nuclear_weight : float, default=5e-4
        Of the nuclear norm. One matrix is drawn each step, so that each of n matrices has a weight of `nuclear_weight / n`.
    nuclear_min_dim : int, default=64
        Matrices (a convolution's is out x in * height * width) whose smaller side is not above it are not penalised.
    rank_target : {"value", "delta"}, default="value"
        Whether the penalty is on the values `theta * M` (the paper) or the change `(theta - theta0) * M`.
    reselect_at : float, int or None, default=0.5
        When to select again: a share of the run (below 1) or a step. None never does.

    Notes
    -----
    Larger masks want smaller rates: `SaraConfig.suggest_lr(threshold)`. AdamW's weight decay pulls the trained values to 0,
    not to the pretrained ones; the paper has 1e-2, cosine decay and gradients clipped to 1.

    The loss needs `model.base_model.regularization_loss()`, the schedule `begin_training(total_steps)` once and
    `update_and_allocate(step)` after every step; `RegularizedTrainer` does all of it, `SaraCallback` the latter two.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> net = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2))
    >>> model = get_peft_model(net, SaraConfig(density=0.15, reselect_at=10))
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    >>> for step in range(1, 21):
    ...     loss = model(torch.randn(8, 100)).square().mean() + model.base_model.regularization_loss()
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    ...     for parameter in model.base_model.update_and_allocate(step):
    ...         del optimizer.state[parameter]
    >>> type(model.merge_and_unload()).__name__
    'Sequential'
    """

    target_modules: list[str] | str | None = field(
        default="all", metadata={"help": "Module name suffixes, a regular expression, 'all-linear' or 'all'."}
    )
    threshold: float | None = field(default=None, metadata={"help": "Weights smaller than this are trained."})
    density: float | None = field(default=None, metadata={"help": "Share of weights to train, instead."})
    nuclear_weight: float = field(default=5e-4, metadata={"help": "Weight of the nuclear norm."})
    nuclear_min_dim: int = field(
        default=64, metadata={"help": "Only matrices larger than this are penalised."}
    )
    rank_target: str = field(default="value", metadata={"help": "What is kept low-rank: 'value' or 'delta'."})
    reselect_at: float | None = field(
        default=0.5, metadata={"help": "Share of the run, or step; None: never."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None and self.density is None:
            self.threshold = 2e-3
        self.require(self.threshold is None or self.threshold > 0, f"threshold={self.threshold!r}: above 0")
        self.require(
            self.density is None or 0 < self.density < 1, f"density={self.density!r}: a share in (0, 1)"
        )
        self.require(self.nuclear_weight >= 0, f"nuclear_weight={self.nuclear_weight!r}: at least 0")
        self.require(
            self.rank_target in ("value", "delta"),
            f"rank_target={self.rank_target!r}: choose 'value' or 'delta'",
        )
        at = self.reselect_at
        self.require(
            at is None or (at > 0 and (at < 1 or at == int(at))),
            f"reselect_at={at!r}: a share in (0, 1), a step, or None",
        )

    @staticmethod
    def suggest_lr(threshold: float) -> float:
        """The paper's rule, `1e-3 exp(-350 threshold)`."""
        return 1e-3 * math.exp(-350 * threshold)


class SaraDelta(SparseDelta):
    """The values themselves (not their change), with those that are frozen since the second selection."""

    frozen: torch.Tensor
    reselected: torch.Tensor

    def __init__(self, shape: Sequence[int], index: torch.Tensor) -> None:
        super().__init__(shape, index)
        self.register_buffer("frozen", torch.zeros(len(index), dtype=torch.bool, device=index.device))
        self.register_buffer("reselected", torch.zeros((), dtype=torch.bool, device=index.device))
        self.settled: torch.Tensor | None = None

    def resize_(self, index: torch.Tensor) -> SaraDelta:
        super().resize_(index)
        self.frozen = torch.zeros(len(index), dtype=torch.bool, device=self.frozen.device)
        return self

    def trained(self) -> torch.Tensor:
        """Values; no gradient to frozen ones."""
        return torch.where(self.frozen, self.values.detach(), self.values)

    @torch.no_grad()
    def freeze_grown(self, threshold: float) -> None:
        self.frozen |= self.values.abs() >= threshold
        self.reselected.fill_(True)
        self.settled = self.values.detach().clone()

    @torch.no_grad()
    def hold_frozen(self) -> None:
        """Undo what weight decay, or anything but a gradient, did to frozen values."""
        if self.settled is None:
            self.settled = self.values.detach().clone()
        self.values.copy_(torch.where(self.frozen, self.settled.to(self.values.device), self.values))


class SaraLayer(SparseLayer):
    """A module with trained small weights."""

    adapter_modules = ("unfused_sara_weight", "unfused_sara_bias")
    delta_type = SaraDelta

    def change(self, delta: SparseDelta, original: torch.Tensor) -> torch.Tensor:
        assert isinstance(delta, SaraDelta)
        return delta.trained() - _entries(original, delta)

    def prepare_load(self, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
        super().prepare_load(adapter_name, state)
        for container in self.adapter_modules:
            for part in ("frozen", "reselected"):
                if (found := state.get(f"{container}.{part}")) is not None and found.dtype != torch.bool:
                    raise ValueError(f"{container}.{part} must be of type bool, not {found.dtype}")


class SaraModel(SparseModel):
    """Puts `SaraLayer`s into a model."""

    tuner_layer_cls = SaraLayer
    layer_types = (((nn.Linear, Conv1D, nn.Conv2d, nn.Embedding, *NORMS), SaraLayer),)
    heads = tuple(name for name in HEADS if name != "proj_out")  # in a diffusion model that ends a block

    total_steps: int | None = None

    def choose(self, config: SaraConfig, adapter_name: str) -> None:
        found = self.sparse_deltas(adapter_name)
        if config.threshold is None:
            assert config.density is not None
            magnitudes = torch.cat(
                [original.detach().abs().float().flatten() for _, _, original in found.values()]
            )
            count = round(config.density * len(magnitudes))
            config.threshold = float(magnitudes.kthvalue(min(count + 1, len(magnitudes))).values)
        for _, delta, original in found.values():
            small = original.detach().float().abs().flatten() < config.threshold
            delta.resize_(small.nonzero().squeeze(1))
            if delta.values.device.type != "meta":  # meta: a file's values are about to come
                delta.values.copy_(_entries(original, delta))

    # -- low rank ----------------------------------------------------------------------------------------------------

    def regularization_loss(self) -> torch.Tensor:
        """The nuclear norm of one matrix of each active adapter."""
        loss = super().regularization_loss()
        for name in self.active_adapters:
            config: Any = self.peft_config[name]
            found = [
                (delta, original)
                for _, delta, original in self.sparse_deltas(name).values()
                if delta.values.requires_grad
                and len(delta.index) >= MIN_ENTRIES
                and len(delta.shape) > 1
                and min(_matrix(delta.shape)) > config.nuclear_min_dim
            ]
            if config.nuclear_weight and found:
                delta, original = found[int(torch.randint(len(found), ()))]
                values = delta.trained()
                if config.rank_target == "delta":
                    values = values - _entries(original, delta)
                values = torch.where(delta.frozen, 0.0, values)
                loss = loss + config.nuclear_weight * _nuclear_norm(values, delta)
        return loss

    # -- second selection --------------------------------------------------------------------------------------------

    def begin_training(self, total_steps: int) -> None:
        self.total_steps = total_steps
        for name in self.active_adapters:
            for delta in self._trained(name):
                if delta.reselected:  # loaded from the second half of a run
                    delta.hold_frozen()

    def update_and_allocate(self, global_step: int) -> list[nn.Parameter]:
        restart = []
        for name in self.active_adapters:
            config: Any = self.peft_config[name]
            if (at := config.reselect_at) is None:
                continue
            if at < 1:
                if self.total_steps is None:
                    raise ValueError(
                        f"reselect_at={at}: a share of a run whose length is unknown; call begin_training(total_steps) "
                        "first, or give a step"
                    )
                at = math.ceil(at * self.total_steps)
            for delta in self._trained(name):
                if delta.settled is not None or (global_step >= at and delta.reselected):
                    delta.hold_frozen()
                elif global_step >= at:
                    delta.freeze_grown(config.threshold)
                    restart.append(delta.values)
        return restart

    def _trained(self, adapter_name: str) -> list[SaraDelta]:
        deltas = [delta for _, delta, _ in self.sparse_deltas(adapter_name).values()]
        return [d for d in deltas if isinstance(d, SaraDelta) and d.values.requires_grad]


class SaraCallback(UnfusedPeftCallback):
    """Selects again at its step, inside any `transformers.Trainer`.

    The nuclear norm is not part of it: the loss has to include `regularization_loss()`, as `RegularizedTrainer`'s does.
    """


def _entries(original: torch.Tensor, delta: SparseDelta) -> torch.Tensor:
    return original.detach().reshape(-1).index_select(0, delta.index).to(delta.values.dtype)


@torch.no_grad()
def _direction(values: torch.Tensor, delta: SparseDelta) -> torch.Tensor:
    """Entries of U V^T, the subgradient of the nuclear norm of the matrix that the values form.

    By the eigenvectors of its smaller Gram matrix, three times as fast as an SVD. Directions with less than 1e-3 of the
    largest singular value get none: rounding would decide theirs.
    """
    matrix = (
        values.new_zeros(delta.shape.numel()).index_copy_(0, delta.index, values).view(_matrix(delta.shape))
    )
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    with torch.autocast(values.device.type, enabled=False):
        squares, vectors = torch.linalg.eigh(wide @ wide.t())
        sizes = squares.clamp_min(0).sqrt()
        inverse = torch.where(sizes > 1e-3 * sizes[-1], 1 / sizes, 0.0)
        found = (vectors * inverse) @ (vectors.t() @ wide)
    return (found if wide is matrix else found.t()).reshape(-1).index_select(0, delta.index)


def _nuclear_norm(values: torch.Tensor, delta: SparseDelta) -> torch.Tensor:
    return (values * _direction(values.detach(), delta)).sum()  # <A, U V^T> is the sum of the singular values


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


register("sara", SaraConfig, SaraModel)
