"""What a merge method is: a pure function on one tensor, and the few facts that the engine needs to call it.

    @merge_method("task-arithmetic", base="required", splits="elements")
    def task_arithmetic(base, deltas, *, scale=0.3):
        ...
        return base + scale * sum(deltas)

`base` is float32 (float64 where the weights are). `deltas` is a sequence with one tensor per model, `model - base`, each made
anew when it is asked for: it may be changed in place, and who takes one after the other never holds them all. With
`base="none"` (soups, slerp) `base` is None and the sequence holds the models' own tensors. Parameters are checked at the top of
the function; the engine calls it once on zeros before it reads anything.

A method that looks at whole models to find weights (greedy and learned soups, learned scaling) is a function
`(base, models, **parameters) -> weights` under `@weighing(slug, then=...)`: models are lazy mappings name -> tensor, and
weights are one number per model, or a mapping name -> such numbers. `then` is the method that is called with them.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from unfused._lazy import public_modules

__all__ = ["Deltas", "MergeMethod", "find", "merge_method", "methods", "per_model", "share", "weighing"]

Splits = Literal["elements", "rows", "tensor"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MergeMethod:
    """A registered method.

    Attributes
    ----------
    slug : str
        The name on the command line.
    function : callable
        On one tensor; or, where `then` is set, on whole models, giving weights.
    base : {"required", "none"}
        Whether the method needs the common ancestor.
    splits : {"elements", "rows", "tensor"} or callable (**parameters) -> one of these
        What a tensor may be cut into: anything, whole rows (first dimension; vectors stay whole), or nothing.
    models : (int, int or None)
        The fewest and the most models.
    random : bool
        The function takes a `generator`, which the engine seeds by the parameter `seed` and the tensor's name.
    then : str, optional
        Slug of the method that takes the weights, and its parameter.
    weights : str
        That parameter's name.
    """

    slug: str
    function: Callable[..., Any]
    base: Literal["required", "none"] = "required"
    splits: Splits | Callable[..., Splits] = "tensor"
    models: tuple[int, int | None] = (1, None)
    random: bool = False
    then: str | None = None
    weights: str = "weights"

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Keyword parameters, without the generator."""
        found = inspect.signature(self.function).parameters
        return {
            n: p for n, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY and n != "generator"
        }

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def split(self, parameters: Mapping[str, Any]) -> Splits:
        return self.splits(**parameters) if callable(self.splits) else self.splits

    def bind(self, parameters: Mapping[str, Any], count: int) -> dict[str, Any]:
        """The parameters with their defaults, after the function has seen them on zeros.

        Raises
        ------
        ValueError
            If a name is unknown, a value wrong, or the number of models is.
        """
        least, most = self.models
        if count < least or (most is not None and count > most):
            wanted = (
                f"{least}" if most == least else f"{least} or more" if most is None else f"{least}-{most}"
            )
            raise ValueError(f"{self.slug} merges {wanted} models, and {count} were given")
        for name in parameters:
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise ValueError(f"{self.slug} has no parameter {name!r}: its parameters are {known}")
        bound = {name: parameters.get(name, p.default) for name, p in self.parameters.items()}
        for name, value in bound.items():
            if value is inspect.Parameter.empty:
                raise ValueError(f"{self.slug} needs the parameter {name!r}")
        if self.then is None:
            zeros = torch.zeros(2, 2)
            self.call("", zeros if self.base == "required" else None, [zeros] * count, bound)
        return bound

    def call(
        self,
        name: str,
        base: torch.Tensor | None,
        tensors: Sequence[torch.Tensor],
        parameters: Mapping[str, Any],
    ) -> torch.Tensor:
        """Merge one tensor (or a piece of it): inputs of any floating type, float32 or float64 out."""
        kinds = getattr(tensors, "dtypes", None) or [tensor.dtype for tensor in tensors]
        both = torch.float64 in kinds or (base is not None and base.dtype == torch.float64)
        wide = torch.float64 if both else torch.float32
        if base is not None:
            base = base.to(wide)
        more = {}
        if self.random:
            seed = hashlib.blake2b(f"{parameters.get('seed', 0)} {name}".encode(), digest_size=8).digest()
            more["generator"] = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        out: torch.Tensor = self.function(base, Deltas(base, tensors, wide), **parameters, **more)
        return out


class Deltas(Sequence[torch.Tensor]):
    """`model - base` for each model (the models' tensors where base is None), made anew at each access.

    Examples
    --------
    >>> deltas = Deltas(torch.ones(2), [torch.tensor([1.0, 3.0], dtype=torch.bfloat16)])
    >>> len(deltas), deltas[0]
    (1, tensor([0., 2.]))
    """

    def __init__(
        self,
        base: torch.Tensor | None,
        tensors: Sequence[torch.Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._base, self._tensors, self._dtype = base, tensors, dtype

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        tensor = self._tensors[index]
        if self._base is None:
            return tensor.to(self._dtype, copy=True)
        if tensor.dtype == self._dtype:
            return tensor - self._base
        return tensor.to(self._dtype).sub_(self._base)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))


# ---- the checks that methods share


def per_model(name: str, value: Any, count: int) -> list[float]:
    """One finite number per model, of one number for all or of as many as there are models.

    Examples
    --------
    >>> per_model("scale", 0.5, 2), per_model("scale", [1, 2], 2)
    ([0.5, 0.5], [1.0, 2.0])
    """
    values = (
        list(value) if isinstance(value, Sequence | torch.Tensor) and not isinstance(value, str) else None
    )
    if values is not None and len(values) != count:
        raise ValueError(
            f"{name}={value!r} has {len(values)} numbers for {count} models: give one, or one a model"
        )
    try:
        numbers = [float(v) for v in ([value] * count if values is None else values)]
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} must be a number, or one a model") from None
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name}={value!r} must be finite")
    return numbers


def share(name: str, value: Any, above: bool = True) -> float:
    """A share in (0, 1], or in [0, 1) where `above` is False."""
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (0 < number <= 1 if above else 0 <= number < 1):
        raise ValueError(f"{name}={value!r} must be a share in {'(0, 1]' if above else '[0, 1)'}")
    return number


# ---- the register

_METHODS: dict[str, MergeMethod] = {}


def merge_method(
    slug: str,
    *,
    base: Literal["required", "none"] = "required",
    splits: Splits | Callable[..., Splits] = "tensor",
    models: tuple[int, int | None] = (1, None),
    random: bool = False,
) -> Callable[[F], F]:
    """Register a function on one tensor; see `MergeMethod`. The function itself is returned unchanged."""

    def register(function: F) -> F:
        _METHODS[slug] = MergeMethod(slug, function, base, splits, models, random)
        return function

    return register


def weighing(
    slug: str,
    *,
    then: str = "linear",
    weights: str = "weights",
    base: Literal["required", "none"] = "none",
    models: tuple[int, int | None] = (1, None),
) -> Callable[[F], F]:
    """Register a function on whole models that gives the weights for method `then`; see the module."""

    def register(function: F) -> F:
        _METHODS[slug] = MergeMethod(slug, function, base, "tensor", models, False, then, weights)
        return function

    return register


def methods() -> dict[str, MergeMethod]:
    """All registered methods, by slug; imports the family's modules."""
    folder = Path(__file__).parent
    for file in (folder / "_plain.py", *public_modules(folder)):
        importlib.import_module(f"{__package__}.{file.stem}")
    return dict(sorted(_METHODS.items()))


def find(method: str | Callable[..., Any] | MergeMethod) -> MergeMethod:
    """A method by its slug or its function.

    Raises
    ------
    ValueError
        If there is none; the message lists those that exist.
    """
    if isinstance(method, MergeMethod):
        return method
    if isinstance(method, str):
        slug = method.replace("_", "-")
        own = slug.replace("-", "_")  # a method's own module first: all of them take long to import
        if own.isidentifier() and (Path(__file__).parent / f"{own}.py").is_file():
            importlib.import_module(f"{__package__}.{own}")
        importlib.import_module(f"{__package__}._plain")
        if slug in _METHODS or slug in methods():
            return _METHODS[slug]
    known = methods()
    for candidate in known.values():
        if candidate.function is method:
            return candidate
    raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(known)}")
