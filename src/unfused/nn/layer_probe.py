"""What linear maps can read from each layer of a frozen transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Batch", "LayerProbe", "hidden_states", "layer_probe", "plot_layers", "pooled"]

Batch = Mapping[str, torch.Tensor]
BATCH, LEARNING_RATE, MARGIN = 128, 3e-3, 0.3
"""Of training: samples a step, Adam's rate, and by how much a cosine to the same group must be the larger."""


@dataclass(frozen=True)
class LayerProbe:
    """What linear maps read from the layers of a frozen model.

    Attributes
    ----------
    metric : str
        "accuracy", or "MAP", mean average precision.
    values : ndarray, shape (layers + 1,)
        Of the probe on each layer, on held-out samples; the first is of the embeddings' output.
    weighted : float
        Of the probe on a mixture of all layers.
    weights : ndarray, shape (layers + 1,)
        The mixture's weights, averaged over the held-out samples.
    """

    metric: str
    values: np.ndarray
    weighted: float
    weights: np.ndarray

    def table(self) -> str:
        pairs = enumerate(zip(self.values, self.weights, strict=True))
        rows = [f"{layer:>5}  {value:8.3f}  {weight:6.3f}" for layer, (value, weight) in pairs]
        return "\n".join([f"layer  {self.metric:>8}  weight", *rows, f"  mix  {self.weighted:8.3f}"])

    def plot(self, ax: Any = None) -> Any:
        return plot_layers(ax, self.values, self.metric)


def plot_layers(ax: Any, values: np.ndarray, label: str) -> Any:
    """One number a layer as a line; on new axes where none are given."""
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots()[1]
    ax.plot(range(len(values)), values, marker="o")
    ax.set(xlabel="layer (0: embeddings)", ylabel=label)
    return ax


@torch.no_grad()
def hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Output of the embeddings and of every layer of a transformers model in eval mode, (N, layers + 1, tokens, dim)."""
    training = model.training
    model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    states = model(**inputs, output_hidden_states=True).hidden_states
    model.train(training)
    return torch.stack(states, 1).float()


def pooled(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Means over the tokens that the batch's `attention_mask` leaves, (N, layers + 1, dim)."""
    mask = batch.get("attention_mask")
    if mask is None:
        return states.mean(2)
    weights = mask.to(states)[:, None, :, None]
    return (states * weights).sum(2) / weights.sum(2).clamp(min=1)


def layer_probe(
    model: nn.Module,
    dataset: Mapping[str, Any],
    kind: str = "token",
    test_fraction: float = 0.25,
    batch_size: int = 64,
    steps: int = 300,
    seed: int = 0,
) -> LayerProbe:
    """Train linear maps on frozen hidden states: one on each layer, and one on a mixture that weighs the layers by input.

    Parameters
    ----------
    model : nn.Module
        Of transformers.
    dataset : dict
        The model's inputs (tensors, samples first) and `labels`; of pairs, `first` and `second` are dicts of inputs.
    kind : {"token", "sequence", "pair", "group"}, default="token"
        token: labels (N, tokens), -100 is left out; a classifier. sequence: labels (N,); a classifier of the mean over
        tokens. pair: labels (N,), 1 for a match and 0; one map for both sides, a cosine above 0.5 is called a match.
        group: labels (N,), the same for what means the same; a map trained on triplets, judged by mean average precision.
    test_fraction : float, default=0.25
        Of the samples, drawn at random and held out.
    batch_size : int, default=64
        Of the passes through the model.
    steps : int, default=300
        Of training the probes, 128 samples each.
    seed : int, default=0

    Returns
    -------
    LayerProbe
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(_KINDS)}")
    labels = torch.as_tensor(dataset["labels"])
    inputs = {name: value for name, value in dataset.items() if name != "labels"}
    sides = [inputs["first"], inputs["second"]] if kind == "pair" else [inputs]
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[torch.randperm(len(labels), generator=generator)[: max(1, round(test_fraction * len(labels)))]] = (
        True
    )
    chosen = labels != -100 if kind == "token" else None
    x = torch.stack([torch.cat(list(_features(model, side, chosen, batch_size))) for side in sides], 1)
    if chosen is not None:
        test, labels = test[:, None].expand_as(labels)[chosen], labels[chosen]
    train = x[~test]  # (samples, sides, layers + 1, dim)
    x = (x - train.mean((0, 1))) / (train.std((0, 1)) + 1e-5)  # layers differ in scale
    loss, judge = _KINDS[kind]
    probes = _Probes(
        x.shape[2], x.shape[3], int(labels.max()) + 1 if loss is _classify else x.shape[3], generator
    )
    optimizer = torch.optim.Adam(probes.parameters(), lr=LEARNING_RATE)
    rows = torch.nonzero(~test).flatten()
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        loss(probes(x[batch])[0], labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        found, weights = probes(x[test])
    values = judge(found, labels[test])
    return LayerProbe(
        metric="MAP" if kind == "group" else "accuracy",
        values=values[:-1].numpy(),
        weighted=float(values[-1]),
        weights=weights.mean((0, 1)).numpy(),
    )


def _features(
    model: nn.Module, inputs: Batch, chosen: torch.Tensor | None, batch_size: int
) -> Iterator[torch.Tensor]:
    """(samples, layers + 1, dim) of each batch: means over tokens, or the chosen tokens."""
    for start in range(0, len(next(iter(inputs.values()))), batch_size):
        batch = {name: value[start : start + batch_size] for name, value in inputs.items()}
        states = hidden_states(model, batch)
        if chosen is None:
            yield pooled(states, batch)
        else:
            yield states.transpose(1, 2)[chosen[start : start + batch_size]]


class _Probes(nn.Module):
    """A linear map on every layer and one on the mixture, trained side by side: no parameter is shared."""

    def __init__(self, layers: int, dim: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.randn(layers + 1, dim, outputs, generator=generator) / dim**0.5)
        self.biases = nn.Parameter(torch.zeros(layers + 1, outputs))
        self.gate = nn.Parameter(torch.zeros(layers, dim))
        self.gate_bias = nn.Parameter(torch.zeros(layers))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, sides, layers, dim) -> (N, sides, layers + 1, outputs), the mixture's last, and weights (N, sides, layers)."""
        weights = (torch.einsum("nsld,ld->nsl", x, self.gate) + self.gate_bias).softmax(-1)
        mixture = (weights.unsqueeze(-1) * x).sum(2, keepdim=True)
        return torch.einsum("nsld,ldo->nslo", torch.cat([x, mixture], 2), self.maps) + self.biases, weights


def _classify(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = outputs[:, 0].transpose(1, 2)  # (N, classes, probes)
    return F.cross_entropy(logits, labels[:, None].expand(-1, logits.shape[2]), reduction="sum") / len(labels)


def _accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (outputs[:, 0].argmax(-1) == labels[:, None]).float().mean(0)


def _match(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    cosine = F.cosine_similarity(outputs[:, 0], outputs[:, 1], dim=-1)  # (N, probes)
    return (cosine - labels[:, None].float()).square().mean(0).sum()


def _matched(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    cosine = F.cosine_similarity(outputs[:, 0], outputs[:, 1], dim=-1)
    return ((cosine > 0.5) == labels[:, None].bool()).float().mean(0)


def _triplets(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Every anchor against its least similar partner and its most similar stranger in the batch."""
    cosine, same, others = _cosines(outputs, labels)
    partner = cosine.masked_fill(~(same & others), 2.0).amin(-1)  # (probes, N)
    stranger = cosine.masked_fill(same, -2.0).amax(-1)
    usable = (same & others).any(-1) & (~same).any(-1)
    return (F.relu(stranger - partner + MARGIN) * usable).sum() / usable.sum().clamp(min=1)


def _mean_average_precision(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    cosine, same, others = _cosines(outputs, labels)
    order = cosine.masked_fill(~others, -2.0).argsort(-1, descending=True)[..., :-1]  # itself comes last
    hits = (same & others).expand_as(cosine).gather(-1, order).float()  # (probes, N, N - 1)
    precision = hits.cumsum(-1) / torch.arange(1, hits.shape[-1] + 1)
    has_partner = (same & others).any(-1)
    average = (precision * hits).sum(-1) / hits.sum(-1).clamp(min=1)  # (probes, N)
    return average[:, has_partner].mean(-1)


def _cosines(outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    unit = F.normalize(outputs[:, 0], dim=-1)
    same = labels[:, None] == labels
    return torch.einsum("npd,mpd->pnm", unit, unit), same, ~torch.eye(len(labels), dtype=torch.bool)


Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_KINDS: dict[str, tuple[Rule, Rule]] = {
    "token": (_classify, _accuracy),
    "sequence": (_classify, _accuracy),
    "pair": (_match, _matched),
    "group": (_triplets, _mean_average_precision),
}
