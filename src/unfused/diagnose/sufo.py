"""SUFO: looks at an encoder's feature space before, while and after fine-tuning, in four steps, to tell whether to trust it.

*Supervised probing*: macro-F1 with the layers frozen (what was there before) beside the fine-tuned one; high and then low on
a rare class is overfitting. *Unsupervised similarity*: per layer, Spearman's correlation of the distances between the same
samples in the untuned and the tuned model (RSA), and CKA. *Feature dynamics*: coordinates on the first two principal components
by epoch; as a number, the Fisher ratio trace(S_B) / trace(S_W) and the first epoch with 90 % of its last value. *Outliers*: the
tuned space is nearly two-dimensional; macro-F1 without the first components, or with one or two alone, shows how far. On PC1
and PC2, each axis is cut by itself into as many groups as there are classes; the largest cells are the clusters,

    code = groups * kmeans(P[:, 0]) + kmeans(P[:, 1]),    outliers: all that lie outside the `groups` most common codes,

and what several models agree on is a list to read for an expert. The share of outliers is not controlled; they are sorted by
the distance to the nearest cluster, farthest first. Components and means are of the sample, per model, and are applied to
held-out samples, with the mean added again. One-dimensional k-means is exact. The paper has no Fisher ratio, no CKA and no
probe of each layer: they are added, so that what its figures show is a number.

Reference: Diagnosing Transformers: Illuminating Feature Spaces for Clinical Decision-Making, ICLR 2024, arXiv:2305.17588.
Needs: the pretrained model, labels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from unfused.diagnose._encoder_layers import layer_features, resolve_pool, rows_of, tail
from unfused.diagnose._feature_space import (
    AxisClusters,
    aligned_axes,
    axis_clusters,
    explained_variance,
    fisher_ratio,
    linear_cka,
    macro_f1,
    pc_ablation,
    per_class_accuracy,
    rsa,
)
from unfused.diagnose._head_probe import ProbeRecipe, linear_f1, train_head
from unfused.diagnose._report import Report
from unfused.diagnose._sufo_report import (
    Dynamics,
    Probe,
    Similarity,
    Sparsity,
    SufoComparison,
    SufoReport,
    sufo_compare,
)

__all__ = [
    "ProbeRecipe",
    "SufoComparison",
    "SufoReport",
    "axis_clusters",
    "fisher_ratio",
    "linear_cka",
    "pc_ablation",
    "rsa",
    "sufo",
    "sufo_compare",
]

COMMAND = {
    "function": "diagnose_files",
    "arguments": {
        "base": {"type": "str", "help": "Pretrained encoder: folder or hub id."},
        "tuned": {"type": "strs", "help": "Fine-tuned classifier; may be repeated to compare several."},
        "data": {
            "type": "path",
            "help": "CSV or JSON lines with text and label, or a folder of files by class.",
        },
        "held_out": {"type": "path", "default": None, "help": "The same, not trained on."},
        "checkpoints": {"type": "strs", "default": None, "help": "Of the (one) tuned model, in order."},
        "groups": {"type": "int", "default": None, "help": "Groups an axis; by default one a class."},
        "pool": {"type": "str", "default": "auto", "help": "cls, mean, last, or auto."},
        "max_samples": {"type": "int", "default": 1000, "help": "Of the data, drawn at random."},
        "probe_lr": {"type": "float", "default": 7.6e-6, "help": "Of the head on frozen layers."},
        "seed": {"type": "int", "default": 0, "help": "Of the sample and the probes."},
    },
}

COMPONENTS = 5
SETTLED = 0.9
MOST = 4000
"""Samples above which the distances of all pairs take minutes."""


def sufo(
    model: nn.Module,
    data: Any,
    pretrained: nn.Module | None = None,
    checkpoints: Mapping[float, Any] | Sequence[Any] = (),
    held_out: Any = None,
    labels: Any = None,
    *,
    groups: int | None = None,
    pool: str = "auto",
    max_samples: int = 1000,
    head: Callable[[np.ndarray], Any] | None = None,
    recipe: ProbeRecipe | None = ProbeRecipe(),
    reference: nn.Module | None = None,
    ids: Sequence[Any] | None = None,
    name: str = "model",
    batch_size: int = 32,
    seed: int = 0,
) -> SufoReport:
    """All four steps for one fine-tuned encoder; a missing input leaves its part out, and the report says so.

    Parameters
    ----------
    model : nn.Module
        Encoder with its head, fine-tuned: of transformers, or any module whose layers are a ModuleList.
    data : mapping or datasets.Dataset
        The model's inputs, samples first, of training samples; `labels` may be among them. `max_samples` are drawn.
    pretrained : nn.Module, optional
        The model before: with or without a head.
    checkpoints : mapping epoch -> model, or sequence, optional
        Models, or folders that the model's class loads, between `pretrained` (epoch 0) and `model` (the last); a sequence is
        numbered from 1. Loaded one at a time.
    held_out : mapping, optional
        Samples not trained on, with `labels`.
    labels : array (N,) of int, optional
        From 0 on.
    groups : int, optional
        Of each axis; by default as many as classes, 3 without labels.
    pool : {"auto", "cls", "mean", "last"}, default="auto"
        Which token, or what of all, is a sample's feature. "auto" takes the class token where there is one.
    max_samples : int, default=1000
    head : callable (n, d) -> logits, optional
        From the last layer's feature. By default what the model has behind its layers, fed with that feature at every token.
    recipe : ProbeRecipe, optional
        Of the head on frozen layers; None leaves it out.
    reference : nn.Module, optional
        A second tuning of the same model: its RSA to `model` is what an unchanged layer can reach.
    ids : sequence, optional
        Name of each sample; by default its number.
    name : str, default="model"
    batch_size : int, default=32
    seed : int, default=0

    Returns
    -------
    SufoReport

    Examples
    --------
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> _ = torch.manual_seed(0)
    >>> size = dict(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_labels=3)
    >>> config = BertConfig(num_attention_heads=2, **size)
    >>> before, after = (BertForSequenceClassification(config) for _ in range(2))
    >>> data = {"input_ids": torch.randint(30, (40, 6)), "labels": torch.arange(40) % 3}
    >>> report = sufo(after, data, pretrained=before)
    >>> len(report.rsa.rsa), list(report.missing)
    (3, ['probe', 'dynamics', 'components'])
    """
    inputs, count = rows_of(data)
    y = _labels(data if labels is None else {"labels": labels}, count)
    names = list(range(count)) if ids is None else list(ids)
    if len(names) != count:
        raise ValueError(f"ids has {len(names)} entries for {count} samples: give one each")
    if not 3 <= max_samples <= MOST:
        raise ValueError(f"max_samples={max_samples}: from 3 to {MOST}, distances of all pairs are compared")
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:max_samples])
    rows = torch.from_numpy(chosen)
    inputs = {column: value[rows] for column, value in inputs.items()}
    y, names = None if y is None else y[chosen], [names[i] for i in chosen]
    pool = resolve_pool(model, inputs, pool)

    H, logits = layer_features(model, inputs, pool, batch_size)
    before = None if pretrained is None else layer_features(pretrained, inputs, pool, batch_size)[0]
    if before is not None and len(before) != len(H):
        raise ValueError(
            f"pretrained has {len(before) - 1} layers and model {len(H) - 1}: give the same encoder"
        )
    missing: dict[str, str] = {}

    # S
    known = None if held_out is None else rows_of(held_out)
    test_y = None if known is None else _labels(held_out, known[1])
    probe, test = None, None
    if known is None or test_y is None or y is None:
        missing["probe"] = "labels and a labelled held_out are needed"
    else:
        test = layer_features(model, known[0], pool, batch_size)
        if test[1] is None:
            missing["probe"] = "the model gives no logits"
        else:
            probe = _probe(
                model,
                pretrained,
                inputs,
                known[0],
                H,
                before,
                test,
                y,
                test_y,
                pool,
                recipe,
                head,
                batch_size,
                seed,
            )
    # U
    similarity = None
    if before is None:
        missing["similarity"] = "pretrained is needed"
    else:
        shuffle = np.random.default_rng(seed + 1).permutation(len(rows))
        other = None if reference is None else layer_features(reference, inputs, pool, batch_size)[0]
        similarity = Similarity(
            np.array([rsa(a, b) for a, b in zip(before, H, strict=True)]),
            np.array([linear_cka(a, b) for a, b in zip(before, H, strict=True)]),
            None if other is None else np.array([rsa(a, b) for a, b in zip(other, H, strict=True)]),
            np.array([rsa(a[shuffle], b) for a, b in zip(before, H, strict=True)]),
        )
    # F
    dynamics = None
    if not len(checkpoints) or y is None:
        missing["dynamics"] = "checkpoints and labels are needed"
    else:
        dynamics = _dynamics(model, before, checkpoints, inputs, H, y, pool, batch_size)
    # O
    last = H[-1]
    sparsity = Sparsity(
        None if before is None else explained_variance(before[-1], COMPONENTS),
        explained_variance(last, COMPONENTS),
    )
    curves = None
    if test is None or test_y is None or y is None or (head is None and logits is None):
        missing["components"] = "labels, a labelled held_out and a head are needed"
    else:
        classes = None if logits is None else logits.shape[1]
        with _eval(model), _head(model, inputs, head, batch_size) as to_logits:
            curves = pc_ablation(last, to_logits, y, test[0][-1], test_y, num_classes=classes)
    number = groups or (3 if y is None else len(np.unique(y)))
    coordinates = aligned_axes(last)
    clusters = axis_clusters(coordinates, number)
    labelled = range(logits.shape[1]) if logits is not None else np.unique(y) if y is not None else ()
    return SufoReport(
        name,
        tuple(str(c) for c in labelled),
        pool,
        probe,
        similarity,
        dynamics,
        sparsity,
        curves,
        _outliers(clusters, names, logits, y),
        missing,
        tuple(names),
        coordinates,
        clusters,
    )


sufo.compare = sufo_compare  # type: ignore[attr-defined]


# -- the steps ---------------------------------------------------------------------------------------------------------


def _labels(data: Any, count: int) -> np.ndarray | None:
    columns = getattr(data, "column_names", None) or data
    name = next((n for n in ("labels", "label") if n in columns), None)
    if name is None:
        return None
    found = np.asarray(data[name])
    if found.shape != (count,) or not np.issubdtype(found.dtype, np.integer) or found.min(initial=0) < 0:
        raise ValueError(
            f"labels have shape {found.shape} and type {found.dtype}: give {count} integers from 0 on"
        )
    return found


class _eval:
    """The model in eval mode, and as it was afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.training)


class _head:
    """Features (n, d) to logits as arrays, in batches: the given head, or the model's own."""

    def __init__(
        self, model: nn.Module, inputs: Any, head: Callable[[Any], Any] | None, batch_size: int
    ) -> None:
        self.own = None if head is not None else tail(model, inputs)
        self.head, self.batch_size = head, batch_size

    def __enter__(self) -> Callable[[np.ndarray], np.ndarray]:
        head = self.head if self.own is None else self.own.__enter__()

        @torch.inference_mode()
        def to_logits(H: np.ndarray) -> np.ndarray:
            found = [head(H[i : i + self.batch_size]) for i in range(0, len(H), self.batch_size)]  # type: ignore[misc]
            return np.concatenate(
                [f.float().cpu().numpy() if hasattr(f, "cpu") else np.asarray(f) for f in found]
            )

        return to_logits

    def __exit__(self, *error: Any) -> None:
        if self.own is not None:
            self.own.__exit__(*error)


def _probe(
    model: nn.Module,
    pretrained: nn.Module | None,
    inputs: dict[str, torch.Tensor],
    test_inputs: dict[str, torch.Tensor],
    H: list[np.ndarray],
    before: list[np.ndarray] | None,
    test: tuple[list[np.ndarray], np.ndarray | None],
    y: np.ndarray,
    test_y: np.ndarray,
    pool: str,
    recipe: ProbeRecipe | None,
    head: Any,
    batch_size: int,
    seed: int,
) -> Probe:
    logits = test[1]
    assert logits is not None
    classes = range(logits.shape[1])
    said = logits.argmax(1)
    linear, runs = None, []
    if pretrained is not None and before is not None:
        test_before = layer_features(pretrained, test_inputs, pool, batch_size)[0]
        linear = np.array(
            [linear_f1(a, y, b, test_y, classes) for a, b in zip(before, test_before, strict=True)]
        )
        if recipe is not None and head is None:
            runs = [
                train_head(model, pretrained, inputs, before[-1], y, test_before[-1], recipe, seed + run)
                for run in range(recipe.runs)
            ]
    return Probe(
        macro_f1(test_y, said, classes),
        per_class_accuracy(test_y, said, classes),
        tuple(macro_f1(test_y, run, classes) for run in runs),
        tuple(per_class_accuracy(test_y, run, classes) for run in runs),
        linear,
        np.array([linear_f1(a, y, b, test_y, classes) for a, b in zip(H, test[0], strict=True)]),
    )


def _dynamics(
    model: nn.Module,
    before: list[np.ndarray] | None,
    checkpoints: Mapping[float, Any] | Sequence[Any],
    inputs: dict[str, torch.Tensor],
    H: list[np.ndarray],
    y: np.ndarray,
    pool: str,
    batch_size: int,
) -> Dynamics:
    pairs = checkpoints.items() if isinstance(checkpoints, Mapping) else enumerate(checkpoints, 1)

    def spaces() -> Iterator[tuple[float, list[np.ndarray]]]:
        epoch = 0.0
        if before is not None:
            yield 0.0, before
        for number, source in pairs:
            if float(number) <= epoch and (before is not None or epoch > 0):
                raise ValueError(
                    f"checkpoints: epoch {number} after {epoch:g}; give them in order, from 1 on"
                )
            epoch = float(number)
            if isinstance(source, str | os.PathLike):
                source = type(model).from_pretrained(source, use_safetensors=True)  # type: ignore[attr-defined]
            if source is not model:
                yield epoch, layer_features(source, inputs, pool, batch_size)[0]
            else:
                epoch -= 1
        yield epoch + 1, H

    epochs: list[float] = []
    ratios: list[list[float]] = []
    coordinates: list[np.ndarray] = []
    for epoch, layers in spaces():
        epochs.append(epoch)
        ratios.append([fisher_ratio(layer, y) for layer in layers])
        coordinates.append(aligned_axes(layers[-1], coordinates[-1] if coordinates else None))
    fisher = np.array(ratios)  # (E, layers + 1)
    settled = [
        epochs[int((fisher[:, i] >= SETTLED * fisher[-1, i]).argmax())] for i in range(fisher.shape[1])
    ]
    return Dynamics(tuple(epochs), fisher, tuple(settled), np.stack(coordinates), y)


def _outliers(
    clusters: AxisClusters, names: Sequence[Any], logits: np.ndarray | None, y: np.ndarray | None
) -> tuple[dict[str, Any], ...]:
    from scipy.special import log_softmax

    logp = None if logits is None else log_softmax(logits, axis=1)
    found = []
    for i in np.flatnonzero(clusters.outlier).tolist():
        known = logp is not None and y is not None
        found.append(
            {
                "id": names[i],
                "code": int(clusters.code[i]),
                "distance": float(clusters.distance[i]),
                "prediction": None if logp is None else int(logp[i].argmax()),
                "label": None if y is None else int(y[i]),
                "loss": float(-logp[i, y[i]]) if known else None,  # type: ignore[index]
                "confidence": None if logp is None else float(np.exp(logp[i].max())),
            }
        )
    return tuple(sorted(found, key=lambda o: -o["distance"]))


# -- the command -------------------------------------------------------------------------------------------------------


def diagnose_files(
    base: str,
    tuned: Sequence[str],
    data: Any,
    held_out: Any = None,
    checkpoints: Sequence[str] | None = None,
    probe_lr: float = 7.6e-6,
    **settings: Any,
) -> list[Report]:
    """`unfused diagnose sufo`: texts of a table, or a folder of pictures or recordings by class."""
    from transformers import AutoModel

    from unfused.diagnose._encoder_files import load_classifier, read_samples

    if checkpoints and len(tuned) > 1:
        raise ValueError("checkpoints are of one tuned model: give one --tuned")
    reports: list[Report] = []
    for folder in tuned:
        model = load_classifier(folder)
        sample, ids = read_samples(data, folder, model)
        test = None if held_out is None else read_samples(held_out, folder, model)[0]
        before = AutoModel.from_pretrained(base, use_safetensors=True).eval()
        name = os.path.basename(os.path.normpath(folder))
        reports.append(
            sufo(
                model,
                sample,
                before,
                list(checkpoints or ()),
                test,
                ids=ids,
                recipe=ProbeRecipe(lr=probe_lr),
                name=name,
                **settings,
            )
        )
    if len(reports) > 1:
        reports.append(sufo_compare([r for r in reports if isinstance(r, SufoReport)]))
    return reports
