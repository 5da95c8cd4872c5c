"""UnFuSeD's student, distilled from clusters of the unlabelled pool, beats fine-tuning the self-supervised encoder itself.

The paper: the student after the last stage against direct fine-tuning of the same encoder (and a linear probe on it, and
training from scratch), in the low-resource setting. Here 5 labels a class, everything else of the training groups
unlabelled, and a whole group (speaker, voice, recording fold) held out.

Two arms are judged, always side by side: the paper's (`unfused-literal`: cluster ids) and ours (`unfused-propagate`:
labels spread over the pool, averaged per cluster, as the student's targets). All networks have the same encoder,
augmentation and pooling; fine-tuning and scratch get the supervised steps of distillation and fine-tuning together.
`ceiling` is the student trained on all true labels of the pool: a bound, not a method, and not part of the rule.

Refuted if the 95 % interval of the paired gain over fine-tuning, the linear probe or scratch reaches 0. "Useful" asks for
more: above logistic regression on MFCC (`classic`), which is part of the table and of the note.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from unfused.claims.lab import Lab, Verdict
from unfused.workflow import adapt as workflow

RULE = (
    "the 95 % interval of the paired gain in accuracy over fine-tuning the same teacher, a linear probe on it, or "
    "training from scratch reaches 0"
)
JUDGED = ("fine-tune", "linear-probe", "scratch")
STEPS = {"pretrain_steps": 400, "distil_steps": 700, "fine_tune_steps": 100}
SHORT = {
    "pretrain_steps": 200,
    "distil_steps": 300,
    "fine_tune_steps": 50,
}  # five windows a clip, larger ones
INDUCTIVE = ("unfused-propagate", "unfused-literal", *JUDGED, "classic")
TRANSDUCTIVE = ("unfused-propagate", "unfused-literal", "linear-probe", "classic")


def claim(lab: Lab) -> list[Verdict]:
    verdicts = _verdicts(lab, "sample", lab.pick(smoke=["0.2"], desk=["0.2"]))
    if lab.scale != "smoke":
        if lab.has("fsdd"):
            speakers = ["jackson", "nicolas", "theo", "yweweler"]
            verdicts += _verdicts(
                lab, "fsdd", [f"speaker={name}" for name in speakers], r"_([a-z]+)_\d+\.wav$"
            )
        if lab.has("esc10"):
            verdicts += _verdicts(lab, "esc10", [f"fold={k}" for k in (1, 2, 3, 4)], r"(\d)-[^/]*\.ogg$")
    return verdicts


def _verdicts(lab: Lab, world: str, held_out: list[str], group: str | None = None) -> list[Verdict]:
    """Both arms, unseen group; and what a folder's owner has, the held-out clips unlabelled in the pool."""
    new: dict[str, dict[str, list[float]]] = {}
    known: dict[str, dict[str, list[float]]] = {}
    for test in held_out:
        for name, value in _accuracies(lab, world, test, group, INDUCTIVE, inductive=True).items():
            new.setdefault(name, {})[test] = value
        for name, value in _accuracies(
            lab, world, test, group, ("ceiling",), inductive=True, draws=1
        ).items():
            new.setdefault(name, {})[test] = value
        for name, value in _accuracies(lab, world, test, group, TRANSDUCTIVE, inductive=False).items():
            known.setdefault(name, {})[test] = value
    bound = new.pop("ceiling")
    ceiling = float(np.mean([np.mean(v) for v in bound.values()]))
    tables: dict[str, Any] = {
        "The student trained on all true labels (a bound)": {
            k: {"accuracy": round(float(np.mean(v)), 4)} for k, v in bound.items()
        },
        "Held-out clips in the pool, unlabelled (transductive)": known,
    }
    verdicts = []
    for arm in ("unfused-literal", "unfused-propagate"):
        baselines = {name: new[name] for name in new if name != arm}
        gains = {name: lab.paired(new[arm], baselines[name]) for name in baselines}
        mean = float(np.mean([np.mean(v) for v in new[arm].values()]))
        verdicts.append(
            lab.verdict(
                metric="accuracy",
                method=new[arm],
                baselines=baselines,
                rule=RULE,
                holds=all(_above_zero(gains[name]) for name in JUDGED),
                world=f"{world}, held-out group unseen, 5 labels a class",
                name=arm,
                ablations=tables if arm == "unfused-propagate" else None,
                notes=[
                    f"{mean / ceiling:.3f} of the ceiling {ceiling:.3f}",
                    f"above logistic regression on classic features by {gains['classic']}",
                    f"transductive mean {np.mean([np.mean(v) for v in known[arm].values()]):.4f}",
                    "augmentation and targets were chosen on spoken digits with these speakers in view (docs/adapt.md)",
                ],
            )
        )
    return verdicts


def _above_zero(gain: Any) -> bool:
    return gain.interval is not None and gain.interval[0] > 0


def _accuracies(
    lab: Lab,
    world: str,
    test: str,
    group: str | None,
    methods: tuple[str, ...],
    *,
    inductive: bool,
    draws: int | None = None,
) -> dict[str, list[float]]:
    """Accuracy of every draw, per method: one call of `adapt`, kept by the lab."""
    data = lab.world(world)
    options: dict[str, Any] = {
        "group": group or "group",
        "test": test,
        "labels_per_class": 5,
        "method": methods,
        "inductive": inductive,
        "seed": lab.seeds[0],
        "seeds": draws or len(lab.seeds),
        **lab.pick(
            smoke={"pretrain_steps": 4, "distil_steps": 6, "fine_tune_steps": 3, "clusters": 20, "width": 8},
            desk=STEPS if world == "fsdd" else SHORT,
        ),
    }

    def compute() -> dict[str, list[float]]:
        # one run folder for all calls on the same pool: what sees no label is computed once
        name = f"{world}-{test}-{'inductive' if inductive else 'transductive'}".replace("=", "-")
        run = workflow.adapt(
            _source(world, data),
            name=name,
            output=str(lab.cache_dir / "runs" / lab.scale),
            cache=lab.cache_dir,
            **options,
        )
        lab.log(
            f"{name}: "
            + ", ".join(f"{m} {v['accuracy']['mean']:.3f}" for m, v in run.metrics["methods"].items())
        )
        return {m: v["accuracy"]["seeds"] for m, v in run.metrics["methods"].items()}

    from unfused.workflow import arms

    return lab.cached(
        f"unfused-{world}", {"world": data.fingerprint, **options}, compute, uses=(arms.unfused_propagate,)
    )


def _source(world: str, data: Any) -> str:
    if world == "sample":
        from unfused.data.sample import sample_manifest

        return str(sample_manifest())
    return str(Path(data.manifest.root))
