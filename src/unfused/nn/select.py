"""Which entries of a network to train: scores, and the exact top of all tensors together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

__all__ = [
    "activation_norms",
    "magnitude_change",
    "select_global",
    "select_random",
    "smallest_magnitude",
    "squared_gradients",
]


def select_global(scores: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The `count` highest scores of all tensors together, exactly; ties go to the earlier tensor and position.

    Parameters
    ----------
    scores : mapping of str to tensor of any shape
        `-inf` marks entries that must not be chosen.
    count : int

    Returns
    -------
    dict of str to int64 tensor
        Ascending flat positions for every name, empty ones too.

    Raises
    ------
    ValueError
        If a score is NaN, or fewer than `count` entries may be chosen.

    Examples
    --------
    >>> chosen = select_global({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[5.0], [2.0]])}, 2)
    >>> {name: index.tolist() for name, index in chosen.items()}
    {'a': [1], 'b': [0]}
    """
    flat = torch.cat([s.detach().reshape(-1).float() for s in scores.values()]) if scores else torch.empty(0)
    if flat.isnan().any():
        name = next(name for name, s in scores.items() if s.isnan().any())
        raise ValueError(f"scores[{name!r}] holds NaN")
    allowed = int((flat > -torch.inf).sum())
    if not 0 <= count <= allowed:
        raise ValueError(f"count={count}: {allowed} entries may be chosen")
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    if count:
        threshold = flat.kthvalue(len(flat) - count + 1).values
        chosen = flat > threshold
        ties = (flat == threshold).nonzero().squeeze(1)
        chosen[ties[: count - int(chosen.sum())]] = True
    parts = chosen.split([s.numel() for s in scores.values()]) if scores else ()
    return {name: part.nonzero().squeeze(1) for name, part in zip(scores, parts, strict=True)}


def select_random(sizes: Mapping[str, int], count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """`count` distinct positions drawn uniformly from all tensors together, without a number for every entry.

    Parameters
    ----------
    sizes : mapping of str to int
        How many entries each tensor has.
    count : int
    seed : int, default=0

    Examples
    --------
    >>> chosen = select_random({"a": 10, "b": 30}, 8)
    >>> sum(len(index) for index in chosen.values())
    8
    """
    total = sum(sizes.values())
    if not 0 <= count <= total:
        raise ValueError(f"count={count}: {total} entries may be chosen")
    generator = torch.Generator().manual_seed(seed)
    if 4 * count > total:
        found = torch.randperm(total, generator=generator)[:count].sort().values
    else:
        found = torch.empty(0, dtype=torch.int64)
        while len(found) < count:
            more = torch.randint(total, (count + count // 4 + 8,), generator=generator)
            found = torch.cat([found, more]).unique()
        found = found[torch.randperm(len(found), generator=generator)[:count].sort().values]
    chosen, start = {}, 0
    for name, size in sizes.items():
        low, high = torch.searchsorted(found, torch.tensor([start, start + size])).tolist()
        chosen[name], start = found[low:high] - start, start + size
    return chosen


def magnitude_change(weight: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """`|weight - start|`: what training moved most."""
    return (weight.detach().float() - start.detach().to(weight.device).float()).abs()


def smallest_magnitude(weight: torch.Tensor) -> torch.Tensor:
    """`-|weight|`: the weights that do least."""
    return -weight.detach().float().abs()


def squared_gradients(
    parameters: Mapping[str, torch.Tensor], losses: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The sum over losses (one a batch, say) of squared gradients: where training would move most.

    Parameters
    ----------
    parameters : mapping of str to tensor
        Each requires a gradient; nothing is left in `.grad`.
    losses : iterable of scalars
        Computed one by one, a generator say, so that one graph is alive at a time.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    for loss in losses:
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                total[name] += grad.detach().float().square()
    return total


def activation_norms(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, torch.Tensor]:
    """The Euclidean norm, over everything seen, of each input channel of linear modules.

    Parameters
    ----------
    modules : mapping of str to module
        Their first input has channels last.
    run : callable
        Runs the network over some data; without gradients.

    Returns
    -------
    dict of str to float32 tensor (in,)

    Examples
    --------
    >>> linear = nn.Linear(2, 1)
    >>> activation_norms({"fc": linear}, lambda: linear(torch.tensor([[3.0, 0.0], [4.0, 1.0]])))["fc"].tolist()
    [5.0, 1.0]
    """
    squares: dict[str, torch.Tensor] = {}
    with _watch(modules, squares), torch.no_grad():
        run()
    if missing := [name for name in modules if name not in squares]:
        raise ValueError(f"{missing[0]!r} never ran, so that it has no activations")
    return {name: square.sqrt() for name, square in squares.items()}


@contextmanager
def _watch(modules: Mapping[str, nn.Module], squares: dict[str, torch.Tensor]) -> Iterator[None]:
    def hook(name: str) -> Callable:
        def add(module: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            square = x.reshape(-1, x.shape[-1]).float().square().sum(0)
            squares[name] = squares[name] + square if name in squares else square

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
