"""`unfused.adapt`: from a folder of recordings (or pictures), a table of texts or rows, and few labels or none, to a model.

Read the function `adapt` from top to bottom: read, pretrain, cluster, distil, fine-tune, evaluate, write.

Reference: UNFUSED: UNsupervised Finetuning Using SElf supervised Distillation, 2023, arXiv:2303.05668.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from unfused.data.files import Quarantine, cache_root, digest, printable, read_json
from unfused.data.manifest import Manifest
from unfused.workflow.arms import Bench, Draw, Outcome
from unfused.workflow.foreign import Foreign, open_foreign
from unfused.workflow.label_arms import check_methods
from unfused.workflow.modality import Corpus, Inputs, Modality
from unfused.workflow.run_folder import RunFolder
from unfused.workflow.settings import CLASSES_ALONE, TEACHERS, Settings

__all__ = ["Run", "adapt"]

HELD_OUT = frozenset("test testing val valid validation dev eval evaluation".split())  # as splits of the data


@dataclass
class Run:
    """What `adapt` made.

    Attributes
    ----------
    path : Path
        The run folder.
    metrics : dict
        As in `metrics.json`.
    to_label : list of dict
        The clips most worth labelling, best first: `path`, `cluster`, `reason`.
    settings : Settings
    """

    path: Path
    metrics: dict[str, Any]
    to_label: list[dict[str, Any]]
    settings: Settings
    _model: Any = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The adapted model: `predict(paths)`, and every attribute of the transformers model inside it."""
        if self._model is None:
            from unfused.workflow.predict import load

            if not (self.path / "model").is_dir():
                if self.metrics["methods"]:
                    raise ValueError(
                        f"{self.path} holds no model: none of {self.settings.method} is a network of ours or an estimator"
                    )
                raise ValueError(
                    f"{self.path} holds no model yet: it had no labels. Fill in {self.path / 'to_label.csv'} and run again"
                )
            self._model = load(self.path / "model")
        return self._model


def adapt(
    source: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    *,
    progress: bool | Callable[..., Any] = False,
    cache: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Run:
    """Adapt a model to recordings, pictures, texts or the rows of a table with few labels or none.

    Stage by stage: read the items; pretrain a teacher on all of them without labels; cluster its features; distil the
    clusters (or, as soon as labels exist, what the labels say of them) into a freshly initialised student; fine-tune it
    on the labels; evaluate on what is held out. A killed run continues where it was; a repeated one recomputes nothing.

    Parameters
    ----------
    source : path or str, optional
        A folder (sub-folders are classes when `labels` is not given), a CSV or JSONL manifest, a hub data set id, or a
        data set saved by `datasets`. Default: the embedded sample of spoken words. A CSV, TSV, JSONL or Parquet table that
        names no files holds texts (`text_column`) or is itself the data.
    labels : path or column, optional
        CSV with columns `path,label` (of a table: its id column, or `row 17`); blank means unlabelled. Or a column of the
        table.
    progress : bool, default=False
        Show progress bars on the terminal.
    cache : path, optional
        Folder of the feature cache; default `$UNFUSED_CACHE` or `~/.cache/unfused`.
    name : str, optional
        Of the run folder; default: the name of `source`.
    output : str, default="runs"
        Folder of run folders.
    modality : {"auto", "audio", "image", "text", "table"}
    text_column : str, optional
        The column of texts to classify; needed where a table has other columns too.
    target : str, optional
        The column of the classes, blank where unknown; default: label, class, category or target. Without a text column, the
        table's other columns are what it is predicted from.
    classes : str or sequence of str, optional
        Names of the classes. With an encoder that reads texts too (CLIP, CLAP, a sentence model) no label is needed:
        `gda-clip`, `tfup` and `zero-shot` are compared unless `method` names others. Labels, where there are some, must be
        among them; `labels_per_class=0` keeps them for the evaluation alone.
    templates : str or sequence of str, optional
        Sentences for the names, `{}` where the name goes; default "a photo of a {}.", "this is a sound of {}.", or "{}".
    method : str or sequence of str, default="unfused,classic"
        Methods to compare; the model of the first one that is a network of ours or an estimator is kept. `unfused`,
        `unfused-literal`, `unfused-propagate`, `fine-tune`, `linear-probe`, `scratch`, `classic`, and `ceiling` (the student
        trained on all true labels of the training clips, a bound and not a method). On the teacher's frozen features:
        `gda-clip`, `tfup`, `tfup-t`, `ogen`, `latent-label-shift` (needs groups), `zero-shot` (needs an encoder that reads
        the names of the classes). Of texts `list`, whose encoder is a masked language model.
    teacher : str, default="contrastive"
        Self-supervised objective (`contrastive`, `decar`, `delores-s`, `delores-m`, `slicer`; `random`: none), or the path
        or hub id of any encoder of transformers that reads such items (of sentence-transformers too). `encoder` is another
        word for it.
    clusters : int or "auto", default="auto"
        Number of clusters; "auto" takes the one that two varied copies of the data agree on best.
    propagate : bool, default=True
        What `unfused` means once labels exist: labels spread over the pool and averaged per cluster become the targets
        (True), or the paper's cluster ids do (False).
    group : str, optional
        Regular expression on the path, or column: speaker, site, device. No group is on both sides of the split, and
        features are standardised per group before clustering.
    test : str, optional
        What to hold out: a fraction ("0.2"), a file of paths, or "GROUP=VALUE". Default 0.2 where there are at least 5
        labels a class.
    labels_per_class : int, optional
        Hide all but so many labels a class, to simulate scarcity.
    inductive : bool, default=False
        Keep the held-out clips out of the unlabelled pool.
    seed : int, default=0
    seeds : int, default=1
        Repetitions, each with its own draw of `labels_per_class` and its own initialisation.
    width : int, default=32
        Channels of the encoder; of a text encoder a quarter of its width, of a table's an eighth.
    pretrain_steps, distil_steps, fine_tune_steps : int, optional
        Optimizer steps; defaults grow with the data.
    queue : int, default=50
        Rows of `to_label.csv`.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        For unknown options, unreadable sources, impossible splits; the message names the argument and the fix.

    References
    ----------
    UNFUSED: UNsupervised Finetuning Using SElf supervised Distillation, arXiv:2303.05668.

    Examples
    --------
    >>> from unfused import adapt
    >>> run = adapt("recordings/", labels="labels.csv", group="speaker", seed=0)  # doctest: +SKIP
    >>> run.metrics["methods"]["unfused"]["accuracy"]["mean"]                     # doctest: +SKIP
    >>> run.model.predict(["new.wav"])                                            # doctest: +SKIP
    >>> adapt("texts.csv", text_column="body", target="topic").model.predict(["a text"])  # doctest: +SKIP
    >>> adapt("flowers.parquet", target="species").model.predict("new.csv")       # doctest: +SKIP
    """
    from unfused.workflow.products import summary_facts, write_products
    from unfused.workflow.progress import Console
    from unfused.workflow.report import ReportData

    settings = _settings(source, labels, options)
    path = Path(settings.output) / settings.name
    with Console(progress) as console, _sole_user(path, settings):
        quarantine = Quarantine()
        run = RunFolder(path, console.stage)
        run.remove_leftovers()
        modality, corpus, groups = _read(settings, path, quarantine, cache, console)
        if (relocate := _relocation(modality, corpus)) is not None:
            run.relocate = relocate
        labels_known = _labels(corpus, run)
        classes = _classes(settings, labels_known)
        truth = np.array([classes.index(x) if x is not None else -1 for x in labels_known])
        test = _held_out(settings, corpus, labels_known, truth)
        pool = ~test if settings.inductive else np.ones(len(corpus), bool)
        _check(settings, replace(corpus.manifest, labels=labels_known), truth, test)
        facts = summary_facts(
            modality.name, corpus, groups, labels_known, classes, test & (truth >= 0), quarantine
        )
        console.summary(ReportData(settings.name, summary=facts, quarantine=quarantine.rows))
        for note in corpus.manifest.notes:
            console.say(f"  {note}")
        draws = _draws(settings, truth, test, classes)
        foreign = None
        if settings.teacher not in TEACHERS:
            foreign = open_foreign(settings.teacher, modality, corpus, _cache(cache) / "features")
        if draws:
            pooled = None if groups is None else groups[pool]
            labelled = all(draw.visible.any() for draw in draws)
            check_methods(settings.method, foreign, modality.name, pooled, len(classes), labelled)
        bench = _prepare(
            settings, run, modality, corpus, groups, truth, classes, pool, test, foreign, console
        )
        outcomes = _compare(settings, run, bench, draws, console)
        metrics, queue = write_products(
            settings=settings,
            run=run,
            bench=bench,
            draws=draws,
            outcomes=outcomes,
            labels=labels_known,
            quarantine=quarantine,
            facts=facts,
            console=console,
        )
    return Run(path, metrics, queue, settings)


# --- settings --------------------------------------------------------------------------------------------


def _settings(source: Any, labels: Any, options: dict[str, Any]) -> Settings:
    config = options.pop("config", None)
    given = {name: value for name, value in options.items() if value is not None}
    if config is not None:
        base = Settings.read(config).to_dict()
    elif source is None:
        from unfused.data.sample import sample_manifest

        base = {"source": str(sample_manifest()), "name": "sample", "group": "group", "labels_per_class": 5}
    else:
        base = {"source": os.fspath(source)}
    if source is not None:
        base["source"] = os.fspath(source)
    if labels is not None:
        base["labels"] = os.fspath(labels)
    base.setdefault("name", _name_of(base["source"]))
    if given.get("classes") is not None:
        given.setdefault("method", CLASSES_ALONE)
    if (encoder := given.pop("encoder", None)) is not None:  # another word for the same
        if "teacher" in given:
            raise ValueError(
                f"encoder={encoder!r} and teacher={given['teacher']!r} are two words for one: give one"
            )
        given["teacher"] = encoder
    unknown = sorted(set(given) - set(Settings.__dataclass_fields__))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}: there are {sorted(Settings.__dataclass_fields__)}")
    return Settings(**{**base, **given})


def _name_of(source: str) -> str:
    stem = Path(source.rstrip("/")).resolve().name if os.path.exists(source) else source
    for suffix in (".csv", ".jsonl", ".ndjson", ".json", ".tsv", ".parquet", ".pq"):
        stem = stem.removesuffix(suffix)
    kept = "".join(c if c.isalnum() or c in "._+-" else "-" for c in stem.encode("ascii", "ignore").decode())
    return kept.strip("-.") or "run"


@contextmanager
def _sole_user(path: Path, settings: Settings):
    """Hold the run folder; refuse one that belongs to another source."""
    from unfused.data.files import disk_errors

    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        config = path / "config.yaml"
        if config.exists():
            earlier = Settings.read(config)
            if _same(earlier.source) != _same(settings.source):
                raise ValueError(
                    f"name={settings.name!r}: {path} already holds a run on {printable(earlier.source)}; give another name"
                )
        try:
            import fcntl
        except ImportError:  # Windows
            fcntl = None  # type: ignore[assignment]
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(
                        f"name={settings.name!r}: another process is working in {path}; wait for it"
                    ) from None
                except OSError:  # a file system without locks
                    pass
            settings.write(config)
            yield
        finally:
            os.close(descriptor)


def _same(source: str) -> str:
    return os.path.realpath(source) if os.path.exists(source) else source


# --- 1 read ----------------------------------------------------------------------------------------------


def _read(
    settings: Settings, path: Path, quarantine: Quarantine, cache: Any, console: Any
) -> tuple[Modality, Corpus, np.ndarray | None]:
    from unfused.workflow.sources import open_source
    from unfused.workflow.wording import units

    modality, manifest = open_source(settings, quarantine, path / "hub")
    corpus = modality.read(
        manifest, _cache(cache) / "features", quarantine, console.task("read", len(manifest.paths))
    )
    quarantine.write(path / "quarantine.csv")
    unit, several = units(modality.name)
    if not len(corpus):
        raise ValueError(
            f"source={printable(settings.source)} has no usable {unit}: {len(quarantine)} set aside, "
            f"reasons in {path / 'quarantine.csv'}"
        )
    if len(corpus) < 4:
        raise ValueError(
            f"source={printable(settings.source)} has {len(corpus)} usable {several}: at least 4 are needed"
        )
    groups = corpus.manifest.groups
    named = (
        np.array([g if g is not None else "" for g in groups]) if any(g is not None for g in groups) else None
    )
    return modality, corpus, named


def _cache(cache: Any) -> Path:
    return Path(cache) if cache else cache_root()


def _classes(settings: Settings, labels: Sequence[str | None]) -> list[str]:
    """Those of the labels, or the ones that are given, in their order."""
    found = sorted({label for label in labels if label is not None})
    if settings.classes is None:
        return found
    if other := [name for name in found if name not in settings.classes]:
        raise ValueError(
            f"classes: {other[0]!r} is a label of the data and not among {list(settings.classes)}"
        )
    return list(settings.classes)


def _relocation(modality: Modality, corpus: Corpus) -> Callable[[str, dict[str, str]], str] | None:
    """For rows that are called by their number: where the row with these cells is now, if it is not where it was."""
    records = getattr(modality, "records", None)
    if records is None or records.id_column is not None:
        return None
    from unfused.workflow.run_folder import beside

    def content(cells: dict[str, str]) -> tuple[tuple[str, str], ...]:  # as a spreadsheet may have written it
        return tuple(sorted((name, " ".join(cell.split())) for name, cell in cells.items()))

    index: dict[tuple[tuple[str, str], ...], list[str]] = {}

    def relocate(path: str, cells: dict[str, str]) -> str:
        if not index:
            for row, name in enumerate(corpus.manifest.paths):
                index.setdefault(content(beside(modality.shown(corpus, row))), []).append(name)
        places = index.get(content(cells), [])
        return places[0] if len(places) == 1 else path

    return relocate


def _labels(corpus: Corpus, run: RunFolder) -> list[str | None]:
    """Labels of the source, and what a person has filled in into an earlier run's `to_label.csv`."""
    answers = run.collect_answers()
    lost = sorted(set(answers) - set(corpus.manifest.paths))
    if lost:
        warnings.warn(
            f"{len(lost)} labelled files of {run.path / 'labels.csv'} are gone or set aside, "
            f"first {printable(lost[0])}",
            stacklevel=3,
        )
    return [
        answers.get(p, label) for p, label in zip(corpus.manifest.paths, corpus.manifest.labels, strict=True)
    ]


def _held_out(settings: Settings, corpus: Corpus, labels: list[str | None], truth: np.ndarray) -> np.ndarray:
    from unfused.data.splits import hold_out

    manifest = replace(corpus.manifest, labels=labels)
    if settings.test is not None:
        return hold_out(manifest, settings.test, settings.seed)
    declared = sorted({name for name in manifest.split if name is not None and name.lower() in HELD_OUT})
    nothing = np.zeros(len(corpus), bool)
    if declared:
        test = np.array([name in declared for name in manifest.split])
        crossing = {manifest.groups[row] for row in np.flatnonzero(test)} - {None}
        crossing &= {manifest.groups[row] for row in np.flatnonzero(~test)}
        if crossing:
            raise ValueError(
                f"group={settings.group!r}: the split that comes with the data divides {len(crossing)} groups, such as "
                f"{sorted(map(str, crossing))[0]!r}; give test=FRACTION or test=GROUP=VALUE"
            )
        return test
    counts = np.bincount(truth[truth >= 0]) if (truth >= 0).any() else nothing[:1]
    if counts.min() < 5:
        return nothing
    try:
        return hold_out(manifest, "0.2", settings.seed)
    except ValueError as error:  # nobody has asked for a test set
        warnings.warn(f"nothing is held out, and accuracy will not be known: {error}", stacklevel=3)
        return nothing


def _check(settings: Settings, manifest: Manifest, truth: np.ndarray, test: np.ndarray) -> None:
    from unfused.data.manifest import check_labels

    classes = list(check_labels(manifest))
    known = truth >= 0
    what = "the split that comes with the data" if settings.test is None else f"test={settings.test!r}"
    if settings.classes is None and (missing := set(range(len(classes))) - set(truth[known & ~test])):
        names = ", ".join(repr(classes[k]) for k in sorted(missing)[:5])
        raise ValueError(f"{what} holds out every label of {names}: hold out less, or label more clips of it")
    if settings.labels_per_class is not None and not classes:
        raise ValueError(
            "labels_per_class needs labels to hide some of: give labels, class folders or a label column"
        )
    if test.all():
        raise ValueError(f"{what} holds out every clip: nothing is left to learn from")
    if settings.test is not None and not (test & known).any():
        warnings.warn(f"{what} holds out no labelled clip: there is nothing to evaluate on", stacklevel=3)


def _draws(settings: Settings, truth: np.ndarray, test: np.ndarray, classes: list[str]) -> list[Draw]:
    """The visible labels of each repetition."""
    from unfused.data.splits import few_shot

    if not classes:
        return []
    train = np.where(test, -1, truth)
    draws = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        visible = train >= 0
        if settings.labels_per_class == 0:
            visible = np.zeros(len(train), bool)
        elif settings.labels_per_class is not None:
            named = [classes[k] if k >= 0 else None for k in train]
            visible = few_shot(named, settings.labels_per_class, seed)
        draws.append(Draw(seed, np.where(visible, train, -1)))
    return draws


# --- 2 to 4: what sees no label --------------------------------------------------------------------------


def _steps(settings: Settings, windows: int) -> dict[str, int]:
    """Optimizer steps of each stage; a supervised baseline gets those of distillation and fine-tuning together."""
    epochs = max(1.0, windows / 64)
    pretrain = settings.pretrain_steps or int(np.clip(25 * epochs, 200, 600))
    distil = settings.distil_steps or int(np.clip(40 * epochs, 300, 1000))
    fine = settings.fine_tune_steps or 150
    return {"pretrain": pretrain, "distil": distil, "fine_tune": fine, "supervised": distil + fine}


def _prepare(
    settings: Settings,
    run: RunFolder,
    modality: Modality,
    corpus: Corpus,
    groups: np.ndarray | None,
    truth: np.ndarray,
    classes: list[str],
    pool: np.ndarray,
    test: np.ndarray,
    foreign: Foreign | None,
    console: Any,
) -> Bench:
    """Windows, teacher, features, clusters and, where it is needed, the student distilled from clusters alone."""
    from unfused.workflow import unlabelled

    base = {
        "files": corpus.digest,
        "front_end": modality.settings(),
        "pool": unlabelled.mask_digest(pool),
        "groups": None if groups is None else groups.tolist(),
        "seed": settings.seed,
    }
    window_stage = run.stage(
        "windows", base, lambda folder: unlabelled.write_windows(modality, corpus, pool, folder)
    )
    inputs: Inputs = unlabelled.open_windows(modality, pool, window_stage.folder)
    for note in modality.notes:
        console.say(f"  {note}")
    steps = _steps(settings, int(pool[inputs.clip].sum()))
    bench = Bench(
        modality=modality,
        corpus=corpus,
        inputs=inputs,
        pool=pool,
        test=test,
        classes=classes,
        groups=groups,
        truth=truth,
        steps=steps,
        seed=settings.seed,
        fit=console.fit,
        foreign=foreign,
        templates=settings.templates,
    )
    pretrain: dict[str, Any] = {"on": window_stage.key, "teacher": settings.teacher}
    if settings.teacher in TEACHERS:
        pretrain["steps"] = steps["pretrain"]
    elif os.path.isdir(settings.teacher):
        pretrain["weights"] = [digest(file) for file in sorted(Path(settings.teacher).glob("*.safetensors"))]
    teacher_stage = run.stage(
        "pretrain", pretrain, lambda folder: unlabelled.pretrain(bench, settings.teacher, folder)
    )
    unlabelled.attach_teacher(bench, settings.teacher, teacher_stage.folder)
    cluster_stage = run.stage(
        "cluster",
        {"on": teacher_stage.key, "clusters": settings.clusters},
        lambda folder: unlabelled.cluster(bench, settings.clusters, folder),
    )
    bench.cache["clusters"] = unlabelled.open_clusters(cluster_stage.folder)
    if not classes or _wants_literal(settings):
        literal = run.stage(
            "distil",
            {"on": cluster_stage.key, "steps": steps["distil"]},
            lambda folder: unlabelled.distil(bench, folder),
        )
        unlabelled.attach_student(bench, literal.folder)
    return bench


def _wants_literal(settings: Settings) -> bool:
    return "unfused-literal" in settings.method or ("unfused" in settings.method and not settings.propagate)


# --- 5 the arms ------------------------------------------------------------------------------------------


def _compare(
    settings: Settings, run: RunFolder, bench: Bench, draws: Sequence[Draw], console: Any
) -> dict[str, list[dict[str, Any]]]:
    """Every method on every draw; a stage each, so that a kill loses at most the steps since the last checkpoint."""
    from unfused.workflow import arms, label_arms

    propagated, literal = (arms.unfused_propagate, "pretrain"), (arms.unfused_literal, "distil")
    table = {  # and the last of the stages above that its result depends on
        "unfused": propagated if settings.propagate else literal,
        "unfused-literal": literal,
        "unfused-propagate": propagated,
        "fine-tune": (arms.fine_tune, "pretrain"),
        "linear-probe": (arms.linear_probe, "pretrain"),
        "scratch": (arms.scratch, "windows"),
        "classic": (arms.classic, "windows"),
        "ceiling": (arms.ceiling, "windows"),
        **{name: (arm, "pretrain") for name, arm in label_arms.ARMS.items()},
    }
    stage_keys = {result.name: result.key for result in run.results}
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for method in settings.method if draws else ():
        arm, needed = table[method]
        outcomes[method] = []
        for draw in draws:
            key = {
                "method": arm.__name__,
                "seed": draw.seed,
                "labels": draw.labels.tolist(),
                "classes": bench.classes,
                "steps": {name: count for name, count in bench.steps.items() if name != "pretrain"},
                "on": stage_keys[needed],
            }
            if bench.templates is not None:
                key["templates"] = list(bench.templates)
            if arm in (
                arms.ceiling,
                arms.unfused_propagate,
            ):  # trained on, or measured against, what is hidden
                key |= {"truth": bench.truth.tolist(), "test": bench.test.tolist()}

            def compute(folder: Path, arm: Any = arm, draw: Draw = draw) -> dict[str, Any]:
                outcome: Outcome = arm(bench, draw, folder)
                return arms.save_outcome(outcome, folder)

            stage = run.stage(f"{method}/{draw.seed}", key, compute)
            outcomes[method].append(
                {**read_json(stage.folder / "done.json"), "folder": stage.folder, "reused": stage.reused}
            )
    return outcomes
