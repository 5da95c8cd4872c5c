"""A cheaper search of the learning rate, for claims with many arms: the first seed's validation chooses for all seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from unfused.claims.lab.tuning import Arm, TuningWorld, measure, select

if TYPE_CHECKING:
    from unfused.claims.lab import Lab

__all__ = ["measure_at_first_seeds_rate"]


def measure_at_first_seeds_rate(
    lab: Lab,
    world: TuningWorld,
    arms: Mapping[str, Arm],
    seeds: Sequence[int],
    steps: int,
    by: str = "valid",
    higher_is_better: bool = True,
) -> dict[str, list[dict[str, float]]]:
    """Metrics per arm and seed, as `select(measure(...))` gives them; the grid is run with the first seed alone."""
    found = select(measure(lab, world, arms, seeds[:1], steps), by, higher_is_better)
    chosen = {name: dataclasses.replace(arm, lrs=(found[name][0]["lr"],)) for name, arm in arms.items()}
    if seeds[1:]:
        rest = select(measure(lab, world, chosen, seeds[1:], steps), by, higher_is_better)
        found = {name: rows + rest[name] for name, rows in found.items()}
    return found
