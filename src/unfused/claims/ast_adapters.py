"""On speech, far from the sounds that a spectrogram transformer knows, a Conformer adapter beats a plain bottleneck.

The paper: the Conformer adapter beats the standard methods and reaches full fine-tuning with 0.29 % of the weights, above all
where the task is speech and the backbone knows sound events. Here: spoken digits (or the sample's words) by 20 labels each,
voices that gave no label, a tiny AST pretrained on synthetic sounds and, where found, two folds of ESC-10; held-out folds of
ESC-10 are the near task. All arms have about as many weights, the same steps, a grid of three rates (full fine-tuning's ten
times lower), and a head that reads the mean of all tokens.

Refuted if the paired gain over the plain bottleneck of as many weights, or over the Conformer with kernel 1, which keeps its
gate and BatchNorm and loses its convolution, has a 95 % interval that reaches 0 on the far task.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn

from unfused.adapters import AstAdapterConfig
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.spectrograms import events_world, mfcc_accuracy, words_world
from unfused.claims.lab.tuning import (
    Arm,
    TuningWorld,
    adapter,
    bias_only,
    compare,
    count_trainable,
    full,
    head_names,
    linear_probe,
    lora,
)

RULE = (
    "the 95 % interval of the paired gain over the bottleneck of as many weights, or over the Conformer with kernel 1, "
    "reaches 0"
)
HIGH, LOW = (5e-3, 1.5e-2, 5e-2), (3e-4, 1e-3, 3e-3)
WIDTH, INNER = 48, {1: 5, 3: 5, 9: 5, 31: 4}  # inner width by kernel: about 3,600 weights each
OURS, NO_CONVOLUTION, PLAIN = "Conformer adapter", "Conformer, kernel 1", "bottleneck"


class DeepPrompts(nn.Module):
    """The [DIST] token's place is taken by n learned tokens, others at every block; the head reads the mean of all."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        body: Any = model.audio_spectrogram_transformer
        self.body, self.classifier = body, model.classifier
        bound = (6 / (3 * body.config.patch_size**2 + body.config.hidden_size)) ** 0.5
        self.prompts = nn.Parameter(
            torch.empty(len(body.layers), count, body.config.hidden_size).uniform_(-bound, bound)
        )

    def forward(self, input_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        body: Any = self.body
        classifier: Any = self.classifier
        x = body.embeddings(input_values)
        patches = x.shape[1] - 2
        for prompts, block in zip(self.prompts, body.layers, strict=True):
            x = block(torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, -patches:]], 1))
        logits = classifier(body.layernorm(x).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _deep_prompts(model: nn.Module, count: int) -> nn.Module:
    model.requires_grad_(False)
    for head in head_names(model):
        model.get_submodule(head).requires_grad_(True)
    return DeepPrompts(model, count)


def conformer(kernel: int = 31, **options: Any) -> Arm:
    return _arm(adapter(AstAdapterConfig(reduction=WIDTH / INNER[kernel], kernel_size=kernel, **options)))


def _arm(arm: Arm, lrs: tuple[float, ...] = HIGH) -> Arm:
    return dataclasses.replace(arm, lrs=lrs, recipe={"batch_size": 32, "warmup": 0.1})


def arms() -> dict[str, Arm]:
    return {
        OURS: conformer(),
        PLAIN: _arm(adapter(AstAdapterConfig(block="bottleneck", reduction=WIDTH / 8))),
        NO_CONVOLUTION: conformer(1),
        "LoRA, q v": _arm(lora(5, ("q_proj", "v_proj"))),
        "full fine-tuning": _arm(full, LOW),
        "LoRA, q k v o": _arm(lora(2, ("q_proj", "k_proj", "v_proj", "o_proj"))),
        "deep prompts": _arm(Arm(partial(_deep_prompts, count=18))),
        "BitFit": _arm(bias_only),
        "linear probe": _arm(linear_probe),
    }


def ablations() -> dict[str, Arm]:
    return {
        "kernel 3": conformer(3),
        "kernel 9": conformer(9),
        "3 x 3 on the grid": conformer(3, layout="2d"),
        "parallel with residual": conformer(residual=True),
        "sequential": conformer(placement="sequential"),
        "released initial values": conformer(init="released"),
    }


def claim(lab: Lab) -> Verdict:
    every, steps = arms(), lab.pick(smoke=2, desk=80)
    name = "fsdd" if lab.scale != "smoke" and lab.has("fsdd") else "sample"
    world = words_world(lab, name, lab.pick(smoke=3, desk=20))
    results = compare(lab, world, every, steps=steps)
    results["MFCC, logistic regression"] = [mfcc_accuracy(world.task(seed)) for seed in lab.seeds]
    more: dict[str, Any] = {}
    if lab.scale != "smoke":
        variants = {OURS: every[OURS]} | ablations()
        more["The adapter's parts, first seeds"] = compare(lab, world, variants, lab.seeds[:2], steps)
        few = {arm: every[arm] for arm in (OURS, PLAIN, NO_CONVOLUTION)}
        more["5 labels each"] = compare(lab, words_world(lab, name, 5), few, lab.seeds[:3], steps)
        if lab.has("esc10"):
            near = {arm: every[arm] for arm in (OURS, PLAIN, "LoRA, q v", "full fine-tuning")}
            more["Near task: ESC-10, 5 clips each"] = compare(
                lab, events_world(lab), near, lab.seeds[:3], steps
            )
    more["Weights, without the head"] = _weights(world)
    gains = {arm: lab.paired(results[OURS], results[arm]) for arm in results if arm != OURS}
    beaten = [arm for arm, gain in gains.items() if gain.interval is not None and gain.interval[0] > 0]
    return lab.verdict(
        metric="accuracy",
        method=results[OURS],
        baselines={arm: values for arm, values in results.items() if arm != OURS},
        rule=RULE,
        holds={PLAIN, NO_CONVOLUTION} <= set(beaten),
        world="spoken digits of unseen speakers (FSDD)"
        if name == "fsdd"
        else "spoken words of unseen voices (sample)",
        name=OURS,
        ablations=more,
        notes=[
            f"above {', '.join(beaten) or 'none'} with an interval above 0",
            f"full fine-tuning is ahead by {-gains['full fine-tuning'].mean:+.3f}",
        ],
    )


def _weights(world: TuningWorld) -> dict[str, dict[str, int]]:
    return {
        name: {"trained weights": count_trainable(arm.prepare(world.backbone(2)))}
        for name, arm in (arms() | ablations()).items()
    }
