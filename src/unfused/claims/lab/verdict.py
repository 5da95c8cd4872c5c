"""What a claim reports: numbers per unit, intervals, paired differences and the verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.console import Group

LEVEL = 0.95
RESAMPLES = 10_000

Values = Mapping[str, "float | Sequence[float]"] | Sequence[float] | float
"""Numbers of one arm: one per seed, or `{group: one per seed}`, or `{group: number}`."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes
    ----------
    mean : float
    interval : tuple of float or None
        None where there are fewer than two values.
    values : dict of str to float
        The numbers behind it, by unit: `"seed"`, `"group"` or `"group/seed"`.
    """

    mean: float
    interval: tuple[float, float] | None
    values: dict[str, float] = field(default_factory=dict)

    @property
    def above_zero(self) -> bool:
        """Whether there is an interval and it lies above 0."""
        return self.interval is not None and self.interval[0] > 0

    def by_group(self) -> dict[str, float]:
        """Mean of each group; empty where the units are seeds alone."""
        groups: dict[str, list[float]] = {}
        for unit, value in self.values.items():
            group, slash, _ = unit.rpartition("/")
            if slash:
                groups.setdefault(group, []).append(value)
        return {group: float(np.mean(values)) for group, values in groups.items()}

    def __str__(self) -> str:
        low_high = f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]" if self.interval else ""
        return f"{self.mean:.3f}{low_high}"


def units(values: Values) -> dict[str, float]:
    """One number per named unit.

    Examples
    --------
    >>> units({"jackson": [0.7, 0.8], "theo": [0.6, 0.9]})
    {'jackson/0': 0.7, 'jackson/1': 0.8, 'theo/0': 0.6, 'theo/1': 0.9}
    >>> units([0.5, 0.6])
    {'0': 0.5, '1': 0.6}
    """
    if isinstance(values, Mapping):
        named: dict[str, float] = {}
        for group, value in values.items():
            if np.ndim(value) == 0:  # type: ignore[arg-type]
                named[str(group)] = float(value)  # type: ignore[arg-type]
            else:
                named.update({f"{group}/{i}": float(v) for i, v in enumerate(value)})  # type: ignore[arg-type]
    else:
        named = {str(i): float(v) for i, v in enumerate(np.ravel(values))}  # type: ignore[arg-type]
    if not named:
        raise ValueError("values is empty: an arm needs at least one number")
    bad = [unit for unit, value in named.items() if not np.isfinite(value)]
    if bad:
        raise ValueError(f"values are not finite at {bad}: find out why that run diverged")
    return named


def estimate(values: Values, method: str = "t", over: str = "units") -> Estimate:
    """Mean and 95 % interval of independent numbers.

    Parameters
    ----------
    values : sequence, or mapping of group to number(s)
    method : {"t", "bootstrap"}, default="t"
        Student's t, or the percentiles of 10,000 seeded resamples of the mean.
    over : {"units", "groups", "seeds"}, default="units"
        What is drawn at random. "units": every number by itself. "groups" or "seeds": first average within
        each, so that the interval speaks about a new group (a speaker) or a new seed (a draw of labels).

    Examples
    --------
    >>> print(estimate([0.7, 0.8, 0.9]))
    0.800 [0.552, 1.048]
    """
    named = units(values)
    if over == "units":
        sample = np.array(list(named.values()))
    elif over in ("groups", "seeds"):
        part = 0 if over == "groups" else -1
        keys = [unit.rpartition("/")[::2][part] or unit for unit in named]
        numbers = np.array(list(named.values()))
        sample = np.array([numbers[[k == key for k in keys]].mean() for key in dict.fromkeys(keys)])
    else:
        raise ValueError(f"over={over!r}: choose 'units', 'groups' or 'seeds'")
    return Estimate(float(np.mean(list(named.values()))), _interval(sample, method), named)


def _interval(sample: np.ndarray, method: str) -> tuple[float, float] | None:
    if method not in ("t", "bootstrap"):
        raise ValueError(f"method={method!r}: choose 't' or 'bootstrap'")
    if len(sample) < 2:
        return None
    if method == "t":
        from scipy.special import stdtrit

        half = stdtrit(len(sample) - 1, (1 + LEVEL) / 2) * sample.std(ddof=1) / np.sqrt(len(sample))
        low, high = sample.mean() - half, sample.mean() + half
    else:
        picks = np.random.default_rng(0).integers(len(sample), size=(RESAMPLES, len(sample)))
        low, high = np.quantile(sample[picks].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired(
    method: Values, baseline: Values | None = None, interval: str = "t", over: str = "units"
) -> Estimate:
    """Mean paired difference `method - baseline` and its 95 % interval, unit by unit.

    Raises
    ------
    ValueError
        Where the two were not measured on the same units.
    """
    ours = units(method)
    if baseline is not None:
        theirs = units(baseline)
        if ours.keys() != theirs.keys():
            odd = sorted(ours.keys() ^ theirs.keys())
            raise ValueError(f"baseline is not paired with method: units {odd} are in one of them only")
        ours = {unit: ours[unit] - theirs[unit] for unit in ours}
    return estimate(ours, interval, over)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one claim in one world.

    Attributes
    ----------
    slug, claim : str
        Which method, and the sentence that was tested.
    world : str
        The data it was tested on.
    metric : str
        What the numbers are; `higher_is_better` says which way is good.
    name, method : str, Estimate
        The method's name and its numbers.
    baselines : dict of str to Estimate
    differences : dict of str to Estimate
        Method minus baseline, paired unit by unit; turned round where lower is better: positive is a gain.
    interval : str
        How the intervals were made.
    holds : bool
    refuted_by : str
        The rule, written before the run, by which these numbers would refute the claim.
    ablations : dict
        Extra tables: title -> row -> Estimate or {column: number or text}.
    notes : tuple of str
    scale, seeds, seconds, date, versions
        How it was run. `seconds` counts work taken from the lab's cache as if done anew.
    """

    slug: str
    claim: str
    world: str
    metric: str
    name: str
    method: Estimate
    baselines: dict[str, Estimate]
    differences: dict[str, Estimate]
    interval: str
    holds: bool
    refuted_by: str
    higher_is_better: bool = True
    ablations: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    scale: str = "smoke"
    seeds: int = 1
    seconds: float = 0.0
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `Verdict.from_dict` is its inverse."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Verdict:
        fields = dict(record)
        fields["method"] = _as_estimate(fields["method"])
        for name in ("baselines", "differences"):
            fields[name] = {arm: _as_estimate(numbers) for arm, numbers in fields[name].items()}
        fields["ablations"] = {
            title: {row: _as_estimate(cells) if _is_estimate(cells) else cells for row, cells in rows.items()}
            for title, rows in fields.get("ablations", {}).items()
        }
        fields["notes"] = tuple(fields.get("notes", ()))
        return cls(**fields)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, column names, rows of text) of the result and of each ablation, for any renderer."""
        groups = list(self.method.by_group())
        shown = groups if len(groups) <= 8 else []
        rows = [[self.name, str(self.method), "", *(f"{self.method.by_group()[g]:.3f}" for g in shown)]]
        for arm, numbers in self.baselines.items():
            gain, by_group = self.differences.get(arm), numbers.by_group()
            rows.append(
                [
                    arm,
                    str(numbers),
                    _signed(gain) if gain else "",
                    *(f"{by_group[g]:.3f}" if g in by_group else "" for g in shown),
                ]
            )
        better = "" if self.higher_is_better else " (lower is better)"
        result = [(self.world, ["arm", self.metric + better, "gain of the method over it", *shown], rows)]
        for title, table in self.ablations.items():
            columns: list[str] = []
            for cells in table.values():
                columns += [
                    c for c in ([self.metric] if isinstance(cells, Estimate) else cells) if c not in columns
                ]
            body = []
            for row, cells in table.items():
                cells = {self.metric: str(cells)} if isinstance(cells, Estimate) else cells
                body.append([row, *(_cell(cells.get(column, "")) for column in columns)])
            result.append((title, ["", *columns], body))
        return result

    def summary(self) -> str:
        """One line: the verdict and what it was measured on."""
        word = "holds" if self.holds else "REFUTED"
        word = "it runs; a smoke run is no result" if self.scale == "smoke" else word
        where = f" on {self.world}" if self.world else ""
        arm = f" ({self.name})" if self.name != self.slug else ""
        return f"{self.slug}{arm}{where}: {word} ({self.scale}, {self.seeds} seeds, {self.seconds:.0f} s)"

    def table(self) -> Group:
        """A rich renderable: the sentence, the verdict, the arms, the ablations."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [
            Text(self.claim, style="italic"),
            Text(self.summary(), style="bold green" if self.holds else "bold red"),
            Text(f"refuted if {self.refuted_by}"),
        ]
        for title, columns, rows in self.tables():
            table = Table(title=title, title_justify="left")
            for i, column in enumerate(columns):
                table.add_column(column, justify="right" if i else "left")
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            parts.append(table)
        parts.append(Text(self.interval, style="dim"))
        parts += [Text(note, style="dim") for note in self.notes]
        return Group(*parts)


def as_row(cells: Any, interval: str, over: str) -> Any:
    """A row of an extra table: numbers per seed or per group become an Estimate, `{column: scalar}` stays."""
    if isinstance(cells, Estimate):
        return cells
    if isinstance(cells, Mapping) and all(np.ndim(value) == 0 for value in cells.values()):
        return {str(k): v if isinstance(v, str | int | type(None)) else float(v) for k, v in cells.items()}
    return estimate(cells, interval, over)


def _as_estimate(numbers: Mapping[str, Any]) -> Estimate:
    interval = numbers["interval"]
    return Estimate(numbers["mean"], tuple(interval) if interval else None, dict(numbers["values"]))


def _is_estimate(cells: Any) -> bool:
    return isinstance(cells, Mapping) and set(cells) == {"mean", "interval", "values"}


def _signed(gain: Estimate) -> str:
    low_high = f" [{gain.interval[0]:+.3f}, {gain.interval[1]:+.3f}]" if gain.interval else ""
    return f"{gain.mean:+.3f}{low_high}"


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
