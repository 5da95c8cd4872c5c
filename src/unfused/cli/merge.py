"""`unfused merge`: several fine-tuned checkpoints of one base to one, on a machine that holds none of them whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import typer


def register(app: typer.Typer) -> None:
    @app.command("merge", context_settings={"ignore_unknown_options": True})
    def merge_command(
        words: list[str] | None = typer.Argument(
            None,
            metavar="METHOD MODEL... [--PARAMETER VALUE]...",
            help="Method (see --methods), folders or hub ids of checkpoints or LoRA adapters, and the method's parameters: "
            "--scale 0.3, or one a model: --scale 0.3,0.5.",
        ),
        base: str | None = typer.Option(None, help="What all models were fine-tuned from."),
        out: str | None = typer.Option(None, help="Folder to make."),
        config: str | None = typer.Option(
            None, help="YAML instead of the above; mergekit's for methods that both have."
        ),
        dtype: str | None = typer.Option(
            None, help="float32, bfloat16, float16 or float64. Default: as in the base (or first model)."
        ),
        vocab: str | None = typer.Option(
            None, help="Match embeddings by tokens: base (its vocabulary) or union (all tokens)."
        ),
        copy: list[str] | None = typer.Option(
            None,
            help="Regular expression; tensors it finds are copied from the base, or the first that has them.",
        ),
        shard_size: str | None = typer.Option(None, help="Largest shard: 500MB, 5GB. Default: 5GB."),
        hashes: str | None = typer.Option(
            None, help="Of the inputs, for the model card: sampled (default) or full (SHA-256, slower)."
        ),
        rank: int | None = typer.Option(
            None, help="Of an adapter merged from adapters. Default: sum of theirs."
        ),
        threads: int | None = typer.Option(None, min=1, help="Processor threads. Default: all."),
        methods: bool = typer.Option(False, "--methods", help="List methods and their parameters."),
        quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress."),
    ) -> None:
        """Merge fine-tuned checkpoints, tensor by tensor, to a model that loads like any other. A killed merge goes on."""
        if methods:
            _list()
            return
        names, parameters = _parsed(words or [])
        options = {
            "out": out,
            "dtype": dtype,
            "vocab": vocab,
            "copy": copy or None,
            "shard_size": shard_size,
            "hashes": hashes,
            "rank": rank,
        }
        given = {key: value for key, value in options.items() if value is not None}
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        _merge(names, parameters, base, config, given, quiet)


def _merge(
    names: Sequence[str],
    parameters: dict[str, Any],
    base: str | None,
    config: str | None,
    given: dict[str, Any],
    quiet: bool,
) -> None:
    from unfused.cli._merge_config import Recipe, read_recipe
    from unfused.merge import merge_to_folder
    from unfused.merge._method import find

    if config is not None:
        if names:
            raise ValueError(f"config={config!r} names method and models already: leave out {names[0]!r}")
        recipe = read_recipe(config)
        recipe.base = base or recipe.base
        recipe.parameters |= parameters
    else:
        if len(names) < 2:
            raise ValueError(
                "give a method and its models, `unfused merge METHOD A B --out DIR`; --methods lists methods"
            )
        recipe = Recipe(names[0], base, list(names[1:]), parameters)
    options = recipe.options | given
    if (target := options.pop("out", None)) is None:
        raise ValueError("out is missing: give the folder to make (--out)")
    size = _bytes(options.pop("shard_size", "5GB"))
    if isinstance(options.get("copy"), str):
        options["copy"] = [options["copy"]]
    slug = find(recipe.method).slug
    with _bar(slug, quiet) as progress:
        done = merge_to_folder(
            slug,
            recipe.base,
            recipe.models,
            target,
            max_shard_bytes=size,
            progress=progress,
            per_tensor=_per_tensor(recipe),
            **options,
            **recipe.parameters,
        )
    typer.echo(str(done))


def _per_tensor(recipe: Any) -> Callable[[str], dict[str, Any]] | None:
    if recipe.per_tensor is None:
        return None
    from unfused.cli._merge_config import _LAYER
    from unfused.data.checkpoint_io import open_checkpoint

    first = (recipe.base or recipe.models[0]).partition("+")[0]
    with open_checkpoint(first) as checkpoint:
        layers = 1 + max((int(f[1]) for name in checkpoint if (f := _LAYER.search(name))), default=0)

    def settle(name: str) -> dict[str, Any]:
        return dict(recipe.per_tensor(name, layers))

    settle.description = recipe.description  # type: ignore[attr-defined]
    return settle


# ---- words


def _parsed(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Method and models, and the options that are the method's parameters."""
    names, parameters = [], {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--") or word == "--":
            names.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if name.startswith("no_"):
                name, value = name[3:], "false"
            elif left and not left[0].startswith("--"):
                value = left.pop(0)
            else:
                value = "true"
        parameters[name] = _value(value)
    return names, parameters


def _value(text: str) -> Any:
    """A number, a truth value, a list at commas, or the text.

    Examples
    --------
    >>> _value("3"), _value("1e-3"), _value("0.1,0.2"), _value("false"), _value("scores:accuracy")
    (3, 0.001, [0.1, 0.2], False, 'scores:accuracy')
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    if "," in text:
        parts = [_value(part) for part in text.strip("[]").split(",")]
        if all(isinstance(part, int | float) for part in parts):
            return parts
    return text


def _bytes(size: str | int) -> int:
    """
    Examples
    --------
    >>> _bytes("500MB"), _bytes("1.5 GB"), _bytes(10)
    (500000000, 1500000000, 10)
    """
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?)i?B?", str(size).strip(), re.I)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if not found or number <= 0:
        raise ValueError(f"shard_size={size!r} must be a size such as 500MB or 5GB")
    return max(1, int(number * 1000 ** " KMGT".index(found[2].upper() or " ")))


def _list() -> None:
    from unfused.merge._method import methods

    for slug, method in methods().items():
        typer.echo(f"{slug}: {method.summary}" + ("  (needs --base)" if method.base == "required" else ""))
        for name, parameter in method.parameters.items():
            required = parameter.default is parameter.empty
            typer.echo(f"    --{name.replace('_', '-')} {'...' if required else parameter.default}")


@contextmanager
def _bar(slug: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes, speed and the time left."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bars: list[Progress] = []
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    with ExitStack() as shown:  # nothing is drawn before there is something to say

        def update(done: int, total: int) -> None:
            if not bars:
                bars.append(shown.enter_context(Progress(*columns, console=Console(file=sys.stderr))))
                bars[0].add_task(slug, total=total)
            bars[0].update(bars[0].task_ids[0], completed=done)

        yield update
