"""Pruning a BERT where its low-rank plus sparse update is small (DSEE) keeps more accuracy than pruning where its weights are.

The paper: 0.5 % of the parameters trained, half of the weights gone, within a point of dense LoRA and ahead of magnitude
pruning followed by LoRA. Here: a tiny BERT pretrained on docstrings, which of eight areas of the standard library a sentence
comes from, 800 labels (`unfused.claims.lab.text`); query and value are updated (r = 4, 64 entries), keys, attention outputs
and FFNs pruned as well. All arms train for as many steps in all and have their rate from the search of dense LoRA.

Refuted if at half of the weights gone the 95 % interval over seeds of the paired gain of scoring query and value by their
update over scoring them by |W|, all else equal, reaches 0, or that of the 64 entries over one more rank does. Both looked
likely at this size beforehand. The distance to dense LoRA and to magnitude pruning first is reported as measured.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from unfused.adapters.dsee import DseeConfig, dsee_prune
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.text import sentence_classifier, stdlib_areas
from unfused.claims.lab.tuning import Task, classification, count_trainable, tune

RULE = (
    "at half of the weights gone, the 95 % interval of the paired gain over scoring query and value by |W|, or over a fifth "
    "rank in place of the 64 entries, reaches 0"
)
RATES = (1e-3, 3e-3, 1e-2)
BATCH = 16
OURS = {"r": 4, "num_sparse": 64}
PLAIN = {"r": 4, "num_sparse": 0}


def claim(lab: Lab) -> Verdict:
    seeds = lab.seeds[:3]
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for name, row in _arms(lab, seed).items():
            found.setdefault(name, []).append(row)
        lab.log(
            f"seed {seed}: " + "; ".join(f"{name} {rows[-1]['test']:.3f}" for name, rows in found.items())
        )
    accuracy = {name: [row["test"] for row in rows] for name, rows in found.items()}
    at_half = {name.removesuffix(", 0.5"): rows for name, rows in accuracy.items() if name.endswith(", 0.5")}
    ours = at_half.pop("DSEE")
    gains = [lab.paired(ours, at_half[name]) for name in ("scored by |W|", "r = 5, no entries")]
    return lab.verdict(
        world="stdlib areas, half of the weights gone",
        name="DSEE",
        metric="accuracy",
        method=ours,
        baselines={"dense LoRA": accuracy["dense LoRA"], **at_half},
        rule=RULE,
        holds=all(gain.interval is not None and gain.interval[0] > 0 for gain in gains),
        ablations={
            "Other shares of weights gone, and a head of each layer": {
                name: rows for name, rows in accuracy.items() if not name.endswith(", 0.5")
            },
            "Cost": {
                name: {
                    "trained numbers, head apart": int(rows[0]["parameters"]),
                    "zeros among pruned matrices": rows[0]["sparsity"],
                    "zeros among all weights": rows[0]["sparsity_of_all"],
                }
                for name, rows in found.items()
            },
        },
        notes=[
            f"{_steps(lab)} steps, pruning, as many again; dense and pruned-first arms train {2 * _steps(lab)} at once. Rates "
            + ", ".join(f"{rows['lr']:g}" for rows in found["dense LoRA"]),
            "zeros are counted in the tuner's form, W * S1; merging the update fills those of query and value",
        ],
    )


def _steps(lab: Lab) -> int:
    return lab.pick(smoke=1, desk=80)


def _arms(lab: Lab, seed: int) -> dict[str, dict[str, float]]:
    grid = [_unit(lab, seed, PLAIN, lr) for lr in lab.pick(smoke=RATES[1:2], desk=RATES)]
    dense = max(grid, key=lambda row: (row["valid"], -row["valid_loss"]))
    lr = dense["lr"]
    found = {"dense LoRA": dense}

    def arm(name: str, amount: float = 0.5, config: dict[str, int] = OURS, **how: Any) -> None:
        found[f"{name}, {amount}"] = _unit(lab, seed, config, lr, amount=amount, **how)

    arm("DSEE", score="update")
    arm("scored by |W|", score="weight")
    arm("r = 5, no entries", config={"r": 5, "num_sparse": 0}, score="update")
    if lab.scale == "smoke":
        return found
    arm("scored by |W + update|", score="sum")
    arm("r = 4, no entries", config=PLAIN, score="update")
    arm("largest |W| kept, then LoRA", config=PLAIN, score="weight", first=True)
    arm("random weights kept, then LoRA", config=PLAIN, score="random", first=True)
    arm("largest |W| kept, then LoRA", 0.7, PLAIN, score="weight", first=True)
    arm("DSEE", 0.7, score="update")
    found["DSEE, dense"] = _unit(lab, seed, OURS, lr, amount=0.0, score="update")
    found["DSEE, a head of each layer"] = _unit(lab, seed, OURS, lr, amount=0.0, score="update", heads=1)
    return found


def _unit(
    lab: Lab,
    seed: int,
    config: dict[str, int],
    lr: float,
    amount: float = 0.0,
    score: str = "",
    heads: int = 0,
    first: bool = False,
) -> dict[str, float]:
    """One arm: dense in one go without `score`; pruned before all training with `first`, else between two halves."""
    steps = _steps(lab)
    params = {"seed": seed, "lr": lr, "steps": steps, **config}

    def half() -> dict[str, torch.Tensor]:
        model, task = _fresh(lab, seed, config)
        _tune(model, task, lr, steps, seed)
        return get_peft_model_state_dict(model)

    def whole() -> dict[str, float]:
        model, task = _fresh(lab, seed, config)
        report = None
        if score and not first:
            set_peft_model_state_dict(model, lab.cached("dsee-half", params, half))
        if amount or heads:
            report = dsee_prune(model, amount=amount, score=score, heads=heads, seed=seed)
        _tune(model, task, lr, 2 * steps if first or not score else steps, seed + 1 if score else seed)
        return {
            **classification(model, task),
            "lr": lr,
            "parameters": count_trainable(model),
            "sparsity": report.sparsity if report else 0.0,
            "sparsity_of_all": report.sparsity_of_all if report else 0.0,
        }

    pruning = {"amount": amount, "score": score, "heads": heads, "first": first}
    return lab.cached("dsee-arm", {**params, **pruning}, whole)


def _fresh(lab: Lab, seed: int, config: dict[str, int]) -> tuple[Any, Task]:
    task = stdlib_areas(lab, seed, lab.pick(smoke=16, desk=800))
    if lab.scale == "smoke":
        valid, test = (
            {name: column[::40] for name, column in part.items()} for part in (task.valid, task.test)
        )
        task = Task(task.train, valid, test, num_labels=task.num_labels)
    torch.manual_seed(seed)
    model = sentence_classifier(lab, task.num_labels)
    scaled = DseeConfig(**config, lora_alpha=2 * config["r"], modules_to_save=["classifier"], seed=seed)  # type: ignore[arg-type]
    return get_peft_model(model, scaled), task  # type: ignore[arg-type]


def _tune(model: nn.Module, task: Task, lr: float, steps: int, seed: int) -> None:
    tune(model, task, lr=lr, steps=steps, seed=seed, batch_size=BATCH)
