"""The run on one screen of a terminal: after reading, and at the end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unfused.workflow import report_views as views
from unfused.workflow import wording
from unfused.workflow.wording import is_number, visible

if TYPE_CHECKING:
    from rich.console import Console

    from unfused.workflow.report import ReportData

__all__ = ["print_summary"]

WHISKER = 20  # characters of the dot-and-whisker column
QUEUE = 5


def print_summary(data: ReportData, console: Console | None = None, folder: Path | None = None) -> None:
    """Print what is known so far: the files, the comparison, the next items to label, and where things lie.

    Parameters
    ----------
    data : ReportData
        What is empty is left out; after reading, only `summary` and `quarantine` are there.
    console : rich.console.Console, optional
        Default: standard error.
    folder : Path, optional
        The run folder, when there is something in it to look at.

    Examples
    --------
    >>> from rich.console import Console
    >>> from unfused.workflow.report import ReportData
    >>> data = ReportData(title="birds", summary={"modality": "audio", "files": 12, "usable": 12})
    >>> print_summary(data, Console(width=60))
    birds
    files 12 · recordings 12
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(stderr=True)
    facts = [f"{name} {value}" for name, value, _ in views.facts(data)]
    console.print(Text(visible(data.title), style="bold"))
    if facts:
        console.print(Text(" · ".join(facts)))
    if data.quarantine:
        reasons = Counter(str(reason).split(":")[0].strip() for _, reason in data.quarantine).most_common(4)
        said = ", ".join(f"{count} {visible(reason)}" for reason, count in reasons)
        console.print(Text(f"set aside: {said}; quarantine.csv names each", style="yellow"))
    if data.methods:
        _comparison(data, console)
    elif data.to_label:
        _queue(data, console)
    if folder is not None:
        for name in ("report.html", "to_label.csv", "model"):
            if (folder / name).exists():
                console.print(Text(f"{name:<13}{visible(folder / name)}"), soft_wrap=True)


def _comparison(data: ReportData, console: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    order = [name for name in data.methods if name in wording.BOUNDS] + wording.ranked(data.methods)
    accuracy = {name: data.methods[name]["accuracy"] for name in order}
    ends = {name: wording.accuracy_interval(accuracy[name]) for name in order}
    values = [v for name in order for v in (accuracy[name]["mean"], *(ends[name] or ())) if is_number(v)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="ellipsis", max_width=20, no_wrap=True)
    for heading in ("accuracy", "95 % interval", "", "time"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    best = wording.ranked(data.methods)[:1]
    for name in order:
        row = (
            visible(name),
            wording.score(accuracy[name]["mean"]),
            wording.span(ends[name]),
            _whisker(accuracy[name]["mean"], ends[name], low, high),
            wording.duration(data.methods[name].get("seconds")),
        )
        table.add_row(
            *map(Text, row), style="bold" if [name] == best else "italic" if name in wording.BOUNDS else ""
        )
    console.print(table)
    draws = max(len(accuracy[name].get("seeds") or ()) for name in order)
    console.print(Text(f"{wording.interval_note(draws, data.interval)}; {data.pool}"))
    for pair in data.paired[:6]:
        console.print(Text(wording.paired_sentence(pair, views.paired_draws(pair, data.methods))))


def _whisker(mean: float | None, ends: tuple[float, float] | None, low: float, high: float) -> str:
    """A mean with its interval on a scale shared by all rows: ``├──●──┤``."""
    if not is_number(mean):
        return ""

    def at(value: float) -> int:
        return round((WHISKER - 1) * (value - low) / ((high - low) or 1.0))

    line = [" "] * WHISKER
    if ends:
        left, right = at(ends[0]), at(ends[1])
        line[left : right + 1] = "─" * (right - left + 1)
        line[left], line[right] = "├", "┤"
    line[at(float(mean))] = "●"  # type: ignore[arg-type]
    return "".join(line)


def _queue(data: ReportData, console: Any) -> None:
    from rich.text import Text

    console.print(Text(wording.headline(data.summary, data.methods, data.to_label)))
    for row in data.to_label[:QUEUE]:
        console.print(
            Text(f"  {row['rank']:>3}  {visible(row['path'])}  ({visible(row['reason'])})"), soft_wrap=True
        )
    if len(data.to_label) > QUEUE:
        console.print(Text(f"       and {len(data.to_label) - QUEUE:,} more"))
