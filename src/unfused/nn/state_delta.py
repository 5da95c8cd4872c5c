"""Sparse changes as plain tensors on state dicts, without PEFT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from unfused.nn.sparse_delta import add_sparse, check_sparse
from unfused.nn.sparse_layer import sparse_deltas

__all__ = ["from_state_dict_delta", "to_state_dict_delta"]


def to_state_dict_delta(
    model: nn.Module, adapter_name: str = "default", threshold: float = 1e-7
) -> dict[str, torch.Tensor]:
    """A vector as plain tensors, for use without PEFT.

    Parameters
    ----------
    model : PeftModel, or a transformers model with an adapter
    adapter_name : str, default="default"
    threshold : float, default=1e-7
        Smaller changes are left out.

    Returns
    -------
    dict of str to tensor
        For every changed tensor `NAME.index` (flat, ascending) and `NAME.values` (float32); the head's tensors (all of
        `modules_to_save`) as they are.
    """
    state = {}
    for name, (layer, delta, original) in sparse_deltas(model, adapter_name).items():
        change = layer.change(delta, original).detach()
        keep = change.abs() >= threshold
        if keep.any():
            state[f"{name}.index"], state[f"{name}.values"] = delta.index[keep], change[keep]
    for name, module in model.named_modules():
        heads = getattr(module, "modules_to_save", None)
        if isinstance(heads, nn.ModuleDict) and adapter_name in heads:
            for part, value in heads[adapter_name].state_dict().items():
                state[f"{name.removeprefix('base_model.model.')}.{part}"] = value.detach().clone()
    return state


def from_state_dict_delta(
    state: Mapping[str, torch.Tensor], *deltas: Mapping[str, torch.Tensor], heads: bool = True
) -> dict[str, torch.Tensor]:
    """A pretrained model's state dict with vectors added, in any order.

    Parameters
    ----------
    state : mapping of str to tensor
        Left as it is; tensors that no vector changes are shared with the result.
    *deltas : mapping of str to tensor
        From `to_state_dict_delta`.
    heads : bool, default=True
        Whether the vectors' heads replace the state's; False for a language's vector that was learned under another head.

    Raises
    ------
    ValueError
        If a vector changes a tensor that the state lacks, or entries that it has not.

    Examples
    --------
    >>> phi = {"fc.weight.index": torch.tensor([2]), "fc.weight.values": torch.tensor([0.5])}
    >>> from_state_dict_delta({"fc.weight": torch.ones(2, 2)}, phi, phi)["fc.weight"].tolist()
    [[1.0, 1.0], [2.0, 1.0]]
    """
    new = dict(state)
    for delta in deltas:
        for key, value in delta.items():
            name, _, kind = key.rpartition(".")
            if kind == "values" and f"{name}.index" in delta:
                continue
            sparse = kind == "index" and f"{name}.values" in delta
            if (name if sparse else key) not in new:
                raise ValueError(
                    f"the vector changes {name if sparse else key!r}, which the state dict lacks"
                )
            if sparse:
                check_sparse(value, delta[f"{name}.values"], new[name].shape)
                new[name] = add_sparse(new[name], delta[f"{name}.values"], value)
            elif heads:
                new[key] = value
    return new
