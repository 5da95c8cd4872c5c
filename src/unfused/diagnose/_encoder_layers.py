"""The layers of any transformers encoder: their pooled features, and what comes behind the last of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["find_layers", "layer_features", "logits_of", "resolve_pool", "rows_of", "tail", "tail_parameters"]

POOLS = ("auto", "cls", "mean", "last")


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the encoder's layers: the longest list of modules of one class that lies in no other, the first of
    equal ones. Of a hierarchical network these are its stages.

    Raises
    ------
    ValueError
        Where there is none.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    ]
    if not found:
        raise ValueError(
            f"model={type(model).__name__} has no ModuleList of layers: give features to the functions on arrays instead"
        )
    outer = [(n, m) for n, m in found if not any(n.startswith(other + ".") for other, _ in found)]
    return max(outer, key=lambda pair: len(pair[1]))


def rows_of(data: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The model's inputs as tensors, samples first, and how many; of a mapping or a `datasets.Dataset`."""
    if hasattr(data, "with_format"):
        data = data.with_format("torch")[:]
    if not isinstance(data, Mapping) or not data:
        raise TypeError(f"data is {type(data).__name__}: give a mapping of the model's inputs, samples first")
    inputs = {name: torch.as_tensor(value) for name, value in data.items() if name not in ("labels", "label")}
    sizes = {name: len(value) for name, value in inputs.items()}
    if not inputs or len(set(sizes.values())) != 1:
        raise ValueError(
            f"data has columns of {sizes} samples: give each of the model's inputs for every sample"
        )
    return inputs, next(iter(sizes.values()))


def resolve_pool(model: nn.Module, inputs: Mapping[str, torch.Tensor], pool: str) -> str:
    """ "auto": "cls" where the model has a class token or all texts begin with the same one, else "mean"."""
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r}: choose one of {', '.join(POOLS)}")
    if pool != "auto":
        return pool
    if any(hasattr(module, name) for module in model.modules() for name in ("cls_token", "class_embedding")):
        return "cls"
    ids = inputs.get("input_ids")
    return "cls" if ids is not None and ids.ndim == 2 and bool((ids[:, 0] == ids[0, 0]).all()) else "mean"


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple | list) else output


@torch.inference_mode()
def layer_features(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], pool: str, batch_size: int = 32
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """What goes into the first layer and comes out of each, pooled: arrays (N, d); and the logits (N, C) if there are any."""
    _, layers = find_layers(model)
    device = next(model.parameters()).device
    caught: list[torch.Tensor] = []
    found: list[list[np.ndarray]] = [[] for _ in range(len(layers) + 1)]
    logits: list[np.ndarray] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        caught[:] = [args[0] if args else kwargs["hidden_states"]]

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [
        layer.register_forward_hook(lambda m, a, out: caught.append(_hidden(out))) for layer in layers
    ]
    training = model.training
    model.eval()
    try:
        for start in range(0, len(next(iter(inputs.values()))), batch_size):
            batch = {name: value[start : start + batch_size].to(device) for name, value in inputs.items()}
            out = model(**batch)
            if len(caught) != len(layers) + 1:  # layer drop in eval mode, layers run twice
                raise ValueError(
                    f"{len(caught) - 1} of {len(layers)} layers of {type(model).__name__} ran: its features cannot be paired"
                )
            mask = batch.get("attention_mask")
            for layer, states in zip(found, caught, strict=True):
                layer.append(_pooled(model, states, mask, pool).float().cpu().numpy())
            given = logits_of(out)
            if given is not None:
                logits.append(given.float().cpu().numpy())
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return [np.concatenate(layer) for layer in found], np.concatenate(logits) if logits else None


def logits_of(output: Any) -> torch.Tensor | None:
    """The logits of an output, or the output where it is a tensor."""
    found = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    return found if found is not None and found.ndim == 2 else None


def _pooled(model: nn.Module, states: torch.Tensor, mask: torch.Tensor | None, pool: str) -> torch.Tensor:
    if states.ndim == 2:  # layers of an MLP
        return states
    if states.ndim == 4:  # maps of a convolutional network, (N, C, H, W)
        return states.flatten(2).mean(-1)
    if pool == "cls":
        return states[:, 0]
    if mask is not None and mask.shape[1] != states.shape[1]:  # of samples of sound, not of frames
        shrink = next((m for m in model.modules() if hasattr(m, "_get_feature_vector_attention_mask")), None)
        mask = None if shrink is None else shrink._get_feature_vector_attention_mask(states.shape[1], mask)  # type: ignore[operator]
    weight = torch.ones_like(states[..., :1]) if mask is None else mask[..., None].to(states)
    if pool == "last":
        return states[torch.arange(len(states)), (weight[..., 0].cumsum(1)).argmax(1)]
    return (states * weight).sum(1) / weight.sum(1).clamp_min(1)


@contextlib.contextmanager
def tail(model: nn.Module, example: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """A function from pooled features of the last layer (n, d) to logits: what the model has behind its layers.

    The layers are passed over, and every token leaves the last one as the feature: a head that reads the class token, the last
    or the mean of all finds just it. `example` is one row of inputs, for the shapes.
    """
    _, layers = find_layers(model)
    device = next(model.parameters()).device
    wrapped: dict[str, Any] = {}

    def look(module: nn.Module, args: tuple, out: Any) -> None:
        wrapped["out"] = out

    handle = layers[-1].register_forward_hook(look)
    with torch.no_grad():
        model(**{name: value[:1].to(device) for name, value in example.items()})
    handle.remove()
    sample = wrapped["out"]
    feature: list[torch.Tensor] = []

    def like(hidden: torch.Tensor) -> Any:
        return (hidden, *sample[1:]) if isinstance(sample, tuple) else hidden

    def skip(*args: Any, **kwargs: Any) -> Any:
        return like(args[0] if args else kwargs["hidden_states"])

    def last(*args: Any, **kwargs: Any) -> Any:
        z, shape = feature[0], _hidden(sample).shape
        if len(shape) == 3:
            z = z[:, None].expand(-1, shape[1], -1)
        elif len(shape) == 4:
            z = z[:, :, None, None].expand(-1, -1, *shape[2:])
        return like(z)

    for i, layer in enumerate(layers):
        layer.forward = last if i == len(layers) - 1 else skip  # type: ignore[method-assign]

    def head(z: Any) -> torch.Tensor:
        weight = next(model.parameters())
        feature[:] = [torch.as_tensor(z, dtype=weight.dtype, device=device)]
        rows = {name: value[:1].to(device) for name, value in example.items()}
        rows = {name: value.expand(len(feature[0]), *value.shape[1:]) for name, value in rows.items()}
        found = logits_of(model(**rows))
        if found is None:
            raise ValueError(f"{type(model).__name__} gives no logits: give the classifier, or head=")
        return found

    try:
        yield head
    finally:
        for layer in layers:
            del layer.forward


def tail_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are registered behind the layers: norms, pooler, classifier."""
    name, _ = find_layers(model)
    names = [n for n, _ in model.named_parameters()]
    end = max(i for i, n in enumerate(names) if n.startswith(name + ".")) + 1
    return list(model.named_parameters())[end:]
