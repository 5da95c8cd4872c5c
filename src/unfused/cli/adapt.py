"""`unfused adapt` and `unfused predict`: the main job."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer


def register(app: typer.Typer) -> None:
    @app.command("adapt")
    def adapt_command(
        source: str | None = typer.Argument(
            None,
            help="Folder (class folders give labels), manifest, table of texts or rows (CSV, TSV, JSONL, Parquet), "
            "hub data set id. Default: the embedded sample.",
        ),
        labels: str | None = typer.Option(
            None, help="CSV with columns path,label; blank: unlabelled. Of a table also a column."
        ),
        name: str | None = typer.Option(None, help="Name of the run folder. Default: that of SOURCE."),
        output: str | None = typer.Option(None, help="Folder of run folders. Default: runs."),
        modality: str | None = typer.Option(None, help="auto, audio, image, text or table."),
        text_column: str | None = typer.Option(
            None, help="Column of a table that holds the texts to classify."
        ),
        target: str | None = typer.Option(
            None,
            help="Column of the classes, blank where unknown; the other columns are what it is told from.",
        ),
        classes: str | None = typer.Option(
            None,
            help="Names of the classes, a comma list: with an encoder that reads texts too (CLIP) no label is needed.",
        ),
        template: list[str] | None = typer.Option(
            None, help="Sentence for the names, {} where the name goes; may be given several times."
        ),
        method: str | None = typer.Option(
            None,
            help="Comma list, the first one's model is kept: unfused, unfused-literal, unfused-propagate, fine-tune, "
            "linear-probe, scratch, classic, ceiling; on frozen features gda-clip, tfup, tfup-t, ogen, latent-label-shift, "
            "zero-shot; of texts list. Default: unfused,classic, with --classes gda-clip,tfup,zero-shot.",
        ),
        teacher: str | None = typer.Option(
            None,
            "--teacher",
            "--encoder",
            help="contrastive (default), decar, delores-s, delores-m, slicer, random, or path or hub id of an encoder of "
            "recordings, pictures or texts.",
        ),
        clusters: str | None = typer.Option(None, help="Number of clusters, or auto (default)."),
        propagate: bool | None = typer.Option(
            None,
            "--propagate/--literal",
            help="Targets of the student once labels exist: classes spread over the clusters, or the paper's cluster ids.",
        ),
        group: str | None = typer.Option(
            None, help="Regular expression on the path, or column: speaker, site, device."
        ),
        test: str | None = typer.Option(None, help="Held out: a fraction, a file of paths, or GROUP=VALUE."),
        labels_per_class: int | None = typer.Option(None, help="Hide all but so many labels a class."),
        inductive: bool | None = typer.Option(
            None, "--inductive/--transductive", help="Keep held-out files out of the unlabelled pool."
        ),
        seed: int | None = typer.Option(None, help="Default: 0."),
        seeds: int | None = typer.Option(None, help="Repetitions, for intervals. Default: 1."),
        width: int | None = typer.Option(None, help="Channels of the encoder. Default: 32."),
        pretrain_steps: int | None = typer.Option(None, help="Default: grows with the data."),
        distil_steps: int | None = typer.Option(None, help="Default: grows with the data."),
        fine_tune_steps: int | None = typer.Option(None, help="Default: 150."),
        queue: int | None = typer.Option(None, help="Rows of to_label.csv. Default: 50."),
        config: str | None = typer.Option(None, help="Settings of an earlier run: runs/NAME/config.yaml."),
        cache: str | None = typer.Option(
            None, help="Folder of the feature cache. Default: ~/.cache/unfused."
        ),
        threads: int | None = typer.Option(None, help="Processor threads. Default: all."),
        quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress."),
    ) -> None:
        """From recordings, pictures, texts or rows of a table and few labels, or none, to a model and a report."""
        from unfused.workflow.adapt import adapt

        if threads is not None:
            import torch

            if threads < 1:
                raise ValueError(f"threads={threads} must be at least 1")
            torch.set_num_threads(threads)
        with _warnings_of_one_line():
            run = adapt(
                source,
                labels,
                progress=not quiet,
                cache=cache,
                name=name,
                output=output,
                modality=modality,
                text_column=text_column,
                target=target,
                classes=classes,
                templates=template or None,
                method=method,
                teacher=teacher,
                clusters=clusters,
                propagate=propagate,
                group=group,
                test=test,
                labels_per_class=labels_per_class,
                inductive=inductive,
                seed=seed,
                seeds=seeds,
                width=width,
                pretrain_steps=pretrain_steps,
                distil_steps=distil_steps,
                fine_tune_steps=fine_tune_steps,
                queue=queue,
                config=config,
            )
        typer.echo(str(run.path))

    @app.command("predict")
    def predict_command(
        model: str = typer.Argument(
            ..., help="Folder that `unfused adapt` wrote: runs/NAME/model, or `unfused.label.save`."
        ),
        files: list[str] = typer.Argument(
            ..., help="Files to classify, or tables whose texts or rows to classify."
        ),
        csv: str | None = typer.Option(None, help="Write path,label,confidence and a column per class here."),
        text_column: str | None = typer.Option(
            None, help="Column of the texts, where the saved model does not know it."
        ),
    ) -> None:
        """Classify files with a model that `unfused adapt` made."""
        from unfused.data.files import Quarantine, printable, write_csv
        from unfused.workflow.estimators import AdaptedEstimator
        from unfused.workflow.predict import load

        adapted, bad = load(model), Quarantine()
        if text_column is not None:
            if not isinstance(adapted, AdaptedEstimator) or adapted.kind != "text":
                raise ValueError(f"text_column={text_column!r}: this model knows what it reads; leave it out")
            adapted.text_column = text_column
        names, probabilities = _probabilities(adapted, files, bad)
        rows = []
        for path, row in zip(names, probabilities, strict=True):
            if path in bad:
                rows.append([path, "", ""] + [""] * len(row))
            else:
                rows.append(
                    [path, adapted.classes[row.argmax()], f"{row.max():.4f}", *(f"{p:.6f}" for p in row)]
                )
        if csv is not None:
            write_csv(Path(csv), ("path", "label", "confidence", *adapted.classes), rows)
        else:
            for path, label, confidence, *_ in rows:
                if label:
                    typer.echo(f"{printable(path)}\t{label}\t{confidence}")
        for path, reason in bad.rows:
            print(f"unfused: {printable(path)}: {reason}", file=sys.stderr)
        if len(bad) >= len(names):
            raise typer.Exit(1)


def _probabilities(adapted: Any, files: list[str], bad: Any) -> tuple[list[str], Any]:
    """Names and class probabilities of files, or of the rows of tables; what is unusable goes to `bad`."""
    if adapted.kind not in ("text", "table", "array"):
        return files, adapted.predict_proba(files, bad)
    import numpy as np

    from unfused.data.files import Quarantine

    names, blocks = [], []
    for file in files:
        aside = Quarantine()
        ids, items = adapted.read_table(file, aside)
        found = adapted.predict_proba(items, aside)
        place = f"{file}: " if len(files) > 1 else ""
        for index in np.flatnonzero(np.isnan(found).any(1)).tolist():
            bad.add(place + ids[index], "an empty text")
        for row, reason in aside.rows:  # unreadable, and not among the ids
            bad.add(place + row, reason)
        names += [place + name for name in ids]
        blocks.append(found)
    return names, np.concatenate(blocks)


@contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Warnings as `unfused: TEXT`, without the place in the code that Python shows."""

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        print(f"unfused: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
