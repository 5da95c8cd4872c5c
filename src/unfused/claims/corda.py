"""A start that looks at the data (CorDA) forgets fewer facts at equal task accuracy, or learns the new task faster.

The paper: knowledge-preserved mode (KPM) keeps more of what the base model knows than LoRA while it learns as well, and
instruction-previewed mode (IPM) learns faster than PiSSA. Here a tiny Llama that knows 400 invented facts is taught four
string tasks, r = 8 in all linear layers. KPM is calibrated on 200 of the facts, IPM on 200 rows of the tasks. Each arm has
four learning rates; what counts is the area under its frontier of (task accuracy, recall of the 200 facts that no arm was
shown), so that the trade-off is compared along the whole path. IPM is judged by task accuracy after a fifth of the steps,
at the rate that validation chooses.

KPM is refuted if the 95 % interval of its paired gain in area over LoRA, or over the last components of a plain SVD (the same
without the covariance), reaches 0. IPM is refuted if that of its gain in accuracy over LoRA or PiSSA does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import nn

from unfused.adapters import calibrate_corda
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

KPM_RULE = (
    "the 95 % interval of the paired gain in frontier area over LoRA, or over the last components of a plain SVD, "
    "reaches 0"
)
IPM_RULE = "the 95 % interval of the paired gain in accuracy over LoRA or PiSSA reaches 0"
R = 8
RATES, WHOLE = (3e-4, 1e-3, 3e-3, 1e-2), (3e-5, 1e-4, 3e-4, 1e-3)
SVD_LAST, RECALL = "last components of SVD", "facts not shown"

SMALL = {"batch_size": 16}

Grid = Mapping[str, Mapping[float, Sequence[Mapping[str, float]]]]


def claim(lab: Lab) -> list[Verdict]:
    words, known = tokenizer(lab), facts(400)[:: lab.pick(smoke=20, desk=1)]
    half = len(known) // 2
    shown = pairs(words, *fact_prompts(known[:half]))
    asked = {RECALL: pairs(words, *fact_prompts(known[half:])), "facts shown": shown}

    def rows(count: int, seed: int) -> t.Batch:
        return stacked([pairs(words, *new_task(name, count, seed)) for name in NEW_TASKS])

    train = rows(lab.pick(smoke=20, desk=800), 0)
    task = t.Task(train, rows(lab.pick(smoke=5, desk=25), 1), rows(lab.pick(smoke=5, desk=75), 2))
    preview = {name: column[:: max(1, len(column) // 200)] for name, column in train.items()}
    world = t.TuningWorld(
        "new strings", lambda _: decoder(lab), lambda _: task, functools.partial(judge, asked=asked)
    )
    arms = {
        "CorDA KPM": t.Arm(functools.partial(components, mode="kpm", batch=shown), RATES, recipe=SMALL),
        "LoRA": t.Arm(lora, RATES, recipe=SMALL),
        SVD_LAST: t.Arm(functools.partial(components, mode="kpm"), RATES, recipe=SMALL),
        "CorDA IPM": t.Arm(functools.partial(components, mode="ipm", batch=preview), RATES, recipe=SMALL),
        "PiSSA": t.Arm(functools.partial(lora, start="pissa"), RATES, recipe=SMALL),
        "LoRA with replay": t.Arm(lora, RATES, train=functools.partial(replay, rows=shown), recipe=SMALL),
        "full fine-tuning": t.Arm(t.full.prepare, WHOLE, recipe=SMALL),
    }
    if lab.scale == "smoke":
        arms = {name: arms[name] for name in ("CorDA KPM", "LoRA", SVD_LAST)}
    seeds, steps = lab.seeds[:3], lab.pick(smoke=2, desk=150)
    verdicts = [kept(lab, t.measure(lab, world, arms, seeds, steps))]
    if lab.scale != "smoke":
        early = {name: arms[name] for name in ("CorDA IPM", "LoRA", "PiSSA")}
        verdicts.append(learned(lab, t.measure(lab, world, early, seeds, steps // 5)))
    return verdicts


def kept(lab: Lab, grid: Grid) -> Verdict:
    areas = {
        arm: [
            frontier_area([(row["test"], row[RECALL]) for row in of_seed])
            for of_seed in zip(*by_lr.values(), strict=True)
        ]
        for arm, by_lr in grid.items()
    }
    ours = areas.pop("CorDA KPM")
    gains = {arm: lab.paired(ours, values) for arm, values in areas.items()}
    path: dict[str, dict[str, Any]] = {
        f"{arm}, lr {lr:g}": {
            "task accuracy": float(np.mean([row["test"] for row in rows])),
            **{
                name: float(np.mean([row[name] for row in rows]))
                for name in (RECALL, "facts shown", *NEW_TASKS)
            },
        }
        for arm, by_lr in grid.items()
        for lr, rows in by_lr.items()
    }
    return lab.verdict(
        metric="area under the frontier of task accuracy and recall",
        method=ours,
        baselines=areas,
        rule=KPM_RULE,
        holds=all(above_zero(gains[arm]) for arm in ("LoRA", SVD_LAST)),
        world="tiny Llama: 400 facts to keep, four string tasks to learn",
        name="CorDA KPM",
        ablations={"Along the learning rates, means over seeds": path},
    )


def learned(lab: Lab, grid: Grid) -> Verdict:
    found = t.select(grid)
    accuracy = {arm: [row["test"] for row in rows] for arm, rows in found.items()}
    ours = accuracy.pop("CorDA IPM")
    gains = {arm: lab.paired(ours, values) for arm, values in accuracy.items()}
    chosen: dict[str, dict[str, Any]] = {
        arm: {
            "task accuracy": float(np.mean([row["test"] for row in rows])),
            RECALL: float(np.mean([row[RECALL] for row in rows])),
            "learning rates": ", ".join(f"{row['lr']:g}" for row in rows),
        }
        for arm, rows in found.items()
    }
    return lab.verdict(
        metric="task accuracy after a fifth of the steps",
        method=ours,
        baselines=accuracy,
        rule=IPM_RULE,
        holds=all(above_zero(gains[arm]) for arm in ("LoRA", "PiSSA")),
        world="tiny Llama: four string tasks to learn",
        name="CorDA IPM",
        ablations={"At the rates that validation chooses, means over seeds": chosen},
    )


def above_zero(gain: Any) -> bool:
    return bool(gain.interval and gain.interval[0] > 0)


def judge(model: nn.Module, task: t.Task, asked: Mapping[str, t.Batch]) -> dict[str, float]:
    parts = {"valid": task.valid, **asked}
    by_task = (
        rows_right(model, task.test).view(len(NEW_TASKS), -1).float().mean(1)
    )  # the test is in their order
    return {
        **{name: share_right(model, batch) for name, batch in parts.items()},
        "test": float(by_task.mean()),
        **dict(zip(NEW_TASKS, by_task.tolist(), strict=True)),
    }


def lora(model: nn.Module, start: bool | str = True) -> nn.Module:
    config = LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", init_lora_weights=start)  # type: ignore[arg-type]
    return get_peft_model(model, config)  # type: ignore[arg-type]


def components(model: nn.Module, mode: str, batch: t.Batch | None = None) -> nn.Module:
    """CorDA's start; without a batch with the identity as covariance, which makes it a plain SVD's."""
    config = LoraConfig(
        r=R,
        lora_alpha=R,
        target_modules="all-linear",
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),  # type: ignore[arg-type]
    )
    if batch is None:
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        calibrate_corda(
            model,
            config,
            covariances={name: torch.eye(module.in_features) for name, module in linears.items()},
        )
    else:
        calibrate_corda(model, config, [{name: batch[name] for name in ("input_ids", "attention_mask")}])
    return get_peft_model(model, config)  # type: ignore[arg-type]


def replay(model: nn.Module, task: t.Task, rows: t.Batch, **how: Any) -> None:
    """The calibration's facts among the rows of the task: a quarter of what is trained on."""
    times = max(1, len(task.train["labels"]) // (3 * len(rows["labels"])))
    t.tune(model, stacked([task.train, *[rows] * times]), **how)
