"""Model Breadcrumbs: several fine-tunes added to their base through masks that cut both tails of every task vector.

A task vector's largest entries are outliers that disturb other tasks, its many small ones are noise. Ranked by size in their
group (1 = largest; n entries), those of rank `(drop_top n, (drop_top + keep) n]` survive, and

    theta_new = theta + scale sum_t mask_t(theta_t - theta)

with the same settings for all tasks, kept as tasks are added: the sum is not averaged, the survivors are not rescaled and no
sign is elected. The group is a row of the first dimension ("row": what the released code does and its numbers come from;
kernels of convolutions are flattened to `(out, -1)`) or the whole tensor ("tensor": what the paper says). A vector is one
group; a scalar is added unmasked. At least one entry of each group survives, and where `drop_top n < 1` none is dropped.
Entries are chosen by rank, so that ties (rows of tokens never seen have only zeros) do not make the mask denser.

The release calls `keep` beta and `drop_top` gamma; in mergekit they are `density` and `gamma`, with the whole tensor as group
and the mild trim density 0.9 in its examples. Fine-tunes must descend from this base and be exported alike: rounding noise
between two exports is a dense change that survives in small rows.

Reference: Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, ECCV 2024, arXiv:2312.06795.
Needs: fine-tuned models, their base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from unfused.merge._masks import between_ranks
from unfused.merge._method import merge_method, per_model, share
from unfused.merge._plain import add_scaled
from unfused.nn.state_delta import from_state_dict_delta

__all__ = ["add_breadcrumbs", "breadcrumbs", "extract_breadcrumbs", "sparsify"]

Tensor = torch.Tensor


@merge_method(
    "breadcrumbs", splits=lambda granularity="row", **_: "rows" if granularity == "row" else "tensor"
)
def breadcrumbs(
    base: Tensor,
    deltas: Sequence[Tensor],
    *,
    scale: float | Sequence[float] = 0.3,
    keep: float | Sequence[float] = 0.15,
    drop_top: float | Sequence[float] = 0.01,
    granularity: str = "row",
) -> Tensor:
    """The base plus the scaled sum of the task vectors' middle slices.

    Parameters
    ----------
    base : Tensor
    deltas : sequence of Tensor
        Fine-tuned minus base, of one tensor; one per model.
    scale : float or one per model, default=0.3
        Of the sum.
    keep : float or one per model, default=0.15
        Share of the entries that survives, in (0, 1].
    drop_top : float or one per model, default=0.01
        Share of the largest entries that is dropped first, in [0, 1).
    granularity : {"row", "tensor"}, default="row"
        The group in which entries are ranked.

    Returns
    -------
    Tensor
        Of the shape of `base`.

    Raises
    ------
    ValueError
        If a parameter is out of its range.

    Examples
    --------
    >>> delta = torch.tensor([[9.0, 1.0, 4.0, -3.0]])
    >>> breadcrumbs(torch.zeros(1, 4), [delta, delta], scale=0.5, keep=0.5, drop_top=0.25)
    tensor([[ 0.,  0.,  4., -3.]])
    """
    count = len(deltas)
    scales = per_model("scale", scale, count)
    kept, dropped = per_model("keep", keep, count), per_model("drop_top", drop_top, count)
    masked = (
        sparsify(delta, keep=k, drop_top=d, granularity=granularity)
        for delta, k, d in zip(deltas, kept, dropped, strict=True)
    )
    return add_scaled(base, masked, scales)


def sparsify(
    delta: Tensor, *, keep: float = 0.15, drop_top: float = 0.01, granularity: str = "row"
) -> Tensor:
    """One tensor of a task vector with both tails set to zero.

    Parameters
    ----------
    delta : Tensor
    keep, drop_top : float, default=0.15, 0.01
        Shares of its entries; see `breadcrumbs`.
    granularity : {"row", "tensor"}, default="row"

    Examples
    --------
    >>> sparsify(torch.tensor([5.0, 1.0, -2.0, 0.5]), keep=0.25, drop_top=0.25)
    tensor([ 0.,  0., -2.,  0.])
    """
    if granularity not in ("row", "tensor"):
        raise ValueError(f"granularity={granularity!r} must be 'row' or 'tensor'")
    return between_ranks(delta, share("drop_top", drop_top, above=False), share("keep", keep), granularity)


def extract_breadcrumbs(
    base: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    *,
    keep: float = 0.15,
    drop_top: float = 0.01,
    granularity: str = "row",
) -> dict[str, Tensor]:
    """A model's sparse task vector, to be stored (as safetensors) and added later without the model.

    Parameters
    ----------
    base, model : mapping of str to Tensor
        State dicts, or checkpoints opened by `unfused.data.checkpoint_io.open_checkpoint`.
    keep, drop_top, granularity
        See `breadcrumbs`.

    Returns
    -------
    dict of str to Tensor
        `NAME.index` (int64, flat, ascending) and `NAME.values` (float32), for tensors that changed; the format of
        `unfused.nn.state_delta`.

    Raises
    ------
    ValueError
        If names or shapes differ.

    Examples
    --------
    >>> crumbs = extract_breadcrumbs({"w": torch.zeros(4)}, {"w": torch.tensor([5.0, 1.0, 2.0, 0.0])}, keep=0.5)
    >>> {name: tensor.tolist() for name, tensor in crumbs.items()}
    {'w.index': [0, 2], 'w.values': [5.0, 2.0]}
    """
    crumbs = {}
    if other := sorted(set(base) ^ set(model)):
        raise ValueError(f"only one of base and model has tensor {other[0]!r}")
    for name in base:
        ancestor, tuned = base[name], model[name]
        if ancestor.shape != tuned.shape:
            raise ValueError(
                f"tensor {name!r} is {tuple(ancestor.shape)} in base and {tuple(tuned.shape)} in model"
            )
        if not ancestor.is_floating_point():
            continue
        change = sparsify(
            tuned.detach().float() - ancestor.detach().float(),
            keep=keep,
            drop_top=drop_top,
            granularity=granularity,
        ).view(-1)
        if len(index := change.nonzero().view(-1)):
            crumbs[f"{name}.index"], crumbs[f"{name}.values"] = index, change[index]
    return crumbs


def add_breadcrumbs(
    state: Mapping[str, Tensor], *crumbs: Mapping[str, Tensor], scale: float | Sequence[float] = 0.3
) -> dict[str, Tensor]:
    """A state dict, merged or not, with further sparse task vectors added.

    Parameters
    ----------
    state : mapping of str to Tensor
        Left as it is.
    *crumbs : mapping of str to Tensor
        From `extract_breadcrumbs`.
    scale : float or one per vector, default=0.3

    Examples
    --------
    >>> crumbs = extract_breadcrumbs({"w": torch.zeros(4)}, {"w": torch.tensor([5.0, 1.0, 2.0, 0.0])}, keep=0.5)
    >>> add_breadcrumbs({"w": torch.ones(4)}, crumbs, scale=0.5)["w"]
    tensor([3.5000, 1.0000, 2.0000, 1.0000])
    """
    scales = per_model("scale", scale, len(crumbs))
    scaled = (
        {name: t * factor if name.endswith(".values") else t for name, t in vector.items()}
        for vector, factor in zip(crumbs, scales, strict=True)
    )
    return from_state_dict_delta(state, *scaled)
