"""The greedy soup, and the order of models by their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unfused.merge._compose import Weights
from unfused.merge._soup_states import check_descent_of, states_of, twins, wide

Score = Callable[[Any], float]
ACCEPT = (">=", ">")


def rank_models(models: Sequence[nn.Module | Weights], score: Score) -> list[tuple[int, float]]:
    """Indices and scores, the best first; of equal ones the earlier first.

    Parameters
    ----------
    models : sequence of k state dicts, modules or open checkpoints
    score : callable (state dict) -> float
        Higher is better.

    Examples
    --------
    >>> rank_models([{"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}], lambda state: float(state["w"]))
    [(1, 3.0), (0, 1.0)]
    """
    states, _ = states_of(models)
    scores = [_scored(score, dict(state), f"models[{i}]") for i, state in enumerate(states)]
    return sorted(enumerate(scores), key=lambda found: -found[1])


@dataclass(frozen=True, eq=False)
class GreedySoup:
    """What `greedy_soup` found.

    Attributes
    ----------
    state_dict : dict of str to Tensor
    members : tuple of int
        In the order in which they came in; the first is the best single model.
    scores : tuple of float
        Of the single models, in the order given.
    trace : tuple of (int, float, bool)
        Each trial: the model, the score of the mean with it, whether it was kept.
    score : float
        Of the soup, on the data that chose it.
    """

    state_dict: dict[str, Tensor]
    members: tuple[int, ...]
    scores: tuple[float, ...]
    trace: tuple[tuple[int, float, bool], ...]
    score: float


def greedy_soup(
    models: Sequence[nn.Module | Weights],
    score: Score,
    accept: str = ">=",
    model: nn.Module | None = None,
    scores: Sequence[float] | None = None,
    order: Sequence[int] | None = None,
    base: nn.Module | Weights | None = None,
    check_descent: bool = True,
) -> GreedySoup:
    """The greedy soup: one pass over the models from the best down.

    Parameters
    ----------
    models : sequence of k state dicts, modules or open checkpoints
    score : callable -> float
        On held-out data, higher is better. It is given a state dict or, with `model`, that model.
    accept : {">=", ">"}, default=">="
        Whether a model that changes nothing is kept. On small validation sets ">" stops at one or two.
    model : nn.Module, optional
        Candidates are written into it, tensor by tensor, so that beside it only the running sum is in memory. It is left
        with the soup's weights.
    scores : sequence of k floats, optional
        Of the single models, where they are known: k trials instead of 2 k.
    order : sequence of int, optional
        Try the models in this order instead.
    base, check_descent
        As for `uniform_soup`.

    Examples
    --------
    >>> models = [{"w": torch.tensor([x])} for x in (0.0, 4.0, 9.0)]
    >>> found = greedy_soup(models, lambda state: -abs(float(state["w"]) - 3.0))  # 3 is best
    >>> found.members, found.score, float(found.state_dict["w"])
    ((1, 0), -1.0, 2.0)
    >>> greedy_soup(models, lambda state: -abs(float(state["w"]) - 3.0), accept=">").members
    (1,)
    """
    if accept not in ACCEPT:
        raise ValueError(f"accept={accept!r}: choose '>=' or '>'")
    states, names = states_of(models)
    if check_descent and len(states) > 1:
        check_descent_of(states, names, base)
    target = None if model is None else _writable(model, names)

    def trial(candidate: Callable[[str], Tensor], which: str) -> float:
        if target is None:
            return _scored(score, {name: candidate(name) for name in names}, which)
        _write(target, candidate)
        return _scored(score, model, which)

    if scores is None:
        singles = [trial(state.__getitem__, f"models[{i}]") for i, state in enumerate(states)]
    else:
        singles = [float(value) for value in scores]
        if len(singles) != len(states) or not all(map(math.isfinite, singles)):
            raise ValueError(
                f"scores has {len(singles)} numbers (all must be finite) for {len(states)} models"
            )
    ranks = sorted(range(len(states)), key=lambda i: -singles[i]) if order is None else list(order)
    if sorted(ranks) != list(range(len(states))):
        raise ValueError(f"order={ranks}: give each of 0 .. {len(states) - 1} once")
    first = states[ranks[0]]
    total = {
        name: first[name].to(wide(first[name].dtype, len(states)), copy=True)
        for name in names
        if first[name].is_floating_point()
    }
    members, best, trace = [ranks[0]], singles[ranks[0]], [(ranks[0], singles[ranks[0]], True)]

    def mean(name: str, state: Weights | None) -> Tensor:
        if name not in total:
            return first[name]
        summed = total[name] if state is None else total[name] + state[name].to(total[name])
        return (summed / (len(members) + (state is not None))).to(first[name].dtype)

    for i in ranks[1:]:
        found = trial(lambda name, state=states[i]: mean(name, state), f"the mean with models[{i}]")  # type: ignore[misc]
        kept = found >= best if accept == ">=" else found > best
        trace.append((i, found, kept))
        if kept:
            for name, summed in total.items():
                summed.add_(states[i][name].to(summed))
            members.append(i)
            best = found
    soup = _soup(first, names, mean)
    if target is not None:
        _write(target, soup.__getitem__)
    return GreedySoup(soup, tuple(members), tuple(singles), tuple(trace), best)


def _soup(
    first: Weights, names: Sequence[str], mean: Callable[[str, Weights | None], Tensor]
) -> dict[str, Tensor]:
    done: dict[str, Tensor] = {}
    for name, twin in twins(first, names):
        done[name] = mean(name, None).clone() if twin is None else done[twin]
    return done


def _writable(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    own = model.state_dict()
    if missing := sorted(set(own) - set(names)):
        raise ValueError(f"models lack {missing[0]!r}, which the model has: one architecture only")
    return own


@torch.no_grad()
def _write(target: Mapping[str, Tensor], candidate: Callable[[str], Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(candidate(name))


def _scored(score: Score, what: Any, which: str) -> float:
    found = float(score(what))
    if not math.isfinite(found):
        raise ValueError(f"score gave {found} for {which}: it must be a finite number, higher is better")
    return found
