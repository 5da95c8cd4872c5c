"""Learning to reweight: how much each unlabelled example of a batch helps the labelled ones, by one look-ahead step.

With per-example losses l_i, a step on `sum_i eps_i l_i` and the labelled loss after it, the gradient to eps at 0 is known in
closed form, and its negative for a step of size 1 is

    a_i = < grad CE(labelled), grad l_i >,   w_i = relu(a_i) / sum_j relu(a_j)

All a_i together are one directional derivative: the change of the vector (l_1 ... l_B) along v = grad CE. Forward-mode
differentiation gives it in one forward pass, without per-example gradients and without a double backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["call_with", "meta_weights", "soft_losses"]

Batch = Mapping[str, Any]
Logits = Callable[[nn.Module, Batch], Tensor]


class _Call(nn.Module):
    """`function(model, batch)` as a module, whose parameters `functional_call` can put others in place of."""

    def __init__(self, model: nn.Module, function: Logits) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Batch) -> Tensor:
        return self.function(self.model, batch)


def call_with(model: nn.Module, parameters: Mapping[str, Tensor], function: Logits, batch: Batch) -> Tensor:
    """`function(model, batch)` with other values for some of the model's parameters, which stay as they are."""
    caller = _Call(model, function)
    return functional_call(caller, {f"model.{name}": value for name, value in parameters.items()}, (batch,))


def soft_losses(logits: Tensor, soft_labels: Tensor) -> Tensor:
    """KL(soft label || softmax(logits)) of each row: (B, C), (B, C) -> (B,)."""
    return F.kl_div(F.log_softmax(logits.float(), -1), soft_labels.float(), reduction="none").sum(-1)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def meta_weights(
    model: nn.Module,
    unlabeled: Batch,
    soft_labels: Tensor,
    labeled: Batch,
    logits: Logits = _logits,
) -> Tensor:
    """Weights of unlabelled examples by the agreement of their gradients with the labelled ones.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient count; dropout is off meanwhile.
    unlabeled : mapping of str to Tensor
        B examples, as the model's forward takes them.
    soft_labels : Tensor, shape (B, C)
        The teacher's probabilities.
    labeled : mapping of str to Tensor
        A few examples with `labels`, classes as int.
    logits : callable (model, batch) -> Tensor of shape (B, C), optional
        By default `model(**batch).logits`.

    Returns
    -------
    Tensor, shape (B,)
        Non-negative, of sum 1, detached; all 0 where no example helps: skip such a batch.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> class Classifier(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return SimpleNamespace(logits=super().forward(x))
    >>> _ = torch.manual_seed(0)
    >>> model = Classifier(2, 2)
    >>> one = {"x": torch.tensor([[1.0, 0.0]]), "labels": torch.tensor([0])}
    >>> two = {"x": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}  # what pulls to class 0 helps, what pulls to class 1 harms
    >>> meta_weights(model, two, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), one).tolist()
    [1.0, 0.0]
    """
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        raise ValueError("model has no parameter that requires a gradient: nothing to look ahead with")
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(logits(model, labeled).float(), labeled["labels"])
            found = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
        values = {name: p.detach() for name, p in chosen.items()}
        direction = {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(chosen.items(), found, strict=True)
        }

        def losses(parameters: dict[str, Tensor]) -> Tensor:
            return soft_losses(call_with(model, parameters, logits, unlabeled), soft_labels)

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
            _, alignment = jvp(losses, (values,), (direction,))  # type: ignore[misc]  # no aux: a pair
    finally:
        model.train(was_training)
    weights = alignment.detach().relu()
    total = weights.sum()
    return weights / total if total > 0 else torch.zeros_like(weights)
