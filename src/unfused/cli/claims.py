"""`unfused claims`: re-test what the papers promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def register(app: typer.Typer) -> None:
    @app.command("claims")
    def command(
        slugs: list[str] = typer.Argument(
            None, metavar="[SLUG]...", help="Which claims; all, if none is named."
        ),
        scale: str = typer.Option("desk", help="smoke (seconds), desk (minutes on 2 cores) or gpu."),
        seeds: int | None = typer.Option(
            None, min=1, help="How many seeds; by default what the scale needs."
        ),
        data: Path | None = typer.Option(None, help="Folder with the real data; else $UNFUSED_DATA."),
        recording: bool | None = typer.Option(
            None,
            "--record/--no-record",
            help="Keep the result as the project's own; by default desk and gpu runs with the usual seeds.",
        ),
        listing: bool = typer.Option(False, "--list", help="Show the recorded verdicts and run nothing."),
        as_json: bool = typer.Option(False, "--json", help="Print JSON on standard output."),
    ) -> None:
        """Run the claims of the methods against their papers' own baselines and print the verdicts."""
        from rich.console import Console

        from unfused.claims import _runner

        if listing:
            _list(_runner.find(slugs or ()), as_json)
            return
        console = Console(stderr=as_json)
        verdicts, failures = _runner.run(
            slugs or (), scale=scale, seeds=seeds, data_dir=data, recording=recording, console=console
        )
        if as_json:
            typer.echo(json.dumps([v.to_dict() for v in verdicts], ensure_ascii=False, indent=1))
        else:
            for verdict in verdicts:
                console.print(verdict.summary(), markup=False)
        for slug, reason in failures.items():
            typer.echo(f"unfused: claim {slug} did not finish: {reason}", err=True)
        if failures:
            raise typer.Exit(1)


def _list(claims: list[Any], as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from unfused.claims._runner import stale

    rows = []
    for claim in claims:
        found = claim.recorded()
        for section in found["sections"] if found else [None]:
            row = {"slug": claim.slug, "claim": claim.sentence, "verdict": "not run"}
            if section:
                row["verdict"] = "holds" if section["holds"] else "refuted"
                row |= {name: section[name] for name in ("world", "scale", "seeds", "date")}
                row["changed_since"] = stale(section)
            rows.append(row)
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    table = Table("claim", "world", "verdict", "run", box=None, pad_edge=False)
    for row in rows:
        run = f"{row['scale']}, {row['seeds']} seeds, {row['date']}" if "scale" in row else ""
        run += f"; stale: {', '.join(row['changed_since'])} changed since" if row.get("changed_since") else ""
        table.add_row(row["slug"], row.get("world", ""), row["verdict"], run)
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: do not wrap at 80
    console.print(table)
