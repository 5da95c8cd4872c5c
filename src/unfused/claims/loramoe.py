"""Experts parted by a balancing loss (LoRAMoE) learn new tasks with less loss of facts than one LoRA of their size.

The paper: with more and more instructions, full fine-tuning and LoRA lose closed-book knowledge; LoRAMoE keeps it and learns
the tasks as well. Here a tiny Llama that knows 400 invented facts is taught four string tasks; a tenth of the rows, the same
for all arms, restate 100 of the facts. LoRAMoE (4 experts of rank 4 in every feed-forward matrix, beta = delta = 0.1) against
one LoRA of rank 16 on the same matrices, LoRA of equal size on all linear layers, full fine-tuning, and itself without the
balancing loss or with ordinary balancing (delta = 0). Four learning rates each; what counts is the area under the frontier
of (task accuracy, recall of the other 300 facts), so that arms are compared at matched task accuracy along the path.

Refuted if the 95 % interval of the paired gain in area over LoRA on the same matrices, or over LoRAMoE without the balancing
loss, reaches 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from unfused.adapters import LoraMoeConfig
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab import tuning as t
from unfused.claims.lab.instruction import (
    NEW_TASKS,
    frontier_area,
    new_task,
    rows_right,
    share_right,
    stacked,
)
from unfused.claims.lab.text import decoder, fact_prompts, facts, pairs, tokenizer

RULE = (
    "the 95 % interval of the paired gain in frontier area over LoRA on the same matrices, or over LoRAMoE without the "
    "balancing loss, reaches 0"
)
FFN = ["gate_proj", "up_proj", "down_proj"]
EXPERTS, R = 4, 4
RECALL, ASKED = "other facts", "facts in question form"
SMALL = {"batch_size": 16}
OURS, SAME, UNBALANCED = "LoRAMoE", "LoRA r=16, FFN", "LoRAMoE, beta=0"


def claim(lab: Lab) -> Verdict:
    words, known = tokenizer(lab), facts(400)[:: lab.pick(smoke=20, desk=1)]
    quarter = len(known) // 4
    restated = pairs(words, *fact_prompts(known[:quarter]))
    asked = {
        RECALL: pairs(words, *fact_prompts(known[quarter:])),
        ASKED: pairs(words, *fact_prompts(known[quarter::3], form=1)),
    }

    def strings(count: int, seed: int) -> t.Batch:
        return stacked([pairs(words, *new_task(name, count, seed)) for name in NEW_TASKS])

    def typed(batch: t.Batch, kind: int) -> t.Batch:
        return {**batch, "task_type": torch.full((len(batch["labels"]),), kind)}

    each = lab.pick(smoke=10, desk=900)
    again = [typed(restated, 1)] * lab.pick(smoke=1, desk=4)  # a tenth of the rows
    task = t.Task(
        stacked([typed(strings(each, 0), 0), *again]),
        strings(lab.pick(smoke=5, desk=25), 1),
        strings(lab.pick(smoke=5, desk=75), 2),
    )
    world = t.TuningWorld(
        "instructions", lambda _: decoder(lab), lambda _: task, functools.partial(judge, asked=asked)
    )
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    arms = {
        OURS: t.Arm(functools.partial(moe, weight=0.1, delta=0.1), rates, recipe=SMALL),
        UNBALANCED: t.Arm(functools.partial(moe, weight=0.0, delta=0.0), rates, recipe=SMALL),
        SAME: t.Arm(functools.partial(lora, targets=FFN, r=EXPERTS * R), rates, recipe=SMALL),
        "LoRAMoE, delta=0": t.Arm(functools.partial(moe, weight=0.1, delta=0.0), rates, recipe=SMALL),
        "LoRA r=10, all linear layers": t.Arm(
            functools.partial(lora, targets="all-linear", r=10), rates, recipe=SMALL
        ),
        "full fine-tuning": t.Arm(full, (3e-5, 1e-4, 3e-4, 1e-3), recipe=SMALL),
    }
    if lab.scale == "smoke":
        arms = {name: arms[name] for name in (OURS, UNBALANCED, SAME)}
    seeds, steps = lab.seeds[:3], lab.pick(smoke=2, desk=160)
    grid = t.measure(lab, world, arms, seeds, steps)
    areas = {
        arm: [
            frontier_area([(row["test"], row[RECALL]) for row in rows])
            for rows in zip(*by_lr.values(), strict=True)
        ]
        for arm, by_lr in grid.items()
    }
    tables: dict[str, dict[str, dict[str, Any]]] = {"Along the learning rates, means over seeds": path(grid)}
    if lab.scale != "smoke":
        few = {arm: t.Arm(arms[arm].prepare, (1e-3,), recipe=SMALL) for arm in (OURS, SAME, UNBALANCED)}
        for rows in (steps // 4, steps // 2):
            tables[f"After {16 * rows:,} rows, not {16 * steps:,}"] = path(
                t.measure(lab, world, few, seeds, rows)
            )
    gains = {arm: lab.paired(areas[OURS], areas[arm]) for arm in (SAME, UNBALANCED)}
    return lab.verdict(
        metric="area under the frontier of task accuracy and recall",
        method=areas[OURS],
        baselines={arm: values for arm, values in areas.items() if arm != OURS},
        rule=RULE,
        holds=all(bool(gain.interval and gain.interval[0] > 0) for gain in gains.values()),
        world="tiny Llama: 400 facts to keep, four string tasks to learn",
        name=OURS,
        ablations=tables,
        notes=[
            "separation: weight that rows of facts give to the first group of experts, minus what rows of tasks give it",
        ],
    )


def path(grid: Mapping[str, Mapping[float, Any]]) -> dict[str, dict[str, Any]]:
    shown = {"test": "task accuracy", RECALL: RECALL, ASKED: ASKED, "separation": "separation"} | dict(
        zip(NEW_TASKS, NEW_TASKS, strict=True)
    )
    return {
        f"{arm}, lr {lr:g}": {
            title: round(float(np.mean([row[name] for row in rows])), 4) for name, title in shown.items()
        }
        for arm, by_lr in grid.items()
        for lr, rows in by_lr.items()
    }


class Typed(nn.Module):
    """Takes the column of types out of a batch, and tells them to a model that wants to know."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, task_type: torch.Tensor | None = None, **batch: torch.Tensor) -> Any:
        tuner: Any = getattr(self.model, "base_model", None)
        if task_type is None or not hasattr(tuner, "sample_types"):
            return self.model(**batch)
        with tuner.sample_types(task_type, batch["attention_mask"]):
            return self.model(**batch)


def moe(model: nn.Module, weight: float, delta: float) -> nn.Module:
    config = LoraMoeConfig(num_experts=EXPERTS, r=R, balance_weight=weight, balance_delta=delta)
    return Typed(get_peft_model(model, config))  # type: ignore[arg-type]


def lora(model: nn.Module, targets: list[str] | str, r: int) -> nn.Module:
    """With LoRAMoE's dropout, and the scale that it has where four experts share the weight: 8 / 4."""
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.05, target_modules=targets)
    return Typed(get_peft_model(model, config))  # type: ignore[arg-type]


def full(model: nn.Module) -> nn.Module:
    return Typed(model.requires_grad_(True))


def judge(model: Typed, task: t.Task, asked: Mapping[str, t.Batch]) -> dict[str, float]:
    by_task = (
        rows_right(model, task.test).view(len(NEW_TASKS), -1).float().mean(1)
    )  # the test is in their order
    return {
        **{name: share_right(model, batch) for name, batch in {"valid": task.valid, **asked}.items()},
        "test": float(by_task.mean()),
        **dict(zip(NEW_TASKS, by_task.tolist(), strict=True)),
        "separation": separation(model, task.valid, asked[RECALL]),
    }


@torch.inference_mode()
def separation(model: Typed, tasks: t.Batch, known: t.Batch) -> float:
    tuner: Any = getattr(model.model, "base_model", None)
    if not hasattr(tuner, "expert_usage"):
        return 0.0
    tuner.expert_usage(reset=True)
    for kind, batch in enumerate((tasks, known)):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        model(task_type=torch.full((len(batch["labels"]),), kind), **inputs)
    usage = tuner.expert_usage(reset=True)
    first = usage[usage.expert < EXPERTS // 2].groupby(["layer", "matrix", "type"]).weight.sum()
    by_type = first.groupby("type").mean()
    return float(by_type[1] - by_type[0])
