"""What skill localization gives back: a region, and the map of several."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from unfused.diagnose import _region as regions
from unfused.diagnose._report import Report, axes
from unfused.diagnose._skill_task import Params, state_of

__all__ = ["SkillMap", "SkillRegion"]


@dataclasses.dataclass(frozen=True, eq=False)
class SkillRegion(Report):
    """The result of `localize_skill`.

    Attributes
    ----------
    size : float
        Share of the eligible entries in the region.
    entries, eligible : int
    copied_entries : int
        Of tensors that are copied whole; not in `size`.
    gini, top_share : float
        Of |d| over eligible entries: 0 is all alike, near 1 is a few; the part of |d|^2 in the largest 1 %.
    metric : str
    scores : tuple of dict
        One row per arm: `arm`, `entries`, the metric, `ece`, `loss`, `agreement` with the tuned model, and the metric of each
        out-of-distribution set.
    history : tuple of dict
        Of each step: `step`, `loss`, `entries`, `train`, `valid`, `kept`.
    settings : dict
    shapes : dict of str to list of int
        Eligible tensors.
    indices, values : dict of str to Tensor (m,)
        Flat positions and the tuned values there; not in the JSON.
    copied : dict of str to Tensor
    """

    size: float
    entries: int
    eligible: int
    copied_entries: int
    gini: float
    top_share: float
    metric: str
    scores: tuple[dict[str, Any], ...]
    history: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)
    settings: dict[str, Any]
    shapes: dict[str, list[int]] = dataclasses.field(repr=False)
    indices: regions.Indices = dataclasses.field(repr=False, metadata={"json": False})
    values: Params = dataclasses.field(repr=False, metadata={"json": False})
    copied: Params = dataclasses.field(repr=False, metadata={"json": False})

    @property
    def mask(self) -> dict[str, Tensor]:
        """One bool tensor per eligible tensor."""
        found = {}
        for name, shape in self.shapes.items():
            flat = torch.zeros(math.prod(shape), dtype=torch.bool)
            flat[self.indices.get(name, torch.empty(0, dtype=torch.long))] = True
            found[name] = flat.view(shape)
        return found

    def graft(self, base: Any, tuned: Any = None) -> Params:
        """State dict of the base with the region's tuned values; of `tuned` if it is given, else those kept."""
        values, copied = self.values, self.copied
        if tuned is not None:
            state = state_of(tuned)
            values = {name: state[name].detach().flatten()[where] for name, where in self.indices.items()}
            copied = {name: state[name] for name in self.copied}
        return regions.graft(state_of(base), self.indices, values, copied)

    def overlap(self, other: SkillRegion) -> float:
        """Share of this region's entries that are in the other one too; not symmetric."""
        return regions.overlap(self.indices, other.indices)

    def hold(self, model: nn.Module) -> AbstractContextManager[None]:
        """Train a model inside the block without moving the region.

        Continual learning: after each task put `region.graft(state before the task)` into the model, and train the next
        task under `region.hold(model)` of all regions so far.
        """
        return regions.hold(model, self.indices)

    def by_layer(self) -> Any:
        """A DataFrame: entries and density per layer and kind of tensor, LayerNorms for themselves."""
        import pandas as pd

        return pd.DataFrame(regions.densities(self.indices, self.shapes))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Keep positions, values and report in one safetensors file."""
        facts = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("indices", "values", "copied")
        }
        regions.save_region(path, self.indices, self.values, self.copied, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SkillRegion:
        """What `save` wrote."""
        indices, values, copied, facts = regions.load_region(path)
        given: dict[str, Any] = {
            **facts,
            "scores": tuple(facts["scores"]),  # type: ignore[arg-type]
            "history": tuple(facts["history"]),  # type: ignore[arg-type]
        }
        return cls(indices=indices, values=values, copied=copied, **given)

    def rows(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.scores]

    def headline(self) -> str:
        found = {row["arm"]: row[self.metric] for row in self.scores}
        reached = f"{found['graft']:.3f} {self.metric}, tuned {found['tuned']:.3f}, base {found['base']:.3f}"
        return f"{self.entries:,} of {self.eligible:,} entries ({self.size:.3g}) carry the skill to {reached}"

    def notes(self) -> list[str]:
        notes = [
            f"Movement: Gini index {self.gini:.2f}, {self.top_share:.0%} of |d|^2 in the top 1 % of entries. Where it is "
            "spread (plain AdamW), small regions fail; SGD or an L1 penalty on the movement concentrate it."
        ]
        if self.copied_entries:
            notes.append(
                f"{self.copied_entries:,} entries of {', '.join(sorted(self.copied))} are copied whole: they were new in "
                "training, or are the head."
            )
        return notes

    def pictures(self) -> dict[str, Callable[[Any], Any]]:
        return {"Share of entries in the region, by layer and kind of tensor": self.plot}

    def plot(self, ax: Any = None) -> Any:
        """Density of the region, layer x kind of tensor, on a logarithmic scale."""
        ax = axes(ax, 7.5, 4.2)
        cells = regions.densities(self.indices, self.shapes)
        layers = sorted({str(c["layer"]) for c in cells}, key=lambda x: (x == "-", int(x) if x != "-" else 0))
        kinds = list(dict.fromkeys(str(c["kind"]) for c in cells))
        grid = torch.full((len(layers), len(kinds)), float("nan"))
        for cell in cells:
            where = layers.index(str(cell["layer"])), kinds.index(str(cell["kind"]))
            grid[where] = math.log10(max(float(cell["density"]), 1e-9))  # type: ignore[arg-type]
        shown = ax.imshow(
            grid.numpy(), cmap="viridis", aspect="auto", vmin=min(-6.0, math.log10(max(self.size, 1e-9)))
        )
        ax.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=6)
        ax.set_yticks(range(len(layers)), layers, fontsize=7)
        ax.set(ylabel="layer")
        ax.figure.colorbar(shown, ax=ax, label="log10 of the share")
        return ax


@dataclasses.dataclass(frozen=True, eq=False)
class SkillMap(Report):
    """The result of `skill_map`.

    Attributes
    ----------
    tasks : tuple of str
    overlaps : dict of str to dict of str to float
        `overlaps[i][j]`: share of i's entries that are in j's region too.
    judged : dict of str to dict of str to float
        Grafted regions ("base", a task, "a + b") -> task -> metric.
    """

    tasks: tuple[str, ...]
    overlaps: dict[str, dict[str, float]]
    judged: dict[str, dict[str, float]]

    def headline(self) -> str:
        own = sum(self.judged[t][t] for t in self.tasks) / len(self.tasks)
        others = [self.judged[a][b] for a in self.tasks for b in self.tasks if a != b]
        rest = f", {sum(others) / len(others):.3f} on the others" if others else ""
        return f"A region gives {own:.3f} on its own task{rest}; all together {self._all():.3f}"

    def _all(self) -> float:
        row = self.judged[" + ".join(self.tasks)]
        return sum(row.values()) / len(row)

    def rows(self) -> list[dict[str, Any]]:
        return [{"grafted": name, **row} for name, row in self.judged.items()] + [
            {"grafted": f"overlap of {name} with", **row} for name, row in self.overlaps.items()
        ]

    def pictures(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "Metric of each task after grafting a region: localized skills make a strong diagonal": self.plot,
            "Share of a region (row) that is in another one": self._plot_overlaps,
        }

    def plot(self, ax: Any = None) -> Any:
        return _heat(axes(ax), self.judged, self.tasks)

    def _plot_overlaps(self, ax: Any) -> Any:
        return _heat(ax, self.overlaps, self.tasks)


def _heat(ax: Any, table: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> Any:
    grid = torch.tensor([[row[c] for c in columns] for row in table.values()])
    ax.imshow(grid.numpy(), cmap="viridis", aspect="auto", vmin=0, vmax=1)
    for i, row in enumerate(grid.tolist()):
        for j, value in enumerate(row):
            ax.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if value < 0.6 else "black",
            )
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    ax.set_yticks(range(len(table)), list(table))
    return ax
