"""Tuning whole heads and FFN channels (S2FT) learns a new task as well as LoRA and forgets less of what the model knew.

The paper: ahead of LoRA on the tuned domain by 1 to 5 %, and of full fine-tuning on other domains by 11.5 %; channels drawn at
random or with small activations forget less than those with large ones. Here: a tiny Llama that copies, reverses and counts
letters and knows 400 facts and the standard library's docstrings (`unfused.claims.lab.text`), tuned on 2,000 examples of four
other things to do with letters. Every arm trains 10,240 numbers (1 %) and has three rates; what counts is the area under its
frontier of (new tasks right, old tasks still right), so that the trade-off is compared along the whole path.

First verdict: refuted if the 95 % interval over seeds of the paired gain in area over LoRA on the same matrices reaches 0.
Second: refuted if that of small over large activations does. Longer words, facts and docstrings are reported as measured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from unfused.adapters.s2ft import S2ftConfig, initialize_s2ft
from unfused.adapters.spt import SptConfig, allocate_spt
from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.instruction import NEW_TASKS, frontier_area, new_task, share_right, stacked
from unfused.claims.lab.text import (
    STRING_TASKS,
    decoder,
    docstrings,
    fact_prompts,
    facts,
    held_out,
    pack,
    pairs,
    string_task,
    tokenizer,
)
from unfused.claims.lab.tuning import Arm, Batch, Task, TuningWorld, full, measure, select

LORA_RULE = "the 95 % interval of the paired gain in frontier area over LoRA on the same matrices reaches 0"
CHOICE_RULE = (
    "the 95 % interval of the paired gain in frontier area of small over large activations reaches 0"
)
RATIO = {"o_proj": 1 / 16, "down_proj": 48.01 / 1536}  # one head of 16, 48 channels of 1,536: 10,240 numbers
COUNT = 10_240
RATES, FULL_RATES = (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3)
SMALL = {"batch_size": 16}
KEPT = ("old tasks", "facts", "docstring loss")

Rows = dict[str, list[dict[str, float]]]


def claim(lab: Lab) -> list[Verdict]:
    grids: dict[str, dict[float, list[dict[str, float]]]] = {}
    asked = _asked(lab)
    world = TuningWorld(
        "new letter tasks",
        lambda _: decoder(lab),
        functools.partial(_task, lab),
        functools.partial(_judge, asked=asked),
    )
    for seed in lab.seeds[:3]:
        arms = _arms(world.task(seed).train, seed)
        if lab.scale == "smoke":
            arms = {name: arms[name] for name in list(arms)[:4]}
        for name, by_lr in measure(lab, world, arms, [seed], lab.pick(smoke=1, desk=100)).items():
            for lr, rows in by_lr.items():
                grids.setdefault(name, {}).setdefault(lr, []).extend(rows)
    areas = {
        name: [
            frontier_area([(row["test"], row["old tasks"]) for row in of_seed])
            for of_seed in zip(*by_lr.values(), strict=True)
        ]
        for name, by_lr in grids.items()
    }
    before = _judge(decoder(lab), world.task(0), asked)
    tables = {
        "At the rates that validation chooses, means over seeds": {
            "before tuning": {name: before[name] for name in ("test", "longer words", *KEPT)},
            **{name: _means(rows) for name, rows in select(grids).items()},
        },
        "Along the rates, means over seeds": {
            f"{name}, lr {lr:g}": _means(rows) for name, by_lr in grids.items() for lr, rows in by_lr.items()
        },
    }
    common: dict[str, Any] = {
        "world": "tiny Llama: four new tasks on letters, three old ones to keep",
        "metric": "area under the frontier of new and old tasks right",
    }
    small, large = areas.pop("S2FT, small activations"), areas.pop("S2FT, large activations")
    ours = areas.pop("S2FT")
    gains = [lab.paired(ours, areas["LoRA, same matrices"]), lab.paired(small, large)]
    holds = [gain.interval is not None and gain.interval[0] > 0 for gain in gains]
    first = lab.verdict(
        **common,
        name="S2FT",
        method=ours,
        baselines=areas,
        rule=LORA_RULE,
        holds=holds[0],
        ablations=tables | {"Backward and switching": _systems(lab)},
        notes=[
            "Bytes kept for backward are those of one step on 16 rows of 32 tokens, parameters left out.",
            "The first plan, sums of two numbers in words, was given up: no arm learned any in 120 steps.",
            "In a first desk run the grids of all but LoRA ended at their best rates (1e-2; full fine-tuning 1e-3): S2FT "
            "0.085, LoRA 0.107, random entries 0.123, full 0.181; small activations 0.089, large 0.133. They were moved up, "
            "and all adapters have the same now.",
        ],
    )
    second = lab.verdict(
        **common,
        name="S2FT, small activations",
        method=small,
        baselines={"large activations": large, "random channels": ours},
        rule=CHOICE_RULE,
        holds=holds[1],
    )
    return [first, second]


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in ("test", "longer words", *KEPT)}


# -- arms --------------------------------------------------------------------------------------------------------------


def _arms(train: Batch, seed: int) -> dict[str, Arm]:
    shown = [{name: column[:64] for name, column in train.items()}]
    s2ft = functools.partial(_s2ft, seed=seed, shown=shown)
    lora = {"r": 1, "lora_alpha": 2, "target_modules": "all-linear"}
    same = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["o_proj", "down_proj"],
        "rank_pattern": {"o_proj": 4},
        "alpha_pattern": {"o_proj": 8},
    }
    return {
        "S2FT": Arm(s2ft, RATES, recipe=SMALL),
        "LoRA, same matrices": Arm(functools.partial(_lora, options=same), RATES, recipe=SMALL),
        "S2FT, small activations": Arm(functools.partial(s2ft, selection="activation"), RATES, recipe=SMALL),
        "S2FT, large activations": Arm(
            functools.partial(s2ft, selection="activation", select_largest=True), RATES, recipe=SMALL
        ),
        "random entries, same matrices": Arm(
            functools.partial(_random_entries, seed=seed), RATES, recipe=SMALL
        ),
        "LoRA, all matrices": Arm(functools.partial(_lora, options=lora), RATES, recipe=SMALL),
        "full fine-tuning": Arm(full.prepare, FULL_RATES, recipe=SMALL),
    }


def _s2ft(
    model: nn.Module, seed: int, shown: Sequence[Batch], selection: str = "random", **options: Any
) -> nn.Module:
    model = get_peft_model(model, S2ftConfig(ratio=dict(RATIO), selection=selection, seed=seed, **options))  # type: ignore[arg-type, assignment]
    if selection != "random":
        initialize_s2ft(model, shown)
    return model


def _lora(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    return get_peft_model(model, LoraConfig(**options))  # type: ignore[arg-type, return-value]


def _random_entries(model: nn.Module, seed: int) -> nn.Module:
    """Single entries of the same matrices, by chance: SPT's sparse layers under a ranking that is none."""
    config = SptConfig(
        target_modules=["o_proj", "down_proj"], budget=COUNT, structured_ratio=0.0, vector_ratio=0.0
    )
    generator = torch.Generator().manual_seed(seed)
    chosen = {name: "o_proj" in name or "down_proj" in name for name, _ in model.named_parameters()}
    scores = {
        name: torch.rand(p.shape, generator=generator) if chosen[name] else torch.full(p.shape, -torch.inf)
        for name, p in model.named_parameters()
    }
    allocate_spt(model, config, scores=scores)
    return get_peft_model(model, config)  # type: ignore[arg-type, return-value]


# -- the task and what is to be kept -------------------------------------------------------------------------------------


def _rows(lab: Lab, count: int, seed: int, letters: tuple[int, int] = (2, 5)) -> Batch:
    """`count` examples of each new task."""
    words = tokenizer(lab)
    return stacked([pairs(words, *new_task(task, count, seed, letters)) for task in NEW_TASKS])


def _task(lab: Lab, seed: int) -> Task:
    sizes = lab.pick(smoke=(4, 2, 2), desk=(500, 25, 75))
    train, valid, test = (_rows(lab, size, 10 * seed + part) for part, size in enumerate(sizes))
    return Task(train, valid, test)


def _asked(lab: Lab) -> dict[str, Batch]:
    words, size = tokenizer(lab), lab.pick(smoke=4, desk=100)
    unseen = [text for name in held_out() for text in docstrings(lab).get(name, ())]
    return {
        "longer words": _rows(lab, size // 2, 0, (6, 8)),
        "old tasks": stacked([pairs(words, *string_task(task, size, seed=2)) for task in STRING_TASKS]),
        "facts": pairs(words, *fact_prompts(facts()[: 2 * size])),
        "docstring loss": pack(words, unseen[:: max(1, len(unseen) // size)], whole=False),
    }


def _judge(model: nn.Module, task: Task, asked: Mapping[str, Batch]) -> dict[str, float]:
    right = {"valid": task.valid, "test": task.test, **asked}
    prose = right.pop("docstring loss")
    with torch.inference_mode():
        losses = {"valid_loss": float(model(**task.valid).loss), "docstring loss": float(model(**prose).loss)}
    return {name: share_right(model, batch) for name, batch in right.items()} | losses


# -- the systems' side -----------------------------------------------------------------------------------------------------


def _systems(lab: Lab) -> dict[str, dict[str, Any]]:
    """Bytes kept for backward in one step, and the time to put one adapter in place of another, merged."""
    arms = _arms({"input_ids": torch.ones(1, 4, dtype=torch.long)}, 0)
    ids = torch.randint(5, 2000, (16, 32), generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("S2FT", "LoRA, same matrices", "full fine-tuning"):
        model = arms[name].prepare(decoder(lab)).train()
        kept = _bytes_kept(model, {"input_ids": ids, "labels": ids})
        found[name] = {"MiB kept for backward": kept / 2**20, "ms to switch adapters": ""}
        if name != "full fine-tuning":
            found[name]["ms to switch adapters"] = _switch(model)
    return found


def _bytes_kept(model: nn.Module, batch: Batch) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    return sum(size for at, size in kept.items() if at not in own)


def _switch(model: Any) -> float:
    """Median milliseconds to merge the adapter and to take it out again."""
    times = []
    for _ in range(9):
        start = time.perf_counter()
        model.merge_adapter()
        model.unmerge_adapter()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))
