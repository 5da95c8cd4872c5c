"""Separability of unlabelled embeddings follows accuracy along training, and says which checkpoint to keep.

The paper: S, one minus the mean bar of H0 over the longest, computed without labels, correlates with Fisher's discriminant
ratio and with accuracy, and decides when to stop; best on normalised embeddings. (1) Two Gaussians of 200 points each in 2, 16
and 128 dimensions at distances 0 to 8, as they are and scaled to unit length. (2) Classifiers with 6 labels a class (an MLP
whose embedding ends in a LayerNorm) on scikit-learn's digits, on the lab text encoder's features of docstring sentences, and
on spoken digits where FSDD is present, with 0, 20 and 40 % of the labels wrong, so that accuracy rises and falls; scores on 600
unlabelled points at each of 31 checkpoints, one stopping rule (patience 4, tolerance 0.5 %) for all. Rivals: entropy and the
99 % quantile as divisor, k-means' silhouette and Calinski-Harabasz score with the right and with twice the number of classes,
the training loss, the last checkpoint, and a labelled hold-out of the size of the support set.

Three verdicts. (a) Refuted if the 95 % interval of the Spearman correlation of S with Fisher's ratio on unit-length Gaussians
reaches 0. (b) Regret is the best test accuracy minus that of the checkpoint kept. Refuted if S' mean regret is more than 0.01
above the labelled hold-out's, or the interval of (regret of the last checkpoint - of S) reaches 0. (c) Refuted if the interval
of the Spearman correlation of S with test accuracy under label noise reaches 0, or if the silhouette has both the lower mean
regret and the higher mean correlation: then it works, and k-means does it better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score, silhouette_score
from torch import nn

from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab import audio as speech
from unfused.claims.lab import text as texts
from unfused.claims.lab.vision import digit_parts
from unfused.diagnose.class_separability import class_separability, separability_curve

RULES = {
    "a": "the 95 % interval of the Spearman correlation of S with Fisher's ratio on unit-length embeddings reaches 0",
    "b": "S' mean regret is more than 0.01 above the labelled hold-out's, or the 95 % interval of (regret of the last "
    "checkpoint - regret of S) reaches 0",
    "c": "the 95 % interval of the Spearman correlation of S with test accuracy under label noise reaches 0, or the silhouette "
    "has both the lower mean regret and the higher mean correlation",
}
NOISE = (0.0, 0.2, 0.4)
SCORES = (
    "S",
    "S, q99",
    "entropy",
    "silhouette",
    "silhouette, 2 C",
    "Calinski-Harabasz",
    "Calinski-Harabasz, 2 C",
)
LAST, LABELLED, LOSS = "last checkpoint", "labelled hold-out", "training loss"
Draw = tuple[torch.Tensor, torch.Tensor]


def claim(lab: Lab) -> list[Verdict]:
    return [gaussians(lab), *stopping(lab)]


# -- two Gaussians -----------------------------------------------------------------------------------------------------


def gaussians(lab: Lab) -> Verdict:
    seeds = range(lab.pick(smoke=2, desk=10))
    found = {
        (dimensions, unit_length): [correlations(lab, dimensions, unit_length, seed) for seed in seeds]
        for dimensions in lab.pick(smoke=(16,), desk=(2, 16, 128))
        for unit_length in (True, False)
    }

    def values(score: str, unit_length: bool) -> dict[str, list[float]]:
        return {
            f"D={d}": [row[score] for row in rows] for (d, unit), rows in found.items() if unit == unit_length
        }

    ours = values("S", True)
    return lab.verdict(
        world="(a) two Gaussians, unit length",
        name="S",
        metric="Spearman correlation with Fisher's ratio",
        method=ours,
        baselines={name: values(name, True) for name in found[next(iter(found))][0] if name != "S"},
        rule=RULES["a"],
        holds=lab.paired(ours).above_zero,
        ablations={
            "Not scaled to unit length, means": {
                name: {d: round(float(np.mean(v)), 3) for d, v in values(name, False).items()}
                for name in found[next(iter(found))][0]
            }
        },
    )


def correlations(lab: Lab, dimensions: int, unit_length: bool, seed: int) -> dict[str, float]:
    def compute() -> dict[str, float]:
        rng = np.random.default_rng([seed, dimensions])
        side = np.repeat([0, 1], 200)
        rows: dict[str, list[float]] = {}
        fisher = []
        for distance in np.linspace(0, 8, lab.pick(smoke=4, desk=17)):
            centre = rng.normal(size=dimensions)
            Z = rng.normal(size=(400, dimensions)) + np.outer(
                side - 0.5, distance * centre / np.linalg.norm(centre)
            )
            means = np.stack([Z[side == s].mean(0) for s in (0, 1)])
            within = sum(((Z[side == s] - means[s]) ** 2).sum() for s in (0, 1)) / len(Z)
            fisher.append(((means - Z.mean(0)) ** 2).sum() / 2 / within)
            if unit_length:
                Z = Z / np.linalg.norm(Z, axis=1, keepdims=True)
            for name, value in scores(Z, 2, seed, normalize=False).items():
                rows.setdefault(name, []).append(value)
        return {name: correlation(values, fisher) for name, values in rows.items() if "2 C" not in name}

    params = {"dimensions": dimensions, "unit": unit_length, "seed": seed, "scale": lab.scale}
    return lab.cached("separability-gaussians", params, compute, uses=[class_separability])


def scores(Z: np.ndarray, classes: int, seed: int, normalize: bool = True) -> dict[str, float]:
    """All that needs no labels; nan where points coincide."""
    if normalize:
        Z = Z / np.maximum(np.linalg.norm(Z, axis=1, keepdims=True), 1e-12)

    def separability(**how: str) -> float:
        return class_separability(Z, normalize=False, deduplicate=False, max_samples=None, **how).score  # type: ignore[arg-type]

    found = {
        "S": separability(),
        "S, q99": separability(normalizer="q99"),
        "entropy": separability(statistic="entropy"),
    }
    for name, k in (("", classes), (", 2 C", 2 * classes)):
        groups = KMeans(k, n_init=1, random_state=seed).fit_predict(Z)
        several = len(np.unique(groups)) > 1
        found[f"silhouette{name}"] = float(silhouette_score(Z, groups)) if several else float("nan")
        found[f"Calinski-Harabasz{name}"] = (
            float(calinski_harabasz_score(Z, groups)) if several else float("nan")
        )
    return found


def correlation(values: Sequence[float], truth: Sequence[float]) -> float:
    """Spearman's; 0 where one of them does not vary."""
    a, b = np.asarray(values, float), np.asarray(truth, float)
    there = np.isfinite(a)
    if there.sum() < 3 or np.ptp(a[there]) == 0 or np.ptp(b[there]) == 0:
        return 0.0
    return float(spearmanr(a[there], b[there]).statistic)


# -- when to stop ------------------------------------------------------------------------------------------------------


def stopping(lab: Lab) -> list[Verdict]:
    worlds: dict[str, Callable[[int], tuple[Draw, Draw, Draw, Draw]]] = {
        "digits": lambda seed: digits(lab, seed)
    }
    if lab.scale != "smoke":
        worlds["docstrings"] = lambda seed: sentences(lab, seed)
        if lab.has("fsdd"):
            worlds["spoken digits"] = lambda seed: words(lab, seed)
    runs = {
        (name, noise): [trained(lab, name, draw, noise, seed) for seed in lab.seeds]
        for name, draw in worlds.items()
        for noise in lab.pick(smoke=NOISE[1:2], desk=NOISE)
    }
    arms = [*SCORES, LOSS, LAST, LABELLED]

    def regrets(arm: str) -> dict[str, list[float]]:
        return {
            f"{name}, {noise:.0%} wrong": [regret(run, arm) for run in found]
            for (name, noise), found in runs.items()
        }

    def follows(arm: str) -> dict[str, list[float]]:
        return {
            f"{name}, {noise:.0%} wrong": [correlation(run[arm], run["test"]) for run in found]
            for (name, noise), found in runs.items()
            if noise
        }

    every = {arm: regrets(arm) for arm in arms}
    means = {
        arm: float(np.mean([v for values in groups.values() for v in values]))
        for arm, groups in every.items()
    }
    ranks = {arm: follows(arm) for arm in arms if arm != LAST}
    mean_ranks = {
        arm: float(np.mean([v for values in groups.values() for v in values]))
        for arm, groups in ranks.items()
    }
    better = means["silhouette"] < means["S"] and mean_ranks["silhouette"] > mean_ranks["S"]
    return [
        lab.verdict(
            world="(b) which checkpoint to keep",
            name="S",
            metric="regret in accuracy",
            method=every["S"],
            baselines={arm: values for arm, values in every.items() if arm != "S"},
            rule=RULES["b"],
            holds=means["S"] <= means[LABELLED] + 0.01 and lab.paired(every[LAST], every["S"]).above_zero,
            higher_is_better=False,
            ablations={
                "Mean regret": {
                    arm: {group: round(float(np.mean(v)), 3) for group, v in groups.items()}
                    for arm, groups in every.items()
                },
                "Test accuracy": {
                    f"{name}, {noise:.0%} wrong": {
                        "best checkpoint": round(float(np.mean([max(run["test"]) for run in found])), 3),
                        "last": round(float(np.mean([run["test"][-1] for run in found])), 3),
                    }
                    for (name, noise), found in runs.items()
                },
            },
        ),
        lab.verdict(
            world="(c) following accuracy under label noise",
            name="S",
            metric="Spearman correlation with test accuracy over checkpoints",
            method=ranks["S"],
            baselines={arm: values for arm, values in ranks.items() if arm != "S"},
            rule=RULES["c"],
            holds=lab.paired(ranks["S"]).above_zero and not better,
            notes=[
                f"mean regret and correlation: S {means['S']:.3f} and {mean_ranks['S']:.2f}, silhouette "
                f"{means['silhouette']:.3f} and {mean_ranks['silhouette']:.2f}"
            ],
        ),
    ]


def regret(run: dict[str, list[float]], arm: str) -> float:
    """Best test accuracy of a checkpoint minus that of the one which the arm keeps; all stop by the same rule."""
    test = run["test"]
    if arm == LAST:
        return max(test) - test[-1]
    best, top = 0, -np.inf
    for i, score in enumerate(run[arm]):
        if np.isfinite(score) and (np.isinf(top) or score - top > 0.005 * abs(top)):
            best, top = i, score
        elif i - best >= 4:
            break
    return max(test) - test[best]


class Net(nn.Module):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64), nn.LayerNorm(64))
        self.head = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def trained(
    lab: Lab, name: str, draw: Callable[[int], tuple[Draw, Draw, Draw, Draw]], noise: float, seed: int
) -> dict[str, list[float]]:
    """Every score at every checkpoint."""
    count, between = lab.pick(smoke=6, desk=30), 10

    def compute() -> dict[str, list[float]]:
        (x, y), (held_x, held_y), (pool, _), (test_x, test_y) = draw(seed)
        classes = int(max(y.max(), test_y.max())) + 1
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.rand(len(y), generator=generator) < noise
        y = torch.where(wrong, (y + torch.randint(1, classes, y.shape, generator=generator)) % classes, y)
        torch.manual_seed(seed)
        model = Net(x.shape[1], classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        rows: dict[str, list[float]] = {}
        for step in range(count * between + 1):
            if step % between == 0:
                with torch.no_grad():
                    found = scores(model.embed(pool).numpy(), classes, seed)
                    found[LOSS] = -float(nn.functional.cross_entropy(model(x), y))
                    found[LABELLED] = float((model(held_x).argmax(1) == held_y).float().mean())
                    found["test"] = float((model(test_x).argmax(1) == test_y).float().mean())
                for key, value in found.items():
                    rows.setdefault(key, []).append(value)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return rows

    params = {"world": name, "noise": noise, "seed": seed, "scale": lab.scale}
    return lab.cached("separability-run", params, compute, uses=[class_separability, separability_curve])


def split(
    features: torch.Tensor, labels: torch.Tensor, test: Draw, seed: int, lab: Lab
) -> tuple[Draw, Draw, Draw, Draw]:
    """6 rows a class to train on, as many held out, 600 others without labels, and a test set; scaled by the unlabelled."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    of_class = [order[labels[order] == c] for c in labels.unique()]
    train, held = (torch.cat([rows[cut] for rows in of_class]) for cut in (slice(0, 6), slice(6, 12)))
    pool = torch.cat([rows[12:] for rows in of_class])
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))][
        : lab.pick(smoke=100, desk=600)
    ]
    mean, deviation = features[pool].mean(0), features[pool].std(0).clamp_min(1e-3)

    def part(x: torch.Tensor, y: torch.Tensor) -> Draw:
        return (x - mean) / deviation, y

    return (*(part(features[rows], labels[rows]) for rows in (train, held, pool)), part(*test))  # type: ignore[return-value]


def digits(lab: Lab, seed: int) -> tuple[Draw, Draw, Draw, Draw]:
    parts = {name: (images.flatten(1), labels) for name, (images, labels) in digit_parts(lab).items()}
    return split(*parts["pretrain"], parts["test"], seed, lab)


def sentences(lab: Lab, seed: int) -> tuple[Draw, Draw, Draw, Draw]:
    def compute() -> dict[str, torch.Tensor]:
        encoder, task = texts.masked_lm(lab).bert, texts.stdlib_areas(lab, 0)
        found = {}
        with torch.inference_mode():
            for name in ("train", "test"):
                columns, rows = getattr(task, name), []
                for start in range(0, len(columns["labels"]), 128):
                    part = {k: columns[k][start : start + 128] for k in ("input_ids", "attention_mask")}
                    states, mask = encoder(**part).last_hidden_state, part["attention_mask"][..., None]
                    rows.append((states * mask).sum(1) / mask.sum(1))
                found[name], found[f"{name} labels"] = torch.cat(rows), columns["labels"]
        return found

    found = lab.cached("separability-sentences", {"scale": lab.scale}, compute)
    return split(found["train"], found["train labels"], (found["test"], found["test labels"]), seed, lab)


def words(lab: Lab, seed: int) -> tuple[Draw, Draw, Draw, Draw]:
    world = lab.world("fsdd")
    drawn = speech.draw_words(world, 0, 6)  # speakers held out to test; the labels are drawn by `split`
    features = torch.from_numpy(speech.log_mel_statistics(drawn.inputs)).float()
    labels = torch.from_numpy(world.labels)
    rows = torch.from_numpy(np.asarray(drawn.pool))
    return split(features[rows], labels[rows], (features[~rows], labels[~rows]), seed, lab)
