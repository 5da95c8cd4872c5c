"""A tuner layer whose change is sparse: of the weight and the bias of any linear map, convolution, embedding or norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from unfused.nn.sparse_delta import (
    SparseDelta,
    add_sparse,
    check_sparse,
    sparse_conv2d,
    sparse_embedding,
    sparse_linear,
)
from unfused.nn.tuner import TunerLayer, TunerModel

__all__ = ["SparseLayer", "SparseModel", "sparse_deltas"]


class SparseLayer(TunerLayer):
    """A module with a sparse change of its weight and, where it has one, of its bias.

    A subclass names the two containers, `adapter_modules = ("unfused_x_weight", "unfused_x_bias")`, of `SparseDelta`s.
    They are empty (zero entries) until the model chooses positions (`SparseModel.choose`) or a file is loaded.
    """

    delta_type: ClassVar[type[SparseDelta]] = SparseDelta

    def update_layer(self, adapter_name: str, config: Any) -> None:
        for container, tensor in zip(self.adapter_modules, self.originals(), strict=True):
            if tensor is not None:
                if not tensor.is_floating_point():
                    raise ValueError(
                        f"{type(config).__name__}: a weight of type {tensor.dtype} is quantised; entries of it cannot be "
                        "trained"
                    )
                empty = torch.empty(0, dtype=torch.int64, device=tensor.device)
                getattr(self, container)[adapter_name] = self.delta_type(tensor.shape, empty)

    def originals(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias as they are without any adapter, merged or not."""
        base = self.get_base_layer()
        return self._unmerged or (base.weight, getattr(base, "bias", None))

    def deltas(self, name: str) -> Iterator[tuple[str, SparseDelta, torch.Tensor]]:
        """("weight" or "bias", change, original tensor) of one adapter."""
        for part, container, tensor in zip(
            ("weight", "bias"), self.adapter_modules, self.originals(), strict=True
        ):
            if name in getattr(self, container):
                yield part, getattr(self, container)[name], tensor  # type: ignore[misc]

    def change(self, delta: SparseDelta, original: torch.Tensor) -> torch.Tensor:
        """What is added to the original's entries, (k,)."""
        return delta.values

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.get_base_layer()
        values: dict[str, list[torch.Tensor]] = {"weight": [], "bias": []}
        index: dict[str, list[torch.Tensor]] = {"weight": [], "bias": []}
        for name in names:
            for part, delta, original in self.deltas(name):
                values[part].append(self.change(delta, original))
                index[part].append(delta.index)
        bias = getattr(base, "bias", None)
        if bias is not None:
            bias = add_sparse(bias, values["bias"], index["bias"])
        kind, rest = type(base), (*args[1:], *kwargs)
        if kind in (nn.Linear, Conv1D) and args and not rest:
            return sparse_linear(
                args[0], base.weight, bias, values["weight"], index["weight"], kind is Conv1D
            )
        if kind is nn.Conv2d and args and not rest:
            x = sparse_conv2d(args[0], base, values["weight"], index["weight"])
            return x if bias is None else x + bias.to(x.dtype).view(-1, 1, 1)
        if kind is nn.Embedding and args and not rest and not base.weight.requires_grad:
            x = base(args[0])
            for v, i in zip(values["weight"], index["weight"], strict=True):
                x = x + sparse_embedding(args[0], base.weight.shape, v, i, base.padding_idx).to(x.dtype)
            return x
        changed = {"weight": add_sparse(base.weight, values["weight"], index["weight"])}
        return functional_call(base, changed if bias is None else {**changed, "bias": bias}, args, kwargs)

    def merged_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        new = {"weight": weight, "bias": bias}
        for part, delta, original in self.deltas(name):
            new[part] = add_sparse(new[part], self.change(delta, original), delta.index)  # type: ignore[arg-type]
        return new["weight"], new["bias"]  # type: ignore[return-value]

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        for _, delta, original in self.deltas(adapter_name):  # the weight comes first
            zero = torch.zeros(delta.shape, dtype=delta.values.dtype, device=delta.values.device)
            return add_sparse(zero, self.change(delta, original), delta.index)
        raise KeyError(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def prepare_load(self, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
        for container in self.adapter_modules:
            deltas, index = getattr(self, container), state.get(f"{container}.index")
            values = state.get(f"{container}.values")
            if adapter_name in deltas and index is not None and values is not None:
                check_sparse(index, values, deltas[adapter_name].shape)
                deltas[adapter_name].resize_(index)


class SparseModel(TunerModel):
    """Chooses the positions once all layers are there, since a budget is shared by all of them."""

    tuner_layer_cls = SparseLayer
    _targets: Any

    def choose(self, config: Any, adapter_name: str) -> None:
        """Give the adapter's changes their positions, with `SparseDelta.resize_`."""
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        config = super()._prepare_adapter_config(peft_config, model_config)
        self.__dict__["_targets"] = config.target_modules
        return config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        # PEFT shortens a long list of names to suffixes; one called "embed_tokens" then makes it save the whole table.
        config.target_modules = self._targets
        with torch.no_grad():
            self.choose(config, adapter_name)

    def sparse_deltas(self, adapter_name: str) -> dict[str, tuple[Any, Any, torch.Tensor]]:
        """All changes of an adapter, by the full name of the tensor: (layer, change, original tensor)."""
        return sparse_deltas(self.model, adapter_name)


def sparse_deltas(model: nn.Module, adapter_name: str) -> dict[str, tuple[Any, Any, torch.Tensor]]:
    """The same for any model that holds such layers; names as in the model without adapters."""
    return {
        f"{name.removeprefix('base_model.model.')}.{part}": (layer, delta, original)
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLayer)
        for part, delta, original in layer.deltas(adapter_name)
    }
