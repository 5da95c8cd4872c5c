"""aTLAS: a new task, or several, from a library of task vectors by learning how much of each tensor of each to add.

Of fine-tunings theta_i of one base theta_0, the task vectors are `tau_i = theta_i - theta_0`. Every tensor j (weight, bias,
class token) has a coefficient for each of them, 0 at first, and only these few hundred numbers are trained:

    theta[j] = theta_0[j] + sum_i lambda[i, j] tau_i[j],     d L / d lambda[i, j] = < d L / d theta[j], tau_i[j] >

- *Few-shot* (`learn_few_shot`): cross-entropy on 1-16 samples a class; then, on fixed features, `fit_tip` or `fit_lp_plus`.
- *Addition* (`learn_addition`): the sum of the tasks' cross-entropies on validation data; one model for all.
- *Negation* (`learn_negation`): forget a task, keep 95 % of a control set.
- *Test-time adaptation* (`learn_unlabelled`): unsupervised FixMatch with trusted samples, no labels.
- *aTLAS x K* (`TaskVectorModel(partitions=K)`): K random groups of the entries of each matrix, a coefficient each; a
  parameter-efficient fine-tuning. With random vectors it would be a random subspace.
- *LoRA* (`lora_task_vector`): vectors kept as factors. *Budget* (`select_blocks`): the b vectors of a tensor with the largest
  gradients. *Linearised*, *penalty* and a search without gradients: options.

`save_coefficients` and `load_coefficients` keep the numbers with hashes of the base, `scale_task_vectors` and the engine merge
with them tensor by tensor. The paper's script for test-time adaptation trusts every sample by mistake and chooses its epoch by
labels; here the described method runs, its last epoch is kept, and fixed pseudo-labels are an objective of their own.

Reference: Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, NeurIPS 2024, arXiv:2407.02880.
Needs: checkpoints, few labels or unlabelled data, gradients.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unfused.data.files import atomic_write
from unfused.merge._atlas_heads import fit_lp_plus, fit_tip
from unfused.merge._atlas_model import (
    TaskVectorModel,
    groups_of,
    lora_task_vector,
    select_blocks,
    task_vectors,
)
from unfused.merge._atlas_training import (
    LearnedScaling,
    crop_and_flip,
    learn_addition,
    learn_few_shot,
    learn_negation,
    learn_unlabelled,
    normalized_accuracy,
    search_without_gradients,
    trusted_samples,
)
from unfused.merge._compose import LowRank, Weights, tensor_hash, weights_of
from unfused.merge._method import merge_method, weighing

__all__ = [
    "LearnedScaling",
    "ScalingCoefficients",
    "TaskVectorModel",
    "crop_and_flip",
    "fit_lp_plus",
    "fit_tip",
    "learn_addition",
    "learn_few_shot",
    "learn_negation",
    "learn_unlabelled",
    "load_coefficients",
    "lora_task_vector",
    "normalized_accuracy",
    "save_coefficients",
    "scale_task_vectors",
    "search_without_gradients",
    "select_blocks",
    "trusted_samples",
]


@merge_method("anisotropic", base="required")
def anisotropic(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    *,
    coefficients: float | Sequence[float] | Tensor = 0.0,
    seed: int = 0,
) -> Tensor:
    """Base plus task vectors with a coefficient each, or one for each of K random groups of a matrix's entries.

    Parameters
    ----------
    base : Tensor
    deltas : sequence of n Tensors
    coefficients : float, n floats, or n rows of K (or n K floats, vector by vector), default=0.0
        0 gives the base.
    seed : int, default=0
        Of the groups.

    Examples
    --------
    >>> anisotropic(torch.zeros(2), [torch.ones(2), torch.tensor([0.0, 1.0])], coefficients=[0.5, 2.0])
    tensor([0.5000, 2.5000])
    """
    assert base is not None
    n = len(deltas)
    try:
        values = torch.as_tensor(coefficients, dtype=torch.float64).cpu()
    except (TypeError, ValueError):
        raise ValueError(f"coefficients={coefficients!r}: numbers") from None
    values = values.expand(n) if values.ndim == 0 else values
    if not values.numel() or values.numel() % n or (values.ndim == 2 and len(values) != n):
        raise ValueError(
            f"coefficients has {values.numel()} numbers for {n} models: one a model, or K a model"
        )
    if not bool(values.isfinite().all()):
        raise ValueError("coefficients must be finite")
    values = values.reshape(n, -1)
    partitions = values.shape[1]
    out = base.clone()
    if partitions == 1 or base.ndim != 2:
        for i in range(n):
            if values[i, 0]:
                out.add_(deltas[i], alpha=float(values[i, 0]))
        return out
    groups = groups_of(tuple(base.shape), partitions, seed)
    for i in range(n):
        out.addcmul_(deltas[i], values[i].to(out)[groups.to(out.device)])
    return out


@dataclass(frozen=True, eq=False)
class ScalingCoefficients:
    """Learned coefficients, apart from the model that they were learned with.

    Attributes
    ----------
    values : dict of str to Tensor of shape (n,) or (n, K)
        By tensor; those that are missing stay the base's.
    seed : int
        Of the groups.
    count : int
        n.
    base : dict of str to str
        Hashes of the base's tensors.
    """

    values: dict[str, Tensor]
    seed: int = 0
    count: int = 0
    base: dict[str, str] = field(default_factory=dict)


def save_coefficients(path: str | Path, composed: TaskVectorModel) -> None:
    """Keep the coefficients of a `TaskVectorModel` as safetensors, with hashes of the base's tensors."""
    from safetensors.torch import save

    model: nn.Module = composed.__dict__["model"]
    own = dict(model.named_parameters())
    about = {
        "seed": composed.seed,
        "count": composed.count,
        "base": {name: tensor_hash(own[name]) for name in composed.names},
    }
    values = {name: value.contiguous() for name, value in composed.coefficients().items()}
    with atomic_write(path, "wb") as file:
        file.write(save(values, metadata={"unfused": json.dumps(about)}))


def load_coefficients(path: str | Path) -> ScalingCoefficients:
    """What `save_coefficients` wrote.

    Raises
    ------
    ValueError
        If the file is missing, damaged or another one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {})["unfused"])
            values = {name: file.get_tensor(name) for name in file.keys()}
        return ScalingCoefficients(values, about["seed"], about["count"], about["base"])
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give a file of save_coefficients") from None
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} is no file of save_coefficients, or damaged") from None


@torch.no_grad()
def scale_task_vectors(
    base: nn.Module | Weights,
    models: Sequence[nn.Module | Weights | Mapping[str, Any]],
    coefficients: ScalingCoefficients | Mapping[str, Sequence[float] | Tensor] | TaskVectorModel,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A state dict: base plus scaled task vectors, one tensor of one model at a time, in the base's dtypes.

    Parameters
    ----------
    base : state dict, module or open checkpoint
    models : sequence of n state dicts, modules, open checkpoints or results of `lora_task_vector`
    coefficients : ScalingCoefficients, mapping of str to (n,) or (n, K), or TaskVectorModel
    seed : int, default=0
        Of the groups, where a plain mapping is given.

    Raises
    ------
    ValueError
        Where the base is not the one that the coefficients were learned on.

    Examples
    --------
    >>> base, tuned = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0])}
    >>> scale_task_vectors(base, [tuned], {"w": [0.5]})["w"].tolist()
    [0.5, 1.0]
    """
    state = weights_of(base, "base")
    hashes: Mapping[str, str] = {}
    if isinstance(coefficients, TaskVectorModel):
        values: Mapping[str, Any] = coefficients.coefficients()
        seed = coefficients.seed
    elif isinstance(coefficients, ScalingCoefficients):
        values, seed, hashes = coefficients.values, coefficients.seed, coefficients.base
        if coefficients.count != len(models):
            raise ValueError(
                f"models: {len(models)} given, the coefficients are those of {coefficients.count}"
            )
    else:
        values = coefficients
    if strange := sorted(set(values) - set(state)):
        raise ValueError(f"coefficients has {strange[0]!r}, which the base lacks")
    vectors = task_vectors(state, models)
    merged = {}
    for name in state:
        tensor = state[name]
        if name not in values or not tensor.is_floating_point():
            merged[name] = tensor.detach().clone()
            continue
        if name in hashes and tensor_hash(tensor) != hashes[name]:
            raise ValueError(f"base: {name!r} is not the tensor that the coefficients were learned on")
        found = _Changes([(lambda vector=vector, name=name: vector(name)) for vector in vectors], tensor)
        merged[name] = anisotropic(tensor.float(), found, coefficients=values[name], seed=seed).to(
            tensor.dtype
        )
    return merged


class _Changes(Sequence[Tensor]):
    """Task vectors of one tensor, made when they are asked for."""

    def __init__(self, make: Sequence[Any], like: Tensor) -> None:
        self.make, self.like = make, like

    def __len__(self) -> int:
        return len(self.make)

    def __getitem__(self, index: Any) -> Any:
        found = self.make[index]()
        if found is None:
            return torch.zeros(self.like.shape, device=self.like.device)
        return (found.dense() if isinstance(found, LowRank) else found).to(self.like.device)


@weighing("atlas", then="anisotropic", weights="coefficients", base="required")
def atlas_weights(
    base: Weights | None, models: Sequence[Weights], *, coefficients: str
) -> dict[str, list[float]]:
    """aTLAS: base plus task vectors by coefficients learned before (`coefficients`: a file of `save_coefficients`)."""
    assert base is not None
    found = load_coefficients(coefficients)
    if found.count != len(models):
        raise ValueError(
            f"coefficients={coefficients!r} are those of {found.count} models, {len(models)} are given"
        )
    if found.seed and any(value.ndim == 2 for value in found.values.values()):
        raise ValueError(
            f"coefficients={coefficients!r}: groups of seed {found.seed}; use scale_task_vectors in Python"
        )
    for name, known in found.base.items():
        if name not in base or tensor_hash(base[name]) != known:
            raise ValueError(f"base: {name!r} is not the tensor that {coefficients} was learned on")
    return {name: value.flatten().tolist() for name, value in found.values.items()}
