"""Mask tuning (R-AMT): switches off a few per cent of the attention weights, changing no value of any weight.

Every chosen weight W has scores R of its shape, at first `init_score` everywhere, and works as

    W' = W * m,   m = [R > threshold],   dL/dR = dL/dW' * W     (straight-through, no clipping)

so that an entry whose score a run of steps has pushed below the threshold is off, and may come back. What is stored is one
bit a weight. Several active adapters multiply: a weight works where all of them leave it on.

`MaskTuningTrainer` adds the paper's regularity. Beside the task's loss L_a = CE + l2 * sum of ||R||_2 there is the knowledge
loss L_b, the cross-entropy to the original model's own predictions; only its gradient is used, to drop those entries of
dL_a/dR at random that would contradict it (`unfused.train.gradient_dropout`).

Reference: Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models, ICCV 2023,
    arXiv:2307.15049.
Needs: labels, gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft.peft_model import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from unfused.nn.blocks import transformer_blocks
from unfused.nn.peft_register import register
from unfused.nn.tuner import TunerConfig, TunerLayer, TunerModel, tuner_layers
from unfused.train.gradient_dropout import gradient_dropout
from unfused.train.peft import RegularizedTrainer

__all__ = ["MaskTuningConfig", "MaskTuningModel", "MaskTuningTrainer"]

SCORES, BITS, SHAPE = "unfused_mask_tuning_scores", "unfused_mask_tuning_bits", "unfused_mask_tuning_shape"


@dataclass
class MaskTuningConfig(TunerConfig):
    """Configuration of mask tuning.

    Parameters
    ----------
    target_modules : list of str or str, optional
        By default the query, key, value and output projections of every attention layer, of the image tower alone where
        there are two. The paper's code also masks the convolution that embeds the patches; its variant R-MMT masks the MLPs.
    init_score : float, default=0.01
    threshold : float, default=0.005
        Below `init_score`: all weights are on at first. With Adam, an entry needs about
        `(init_score - threshold) / learning rate` steps to go off.
    save_scores : bool, default=False
        Save the scores themselves, 32 times the size, so that training can go on exactly where it stopped. Without, an
        adapter that is loaded to be trained further starts with its weights on at `init_score` and those off as far below
        the threshold.

    Notes
    -----
    The paper trains with Adam at 8e-5, a cosine schedule, no weight decay, about 30 epochs of batches of 32. With few steps
    or a small rate nothing crosses the threshold: watch `model.base_model.sparsity()[""]`.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    >>> model = get_peft_model(vit, MaskTuningConfig(modules_to_save=["classifier"]))
    >>> model.base_model.sparsity()[""]  # nothing is off yet
    0.0
    """

    init_score: float = field(default=0.01, metadata={"help": "What every score is at first."})
    threshold: float = field(default=0.005, metadata={"help": "Weights whose score is not above it are off."})
    save_scores: bool = field(default=False, metadata={"help": "Save the scores, not only the bits."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.init_score > self.threshold,
            f"init_score={self.init_score} is not above threshold={self.threshold}: all weights would be off at first",
        )


class MaskTuningLayer(TunerLayer):
    """A linear map or convolution, part of whose weights are off."""

    adapter_parameters = (SCORES,)
    adapter_settings = ("unfused_mask_tuning_threshold",)

    def update_layer(self, adapter_name: str, config: MaskTuningConfig) -> None:
        base: Any = self.get_base_layer()
        weight: torch.Tensor = base.weight
        if not weight.is_floating_point():
            raise ValueError(
                f"MaskTuningConfig: cannot mask a quantised weight ({weight.dtype}): load the model unquantised"
            )
        scores = torch.full_like(weight, config.init_score, dtype=torch.float32)
        getattr(self, SCORES)[adapter_name] = nn.Parameter(scores)
        self.unfused_mask_tuning_threshold[adapter_name] = config.threshold

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.get_base_layer()
        weight: torch.Tensor = base.weight
        for name in names:
            weight = weight * _Binarise.apply(
                getattr(self, SCORES)[name], self.unfused_mask_tuning_threshold[name], weight.dtype
            )
        return torch.func.functional_call(self.base_layer, {"weight": weight}, args, kwargs)

    def merged_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weight * self.mask(name).to(weight.dtype), bias

    def mask(self, name: str) -> torch.Tensor:
        """bool, of the weight's shape: which weights an adapter leaves on."""
        return getattr(self, SCORES)[name].detach() > self.unfused_mask_tuning_threshold[name]

    def active_mask(self) -> torch.Tensor | None:
        """What all active adapters leave on; None where none is here."""
        masks = [self.mask(name) for name in self.active_adapters if self.has(name)]
        return torch.stack(masks).all(0) if masks else None


class MaskTuningModel(TunerModel):
    """Puts `MaskTuningLayer`s into a model."""

    tuner_layer_cls = MaskTuningLayer
    layer_types = (((nn.Linear, Conv1D, nn.Conv2d), MaskTuningLayer),)

    def sparsity(self) -> dict[str, float]:
        """Share of the masked weights that the active adapters switch off: by module, and under "" over all of them."""
        masks = {
            name: mask
            for name, layer in self.model.named_modules()
            if isinstance(layer, MaskTuningLayer) and (mask := layer.active_mask()) is not None
        }
        off = {name: int((~mask).sum()) for name, mask in masks.items()}
        total = sum(mask.numel() for mask in masks.values())
        return {
            "": sum(off.values()) / max(total, 1),
            **{name: off[name] / mask.numel() for name, mask in masks.items()},
        }

    def default_targets(self, config: Any, model_config: dict) -> Any:
        blocks = transformer_blocks(self.model)
        images = [block for block in blocks if "vision" in block.name]
        targets = {
            name
            for block in images or blocks
            for name in (block.query, block.key, block.value, block.fused_qkv, block.attention_out)
            if name
        }
        return targets or super().default_targets(config, model_config)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict,
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """PEFT's hook for saving: bits and shape in place of the scores."""
        state = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if config.save_scores:
            return state
        small = {}
        for key, value in state.items():
            if f".{SCORES}." in key:
                small[key.replace(SCORES, BITS)] = _pack(value > config.threshold)
                small[key.replace(SCORES, SHAPE)] = torch.tensor(value.shape)
            else:
                small[key] = value
        return small

    @classmethod
    def unpack_file(cls, config: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        whole = {}
        for key, value in state.items():
            if key.endswith(f".{BITS}"):
                shape = state.get(key.replace(BITS, SHAPE))
                if shape is None:
                    raise ValueError(f"it lacks {key.replace(BITS, SHAPE)!r}")
                on = _unpack(key, value, tuple(shape.flatten().tolist()))
                below = 2 * config.threshold - config.init_score
                whole[key.replace(BITS, SCORES)] = torch.where(on, config.init_score, below)
            elif not key.endswith(f".{SHAPE}"):
                whole[key] = value
        return whole


class MaskTuningTrainer(RegularizedTrainer):
    """Trains masks (and whatever else requires a gradient) by the paper's rule.

    Parameters
    ----------
    model : PeftModel
        With a mask adapter, around a CLIP-like model (its output has `image_embeds`), or, without `text_features`, around a
        classifier (its output has `logits`).
    args : TrainingArguments, and everything else that a `transformers.Trainer` takes
        Batches have `pixel_values` and `labels`.
    text_features : Tensor of shape (classes, dim), optional
        Embedded descriptions of the classes; normalised here. Logits are `logit_scale` times the cosine.
    logit_scale : float, optional
        By default the model's own, or 100.
    knowledge : "zero_shot" or callable, default="zero_shot"
        Logits to stay true to: those of the original model on the same batch, or of `knowledge(inputs)`.
    gdr_lambda : float, default=0.3
        Gradient dropout, in [0, 1]: 1 drops what contradicts the knowledge, 0.3 damps it, 0 does without (AMT).
    l2_weight : float, default=1e-4
        Of the norms (not squared) of the score tensors.
    temperature : float, default=1.0
        Of the knowledge loss.

    Notes
    -----
    Needs one more forward and one more backward pass a step. Checkpoints hold the scores, so that a resumed run ends as an
    uninterrupted one; `save_pretrained` afterwards writes bits, unless the config says `save_scores`.

    Examples
    --------
    ``MaskTuningTrainer(clip, args, train_dataset=few_shot, text_features=T).train()``
    """

    def __init__(
        self,
        model: PeftModel,
        args: Any = None,
        *more: Any,
        text_features: torch.Tensor | None = None,
        logit_scale: float | None = None,
        knowledge: str | Callable[[dict[str, Any]], torch.Tensor] = "zero_shot",
        gdr_lambda: float = 0.3,
        l2_weight: float = 1e-4,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, PeftModel) or not isinstance(model.base_model, MaskTuningModel):
            raise ValueError(
                "model has no mask adapter: make it with get_peft_model(model, MaskTuningConfig(...))"
            )
        if not 0 <= gdr_lambda <= 1:
            raise ValueError(f"gdr_lambda={gdr_lambda}: give a number in [0, 1]")
        if knowledge != "zero_shot" and not callable(knowledge):
            raise ValueError(
                f"knowledge={knowledge!r}: give 'zero_shot' or a function from a batch to logits"
            )
        super().__init__(model, args, *more, **kwargs)
        self.label_names = ["labels"]
        self.model_accepts_loss_kwargs = False  # our loss is a mean over the batch
        self.text_features = None if text_features is None else F.normalize(text_features.float(), dim=-1)
        own_scale = getattr(model.get_base_model(), "logit_scale", None)
        self.logit_scale = logit_scale or (100.0 if own_scale is None else float(own_scale.detach().exp()))
        self.knowledge, self.gdr_lambda = knowledge, gdr_lambda
        self.l2_weight, self.temperature = l2_weight, temperature
        self._knowledge_gradients: list[torch.Tensor | None] = []

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        training = model.training and torch.is_grad_enabled()
        target = self._known(model, inputs) if training and self.gdr_lambda else None
        if training:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):  # statistics stay the pretrained ones
                    module.eval()
        logits = self._logits(model, inputs)
        loss = F.cross_entropy(logits, labels)
        if training:
            scores = list(self._scores(model))
            if target is not None:
                self._collect_knowledge_gradients(logits, target, scores)
            loss = loss + self.l2_weight * torch.stack([score.norm() for score in scores]).sum()
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._knowledge_gradients and self.accelerator.sync_gradients:
            scores = list(self._scores(model))
            against = [
                None if b is None else self.accelerator.reduce(b, "mean") for b in self._knowledge_gradients
            ]
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
            gradient_dropout(scores, [score.grad for score in scores], against, self.gdr_lambda, generator)
            self._knowledge_gradients = []
        return loss

    def _collect_knowledge_gradients(
        self, logits: torch.Tensor, target: torch.Tensor, scores: list[nn.Parameter]
    ) -> None:
        """Add dL_b/dR of this batch, scaled like the task's gradient that `training_step` is about to compute."""
        loss = -(target * F.log_softmax(logits / self.temperature, -1)).sum(-1).mean() * self.temperature**2
        loss = loss / self.current_gradient_accumulation_steps
        if self.accelerator.scaler is not None:
            loss = self.accelerator.scaler.scale(loss)
        with torch.autocast(logits.device.type, enabled=False):
            new = torch.autograd.grad(loss, scores, retain_graph=True, allow_unused=True)
        old = self._knowledge_gradients or [None] * len(scores)
        self._knowledge_gradients = [
            b if a is None else a if b is None else a + b for a, b in zip(old, new, strict=True)
        ]

    @torch.no_grad()
    def _known(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The original model's probabilities, (batch, classes)."""
        if self.knowledge != "zero_shot":
            logits = self.knowledge(inputs)  # type: ignore[operator]
        else:
            original = self.accelerator.unwrap_model(model).eval()
            with original.disable_adapter():
                logits = self._logits(original, inputs)
            model.train()
        return (logits.float() / self.temperature).softmax(-1)

    def _logits(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if self.text_features is None:
            return model(**inputs).logits.float()
        if hasattr(self.accelerator.unwrap_model(model).get_base_model(), "text_model"):
            # CLIP's own forward wants a text; this one token costs next to nothing and is not looked at
            inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=self.args.device), **inputs}
        images = F.normalize(model(**inputs).image_embeds.float(), dim=-1)  # (batch, dim)
        self.text_features = self.text_features.to(images.device)
        return self.logit_scale * images @ self.text_features.T

    def _scores(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The score tensors that are trained."""
        for layer in tuner_layers(model):
            if isinstance(layer, MaskTuningLayer):
                yield from (score for score in getattr(layer, SCORES).values() if score.requires_grad)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        configs = self.accelerator.unwrap_model(self.model).peft_config.values()
        before = [config.save_scores for config in configs]
        for config in configs:
            config.save_scores = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            for config, value in zip(configs, before, strict=True):
                config.save_scores = value


class _Binarise(torch.autograd.Function):
    """[scores > threshold]; backward hands the gradient on as it is."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, threshold: float, dtype: torch.dtype) -> torch.Tensor:
        return (scores > threshold).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad, None, None


def _pack(mask: torch.Tensor) -> torch.Tensor:
    """uint8, eight mask entries a byte, in row-major order."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def _unpack(key: str, bits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    if bits.dtype != torch.uint8 or min(shape, default=1) < 1 or bits.shape != (-(-count // 8),):
        raise ValueError(f"{key!r} is not one bit for each weight of shape {shape}")
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)).view(shape)


register("mask_tuning", MaskTuningConfig, MaskTuningModel)
