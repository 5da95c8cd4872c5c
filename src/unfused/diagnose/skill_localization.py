"""Skill localization: the few entries of a tuned model that carry its new skill, found and grafted into the old one.

With `d = theta_ft - theta_pre` and `g0` the `size * n` entries of largest |d| over all tensors together, every entry gets a
score S, from U(0, 1), and a soft mask that starts at g0 and flips where S rises:

    gamma(S) = g0 + (1 - 2 g0) sigmoid(S - b),     theta = theta_pre + gamma(S) d
    S <- S - lr dLoss/dtheta d (1 - 2 g0) sigmoid'(S - b)

on the task's loss alone. After each step the rounded mask is judged; it is kept if accuracy on training and validation data
together rises. The graft is `theta_pre` with those entries of `theta_ft`, nothing retrained. The report has what the region
must be compared with at the same number of entries (largest movement, random, largest |d grad|), and interpolation
`theta_pre + a d` and a temperature, which may explain a better calibration.

How training moved the weights decides: SGD and an L1 penalty concentrate movement, plain AdamW moves all entries alike; see
`gini` and `top_share`. A head that was new in training has no pretrained value and is copied whole (`copy`).

Reference: Task-Specific Skill Localization in Fine-tuned Language Models, ICML 2023, arXiv:2302.06600.
Needs: few labels, gradients, checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unfused.diagnose import _region as regions
from unfused.diagnose._skill_files import read_models, text_batches
from unfused.diagnose._skill_report import SkillMap, SkillRegion
from unfused.diagnose._skill_task import Params, Task, again, state_of

__all__ = ["SkillMap", "SkillRegion", "compose_skills", "localize_skill", "skill_map"]

COMMAND = {
    "function": "diagnose_files",
    "arguments": {
        "base": {"type": "str", "help": "The pretrained model: folder or hub id."},
        "tuned": {"type": "str", "help": "The tuned sequence classifier: folder or hub id."},
        "data": {"type": "path", "help": "Training examples: .csv or .jsonl with a text and a label column."},
        "val": {"type": "path", "help": "Validation examples, likewise."},
        "test": {"type": "path", "default": None, "help": "What the table is measured on; by default the validation data."},
        "text": {"type": "str", "default": "text", "help": "Name of the text column."},
        "label": {"type": "str", "default": "label", "help": "Name of the label column."},
        "size": {"type": "float", "default": 1e-4, "help": "Share of the entries that the search starts from."},
        "steps": {"type": "int", "default": 100, "help": "Steps of the search."},
        "batch_size": {"type": "int", "default": 8, "help": "Of all passes."},
        "save": {"type": "path", "default": None, "help": "Keep the region there, .safetensors."},
        "seed": {"type": "int", "default": 0, "help": "Of scores and random masks."},
    },
}  # fmt: skip
EMBEDDINGS = ("*embed*", "*wte*", "*wpe*", "shared.*", "*.shared.*")
HEADS = ("classifier.*", "score.*", "head.*", "*lm_head*", "cls.*", "pre_classifier.*", "qa_outputs.*")


def localize_skill(
    base: Any,
    tuned: Any,
    data: Iterable[Any],
    val: Iterable[Any],
    test: Iterable[Any] | None = None,
    ood: Mapping[str, Iterable[Any]] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    outputs_fn: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None,
    size: float = 1e-4,
    steps: int = 100,
    lr: float | str = "auto",
    sigmoid_bias: float = 10.0,
    max_batches: int = 128,
    exclude: Sequence[str] = EMBEDDINGS,
    copy: Sequence[str] = HEADS,
    metric: str | Callable[[Tensor, Tensor], float] = "accuracy",
    compare: bool = True,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> SkillRegion:
    """Find the region of a tuned model that carries its skill.

    Parameters
    ----------
    base, tuned : nn.Module or state dict
        Of one architecture; one of them a module, which runs (neither is changed).
    data, val : iterable of batches
        Training and validation examples. Batches are mappings for `model(**batch)`; a one-shot iterator is kept in memory.
    test : iterable of batches, optional
        For the table, not for the search; by default `val`.
    ood : mapping of str to iterable of batches, optional
        Out-of-distribution sets of the same task, for the table.
    loss_fn : callable (output, batch) -> Tensor, optional
        By default the output's `loss`.
    outputs_fn : callable (output, batch) -> (logits (n, C), labels (n,)), optional
        By default the output's `logits` and the batch's `labels`, where these are not -100 (a masked language model answers
        at the mask). A causal model needs a function that shifts.
    size : float, default=1e-4
        Share of entries in the base region g0; the paper takes 1e-5, its script 1e-7. What comes out has its own size.
    steps : int, default=100
        0: the base region alone (largest movement).
    lr : float or "auto"
        "auto": the first step moves the largest score by 1. The paper's 1e7 belongs to its b and its |d|.
    sigmoid_bias : float, default=10
    max_batches : int, default=128
        Per step.
    exclude : sequence of str
        Patterns of tensors that keep their pretrained value.
    copy : sequence of str
        Patterns of tensors that are taken whole from `tuned` where they differ.
    metric : {"accuracy", "f1"} or callable (predictions, labels) -> float
        "f1" is that of label 1.
    compare : bool, default=True
        Measure the masks of equal size, interpolation and temperature too.
    seed : int, default=0
    progress : callable (what, done, of), optional

    Raises
    ------
    ValueError
        For models that do not fit together, no movement at all, no batch, arguments out of range.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from torch import nn
    >>> class Net(nn.Linear):
    ...     def forward(self, x, labels):
    ...         logits = super().forward(x)
    ...         return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))
    >>> torch.manual_seed(0)
    <torch...>
    >>> base, x = Net(20, 2), torch.randn(64, 20)
    >>> tuned = {name: t + 1e-3 * torch.randn(t.shape) for name, t in base.state_dict().items()}
    >>> tuned["weight"][1, 3] += 9.0
    >>> data = [{"x": x, "labels": (x[:, 3] > 0).long()}]
    >>> region = localize_skill(base, tuned, data, data, size=0.02, steps=5, copy=())
    >>> region.indices["weight"].tolist(), region.entries
    ([23], 1)
    """
    if not 0 < size <= 1:
        raise ValueError(f"size={size}: give a share of the entries in (0, 1]")
    if steps < 0 or max_batches < 1:
        raise ValueError(f"steps={steps}, max_batches={max_batches}: at least 0 and 1")
    if isinstance(lr, str) and lr != "auto":
        raise ValueError(f"lr={lr!r}: give a number or 'auto'")
    task = Task(base, tuned, loss_fn, outputs_fn, metric, exclude, copy)
    data, val = (again(batches, name, max_batches) for batches, name in ((data, "data"), (val, "val")))
    test = val if test is None else again(test, "test")
    k = max(1, round(size * task.eligible))
    moved = [(name, d.abs()) for name, d in task.change.items()]
    g0 = regions.top_entries(moved, k)
    del moved
    best, history = _search(task, data, val, g0, steps, lr, sigmoid_bias, max_batches, seed, progress)

    entries = sum(len(where) for where in best.values())
    arms: dict[str, tuple[int, Params]] = {
        "base": (0, task.with_mask({})),
        "tuned": (task.eligible, task.tuned_params()),
        "graft": (entries, task.with_mask(best)),
    }
    if compare:
        sizes = {name: d.numel() for name, d in task.change.items()}
        gradient = task.gradient(task.with_mask({}), itertools.islice(data, max_batches))[1]
        pulls = [(name, (gradient[name] * d).abs()) for name, d in task.change.items()]
        others = {
            "top movement": regions.top_entries([(n, d.abs()) for n, d in task.change.items()], entries),
            "top |d grad|": regions.top_entries(pulls, entries),
            "random": regions.random_entries(sizes, entries, seed),
        }
        del gradient, pulls
        arms |= {name: (entries, task.with_mask(indices)) for name, indices in others.items()}
        arms["interpolated"] = (task.eligible, task.interpolated(val))
    scores = task.table(
        arms, val, test, {n: again(b, f"ood[{n!r}]") for n, b in (ood or {}).items()}, compare
    )
    gini, top_share = regions.concentration(task.change.items())
    tuned_state = state_of(tuned)
    return SkillRegion(
        size=entries / task.eligible,
        entries=entries,
        eligible=task.eligible,
        copied_entries=sum(t.numel() for t in task.copied.values()),
        gini=gini,
        top_share=top_share,
        metric=task.metric_name,
        scores=tuple(scores),
        history=tuple(history),
        settings={"size": size, "steps": steps, "lr": lr, "sigmoid_bias": sigmoid_bias, "seed": seed},
        shapes={name: list(d.shape) for name, d in task.change.items()},
        indices=best,
        values={
            n: tuned_state[n].flatten()[where.to(tuned_state[n].device)].cpu() for n, where in best.items()
        },
        copied={name: tensor.cpu().clone() for name, tensor in task.copied.items()},
    )


def _search(
    task: Task,
    data: Iterable[Any],
    val: Iterable[Any],
    g0: regions.Indices,
    steps: int,
    lr: float | str,
    bias: float,
    max_batches: int,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[regions.Indices, list[dict[str, Any]]]:
    """Gradient descent on the scores; gives the best rounded mask and the course of the search."""
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(d.shape, generator=generator).to(d.device) for n, d in task.change.items()}
    inside = {n: torch.zeros(d.numel(), dtype=torch.bool, device=d.device) for n, d in task.change.items()}
    for name, where in g0.items():
        inside[name][where] = True
    inside = {n: mask.view_as(scores[n]) for n, mask in inside.items()}

    def judge(indices: regions.Indices) -> tuple[float, float]:
        params = task.with_mask(indices)
        train = task.predict(params, itertools.islice(data, max_batches))
        return task.score(*train), task.score(*task.predict(params, val))

    best, flipped = g0, {n: torch.zeros_like(mask) for n, mask in inside.items()}
    now = train, valid = judge(g0)
    top = train + valid
    history: list[dict[str, Any]] = [
        {
            "step": 0,
            "loss": None,
            "entries": sum(map(len, g0.values())),
            "train": train,
            "valid": valid,
            "kept": True,
        }
    ]
    rate = lr
    indices = g0
    for step in range(1, steps + 1):
        if progress is not None:
            progress("search", step - 1, steps)
        soft = {n: torch.sigmoid(s - bias) for n, s in scores.items()}
        params = task.between({n: torch.where(inside[n], 1 - g, g) for n, g in soft.items()})
        loss, gradient = task.gradient(params, itertools.islice(data, max_batches))
        moves = {
            n: gradient[n] * d * torch.where(inside[n], -1.0, 1.0) * soft[n] * (1 - soft[n])
            for n, d in task.change.items()
        }
        if rate == "auto":
            largest = max(float(move.abs().max()) for move in moves.values())
            if not largest:
                raise ValueError(
                    "the loss has no gradient in any entry that moved: are the labels in data right?"
                )
            rate = 1.0 / largest
        for name, move in moves.items():
            scores[name] -= float(rate) * move
        crossed = {n: s > bias for n, s in scores.items()}
        kept = False
        if any(not torch.equal(crossed[n], flipped[n]) for n in crossed):  # else the mask is the last one
            flipped = crossed
            indices = {
                n: where
                for n, mask in inside.items()
                if len(where := (mask ^ crossed[n]).flatten().nonzero().flatten().cpu())
            }
            now = judge(indices)
            if kept := sum(now) > top:
                best, top = indices, sum(now)
        history.append(
            {
                "step": step,
                "loss": loss,
                "entries": sum(map(len, indices.values())),
                "train": now[0],
                "valid": now[1],
                "kept": kept,
            }
        )
    return best, history


# -- several tasks -----------------------------------------------------------------------------------------------------


def skill_map(
    base: Any, skills: Mapping[str, SkillRegion], judges: Mapping[str, Callable[[Params], float]]
) -> SkillMap:
    """Overlap of several tasks' regions, and what grafting each, each two, and all of them does on every task.

    Parameters
    ----------
    base : nn.Module or state dict
    skills : mapping of str to SkillRegion
        Of models tuned on one task each, or of one multi-task model with each task's data.
    judges : mapping of str to callable (state dict) -> float
        The metric of each task; the same names.

    Raises
    ------
    ValueError
        If the names differ.
    """
    if list(skills) != list(judges) or not skills:
        raise ValueError(
            f"skills names {list(skills)} and judges {list(judges)}: give the same tasks, in order"
        )
    tasks = tuple(skills)
    subsets: list[tuple[str, ...]] = [(), *((t,) for t in tasks)]
    if 2 < len(tasks) <= 5:
        subsets += list(itertools.combinations(tasks, 2))
    if len(tasks) > 1:
        subsets.append(tasks)
    judged = {}
    for subset in subsets:
        state = compose_skills(base, [skills[t] for t in subset])
        judged[" + ".join(subset) or "base"] = {t: float(judge(state)) for t, judge in judges.items()}
    overlaps = {a: {b: skills[a].overlap(skills[b]) for b in tasks} for a in tasks}
    return SkillMap(tasks, overlaps, judged)


def compose_skills(base: Any, skills: Sequence[SkillRegion]) -> Params:
    """State dict of the base with the union of several regions grafted; entries of several get the mean of their values."""
    return regions.compose(state_of(base), [(s.indices, s.values, s.copied) for s in skills])


def diagnose_files(
    base: str, tuned: str, data: Path, val: Path, test: Path | None, text: str, label: str, size: float, steps: int,
    batch_size: int, save: Path | None, seed: int, progress: Callable[[str, int, int], None] | None = None,
) -> SkillRegion:  # fmt: skip
    """What the command does."""
    before, model, words = read_models(base, tuned)
    batches = {
        name: text_batches(path, words, model.config, text, label, batch_size)
        for name, path in (("data", data), ("val", val), ("test", test))
        if path is not None
    }
    region = localize_skill(
        before, model, batches["data"], batches["val"], batches.get("test"), size=size, steps=steps, seed=seed,
        progress=progress,
    )  # fmt: skip
    if save is not None:
        region.save(save)
    return region
