"""What every diagnosis gives back: a frozen dataclass that is a table, a picture, JSON and a page.

A result subclasses `Report` and says `rows()`, `headline()` and `plot(ax=None)`; where it has more than one picture it says
`pictures()`, and what a reader must know goes into `notes()`. `table`, `to_json`, `to_html` and `save_html` follow from
these. A module becomes `unfused diagnose SLUG` by a literal `COMMAND` beside its `__all__`; it is read without importing the
module, so that the command line stays quick:

    COMMAND = {
        "function": "diagnose_files",      # of this module: called by keyword, gives a Report or a list of them
        "arguments": {
            "base": {"type": "str", "help": "Folder, file or hub id."},                # no default: must be given
            "k": {"type": "int", "default": 10, "help": "How many vectors."},          # --k 10
            "tuned": {"type": "strs", "help": "May be repeated."},                     # --tuned A --tuned B
        },
    }

Types are str, int, float, bool, path, and strs, ints, floats, paths for options that may be repeated (lists).
`--html`, `--json` and `--plot` are added to each.
"""

from __future__ import annotations

import ast
import base64
import dataclasses
import html
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unfused._lazy import public_modules
from unfused.data.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Report", "axes", "commands", "render_html", "save_html"]

PAGE_ROWS = 400  # of a table on the page; the JSON has all
TYPES = ("str", "int", "float", "bool", "path", "strs", "ints", "floats", "paths")


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """Base of the results. Fields with `metadata={"json": False}` (masks, whole vectors) stay out of the JSON."""

    def rows(self) -> list[dict[str, Any]]:
        """One dict per line of the table, all with the same keys."""
        raise NotImplementedError

    def headline(self) -> str:
        """The finding in one sentence."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What the reader must know to read the numbers rightly; plain text."""
        return []

    def pictures(self) -> dict[str, Callable[[Any], Any]]:
        """Caption -> function that draws on the axes it is given."""
        return {"": self.plot}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw on `ax`, or on a new figure; gives the axes."""
        raise NotImplementedError

    def table(self, rich: bool = False) -> Any:
        """The rows as a `pandas.DataFrame`, or with `rich=True` as a `rich.table.Table` to print."""
        rows = self.rows()
        if not rich:
            import pandas as pd

            return pd.DataFrame(rows)
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.headline()), box=None, pad_edge=False, title_justify="left")
        for name in rows[0] if rows else ():
            number = all(isinstance(row[name], int | float) for row in rows)
            table.add_column(Text(name), justify="right" if number else "left")
        for row in rows:
            table.add_row(*(Text(shown(value)) for value in row.values()))
        return table

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All fields as JSON text, written to `path` too if one is given. Numbers that are not finite become null."""
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("json", True)
        }
        value = {"kind": type(self).__name__, "headline": self.headline(), **fields}
        text = json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False)
        if path is not None:
            with atomic_write(path) as file:
                file.write(text + "\n")
        return text

    def to_html(self, title: str | None = None) -> str:
        """One self-contained page."""
        return render_html([self], title)

    def save_html(self, path: str | os.PathLike[str], title: str | None = None) -> None:
        """Write `to_html()` to `path`, whole or not at all."""
        save_html(path, [self], title)


def axes(ax: Axes | None, width: float = 6.0, height: float = 3.6) -> Axes:
    """`ax`, or that of a new pyplot figure of this size in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def plain(value: Any) -> Any:
    """Nests of dataclasses, mappings, sequences, tensors, arrays and scalars as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.metadata.get("json", True)
        }
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Iterable):
        return [plain(v) for v in value]
    return str(value)


def shown(value: Any) -> str:
    """A cell of a table: four figures of a number, "-" for what there is none of."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(v) for v in value)
    return str(value)


# -- the page ----------------------------------------------------------------------------------------------------------

STYLE = """
:root{--paper:#fffffb;--ink:#1b1b19;--soft:#66655f;--rule:#dbdad2;color-scheme:light}
body{margin:0 auto;max-width:1000px;padding:2.5rem 2rem 3rem;background:var(--paper);color:var(--ink);
font:16px/1.5 Charter,"Bitstream Charter","Iowan Old Style",Palatino,Cambria,Georgia,"Liberation Serif",serif;
overflow-wrap:break-word}
h1,h2{font-weight:400;font-style:italic;line-height:1.2}
h1{font-size:2rem;margin:0 0 .5rem}
h2{font-size:1.3rem;margin:2rem 0 .6rem}
figure{margin:1.2rem 0}
img{max-width:100%;background:#fff}
figcaption,.soft{color:var(--soft);font-size:.875rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font:.875rem/1.35 "Gill Sans",Optima,Candara,"Segoe UI",system-ui,sans-serif;
font-variant-numeric:tabular-nums lining-nums}
th,td{text-align:left;padding:.22rem .9rem .22rem 0;vertical-align:baseline;font-weight:400}
thead th{color:var(--soft);border-bottom:1px solid var(--ink)}
.n{text-align:right;white-space:nowrap}
td.w{white-space:pre-wrap;min-width:12rem}
""".replace("\n", "")


def render_html(reports: Sequence[Report], title: str | None = None) -> str:
    """One page of HTML for the reports, with style and pictures inside; it never asks the network and runs no script.

    Examples
    --------
    >>> @dataclasses.dataclass(frozen=True, eq=False)
    ... class Small(Report):
    ...     def rows(self):
    ...         return [{"matrix": "<q>", "n": 3}]
    ...
    ...     def headline(self):
    ...         return "Three & more."
    ...
    ...     def pictures(self):
    ...         return {}
    >>> page = Small().to_html()
    >>> "&lt;q&gt;" in page, "Three &amp; more." in page, "<q>" in page
    (True, True, False)
    """
    import unfused

    name = title or (type(reports[0]).__name__ if reports else "diagnosis")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        'style-src \'unsafe-inline\'"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body><h1>{escape(name)}</h1>"
    ]
    for report in reports:
        parts.append(f"<section><h2>{escape(report.headline())}</h2>")
        for caption, draw in report.pictures().items():
            parts.append(
                f'<figure><img alt="{escape(caption or report.headline())}" src="{picture(draw)}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
        parts += [f"<p>{escape(note)}</p>" for note in report.notes()]
        parts.append(_html_table(report.rows()) + "</section>")
    parts.append(f'<p class="soft">unfused {escape(unfused.__version__)}</p></body></html>\n')
    return "".join(parts)


def save_html(path: str | os.PathLike[str], reports: Sequence[Report], title: str | None = None) -> None:
    """Write the page of `render_html`, whole or not at all."""
    text = render_html(reports, title)
    with atomic_write(path) as file:
        file.write(text)


def escape(text: Any) -> str:
    """For HTML; lone surrogates of file names, which UTF-8 lacks, as question marks."""
    return html.escape(str(text).encode("utf-8", "replace").decode())


def picture(draw: Callable[[Any], Any], width: float = 7.5, height: float = 4.2) -> str:
    """A data URI of what `draw(ax)` draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _html_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    number = {name: all(isinstance(row[name], int | float) for row in rows) for name in rows[0]}
    head = "".join(f"<th{' class=n' if number[name] else ''}>{escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>"
        + "".join(
            f"<td class={'n' if number[name] else 'w'}>{escape(shown(value))}</td>"
            for name, value in row.items()
        )
        + "</tr>"
        for row in rows[:PAGE_ROWS]
    )
    rest = f'<p class="soft">and {len(rows) - PAGE_ROWS} more rows</p>' if len(rows) > PAGE_ROWS else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{rest}'
    )


# -- the commands ------------------------------------------------------------------------------------------------------


def commands() -> dict[str, dict[str, Any]]:
    """Slug -> the module's `COMMAND` with `module` (full name) and `summary` (docstring's first line) added.

    Examples
    --------
    >>> all({"module", "summary", "function", "arguments"} <= set(c) for c in commands().values())
    True
    """
    found = {}
    for path in public_modules(Path(__file__).parent):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == "COMMAND" for target in targets):
                command = ast.literal_eval(node.value)  # type: ignore[attr-defined]
                for name, argument in command["arguments"].items():
                    if argument["type"] not in TYPES:
                        raise ValueError(f"{path.name}: type of {name!r} is none of {', '.join(TYPES)}")
                summary = (ast.get_docstring(tree) or "").split("\n")[0].partition(": ")[2]
                module = f"unfused.diagnose.{path.stem}"
                found[path.stem.replace("_", "-")] = {"module": module, "summary": summary, **command}
    return found
