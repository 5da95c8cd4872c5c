"""Comparing ways to tune a pretrained model: the same tasks, steps and search of the learning rate for all.

A `TuningWorld` gives fresh copies of a backbone and a task per seed. An `Arm` turns such a copy into the model that is to
be trained. `measure` trains every arm at every learning rate and seed, each unit kept by the lab; `select` takes the rate
by validation; `compare` does both and gives test accuracies. A unit's key holds the contents of backbone and task and
all that the arm's functions close over, so that the usual baselines are computed once for all claims.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from unfused.nn.norms import NORMS

if TYPE_CHECKING:
    from unfused.claims.lab import Lab

__all__ = [
    "LRS",
    "Arm",
    "Task",
    "TuningWorld",
    "adapter",
    "bias_only",
    "classification",
    "compare",
    "count_trainable",
    "fresh_head",
    "full",
    "head_names",
    "layernorm_only",
    "linear_probe",
    "lora",
    "measure",
    "select",
    "tune",
]

LRS = (1e-3, 3e-3, 1e-2, 3e-2)
HEADS = ("classifier", "score")

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Task:
    """What a model is tuned to. Each part is what the model's forward takes, rows first, `labels` among it.

    Attributes
    ----------
    train, valid, test : dict of str to Tensor
    num_labels : int
        0 for a language model.
    """

    train: Batch
    valid: Batch
    test: Batch
    num_labels: int = 0


@dataclass(frozen=True, eq=False)
class TuningWorld:
    """A backbone, its task, and how a tuned model is judged.

    Attributes
    ----------
    name : str
    backbone : callable (num_labels) -> nn.Module
        A fresh copy of the pretrained model with a new head, drawn from torch's global generator.
    task : callable (seed) -> Task
    evaluate : callable (model, task) -> dict of str to float
        By default `classification`.
    """

    name: str
    backbone: Callable[[int], nn.Module]
    task: Callable[[int], Task]
    evaluate: Callable[[nn.Module, Task], dict[str, float]] | None = None


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to tune.

    Attributes
    ----------
    prepare : callable (model) -> nn.Module
        Takes a fresh backbone with a new head; gives the model to train, `requires_grad` set.
    lrs : sequence of float
        The grid; the same for every arm that is compared, unless the paper's own is far from it.
    steps : int, optional
        By default those of the comparison.
    train : callable (model, task, lr=, steps=, seed=) -> nn.Module or None, optional
        Instead of `tune`: two passes, data-dependent initialisation, a Trainer. Gives the model to judge where it is
        another one.
    recipe : mapping
        More arguments for `tune` (or `train`).
    """

    prepare: Callable[[nn.Module], nn.Module]
    lrs: Sequence[float] = LRS
    steps: int | None = None
    train: Callable[..., nn.Module | None] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)


# -- backbones ---------------------------------------------------------------------------------------------------------


def fresh_head(
    make: Callable[[int], nn.Module],
    state: Mapping[str, torch.Tensor],
    num_labels: int | None,
    pretrained: int,
) -> Any:
    """A pretrained classifier, its head as it is or, for a new task, drawn anew.

    Parameters
    ----------
    make : callable (number of labels) -> nn.Module
        Draws from torch's global generator; its head is called `classifier`.
    state : mapping of str to Tensor
        The pretrained weights.
    num_labels : int, optional
        Of the new head; None keeps the old one.
    pretrained : int
        How many labels that has.
    """
    model = make(num_labels or pretrained)
    if num_labels is not None:
        state = {name: value for name, value in state.items() if not name.startswith("classifier")}
    model.load_state_dict(dict(state), strict=num_labels is None)
    return model.eval()


# -- arms --------------------------------------------------------------------------------------------------------------


def head_names(model: nn.Module) -> list[str]:
    """Names of the model's new head, for `modules_to_save`; empty for a language model."""
    return [name for name, _ in model.named_children() if name in HEADS]


def _train_only(model: nn.Module, chosen: Iterable[nn.Parameter]) -> nn.Module:
    model.requires_grad_(False)
    for head in head_names(model):
        model.get_submodule(head).requires_grad_(True)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return model


def _linear_probe(model: nn.Module) -> nn.Module:
    return _train_only(model, ())


def _bias_only(model: nn.Module) -> nn.Module:
    return _train_only(model, [p for name, p in model.named_parameters() if name.endswith("bias")])


def _layernorm_only(model: nn.Module) -> nn.Module:
    return _train_only(model, [p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()])


def _full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def _adapt(model: nn.Module, config: Any) -> nn.Module:
    from peft import get_peft_model

    config = dataclasses.replace(config)  # PEFT writes into it
    config.modules_to_save = config.modules_to_save or head_names(model) or None
    return get_peft_model(model, config)  # type: ignore[arg-type]


linear_probe = Arm(_linear_probe)
bias_only = Arm(_bias_only)
layernorm_only = Arm(_layernorm_only)
full = Arm(_full)


def adapter(config: Any, **arm: Any) -> Arm:
    """An arm that puts a PEFT config's adapter on the model and saves its head.

    Examples
    --------
    >>> from unfused.adapters import SsfConfig
    >>> adapter(SsfConfig(), lrs=(1e-2,)).lrs
    (0.01,)
    """
    return Arm(functools.partial(_adapt, config=config), **arm)


def lora(r: int, targets: Sequence[str] | str = ("q_proj", "v_proj", "query", "value"), **arm: Any) -> Arm:
    """LoRA of rank r with `alpha = 2 r`; names of modules that the model lacks do no harm."""
    from peft import LoraConfig

    modules = targets if isinstance(targets, str) else list(targets)
    return adapter(LoraConfig(r=r, lora_alpha=2 * r, target_modules=modules), **arm)


def count_trainable(model: nn.Module, head: bool = False) -> int:
    """Number of trained values, by default without the head's."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and (head or not set(name.split(".")) & set(HEADS))
    )


# -- training and judging ----------------------------------------------------------------------------------------------


def tune(
    model: nn.Module,
    data: Task | Batch,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    head_lr: float | None = None,
    warmup: float = 0.0,
) -> None:
    """Train what requires a gradient: AdamW without decay, cosine to 0, gradients clipped at norm 1.

    Schedules and regularisers of our tuners run as under `unfused.train.peft.RegularizedTrainer`.

    Parameters
    ----------
    model : nn.Module
        `model(**batch).loss`; left in eval mode.
    data : Task or dict of str to Tensor
        Of a task, its training part. Batches are consecutive pieces of one shuffle after another.
    lr : float
    steps : int
    seed : int, default=0
    batch_size : int, default=64
    head_lr : float, optional
        By default `lr`.
    warmup : float, default=0.0
        Fraction of the steps over which the rate rises from 0.
    """
    train = data.train if isinstance(data, Task) else data
    size = len(next(iter(train.values())))
    tuners: list[Any] = [m for m in model.modules() if hasattr(type(m), "begin_training")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tuner in tuners:
            tuner.begin_training(steps)
        head: list[nn.Parameter] = []
        body: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (head if set(name.split(".")) & set(HEADS) else body).append(parameter)
        groups = [{"params": body, "lr": lr}, {"params": head, "lr": lr if head_lr is None else head_lr}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps, warmup))
        model.train()
        for step, rows in zip(range(steps), _batches(size, batch_size, seed), strict=False):
            loss = model(**{name: column[rows] for name, column in train.items()}).loss
            for tuner in tuners:
                loss = loss + tuner.regularization_loss()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*body, *head], 1.0)
            optimizer.step()
            schedule.step()
            for tuner in tuners:
                for parameter in tuner.update_and_allocate(step + 1):
                    optimizer.state.pop(parameter, None)
    model.eval()


def _cosine(steps: int, warmup: float) -> Callable[[int], float]:
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise and warmup:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * step / steps))

    return factor


def _batches(size: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(0, dtype=torch.long)
    while True:
        while len(rows) < batch_size:
            rows = torch.cat([rows, torch.randperm(size, generator=generator)])
        yield rows[:batch_size]
        rows = rows[batch_size:]


@torch.inference_mode()
def classification(model: nn.Module, task: Task) -> dict[str, float]:
    """Accuracy and cross-entropy on both parts: `valid`, `valid_loss`, `test`, `test_loss`."""
    found: dict[str, float] = {}
    for part in ("valid", "test"):
        columns = getattr(task, part)
        inputs = {name: column for name, column in columns.items() if name != "labels"}
        logits = torch.cat(
            [
                model(**{name: column[start : start + 512] for name, column in inputs.items()}).logits
                for start in range(0, len(columns["labels"]), 512)
            ]
        )
        found[part] = float((logits.argmax(-1) == columns["labels"]).float().mean())
        found[f"{part}_loss"] = float(nn.functional.cross_entropy(logits.float(), columns["labels"]))
    return found


def measure(
    lab: Lab,
    world: TuningWorld,
    arms: Mapping[str, Arm],
    seeds: Iterable[int] | None = None,
    steps: int = 150,
) -> dict[str, dict[float, list[dict[str, float]]]]:
    """What `world.evaluate` finds for every arm, learning rate and seed: `{arm: {lr: [metrics per seed]}}`.

    The number of trained values (without the head) is added as `parameters`. At smoke scale each grid has one rate.
    """
    seeds = list(lab.seeds if seeds is None else seeds)
    evaluate = world.evaluate or classification
    found: dict[str, dict[float, list[dict[str, float]]]] = {}
    backbones: dict[int, str] = {}
    for seed in seeds:
        task = world.task(seed)
        if task.num_labels not in backbones:
            backbones[task.num_labels] = _backbone_contents(world, task.num_labels)
        contents = {"backbone": backbones[task.num_labels], "task": _describe(task)}
        for name, arm in arms.items():
            uses: list[Any] = []
            what = _describe([arm.prepare, arm.train, evaluate, arm.recipe], uses)
            for lr in arm.lrs[len(arm.lrs) // 2 :][:1] if lab.scale == "smoke" else arm.lrs:
                params = {"lr": lr, "seed": seed, "steps": arm.steps or steps, "arm": what} | contents

                def unit(arm: Arm = arm, lr: float = lr, seed: int = seed, task: Task = task) -> Any:
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(seed)
                        model = arm.prepare(world.backbone(task.num_labels))
                        train = arm.train or tune
                        model = (
                            train(model, task, lr=lr, steps=arm.steps or steps, seed=seed, **arm.recipe)
                            or model
                        )
                        parameters = count_trainable(model)
                        return {**evaluate(model.eval(), task), "parameters": parameters}

                readable = re.sub(r"[^a-z0-9]+", "-", f"{world.name} {name}".lower()).strip("-")
                metrics = lab.cached(f"tune-{readable}", params, unit, uses=uses)
                found.setdefault(name, {}).setdefault(lr, []).append(metrics)
            lab.log(
                f"{world.name}, seed {seed}, {name}: "
                + "; ".join(f"{lr:g} {_brief(rows[-1])}" for lr, rows in found[name].items())
            )
    return found


def select(
    grid: Mapping[str, Mapping[float, Sequence[Mapping[str, float]]]],
    by: str = "valid",
    higher_is_better: bool = True,
) -> dict[str, list[dict[str, float]]]:
    """Metrics at the learning rate that is best by one of them, per arm and seed; `lr` is added.

    Ties go to the lower `<by>_loss` where there is one. By a number from the test set it would be no fair comparison.

    Examples
    --------
    >>> grid = {"full": {1e-3: [{"valid": 0.5, "test": 0.4}], 1e-2: [{"valid": 0.6, "test": 0.3}]}}
    >>> select(grid)
    {'full': [{'valid': 0.6, 'test': 0.3, 'lr': 0.01}]}
    """
    sign = 1 if higher_is_better else -1
    chosen = {}
    for name, by_lr in grid.items():
        per_seed = zip(*([{**row, "lr": lr} for row in rows] for lr, rows in by_lr.items()), strict=True)
        chosen[name] = [
            max(rows, key=lambda row: (sign * row[by], -row.get(f"{by}_loss", 0.0))) for rows in per_seed
        ]
    return chosen


def compare(
    lab: Lab,
    world: TuningWorld,
    arms: Mapping[str, Arm],
    seeds: Iterable[int] | None = None,
    steps: int = 150,
    by: str = "valid",
    report: str = "test",
) -> dict[str, list[float]]:
    """Test accuracy of each arm, one per seed, at the rate that validation chooses."""
    chosen = select(measure(lab, world, arms, seeds, steps), by)
    return {name: [row[report] for row in rows] for name, rows in chosen.items()}


def _brief(metrics: Mapping[str, float]) -> str:
    shown = [name for name in metrics if not name.endswith("_loss") and name != "parameters"][:3]
    return " ".join(f"{metrics[name]:.3f}" for name in shown)


# -- keys --------------------------------------------------------------------------------------------------------------


def _backbone_contents(world: TuningWorld, num_labels: int) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _describe(world.backbone(num_labels))


def _describe(value: Any, uses: list[Any] | None = None) -> str:
    """Text that is the same for the same settings in every process: what functions close over, contents of tensors.

    Functions and classes are appended to `uses`; their code is not part of the text.
    """
    return json.dumps(_plain(value, [] if uses is None else uses), sort_keys=True)


def _plain(value: Any, uses: list[Any]) -> Any:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, torch.Tensor | np.ndarray):
        array = (
            value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else torch.from_numpy(value)
        )
        raw = array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""
        return [list(array.shape), str(array.dtype), hashlib.blake2b(raw, digest_size=8).hexdigest()]
    if isinstance(value, nn.Module):
        config: Any = getattr(value, "config", None)
        settings = config.to_json_string() if hasattr(config, "to_json_string") else ""
        uses.append(type(value))
        return [type(value).__qualname__, settings, _plain(value.state_dict(), uses)]
    if isinstance(value, functools.partial):
        return [_plain(part, uses) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, Mapping):
        return {str(k): _plain(v, uses) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(v, uses)) for v in value)
    if isinstance(value, list | tuple | range):
        return [_plain(v, uses) for v in value]
    if inspect.ismethod(value):
        return [value.__func__.__qualname__, _plain(value.__self__, uses)]
    if inspect.isfunction(value):
        uses.append(value)
        inner = inspect.getclosurevars(value).nonlocals
        return [value.__qualname__, _plain(value.__defaults__, uses), _plain(inner, uses)]
    if isinstance(value, type):
        uses.append(value)
        return value.__qualname__
    uses.append(type(value))
    if dataclasses.is_dataclass(value):
        inner = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return [type(value).__qualname__, _plain(inner, uses)]
    return [
        type(value).__qualname__,
        _plain(vars(value), uses) if hasattr(value, "__dict__") else repr(value),
    ]
