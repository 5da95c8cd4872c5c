"""`unfused methods`: the catalogue."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import typer

from unfused.catalog import FAMILIES, Method, methods


def register(app: typer.Typer) -> None:
    @app.command("methods")
    def command(
        family: str | None = typer.Option(None, help=f"Only this family: {', '.join(FAMILIES)}."),
        needs: list[str] = typer.Option(
            [],
            help="Only methods that need this: 'labels', say; 'no labels' turns it round. May be repeated.",
        ),
        as_json: bool = typer.Option(False, "--json", help="Print a JSON list instead of a table."),
    ) -> None:
        """List the methods: what each does, what it needs, whether its paper's claim held."""
        found = methods(family, ",".join(needs))
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(m) for m in found], indent=2, ensure_ascii=False))
        else:
            _print_table(found)


def _print_table(found: list[Method]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "family", "what it does", "needs", "claim", box=None, pad_edge=False)
    for m in found:
        table.add_row(m.slug, m.family, m.summary, ", ".join(m.needs), _verdict(m.claim))
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: do not wrap at 80
    console.print(table)
    console.print(f"{len(found)} method{'' if len(found) == 1 else 's'}", style="dim")


def _verdict(claim: dict[str, Any] | None) -> str:
    """One or two words: what the recorded run of the claim said."""
    from unfused.claims._runner import stale

    if not claim:
        return "not run"
    sections = claim["sections"]
    held = sum(bool(section["holds"]) for section in sections)
    word = f"{held} of {len(sections)} hold" if len(sections) > 1 else "holds" if held else "refuted"
    return word + (" (stale)" if any(stale(section) for section in sections) else "")
