"""Stage 6: what a run leaves for people and programs: model, report, metrics, tables."""

from __future__ import annotations

import datetime
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from unfused.data.files import Quarantine, atomic_write, write_csv, write_json
from unfused.workflow.arms import Bench, Draw, load_network
from unfused.workflow.modality import Corpus
from unfused.workflow.progress import no_bars_of_transformers
from unfused.workflow.report import ReportData, write_report
from unfused.workflow.run_folder import OWN_COLUMNS, RunFolder, beside
from unfused.workflow.settings import Settings
from unfused.workflow.wording import passage, units

MAP_POINTS = 2000


def write_products(
    *,
    settings: Settings,
    run: RunFolder,
    bench: Bench,
    draws: list[Draw],
    outcomes: dict[str, list[dict[str, Any]]],
    labels: list[str | None],
    quarantine: Quarantine,
    facts: dict[str, Any],
    console: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate and write everything; returns the metrics and the queue of clips to label."""
    scores = {name: [_score(bench, outcome) for outcome in rows] for name, rows in outcomes.items()}
    metrics = {
        "methods": {name: _method(scores[name], rows) for name, rows in outcomes.items()},
        "paired": _paired(scores),
        "stages": {result.name: _stage(result) for result in run.results},
        "data": _data(settings, bench, draws, facts),
    }
    first = next(iter(outcomes), "")
    probabilities = None
    if draws:
        probabilities = np.load(outcomes[first][0]["folder"] / "probabilities.npy")
    elif "student_probabilities" in bench.cache:
        probabilities = bench.cache["student_probabilities"]
    queue = _queue(settings, bench, labels, probabilities)
    _write_tables(run, bench, labels, probabilities if draws else None, queue)
    _write_model(settings, run.path, bench, outcomes, metrics)
    write_json(run.path / "metrics.json", metrics)
    data = _report_data(
        settings,
        run,
        bench,
        draws,
        outcomes,
        scores,
        metrics,
        labels,
        quarantine,
        queue,
        probabilities,
        facts,
    )
    write_report(run.path / "report.html", data)
    console.summary(data, run.path)
    return metrics, queue


# --- numbers ---------------------------------------------------------------------------------------------


def _score(bench: Bench, outcome: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of one outcome on the held-out clips whose label is known."""
    predicted = np.load(outcome["folder"] / "probabilities.npy").argmax(1)
    rows = np.flatnonzero(bench.test & (bench.truth >= 0))
    right = predicted[rows] == bench.truth[rows]
    recalls = [right[bench.truth[rows] == k].mean() for k in np.unique(bench.truth[rows])]
    return {
        "accuracy": float(right.mean()) if len(rows) else None,
        "balanced_accuracy": float(np.mean(recalls)) if recalls else None,
        "right": right,
        "predicted": predicted,
    }


def mean_and_interval(values: list[float], right: Any = None, seed: int = 0) -> dict[str, Any]:
    """Mean and 95 % interval: Student's t over repetitions; for a single one, a bootstrap over the held-out clips."""
    if len(values) > 1:
        from scipy import stats

        mean, error = float(np.mean(values)), float(stats.sem(values))
        half = float(stats.t.ppf(0.975, len(values) - 1)) * error
        # an accuracy cannot leave 0..1, a difference of two not -1..1
        floor = 0.0 if min(values) >= 0 and right is not None and right.dtype == bool else -1.0
        return {
            "mean": mean,
            "interval": [max(floor, mean - half), min(1.0, mean + half)],
            "seeds": list(values),
        }
    kinds, counts = np.unique(
        right, return_counts=True
    )  # drawn as counts: memory does not grow with the clips
    draws = (
        np.random.default_rng(seed).multinomial(len(right), counts / len(right), 2000) @ kinds / len(right)
    )
    return {"mean": values[0], "interval": np.quantile(draws, [0.025, 0.975]).tolist(), "seeds": list(values)}


def _method(scores: list[dict[str, Any]], outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "seconds": float(np.mean([o["seconds"] for o in outcomes])),
        "peak_mib": max(o["peak_mib"] for o in outcomes),
        "parameters": max(o["parameters"] for o in outcomes),
        "details": [o["details"] for o in outcomes],
    }
    for name in ("accuracy", "balanced_accuracy"):
        values = [s[name] for s in scores]
        if values[0] is not None:
            row[name] = mean_and_interval(values, scores[0]["right"])
        else:
            row[name] = {"mean": None, "interval": None, "seeds": []}
    return row


def _paired(scores: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """First method minus each other one, draw by draw."""
    names = list(scores)
    rows = []
    for other in names[1:]:
        pairs = list(zip(scores[names[0]], scores[other], strict=True))
        if pairs and pairs[0][0]["accuracy"] is not None:
            differences = [a["accuracy"] - b["accuracy"] for a, b in pairs]
            right = pairs[0][0]["right"].astype(float) - pairs[0][1]["right"]
            found = mean_and_interval(differences, right)
            rows.append(
                {
                    "a": names[0],
                    "b": other,
                    "mean": found["mean"],
                    "interval": found["interval"],
                    "n": len(pairs),
                }
            )
    return rows


def _stage(result: Any) -> dict[str, Any]:
    return {k: v for k, v in result.info.items() if k not in ("history", "curves", "key", "details")}


def _data(settings: Settings, bench: Bench, draws: list[Draw], facts: dict[str, Any]) -> dict[str, Any]:
    return {
        **facts,
        "source": settings.source.encode("utf-8", "backslashreplace").decode(),
        "classes": bench.classes,
        "labels_used": int(draws[0].visible.sum()) if draws else 0,
        "pool": int(bench.pool.sum()),
        "protocol": "inductive" if settings.inductive else "transductive",
        "clusters": len(bench.cache["clusters"].centroids),
        **(
            {"notes": [*bench.corpus.manifest.notes, *bench.modality.notes]}
            if units(bench.modality.name)[0] == "row"
            else {}
        ),
    }


# --- tables ----------------------------------------------------------------------------------------------


def _queue(
    settings: Settings, bench: Bench, labels: list[str | None], probabilities: np.ndarray | None
) -> list[dict[str, Any]]:
    """The clips most worth labelling, in order: cluster medoids, then the most uncertain."""
    from unfused.pretrain.unfused import label_queue

    clusters, pool = bench.cache["clusters"], np.flatnonzero(bench.pool)
    order = label_queue(
        clusters,
        None if probabilities is None else probabilities[pool],
        groups=None if bench.groups is None else bench.groups[pool],
        labelled=np.array([labels[i] is not None for i in pool]),
        n=settings.queue,
    )
    medoids = {int(members[clusters.distances[members].argmin()]) for members in _members(clusters)}
    return [
        {
            "rank": rank,
            "path": bench.corpus.manifest.paths[pool[item]],
            "cluster": int(clusters.ids[item]),
            "reason": f"middle of a cluster of {clusters.sizes[clusters.ids[item]]}"
            if item in medoids
            else "uncertain",
            "row": int(pool[item]),
        }
        for rank, item in enumerate(order.tolist(), 1)
    ]


def _members(clusters: Any) -> list[np.ndarray]:
    order = np.argsort(clusters.ids, kind="stable")
    return [part for part in np.split(order, np.cumsum(clusters.sizes)[:-1]) if len(part)]


def _write_tables(
    run: RunFolder,
    bench: Bench,
    labels: list[str | None],
    probabilities: np.ndarray | None,
    queue: list[dict[str, Any]],
) -> None:
    paths, ids = bench.corpus.manifest.paths, bench.cache["clusters"].ids
    cluster_of = dict(zip(np.flatnonzero(bench.pool).tolist(), ids.tolist(), strict=True))
    rows = []
    for row, name in enumerate(paths):
        cells: list[Any] = [name, cluster_of.get(row, ""), labels[row] or ""]
        if probabilities is not None:
            best = int(probabilities[row].argmax())
            cells += [bench.classes[best], f"{probabilities[row, best]:.4f}"]
        else:
            cells += ["", ""]
        rows.append(cells)
    write_csv(run.path / "pseudo_labels.csv", ("path", "cluster", "label", "predicted", "confidence"), rows)
    answers = run.collect_answers()  # once more: somebody may have been typing while this command ran
    shown = [beside(bench.modality.shown(bench.corpus, q["row"])) for q in queue]
    path, label, *rest = OWN_COLUMNS
    write_csv(
        run.path / "to_label.csv",
        (path, label, *(shown[0] if shown else ()), *rest),
        [
            (q["path"], answers.get(q["path"], ""), *cells.values(), q["cluster"], q["reason"])
            for q, cells in zip(queue, shown, strict=True)
        ],
    )


def _write_model(
    settings: Settings,
    path: Path,
    bench: Bench,
    outcomes: dict[str, list[dict[str, Any]]],
    metrics: dict[str, Any],
) -> None:
    """The model of the first method that has one, written aside and put in place when whole.

    A network in Hugging Face format; an estimator as arrays, with the encoder that makes its features or the name of it.
    """
    import os
    import shutil

    from unfused.workflow.model_card import model_card

    aside, final = path / ".model", path / "model"
    shutil.rmtree(aside, ignore_errors=True)
    found = ((name, rows[0]["folder"], rows[0].get("columns")) for name, rows in outcomes.items())
    kept = next(
        (one for one in found if any((one[1] / n).exists() for n in ("encoder.safetensors", "estimator"))),
        None,
    )
    if kept is None:
        shutil.rmtree(final, ignore_errors=True)  # that of an earlier command is not this one's
        return
    method, folder, columns = kept
    network = load_network(bench, folder)
    parameters: int | None
    if network is not None:
        parameters = _write_network(bench, network, aside)
    else:
        parameters = _write_estimator(settings, bench, folder / "estimator", columns, aside)
    card = model_card(
        name=settings.name,
        task=bench.modality.task,
        method=method,
        metrics=metrics,
        settings=settings.to_dict(),
        parameters=parameters,
        network=network is not None,
    )
    with atomic_write(aside / "README.md") as file:
        file.write(card)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)


def _write_network(bench: Bench, network: tuple[Any, Any], folder: Path) -> int:
    model = bench.modality.classifier(*network, bench.classes)
    with no_bars_of_transformers():
        model.save_pretrained(folder)
    if (processor := bench.modality.processor(bench.inputs.normaliser)) is not None:
        processor.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _write_estimator(settings: Settings, bench: Bench, saved: Path, columns: Any, folder: Path) -> int | None:
    import shutil

    import torch

    from unfused.workflow.estimators import AdaptedEstimator

    shutil.copytree(saved, folder)
    parameters = None
    if bench.teacher is not None:  # its head is not used
        encoder = bench.teacher()
        parameters = _write_network(
            bench, (encoder, torch.nn.Linear(encoder.embedding_dim, len(bench.classes))), folder / "encoder"
        )
    AdaptedEstimator.write(
        folder,
        bench.modality.name,
        [bench.classes[column] for column in columns],
        None if bench.teacher is not None else settings.teacher,
        getattr(bench.modality, "column", None),
    )
    return parameters


# --- report ----------------------------------------------------------------------------------------------


def summary_facts(
    modality: str,
    corpus: Corpus,
    groups: np.ndarray | None,
    labels: list[str | None],
    classes: list[str],
    held_out: np.ndarray,
    quarantine: Quarantine,
) -> dict[str, Any]:
    """What was read, for the console, the report and `metrics.json`."""
    found: dict[str, Any] = {
        "modality": modality,
        "files": len(corpus) + len(quarantine),
        "usable": len(corpus),
        "quarantined": len(quarantine),
        "labelled": sum(label is not None for label in labels),
        "held_out": int(held_out.sum()),
        "classes": len(classes),
        "groups": 0 if groups is None else len(set(groups)),
    }
    if (seconds := corpus.seconds).any():
        found["seconds_total"] = float(seconds.sum())
        found["duration_s"] = {
            "min": float(seconds.min()),
            "median": float(np.median(seconds)),
            "max": float(seconds.max()),
        }
    return found


def _report_data(
    settings: Settings,
    run: RunFolder,
    bench: Bench,
    draws: list[Draw],
    outcomes: dict[str, list[dict[str, Any]]],
    scores: dict[str, list[dict[str, Any]]],
    metrics: dict[str, Any],
    labels: list[str | None],
    quarantine: Quarantine,
    queue: list[dict[str, Any]],
    probabilities: np.ndarray | None,
    facts: dict[str, Any],
) -> ReportData:
    import unfused

    summary = {**facts, "clusters": metrics["data"]["clusters"]}
    if draws:
        used = Counter(draws[0].labels[draws[0].visible].tolist())
        summary["per_class"] = {bench.classes[k]: n for k, n in sorted(used.items())}
    curves = {r.name: r.info["history"] for r in run.results if r.info.get("history")}
    for method, rows in outcomes.items():
        for name, history in (rows[0].get("curves") or {}).items():
            curves[f"{method}: {name}"] = history
    methods = {
        name: {k: v for k, v in row.items() if k != "details"}
        for name, row in metrics["methods"].items()
        if row["accuracy"]["mean"] is not None
    }
    first = next(iter(scores), "")
    evaluated = bool(first and scores[first] and scores[first][0]["accuracy"] is not None)
    return ReportData(
        title=settings.name,
        created=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        version=unfused.__version__,
        command=_command(settings),
        config=settings.to_dict(),
        pool=metrics["data"]["protocol"],
        summary=summary,
        quarantine=quarantine.rows,
        stages=[
            {
                "name": r.name,
                "seconds": r.info.get("seconds"),
                "peak_mib": r.info.get("peak_mib") or None,
                "parameters": r.info.get("parameters") or None,
                "detail": _detail(r.info),
                "reused": r.reused,
            }
            for r in run.results
        ],
        curves=curves,
        methods=methods,
        interval="t" if len(draws) > 1 else "bootstrap",
        paired=metrics["paired"],
        groups=_by_group(bench, scores) if evaluated else {},
        confusion=_confusion(bench, scores[first][0]["predicted"], first) if evaluated else None,
        map=_map(bench, labels, probabilities if draws else None),
        to_label=[{**q, "preview": _preview(bench, q["row"]), **_text(bench, q["row"])} for q in queue],
        pseudo_label_summary=_cluster_summary(bench, labels),
    )


def _command(settings: Settings) -> str:
    return f"unfused adapt --config {shlex.quote(str(Path(settings.output) / settings.name / 'config.yaml'))}"


def _detail(info: dict[str, Any]) -> str:
    parts = []
    if "windows" in info:
        parts.append(f"{info['windows']:,} windows")
    if "dim" in info:
        parts.append(f"{info['dim']:,} features a clip")
    if "clusters" in info:
        parts.append(f"{info['clusters']} clusters")
    if "targets_correct" in (info.get("details") or {}):
        parts.append(
            f"spread labels right on {info['details']['targets_correct']:.1%} of the clips with known label"
        )
    return ", ".join(parts)


def _by_group(bench: Bench, scores: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    if bench.groups is None:
        return {}
    rows = np.flatnonzero(bench.test & (bench.truth >= 0))
    names = bench.groups[rows]
    return {
        method: {
            str(g): float(np.mean([s["right"][names == g].mean() for s in repeated]))
            for g in np.unique(names)
        }
        for method, repeated in scores.items()
    }


def _confusion(bench: Bench, predicted: np.ndarray, method: str) -> dict[str, Any]:
    rows = np.flatnonzero(bench.test & (bench.truth >= 0))
    matrix = np.zeros((len(bench.classes), len(bench.classes)), int)
    np.add.at(matrix, (bench.truth[rows], predicted[rows]), 1)
    return {"labels": bench.classes, "matrix": matrix.tolist(), "method": method}


def _map(bench: Bench, labels: list[str | None], probabilities: np.ndarray | None) -> list[dict[str, Any]]:
    """Two dimensions of the teacher's features by t-SNE; of large pools an even sample."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    clusters, pool = bench.cache["clusters"], np.flatnonzero(bench.pool)
    chosen = np.unique(np.linspace(0, len(pool) - 1, MAP_POINTS).astype(int))
    x = bench.features[pool[chosen]]
    x = PCA(min(30, *x.shape), random_state=0).fit_transform(x)
    if len(x) >= 10:
        x = TSNE(
            2, perplexity=min(30, (len(x) - 1) / 3), init="pca", max_iter=500, random_state=0
        ).fit_transform(x)
    x = np.pad(x, ((0, 0), (0, max(0, 2 - x.shape[1]))))[:, :2]
    points = []
    for (px, py), place in zip(x, chosen, strict=True):
        row = int(pool[place])
        points.append(
            {
                "x": float(px),
                "y": float(py),
                "cluster": int(clusters.ids[place]),
                "label": labels[row],
                "predicted": None
                if probabilities is None
                else bench.classes[int(probabilities[row].argmax())],
                "path": bench.corpus.manifest.paths[row],
                "preview": _preview(bench, row),
                **_text(bench, row),
                "distance": float(clusters.distances[place]),
            }
        )
    return points


def _preview(bench: Bench, row: int) -> Any:
    path = bench.corpus.manifest.root / bench.corpus.manifest.paths[row]

    def make() -> str | None:
        try:
            return bench.modality.preview(path)
        except Exception:  # the file may have gone since it was read: the point stays, silent
            return None

    return make


def _text(bench: Bench, row: int) -> dict[str, str]:
    """What is read where recordings are played: a text, or a row's cells with their names."""
    cells = bench.modality.shown(bench.corpus, row)
    if not cells:
        return {}
    named = [f"{name} {cell}" for name, cell in cells.items() if cell]
    return {"text": passage(" · ".join(cells.values() if len(cells) == 1 else named))}


def _cluster_summary(bench: Bench, labels: list[str | None]) -> list[dict[str, Any]]:
    ids, pool = bench.cache["clusters"].ids, np.flatnonzero(bench.pool)
    rows = []
    for cluster in range(len(bench.cache["clusters"].centroids)):
        members = pool[ids == cluster]
        known = Counter(labels[i] for i in members if labels[i] is not None)
        label, count = known.most_common(1)[0] if known else (None, 0)
        total = sum(known.values())
        rows.append(
            {
                "cluster": cluster,
                "size": len(members),
                "label": label,
                "purity": count / total if total else None,
                "labelled": total,
            }
        )
    return rows
