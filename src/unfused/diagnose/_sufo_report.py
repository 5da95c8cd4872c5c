"""What SUFO found: the report of one model, and the comparison of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unfused.diagnose._feature_space import AxisClusters, PCCurves
from unfused.diagnose._report import Report, axes

__all__ = ["Dynamics", "Probe", "Similarity", "Sparsity", "SufoComparison", "SufoReport", "sufo_compare"]


@dataclass(frozen=True)
class Probe:
    """Macro-F1 and accuracies on held-out samples.

    Attributes
    ----------
    tuned_f1 : float
    tuned_accuracy : dict
        Class -> accuracy.
    head_f1 : tuple of float
        Of pooler and classifier trained on the frozen pretrained model, one per run; empty without a recipe.
    head_accuracy : tuple of dict
    linear_pretrained, linear_tuned : ndarray (layers + 1,)
        Of logistic regression on each layer; the first is of what goes into the first layer.
    """

    tuned_f1: float
    tuned_accuracy: dict[str, float]
    head_f1: tuple[float, ...]
    head_accuracy: tuple[dict[str, float], ...]
    linear_pretrained: np.ndarray | None
    linear_tuned: np.ndarray


@dataclass(frozen=True)
class Similarity:
    """Per layer, the first entry what goes into the first layer: RSA and CKA of the untuned to the tuned model; RSA to a
    second tuning (`reference`), an upper mark; RSA of shuffled samples, near 0. NaN where all features are the same, as a class
    token's are before the first layer."""

    rsa: np.ndarray
    cka: np.ndarray
    reference: np.ndarray | None
    shuffled: np.ndarray


@dataclass(frozen=True)
class Dynamics:
    """Fisher ratio by epoch and layer (E, layers + 1), coordinates of the last layer by epoch (E, N, 2), and of each layer
    the first epoch with 90 % of the last ratio."""

    epochs: tuple[float, ...]
    fisher: np.ndarray
    settled: tuple[float, ...]
    coordinates: np.ndarray = field(metadata={"json": False})
    labels: np.ndarray = field(metadata={"json": False})


@dataclass(frozen=True)
class Sparsity:
    """Cumulative share of variance of the first five components of the last layer, before and after."""

    before: np.ndarray | None
    after: np.ndarray


@dataclass(frozen=True, eq=False)
class SufoReport(Report):
    """One model's feature space.

    Attributes
    ----------
    name : str
    probe, rsa, dynamics, sparsity, pc_curves : records or None
        None where an input was missing; `missing` says which.
    outliers : tuple of dict
        `id`, `code`, `distance`, `prediction`, `label`, `loss`, `confidence`, farthest first.
    ids : tuple
        Of the sample.
    coordinates : ndarray (N, 2)
        On PC1 and PC2 of the tuned last layer.
    clusters : AxisClusters
    """

    name: str
    classes: tuple[str, ...]
    pool: str
    probe: Probe | None
    rsa: Similarity | None
    dynamics: Dynamics | None
    sparsity: Sparsity
    pc_curves: PCCurves | None
    outliers: tuple[dict[str, Any], ...]
    missing: dict[str, str]
    ids: tuple[Any, ...] = field(repr=False)
    coordinates: np.ndarray = field(repr=False, metadata={"json": False})
    clusters: AxisClusters = field(repr=False, metadata={"json": False})

    def rows(self) -> list[dict[str, Any]]:
        found: list[tuple[str, str, Any]] = []
        if (p := self.probe) is not None:
            if p.head_f1:
                found.append(("probe", "macro-F1, layers frozen", float(np.mean(p.head_f1))))
            found.append(("probe", "macro-F1, fine-tuned", p.tuned_f1))
            for name in self.classes:
                before = [run[name] for run in p.head_accuracy]
                frozen = f" (frozen {np.mean(before):.3f})" if before else ""
                found.append(("probe", f"accuracy of {name}, fine-tuned{frozen}", p.tuned_accuracy[name]))
            for layer, value in enumerate(p.linear_tuned):
                untuned = (
                    "" if p.linear_pretrained is None else f" (pretrained {p.linear_pretrained[layer]:.3f})"
                )
                found.append(("probe", f"linear macro-F1 of layer {layer}{untuned}", float(value)))
        if self.rsa is not None:
            for layer, value in enumerate(self.rsa.rsa):
                found.append(
                    ("similarity", f"RSA of layer {layer} (CKA {self.rsa.cka[layer]:.3f})", float(value))
                )
        if self.dynamics is not None:
            for epoch, ratio in zip(self.dynamics.epochs, self.dynamics.fisher[:, -1], strict=True):
                found.append(("dynamics", f"Fisher ratio of the last layer at {epoch:g}", float(ratio)))
            found.append(("dynamics", "first with 90 % of the last ratio", self.dynamics.settled[-1]))
        if self.sparsity.before is not None:
            found.append(("variance", "in two components, before", float(self.sparsity.before[:2][-1])))
        found.append(("variance", "in two components, after", float(self.sparsity.after[:2][-1])))
        if (c := self.pc_curves) is not None:
            found.append(("components", "macro-F1 of all", c.full_f1))
            found += [
                ("components", f"macro-F1 of {name} alone", kept["macro_f1"]) for name, kept in c.kept.items()
            ]
            found += [
                ("components", f"macro-F1 without the first {k}", float(c.removed[k]))
                for k in range(1, len(c.removed))
            ]
        found.append(("outliers", "share of the sample", len(self.outliers) / len(self.ids)))
        found += [(part, f"left out: {reason}", None) for part, reason in self.missing.items()]
        return [{"part": part, "what": what, "value": value} for part, what, value in found]

    def headline(self) -> str:
        two = float(self.sparsity.after[:2][-1])
        moved = ""
        if self.rsa is not None and np.isfinite(self.rsa.rsa).any():
            layer = int(np.nanargmin(self.rsa.rsa))
            moved = f"; layer {layer} moved most (RSA {self.rsa.rsa[layer]:.2f})"
        return f"{self.name}: two components hold {two:.0%} of the variance{moved}; {len(self.outliers)} outliers to read."

    def notes(self) -> list[str]:
        said = [
            f"Features: {self.pool} of the tokens, of {len(self.ids)} samples. RSA is dominated by outlying samples: read it "
            "beside CKA and beside the RSA of two tunings. The share of outliers is not controlled, and low confidence finds "
            "wrong labels as well: read the list from the top, and stop where it gets dull."
        ]
        if not self.outliers:
            said.append("Fewer cells than groups have members: there are no clusters to lie outside of.")
        return said

    def pictures(self) -> dict[str, Callable[[Any], Any]]:
        def of(part: str) -> Callable[[Any], Any]:
            return lambda ax: self.plot(ax, part=part)

        return {caption: of(part) for part, (caption, there) in self._parts().items() if there}

    def _parts(self) -> dict[str, tuple[str, bool]]:
        return {
            "rsa": ("How much each layer moved", self.rsa is not None),
            "probe": ("What a linear map reads from each layer", self.probe is not None),
            "dynamics": ("When classes separate", self.dynamics is not None),
            "variance": ("Variance in the first components", True),
            "removal": ("Macro-F1 without the first components", self.pc_curves is not None),
            "outliers": ("The sample on PC1 and PC2; crosses lie outside the clusters", True),
        }

    def plot(self, ax: Any = None, part: str = "rsa") -> Any:
        """`part`: "rsa", "probe", "dynamics", "variance", "removal" or "outliers"."""
        parts = self._parts()
        if part not in parts or not parts[part][1]:
            there = [name for name, (_, found) in parts.items() if found]
            raise ValueError(f"part={part!r}: this report has {', '.join(there)}")
        ax = axes(ax)
        if part == "rsa" and self.rsa is not None:
            for name in ("rsa", "cka", "reference", "shuffled"):
                if (values := getattr(self.rsa, name)) is not None:
                    ax.plot(values, marker="o", label={"rsa": "RSA", "cka": "CKA"}.get(name, f"RSA, {name}"))
            ax.set(xlabel="layer (0: embeddings)", ylabel="similarity to the untuned model")
        elif part == "probe" and self.probe is not None:
            for name in ("linear_pretrained", "linear_tuned"):
                if (values := getattr(self.probe, name)) is not None:
                    ax.plot(values, marker="o", label=name.partition("_")[2])
            ax.set(xlabel="layer (0: embeddings)", ylabel="macro-F1")
        elif part == "dynamics" and self.dynamics is not None:
            for layer in range(self.dynamics.fisher.shape[1]):
                ax.plot(
                    self.dynamics.epochs, self.dynamics.fisher[:, layer], marker="o", label=f"layer {layer}"
                )
            ax.set(xlabel="epoch", ylabel="between over within")
        elif part == "variance":
            for name in ("before", "after"):
                if (values := getattr(self.sparsity, name)) is not None:
                    ax.plot(range(1, len(values) + 1), values, marker="o", label=name)
            ax.set(xlabel="components", ylabel="share of variance", ylim=(0, 1))
        elif part == "removal" and self.pc_curves is not None:
            ax.plot(self.pc_curves.removed, marker="o", label="without the first")
            ax.set(xlabel="components removed", ylabel="macro-F1", ylim=(0, 1))
        else:
            odd = self.clusters.outlier
            ax.scatter(
                *self.coordinates[~odd].T, s=8, c=self.clusters.code[~odd], cmap="tab10", label="clusters"
            )
            ax.scatter(*self.coordinates[odd].T, s=18, marker="x", color="0.3", label="outliers")
            ax.set(xlabel="PC1", ylabel="PC2")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="small")
        return ax


@dataclass(frozen=True, eq=False)
class SufoComparison(Report):
    """Several models, or several runs of some, on the same sample.

    Attributes
    ----------
    models : tuple of dict
        One per name, means over its runs and, with two runs or more, their standard deviations.
    common : tuple of dict
        Outliers of every report, by mean distance: for an expert to read.
    """

    models: tuple[dict[str, Any], ...]
    common: tuple[dict[str, Any], ...]

    def rows(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.models]

    def headline(self) -> str:
        return f"{len(self.models)} models agree on {len(self.common)} outliers."

    def plot(self, ax: Any = None) -> Any:
        """RSA of the last layer and variance in two components by model."""
        ax = axes(ax)
        at = np.arange(len(self.models))
        for shift, column in ((-0.2, "RSA, last layer"), (0.2, "variance in two")):
            ax.bar(
                at + shift,
                [m[column] if m[column] is not None else 0 for m in self.models],
                0.4,
                label=column,
            )
        ax.set_xticks(at, [m["model"] for m in self.models])
        ax.legend(fontsize="small")
        return ax


def sufo_compare(reports: Sequence[SufoReport]) -> SufoComparison:
    """Outliers that all reports share, and a table of models; reports of one name are runs of one model.

    Raises
    ------
    ValueError
        If the reports are not of the same sample.
    """
    if not reports:
        raise ValueError("reports is empty: give at least one")
    odd = next((r for r in reports if r.ids != reports[0].ids), None)
    if odd is not None:
        raise ValueError(
            f"{odd.name} was run on another sample than {reports[0].name}: same data, max_samples and seed"
        )
    names = list(dict.fromkeys(r.name for r in reports))
    models = []
    for name in names:
        runs = [r for r in reports if r.name == name]
        numbers: dict[str, list[float | None]] = {
            "macro-F1, frozen": [
                float(np.mean(r.probe.head_f1)) if r.probe and r.probe.head_f1 else None for r in runs
            ],
            "macro-F1, tuned": [r.probe.tuned_f1 if r.probe else None for r in runs],
            "RSA, last layer": [float(r.rsa.rsa[-1]) if r.rsa else None for r in runs],
            "variance in two": [float(r.sparsity.after[:2][-1]) for r in runs],
            "settled at": [r.dynamics.settled[-1] if r.dynamics else None for r in runs],
            "outliers": [len(r.outliers) / len(r.ids) for r in runs],
        }
        row: dict[str, Any] = {"model": name, "runs": len(runs)}
        for column, values in numbers.items():
            given = [v for v in values if v is not None]
            row[column] = float(np.mean(given)) if given else None
            if len(reports) > len(names):
                row[f"{column}, deviation"] = float(np.std(given, ddof=1)) if len(given) > 1 else None
        models.append(row)
    by_report = [{o["id"]: o for o in r.outliers} for r in reports]
    shared = [i for i in by_report[0] if all(i in found for found in by_report)]
    common = [
        {
            "id": i,
            "distance": float(np.mean([found[i]["distance"] for found in by_report])),
            "label": by_report[0][i]["label"],
            "predictions": [found[i]["prediction"] for found in by_report],
        }
        for i in shared
    ]
    return SufoComparison(tuple(models), tuple(sorted(common, key=lambda o: -o["distance"])))
