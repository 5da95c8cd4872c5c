"""Telly: freezes the embeddings and the bottom layers, as many as fine-tuning would hardly change anyway.

Of a model fine-tuned once on a sample, and the pretrained one, take for N inputs the hidden states of layer l, averaged over
tokens and normalised, X_l (N, dim). How much of the layer's geometry is left is the correlation of the upper triangles of

    G_l = X_l X_l'   (pretrained)   and   G_l = X_l X_l'   (fine-tuned),

1 where nothing changed. `choose_depth` freezes the layers below the first that falls under a threshold; `freeze_bottom` does
it, and sees to it that the frozen part costs no backward pass, no optimiser state and no dropout noise. `layer_probe` tells
what each layer knows: linear maps on one layer, and on a mixture whose weights show which layers it draws on.

Not a PEFT tuner: it adds no parameter. The scripts behind the paper average over padding as well; here it is left out.

Reference: Towards Efficient Fine-tuning of Pre-trained Code Models: An Experimental Study and Beyond, ISSTA 2023,
    arXiv:2304.05216.
Needs: labels, gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from unfused.nn.blocks import transformer_blocks
from unfused.nn.layer_probe import Batch, LayerProbe, hidden_states, layer_probe, plot_layers, pooled

__all__ = [
    "FreezeReport",
    "LayerProbe",
    "LayerSimilarity",
    "choose_depth",
    "freeze_bottom",
    "layer_probe",
    "layer_similarity",
]

# -- freezing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FreezeReport:
    """What is trained.

    Attributes
    ----------
    num_layers, total_layers : int
        Frozen, and of the stack.
    trainable, total : int
        Numbers of weights.
    tied : list of str
        Parameters outside the frozen part that are the same tensors as some inside (an output embedding), so frozen too.
    """

    num_layers: int
    total_layers: int
    trainable: int
    total: int
    tied: list[str]

    def __str__(self) -> str:
        tied = f"; tied, so frozen too: {', '.join(self.tied)}" if self.tied else ""
        share = self.trainable / self.total
        return (
            f"{self.num_layers} of {self.total_layers} layers frozen, "
            f"{self.trainable:,} of {self.total:,} weights trained ({share:.1%}){tied}"
        )


def freeze_bottom(
    model: nn.Module,
    num_layers: int,
    embeddings: bool = True,
    eval_mode: bool = True,
    stack: str | None = None,
) -> FreezeReport:
    """Freeze the embeddings and layers 0 to `num_layers - 1`, in place. The frozen stay frozen: it never unfreezes.

    Parameters
    ----------
    model : nn.Module
        A transformer, with whatever head.
    num_layers : int
        A count, K: with 12 layers, 9 leaves 9, 10 and 11 trainable. 0 freezes the embeddings alone.
    embeddings : bool, default=True
        Freeze all that comes before the layers: token, position, type and patch embeddings, their norms. Nothing then gets a
        gradient through the frozen part. Without, gradients go all the way down, and only optimiser state is saved.
    eval_mode : bool, default=True
        Keep the frozen part in eval mode, whatever `model.train()` says: no dropout in what is a fixed function.
    stack : str, optional
        Name of the list of layers, where the model has several; by default the first, an encoder before a decoder.

    Raises
    ------
    ValueError
        If the model has no layers that we know, or fewer than `num_layers`.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 10}
    >>> print(freeze_bottom(BertModel(BertConfig(num_hidden_layers=4, **sizes)), num_layers=3))
    3 of 4 layers frozen, 672 of 6,680 weights trained (10.1%)
    """
    stacks: dict[str, list[str]] = {}
    for block in transformer_blocks(model):
        stacks.setdefault(block.name.rpartition(".")[0], []).append(block.name)
    if not stacks:
        raise ValueError(f"model is a {type(model).__name__}, which has no transformer layers that we know")
    if stack is None:
        stack = next(iter(stacks))
    if stack not in stacks:
        raise ValueError(f"stack={stack!r}: the model's stacks are {', '.join(stacks)}")
    layers = stacks[stack]
    if not 0 <= num_layers <= len(layers):
        raise ValueError(
            f"num_layers={num_layers}: {stack!r} has {len(layers)} layers, give 0 to {len(layers)}"
        )
    modules, parameters = _below(model, stack, stacks) if embeddings else ([], [])
    modules += [model.get_submodule(name) for name in layers[:num_layers]]
    parameters += [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    # nothing is cut in a decoder: its frozen layers carry gradients to the encoder
    cuts = embeddings and stack == next(iter(stacks))
    hooks = [hook for hook, wanted in ((_to_eval, eval_mode), (_without_graph, cuts)) if wanted]
    for module in modules:
        for hook in hooks:
            if hook not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(hook, with_kwargs=True)
    frozen = {id(parameter) for parameter in parameters}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return FreezeReport(
        num_layers=num_layers,
        total_layers=len(layers),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
        tied=[name for key, shared in names.items() if key in frozen for name in shared[1:]],
    )


def _below(model: nn.Module, stack: str, stacks: Iterable[str]) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """What comes before the layers: in each module around them, what is registered before (no other stack), and embeddings
    that are registered after or are bare parameters."""
    modules: list[nn.Module] = []
    parameters: list[nn.Parameter] = []
    parts = stack.split(".")
    for depth, inner in enumerate(parts):
        path = ".".join(parts[:depth])
        around, before = model.get_submodule(path), True
        for name, module in around.named_children():
            before = before and name != inner
            full = f"{path}.{name}".lstrip(".")
            holds_layers = any(f"{other}.".startswith(f"{full}.") for other in stacks)
            if (before or "embed" in name) and not holds_layers:
                modules.append(module)
        parameters += [p for name, p in around.named_parameters(recurse=False) if "embed" in name]
    return modules, parameters


def _to_eval(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A hook, so that it survives `model.train()`, copies and wrappers."""
    if module.training:
        module.eval()


def _without_graph(module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As under no_grad: no parameter of a frozen module requires a gradient, and now no input does (PEFT and gradient
    checkpointing make the embeddings' output require one), so no graph is recorded."""

    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value

    return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}


# -- what fine-tuning changes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSimilarity:
    """How similar each layer's geometry is in two models.

    Attributes
    ----------
    values : ndarray, shape (layers + 1,)
        Correlations; the first is of the embeddings' output, entry l of layer l - 1's.
    """

    values: np.ndarray

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype)

    def __len__(self) -> int:
        return len(self.values)

    def table(self) -> str:
        rows = (f"{layer:>5}  {value:10.3f}" for layer, value in enumerate(self.values))
        return "\n".join(["layer  similarity", *rows])

    def plot(self, ax: Any = None) -> Any:
        return plot_layers(ax, self.values, "similarity after fine-tuning")


def layer_similarity(
    pretrained: nn.Module, finetuned: nn.Module, inputs: Batch | Iterable[Batch]
) -> LayerSimilarity:
    """Compare the layers of a model before and after fine-tuning on the same inputs.

    Parameters
    ----------
    pretrained, finetuned : nn.Module
        Of the same architecture; models of transformers (`output_hidden_states` is asked for).
    inputs : dict of tensors, or iterable of such
        A few hundred inputs in all; an `attention_mask` is respected.
    """
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    grams = []
    for model in (pretrained, finetuned):
        states = torch.cat([pooled(hidden_states(model, batch), batch) for batch in batches]).double()
        states = F.normalize(states, dim=-1)  # (N, layers + 1, dim)
        grams.append(torch.einsum("nld,mld->lnm", states, states))  # (layers + 1, N, N)
    if grams[0].shape != grams[1].shape:
        raise ValueError(
            f"finetuned has {len(grams[1]) - 1} layers, pretrained {len(grams[0]) - 1}: compare like with like"
        )
    rows, columns = torch.triu_indices(grams[0].shape[1], grams[0].shape[1])
    both = [gram[:, rows, columns] for gram in grams]
    one, two = (values - values.mean(1, keepdim=True) for values in both)
    return LayerSimilarity(F.cosine_similarity(one, two).numpy())


def choose_depth(curve: LayerSimilarity | Sequence[float] | np.ndarray, threshold: float = 0.9) -> int:
    """How many layers to freeze: those below the first whose similarity is under the threshold, at most all but the last.

    Examples
    --------
    >>> choose_depth([1.0, 1.0, 0.98, 0.85, 0.4])  # of four layers, the third and fourth change
    2
    """
    values = np.asarray(curve, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"curve has shape {values.shape}: give (layers + 1,) similarities")
    under = np.flatnonzero(values < threshold)
    first = int(under[0]) if len(under) else len(values) - 1
    return max(first - 1, 0)
