"""Learning how much of each tensor of a task vector to add beats one weight per vector, random directions and a linear probe.

The paper: 22 data sets under CLIP. Here: one small ViT and its fine-tunings under frozen heads, on real pictures (CIFAR-10,
Omniglot, digits, spoken digits) where they are found, on eight domains of digits otherwise (`unfused.claims.lab.fine_tunings`).
Targets are the two tasks that their own fine-tuning improves most on validation data; their vector leaves the library. Every
trained arm takes the better of two learning rates by the same validation data and trains for 50 steps; seeds draw the shots.

Refuted, each a verdict of its own, if the 95 % interval over seeds of the paired gain reaches 0:
- few-shot (mean over 1 and 4 shots and targets): over isotropic scaling, over vectors with shuffled entries, or over a linear
  probe of the base's features with the same shots;
- aTLAS x 80 (mean over 4 and 16 shots and targets): over LoRA of rank 4, or over itself with shuffled entries;
- addition (mean normalised test accuracy of all tasks, one model): over task arithmetic, over TIES (scales searched on the same
  validation data), or over learned isotropic scaling;
- unsupervised FixMatch, on tasks whose zero-shot validation accuracy lies between .5 and .9 (at most three): over zero-shot.
Entropy, fixed pseudo-labels, full fine-tuning, Tip-Adapter and LP++ on base and composed features are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unfused.claims.lab import Absent, Lab, Verdict
from unfused.claims.lab.fine_tunings import Encoder, FineTunings, State, digit_domains, picture_tasks
from unfused.claims.lab.tuning import Batch, Task, classification, tune
from unfused.merge import atlas
from unfused.merge._atlas_training import accuracy, learn
from unfused.merge._engine import merge

STEPS, RATES = 50, (0.03, 0.1)
REACHES = "the 95 % interval of the paired gain over {} reaches 0"
RULES = {
    "few-shot": REACHES.format("isotropic scaling, shuffled vectors or a linear probe"),
    "x 80": REACHES.format("LoRA of rank 4 or shuffled vectors"),
    "addition": REACHES.format("task arithmetic, TIES or learned isotropic scaling"),
    "adaptation": REACHES.format("zero-shot"),
}


def claim(lab: Lab) -> list[Verdict]:
    world = _world(lab)
    targets = _targets(lab, world)
    verdicts = []
    shots = lab.pick(smoke=(1,), desk=(1, 4, 16))
    table = {
        target: {k: [_few_shot(lab, world, target, k, seed) for seed in lab.seeds] for k in shots}
        for target in targets
    }

    def arm(name: str, counts: tuple[int, ...]) -> list[float]:
        """By seed, the mean over targets and numbers of shots."""
        every = [[row[name] for row in table[target][k]] for target in targets for k in counts if k in shots]
        return [float(x) for x in np.mean(every, axis=0)]

    few = ("isotropic", "shuffled", "linear probe")
    verdicts.append(
        _verdict(
            lab,
            world,
            "few-shot",
            "aTLAS",
            arm("aTLAS", (1, 4)),
            {name: arm(name, (1, 4)) for name in few},
            table,
        )
    )
    many = shots[-2:]
    verdicts.append(
        _verdict(
            lab,
            world,
            "x 80",
            "aTLAS x 80",
            arm("aTLAS x 80", many),
            {
                name: arm(name, many)
                for name in ("LoRA r=4", "shuffled x 80", "aTLAS", "full fine-tuning", "linear probe")
            },
            judged=("LoRA r=4", "shuffled x 80"),
        )
    )
    rows = [_addition(lab, world, seed) for seed in lab.seeds]
    verdicts.append(
        _verdict(
            lab,
            world,
            "addition",
            "aTLAS",
            [row["aTLAS"] for row in rows],
            {name: [row[name] for row in rows] for name in rows[0] if name != "aTLAS"},
            judged=("task arithmetic", "TIES", "isotropic"),
            metric="mean normalised accuracy",
        )
    )
    middle = _middling(lab, world)
    found = [[_adaptation(lab, world, task, seed) for task in middle] for seed in lab.seeds]
    arms = {name: [float(np.mean([row[name] for row in rows])) for rows in found] for name in found[0][0]}
    verdicts.append(
        _verdict(
            lab,
            world,
            "adaptation",
            "unsupervised FixMatch",
            arms.pop("ufm"),
            arms,
            judged=("zero-shot",),
            notes=[f"tasks: {', '.join(middle)}"],
        )
    )
    return verdicts


def _verdict(
    lab: Lab,
    world: FineTunings,
    kind: str,
    name: str,
    ours: list[float],
    baselines: dict[str, list[float]],
    table: Mapping[str, Any] | None = None,
    judged: tuple[str, ...] = (),
    metric: str = "accuracy",
    notes: list[str] | None = None,
) -> Verdict:
    ablations = {
        f"{target}, {k} shots": {arm: [row[arm] for row in rows] for arm in rows[0]}
        for target, by_shots in (table or {}).items()
        for k, rows in by_shots.items()
    }
    return lab.verdict(
        world=f"{world.name}: {kind}",
        name=name,
        metric=metric,
        method=ours,
        baselines=baselines,
        rule=RULES[kind],
        holds=all(lab.paired(ours, baselines[arm]).above_zero for arm in judged or baselines),
        ablations=ablations,
        notes=notes or [],
    )


def _world(lab: Lab) -> FineTunings:
    if lab.scale != "smoke":
        try:
            return picture_tasks(lab)
        except Absent as reason:
            lab.log(f"digits instead of pictures: {reason}")
    return digit_domains(lab)


def _targets(lab: Lab, world: FineTunings) -> tuple[str, ...]:
    """The tasks that their own fine-tuning improves most on validation data."""
    if lab.scale == "smoke":
        return world.tasks[:1]

    def gain(task: str) -> float:
        return world.judge(task, world.tuned(task))["valid"] - world.judge(task, world.base)["valid"]

    return tuple(sorted(world.tasks, key=gain, reverse=True)[:2])


def _middling(lab: Lab, world: FineTunings) -> list[str]:
    """At most three tasks whose zero-shot validation accuracy lies between .5 and .9; the nearest where none does."""
    if lab.scale == "smoke":
        return list(world.tasks[:1])
    start = {task: world.judge(task, world.base)["valid"] for task in world.tasks}
    found = [task for task, value in start.items() if 0.5 <= value <= 0.9]
    return found[:3] or [min(start, key=lambda task: abs(start[task] - 0.7))]


def _library(lab: Lab, world: FineTunings, without: str | None = None) -> list[State]:
    tasks = world.tasks[:3] if lab.scale == "smoke" else world.tasks
    return [world.tuned(task) for task in tasks if task != without]


def _shuffled(world: FineTunings, models: list[State]) -> list[State]:
    """The base plus each vector with its entries permuted within every tensor."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for model in models:
        state = {}
        for name, base in world.base.items():
            delta = (model[name] - base).flatten()
            state[name] = base + delta[torch.randperm(len(delta), generator=generator)].view_as(base)
        found.append(state)
    return found


def _task(lab: Lab, world: FineTunings, name: str, seed: int, shots: int | None = None) -> Task:
    task = world.task(name, seed, shots)
    if lab.scale != "smoke":
        return task
    valid, test = ({n: x[:40] for n, x in part.items()} for part in (task.valid, task.test))
    return Task(task.train, valid, test, task.num_labels)


def _output(world: FineTunings, task: str) -> Callable[[Any], Tensor]:
    head = world.heads[task]
    return lambda out: head(out.last_hidden_state[:, 0])


def _batches(data: Batch, size: int = 128) -> list[Batch]:
    n = len(data["labels"])
    return [{name: column[at : at + size] for name, column in data.items()} for at in range(0, n, size)]


# -- few labels --------------------------------------------------------------------------------------------------------


def _few_shot(lab: Lab, world: FineTunings, target: str, shots: int, seed: int) -> dict[str, float]:
    def compute() -> dict[str, float]:
        task = _task(lab, world, target, seed, shots)
        library = _library(lab, world, without=target)
        noise = _shuffled(world, library)
        steps = lab.pick(smoke=2, desk=STEPS)
        found: dict[str, float] = {"zero-shot": classification(world.model(target), task)["test"]}
        composed: dict[str, State] = {}
        for name, models, options in (
            ("aTLAS", library, {}),
            ("isotropic", library, {"per": "model"}),
            ("shuffled", noise, {}),
            ("aTLAS x 80", library, {"partitions": 80}),
            ("shuffled x 80", noise, {"partitions": 80}),
        ):

            def one(lr: float, models: list[State] = models, options: dict[str, Any] = options) -> State:
                model = atlas.TaskVectorModel(
                    world.encoder(), models, output=_output(world, target), **options
                )
                batches = _batches(task.train)
                epochs = max(1, steps // max(10, len(batches)))
                atlas.learn_few_shot(model, batches, lr=lr, epochs=epochs, min_batches=min(10, steps))
                return model.merged_state()

            found[name], composed[name] = _best(lab, world, target, task, one, RATES)
        found["LoRA r=4"], _ = _best(
            lab, world, target, task, lambda lr: _lora(world, target, task, lr, steps, seed), (3e-3, 1e-2)
        )
        found["full fine-tuning"], _ = _best(
            lab, world, target, task, lambda lr: _full(world, target, task, lr, steps, seed), (3e-4, 1e-3)
        )
        for where, state in (("base", world.base), ("aTLAS", composed["aTLAS"])):
            found |= _on_features(lab, world, target, task, state, "" if where == "base" else " on aTLAS")
        return found

    params = {"world": world.fingerprint, "target": target, "shots": shots, "seed": seed, "scale": lab.scale}
    return lab.cached("atlas-few-shot", params, compute, uses=[atlas.learn_few_shot, atlas.TaskVectorModel])


def _best(
    lab: Lab,
    world: FineTunings,
    target: str,
    task: Task,
    train: Callable[[float], State | Encoder],
    rates: tuple[float, ...],
) -> tuple[float, State]:
    """Test accuracy and weights at the rate that validation prefers, the lower loss among equals."""
    best: tuple[tuple[float, float], float, State] | None = None
    for lr in rates[:1] if lab.scale == "smoke" else rates:
        result = train(lr)
        model = result if isinstance(result, nn.Module) else world.model(target, result)
        score = classification(model, task)
        key = (score["valid"], -score["valid_loss"])
        if best is None or key > best[0]:
            best = (key, score["test"], {} if isinstance(result, nn.Module) else result)
    assert best is not None
    return best[1], best[2]


def _full(world: FineTunings, target: str, task: Task, lr: float, steps: int, seed: int) -> Encoder:
    model = world.model(target)
    tune(model, task, lr=lr, steps=steps, seed=seed)
    return model


def _lora(world: FineTunings, target: str, task: Task, lr: float, steps: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "query", "value"])
    model: Any = get_peft_model(world.model(target), config)  # type: ignore[arg-type]
    tune(model, task, lr=lr, steps=steps, seed=seed)
    return model


def _on_features(
    lab: Lab, world: FineTunings, target: str, task: Task, state: State, suffix: str
) -> dict[str, float]:
    """Linear probe, Tip-Adapter and LP++ on an encoder that stays as it is; the head's rows are the text features."""
    from sklearn.linear_model import LogisticRegression

    encoder = world.model(target, state)
    with torch.inference_mode():
        x = {
            part: encoder.features(getattr(task, part)["pixel_values"]) for part in ("train", "valid", "test")
        }
    x = {part: F.normalize(value.clone(), dim=-1) for part, value in x.items()}
    y = {part: getattr(task, part)["labels"] for part in x}
    text = world.heads[target].weight.detach()

    def right(scores: Tensor, part: str) -> float:
        return float((scores.argmax(-1) == y[part]).float().mean())

    found: dict[str, float] = {}
    best = -1.0
    for c in (1.0, 100.0):
        probe = LogisticRegression(C=c, max_iter=300).fit(x["train"].numpy(), y["train"].numpy())
        valid = float(probe.score(x["valid"].numpy(), y["valid"].numpy()))
        if valid > best:
            best, found[f"linear probe{suffix}"] = (
                valid,
                float(probe.score(x["test"].numpy(), y["test"].numpy())),
            )
    tip = atlas.fit_tip(x["train"], y["train"], text, scale=10.0)
    plus = atlas.fit_lp_plus(x["train"], y["train"], text, passes=lab.pick(smoke=10, desk=300))
    found[f"Tip-Adapter{suffix}"], found[f"LP++{suffix}"] = (
        right(tip(x["test"]), "test"),
        right(plus(x["test"]), "test"),
    )
    return found


# -- several tasks, one model ------------------------------------------------------------------------------------------


def _addition(lab: Lab, world: FineTunings, seed: int) -> dict[str, float]:
    def compute() -> dict[str, float]:
        names = world.tasks[:2] if lab.scale == "smoke" else world.tasks
        every = {name: _task(lab, world, name, seed) for name in names}
        size = max(8, 128 // len(names))

        def judge(name: str, state: State) -> dict[str, float]:
            return classification(world.model(name, state), every[name])

        models = _library(lab, world)
        tuned = {name: judge(name, world.tuned(name)) for name in names}
        valid: dict[str, list[Batch]] = {}
        for name in names:
            rows = torch.randperm(
                len(every[name].valid["labels"]), generator=torch.Generator().manual_seed(seed)
            )
            valid[name] = _batches({n: column[rows] for n, column in every[name].valid.items()}, size)
        heads = {name: world.heads[name] for name in names}
        epochs = max(1, lab.pick(smoke=1, desk=60) // min(map(len, valid.values())))

        def score(state: State, part: str) -> float:
            found = [judge(name, state)[part] / max(tuned[name][part], 1e-6) for name in names]
            return float(np.mean(found))

        def learned(per: str, lr: float, objective: str) -> State:
            model = atlas.TaskVectorModel(
                world.encoder(), models, per=per, output=lambda out: out.last_hidden_state[:, 0]
            )
            if objective == "labels":
                atlas.learn_addition(model, valid, heads, epochs=epochs, lr=lr)
            else:
                nn.init.constant_(model.values, 0.3)
                _entropy(model, valid, heads, epochs, lr)
            return model.merged_state()

        def chosen(states: list[State]) -> State:
            return states[0] if len(states) == 1 else max(states, key=lambda state: score(state, "valid"))

        rates = lab.pick(smoke=(0.03,), desk=(0.01, 0.03))
        scales = lab.pick(smoke=(0.3,), desk=tuple(round(0.1 * k, 1) for k in range(1, 11)))
        arms = {
            "aTLAS": chosen([learned("tensor", lr, "labels") for lr in rates]),
            "isotropic": chosen([learned("model", lr, "labels") for lr in rates]),
            "AdaMerging": chosen([learned("tensor", lr, "entropy") for lr in rates]),
            "task arithmetic": chosen(
                [merge("task-arithmetic", world.base, models, scale=s) for s in scales]
            ),
            "TIES": chosen([merge("ties", world.base, models, scale=s) for s in scales]),
            "average": merge("linear", None, models),
            "zero-shot": world.base,
        }
        return {name: score(state, "test") for name, state in arms.items()}

    params = {"world": world.fingerprint, "seed": seed, "scale": lab.scale}
    return lab.cached(
        "atlas-addition", params, compute, uses=[atlas.learn_addition, atlas.TaskVectorModel, merge]
    )


def _entropy(
    model: atlas.TaskVectorModel,
    tasks: Mapping[str, list[Batch]],
    heads: Mapping[str, nn.Module],
    epochs: int,
    lr: float,
) -> None:
    """AdaMerging: the entropy of all tasks' answers, without labels."""

    def loss(rows: tuple[Batch, ...]) -> Tensor:
        weights = model.weights()
        total = torch.zeros(())
        for name, batch in zip(tasks, rows, strict=True):
            log_p = heads[name](model.run(weights, pixel_values=batch["pixel_values"])).log_softmax(-1)
            total = total - (log_p.exp() * log_p).sum(-1).mean()
        return total

    steps = min(map(len, tasks.values()))
    learn(
        model,
        lambda: zip(*tasks.values(), strict=False),
        loss,
        epochs=epochs,
        lr=lr,
        steps=steps,
        schedule="constant",
        weight_decay=0.0,
    )


# -- no labels ---------------------------------------------------------------------------------------------------------


def _adaptation(lab: Lab, world: FineTunings, target: str, seed: int) -> dict[str, float]:
    """On 384 of the target's test pictures, judged on these."""

    def compute() -> dict[str, float]:
        test = world.task(target, seed).test
        rows = torch.randperm(len(test["labels"]), generator=torch.Generator().manual_seed(seed))
        some = {name: column[rows[: lab.pick(smoke=40, desk=384)]] for name, column in test.items()}
        library = _library(lab, world, without=target)
        found: dict[str, float] = {}
        for objective in ("zero-shot", "ufm", "entropy", "pseudo-labels"):
            model = atlas.TaskVectorModel(world.encoder(), library, output=_output(world, target))
            if objective != "zero-shot":
                atlas.learn_unlabelled(
                    model,
                    {"pixel_values": some["pixel_values"]},
                    objective=objective,
                    strong=_slightly_cropped,
                    epochs=lab.pick(smoke=1, desk=10),
                    lr=0.01,
                    seed=seed,
                )
            found[objective] = accuracy(model, _batches(some))
        return found

    params = {"world": world.fingerprint, "target": target, "seed": seed, "scale": lab.scale}
    return lab.cached(
        "atlas-adaptation", params, compute, uses=[atlas.learn_unlabelled, atlas.TaskVectorModel]
    )


def _slightly_cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    """A crop; not mirrored, since characters and spectrograms are others then."""
    n = len(images)
    size = (0.5 + 0.5 * torch.rand(n, generator=generator)).sqrt()
    x, y = ((1 - size) * (2 * torch.rand(n, generator=generator) - 1) for _ in range(2))
    zero = torch.zeros(n)
    theta = torch.stack([torch.stack([size, zero, x], 1), torch.stack([zero, size, y], 1)], 1)
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")
