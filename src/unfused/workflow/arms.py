"""The methods that one run compares: UnFuSeD and its baselines on the same splits, with the same augmentation and steps.

Every arm is a function `(bench, draw, folder) -> Outcome`. A *draw* is one choice of visible labels and one seed. What
sees no label (teacher, features, clusters, the literal student) is computed once per run and shared by all draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unfused.train.data import ArrayDataset
from unfused.workflow.modality import Corpus, Inputs, Modality

if TYPE_CHECKING:
    from unfused.workflow.foreign import Foreign

LABEL_SMOOTHING = 0.1  # of every supervised stage, whatever the method
CONFIDENCE = 0.6  # share that a cluster's most likely class must have for its members to be taught it


@dataclass
class Draw:
    """Visible labels of one repetition: class index per clip, -1 where hidden or unknown; all of them are in the pool."""

    seed: int
    labels: np.ndarray

    @property
    def visible(self) -> np.ndarray:
        return self.labels >= 0


@dataclass
class Bench:
    """What all arms share; `pool` is the boolean mask of the clips that may be looked at without labels."""

    modality: Modality
    corpus: Corpus
    inputs: Inputs
    pool: np.ndarray
    test: np.ndarray
    classes: list[str]
    groups: Any  # (n_clips,) array of names, or None
    truth: np.ndarray
    steps: dict[str, int]
    seed: int
    teacher: Callable[[], Any] | None = None  # None: an encoder from elsewhere
    foreign: Foreign | None = None
    features: Any = None  # (n_clips, d) of the teacher
    literal_student: Callable[[], Any] = lambda: None
    fit: Callable[..., Any] = lambda *args, **kwargs: None
    templates: tuple[str, ...] | None = None  # sentences around the names of classes
    cache: dict[str, Any] = field(default_factory=dict)

    def augment(self) -> Any:
        """A new augmentation with no memory of earlier batches."""
        return self.modality.augment(self.inputs.normaliser)

    @property
    def classic_input(self) -> Any:
        if "classic_input" not in self.cache:
            self.cache["classic_input"] = self.modality.classic_input(self.corpus)
        return self.cache["classic_input"]

    @property
    def classic_features(self) -> np.ndarray:
        if "classic" not in self.cache:
            self.cache["classic"] = self.modality.classic_features(self.corpus)
        return self.cache["classic"]


@dataclass
class Outcome:
    """Class probabilities of every clip of the corpus, and what made them: a network, an estimator on features, or neither."""

    probabilities: np.ndarray
    encoder: Any = None
    head: Any = None
    estimator: Any = None
    columns: list[int] | None = None  # the class of each column of its probabilities
    parameters: int = 0
    peak_mib: float = 0.0
    curves: dict[str, list[dict]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


class PoolDataset(ArrayDataset):
    """Some rows of the memory-mapped inputs with their targets; only the rows of a batch are read."""

    def __init__(self, values: np.ndarray, rows: np.ndarray, **columns: Any) -> None:
        super().__init__(rows=rows, **columns)
        self.values = values

    def __getitems__(self, indices: Any) -> dict[str, Any]:
        batch = super().__getitems__(indices)
        batch["input_values"] = torch.from_numpy(self.values[batch.pop("rows").numpy()])
        return batch


def _fresh(bench: Bench, seed: int) -> Any:
    torch.manual_seed(seed)
    return bench.modality.encoder()


def _supervised(
    bench: Bench,
    draw: Draw,
    encoder: Any,
    folder: Path,
    steps: int,
    *,
    targets: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    head: Any = None,
    lr: float = 2e-3,
) -> Outcome:
    """Fine-tune encoder and a new linear head on the visible labels (or on soft `targets` of the pool)."""
    from unfused.finetune.fine_tune import FineTune

    torch.manual_seed(draw.seed)
    objective = FineTune(
        encoder, len(bench.classes), augment=bench.augment(), label_smoothing=LABEL_SMOOTHING
    )
    if head is not None:
        objective.head.load_state_dict(head.state_dict())
    if targets is None:
        windows = bench.inputs.of(draw.visible)
        labels = torch.from_numpy(draw.labels[bench.inputs.clip[windows]])
    else:
        windows = bench.inputs.of(bench.pool if rows is None else rows)
        labels = torch.from_numpy(targets[bench.inputs.clip[windows]]).float()
    data = PoolDataset(bench.inputs.values, windows, labels=labels)
    result = bench.fit(objective, data, output_dir=folder, steps=steps, lr=lr, seed=draw.seed)
    return Outcome(
        predict_clips(bench, objective.encoder, objective.head),
        objective.encoder,
        objective.head,
        parameters=sum(p.numel() for p in objective.parameters()),
        peak_mib=result.peak_mib,
        curves={"fine-tune": result.history},
    )


def predict_clips(bench: Bench, encoder: Any, head: Any) -> np.ndarray:
    """Mean over a clip's windows of softmax(head(embedding)): (n_clips, classes)."""
    from unfused.nn.encoders import embed_all

    embedded = torch.from_numpy(embed_all(encoder, bench.inputs.values))
    head.eval()
    with torch.inference_mode():
        probabilities = head(embedded).softmax(-1).numpy()
    return bench.inputs.pool(probabilities, len(bench.corpus))


# --- the arms --------------------------------------------------------------------------------------------


def unfused_literal(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """The paper: the student distilled from cluster ids, then fine-tuned on the labels."""
    return _supervised(bench, draw, bench.literal_student(), folder, bench.steps["fine_tune"], lr=1e-3)


def unfused_propagate(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """Our extension: labels spread over the pool's graph become the student's targets, class by class.

    The paper's clusters are class times voice; a student that learns them learns voices too. With labels at hand, the
    graph of the pool says what class each cluster is, so the fresh student is distilled towards classes instead.
    """
    from unfused.pretrain.unfused import UnFuSeD

    targets, details = spread_targets(bench, draw)
    torch.manual_seed(draw.seed)
    student = UnFuSeD(bench.modality.encoder(), len(bench.classes), augment=bench.augment())
    rows = bench.inputs.of(bench.pool)
    position = np.cumsum(bench.pool) - 1
    data = PoolDataset(
        bench.inputs.values, rows, labels=torch.from_numpy(targets[position[bench.inputs.clip[rows]]]).float()
    )
    distilled = bench.fit(
        student, data, output_dir=folder / "distil", steps=bench.steps["distil"], seed=draw.seed
    )
    before = predict_clips(bench, student.encoder, student.classifier)
    outcome = _supervised(
        bench,
        draw,
        student.encoder,
        folder / "fine-tune",
        bench.steps["fine_tune"],
        head=student.classifier,
        lr=2e-4,
    )
    held_out = bench.test & (bench.truth >= 0)
    if held_out.any():
        details["accuracy_before_fine_tuning"] = float((before.argmax(1) == bench.truth)[held_out].mean())
    outcome.parameters = sum(p.numel() for p in student.parameters())
    outcome.peak_mib = max(outcome.peak_mib, distilled.peak_mib)
    outcome.curves = {"distil": distilled.history, **outcome.curves}
    outcome.details = details
    return outcome


def spread_targets(bench: Bench, draw: Draw) -> tuple[np.ndarray, dict[str, Any]]:
    """Class of every clip of the pool, from the visible labels, as smoothed distributions (n_pool, classes).

    Labels spread over a neighbour graph; many small clusters (six clips on average) then share the class that is most
    likely by their members' mean distribution. The graph is built on the teacher's features, on classic ones (cepstra;
    picture descriptors) or on both, with 10 or 20 neighbours, whichever recovers hidden visible labels best. Rows of
    clusters that are not sure of their class are zero.
    """
    from unfused.pretrain.unfused import cluster_features, cluster_targets, propagate_labels

    pool = np.flatnonzero(bench.pool)
    labels = draw.labels[pool]
    views, classes = graph_views(bench, pool), len(bench.classes)
    graphs = [(name, neighbors) for name in views for neighbors in (20, 10)]
    recovered = [_recovered(views[name], labels, classes, draw.seed, k) for name, k in graphs]
    name, neighbors = graphs[int(np.argmax(recovered))]
    spread, _ = propagate_labels(views[name], labels, neighbors=neighbors, num_classes=classes)
    count = int(np.clip(len(pool) // 6, min(len(pool), 4 * classes), 1024))
    if count < len(pool):
        clusters = cluster_features(views[name], count, pca=None, whiten=False, seed=bench.seed)
        spread = cluster_targets(clusters, spread)[clusters.ids]
    # One class each, smoothed like every supervised label, where the cluster is sure of it: measured better than the
    # soft distribution itself. The others get no target, they only take part in the student's self-distillation.
    chosen, known = np.where(labels >= 0, labels, spread.argmax(1)), labels >= 0
    taught = known | (spread.max(1) >= CONFIDENCE)
    targets = np.full((len(pool), classes), LABEL_SMOOTHING / classes, np.float32)
    targets[np.arange(len(pool)), chosen] += 1 - LABEL_SMOOTHING
    targets[~taught] = 0
    details: dict[str, Any] = {
        "graph": f"{name}, {neighbors} neighbours",
        "recovered": {f"{n}, {k} neighbours": score for (n, k), score in zip(graphs, recovered, strict=True)},
        "targets_taught": float(taught.mean()),
    }
    hidden = (bench.truth[pool] >= 0) & ~known & taught  # for the report only: no decision looks at it
    if hidden.any():
        details["targets_correct"] = float((chosen == bench.truth[pool])[hidden].mean())
    return targets, details


def graph_views(bench: Bench, pool: np.ndarray) -> dict[str, np.ndarray]:
    """Unit-length vectors for the neighbour graph, per source of features; the groups' own means and scales removed."""
    if "views" not in bench.cache:
        groups = None if bench.groups is None else bench.groups[pool]
        views = {"classic": _unit(bench.classic_features[pool], groups, bench.modality.classic_on_one_scale)}
        if bench.features is not None:
            views["teacher"] = _unit(bench.features[pool], groups)
            views["both"] = np.hstack([views["classic"], views["teacher"]]) / np.sqrt(2)
        bench.cache["views"] = views
    return bench.cache["views"]


def _unit(
    features: np.ndarray, groups: np.ndarray | None, on_one_scale: bool = False, components: int = 64
) -> np.ndarray:
    """Standardised (or, where all dimensions share a scale, centred) within each group, 64 components, unit length."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    from unfused.nn.kmeans import standardize_groups

    x = np.asarray(features, np.float32)
    if not on_one_scale:
        x = standardize_groups(x, groups)
    elif groups is not None:
        x = standardize_groups(x, groups) * x.std(0)
    components = min(components, *x.shape)
    return normalize(PCA(components, svd_solver="randomized", random_state=0).fit_transform(x)).astype(
        np.float32
    )


def _recovered(
    view: np.ndarray, labels: np.ndarray, num_classes: int, seed: int, neighbors: int, folds: int = 5
) -> float:
    """Share of the visible labels that the others tell when a fifth of them is hidden in turn."""
    from unfused.pretrain.unfused import propagate_labels

    rows = np.random.default_rng(seed).permutation(np.flatnonzero(labels >= 0))
    hits = 0
    for part in np.array_split(rows, min(folds, len(rows))):
        hidden = labels.copy()
        hidden[part] = -1
        if (hidden >= 0).any():
            spread, _ = propagate_labels(view, hidden, neighbors=neighbors, num_classes=num_classes)
            hits += int((spread[part].argmax(1) == labels[part]).sum())
    return hits / len(rows)


def fine_tune(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """The baseline that the paper argues against: the self-supervised encoder itself, fine-tuned."""
    if bench.teacher is None:
        return _fine_tune_foreign(bench, draw, folder)
    return _supervised(bench, draw, bench.teacher(), folder, bench.steps["supervised"], lr=1e-3)


def _fine_tune_foreign(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """The same for a transformers encoder, on what its own feature extractor or tokenizer makes of the items."""
    from unfused.finetune.fine_tune import FineTune

    torch.manual_seed(draw.seed)
    rows = np.flatnonzero(draw.visible)
    assert bench.foreign is not None
    encoder, data, embedded = bench.foreign.trainable(rows, draw.labels[rows])
    objective = FineTune(encoder, len(bench.classes), label_smoothing=LABEL_SMOOTHING)
    result = bench.fit(
        objective,
        data,
        output_dir=folder,
        steps=bench.steps["supervised"],
        lr=5e-5,
        batch_size=min(16, len(rows)),
        seed=draw.seed,
    )
    with torch.inference_mode():
        probabilities = np.concatenate([objective.head(block).softmax(-1).numpy() for block in embedded])
    return Outcome(
        probabilities,
        parameters=sum(p.numel() for p in objective.parameters()),
        peak_mib=result.peak_mib,
        curves={"fine-tune": result.history},
    )


def scratch(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """A fresh encoder trained on the labels alone."""
    return _supervised(bench, draw, _fresh(bench, draw.seed), folder, bench.steps["supervised"])


def linear_probe(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """Logistic regression on the frozen self-supervised features."""
    from unfused.finetune.linear_probe import fit_linear_probe

    rows = np.flatnonzero(draw.visible)
    probe = fit_linear_probe(bench.features[rows], draw.labels[rows], draw.seed, _groups(bench, rows))
    return Outcome(_expand(probe, bench.features, len(bench.classes)))


def classic(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """Logistic regression on MFCC (pictures: on pixels and histograms, texts: on TF-IDF): no network at all."""
    data, rows = bench.classic_input, np.flatnonzero(draw.visible)
    model = bench.modality.classic(draw.seed).fit(data[rows], draw.labels[rows], groups=_groups(bench, rows))
    return Outcome(
        _expand(model, data, len(bench.classes)), details={"representation": model.representation_}
    )


def ceiling(bench: Bench, draw: Draw, folder: Path) -> Outcome:
    """Not a method but a bound: the student trained on all true labels of the clips that are not held out."""
    targets = np.eye(len(bench.classes), dtype=np.float32)[np.maximum(bench.truth, 0)]
    known = (bench.truth >= 0) & ~bench.test
    return _supervised(
        bench, draw, _fresh(bench, draw.seed), folder, bench.steps["supervised"], targets=targets, rows=known
    )


def _groups(bench: Bench, rows: np.ndarray) -> np.ndarray | None:
    return None if bench.groups is None else bench.groups[rows]


def _expand(model: Any, features: Any, num_classes: int) -> np.ndarray:
    probabilities = np.zeros((len(features), num_classes), np.float32)
    probabilities[:, model.classes_] = model.predict_proba(features)
    return probabilities


# --- keeping an outcome ----------------------------------------------------------------------------------


def save_outcome(outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Probabilities and weights into the stage's folder; the numbers are returned for its `done.json`."""
    from unfused.train.checkpoint import save_module

    np.save(folder / "probabilities.npy", outcome.probabilities)
    if outcome.encoder is not None:
        save_module(folder / "encoder.safetensors", outcome.encoder)
        save_module(folder / "head.safetensors", outcome.head)
    if outcome.estimator is not None:
        from unfused.data import estimator_io

        estimator_io.save(outcome.estimator, folder / "estimator")
    return {
        "columns": outcome.columns,
        "parameters": outcome.parameters,
        "peak_mib": outcome.peak_mib,
        "curves": outcome.curves,
        "details": outcome.details,
    }


def load_network(bench: Bench, folder: Path) -> tuple[Any, Any] | None:
    """Encoder and head of a saved outcome; None where the method has no network."""
    from unfused.train.checkpoint import load_module

    if not (folder / "encoder.safetensors").exists():
        return None
    encoder = bench.modality.encoder()
    head = torch.nn.Linear(encoder.embedding_dim, len(bench.classes))
    load_module(folder / "encoder.safetensors", encoder)
    load_module(folder / "head.safetensors", head)
    return encoder.eval(), head.eval()
