"""Soups as the engine and the command line call them: weights found on whole models, merged by `linear`.

unfused merge uniform-soup A B C --out DIR
unfused merge greedy-soup A B C --score module:function --out DIR      # function(state dict) -> float
unfused merge learned-soup A B C --data module:function --out DIR      # function() -> (model, batches)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from unfused.merge._compose import Weights
from unfused.merge._method import merge_method, weighing
from unfused.merge._soup_greedy import greedy_soup
from unfused.merge._soup_learned import learned_soup


@merge_method("uniform-soup", base="none", splits="elements")
def uniform(base: Tensor | None, deltas: Sequence[Tensor]) -> Tensor:
    """Model soup: the plain mean of the models."""
    total = deltas[0]
    for i in range(1, len(deltas)):
        total.add_(deltas[i])
    return total.div_(len(deltas))


@weighing("greedy-soup")
def greedy(
    base: Weights | None,
    models: Sequence[Weights],
    *,
    score: str | Callable[[Any], float],
    accept: str = ">=",
    check_descent: bool = True,
) -> list[float]:
    """Model soup of the models that help, added from the best down; 0 or 1 for each."""
    found = greedy_soup(
        models, called("score", score), accept=accept, base=base, check_descent=_truth(check_descent)
    )
    for index, value, kept in found.trace:
        print(f"models[{index}]: {value:.6g}{'' if kept else ', left out'}", file=sys.stderr)
    return [float(i in found.members) for i in range(len(models))]


@weighing("learned-soup")
def learned(
    base: Weights | None,
    models: Sequence[Weights],
    *,
    data: str | Callable[[], tuple[Any, Any]],
    per: str = "tensor",
    lr: float = 0.05,
    epochs: int = 5,
    check_descent: bool = True,
) -> list[float] | Mapping[str, list[float]]:
    """Model soup with weights learned by gradient descent, for every tensor its own."""
    model, batches = called("data", data)()
    found = learned_soup(
        model, models, batches, per=per, lr=lr, epochs=epochs, check_descent=_truth(check_descent)
    )
    if found.alpha.ndim == 1:
        return [float(weight) for weight in found.alpha]
    equal = [1 / len(models)] * len(models)
    return {name: list(found.weights.get(name, equal)) for name in models[0]}


def called(name: str, value: Any) -> Callable[..., Any]:
    """A function, or what `module:function` names; modules of the working directory are found too."""
    if callable(value):
        return value  # type: ignore[no-any-return]
    module, colon, attribute = str(value).partition(":")
    if not colon or not module or not attribute:
        raise ValueError(f"{name}={value!r}: give module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name}={value!r}: {error}; run it where {module}.py is, or install it") from None
    except AttributeError:
        raise ValueError(f"{name}={value!r}: {module} has no {attribute}") from None
    if not callable(found):
        raise ValueError(f"{name}={value!r} is a {type(found).__name__}: give a function")
    return found  # type: ignore[no-any-return]


def _truth(value: Any) -> bool:
    if isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"check_descent={value!r}: true or false")
        return value.lower() == "true"
    return bool(value)
