"""`unfused label`: which clips to label next, and how to go on."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    @app.command("label")
    def label_command(
        run: str = typer.Argument(..., help="Run folder that `unfused adapt` wrote: runs/NAME."),
        count: int = typer.Option(10, "--count", "-n", help="How many to show."),
    ) -> None:
        """Show the clips most worth labelling, best first: the top of the run's to_label.csv."""
        from unfused.data.files import printable
        from unfused.data.tables import read_table
        from unfused.workflow.run_folder import OWN_COLUMNS
        from unfused.workflow.wording import passage

        queue = Path(run) / "to_label.csv"
        if not queue.is_file():
            raise ValueError(f"run={run!r} has no to_label.csv: give a folder that `unfused adapt` wrote")
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        table = read_table(queue)
        rows = zip(
            table.column("path"), table.column("label"), table.column("reason"), table.rows, strict=True
        )
        others = [i for i, name in enumerate(table.columns) if name.strip().lower() not in OWN_COLUMNS]
        for path, _, reason, cells in [row for row in rows if not (row[1] or "").strip()][:count]:
            shown = passage(" · ".join(cell for i in others if (cell := cells[i])), 100)
            typer.echo("\t".join(filter(None, (printable(path or ""), shown, reason))))
        typer.echo(
            f"fill in the column `label` of {queue} and run the same `unfused adapt` command again", err=True
        )
