"""Breadcrumbs with settings found on two or three tasks merges all tasks better than task arithmetic so tuned.

The paper: eight tasks of CLIP, the gain over task arithmetic grows with their number while the settings stay. Here:
fine-tunings of one small encoder under frozen heads (`unfused.claims.lab.fine_tunings`), on eight domains of digits, which
overwrite each other, and on nine tasks of real pictures, which do so less. Every arm chooses among twelve settings (the average
has none) by mean normalised accuracy on the validation parts of the same random pairs and triples of tasks; the setting is then
fixed for more tasks. Normalised: accuracy of the merged model by that of the task's own fine-tuning, mean over tasks, on test
data.

Refuted, for each world, if at all tasks the 95 % interval over seeds of the paired gain of row-wise Breadcrumbs over task
arithmetic, over a random mask of the same densities or over the largest entries alone (no outliers removed) reaches 0. The last
would mean that removing outliers is idle. Reported: masks of whole tensors, outliers removed alone, TIES, the average, fewer
tasks, and settings chosen on all tasks.

A cautious look before had task arithmetic level with Breadcrumbs on digits, and TIES, which averages, ahead of both.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unfused.claims.lab import Absent, Lab, Verdict
from unfused.claims.lab.fine_tunings import FineTunings, State, digit_domains, picture_tasks
from unfused.merge import breadcrumbs, dare, merge, task_arithmetic, ties

RULE = "at all tasks the 95 % interval of the paired gain over task arithmetic, a random mask or the largest entries reaches 0"
OURS, JUDGED = "Breadcrumbs", ("task arithmetic", "random mask", "largest entries alone")
SCALES = (0.3, 0.6, 1.0, 1.5)
KEPT = (0.1, 0.2, 0.4)
RETUNED = (OURS, "task arithmetic", "TIES")  # whose setting is also chosen on all tasks
VALID = 100  # pictures a task that settings are chosen on

Setting = dict[str, Any]


def _grid(**fixed: Any) -> list[Setting]:
    return [{"scale": s, "keep": k, **fixed} for k, s in itertools.product(KEPT, SCALES)]


ARMS: dict[str, tuple[Any, list[Setting]]] = {
    OURS: (breadcrumbs, _grid(drop_top=0.01, granularity="row")),
    "Breadcrumbs, whole tensors": (breadcrumbs, _grid(drop_top=0.01, granularity="tensor")),
    "largest entries alone": (breadcrumbs, _grid(drop_top=0.0, granularity="row")),
    "outliers removed alone": (
        breadcrumbs,
        [
            {"scale": s, "keep": 1.0, "drop_top": d, "granularity": "row"}
            for d, s in itertools.product((0.001, 0.01, 0.05), SCALES)
        ],
    ),
    "random mask": (dare, _grid(rescale=False)),
    "TIES": (ties, _grid()),
    "task arithmetic": (
        task_arithmetic,
        [{"scale": s} for s in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)],
    ),
    "average": (task_arithmetic, [{"scale": None}]),  # one by the number of tasks
}


def claim(lab: Lab) -> list[Verdict]:
    verdicts = [_verdict(lab, digit_domains(lab))]
    if lab.scale == "smoke":  # the other world is of the same form, and slow to make
        return verdicts
    try:
        verdicts.append(_verdict(lab, picture_tasks(lab)))
    except Absent as reason:
        lab.skipped["picture tasks"] = str(reason)
    return verdicts


def _verdict(lab: Lab, world: FineTunings) -> Verdict:
    short = lab.scale == "smoke"
    arms = {arm: (method, (short and grid[5:6]) or grid) for arm, (method, grid) in ARMS.items()}
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    singles = []
    for seed in lab.seeds:
        judge = _Judge(lab, world, seed)
        singles.append(judge.base())
        for arm, (method, grid) in arms.items():
            rows[arm].append(_measured(lab, judge, arm, method, grid))
        lab.log(f"{world.name}, seed {seed}")
    everything = {arm: [row["fixed"][-1] for row in found] for arm, found in rows.items()}
    ours = everything[OURS]
    gains = {arm: lab.paired(ours, everything[arm]) for arm in JUDGED}
    counts = rows[OURS][0]["counts"]
    return lab.verdict(
        world=f"{world.name}, {len(world.tasks)} tasks",
        name=OURS,
        metric="normalised accuracy at all tasks",
        method=ours,
        baselines={arm: values for arm, values in everything.items() if arm != OURS}
        | {"base model": singles},
        rule=RULE,
        holds=all(gain.above_zero for gain in gains.values()),
        ablations={
            "Setting of two and three tasks, by number of tasks": {
                arm: {f"{count}": [row["fixed"][i] for row in found] for i, count in enumerate(counts)}
                for arm, found in rows.items()
            },
            "Setting chosen on all tasks": {
                arm: [row["chosen on all"] for row in rows[arm]] for arm in RETUNED
            },
            "Settings": {
                arm: {
                    "of two and three": _listed([row["setting"] for row in found]),
                    "of all": _listed([row["setting of all"] for row in found]) if arm in RETUNED else "",
                }
                for arm, found in rows.items()
            },
        },
        notes=[
            f"over {arm}: {gain}, {'above' if gain.above_zero else 'not above'} 0"
            for arm, gain in gains.items()
        ],
    )


def _listed(settings: Sequence[Setting]) -> str:
    shown = (
        "/".join(f"{v:g}" for k, v in s.items() if k in ("keep", "drop_top", "scale") and v is not None)
        for s in settings
    )
    return ", ".join(shown)


class _Judge:
    """The fine-tunings of one seed, and how mixtures of them do."""

    def __init__(self, lab: Lab, world: FineTunings, seed: int) -> None:
        self.world, self.seed = world, seed
        self.tasks = world.tasks[: lab.pick(smoke=3, desk=None)]
        self.limits = {"valid": lab.pick(smoke=20, desk=VALID), "test": lab.pick(smoke=20, desk=None)}
        self.states = {task: world.tuned(task, seed) for task in self.tasks}
        self.parts = {task: world.task(task, seed) for task in self.tasks}
        self._encoder = world.encoder()
        self.own = {
            (task, part): self.accuracy(state, task, part)
            for task, state in self.states.items()
            for part in ("valid", "test")
        }
        draw = np.random.default_rng(seed)
        self.subsets = [
            tuple(draw.permutation(self.tasks)[:size].tolist())
            for size in lab.pick(smoke=(2,), desk=(2, 2, 2, 3, 3))
        ]
        self.order = draw.permutation(self.tasks).tolist()  # in which more tasks come

    @torch.inference_mode()
    def accuracy(self, state: Mapping[str, Tensor], task: str, part: str) -> float:
        self._encoder.load_state_dict(dict(state))
        data = getattr(self.parts[task], part)
        limit = self.limits[part]
        images, labels = data["pixel_values"][:limit], data["labels"][:limit]
        right = 0
        for x, y in zip(images.split(250), labels.split(250), strict=True):
            features = self._encoder(x).last_hidden_state[:, 0]
            right += int((self.world.heads[task](features).argmax(-1) == y).sum())
        return right / len(labels)

    def normalised(self, state: State, tasks: Sequence[str], part: str) -> float:
        ratios = [
            self.accuracy(state, task, part)
            / max(self.own[task, part], 1 / len(self.parts[task].valid["labels"]))
            for task in tasks
        ]
        return float(np.mean(ratios))

    def base(self) -> float:
        return self.normalised(self.world.base, self.tasks, "test")

    def merged(self, method: Any, setting: Setting, tasks: Sequence[str]) -> State:
        given = dict(setting)
        if given["scale"] is None:
            given["scale"] = 1 / len(tasks)
        if method is dare:
            given["seed"] = self.seed
        return merge(method, self.world.base, [self.states[task] for task in tasks], **given)


def _measured(lab: Lab, judge: _Judge, arm: str, method: Any, grid: list[Setting]) -> dict[str, Any]:
    """Test values with the setting of pairs and triples at more and more tasks, and with that of all tasks."""
    every = list(judge.tasks)
    counts = sorted({2, 4, 6, len(every)} if lab.scale != "smoke" else {len(every)})

    def best(subsets: Sequence[Sequence[str]]) -> Setting:
        if len(grid) == 1:
            return grid[0]
        values = [
            np.mean([judge.normalised(judge.merged(method, s, tasks), tasks, "valid") for tasks in subsets])
            for s in grid
        ]
        return grid[int(np.argmax(values))]

    def compute() -> dict[str, Any]:
        few = best(judge.subsets)
        all_tasks = best([every]) if arm in RETUNED else few
        fixed = []
        for count in counts:
            tasks = every if count == len(every) else judge.order[:count]
            fixed.append(judge.normalised(judge.merged(method, few, tasks), tasks, "test"))
        return {
            "counts": counts,
            "fixed": fixed,
            "chosen on all": judge.normalised(judge.merged(method, all_tasks, every), every, "test"),
            "setting": few,
            "setting of all": all_tasks,
        }

    params = {
        "arm": arm,
        "grid": grid,
        "seed": judge.seed,
        "world": judge.world.fingerprint,
        "steps": judge.world.steps,
        "subsets": judge.subsets,
        "order": judge.order,
    }
    name = f"breadcrumbs-{judge.world.name}-{arm}".replace(" ", "-").replace(",", "")
    return lab.cached(name, params, compute, uses=[method, merge])
