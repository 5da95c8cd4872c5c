"""aTLAS's model: a base plus scaled task vectors, whose coefficients are all that is trained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F

from unfused.merge._compose import (
    Block,
    LowRank,
    Weights,
    check_batches,
    check_tensor,
    forward_logits,
    split_batch,
    weights_of,
)

TaskVector = Mapping[str, "Tensor | LowRank"]


@lru_cache(maxsize=64)
def groups_of(shape: tuple[int, ...], partitions: int, seed: int) -> Tensor:
    """A random group in 0 .. partitions - 1 for each entry of a matrix; (rows, columns) of int64.

    As many entries in each, up to one; the same for all matrices of one shape.
    """
    text = f"{seed} {shape}".encode()
    start = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    order = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(start))
    return (order % partitions).view(shape)


class TaskVectorModel(nn.Module):
    """A frozen model at `theta_0 + sum_i lambda_i tau_i`; its parameters are the coefficients lambda, 0 at first.

    Every tensor (weight, bias, class token, ...) has a coefficient for each task vector. Buffers stay the base's.

    Parameters
    ----------
    model : nn.Module
        Holds the base's weights; neither changed nor trained. Kept in eval mode.
    models : sequence of n state dicts, modules, open checkpoints or results of `lora_task_vector`
        Fine-tunings of that base. For few-shot use, leave out the target's own.
    partitions : int, default=1
        aTLAS x K: random groups of the entries of each matrix, with a coefficient each; other tensors have one.
    per : {"tensor", "model"}, default="tensor"
        "model": one coefficient for a whole task vector, the isotropic scaling that the paper compares with.
    blocks : mapping of str to sequence of int, optional
        Which of the n vectors each tensor may take, from `select_blocks`; tensors that it lacks stay the base's.
    output : callable, optional
        From what the model gives to a tensor; by default the logits.
    linearized : bool, default=False
        `f(theta_0) + J(theta_0) sum lambda tau` instead, for vectors from linearised fine-tuning; one forward derivative.
    seed : int, default=0
        Of the groups.
    dtype : torch.dtype, default=torch.float32
        In which task vectors are kept (n times the model); they stay on the CPU and are moved one tensor at a time.

    Attributes
    ----------
    names : tuple of m str
        The composed tensors.
    values : nn.Parameter of shape (m, n, K), or (1, n, 1) for the isotropic scaling
        K is 1, or `partitions` where only matrices use more than the first.

    Examples
    --------
    >>> base, tuned = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> composed = TaskVectorModel(base, [tuned])
    >>> x = torch.ones(1, 2)
    >>> bool(torch.equal(composed(x), base(x)))
    True
    >>> _ = nn.init.ones_(composed.values)
    >>> bool(torch.allclose(composed(x), tuned(x), atol=1e-6))
    True
    """

    def __init__(
        self,
        model: nn.Module,
        models: Sequence[nn.Module | Weights | TaskVector],
        partitions: int = 1,
        per: str = "tensor",
        blocks: Mapping[str, Sequence[int]] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        linearized: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if partitions < 1:
            raise ValueError(f"partitions={partitions}: at least 1")
        if per not in ("tensor", "model"):
            raise ValueError(f"per={per!r}: choose 'tensor' or 'model'")
        if per == "model" and partitions > 1:
            raise ValueError(
                f"partitions={partitions} divides tensors, per='model' does not even tell them apart"
            )
        vectors = task_vectors(model, models)
        self.__dict__["model"] = model.eval()  # no submodule: its weights are no parameters of ours
        self.count, self.partitions, self.per, self.seed = len(models), partitions, per, seed
        self.linearized, self.output = linearized, output or forward_logits
        self._blocks: dict[str, Block] = {}
        self._which: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            deltas = {i: delta for i, vector in enumerate(vectors) if (delta := vector(name)) is not None}
            if blocks is not None:
                deltas = {i: delta for i, delta in deltas.items() if i in blocks.get(name, ())}
            if not deltas:
                continue
            groups = groups_of(tuple(parameter.shape), partitions, seed) if self._split(parameter) else None
            self._blocks[name] = Block(parameter.detach(), list(deltas.values()), groups, dtype)
            self._which[name] = torch.tensor(list(deltas))
        if not self._blocks:
            raise ValueError("models: no tensor of the model has a task vector")
        self.names = tuple(self._blocks)
        shape = (1, self.count, 1) if per == "model" else (len(self.names), self.count, partitions)
        self.values = nn.Parameter(torch.zeros(shape, device=next(model.parameters()).device))

    def _split(self, tensor: Tensor) -> bool:
        return self.partitions > 1 and tensor.ndim == 2

    def _of(self, j: int, name: str, values: Tensor) -> Tensor:
        """(n of this block,) or (n of this block, K)"""
        mine = values[0 if self.per == "model" else j][self._which[name].to(values.device)]
        return mine if self._blocks[name].groups is not None else mine[:, 0]

    def weights(self) -> dict[str, Tensor]:
        """The composed tensors, differentiable in `values`."""
        return {name: self._blocks[name](self._of(j, name, self.values)) for j, name in enumerate(self.names)}

    def run(self, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The model under these weights."""
        model: nn.Module = self.__dict__["model"]
        own = dict(model.named_parameters())
        if not self.linearized:
            weights = {name: value.to(own[name].dtype) for name, value in weights.items()}
            return self.output(functional_call(model, weights, args, kwargs))
        base = {name: own[name].detach() for name in weights}
        apart = {name: (value - base[name]).to(base[name].dtype) for name, value in weights.items()}

        def at(state: dict[str, Tensor]) -> Tensor:
            return self.output(functional_call(model, state, args, kwargs))

        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
            value, change = jvp(at, (base,), (apart,))  # type: ignore[misc]
        return value + change  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.run(self.weights(), *args, **kwargs)

    def penalty(self, p: int = 1) -> Tensor:
        """Half the mean over tensors of the p-norm of their coefficients."""
        return 0.5 * self.values.flatten(1).norm(p=p, dim=1).mean()

    def coefficients(self) -> dict[str, Tensor]:
        """(n,), or (n, K) for a matrix in groups, of every composed tensor; 0 where a vector was not chosen."""
        found = {}
        for j, name in enumerate(self.names):
            own = self._of(j, name, self.values.detach()).cpu()
            full = torch.zeros(self.count, *own.shape[1:])
            full[self._which[name]] = own
            found[name] = full
        return found

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """A state dict of the model with the composed weights, in its dtypes; tied weights stay tied."""
        model: nn.Module = self.__dict__["model"]
        twins = {id(p): name for name, p in model.named_parameters()}
        every = dict(model.named_parameters(remove_duplicate=False))
        made = {name: value.to(every[name].dtype) for name, value in self.weights().items()}
        return {
            name: made.get(twins.get(id(every.get(name)), name), value).detach()
            for name, value in model.state_dict().items()
        }


def task_vectors(
    model: nn.Module | Weights, models: Sequence[nn.Module | Weights | TaskVector]
) -> list[Callable[[str], Tensor | LowRank | None]]:
    """For each model, the change of a tensor by its name; None where a LoRA adapter leaves it alone."""
    if isinstance(models, nn.Module | Mapping) or not len(models):
        raise ValueError("models: give a list of at least one fine-tuned model")
    base: Weights = dict(model.named_parameters()) if isinstance(model, nn.Module) else model

    def of(i: int, state: TaskVector) -> Callable[[str], Tensor | LowRank | None]:
        sparse = (
            any(isinstance(value, LowRank) for value in state.values()) if isinstance(state, dict) else False
        )
        lacking = sorted(set(base) - set(state))
        if lacking and not sparse:
            raise ValueError(f"models[{i}] lacks {lacking[0]!r}: it is no fine-tuning of this base")
        if sparse and (strange := sorted(set(state) - set(base))):
            raise ValueError(f"models[{i}] changes {strange[0]!r}, which the base lacks")

        def change(name: str) -> Tensor | LowRank | None:
            if name not in state:
                return None
            found = state[name]
            if isinstance(found, LowRank):
                if found.shape != base[name].shape:
                    raise ValueError(
                        f"models[{i}]: the change of {name!r} has shape {tuple(found.shape)}, "
                        f"the base's is {tuple(base[name].shape)}"
                    )
                return found
            check_tensor(found, base[name].detach(), name, f"models[{i}]")
            own = base[name].detach()
            return found.detach().to(own.device).float() - own.float()

        return change

    return [
        of(i, m if isinstance(m, Mapping) else weights_of(m, f"models[{i}]"))  # type: ignore[arg-type]
        for i, m in enumerate(models)
    ]


def lora_task_vector(
    adapter: str | Path | Mapping[str, Tensor], scale: float | None = None
) -> dict[str, Any]:
    """A LoRA adapter as a task vector that stays low-rank: the change of each weight is `scale B A`.

    Parameters
    ----------
    adapter : path or state dict
        Folder of `save_pretrained` (its configuration gives the scale), or `get_peft_model_state_dict(model)`.
    scale : float, optional
        `lora_alpha / r`; needed with a state dict.

    Returns
    -------
    dict of str to LowRank (and Tensor for `modules_to_save`)
        Names are those of the base model. For `TaskVectorModel` and `select_blocks`.

    Raises
    ------
    ValueError
        For adapters that are no plain LoRA (DoRA, biases, other methods).
    """
    config: dict[str, Any] = {}
    if isinstance(adapter, Mapping):
        state, which = adapter, "adapter"
        if scale is None:
            raise ValueError("scale: with a state dict, give lora_alpha / r")
    else:
        from safetensors.torch import load_file

        folder = Path(adapter)
        which = str(folder)
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            state = load_file(folder / "adapter_model.safetensors")
        except FileNotFoundError:
            raise ValueError(
                f"{which} lacks adapter_config.json or adapter_model.safetensors: give a folder of save_pretrained"
            ) from None
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            raise ValueError(f"{which} is no plain LoRA: merge it into its base and give the merged model")
    found: dict[str, Any] = {}
    for key, value in state.items():
        name = key.removeprefix("base_model.model.")
        module, mark, rest = name.partition(".lora_")
        if not mark:
            if ".bias" in name and config.get("bias", "none") == "none":
                raise ValueError(f"{which}: {key!r} is no part of a LoRA")
            found[name.replace(".modules_to_save", "").replace(".default", "")] = value
            continue
        kind = rest.split(".")[0]
        if kind == "A":
            b = state.get(key.replace(".lora_A", ".lora_B"))
            if b is None:
                raise ValueError(f"{which}: {key!r} has no lora_B")
            factor = scale if scale is not None else _scale(config, module, len(value))
            transposed = bool(config.get("fan_in_fan_out"))
            found[f"{module}.weight"] = (
                LowRank(value.T, b.T, factor) if transposed else LowRank(b, value, factor)
            )
        elif kind != "B":
            raise ValueError(f"{which}: {key!r} is no factor of a matrix: only linear layers are supported")
    if not any(isinstance(value, LowRank) for value in found.values()):
        raise ValueError(f"{which} holds no LoRA factors")
    return found


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if module.endswith(pattern):
            alpha = value
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def select_blocks(
    model: nn.Module,
    models: Sequence[nn.Module | Weights | TaskVector],
    batches: Iterable[Any],
    budget: int,
    output: Callable[[Any], Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, tuple[int, ...]]:
    """For each tensor the vectors whose coefficients have the largest gradients at 0: memory for `budget` of n vectors.

    One backward pass of the base; then one tensor of one vector at a time.

    Parameters
    ----------
    model : nn.Module
        The base.
    models : sequence of n state dicts, modules, open checkpoints or results of `lora_task_vector`
    batches : iterable of dict or of (inputs, labels)
        The shots.
    budget : int
        How many vectors a tensor keeps.
    output : callable, optional
        From what the model gives to logits.
    loss : callable (logits, labels) -> Tensor, default=cross_entropy

    Returns
    -------
    dict of str to tuple of int
        For `TaskVectorModel(blocks=...)`; indices rise.
    """
    if not 1 <= budget <= len(models):
        raise ValueError(f"budget={budget}: between 1 and the {len(models)} models")
    check_batches(batches)
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    grads: dict[str, Tensor] = {}
    training, needed = model.training, {name: p.requires_grad for name, p in parameters.items()}
    model.eval().requires_grad_(True)
    try:
        seen = 0
        for batch in batches:
            args, kwargs, labels = split_batch(batch, device)
            if labels is None:
                raise ValueError(
                    "batches: a batch has no labels; give dicts with 'labels' or (inputs, labels)"
                )
            value = loss((output or forward_logits)(model(*args, **kwargs)), labels) * len(labels)
            for name, grad in zip(
                parameters,
                torch.autograd.grad(value, list(parameters.values()), allow_unused=True),
                strict=True,
            ):
                if grad is not None:
                    grads[name] = grad if name not in grads else grads[name] + grad
            seen += len(labels)
        if not seen:
            raise ValueError("batches is empty: give the shots")
    finally:
        model.train(training)
        for name, parameter in parameters.items():
            parameter.requires_grad_(needed[name])
    vectors = task_vectors(model, models)
    chosen = {}
    for name, grad in grads.items():
        sizes = torch.full((len(models),), -1.0)
        for i, vector in enumerate(vectors):
            delta = vector(name)
            if isinstance(delta, LowRank):
                delta = delta.dense()
            if delta is not None:
                sizes[i] = (delta.to(grad).reshape(-1) @ grad.reshape(-1)).abs().cpu()
        best = sizes.topk(budget).indices.sort().values
        chosen[name] = tuple(int(i) for i in best if sizes[i] >= 0)
    return chosen
