"""Training PEFT tuners that have a schedule or add a term to the loss, under any `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

__all__ = ["RegularizedTrainer", "UnfusedPeftCallback", "param_groups"]


class UnfusedPeftCallback(TrainerCallback):
    """Runs the schedule of every tuner of ours in the model.

    Before the first step it calls `begin_training(max_steps)`, after each optimiser step `update_and_allocate(global_step)`;
    parameters that this returns start afresh in the optimiser. Tuners without a schedule do nothing in either.

    Examples
    --------
    ``Trainer(model, args, train_dataset=data, callbacks=[UnfusedPeftCallback()]).train()``
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        for tuner in _tuners(model):
            tuner.begin_training(state.max_steps)

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        for tuner in _tuners(model):
            for parameter in tuner.update_and_allocate(state.global_step):
                while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
                    optimizer = optimizer.optimizer
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)


class RegularizedTrainer(Trainer):
    """A `Trainer` that adds the tuners' `regularization_loss()` and runs their schedules.

    Also a mix-in: `class MyTrainer(RegularizedTrainer, SFTTrainer)`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(UnfusedPeftCallback())

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        parts = self._batches_that_add_up(kwargs.get("num_items_in_batch")) if model.training else 1
        for tuner in _tuners(model):
            loss = loss + tuner.regularization_loss().to(loss.dtype) / parts
        return (loss, outputs) if return_outputs else loss

    def _batches_that_add_up(self, num_items_in_batch: Any) -> int:
        """1 where the Trainer divides the loss by the accumulation's steps, their number where the loss is a share already."""
        shared = getattr(self, "loss_is_scaled_for_ga", None)
        if shared is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            shared = by_model or self.compute_loss_func is not None
        return getattr(self, "current_gradient_accumulation_steps", 1) if shared else 1


def param_groups(
    model: nn.Module, adapter_lr: float, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimiser groups: adapters and heads (`modules_to_save`) at their own rates, no decay on vectors.

    Parameters
    ----------
    model : nn.Module
        With PEFT adapters; only parameters that require a gradient are listed.
    adapter_lr : float
    head_lr : float, optional
        By default `adapter_lr`.
    weight_decay : float, default=0.0
        Of the head's matrices; adapters are not decayed.
    """
    adapters: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head = ".modules_to_save." in name or ("unfused_" not in name and ".lora_" not in name)
            (adapters if not head else vectors if parameter.ndim < 2 else matrices).append(parameter)
    rate = adapter_lr if head_lr is None else head_lr
    groups = [
        {"params": adapters, "lr": adapter_lr, "weight_decay": 0.0},
        {"params": matrices, "lr": rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _tuners(model: nn.Module | None) -> Iterable[Any]:
    """Tuner models inside a model, however it is wrapped; by their hooks, so that this floor needs no PEFT class."""
    return (
        [
            m
            for m in model.modules()
            if hasattr(type(m), "update_and_allocate") and hasattr(type(m), "begin_training")
        ]
        if model
        else []
    )
