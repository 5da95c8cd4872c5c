"""The learned soup, the gap between a soup and its ensemble, and batch norms of a soup."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unfused.merge._compose import Block, Weights, block_of, check_batches, forward_logits, split_batch
from unfused.merge._soup_states import average_tensors, check_descent_of, states_of


@dataclass(frozen=True, eq=False)
class LearnedSoup:
    """What `learned_soup` found.

    Attributes
    ----------
    state_dict : dict of str to Tensor
    alpha : Tensor of shape (k,) or (groups, k)
        Each row sums to 1.
    groups : tuple of str
        What the rows of `alpha` belong to; empty where there is one.
    beta : float
        The factor of the logits, which no prediction depends on.
    losses : tuple of float
        Mean loss of each pass.
    weights : dict of str to tuple of k floats
        The row of `alpha` of every tensor.
    """

    state_dict: dict[str, Tensor]
    alpha: Tensor
    groups: tuple[str, ...]
    beta: float
    losses: tuple[float, ...]
    weights: dict[str, tuple[float, ...]] = field(default_factory=dict)


def learned_soup(
    model: nn.Module,
    models: Sequence[nn.Module | Weights],
    batches: Iterable[Any],
    per: str | Callable[[str], str] = "tensor",
    lr: float = 0.05,
    epochs: int = 5,
    dtype: torch.dtype = torch.float32,
    check_descent: bool = True,
) -> LearnedSoup:
    """Mixing weights by gradient descent on held-out data: AdamW without decay from the uniform soup and beta = 1.

    Parameters
    ----------
    model : nn.Module
        Of the architecture; its own weights do not matter and are left as they are. In eval mode meanwhile.
    models : sequence of k state dicts, modules or open checkpoints
        All of them are held in memory.
    batches : iterable of dict or of (inputs, labels)
        Held-out data, in the paper in batches of 256, read `epochs` times: a DataLoader or a list. Dicts are the model's
        keyword arguments with "labels"; the model gives logits or an output that has them.
    per : {"tensor", "model", "block"} or callable (name) -> str, default="tensor"
        What has mixing weights of its own: each tensor (the released script), nothing (one for all), each layer (the
        paper), or the tensors to which the callable gives one name.
    lr : float, default=0.05
    epochs : int, default=5
    dtype : torch.dtype, default=torch.float32
        In which the k models are held.
    check_descent : bool, default=True

    Examples
    --------
    >>> model = nn.Linear(2, 2, bias=False)
    >>> good, bad = {"weight": torch.tensor([[3.0, 0], [0, 3]])}, {"weight": torch.tensor([[0, 3.0], [3, 0]])}
    >>> found = learned_soup(model, [good, bad], [(torch.eye(2), torch.arange(2))], epochs=50, check_descent=False)
    >>> bool(found.alpha[0] > 0.8)
    True
    """
    check_batches(batches)
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: at least 1")
    states, names = states_of(models)
    if check_descent and len(states) > 1:
        check_descent_of(states, names, None)
    learned = [name for name, _ in model.named_parameters()]
    if missing := [name for name in learned if name not in set(names)]:
        raise ValueError(f"models lack {missing[0]!r}, which the model has: one architecture only")
    device = next(model.parameters()).device
    group = (
        {"tensor": lambda name: name, "model": lambda name: "", "block": block_of}.get(per)
        if isinstance(per, str)
        else per
    )
    if group is None:
        raise ValueError(f"per={per!r}: choose 'tensor', 'block' or 'model', or give a callable")
    rows = {name: group(name) for name in learned}
    groups = list(dict.fromkeys(rows.values()))
    blocks = {name: Block(None, [state[name].detach() for state in states], dtype=dtype) for name in learned}
    buffers = {name: average_tensors([state[name] for state in states]) for name in names if name not in rows}
    buffers = {
        name: value.to(device) for name, value in buffers.items() if name in dict(model.named_buffers())
    }
    logits = torch.zeros(len(groups), len(states), device=device, requires_grad=True)
    beta = torch.ones((), device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([logits, beta], lr=lr, weight_decay=0.0)
    losses = []
    training = model.training
    model.eval()
    try:
        for _ in range(epochs):
            total, seen = 0.0, 0
            for batch in batches:
                args, kwargs, labels = split_batch(batch, device)
                if labels is None:
                    raise ValueError(
                        "batches: a batch has no labels; give dicts with 'labels' or (inputs, labels)"
                    )
                alpha = logits.softmax(-1)
                mixed = {name: blocks[name](alpha[groups.index(rows[name])]) for name in learned}
                output = forward_logits(functional_call(model, mixed | buffers, args, kwargs))
                loss = F.cross_entropy(beta * output.float(), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total, seen = total + float(loss.detach()) * len(labels), seen + len(labels)
            if not seen:
                raise ValueError("batches is empty: give held-out data")
            losses.append(total / seen)
    finally:
        model.train(training)
    alpha = logits.detach().softmax(-1).cpu()
    if not bool(alpha.isfinite().all()):
        raise ValueError(f"lr={lr}: the mixing weights are not finite any more; lower it")
    tied = _tied_names(model, names)
    soup = {
        name: average_tensors([state[name] for state in states], alpha[groups.index(rows[name])].tolist())
        if name in rows
        else average_tensors([state[name] for state in states])
        for name in names
        if name in rows or name not in tied
    }
    for name, twin in tied.items():
        soup[name] = soup[twin]
    one = len(groups) == 1
    return LearnedSoup(
        {name: soup[name] for name in names},
        alpha[0] if one else alpha,
        () if one else tuple(groups),
        float(beta.detach()),
        tuple(losses),
        {name: tuple(alpha[groups.index(rows[name])].tolist()) for name in learned}
        | {name: tuple(alpha[groups.index(rows[twin])].tolist()) for name, twin in tied.items()},
    )


@dataclass(frozen=True)
class SoupGap:
    """Loss of the soup of two models minus that of their ensemble (of logits), predicted and measured.

    Attributes
    ----------
    predicted, measured : float
    curvature : float
        Of the loss along the line, at the soup: where it is positive the soup gains.
    disagreement : float
        `beta^2 E Var[f_Y(theta_1) - f_Y(theta_0)]` under the soup's own probabilities.
    """

    predicted: float
    measured: float
    curvature: float
    disagreement: float


@torch.no_grad()
def predict_gap(
    model: nn.Module,
    first: nn.Module | Weights,
    second: nn.Module | Weights,
    batches: Iterable[Any],
    alpha: float = 0.5,
    beta: float = 1.0,
    step: float = 0.05,
) -> SoupGap:
    """Loss of `(1 - alpha) theta_0 + alpha theta_1` over that of the ensemble, without training anything.

    `alpha (1 - alpha) / 2 (- d2 L(theta_alpha) / d alpha2 + beta^2 E Var_{Y ~ softmax(beta f(theta_alpha))}[f_Y(theta_1) -
    f_Y(theta_0)])`: right to second order in the chord, wrong for models that a large learning rate took far apart.

    Parameters
    ----------
    model : nn.Module
        Of the architecture; left as it is.
    first, second : state dict, module or open checkpoint
    batches : iterable of dict or of (inputs, labels)
    alpha : float, default=0.5
    beta : float, default=1.0
        Factor of the logits in the loss.
    step : float, default=0.05
        Of the central difference that gives the curvature.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}: between 0 and 1")
    if not 0 < step <= 0.5:
        raise ValueError(f"step={step}: above 0 and at most 0.5")
    check_batches(batches)
    (one, two), names = states_of([first, second])
    device = next(model.parameters()).device

    def at(share: float) -> dict[str, Tensor]:
        return {
            name: (
                torch.lerp(one[name].float(), two[name].float(), share).to(one[name].dtype)
                if one[name].is_floating_point()
                else one[name]
            ).to(device)
            for name in names
        }

    points = {share: at(share) for share in (0.0, 1.0, alpha - step, alpha, alpha + step)}
    sums = dict.fromkeys((alpha - step, alpha, alpha + step), 0.0)
    ensemble = variance = 0.0
    seen = 0
    training = model.training
    model.eval()
    try:
        for batch in batches:
            args, kwargs, labels = split_batch(batch, device)
            if labels is None:
                raise ValueError(
                    "batches: a batch has no labels; give dicts with 'labels' or (inputs, labels)"
                )
            f = {
                share: beta * forward_logits(functional_call(model, state, args, kwargs)).double()
                for share, state in points.items()
            }
            for share in sums:
                sums[share] += float(F.cross_entropy(f[share], labels, reduction="sum"))
            mixed = (1 - alpha) * f[0.0] + alpha * f[1.0]
            ensemble += float(F.cross_entropy(mixed, labels, reduction="sum"))
            p, apart = f[alpha].softmax(-1), f[1.0] - f[0.0]
            variance += float(((p * apart.square()).sum(-1) - (p * apart).sum(-1).square()).sum())
            seen += len(labels)
    finally:
        model.train(training)
    if not seen:
        raise ValueError("batches is empty: give held-out data")
    low, middle, high = (sums[share] / seen for share in (alpha - step, alpha, alpha + step))
    curvature = (low - 2 * middle + high) / step**2
    return SoupGap(
        alpha * (1 - alpha) / 2 * (variance / seen - curvature),
        middle - ensemble / seen,
        curvature,
        variance / seen,
    )


@torch.no_grad()
def refresh_batch_norm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Running statistics of a soup's batch norms, from training data: the average of the models' is not the soup's.

    Parameters
    ----------
    model : nn.Module
        With the soup's weights; changed in place, and returned. One without batch norms is left alone.
    batches : iterable of dict, of (inputs, labels) or of inputs
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return model
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    try:
        for batch in batches:
            args, kwargs, _ = split_batch(batch, device)
            model(*args, **kwargs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return model


def _tied_names(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Names of parameters that share another's, to that one's: the model says so, whatever the state dicts' memory."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: first[id(every[name])] for name in names if name in every and first[id(every[name])] != name
    }
