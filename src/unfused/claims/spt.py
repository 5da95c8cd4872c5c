"""Measuring first which weights a task needs (SPT) makes a small budget of trained numbers go further.

The paper: SPT-LoRA and SPT-Adapter ahead of the same modules placed everywhere, and tasks want their budget in different
places. Here: a tiny ViT pretrained on digits and three tasks (`unfused.claims.lab.vision`): the digits turned, negative, over
a background; the digits blurred; the parity of two digits' sum; 10 labels a class. Every arm trains as many numbers as LoRA
of rank 1 on all matrices (3,584, the head apart) and picks its rate from three by validation.

Refuted if the 95 % interval over seeds of the paired gain, averaged over the tasks, reaches 0 over any of: the plan made for
the next task, the task's own plan at random places (tensors of one shape exchanged, entries shuffled), LoRA everywhere.
A cautious look before, on one task, had random entries ahead of those with large gradients.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from unfused.adapters.spt import SptConfig, allocate_spt
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.tuning import Arm, Batch, Task, full, linear_probe, lora, measure, select, tune
from unfused.claims.lab.vision import digits_world
from unfused.nn.select import squared_gradients

TASKS = ("shifted", "blurred", "pasted")
BUDGET = 3584
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
BATCHES, BATCH = 16, 32
RATES, FULL_RATES, SMALL = (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3), {"batch_size": 32}
HOW: dict[str, Any] = {"lrs": RATES, "recipe": SMALL}
JUDGED = ("plan of another task", "own plan, random places", "LoRA everywhere")
RULE = (
    "the 95 % interval over seeds of the paired gain over the plan of another task, over the own plan at random places, or "
    "over LoRA everywhere reaches 0"
)


def claim(lab: Lab) -> Verdict:
    kinds = lab.pick(smoke=TASKS[::2], desk=TASKS)  # two of unequal numbers of classes
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for kind, other in zip(kinds, (*kinds[1:], kinds[0]), strict=True):
        for seed in lab.seeds:
            arms = {
                "SPT-LoRA": _spt(),
                "plan of another task": _spt(plan_from=digits_world(lab, other).task(seed)),
                "own plan, random places": _spt(ranking="shuffled"),
                "LoRA everywhere": lora(1, EVERYWHERE, **HOW),
            }
            if kind == TASKS[0]:
                arms |= {
                    "random entries": _spt(ranking="random", direct=True),
                    "largest weights": _spt(ranking="magnitude", direct=True),
                    "largest gradients, entries alone": _spt(direct=True),
                    "LoRA r=4 on q, v": lora(4, **HOW),
                    "linear probe": dataclasses.replace(linear_probe, **HOW),
                    "full fine-tuning": dataclasses.replace(full, lrs=FULL_RATES, recipe=SMALL),
                }
            grid = measure(lab, digits_world(lab, kind), arms, [seed], lab.pick(smoke=2, desk=100))
            for name, rows in select(grid).items():
                found.setdefault(name, {}).setdefault(kind, []).extend(rows)
    accuracy = {
        name: {kind: [row["test"] for row in rows] for kind, rows in by_kind.items()}
        for name, by_kind in found.items()
    }
    ours = accuracy["SPT-LoRA"]
    gains = [lab.paired(ours, accuracy[name], over="seeds") for name in JUDGED]
    return lab.verdict(
        world="digits: " + ", ".join(kinds),
        name="SPT",
        metric="accuracy",
        method=ours,
        baselines={name: accuracy[name] for name in JUDGED},
        rule=RULE,
        holds=all(gain.interval is not None and gain.interval[0] > 0 for gain in gains),
        over="seeds",
        ablations={
            "Shifted digits alone": {name: rows[TASKS[0]] for name, rows in accuracy.items()},
            "Trained numbers, head apart": {
                name: {kind: int(max(row["parameters"] for row in rows)) for kind, rows in by_kind.items()}
                for name, by_kind in found.items()
            },
            "Share of the budget by place, seed 0": {
                kind: _places(digits_world(lab, kind).backbone, digits_world(lab, kind).task(0))
                for kind in kinds
            },
        },
        notes=[
            "SPT's modules have rank 2 and, as LoRA here, no dropout and no drop-path; sensitivities from 16 batches of 32 "
            "of the 10 labels a class, under the new head.",
        ],
    )


def _spt(**recipe: Any) -> Arm:
    return Arm(_as_it_is, RATES, train=_train, recipe=recipe | SMALL)


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _train(
    model: nn.Module,
    task: Task,
    *,
    lr: float,
    steps: int,
    seed: int,
    ranking: str = "gradient",
    plan_from: Task | None = None,
    direct: bool = False,
    batch_size: int = 64,
) -> nn.Module:
    config = SptConfig(budget=BUDGET, r=2, dropout=0.0, drop_path=0.0, modules_to_save=["classifier"])
    if direct:
        config.structured_ratio = config.vector_ratio = 0.0
    allocate_spt(model, config, scores=_scores(model, plan_from or task, seed, ranking))
    model = get_peft_model(model, config)  # type: ignore[arg-type, assignment]
    tune(model, task, lr=lr, steps=steps, seed=seed, batch_size=batch_size)
    return model


def _scores(model: nn.Module, task: Task, seed: int, ranking: str) -> dict[str, torch.Tensor]:
    """One for each entry of the blocks and norms; of the task's squared gradients, under a new head, unless said otherwise."""
    generator = torch.Generator().manual_seed(seed)
    names = [n for n, _ in model.named_parameters() if "embeddings" not in n and "classifier" not in n]
    weights = {n: model.get_parameter(n).detach() for n in names}
    if ranking == "random":
        return {name: torch.rand(w.shape, generator=generator) for name, w in weights.items()}
    if ranking == "magnitude":
        return {name: w.abs() for name, w in weights.items()}
    vit: Any = copy.deepcopy(model).train().requires_grad_(True)
    if vit.classifier.out_features != task.num_labels:  # another task's
        vit.classifier = nn.Linear(vit.config.hidden_size, task.num_labels)
        vit.config.num_labels = task.num_labels
    losses = (vit(**batch).loss for batch in _some(task.train, generator))
    scores = squared_gradients({name: vit.get_parameter(name) for name in names}, losses)
    return _shuffled(scores, generator) if ranking == "shuffled" else scores


def _some(data: Batch, generator: torch.Generator) -> Any:
    size = len(data["labels"])
    for _ in range(BATCHES):
        rows = torch.randperm(size, generator=generator)[:BATCH]
        yield {name: column[rows] for name, column in data.items()}


def _shuffled(scores: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The same numbers, so that the plan costs the same, in tensors and at places that mean nothing."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, score in scores.items():
        by_shape.setdefault(tuple(score.shape), []).append(name)
    moved = {}
    for names in by_shape.values():
        for name, i in zip(names, torch.randperm(len(names), generator=generator).tolist(), strict=True):
            flat = scores[names[i]].flatten()
            moved[name] = flat[torch.randperm(len(flat), generator=generator)].view(scores[name].shape)
    return moved


def _places(backbone: Any, task: Task) -> dict[str, float]:
    """Where SPT's own plan spends: attention, MLP, norms, biases, by block and over all."""
    torch.manual_seed(0)
    model = backbone(task.num_labels)
    plan = allocate_spt(
        model,
        SptConfig(budget=BUDGET, r=2, modules_to_save=["classifier"]),
        scores=_scores(model, task, 0, "gradient"),
    )
    shares = {"attention": 0, "MLP": 0, "norms": 0, "biases": 0, "first two blocks": 0, "in modules": 0}
    for name, parts in plan.costs.items():
        weights = parts.get("structured", 0) + parts.get("weight", 0)
        place = "attention" if "attention" in name else "MLP" if "mlp" in name else "norms"
        shares[place] += weights
        shares["biases"] += parts.get("bias", 0)
        shares["in modules"] += parts.get("structured", 0)
        shares["first two blocks"] += sum(parts.values()) if any(f".{i}." in name for i in (0, 1)) else 0
    return {place: count / plan.cost for place, count in shares.items()}
