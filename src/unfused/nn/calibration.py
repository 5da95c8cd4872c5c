"""How far stated confidence is from accuracy, and the one number that repairs it."""

from __future__ import annotations

import torch

__all__ = ["calibration_error", "fit_temperature"]


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean |confidence - accuracy| over bins of equal width, weighted by their share.

    Parameters
    ----------
    logits : Tensor (n, classes)
    labels : Tensor (n,)
    bins : int, default=15

    Examples
    --------
    >>> sure = torch.tensor([[20.0, 0.0], [20.0, 0.0]])
    >>> round(calibration_error(sure, torch.tensor([0, 1])), 6)
    0.5
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    return float(gap.index_add_(0, place, confidence - right).abs().sum() / len(labels))


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The T > 0 for which `logits / T` have the lowest cross-entropy, between 1/50 and 50.

    Examples
    --------
    >>> logits = torch.tensor([[4.0, 0.0]] * 4)
    >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])) * 1.0986, 2)  # 3/4 right: log 3 = 1.0986
    4.0
    """
    from scipy.optimize import minimize_scalar

    logits, labels = logits.double().cpu(), labels.cpu()

    def loss(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / 2.718281828459045**log_t, labels))

    return float(2.718281828459045 ** minimize_scalar(loss, bounds=(-3.912, 3.912), method="bounded").x)
