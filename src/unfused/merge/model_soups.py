"""Model soups: one model out of the runs of a sweep, by averaging their weights.

Fine-tunings of one base often lie in one basin of low error, where the mean of the weights answers like an ensemble at the
cost of a single model. Whatever is averaged must come from the same weights and the same initial head.

- *Uniform*: `theta = (1/k) sum_i theta_i`. No validation data; one bad run spoils it.
- *Greedy*: the models in the order of their validation scores; each is kept if the mean with it scores at least as well as
  the mean so far. Never below the best single model on the validation set, which therefore says nothing of test data.
- *Learned*: `min sum_j CE(beta f(x_j; sum_i alpha_i theta_i), y_j)` on held-out data, alpha a softmax, one for all tensors or
  one for each; only the mixed model is differentiated.

`predict_gap` estimates how far a soup of two lies from their ensemble, from the curvature of the loss on the line between
them and the variance of their disagreement. A soup on another data set's models is `greedy_soup([base, *models], score)`.

The paper accepts ties, its released script does not: `accept=">="` or `">"`. Sums are kept, not means, in float32 (float64 for
more than 100 models in half precision), and rounded once.

Reference: Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time,
ICML 2022, arXiv:2203.05482.
Needs: checkpoints, labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unfused.merge import _soup_cli  # noqa: F401  (registers what the engine calls)
from unfused.merge._compose import Descent, Weights, check_tensor, weights_of
from unfused.merge._soup_greedy import GreedySoup, greedy_soup, rank_models
from unfused.merge._soup_learned import LearnedSoup, SoupGap, learned_soup, predict_gap, refresh_batch_norm
from unfused.merge._soup_states import average_tensors, shares_of, states_of, twins, wide

__all__ = [
    "GreedySoup",
    "LearnedSoup",
    "SoupGap",
    "average_tensors",
    "greedy_soup",
    "learned_soup",
    "predict_gap",
    "rank_models",
    "refresh_batch_norm",
    "uniform_soup",
]


def uniform_soup(
    models: Sequence[nn.Module | Weights],
    weights: Sequence[float] | None = None,
    base: nn.Module | Weights | None = None,
    check_descent: bool = True,
) -> dict[str, Tensor]:
    """The mean of the models' weights.

    Parameters
    ----------
    models : sequence of k state dicts, modules or open checkpoints
        Of one architecture. One tensor of one model is looked at at a time, so that lazy mappings stay lazy.
    weights : sequence of k floats, optional
        Divided by their sum; by default equal.
    base : state dict, module or open checkpoint, optional
        What all were fine-tuned from; only looked at to tell whether they were.
    check_descent : bool, default=True
        Refuse models whose weight matrices have a cosine below 0.3 to the base's (without it: to the first model's).

    Returns
    -------
    dict of str to Tensor
        In the dtypes of the first model. Integer buffers are its own; tied weights are averaged once and stay tied. Running
        statistics of batch norms are averaged like weights, which is wrong: `refresh_batch_norm` after it.

    Raises
    ------
    ValueError
        For models of different names or shapes, values that are not finite, unrelated models, LoRA factors (the mean of the
        factors is not the mean of the products: merge each adapter first).

    Examples
    --------
    >>> one, two = {"w": torch.tensor([[1.0, 3.0]])}, {"w": torch.tensor([[3.0, 5.0]])}
    >>> uniform_soup([one, two])["w"].tolist()
    [[2.0, 4.0]]
    """
    states, names = states_of(models)
    shares = shares_of(weights, len(states))
    reference = None if base is None else weights_of(base, "base")
    descent = Descent(len(states))
    soup: dict[str, Tensor] = {}
    for name, twin in twins(states[0], names):
        if twin is not None:
            soup[name] = soup[twin]
            continue
        first = states[0][name]
        like = first if reference is None or name not in reference else reference[name]
        total: Tensor | None = None
        for i, (state, share) in enumerate(zip(states, shares, strict=True)):
            tensor = check_tensor(state[name], first, name, f"models[{i}]")
            if not first.is_floating_point():
                break
            if like.shape == first.shape:
                descent.add(i, tensor, like)
            if total is None:
                total = torch.zeros(first.shape, dtype=wide(first.dtype, len(states)), device=first.device)
            total.add_(tensor.to(total), alpha=share)
        soup[name] = first.clone() if total is None else total.div_(sum(shares)).to(first.dtype)
    if check_descent:
        descent.check(to="the first model" if reference is None else "the base")
    return soup
