"""What frozen features hold: a linear map on them, or a model's own head trained anew."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from unfused.diagnose._encoder_layers import tail, tail_parameters
from unfused.diagnose._feature_space import macro_f1

__all__ = ["ProbeRecipe", "linear_f1", "train_head"]


@dataclass(frozen=True)
class ProbeRecipe:
    """How the head on frozen layers is trained: the paper's recipe of fine-tuning.

    AdamW, norm clipped at 1, classes drawn alike often, the rate rises over `warmup` of the steps and falls to 0; the epoch
    that is best on validation counts. Every run has its own split and start.
    """

    lr: float = 7.6e-6
    weight_decay: float = 0.01
    batch_size: int = 8
    epochs: int = 25
    warmup: float = 0.2
    validation: float = 0.15
    runs: int = 3


def linear_f1(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, classes: range) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(y)) < 2:
        return macro_f1(y_test, np.full(len(y_test), y[0]), classes)
    found = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced")).fit(
        X, y
    )
    return macro_f1(y_test, found.predict(X_test), classes)


def train_head(
    model: nn.Module,
    pretrained: nn.Module,
    inputs: dict[str, torch.Tensor],
    H: np.ndarray,
    y: np.ndarray,
    H_test: np.ndarray,
    recipe: ProbeRecipe,
    seed: int,
) -> np.ndarray:
    """Predictions on `H_test` of what lies behind the layers, trained on the frozen pretrained features `H`."""
    rng = np.random.default_rng([seed, 3])
    probe = copy.deepcopy(model).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parameters = _fresh_tail(probe, pretrained)
        if not parameters:
            raise ValueError(
                f"{type(model).__name__} has no parameters behind its layers: give head=, or recipe=None"
            )
        order = rng.permutation(len(y))
        valid = order[: max(1, round(recipe.validation * len(y)))]
        train = order[len(valid) :]
        _, group, sizes = np.unique(y[train], return_inverse=True, return_counts=True)
        chance = 1 / sizes[group] / len(sizes)  # every class alike often
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        steps = max(1, len(train) // recipe.batch_size)
        rise = max(1.0, recipe.warmup * steps * recipe.epochs)
        total = steps * recipe.epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min((s + 1) / rise, (total - s) / max(1.0, total - rise))
        )
        targets = torch.from_numpy(y).to(parameters[0].device)
        best: tuple[float, np.ndarray | None] = (-1.0, None)
        with tail(probe, inputs) as head:
            for _ in range(recipe.epochs):
                probe.train()
                for _ in range(steps):
                    rows = rng.choice(train, size=min(recipe.batch_size, len(train)), p=chance)
                    loss = nn.functional.cross_entropy(head(H[rows]).float(), targets[torch.from_numpy(rows)])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    schedule.step()
                probe.eval()
                with torch.inference_mode():
                    said = head(H[valid]).argmax(-1).cpu().numpy()
                    score = macro_f1(y[valid], said, range(int(y.max()) + 1))
                    if score > best[0]:
                        best = score, head(H_test).argmax(-1).cpu().numpy()
    assert best[1] is not None
    return best[1]


def _fresh_tail(probe: nn.Module, pretrained: nn.Module) -> list[nn.Parameter]:
    """The parameters behind the layers as they were before tuning: pretrained where `pretrained` has them, else drawn anew."""
    named = tail_parameters(probe)
    given = dict(pretrained.named_parameters())
    short = {
        name.split(".", 1)[-1]: value for name, value in given.items()
    }  # a bare encoder lacks the prefix
    probe.requires_grad_(False)
    drawn: set[str] = set()
    for name, parameter in named:
        source = given.get(name)
        source = source if source is not None else given.get(name.split(".", 1)[-1])
        source = source if source is not None else short.get(name)
        if source is not None and source.shape == parameter.shape:
            with torch.no_grad():
                parameter.copy_(source)
        else:
            drawn.add(name.rpartition(".")[0])
        parameter.requires_grad_(True)
    for owner in drawn:
        module: Any = probe.get_submodule(owner)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return [parameter for _, parameter in named]
