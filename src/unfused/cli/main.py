"""The command `unfused`: finds the commands of this folder; a user's error is one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import typer

import unfused
import unfused.cli


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unfused {unfused.__version__}")
        raise typer.Exit


def make_app() -> typer.Typer:
    """The typer application, with the commands of every module of this package that has a `register(app)`."""
    app = typer.Typer(
        name="unfused",
        help="Adapt pretrained models with few labels or none.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ) -> None:
        pass

    for found in pkgutil.iter_modules(unfused.cli.__path__):
        if found.name != "main" and not found.name.startswith("_"):
            importlib.import_module(f"unfused.cli.{found.name}").register(app)
    return app


def main() -> None:
    """Entry point of the console script. `UNFUSED_DEBUG=1` shows the traceback of an error."""
    try:
        make_app()()
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("UNFUSED_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"unfused: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
