"""LoRAMoE: LoRA experts and a softmax router in every feed-forward matrix, with a loss that parts tasks from knowledge.

For an input x of a frozen linear layer, every expert contributes, weighed by the layer's own router:

    w = softmax(W_g x),   y = W_0 x + b + alpha / r * sum_i w_i B_i A_i dropout_i(x)

Experts are in groups, one for each type of sample (0: ordinary task, 1: world knowledge). With Q[m, n] the weight that
sample m gives to expert n, summed over its tokens, the localized balancing loss of a layer is

    Z = I * Q,   I[m, n] = 1 + delta where the types of sample and expert agree, else 1 - delta,   Var(Z) / mean(Z)^2

Equal Z means that inside a group all experts are used alike, and that of two groups the one of the sample's own type gets the
factor (1 - delta) / (1 + delta), so *less*: the groups part, under each other's names. `swap_groups` turns the sign.

Reference: LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin, ACL 2024,
arXiv:2312.09979.
Needs: labels, gradients, types of samples.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from unfused.nn.blocks import transformer_blocks
from unfused.nn.peft_register import register
from unfused.nn.tuner import TunerConfig, TunerLayer, TunerModel
from unfused.train.peft import RegularizedTrainer

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LoraMoeConfig", "LoraMoeModel", "LoraMoeTrainer", "localized_balancing_loss"]


@dataclass
class LoraMoeConfig(TunerConfig):
    """Configuration of LoRAMoE.

    Parameters
    ----------
    target_modules : list of str or str, optional
        Linear or Conv1D layers; by default all matrices of every feed-forward network.
    num_experts, r : int, default=6, 4
        Experts of each matrix and the rank of each.
    lora_alpha : float, default=32
        Experts share the weight 1, so the scale alpha / r has to be large; it halves in effect when their number doubles.
    lora_dropout : float, default=0.05
        Drawn for each expert by itself.
    balance_weight, balance_delta : float, default=0.1, 0.1
        Weight of the balancing loss (beta), and how far apart the groups are to be, in [0, 1]. Delta 0 is ordinary load
        balancing, which needs no types; the authors' script has both at 0.
    balance_form : {"cv2", "dispersion"}, default="cv2"
        Var(Z) / mean(Z)^2 as in the authors' code, or Var(Z) / mean(Z) as in the paper.
    balance_per_token : bool, default=True
        Q is a mean over a sample's tokens. False sums, as the paper does: long samples weigh more, and the "dispersion" is
        larger by their length.
    swap_groups : bool, default=False
        Let experts get more weight from samples of their own type, not less.
    expert_groups : list of list of int, optional
        The experts of type 0, 1, 2, ...; each expert in one of them. By default the second half is of type 0, the first of
        type 1.

    Notes
    -----
    The loss is `model.base_model.regularization_loss()`: `LoraMoeTrainer` adds it, and tells the layers the types. All
    experts run for all tokens. Routing depends on the token: no merging.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> llama = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes))
    >>> model = get_peft_model(llama, LoraMoeConfig(num_experts=4, task_type="CAUSAL_LM"))
    >>> ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    >>> mask = (ids > 0).long()
    >>> with model.base_model.sample_types(torch.tensor([0, 1]), attention_mask=mask):
    ...     out = model(input_ids=ids, attention_mask=mask, labels=ids)
    >>> loss = out.loss + model.base_model.regularization_loss()
    >>> loss.backward()
    >>> usage = model.base_model.expert_usage()
    >>> list(usage.columns), len(usage)  # 2 layers * 3 matrices * 2 types * 4 experts
    (['layer', 'matrix', 'type', 'expert', 'weight'], 48)
    """

    num_experts: int = field(default=6, metadata={"help": "LoRA experts of each matrix."})
    r: int = field(default=4, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(
        default=32.0, metadata={"help": "Experts' outputs are scaled by lora_alpha / r."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of each expert's input."})
    balance_weight: float = field(default=0.1, metadata={"help": "Weight of the balancing loss."})
    balance_delta: float = field(
        default=0.1, metadata={"help": "How far apart the groups are to be, in [0, 1]."}
    )
    balance_form: str = field(
        default="cv2", metadata={"help": "'cv2' (variance / mean^2) or 'dispersion' (variance / mean)."}
    )
    balance_per_token: bool = field(
        default=True, metadata={"help": "Mean weight of a sample's tokens, not the sum."}
    )
    swap_groups: bool = field(
        default=False, metadata={"help": "More weight for experts of the sample's own type."}
    )
    expert_groups: list[list[int]] | None = field(
        default=None, metadata={"help": "The experts of type 0, 1, 2, ...; None: second half, first half."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.num_experts
        self.require(n >= 1, f"num_experts={n}: at least 1")
        self.require(self.r >= 1, f"r={self.r}: at least 1")
        self.require(
            0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout}: choose a share in [0, 1)"
        )
        self.require(self.balance_weight >= 0, f"balance_weight={self.balance_weight}: not below 0")
        self.require(0 <= self.balance_delta <= 1, f"balance_delta={self.balance_delta}: choose it in [0, 1]")
        self.require(
            self.balance_form in ("cv2", "dispersion"),
            f"balance_form={self.balance_form!r}: choose 'cv2' or 'dispersion'",
        )
        grouped = self.balance_weight > 0 and self.balance_delta > 0
        if self.expert_groups is not None:
            self.require(
                sorted(i for group in self.expert_groups for i in group) == list(range(n)),
                f"expert_groups={self.expert_groups}: each of the experts 0 to {n - 1} in one group",
            )
        else:
            self.require(
                n % 2 == 0 or not grouped,
                f"num_experts={n} has no halves: make it even, give expert_groups, or set balance_delta=0",
            )

    def expert_types(self) -> list[int]:
        """The type of each expert."""
        n = self.num_experts
        groups = self.expert_groups or [list(range(n // 2, n)), list(range(n // 2))]
        return [next(t for t, group in enumerate(groups) if i in group) for i in range(n)]


def localized_balancing_loss(
    importance: torch.Tensor, coefficients: torch.Tensor | float = 1.0, form: str = "cv2"
) -> torch.Tensor:
    """Variance of Z = coefficients * importance over all its entries, relative to its mean.

    Parameters
    ----------
    importance : Tensor of shape (samples, experts)
    coefficients : Tensor of the same shape, or 1 for ordinary load balancing
    form : {"cv2", "dispersion"}

    Examples
    --------
    >>> localized_balancing_loss(torch.tensor([[0.5, 0.5]])).item()
    0.0
    >>> round(localized_balancing_loss(torch.tensor([[0.9, 0.1]])).item(), 4)  # 0.4 ** 2 / 0.5 ** 2
    0.64
    """
    z = coefficients * importance
    mean = z.mean()
    return z.var(correction=0) / (mean.square() + 1e-10 if form == "cv2" else mean)


class Batch(NamedTuple):
    """What the layers know about the samples of the current forward pass."""

    types: torch.Tensor  # (samples,)
    mask: torch.Tensor | None  # (samples, tokens)


class LoraMoeLayer(TunerLayer):
    """A linear layer with routed LoRA experts."""

    adapter_parameters = ("unfused_loramoe_router", "unfused_loramoe_a", "unfused_loramoe_b")
    adapter_settings = ("unfused_loramoe_settings", "unfused_loramoe_record", "unfused_loramoe_usage")
    batch: Batch | None = None

    def update_layer(self, adapter_name: str, config: LoraMoeConfig) -> None:
        base = self.get_base_layer()
        inputs, outputs = base.weight.shape if isinstance(base, Conv1D) else base.weight.shape[::-1]
        router, a = torch.empty(config.num_experts, inputs), torch.empty(config.num_experts, config.r, inputs)
        nn.init.kaiming_uniform_(router, a=math.sqrt(5))
        nn.init.kaiming_uniform_(a.flatten(0, 1), a=math.sqrt(5))
        self.unfused_loramoe_router[adapter_name] = nn.Parameter(router)  # (N, in)
        self.unfused_loramoe_a[adapter_name] = nn.Parameter(a)  # (N, r, in)
        self.unfused_loramoe_b[adapter_name] = nn.Parameter(
            torch.zeros(outputs, config.num_experts, config.r)
        )
        self.unfused_loramoe_settings[adapter_name] = config

    def adapted(self, names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            config, a, b = (getattr(self, f"unfused_loramoe_{k}")[name] for k in ("settings", "a", "b"))
            h = self._cast_input_dtype(x, a.dtype)
            w = torch.softmax(linear(h, self.unfused_loramoe_router[name]).float(), dim=-1)  # (..., N)
            if self.training and config.lora_dropout > 0:
                copies = dropout(h.reshape(-1, h.shape[-1]).expand(len(a), -1, -1), config.lora_dropout)
                z = torch.bmm(copies, a.transpose(1, 2)).transpose(0, 1).reshape(*w.shape, config.r)
            else:
                z = linear(h, a.flatten(0, 1)).view(*w.shape, config.r)
            z = (z * w.to(z.dtype).unsqueeze(-1)).flatten(-2)  # (..., N * r)
            y = y + (linear(z, b.flatten(1)) * (config.lora_alpha / config.r)).to(y.dtype)
            self._remember(name, w)
        return y

    # -- who was routed where ----------------------------------------------------------------------------------------

    def _remember(self, name: str, w: torch.Tensor) -> None:
        if (
            torch._C._current_graph_task_id() != -1
        ):  # gradient checkpointing runs the block again inside backward
            return
        if self.training:
            self.unfused_loramoe_record[name] = (w, self.batch)
        else:
            self.unfused_loramoe_record.pop(name, None)
        if self.batch is not None:
            with torch.no_grad():
                totals, tokens = _totals(w, self.batch)
                now = torch.cat([totals, tokens[:, None]], dim=1)  # (samples, N + 1)
                usage = self.unfused_loramoe_usage.get(name)
                if usage is None:
                    kinds = max(self.unfused_loramoe_settings[name].expert_types()) + 1
                    usage = now.new_zeros(max(kinds, 2), now.shape[1])
                self.unfused_loramoe_usage[name] = usage.index_add(0, self.batch.types.to(usage.device), now)

    def regularization_loss(self, name: str) -> torch.Tensor | None:
        config: LoraMoeConfig = self.unfused_loramoe_settings[name]
        if name not in self.unfused_loramoe_record or not config.balance_weight:
            return None
        w, batch = self.unfused_loramoe_record[name]
        if (
            torch.is_grad_enabled()
            and self.unfused_loramoe_router[name].requires_grad
            and not w.requires_grad
        ):
            raise ValueError(
                "the balancing loss would have no gradient: the forward pass ran under torch.no_grad, or under gradient "
                "checkpointing with use_reentrant=True; give gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        coefficients: torch.Tensor | float = 1.0
        if batch is not None and config.balance_delta:
            own = batch.types.to(w.device)[:, None] == torch.tensor(config.expert_types(), device=w.device)
            sign = -1.0 if config.swap_groups else 1.0
            coefficients = 1 + sign * config.balance_delta * torch.where(own, 1.0, -1.0)  # (samples, N)
        elif config.balance_delta:
            warnings.warn(
                "LoRAMoE: no types of samples: ordinary load balancing. Use LoraMoeTrainer, or run the model inside "
                "model.base_model.sample_types(...)",
                stacklevel=2,
            )
        importance, tokens = _totals(w, batch)
        if config.balance_per_token:
            importance = importance / tokens[:, None].clamp_min(1)
        return config.balance_weight * localized_balancing_loss(importance, coefficients, config.balance_form)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a forward pass: a copy of the model is no part of its graph."""
        return self.__dict__ | {"unfused_loramoe_record": {}, "batch": None}


def _totals(w: torch.Tensor, batch: Batch | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Router weight of each sample's real tokens, (samples, N), and their number, (samples,)."""
    n = w.shape[-1]
    if batch is None:
        w = w.reshape(len(w), -1, n)
        return w.sum(1), w.new_full((len(w),), w.shape[1])
    samples = len(batch.types)
    if (len(w) != samples) if w.ndim > 2 else (len(w) % samples):  # some models flatten samples and tokens
        raise ValueError(f"sample_types: {samples} types for a batch of shape {tuple(w.shape[:-1])}")
    w = w.reshape(samples, -1, n)
    if batch.mask is None:
        return w.sum(1), w.new_full((samples,), w.shape[1])
    if len(batch.mask) != samples or batch.mask.shape[1] < w.shape[1]:
        raise ValueError(
            f"sample_types: attention_mask of shape {tuple(batch.mask.shape)} for {samples} samples of {w.shape[1]} tokens"
        )
    mask = batch.mask[:, -w.shape[1] :].to(w)  # the last ones, where a cache holds the rest
    return (w * mask[..., None]).sum(1), mask.sum(1)


class LoraMoeModel(TunerModel):
    """Puts `LoraMoeLayer`s into a model."""

    tuner_layer_cls = LoraMoeLayer
    layer_types = (((nn.Linear, Conv1D), LoraMoeLayer),)
    not_mergeable = "the router weighs its experts anew for every token"

    def sample_types(
        self, types: Any, attention_mask: torch.Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, forward passes know the type of each sample; `regularization_loss()` may be read afterwards.

        Parameters
        ----------
        types : Tensor or list of int, (samples,)
        attention_mask : Tensor (samples, tokens), optional
            Where it is 0, tokens do not count.
        """
        return _sample_types(self.model, types, attention_mask)

    def expert_usage(self, adapter_name: str = "default", reset: bool = False) -> pd.DataFrame:
        """Mean router weight of all tokens seen inside `sample_types`, by layer, matrix, type of sample and expert.

        Parameters
        ----------
        adapter_name : str, default="default"
        reset : bool, default=False
            Begin to count anew.
        """
        import pandas as pd

        rows = []
        for name, layer in self.model.named_modules():
            if isinstance(layer, LoraMoeLayer) and adapter_name in layer.unfused_loramoe_usage:
                usage = layer.unfused_loramoe_usage[adapter_name].double().cpu()
                parts = name.split(".")
                block = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
                index = int(parts[block]) if block >= 0 else -1
                for kind, (*weights, tokens) in enumerate(usage.tolist()):
                    rows += [
                        (index, ".".join(parts[block + 1 :]), kind, expert, weight / tokens)
                        for expert, weight in enumerate(weights)
                        if tokens
                    ]
                if reset:
                    del layer.unfused_loramoe_usage[adapter_name]
        return pd.DataFrame(rows, columns=["layer", "matrix", "type", "expert", "weight"])

    def default_targets(self, config: LoraMoeConfig, model_config: dict) -> set[str]:
        found = {
            name.removeprefix(f"{block.name}.")
            for block in transformer_blocks(self.model)
            for name in (block.mlp_in, block.mlp_gate, block.mlp_out)
            if name
        }
        return found or super().default_targets(config, model_config)


@contextlib.contextmanager
def _sample_types(model: nn.Module, types: Any, attention_mask: torch.Tensor | None) -> Iterator[None]:
    types = torch.as_tensor(types).long().reshape(-1)
    layers = [module for module in model.modules() if isinstance(module, LoraMoeLayer)]
    known = {max(c.expert_types()) + 1 for layer in layers for c in layer.unfused_loramoe_settings.values()}
    if len(types) and not (0 <= int(types.min()) and int(types.max()) < max(2, *known)):
        raise ValueError(f"types={types.tolist()}: choose them from 0 to {max(2, *known) - 1}")
    for layer in layers:
        layer.batch = Batch(types, attention_mask)
    try:
        yield
    finally:
        for layer in layers:
            layer.batch = None


class LoraMoeTrainer(RegularizedTrainer):
    """A `Trainer` for LoRAMoE: reads the type of each sample from its row and adds the balancing loss.

    Also a mix-in: `class MyTrainer(LoraMoeTrainer, SFTTrainer)`.

    Parameters
    ----------
    type_column : str, default="task_type"
        Column with the integer types; rows without it are trained with ordinary load balancing.
    """

    def __init__(self, *args: Any, type_column: str = "task_type", **kwargs: Any) -> None:
        self.type_column = type_column
        super().__init__(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self.type_column not in columns:
            columns.append(self.type_column)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        rest = {key: value for key, value in inputs.items() if key != self.type_column}
        types = inputs.get(self.type_column)
        known = (
            contextlib.nullcontext()
            if types is None
            else _sample_types(model, types, rest.get("attention_mask"))
        )
        with known:
            return super().compute_loss(model, rest, return_outputs, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rest = {key: value for key, value in inputs.items() if key != self.type_column}
        return super().prediction_step(model, rest, *args, **kwargs)


register("loramoe", LoraMoeConfig, LoraMoeModel)
