"""What each section of the report shows, as plain numbers and strings for the template to lay out.

Positions are percentages of a chart's width, so that charts stretch with the page while their type does not.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from unfused.workflow import wording
from unfused.workflow.wording import is_number, natural, visible

if TYPE_CHECKING:
    from unfused.workflow.report import ReportData

QUEUE_OPEN, QUEUE_MOST = 20, 200  # rows of the queue shown at once, and at most
QUARANTINE_OPEN, QUARANTINE_MOST = 8, 500
GROUPS_MOST = 24
MATRIX_MOST = 40  # classes; beyond that only the hardest and the most frequent confusions are listed
CURVE_POINTS = 240


def facts(data: ReportData) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what the folder holds."""
    summary = dict(data.summary)
    modality = str(summary.pop("modality", ""))
    used = sum((summary.pop("per_class", None) or {}).values())
    facts: list[tuple[str, str, str]] = []

    def fact(key: str, name: str, remark: str = "", form: Callable[[Any], str] = "{:,}".format) -> None:
        value = summary.pop(key, None)
        if value is not None and (value or key in ("files", "usable", "labelled")):
            facts.append((name, form(value), remark))

    fact("files", "rows read" if wording.units(modality)[0] == "row" else "files")
    fact("usable", wording.noun(modality))
    fact("quarantined", "set aside")
    labelled = summary.get("labelled")
    fact("labelled", "labels", f"{used:,} trained on" if used and used != labelled else "")
    fact("held_out", "held out", "to test on")
    fact("classes", "classes")
    fact("groups", "groups", "never split")
    fact("seconds_total", "length in all", form=wording.duration)
    lengths = summary.pop("duration_s", None)
    if isinstance(lengths, Mapping) and is_number(lengths.get("median")):
        ends = [lengths.get("min"), lengths.get("max")]
        remark = (
            f"{wording.duration(ends[0])} to {wording.duration(ends[1])}" if all(map(is_number, ends)) else ""
        )
        facts.append(("median length", wording.duration(lengths["median"]), remark))
    for key, value in summary.items():
        if is_number(value) or isinstance(value, str):
            facts.append((key.replace("_", " "), f"{value:,}" if is_number(value) else visible(value), ""))
    return facts


def per_class(counts: Mapping[str, int]) -> dict[str, Any] | None:
    """Labels trained on in each class; bars only where the classes differ."""
    if not counts:
        return None
    most = max(counts.values()) or 1
    return {
        "same": most if len(set(counts.values())) == 1 else None,
        "count": len(counts),
        "rows": [
            {"label": visible(label), "count": counts[label], "width": 100 * counts[label] / most}
            for label in sorted(counts, key=lambda label: (-counts[label], natural(label)))
        ],
    }


def quarantine(rows: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    if not rows:
        return None
    reasons = Counter(str(reason).split(":")[0].strip() for _, reason in rows)
    shown = [(visible(path), visible(reason)) for path, reason in rows[:QUARANTINE_MOST]]
    return {
        "count": len(rows),
        "reasons": [(visible(reason), count) for reason, count in reasons.most_common(8)],
        "open": shown[:QUARANTINE_OPEN],
        "more": shown[QUARANTINE_OPEN:],
        "unshown": len(rows) - len(shown),
    }


@dataclass(frozen=True)
class _Axis:
    """A linear scale from values to percent of a chart's width, with round ticks."""

    low: float
    high: float
    step: float

    @classmethod
    def around(cls, values: Iterable[float], most: int = 6) -> _Axis:
        values = list(values)
        low, high = min(values), max(values)
        width = (high - low) or max(abs(high) * 0.1, 0.01)
        magnitude = 10 ** math.floor(math.log10(width / most))
        step = next(s * magnitude for s in (1, 2, 5, 10) if width / (s * magnitude) <= most)
        return cls(low - 0.03 * width, high + 0.03 * width, step)

    def __call__(self, value: float) -> float:
        return 3 + 94 * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[dict[str, Any]]:
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        numbers = range(math.ceil(self.low / self.step), math.floor(self.high / self.step) + 1)
        return [
            {"x": self(n * self.step), "text": wording.score(n * self.step + 0.0, digits), "zero": n == 0}
            for n in numbers
        ]


def comparison(data: ReportData) -> dict[str, Any] | None:
    if not data.methods:
        return None
    bounds = [name for name in data.methods if name in wording.BOUNDS]
    order = bounds + wording.ranked(data.methods)
    accuracies = {name: data.methods[name]["accuracy"] for name in order}
    seeds = {name: [s for s in accuracies[name].get("seeds") or [] if is_number(s)] for name in order}
    ends = {name: wording.accuracy_interval(accuracies[name]) for name in order}
    values = [v for name in order for v in (*seeds[name], *(ends[name] or ()))]
    values += [accuracies[name]["mean"] for name in order if is_number(accuracies[name]["mean"])]
    axis = _Axis.around(values or [0.0, 1.0])

    def row(name: str) -> dict[str, Any]:
        method, mean, interval = data.methods[name], accuracies[name]["mean"], ends[name]
        balanced = method.get("balanced_accuracy")
        return {
            "name": visible(name),
            "bound": name in bounds,
            "first": name not in bounds and name == order[len(bounds)],
            "mean": wording.score(mean),
            "interval": wording.span(interval),
            "balanced": wording.score(balanced["mean"] if isinstance(balanced, Mapping) else balanced),
            "seconds": wording.duration(method.get("seconds")),
            "memory": wording.memory(method.get("peak_mib") or None),
            "parameters": wording.quantity(method.get("parameters") or None),
            "at": axis(mean) if is_number(mean) else None,
            "whisker": (axis(interval[0]), axis(interval[1])) if interval else None,
            "seeds": [axis(s) for s in seeds[name]],
            "said": f"{wording.score(mean)}, interval {wording.span(interval)}; "
            f"draws: {', '.join(map(wording.score, seeds[name])) or wording.DASH}",
        }

    draws = max(map(len, seeds.values()))
    classes = data.summary.get("classes")
    chance = 1 / classes if classes else None
    shown = [name for name in order if ends[name]]
    return {
        "rows": [row(name) for name in order],
        "count": len(order) - len(bounds),
        "bounds": [(visible(name), wording.BOUNDS[name]) for name in bounds],
        "ticks": axis.ticks(),
        "has_balanced": any(data.methods[name].get("balanced_accuracy") is not None for name in order),
        "note": wording.interval_note(draws, data.interval),
        "draws": draws,
        "has_interval": bool(shown),
        "chance": chance,
        "chance_at": axis(chance) if chance and axis.low <= chance <= axis.high else None,
        "paired": _paired(data),
    }


def _paired(data: ReportData) -> dict[str, Any] | None:
    if not data.paired:
        return None
    ends = [wording.paired_interval(pair) for pair in data.paired]
    axis = _Axis.around(
        [0.0, *(float(p["mean"]) for p in data.paired), *(e for pair in ends for e in pair or ())], 3
    )
    rows = []
    for pair, interval in zip(data.paired, ends, strict=True):
        rows.append(
            {
                "sentence": wording.paired_sentence(pair, paired_draws(pair, data.methods)),
                "at": axis(float(pair["mean"])),
                "whisker": (axis(interval[0]), axis(interval[1])) if interval else None,
                "clear": interval is not None and (interval[0] > 0 or interval[1] < 0),
            }
        )
    return {"rows": rows, "ticks": axis.ticks(), "zero": axis(0.0)}


def paired_draws(pair: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> int | None:
    """How many draws a paired difference is over: said by it, or what both methods have."""
    both = (
        methods[name]["accuracy"].get("seeds") or () for name in (pair["a"], pair["b"]) if name in methods
    )
    return pair.get("n") or min(map(len, both), default=0) or None


def groups(data: ReportData) -> dict[str, Any] | None:
    order = [name for name in wording.ranked(data.methods) if name in data.groups]
    order += [name for name in data.groups if name not in order]  # bounds, behind the methods
    if not order:
        return None

    def value(name: str, group: str) -> float | None:
        number = data.groups[name].get(group)
        return float(number) if is_number(number) else None  # type: ignore[arg-type]

    groups = list(dict.fromkeys(group for name in order for group in data.groups[name]))
    if len(groups) < 2:
        return None
    groups.sort(key=lambda group: (value(order[0], group) or 0.0, natural(group)))
    values = [v for group in groups for name in order if (v := value(name, group)) is not None]
    if not values:
        return None
    axis = _Axis.around(values)
    rows = []
    for group in groups[:GROUPS_MOST]:
        numbers = [value(name, group) for name in order]
        ranked = [n for n, name in zip(numbers, order, strict=True) if name not in wording.BOUNDS]
        best = max((n for n in ranked if n is not None), default=None)
        rows.append(
            {
                "group": visible(group),
                "cells": [{"text": wording.score(n), "best": n is not None and n == best} for n in numbers],
                "dots": [(axis(n), i) for i, n in enumerate(numbers) if n is not None],
            }
        )
    return {
        "methods": [visible(name) for name in order],
        "rows": rows,
        "ticks": axis.ticks(),
        "unshown": len(groups) - len(rows),
        "spread": max(v for g in groups if (v := value(order[0], g)) is not None)
        - min(v for g in groups if (v := value(order[0], g)) is not None)
        if any(value(order[0], g) is not None for g in groups)
        else None,
    }


def confusion(confusion: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows are shaded by their share of the row: recall on the diagonal, errors beside it."""
    if not confusion or not len(confusion["labels"]):
        return None
    labels = [visible(label) for label in confusion["labels"]]
    matrix = [[int(count) for count in row] for row in confusion["matrix"]]
    if len(matrix) != len(labels) or any(len(row) != len(labels) for row in matrix):
        raise ValueError(
            f"confusion: {len(labels)} labels need a {len(labels)} x {len(labels)} matrix, "
            f"not {len(matrix)} x {len(matrix[0]) if matrix else 0}"
        )
    totals = [sum(row) for row in matrix]
    columns = [sum(column) for column in zip(*matrix, strict=True)]
    rows = [
        {
            "label": labels[i],
            "total": totals[i],
            "recall": wording.score(row[i] / totals[i] if totals[i] else None, 2),
            "cells": [
                {"count": count, "share": count / totals[i] if totals[i] else 0.0, "right": i == j}
                for j, count in enumerate(row)
            ],
        }
        for i, row in enumerate(matrix)
    ]
    errors = sorted(
        ((count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j and count),
        key=lambda error: (-error[0], error[1:]),
    )
    recalls = sorted((matrix[i][i] / totals[i], i) for i in range(len(labels)) if totals[i])
    return {
        "labels": labels,
        "method": visible(confusion["method"]) if confusion.get("method") else None,
        "rows": rows if len(labels) <= MATRIX_MOST else None,
        # Without the zero where there are many columns: ".84".
        "precision": [
            wording.score(matrix[j][j] / n if n else None, 2)[len(labels) > 16 and 0 < matrix[j][j] < n :]
            for j, n in enumerate(columns)
        ],
        "upright": max(map(len, labels)) > 3,
        "right": sum(matrix[i][i] for i in range(len(labels))),
        "total": sum(totals),
        "errors": [(labels[i], labels[j], count, count / totals[i]) for count, i, j in errors[:8]],
        "hardest": [(labels[i], wording.score(recall, 2), totals[i]) for recall, i in recalls[:8]],
    }


def clusters(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    most = max(int(row["size"]) for row in rows) or 1
    known = [row for row in rows if is_number(row.get("purity"))]
    total = sum(int(row["size"]) for row in rows)
    weight = sum(int(row["size"]) for row in known)
    return {
        "count": len(rows),
        "median": sorted(int(row["size"]) for row in rows)[len(rows) // 2],
        "smallest": min(int(row["size"]) for row in rows),
        "largest": most,
        "purity": sum(int(row["size"]) * float(row["purity"]) for row in known) / weight if weight else None,
        "known": len(known),
        "total": total,
        "rows": [
            {
                "cluster": visible(row["cluster"]),
                "key": str(row["cluster"]),
                "size": int(row["size"]),
                "label": visible(row["label"]) if row.get("label") is not None else None,
                "purity": wording.score(row["purity"], 2) if is_number(row.get("purity")) else None,
                "labelled": row.get("labelled"),
                "width": 100 * int(row["size"]) / most,
                "pure": 100
                * int(row["size"])
                / most
                * (float(row["purity"]) if is_number(row.get("purity")) else 0.0),
            }
            for row in sorted(rows, key=lambda row: (-int(row["size"]), natural(str(row["cluster"]))))
        ],
    }


def queue(
    rows: Sequence[Mapping[str, Any]], media_of: Mapping[str, int], chart: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    if not rows:
        return None
    index = chart["index"] if chart else {}
    return {
        "count": len(rows),
        "unshown": max(0, len(rows) - QUEUE_MOST),
        "rows": [
            {
                "rank": row["rank"],
                "name": visible(row["path"]),
                "text": row.get("text"),
                "cluster": visible(row["cluster"]) if row.get("cluster") is not None else wording.DASH,
                "reason": visible(row.get("reason") or ""),
                "media": media_of.get(str(row["path"])),
                "point": index.get(str(row["path"])),
            }
            for row in rows[:QUEUE_MOST]
        ],
    }


_NO_CURVE = {"step", "epoch", "time", "seconds", "lr", "learning_rate", "grad_norm"}


def curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One panel per stage and number: coordinates in 0..100, y downwards. Terms of a loss are marked."""
    panels = []
    for stage, history in curves.items():
        keys = dict.fromkeys(key for row in history for key, value in row.items() if is_number(value))
        for key in keys:
            if key in _NO_CURVE:
                continue
            xy = [
                (float(row.get("step", i)), float(row[key]))
                for i, row in enumerate(history)
                if is_number(row.get(key))
            ]
            loss = [float(row["loss"]) for row in history if is_number(row.get("loss"))]
            if len(xy) < 2 or (
                key != "loss" and [y for _, y in xy] == loss
            ):  # a loss of one term is its term
                continue
            low, high = min(y for _, y in xy), max(y for _, y in xy)
            first, last = xy[0][0], xy[-1][0]

            line = partial(
                _polyline, left=first, width=(last - first) or 1.0, top=high, height=(high - low) or 1.0
            )
            smooth = _smooth(xy)
            panels.append(
                {
                    "title": visible(stage),
                    "key": visible(key.replace("_", " ")),
                    "term": bool(loss) and key != "loss" and re.search("acc|eval|valid", key) is None,
                    "line": line(_thin(xy)),
                    "smooth": line(smooth) if smooth else None,
                    "low": wording.on_scale(low, high - low),
                    "high": wording.on_scale(high, high - low),
                    "flat": low == high,
                    "end": wording.on_scale(xy[-1][1], high - low),
                    "end_y": 100 * (high - (smooth or xy)[-1][1]) / ((high - low) or 1),
                    "first": f"{first:,.0f}",
                    "last": f"{last:,.0f}",
                }
            )
    return panels


def _polyline(
    points: Iterable[tuple[float, float]], left: float, width: float, top: float, height: float
) -> str:
    return " ".join(f"{100 * (x - left) / width:.2f},{100 * (top - y) / height:.2f}" for x, y in points)


def _thin(xy: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """About `CURVE_POINTS` points: every stretch's lowest and highest, so that no spike is lost."""
    if len(xy) <= CURVE_POINTS:
        return list(xy)
    width = math.ceil(2 * len(xy) / CURVE_POINTS)
    kept = {0, len(xy) - 1}
    for start in range(0, len(xy), width):
        stretch = range(start, min(start + width, len(xy)))
        kept |= {min(stretch, key=lambda i: xy[i][1]), max(stretch, key=lambda i: xy[i][1])}
    return [xy[i] for i in sorted(kept)]


def _smooth(xy: Sequence[tuple[float, float]]) -> list[tuple[float, float]] | None:
    """Running median, for curves long enough to be noisy."""
    if len(xy) < 40:
        return None
    half, stride = len(xy) // 30, max(1, len(xy) // 120)
    result = []
    for i in [*range(0, len(xy) - 1, stride), len(xy) - 1]:
        # The window shrinks evenly on both sides towards the ends, so that the first and last values stay.
        reach = min(half, i, len(xy) - 1 - i)
        window = sorted(y for _, y in xy[i - reach : i + reach + 1])
        result.append((xy[i][0], window[len(window) // 2]))
    return result


def stages(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One row a stage; a method's repetitions ("scratch/0", "scratch/1", ...) are one row together."""
    if not stages:
        return None
    together: dict[str, list[Mapping[str, Any]]] = {}
    for stage in stages:
        together.setdefault(re.sub(r"/\d+$", "", str(stage["name"])), []).append(stage)
    seconds = {name: sum(float(row.get("seconds") or 0.0) for row in rows) for name, rows in together.items()}
    longest = max(seconds.values()) or 1.0

    def most(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
        return max((row[key] for row in rows if is_number(row.get(key))), default=None)

    def detail(rows: Sequence[Mapping[str, Any]]) -> str:
        draws = f"{len(rows)} draws" if len(rows) > 1 else ""
        return ", ".join(filter(None, (draws, visible(rows[0].get("detail") or ""))))

    return {
        "rows": [
            {
                "name": visible(name),
                "seconds": wording.duration(seconds[name]),
                "width": 100 * seconds[name] / longest,
                "memory": wording.memory(most(rows, "peak_mib") or None),
                "parameters": wording.quantity(most(rows, "parameters") or None),
                "detail": detail(rows),
                "reused": all(row.get("reused") for row in rows),
            }
            for name, rows in together.items()
        ],
        "total": wording.duration(sum(seconds.values())),
        "peak": wording.memory(most(stages, "peak_mib")),
        "any_reused": any(stage.get("reused") for stage in stages),
    }
