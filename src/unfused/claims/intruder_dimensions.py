"""LoRA of low rank puts intruder dimensions into the weights, full fine-tuning does not; they hold its forgetting and pile up.

The paper: at the same task score LoRA has leading directions that resemble none of the pretrained ones, its forgetting lies
mostly in them, scaling them down repairs it at little cost, and they accumulate from task to task. Here: the tiny Llama of the
lab, pretrained on docstrings, learns a string task it does not know; forgetting is the rise of bits per byte on docstrings of
held-out modules. Full fine-tuning and LoRA on all linear layers with r = 1, 4, 16, 64 and alpha = 2 r, and r = 64 with
alpha = 8, four learning rates each, chosen by validation on the first seed (`intruders` counts the 10 leading directions of
28 matrices). LoRA r = 4 is then repaired: intruders scaled by 0, 0.3, 0.5, 0.7, 0.9; the same on directions that are no
intruders; all of the update shrunk to the same norm; and four tasks are learned one after the other.

Four verdicts, each refuted if the 95 % interval over seeds of its paired difference reaches 0 or lies on the wrong side:
(a) intruders of LoRA r = 4 minus those of full fine-tuning; (b) area under the frontier of (task accuracy, share of the
forgetting undone) by scaling intruders minus by scaling other directions; (c) the same minus by the uniform shrink, expected to
be refuted: a prototype was; (d) intruders after four tasks minus after one.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from torch import nn

from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.instruction import NEW_TASKS, frontier_area, new_task, share_right
from unfused.claims.lab.rates import measure_at_first_seeds_rate
from unfused.claims.lab.text import bits_per_byte, decoder, docstrings, held_out, pairs, tokenizer
from unfused.claims.lab.tuning import Arm, Task, TuningWorld, measure, tune
from unfused.diagnose.intruder_dimensions import intruder_dimensions, scale_intruders

RULES = {
    "a": "the 95 % interval of (intruders of LoRA r=4) - (of full fine-tuning), each at its best rate, reaches 0",
    "b": "the 95 % interval of the gain in frontier area over scaling directions that are no intruders reaches 0",
    "c": "the 95 % interval of the gain in frontier area over a uniform shrink of equal norm reaches 0",
    "d": "the 95 % interval of (intruders after four tasks) - (after the first) reaches 0",
}
TASK, LOW, FULL = "last", "LoRA r=4", "full fine-tuning"
LAMS = (0.0, 0.3, 0.5, 0.7, 0.9)
SMALL = {"batch_size": 32}
CONTROLS = {"intruders": None, "other directions": "others", "uniform shrink": "uniform"}


def claim(lab: Lab) -> list[Verdict]:
    steps = lab.pick(smoke=2, desk=60)
    world = TuningWorld(
        "one string task",
        lambda _: decoder(lab),
        lambda s: task(lab, TASK, s),
        functools.partial(judge, lab=lab),
    )
    arms = {FULL: Arm(full, (3e-5, 1e-4, 3e-4, 1e-3), recipe=SMALL)}
    for r, alpha in lab.pick(smoke=[(4, 8)], desk=[(1, 2), (4, 8), (16, 32), (64, 128), (64, 8)]):
        name = f"LoRA r={r}" + ("" if alpha == 2 * r else f", alpha={alpha}")
        arms[name] = Arm(functools.partial(lora, r=r, alpha=alpha), (3e-4, 1e-3, 3e-3, 1e-2), recipe=SMALL)
    chosen = measure_at_first_seeds_rate(lab, world, arms, list(lab.seeds), steps)
    grid = measure(lab, world, arms, lab.seeds[:1], steps)
    before = judge(decoder(lab), world.task(0), lab)["bits"]

    verdicts = [
        lab.verdict(
            world="(a) one string task, tiny Llama",
            name=LOW,
            metric="intruders among 280 leading directions",
            method=[row["intruders"] for row in chosen[LOW]],
            baselines={
                name: [row["intruders"] for row in rows] for name, rows in chosen.items() if name != LOW
            },
            rule=RULES["a"],
            holds=lab.paired(column(chosen[LOW], "intruders"), column(chosen[FULL], "intruders")).above_zero,
            ablations={
                "At the chosen rates": {name: shown(rows, before) for name, rows in chosen.items()},
                "Along the rates, first seed": {
                    f"{name}, lr {lr:g}": shown(rows, before)
                    for name, by_lr in grid.items()
                    for lr, rows in by_lr.items()
                },
            },
            notes=[correlations(chosen, grid, before)],
        )
    ]
    lr = chosen[LOW][0]["lr"]
    repaired = [repair(lab, seed, lr, steps) for seed in lab.seeds]
    areas = {name: [area(unit, name, before) for unit in repaired] for name in CONTROLS}
    curves = {
        f"{name}, lam {lam:g}" if name in CONTROLS else f"{name} {lam:g}": {
            "task accuracy": float(np.mean([unit["points"][key]["test"] for unit in repaired])),
            "forgetting (bits per byte)": float(
                np.mean([unit["points"][key]["bits"] - before for unit in repaired])
            ),
        }
        for key in repaired[0]["points"]
        for name, lam in [(key.rpartition(" ")[0], float(key.rpartition(" ")[2]))]
    }
    for letter, rival in (("b", "other directions"), ("c", "uniform shrink")):
        verdicts.append(
            lab.verdict(
                world=f"({letter}) intruders of LoRA r=4 scaled down, against {rival}",
                name="intruders scaled",
                metric="area under the frontier of task accuracy and forgetting undone",
                method=areas["intruders"],
                baselines={rival: areas[rival]},
                rule=RULES[letter],
                ablations={"Along lam, means over seeds": curves} if letter == "b" else None,
            )
        )
    runs = [in_turn(lab, seed, lr, steps) for seed in lab.seeds]
    verdicts.append(
        lab.verdict(
            world="(d) four string tasks one after the other, LoRA r=4, merged after each",
            name="after four tasks",
            metric="intruders among 280 leading directions",
            method=[run[-1]["intruders"] for run in runs],
            baselines={"after one task": [run[0]["intruders"] for run in runs]},
            rule=RULES["d"],
            ablations={
                "After each task": {
                    f"{i + 1}: {name}": shown([run[i] for run in runs], before)
                    for i, name in enumerate(NEW_TASKS[: len(runs[0])])
                }
            },
        )
    )
    return verdicts


def task(lab: Lab, name: str, seed: int) -> Task:
    words = tokenizer(lab)
    parts = [
        pairs(words, *new_task(name, count, 10 * seed + part))
        for part, count in enumerate(lab.pick(smoke=(40, 10, 10), desk=(1920, 100, 300)))
    ]
    train, valid, test = parts
    return Task(train, valid, test)


def full(model: nn.Module) -> nn.Module:
    """All but the embeddings, which are the head as well and which LoRA leaves alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" not in name)
    return model


def lora(model: nn.Module, r: int, alpha: int) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear"))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=2)
def unseen(lab: Lab) -> list[str]:
    """Docstrings of modules that pretraining has not seen."""
    found = docstrings(lab)
    every = [text for name in held_out() for text in found.get(name, ())]
    return every[:: max(1, len(every) // lab.pick(smoke=10, desk=150))]


def scores(model: nn.Module, task: Task, lab: Lab) -> dict[str, float]:
    return {
        "valid": share_right(model, task.valid),
        "test": share_right(model, task.test),
        "bits": bits_per_byte(model, tokenizer(lab), unseen(lab)),
    }


def judge(model: nn.Module, task: Task, lab: Lab) -> dict[str, float]:
    found = scores(model, task, lab)
    report = intruder_dimensions(decoder(lab), model)
    rank = float(np.mean([row.effective_rank for row in report.per_matrix]))
    return found | {"intruders": float(report.total), "size": report.update_size, "rank": rank}


def repair(lab: Lab, seed: int, lr: float, steps: int) -> dict[str, Any]:
    """The points (task accuracy, bits) of one LoRA under every scaling."""

    def compute() -> dict[str, Any]:
        aim, base = task(lab, TASK, seed), decoder(lab)
        torch.manual_seed(seed)
        model = lora(decoder(lab), 4, 8)
        tune(model, aim, lr=lr, steps=steps, seed=seed, **SMALL)
        merged = model.merge_and_unload()  # type: ignore[operator]
        report = intruder_dimensions(base, merged)
        old, new = decoder(lab).state_dict(), merged.state_dict()
        found = {"tuned 1": scores(merged, aim, lab)}
        lams = lab.pick(smoke=LAMS[:1], desk=LAMS)
        for (name, control), lam in itertools.product(CONTROLS.items(), lams):
            base.load_state_dict(scale_intruders(old, new, report, lam, control))
            found[f"{name} {lam:g}"] = scores(base, aim, lab)
        for a in lams[1:]:
            base.load_state_dict({name: old[name] + a * (new[name] - old[name]) for name in old})
            found[f"interpolated {a:g}"] = scores(base, aim, lab)
        return {"points": found, "intruders": report.total}

    return lab.cached(
        "intruders-repair",
        {"seed": seed, "lr": lr, "steps": steps, "scale": lab.scale},
        compute,
        uses=[intruder_dimensions],
    )


def in_turn(lab: Lab, seed: int, lr: float, steps: int) -> list[dict[str, float]]:
    """What `judge` finds after each task."""

    def compute() -> list[dict[str, float]]:
        model: Any = decoder(lab)
        found = []
        for i, name in enumerate(NEW_TASKS[: lab.pick(smoke=2, desk=4)]):
            torch.manual_seed(100 * seed + i)
            aim = task(lab, name, seed)
            model = lora(model, 4, 8)
            tune(model, aim, lr=lr, steps=steps, seed=seed, **SMALL)
            model = model.merge_and_unload()
            found.append(judge(model, aim, lab))
        return found

    return lab.cached(
        "intruders-in-turn",
        {"seed": seed, "lr": lr, "steps": steps, "scale": lab.scale},
        compute,
        uses=[intruder_dimensions],
    )


def area(unit: dict[str, Any], name: str, before: float) -> float:
    """Of the frontier of (task accuracy, share of the forgetting undone)."""
    points = unit["points"]
    lost = points["tuned 1"]["bits"] - before
    if lost <= 0:
        return 0.0  # nothing was forgotten: nothing to undo
    chosen = [points["tuned 1"], *(p for key, p in points.items() if key.startswith(name + " "))]
    return frontier_area([(p["test"], float(np.clip(1 - (p["bits"] - before) / lost, 0, 1))) for p in chosen])


def column(rows: Any, name: str) -> list[float]:
    return [row[name] for row in rows]


def shown(rows: Any, before: float) -> dict[str, Any]:
    means = {
        name: float(np.mean(column(rows, name))) for name in ("intruders", "size", "rank", "test", "bits")
    }
    return {
        "intruders": round(means["intruders"], 1),
        "|dW| / |W|": round(means["size"], 3),
        "effective rank": round(means["rank"], 1),
        "task accuracy": round(means["test"], 3),
        "forgetting (bits per byte)": round(means["bits"] - before, 3),
    }


def correlations(chosen: Any, grid: Any, before: float) -> str:
    """Rank correlation of count and forgetting over all models, and what is left of it at equal size of the update."""
    rows = [row for arm in chosen.values() for row in arm[1:]]
    rows += [row for by_lr in grid.values() for found in by_lr.values() for row in found]
    numbers = np.array([[row["intruders"], row["bits"] - before, row["size"]] for row in rows])
    if len(numbers) < 4 or (np.ptp(numbers, axis=0) == 0).any():
        return f"too few different models ({len(numbers)}) to correlate intruders and forgetting"
    r = spearmanr(numbers).statistic
    partial = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt(max(1e-12, (1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)))
    return (
        f"Spearman correlation of intruders and forgetting over {len(rows)} models: {r[0, 1]:.2f}; of update size and "
        f"forgetting: {r[1, 2]:.2f}; of intruders and forgetting given update size: {partial:.2f}"
    )
