"""Other searches of the learning rate: by the first seed alone, where runs cost much; by all, where little validates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from unfused.claims.lab.tuning import Arm, TuningWorld, measure, select

if TYPE_CHECKING:
    from unfused.claims.lab import Lab

__all__ = ["measure_at_common_rate", "measure_at_first_seeds_rate"]


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


def measure_at_common_rate(
    lab: Lab,
    world: TuningWorld,
    arms: Mapping[str, Arm],
    seeds: Sequence[int],
    steps: int,
    by: str = "valid",
    higher_is_better: bool = True,
) -> dict[str, list[dict[str, float]]]:
    """Metrics per arm and seed at the rate whose mean over all seeds' validation is best; ties go to the lower rate."""
    sign = 1 if higher_is_better else -1
    found = {}
    for name, grid in measure(lab, world, arms, seeds, steps).items():
        best = max(sorted(grid), key=lambda lr: sign * sum(row[by] for row in grid[lr]))
        found[name] = [{**row, "lr": best} for row in grid[best]]
    return found
