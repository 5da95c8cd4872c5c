"""`unfused diagnose NAME`: what training did to a model, as a table, JSON, or a page to open."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from unfused.diagnose._report import commands

KINDS: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "path": Path}
KINDS |= {f"{name}s": list[kind] for name, kind in KINDS.items() if name != "bool"}  # type: ignore[valid-type]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        name="diagnose",
        help="Find out what training did to a model: one command for each diagnosis.",
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for slug, described in commands().items():
        group.command(slug, help=described["summary"])(_command(slug, described))
    app.add_typer(group)


def _command(slug: str, described: dict[str, Any]) -> Callable[..., None]:
    """A function with the options of one diagnosis, as typer reads them from a signature."""
    options = {name: _option(argument) for name, argument in described["arguments"].items()}
    options["html"] = (Path | None, typer.Option(None, help="Write one self-contained page there."))
    options["json"] = (Path | None, typer.Option(None, help="Write all numbers there, as a JSON list."))

    def command(**given: Any) -> None:
        page, numbers = given.pop("html"), given.pop("json")
        _run(slug, described, given, page, numbers)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)
        for name, (kind, option) in options.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {name: kind for name, (kind, _) in options.items()}
    return command


def _option(argument: dict[str, Any]) -> tuple[Any, Any]:
    kind = KINDS[argument["type"]]
    if "default" not in argument:
        return kind, typer.Option(..., help=argument["help"])
    default = argument["default"]
    return (kind | None if default is None else kind), typer.Option(default, help=argument["help"])


def _run(
    slug: str, described: dict[str, Any], given: dict[str, Any], page: Path | None, numbers: Path | None
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from unfused.data.files import atomic_write
    from unfused.diagnose._report import Report, save_html

    for name, path in (("html", page), ("json", numbers)):
        if path is not None and path.is_dir():
            raise ValueError(f"--{name} {path}: a folder; name a file")
    function = getattr(importlib.import_module(described["module"]), described["function"])
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        if "progress" in inspect.signature(function).parameters:
            task = bar.add_task(slug, total=None)
            given["progress"] = lambda name, done, total: bar.update(
                task, description=name, completed=done, total=total
            )
        found = function(**given)
    reports: list[Report] = list(found) if isinstance(found, list | tuple) else [found]
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: do not wrap at 80
    for report in reports:
        table = report.table(rich=True)
        table.title = None  # it would be wrapped to the table's width
        console.print(report.headline(), style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(table)
        for note in report.notes():
            console.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
    if numbers is not None:
        with atomic_write(numbers) as file:
            file.write("[" + ",\n".join(report.to_json() for report in reports) + "]\n")
        console.print(f"numbers: {numbers}", markup=False, highlight=False)
    if page is not None:
        save_html(page, reports, f"{slug}: {described['summary']}")
        console.print(f"page: {page}", markup=False, highlight=False)
