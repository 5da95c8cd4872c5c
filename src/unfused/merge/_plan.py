"""Which tensors are merged, which are copied, and everything that can be found wrong before one is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from unfused.data.files import printable
from unfused.merge._sources import Source

__all__ = ["EMBEDDING", "Item", "Piece", "Plan", "make_plan", "pieces"]

PIECE = 1 << 20
"""Elements that are worked on at once, per model: in float32 they fit a processor's cache."""

EMBEDDING = re.compile(r"embed|wte|lm_head|shared|predictions|output_layer|embed_out")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Item:
    """One tensor of the result: merged, or copied from `source`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: Source | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class Plan:
    """All of them, in order, and what the reader of the result should know."""

    items: list[Item]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    start: int
    stop: int
    shape: tuple[int, ...]


def pieces(shape: Sequence[int], splits: str, size: int = PIECE) -> Iterator[Piece]:
    """Cut a tensor; a tensor without elements has no piece.

    Examples
    --------
    >>> [(p.start, p.stop, p.shape) for p in pieces((3, 4), "rows", size=8)]
    [(0, 8, (2, 4)), (8, 12, (1, 4))]
    """
    total = math.prod(shape)
    if not total:
        return
    if splits == "tensor" or not shape or (len(shape) == 1 and splits == "rows"):
        yield Piece(0, total, tuple(shape))
        return
    entries = math.prod(shape[1:])
    step = max(1, size // entries)
    for row in range(0, shape[0], step):
        rows = min(step, shape[0] - row)
        yield Piece(row * entries, (row + rows) * entries, (rows, *shape[1:]))


def make_plan(
    base: Source | None, models: Sequence[Source], copy: Sequence[str], dtype: torch.dtype | None
) -> Plan:
    """Match the inputs' tensors by name.

    Raises
    ------
    ValueError
        One line naming file and tensor: other architectures, tensors missing or of other shapes, quantised weights.
    """
    everyone = [*([base] if base is not None else []), *models]
    first = everyone[0]
    _check_configs(everyone)
    try:
        patterns = [re.compile(pattern) for pattern in copy]
    except re.error as error:
        raise ValueError(f"copy={copy!r} is not a regular expression: {error}") from None
    names = list(dict.fromkeys(name for source in everyone for name in source))
    copied = {name for name in names if any(pattern.search(name) for pattern in patterns)}
    for pattern in patterns:
        if not any(pattern.search(name) for name in names):
            raise ValueError(f"copy={pattern.pattern!r} matches no tensor of {printable(first.label)}")
    shared = sum(all(name in source for source in everyone) for name in names)
    plan = Plan([])
    for name in names:
        owners = [source for source in everyone if name in source]
        kind, shape = owners[0].layout[name]
        if name in copied:
            plan.items.append(Item(name, _out(kind, dtype), shape, owners[0]))
            continue
        if len(owners) < len(everyone):
            lacking = next(source for source in everyone if name not in source)
            if twin := _twin(name, owners, everyone):
                plan.notes.append(f"{name} is tied to {twin}, and stored once")
                continue
            if 2 * shared < len(names):
                raise ValueError(
                    f"{printable(first.label)} and {printable(lacking.label)} share {shared} of {len(names)} tensors "
                    f"(tensor {name!r} is not in both): merge models of one architecture"
                )
            raise ValueError(
                f"{lacking.where(name)} lacks tensor {name!r}, which {owners[0].where(name)} has: merge models of one "
                "architecture, or copy it (copy='REGEX', --copy REGEX)"
            )
        for source in owners[1:]:
            if source.shape(name) != shape:
                raise ValueError(_shapes(name, owners[0], source))
        floats = [source.layout[name][0] in _FLOATS for source in owners]
        if all(floats):
            plan.items.append(Item(name, _out(kind, dtype), shape))
            continue
        odd = next(source for source, is_float in zip(owners, floats, strict=True) if not is_float)
        of = odd.layout[name][0]
        if of.is_floating_point or of.is_complex or any(floats):
            raise ValueError(f"{odd.where(name)}: tensor {name!r} is {of}: convert it to float32 first")
        plan.items.append(Item(name, kind, shape, owners[0]))
        if any(not torch.equal(owners[0][name], source[name]) for source in owners[1:]):
            plan.notes.append(f"{name} ({kind}) differs between the inputs: that of {first.label} is kept")
    if not any(item.source is None for item in plan.items):
        raise ValueError(
            f"nothing to merge in {printable(first.label)}: no tensor of floating type is in all inputs"
        )
    return plan


def _out(kind: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and kind in _FLOATS else kind


def _check_configs(everyone: Sequence[Source]) -> None:
    kinds: dict[str, Source] = {}
    for source in everyone:
        config = source.config
        if config.get("quantization_config"):
            raise ValueError(
                f"{printable(source.label)} is quantised (config.json): merge the models before quantisation"
            )
        if kind := config.get("model_type"):
            kinds.setdefault(str(kind), source)
    if len(kinds) > 1:
        (kind, one), (other, two) = list(kinds.items())[:2]
        raise ValueError(
            f"{printable(one.label)} is {kind!r} and {printable(two.label)} is {other!r} (config.json): merge models of one "
            "architecture"
        )


def _shapes(name: str, one: Source, two: Source) -> str:
    a, b = one.shape(name), two.shape(name)
    line = f"tensor {name!r} is {a} in {one.where(name)} and {b} in {two.where(name)}"
    if a[1:] == b[1:] and EMBEDDING.search(name):
        return f"{line}: the vocabularies differ; vocab='base' or 'union' (--vocab) matches tokens"
    return f"{line}: merge models of one shape, or copy it (copy='REGEX', --copy REGEX)"


def _twin(name: str, owners: Sequence[Source], everyone: Sequence[Source]) -> str | None:
    """The tensor to which `name` is tied where only some inputs store it twice."""
    shape = owners[0].shape(name)
    if len(shape) != 2 or not EMBEDDING.search(name):
        return None
    for twin in owners[0]:
        if twin == name or not EMBEDDING.search(twin) or not all(twin in source for source in everyone):
            continue
        if all(
            owner.layout[twin] == owner.layout[name] and torch.equal(owner[name], owner[twin])
            for owner in owners
        ):
            return twin
    return None
