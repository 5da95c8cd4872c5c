"""DDFA finds classes that no clustering shows, from domains in which they occur in other proportions.

The paper: started from a clustering network it is better than that network, most where proportions differ much between
domains; from scratch it is best where looks mislead (caterpillars and butterflies of one species). Here: scikit-learn's
digits, as ten classes and as five unions of two dissimilar digits (0 and 5, 1 and 6, ...), dealt out to domains whose
proportions are drawn from a Dirichlet distribution with alpha / k a class, until the matrix is well conditioned. The
domain classifier is the card's MLP, probabilities out of fold; nothing has seen a class label. Then words of real accents:
three groups of words, frequencies shifted by leaving clips out, once as recorded and once with each voice calibrated.

Refuted for the unions at alpha 0.5 if, over ten draws, the 95 % interval of the paired gain over the best clustering (by its
mean) or over the naive table of cells reaches 0. The same rule is applied to the ten digits and to the words, and expected to
fail for the words, where p(x|y) differs between accents. With milder shift and fewer points DDFA is expected to lose to
clustering of the ten digits, and a mark of the domain in the picture to make it find the domains; both are shown.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.decomposition import PCA
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.audio import log_mel_statistics, word_front_end
from unfused.label.latent_label_shift import DDFA, simplex_least_squares
from unfused.nn.kmeans import standardize_groups
from unfused.nn.log_mel import fit_frames_many
from unfused.nn.matching import clustering_accuracy, match_clusters

RULE = (
    "the 95 % interval of the paired gain over the best clustering (by its mean), or over the naive variant that reads the "
    "class from the table of cells, reaches 0"
)
CLUSTERINGS = ("k-means", "spectral clustering", "Gaussian mixture on PCA", "k-means on f(x) and domain")
CONDITION = {0.5: 4, 3: 4, 10: 8}  # limits of the condition number of the matrix of proportions, by alpha
WORD_GROUPS = 3


def claim(lab: Lab) -> list[Verdict]:
    seeds = range(lab.pick(smoke=len(lab.seeds), desk=2 * len(lab.seeds)))
    verdicts = []
    for task, count, more in (("unions", 10, True), ("digits", 20, False)):
        domains = lab.pick(smoke=count // 2 + 1, desk=count)
        units = [_digits_unit(lab, task, 0.5, domains, seed) for seed in seeds]
        lab.log(
            f"{task}: " + ", ".join(f"{arm} {np.mean([unit[arm] for unit in units]):.3f}" for arm in units[0])
        )
        seeds = lab.pick(smoke=seeds[:1], desk=seeds)  # smoke: two for the first world alone
        tables = {"Accuracy by shift and domains": _curve(lab, task, domains)}
        if more:
            tables["A mark of the domain in every picture"] = _marks(lab, task, domains)
        verdicts.append(_verdict(lab, f"{task}, alpha 0.5, {domains} domains", units, tables))
    units = [_words_unit(lab, seed, calibrated=True) for seed in seeds]
    raw = [_words_unit(lab, seed, calibrated=False) for seed in seeds]
    arms = ["DDFA", "oracle: true proportions", *CLUSTERINGS]
    table = {arm: [unit[arm] for unit in raw] for arm in arms}
    verdicts.append(_verdict(lab, "words of accents, voices calibrated", units, {"Words as recorded": table}))
    return verdicts


def _verdict(lab: Lab, world: str, units: list[dict[str, float]], tables: dict[str, Any]) -> Verdict:
    arms: dict[str, list[float]] = {arm: [unit[arm] for unit in units] for arm in units[0]}
    groups: dict[str, dict[str, Any]] = {"variant: ": {}, "Q: ": {}}
    for mark, group in groups.items():
        group.update({arm.removeprefix(mark): arms.pop(arm) for arm in list(arms) if arm.startswith(mark)})
    best = max(CLUSTERINGS, key=lambda arm: np.mean(arms[arm]))
    ours = arms.pop("DDFA")
    gains = [lab.paired(ours, arms[arm]) for arm in (best, "naive: table of cells")]
    return lab.verdict(
        world=world,
        name="DDFA",
        metric="accuracy, clusters matched to classes",
        method=ours,
        baselines=arms,
        rule=RULE,
        holds=all(gain.above_zero for gain in gains),
        ablations={
            "Variants of DDFA": groups["variant: "],
            "L1 error of a domain's proportions": {
                arm: {"mean": float(np.mean(values))} for arm, values in groups["Q: "].items()
            },
            **tables,
        },
        notes=[
            f"{len(units)} draws of domains, all points scored; the best clustering: {best}; the oracle is no baseline"
        ],
    )


def _first(lab: Lab) -> range:
    return lab.seeds[: lab.pick(smoke=1, desk=3)]


def _curve(lab: Lab, task: str, domains: int) -> dict[str, dict[str, float]]:
    """Mean accuracy of three draws by alpha and number of domains."""
    table = {}
    for alpha in lab.pick(smoke=(0.5,), desk=(0.5, 3, 10)):
        for r in sorted({domains, *lab.pick(smoke=(), desk=(10, 20))}):
            units = [_digits_unit(lab, task, alpha, r, seed, brief=True) for seed in _first(lab)]
            table[f"alpha {alpha:g}, {r} domains"] = {
                arm: float(np.mean([u[arm] for u in units])) for arm in units[0]
            }
    return table


def _marks(lab: Lab, task: str, domains: int) -> dict[str, dict[str, float]]:
    """A pixel of its own lights up in each domain: p(x|y) differs, and what is found is the domain."""
    table = {}
    for mark in lab.pick(smoke=(1.0,), desk=(0.0, 0.2, 0.5, 1.0)):
        units = [_digits_unit(lab, task, 0.5, domains, seed, brief=True, mark=mark) for seed in _first(lab)]
        table[f"brightness {mark:g}"] = {arm: float(np.mean([u[arm] for u in units])) for arm in units[0]}
    return table


# -- the worlds --------------------------------------------------------------------------------------------------------


def _digits_unit(
    lab: Lab, task: str, alpha: float, domains: int, seed: int, brief: bool = False, mark: float = 0.0
) -> dict[str, float]:
    fast = lab.scale == "smoke"
    params = {
        "task": task,
        "alpha": alpha,
        "domains": domains,
        "seed": seed,
        "brief": brief,
        "mark": mark,
        "fast": fast,
    }

    def compute() -> dict[str, float]:
        world = lab.world("digits")
        y = world.labels[:300] if fast else world.labels
        X = world.images[: len(y)].reshape(len(y), -1)
        y = y % 5 if task == "unions" else y
        d = draw_domains(y, alpha, domains, seed)
        if mark:
            X = np.c_[X, (mark * np.eye(domains)[d]).astype(np.float32)]
        return _arms(X, y, d, seed, fast, brief)

    return lab.cached("ddfa-digits", params, compute)


def draw_domains(labels: np.ndarray, alpha: float, domains: int, seed: int) -> np.ndarray:
    """The domain of each point: all points are used, each class split in proportion to what domains want of it.

    Proportions are drawn anew until the condition number of the matrix is below `CONDITION`; the best of 2,000 where none is.
    """
    rng, k = np.random.default_rng(seed), int(labels.max()) + 1
    best, lowest = np.empty(0), np.inf
    for _ in range(2000):
        shares = rng.dirichlet(np.full(k, alpha / k), domains).T + 1e-9  # (k, domains)
        condition = np.linalg.cond(shares)
        if condition < lowest:
            best, lowest = shares, condition
        if condition < CONDITION[alpha]:
            break
    cumulative = (best / best.sum(1, keepdims=True)).cumsum(1)[labels]  # (n, domains)
    found = (cumulative < rng.random((len(labels), 1))).sum(1).clip(max=domains - 1)
    if np.bincount(found, minlength=domains).min() < 5:
        return draw_domains(labels, alpha, domains, seed + 1000)
    return found


def _words_unit(lab: Lab, seed: int, calibrated: bool) -> dict[str, float]:
    """Accents are the domains; clips are left out until the word groups have the frequencies drawn for each accent."""
    fast, world = lab.scale == "smoke", lab.world("sample")
    if fast:
        world = world.select(np.isin(world.groups, np.unique(world.groups)[::6]))
    params = {"world": world.fingerprint, "seed": seed, "calibrated": calibrated, "fast": fast}

    def compute() -> dict[str, float]:
        front_end = word_front_end()
        windows = fit_frames_many(world.log_mels(front_end), front_end)
        X = log_mel_statistics(torch.stack(windows).numpy())  # (clips, 320)
        X = (standardize_groups(X, world.groups) if calibrated else StandardScaler().fit_transform(X)) / 10
        y = world.labels * WORD_GROUPS // len(world.classes)
        accents, d = np.unique([name.rpartition("-")[0] for name in world.groups], return_inverse=True)
        rng = np.random.default_rng(seed)
        shares = rng.dirichlet(np.full(WORD_GROUPS, 1.0 / WORD_GROUPS), len(accents))
        kept = rng.random(len(y)) < (shares / shares.max(1, keepdims=True))[d, y]
        return _arms(X[kept].astype(np.float32), y[kept], d[kept], seed, fast)

    return lab.cached("ddfa-words", params, compute)


# -- the arms ----------------------------------------------------------------------------------------------------------


def _mlp() -> Any:
    return MLPClassifier((128, 64), alpha=1.0, early_stopping=True)


def _radial(fast: bool) -> Any:
    """Another discriminator, far faster: a logistic regression on random radial features."""
    components, steps = (40, 20) if fast else (150, 60)
    return make_pipeline(
        Nystroem(gamma=0.05, n_components=components, random_state=0),
        LogisticRegression(C=3.0, max_iter=steps),
    )


def _arms(
    X: np.ndarray, y: np.ndarray, d: np.ndarray, seed: int, fast: bool, brief: bool = False
) -> dict[str, float]:
    """Accuracies on one draw of domains, and errors of the proportions ("Q: "). No label but to score is used."""
    k = int(y.max()) + 1
    options: dict[str, Any] = {
        "n_classes": k,
        "n_discretization": 2 * k if k == 10 else 3 * k,
        "random_state": seed,
    }
    options |= {"cv": 2, "nmf_restarts": 2} if fast else {}

    def ddfa(discriminator: Any = None, **more: Any) -> DDFA:
        return DDFA(discriminator=discriminator or (_radial(fast) if fast else _mlp()), **options | more)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not identifiable is what is tested here
        model = ddfa().fit(X, domains=d)
        F, truth = model.domain_proba_, _proportions(y, d)
        order = match_clusters(y, model.labels_, k, k)
        true_given_class = truth.T / truth.sum(1)  # q(d|y): (r, k)
        oracle = (simplex_least_squares(F, true_given_class) * true_given_class[d]).argmax(1)
        found = {"DDFA": model.labels_, "oracle: true proportions": oracle}
        found["radial features" if brief else "variant: radial features as discriminator"] = (
            ddfa(_radial(fast)).fit(X, domains=d).labels_
        )
        found |= clusterings(X, F, d, k, seed, fast)
        if not brief:
            found["naive: table of cells"] = ddfa("precomputed", solver="table").fit(F, domains=d).labels_
            found["variant: pseudo-inverse"] = ddfa("precomputed", solver="pinv").fit(F, domains=d).labels_
            found["variant: domains left unequal"] = ddfa(reweight="none").fit(X, domains=d).labels_
            cells = make_pipeline(PCA(min(20, len(X) // 4)), KMeans(options["n_discretization"], n_init=5))
            found["variant: cells of PCA features"] = ddfa(discretizer=cells).fit(X, domains=d).labels_
            memory = clone(model.discriminators_[0][0]).fit(X, d).predict_proba(X)
            found["variant: probabilities of points trained on"] = (
                ddfa("precomputed").fit(memory, domains=d).labels_
            )
    scores = {arm: clustering_accuracy(y, labels) for arm, labels in found.items()}
    if not brief:
        scores["Q: DDFA"] = float(np.abs(model.class_prior_ - truth[order]).sum(0).mean())
        whole = np.bincount(y, minlength=k)[:, None] / len(y)
        scores["Q: every domain like the whole"] = float(np.abs(whole - truth).sum(0).mean())
    return scores


def clusterings(
    X: np.ndarray, F: np.ndarray, d: np.ndarray, k: int, seed: int, fast: bool
) -> dict[str, np.ndarray]:
    """What looks alike, and what looks alike to the domain classifier within a domain."""
    kmeans = KMeans(k, n_init=1 if fast else 20, random_state=seed)
    affinity = {"affinity": "nearest_neighbors", "n_neighbors": 10, "assign_labels": "kmeans"}
    mixture = GaussianMixture(k, n_init=1 if fast else 5, reg_covar=1e-3, random_state=seed)
    marks = np.eye(F.shape[1])[d]
    marks *= np.sqrt(F.var(0).sum() / marks.var(0).sum())  # as much spread as f(x) has
    arms = (
        kmeans.fit_predict(X),
        SpectralClustering(k, random_state=seed, **affinity).fit_predict(X),
        mixture.fit_predict(PCA(min(20, len(X) // 4), random_state=seed).fit_transform(X)),
        kmeans.fit_predict(np.c_[F, marks]),
    )
    return dict(zip(CLUSTERINGS, arms, strict=True))


def _proportions(y: np.ndarray, d: np.ndarray) -> np.ndarray:
    """p_d(y) as dealt: (k, r)."""
    counts = np.zeros((int(y.max()) + 1, int(d.max()) + 1))
    np.add.at(counts, (y, d), 1)
    return counts / counts.sum(0)
