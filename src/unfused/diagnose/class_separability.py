"""H0 class separability: how clustered embeddings are, without labels, and when to stop training by it.

Points are born at radius 0 and merge as balls around them grow. The merge radii, the finite bars of persistent homology in
dimension 0, are exactly the edges p_1 .. p_N-1 of the Euclidean minimum spanning tree, so that is what is computed (scipy's
single linkage; for many points `unfused.nn.spanning_tree`, without the matrix of distances):

    q_i = p_i / max_j p_j,    S = 1 - mean_i q_i

Few long bars among many short ones, tight groups far apart, give S near 1. S compares embeddings of the same points by the
same model as it trains, never data sets. It rests on one edge (`normalizer="q99"` does not), blurs unless the embeddings are
normalised, and knows no labels: an encoder that collapses into wrong groups scores high. `statistic="entropy"` is
`1 - H(p / sum p) / log(N - 1)`, often the better one.

Reference: Estimating class separability of text embeddings with persistent homology, TMLR 2024, arXiv:2305.15016.
Needs: unlabelled data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from unfused.data.files import printable
from unfused.diagnose._report import Report, axes
from unfused.nn.spanning_tree import tree_edges

__all__ = [
    "Separability",
    "SeparabilityCurve",
    "SeparabilityStopping",
    "class_separability",
    "separability_curve",
]

COMMAND = {
    "function": "diagnose_files",
    "arguments": {
        "base": {"type": "str", "default": "", "help": "The model before training (folder or hub id)."},
        "tuned": {"type": "strs", "default": [], "help": "Checkpoints, in order of time; repeat the option."},
        "inputs": {"type": "path", "default": None, "help": "Unlabelled files: a folder, or a text file of one text a line."},
        "embeddings": {"type": "paths", "default": [], "help": "Instead: .npy or .safetensors, one per checkpoint."},
        "statistic": {"type": "str", "default": "mean", "help": "mean, median or entropy."},
        "normalizer": {"type": "str", "default": "max", "help": "max (the paper's) or q99 (not one edge alone)."},
        "max_samples": {"type": "int", "default": 1000, "help": "Points, drawn by the seed."},
        "patience": {"type": "int", "default": 4, "help": "Checkpoints without a rise before stopping."},
        "seed": {"type": "int", "default": 0, "help": "Of the draw of points."},
    },
}  # fmt: skip
STATISTICS, NORMALIZERS = ("mean", "median", "entropy"), ("max", "q99")


@dataclasses.dataclass(frozen=True, eq=False)
class Separability(Report):
    """The result of `class_separability`.

    Attributes
    ----------
    score : float
        S; nan where all points coincide.
    statistic, normalizer, metric : str
    points : int
        N, after sampling and leaving out copies.
    copies : int
        Rows left out because another one is the same.
    entropy : float
        Of the bars, `-sum w log w` with `w = p / sum p`, in nats.
    max_over_median : float
        How far the longest bar is from the usual one: where it is one outlier's, S says nothing.
    persistence : array (N - 1,)
        The bars, ascending.
    """

    score: float
    statistic: str
    normalizer: str
    metric: str
    points: int
    copies: int
    entropy: float
    max_over_median: float
    persistence: np.ndarray = dataclasses.field(repr=False)

    def headline(self) -> str:
        return f"Separability {self.score:.3f} ({self.statistic} over {self.points} points, bars divided by {self.normalizer})"

    def rows(self) -> list[dict[str, Any]]:
        bars = self.persistence
        return [
            {
                "score": self.score,
                "points": self.points,
                "copies left out": self.copies,
                "longest bar": float(bars[-1]),
                "median bar": float(np.median(bars)),
                "longest / median": self.max_over_median,
                "entropy": self.entropy,
            }
        ]

    def notes(self) -> list[str]:
        return [
            "Compare it along the training of one model on the same points only. It measures clusters, not agreement with "
            "labels, and with the maximum as divisor one outlier can make it high: see the longest bar over the median."
        ]

    def plot(self, ax: Any = None) -> Any:
        """The barcode: one line a bar, longest below; the last component never dies and is not drawn."""
        ax = axes(ax)
        bars = self.persistence[::-1]
        ax.hlines(np.arange(len(bars)), 0, bars, lw=max(0.2, min(2.0, 200 / len(bars))))
        ax.set(xlabel="distance", ylabel="bar", ylim=(-1, len(bars)), xlim=(0, None))
        return ax


@dataclasses.dataclass(frozen=True, eq=False)
class SeparabilityCurve(Report):
    """The result of `separability_curve`.

    Attributes
    ----------
    scores : tuple of float
        One per checkpoint.
    labels : tuple of str
    stop : int or None
        Where training would have stopped; None if it would have gone on.
    best : int
        The checkpoint to keep: the earliest, up to `stop`, whose score no later one beats by more than the tolerance.
    results : tuple of Separability
    """

    scores: tuple[float, ...]
    labels: tuple[str, ...]
    stop: int | None
    best: int
    results: tuple[Separability, ...] = dataclasses.field(repr=False)

    def headline(self) -> str:
        end = "goes on" if self.stop is None else f"stops at {self.labels[self.stop]}"
        return f"Separability {end}; keep {self.labels[self.best]} ({self.scores[self.best]:.3f})"

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "checkpoint": label,
                **result.rows()[0],
                "verdict": "keep" if i == self.best else "stop" if i == self.stop else "",
            }
            for i, (label, result) in enumerate(zip(self.labels, self.results, strict=True))
        ]

    def notes(self) -> list[str]:
        return self.results[0].notes()

    def pictures(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "Separability of the checkpoints": self.plot,
            "Bars, divided by the longest: the box plots of the paper": self._plot_boxes,
        }

    def plot(self, ax: Any = None) -> Any:
        ax = axes(ax)
        at = np.arange(len(self.scores))
        ax.plot(at, self.scores, marker="o", ms=3)
        ax.plot(self.best, self.scores[self.best], "o", ms=9, mfc="none", label="keep")
        if self.stop is not None:
            ax.axvline(self.stop, color="0.6", lw=0.8, ls="--", label="stop")
        ax.set(xlabel="checkpoint", ylabel="separability")
        if len(at) <= 12:
            ax.set_xticks(at, self.labels, rotation=30 if max(map(len, self.labels)) > 4 else 0, ha="right")
        ax.legend(frameon=False)
        return ax

    def _plot_boxes(self, ax: Any) -> Any:
        q = [r.persistence / max(float(r.persistence[-1]), 1e-300) for r in self.results]
        ax.boxplot(q, widths=0.6, showfliers=True, flierprops={"ms": 2})
        ax.set(xlabel="checkpoint", ylabel="bar / longest bar", ylim=(0, 1.02))
        ax.set_xticks(np.arange(1, len(q) + 1), [str(i) for i in range(len(q))])
        return ax


def class_separability(
    Z: Any,
    metric: str = "euclidean",
    normalize: bool = True,
    statistic: str = "mean",
    normalizer: str = "max",
    max_samples: int | None = 1000,
    seed: int = 0,
    deduplicate: bool = True,
) -> Separability:
    """How clustered points are, from the minimum spanning tree.

    Parameters
    ----------
    Z : array or Tensor (N, D)
        Embeddings in eval mode.
    metric : str, default="euclidean"
        Another of `scipy.spatial.distance.pdist` needs the matrix of distances.
    normalize : bool, default=True
        Scale rows to length 1: without it the signal is blurred.
    statistic : {"mean", "median", "entropy"}
    normalizer : {"max", "q99"}
        What bars are divided by (not for the entropy).
    max_samples : int or None, default=1000
        A draw without replacement of so many rows; None takes all.
    seed : int, default=0
    deduplicate : bool, default=True
        Leave out rows that are copies: they make bars of length 0.

    Raises
    ------
    ValueError
        For fewer than 3 points, values that are not finite, names that are none.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> cloud = rng.normal(size=(100, 8))
    >>> groups = cloud * 0.05 + np.repeat(rng.normal(size=(4, 8)), 25, axis=0)
    >>> class_separability(groups).score > class_separability(cloud).score + 0.2
    True
    """
    _check(statistic, normalizer, max_samples)
    Z = _rows(Z)
    if max_samples is not None and len(Z) > max_samples:
        Z = Z[_sample(len(Z), max_samples, seed)]
    before = len(Z)
    if deduplicate:
        Z = Z[_without_copies(Z)]
    return _measure(Z, before - len(Z), metric, normalize, statistic, normalizer)


def separability_curve(
    embeddings: Sequence[Any],
    patience: int = 4,
    tol: float = 0.005,
    metric: str = "euclidean",
    normalize: bool = True,
    statistic: str = "mean",
    normalizer: str = "max",
    max_samples: int | None = 1000,
    seed: int = 0,
    labels: Sequence[str] | None = None,
) -> SeparabilityCurve:
    """Separability along training, when to stop, and which checkpoint to keep.

    Parameters
    ----------
    embeddings : sequence of array (N, D)
        Of the same points, one for each checkpoint, in order of time. Points that are copies in the first are left out.
    patience : int, default=4
        Stop after so many checkpoints whose score is not above the best one's.
    tol : float, default=0.005
        A score is above another if it is by more than this share of it.
    metric, normalize, statistic, normalizer, max_samples, seed
        See `class_separability`; all checkpoints get the same draw.
    labels : sequence of str, optional
        Names of the checkpoints; by default 0, 1 ...

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> cloud, centres = rng.normal(size=(90, 8)), np.repeat(4 * rng.normal(size=(3, 8)), 30, axis=0)
    >>> curve = separability_curve([cloud + t * centres for t in (0, 0.5, 1, 1, 1, 1, 1)], patience=2)
    >>> curve.best, curve.stop
    (2, 4)
    """
    _check(statistic, normalizer, max_samples)
    _check_rule(patience, tol)
    if not len(embeddings):
        raise ValueError("embeddings is empty: give one array per checkpoint")
    arrays = [_rows(Z, f"embeddings[{i}]") for i, Z in enumerate(embeddings)]
    if len(sizes := {len(Z) for Z in arrays}) > 1:
        raise ValueError(
            f"embeddings have {sorted(sizes)} rows: each checkpoint must embed the same points, S depends on N"
        )
    names = [str(i) for i in range(len(arrays))] if labels is None else [str(label) for label in labels]
    if len(names) != len(arrays):
        raise ValueError(f"labels has {len(names)} names for {len(arrays)} checkpoints")
    keep = np.arange(len(arrays[0]))
    if max_samples is not None and len(keep) > max_samples:
        keep = _sample(len(keep), max_samples, seed)
    drawn = len(keep)
    keep = keep[_without_copies(arrays[0][keep])]
    results = tuple(
        _measure(Z[keep], drawn - len(keep), metric, normalize, statistic, normalizer) for Z in arrays
    )
    rule = _Rule(patience, tol)
    stop = next((i for i, result in enumerate(results) if rule.stops(result.score)), None)
    return SeparabilityCurve(tuple(r.score for r in results), tuple(names), stop, rule.best, results)


class _Rule:
    """Patience: `stops(score)` after each evaluation; `best` is the evaluation to keep."""

    def __init__(self, patience: int, tol: float):
        self.patience, self.tol = patience, tol
        self.seen, self.best, self.top = 0, 0, -np.inf

    def stops(self, score: float) -> bool:
        i, self.seen = self.seen, self.seen + 1
        # nan (all points coincide) is never better.
        if score - self.top > self.tol * abs(self.top) or (np.isinf(self.top) and np.isfinite(score)):
            self.best, self.top = i, score
            return False
        return i - self.best >= self.patience


class SeparabilityStopping(TrainerCallback):
    """A callback of transformers' `Trainer` that measures separability on unlabelled inputs, stops by it, and keeps the best.

    It needs no labels and no evaluation set. Every measurement is put into `state.log_history` as "separability"; where the
    Trainer evaluates anyway, it is among the metrics as "eval_separability" too, so that
    `metric_for_best_model="separability"` works.

    Parameters
    ----------
    encoder_fn : callable (model, batch) -> Tensor (n, D)
        Embeddings of a batch; called in eval mode without gradients, the batch on the model's device.
    loader : iterable of batches
        The same points each time, in the same order.
    patience, tol
        See `separability_curve`.
    every : int, optional
        Measure every so many steps; by default after each epoch.
    restore_best : bool, default=True
        Keep a copy of the best weights in memory and load it when training ends.
    **separability
        For `class_separability`: statistic, normalizer, max_samples, normalize, metric, seed.

    Attributes
    ----------
    history : list of dict
        `step`, `epoch`, `separability`.
    best : dict or None
        The entry whose weights are kept.

    Examples
    --------
    >>> callback = SeparabilityStopping(lambda model, batch: model(batch), [torch.randn(8, 4)], patience=2)
    >>> callback.measure(torch.nn.Linear(4, 3)) > 0
    True
    """

    def __init__(
        self,
        encoder_fn: Callable[[Any, Any], torch.Tensor],
        loader: Iterable[Any],
        patience: int = 4,
        tol: float = 0.005,
        every: int | None = None,
        restore_best: bool = True,
        **separability: Any,
    ) -> None:
        _check_rule(patience, tol)
        if every is not None and every < 1:
            raise ValueError(f"every={every}: give a number of steps of at least 1, or None for each epoch")
        settings: dict[str, Any] = {
            "statistic": "mean",
            "normalizer": "max",
            "max_samples": 1000,
        } | separability
        _check(settings["statistic"], settings["normalizer"], settings["max_samples"])
        self.encoder_fn, self.loader = encoder_fn, loader
        self.patience, self.tol, self.every, self.restore_best = patience, tol, every, restore_best
        self.settings = separability
        self._begin()

    def _begin(self) -> None:
        self.history: list[dict[str, float]] = []
        self._rule = _Rule(self.patience, self.tol)
        self._weights: dict[str, torch.Tensor] | None = None

    @property
    def best(self) -> dict[str, float] | None:
        return self.history[self._rule.best] if self.history else None

    @torch.no_grad()
    def measure(self, model: torch.nn.Module) -> float:
        """The score of a model; its mode is as before afterwards."""
        training = model.training
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        model.eval()
        try:
            found = [
                self.encoder_fn(model, _to(batch, device)).detach().float().cpu() for batch in self.loader
            ]
        finally:
            model.train(training)
        if not found:
            raise ValueError(
                "loader gave no batch: a generator is empty the second time, give a DataLoader or a list"
            )
        return class_separability(torch.cat(found).numpy(), **{"deduplicate": False, **self.settings}).score

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin()

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.every is None:
            self._look(state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._look(state, control, model)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **_: Any
    ) -> None:
        if metrics is not None and model is not None:
            fresh = self.history and self.history[-1]["step"] == state.global_step
            metrics["eval_separability"] = self.history[-1]["separability"] if fresh else self.measure(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._weights is not None:
            model.load_state_dict(self._weights)
            self._weights = None

    def _look(self, state: Any, control: Any, model: Any) -> None:
        score = self.measure(model)
        entry = {"separability": score, "step": state.global_step, "epoch": state.epoch}
        self.history.append(entry)
        state.log_history.append(dict(entry))
        if self._rule.stops(score):
            control.should_training_stop = True
        if self.restore_best and self._rule.best == len(self.history) - 1:
            self._weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {name: _to(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_to(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch


def _check(statistic: str, normalizer: str, max_samples: int | None) -> None:
    if statistic not in STATISTICS:
        raise ValueError(f"statistic={statistic!r}: choose one of {', '.join(STATISTICS)}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={normalizer!r}: choose one of {', '.join(NORMALIZERS)}")
    if max_samples is not None and max_samples < 3:
        raise ValueError(f"max_samples={max_samples}: at least 3 points are needed, or None for all")


def _check_rule(patience: int, tol: float) -> None:
    if patience < 1:
        raise ValueError(f"patience={patience}: at least 1")
    if not 0 <= tol < 1:
        raise ValueError(f"tol={tol}: give a share in [0, 1)")


def _rows(Z: Any, name: str = "Z") -> np.ndarray:
    if isinstance(Z, torch.Tensor):
        Z = Z.detach().cpu().to(torch.float64 if Z.dtype == torch.float64 else torch.float32).numpy()
    Z = np.asarray(Z)
    if Z.ndim != 2 or Z.dtype.kind not in "fiu" or len(Z) < 3:
        raise ValueError(
            f"{name} has the shape {Z.shape} of {Z.dtype}: give embeddings (N, D) of at least 3 points"
        )
    if not np.isfinite(Z).all():
        bad = int(np.flatnonzero(~np.isfinite(Z).all(1))[0])
        raise ValueError(f"{name}: row {bad} holds values that are not finite")
    return Z


def _sample(count: int, wanted: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))


def _without_copies(Z: np.ndarray) -> np.ndarray:
    """Rows to keep: the first of each."""
    return np.sort(np.unique(Z, axis=0, return_index=True)[1])


def _measure(
    Z: np.ndarray, copies: int, metric: str, normalize: bool, statistic: str, normalizer: str
) -> Separability:
    if normalize:
        length = np.linalg.norm(Z, axis=1, keepdims=True)
        Z = Z / np.where(length > 0, length, 1)
    if len(Z) < 2:
        bars = np.zeros(1)
    elif metric == "euclidean":
        bars = tree_edges(Z)
    else:
        from scipy.cluster.hierarchy import single
        from scipy.spatial.distance import pdist

        bars = single(pdist(Z, metric))[:, 2]
    total, longest, median = float(bars.sum()), float(bars[-1]), float(np.median(bars))
    score = entropy = float("nan")
    if total > 0 and longest > 1e-12 * max(1.0, float(np.abs(Z).max())):
        w = bars[bars > 0] / total
        entropy = float(-(w * np.log(w)).sum())
        if statistic == "entropy":
            score = 1 - entropy / np.log(len(bars)) if len(bars) > 1 else float("nan")
        else:
            divisor = longest if normalizer == "max" else float(np.quantile(bars, 0.99))
            q = np.minimum(bars / divisor, 1) if divisor > 0 else (bars > 0).astype(float)
            score = 1 - float(q.mean() if statistic == "mean" else np.median(q))
    ratio = longest / median if median > 0 else float("inf") if longest > 0 else float("nan")
    return Separability(float(score), statistic, normalizer, metric, len(Z), copies, entropy, ratio, bars)


def diagnose_files(
    base: str, tuned: Sequence[str], inputs: Path | None, embeddings: Sequence[Path], statistic: str, normalizer: str,
    max_samples: int, patience: int, seed: int, progress: Callable[[str, int, int], None] | None = None,
) -> Report:  # fmt: skip
    """What the command does: of files of embeddings, or of the checkpoints' features of the inputs."""
    models = [name for name in (base, *tuned) if name]
    if bool(models) == bool(embeddings):
        raise ValueError("give --embeddings FILE ..., or --base / --tuned with --inputs")
    if models and inputs is None:
        raise ValueError("--inputs is missing: a folder of files, or a text file of one text a line")
    arrays = []
    if embeddings:
        arrays = [_load(path) for path in embeddings]
        names = [printable(path.stem) for path in embeddings]
    else:
        from unfused.data.frozen_encoder import FrozenEncoder

        assert inputs is not None
        items: list[str] = (
            sorted(
                str(path) for path in inputs.rglob("*") if path.is_file() and not path.name.startswith(".")
            )
            if inputs.is_dir()
            else [line for line in inputs.read_text(encoding="utf-8").splitlines() if line.strip()]
        )
        if len(items) > max_samples:
            items = [items[i] for i in _sample(len(items), max_samples, seed)]
        for done, model in enumerate(models):
            if progress is not None:
                progress(printable(model), done, len(models))
            arrays.append(np.asarray(FrozenEncoder(model).fit_transform(items)))
        names = [printable(Path(model).name) for model in models]
    settings: dict[str, Any] = {
        "statistic": statistic, "normalizer": normalizer, "max_samples": max_samples, "seed": seed
    }  # fmt: skip
    if len(arrays) == 1:
        return class_separability(arrays[0], **settings)
    return separability_curve(arrays, patience, labels=names, **settings)


def _load(path: Path) -> np.ndarray:
    if path.suffix == ".safetensors":
        from unfused.data.checkpoint_io import open_checkpoint

        with open_checkpoint(path) as tensors:
            if len(tensors) != 1:
                raise ValueError(f"{printable(path)} holds {len(tensors)} tensors: save the embeddings alone")
            return _rows(next(iter(tensors.values())), printable(path))
    try:
        return _rows(np.load(path, allow_pickle=False), printable(path))
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{printable(path)}: no such file") from None
        raise ValueError(f"{printable(path)} is no .npy array of embeddings: {error}") from None
