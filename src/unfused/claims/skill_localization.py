"""A few entries of a tuned model carry its skill: grafted alone they give it, better calibrated, and other tasks use others.

The paper: about 0.01 % of the parameters give more than 95 % of the performance, with a calibration error 40-90 % lower, and
the regions of different tasks hardly overlap. Two worlds. (1) An MLP with LayerNorm (83,000 entries) that knows ten digits,
tuned full-batch to a question (odd or even, at least 5, has a loop) with 32 pictures a class, answered by two outputs that
pretraining never used, frozen as all of the head; out of distribution is noise of 0.35. (2) The lab's tiny BERT, prompted, its
head and embeddings frozen, tuned on invented reviews and on docstrings by their topic. Tuned by SGD; on the digits also by
AdamW and AdamW with an L1 penalty on the movement. Sizes of the region from 1e-4 to 0.2; learned graft, largest movement,
largest |d grad| and random entries at equal number, interpolation, and a temperature on the same validation data.

Three verdicts. (a) Refuted if no size reaches 95 % of the gain of tuning (means over seeds, on validation data), or if at the
smallest that does, the 95 % interval of (test accuracy of the graft - of as many random entries) reaches down to 0.10; once for
each world. (b) Refuted if the interval of (calibration error of the tuned model - of that graft), or of (of the tuned model
with a temperature - of that graft), reaches 0: then it is nothing beyond a temperature. (c) Refuted if the interval of
(accuracy of a task's own region - mean of the other tasks' regions on it) reaches 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unfused.claims.lab import Lab, Verdict, reviews
from unfused.claims.lab.vision import digit_parts
from unfused.diagnose import localize_skill, skill_map

RULES = {
    "a": "no size reaches 95 % of the gain of tuning, or at the smallest that does the 95 % interval of the paired gain in "
    "accuracy over random entries reaches down to 0.10",
    "b": "the 95 % interval of the calibration error of the tuned model minus the graft's, or of the tuned model's with a "
    "temperature minus the graft's, reaches 0",
    "c": "the 95 % interval of (a task's own region - mean of the other tasks' regions on it) reaches 0",
}
QUESTIONS = {"odd": (1, 3, 5, 7, 9), "at least 5": (5, 6, 7, 8, 9), "has a loop": (0, 6, 8, 9)}
TUNERS = {"SGD": (0.03, 0.1, 0.3), "AdamW": (3e-4, 1e-3, 3e-3), "AdamW + L1": (3e-4, 1e-3, 3e-3)}
L1 = 4e-3
ARMS = ("graft", "top movement", "top |d grad|", "random")
Batch = dict[str, Any]


def claim(lab: Lab) -> list[Verdict]:
    sizes = lab.pick(smoke=(0.05,), desk=(1e-4, 1e-3, 1e-2, 5e-2, 0.2))
    tuners = lab.pick(smoke=("SGD",), desk=tuple(TUNERS))
    found = {
        tuner: {s: [digits_unit(lab, seed, "odd", tuner, s) for seed in lab.seeds] for s in sizes}
        for tuner in tuners
    }
    tables = {f"Tuned by {tuner}": table(by_size) for tuner, by_size in found.items()}
    verdicts = localized(lab, "digits: odd or even", found["SGD"], tables)
    texts_sizes = lab.pick(smoke=(0.05,), desk=(1e-3, 1e-2, 0.1))
    seeds = lab.seeds[: lab.pick(smoke=1, desk=3)]
    tasks = lab.pick(smoke=reviews.TASKS[:1], desk=reviews.TASKS)
    texts = {s: [texts_unit(lab, seed, name, s) for name in tasks for seed in seeds] for s in texts_sizes}
    spoken = localized(
        lab, "prompted BERT: reviews and topics of docstrings", texts, {"Tuned by SGD": table(texts)}
    )
    maps = [regions_unit(lab, seed) for seed in lab.seeds]
    own = [np.mean([m["judged"][t][t] for t in QUESTIONS]) for m in maps]
    other = [np.mean([m["judged"][a][b] for a in QUESTIONS for b in QUESTIONS if a != b]) for m in maps]
    diagonal = lab.verdict(
        world="(c) digits: three questions, regions of 5 %",
        name="a task's own region",
        metric="accuracy",
        method=[float(v) for v in own],
        baselines={"the other tasks' regions": [float(v) for v in other]},
        rule=RULES["c"],
        ablations={
            "Accuracy after grafting (rows), means": means([m["judged"] for m in maps]),
            "Share of a region (rows) in another": means([m["overlaps"] for m in maps]),
        },
    )
    return [*verdicts, *spoken, diagonal]


def localized(
    lab: Lab,
    world: str,
    by_size: Mapping[float, Sequence[Mapping[str, Any]]],
    tables: Mapping[str, Mapping[str, Any]],
) -> list[Verdict]:
    """Verdicts (a) and (b) of one world."""

    def values(arm: str, what: str, units: Any) -> Any:
        by_task: dict[str, list[float]] = {}
        for found in units:
            by_task.setdefault(found["task"], []).append(found["arms"][arm][what])
        return by_task if len(by_task) > 1 else next(iter(by_task.values()))

    reached = [size for size, units in by_size.items() if recovered(units) >= 0.95]
    size = min(reached) if reached else max(by_size)
    units = by_size[size]
    gain = lab.paired(values("graft", "accuracy", units), values("random", "accuracy", units))
    note = (
        f"the smallest size that reaches 95 % of the gain on validation data is {size:g}"
        if reached
        else f"no size reaches 95 % of the gain on validation data; shown is {size:g}, which reaches {recovered(units):.0%}"
    )
    eces = {arm: values(arm, "ece", units) for arm in ("graft", "tuned", "tuned, temperature")}
    better = [lab.paired(eces[arm], eces["graft"]).above_zero for arm in ("tuned", "tuned, temperature")]
    return [
        lab.verdict(
            world=f"(a) {world}",
            name=f"graft of {size:g}",
            metric="accuracy",
            method=values("graft", "accuracy", units),
            baselines={
                arm: values(arm, "accuracy", units)
                for arm in units[0]["arms"]
                if arm not in ("graft", "tuned, temperature")
            },
            rule=RULES["a"],
            holds=bool(reached and gain.interval and gain.interval[0] > 0.10),
            ablations=tables,
            notes=[note],
        ),
        lab.verdict(
            world=f"(b) {world}",
            name=f"graft of {size:g}",
            metric="expected calibration error",
            method=eces["graft"],
            baselines={arm: values(arm, "ece", units) for arm in units[0]["arms"] if arm != "graft"},
            rule=RULES["b"],
            holds=all(better),
            higher_is_better=False,
            notes=[note],
        ),
    ]


def recovered(units: Sequence[Mapping[str, Any]]) -> float:
    """Share of the gain of tuning in mean validation accuracy that the graft gives."""
    base, tuned, graft = (
        float(np.mean([u["valid"][arm] for u in units])) for arm in ("base", "tuned", "graft")
    )
    return (graft - base) / (tuned - base) if tuned > base else 0.0


def table(by_size: Mapping[float, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means over seeds of all that was measured."""
    shown: dict[str, dict[str, Any]] = {}
    for size, units in by_size.items():
        for arm, row in units[0]["arms"].items():
            if arm in ARMS or size == min(by_size):
                name = f"{arm}, {size:g}" if arm in ARMS else arm
                shown[name] = {
                    what: round(float(np.mean([u["arms"][arm][what] for u in units])), 3)
                    for what in row
                    if what not in ("arm", "entries", "loss", "agreement")
                }
    share = np.mean([u["top_share"] for units in by_size.values() for u in units])
    shown["part of |d|^2 in the top 1 % of entries"] = {"accuracy": f"{share:.0%}"}
    return shown


def means(tables: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        row: {column: round(float(np.mean([t[row][column] for t in tables])), 3) for column in cells}
        for row, cells in tables[0].items()
    }


# -- digits ------------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Ten digits and two outputs for answers; `old=True` reads the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 256),
            nn.LayerNorm(256),
            nn.GELU(),
            nn.Linear(256, 256),
            nn.LayerNorm(256),
            nn.GELU(),
        )
        self.head = nn.Linear(256, 12)

    def forward(self, x: Tensor, labels: Tensor | None = None, old: bool = False) -> SimpleNamespace:
        out = self.head(self.layers(x.flatten(1)))
        logits = out[:, :10] if old else out[:, 10:]
        return SimpleNamespace(
            logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels)
        )


def pretrained_mlp(lab: Lab, seed: int) -> Mlp:
    def compute() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = Mlp()
        images, labels = digit_parts(lab)["pretrain"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(lab.pick(smoke=20, desk=300)):
            rows = torch.randint(len(images), (128,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows], old=True).logits, labels[rows]).backward()
            optimizer.step()
        return model.state_dict()

    model = Mlp()
    model.load_state_dict(lab.cached("skills-mlp", {"seed": seed, "scale": lab.scale}, compute))
    return model.eval()


def question(lab: Lab, name: str, seed: int) -> dict[str, list[Batch]]:
    """32 pictures a class to train, 32 to validate, the test part, the same with noise, and the old task."""
    parts = digit_parts(lab)
    images, digits = parts["pool"]
    labels = torch.isin(digits, torch.tensor(QUESTIONS[name])).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    of_class = [order[labels[order] == c] for c in (0, 1)]
    train, valid = (torch.cat([rows[cut] for rows in of_class]) for cut in (slice(0, 32), slice(32, 64)))
    test, test_digits = parts["test"]
    test_labels = torch.isin(test_digits, torch.tensor(QUESTIONS[name])).long()
    noise = 0.35 * torch.randn(test.shape, generator=torch.Generator().manual_seed(1))
    return {
        "train": [{"x": images[train], "labels": labels[train]}],
        "valid": [{"x": images[valid], "labels": labels[valid]}],
        "test": [{"x": test, "labels": test_labels}],
        "noisy": [{"x": test + noise, "labels": test_labels}],
        "old task": [{"x": test, "labels": test_digits, "old": True}],
    }


def tuned_mlp(lab: Lab, seed: int, name: str, tuner: str) -> Mlp:
    """Full-batch, head frozen; the rate by validation accuracy, ties to the lower loss."""

    def compute() -> dict[str, Any]:
        parts, tried = question(lab, name, seed), []
        for lr in TUNERS[tuner][:: lab.pick(smoke=3, desk=1)]:
            model = pretrained_mlp(lab, seed)
            model.head.requires_grad_(False)
            start = [p.detach().clone() for p in model.layers.parameters()]
            moved = list(model.layers.parameters())
            optimizer: Any = (
                torch.optim.SGD(moved, lr=lr)
                if tuner == "SGD"
                else torch.optim.AdamW(moved, lr=lr, weight_decay=0.0)
            )
            for _ in range(lab.pick(smoke=20, desk=300)):
                optimizer.zero_grad()
                loss = model(**parts["train"][0]).loss
                if tuner.endswith("L1"):
                    loss = loss + L1 * sum((p - q).abs().sum() for p, q in zip(moved, start, strict=True))
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                out, labels = model(**parts["valid"][0]), parts["valid"][0]["labels"]
            score = float((out.logits.argmax(1) == labels).float().mean()), -float(out.loss)
            tried.append((score, lr, model.state_dict()))
        return max(tried, key=lambda t: t[0])[2]

    model = Mlp()
    params = {"seed": seed, "task": name, "tuner": tuner, "scale": lab.scale}
    model.load_state_dict(lab.cached("skills-tuned-mlp", params, compute))
    return model.eval()


def unit(task: str, region: Any, valid: Mapping[str, float]) -> dict[str, Any]:
    return {
        "task": task,
        "arms": {row["arm"]: {k: v for k, v in row.items() if k != "arm"} for row in region.scores},
        "valid": dict(valid),
        "size": region.size,
        "top_share": region.top_share,
    }


def digits_unit(lab: Lab, seed: int, name: str, tuner: str, size: float) -> dict[str, Any]:
    def compute() -> dict[str, Any]:
        parts = question(lab, name, seed)
        base, tuned = pretrained_mlp(lab, seed), tuned_mlp(lab, seed, name, tuner)
        region = localize_skill(
            base, tuned, parts["train"], parts["valid"], parts["test"], {k: parts[k] for k in ("noisy", "old task")},
            size=size, steps=lab.pick(smoke=3, desk=40), seed=seed,
        )  # fmt: skip
        return unit(name, region, on_valid(base, tuned, region.graft(base), parts["valid"]))

    params = {"seed": seed, "task": name, "tuner": tuner, "size": size, "scale": lab.scale}
    return lab.cached("skills-digits", params, compute, uses=[localize_skill])


@torch.no_grad()
def on_valid(
    base: nn.Module, tuned: nn.Module, grafted: Mapping[str, Tensor], batches: Sequence[Batch]
) -> dict[str, float]:
    found = {}
    for arm, state in (("base", base.state_dict()), ("tuned", tuned.state_dict()), ("graft", grafted)):
        params = {name: state[name] for name, _ in base.named_parameters()}  # not the names of tied weights
        right = [
            torch.func.functional_call(base, params, kwargs=b).logits.argmax(1) == b["labels"]
            for b in batches
        ]
        found[arm] = float(torch.cat(right).float().mean())
    return found


def regions_unit(lab: Lab, seed: int) -> dict[str, Any]:
    """Regions of the three questions, each model tuned by SGD, and their map."""

    def compute() -> dict[str, Any]:
        base = pretrained_mlp(lab, seed)
        skills, judges = {}, {}
        for name in QUESTIONS:
            parts = question(lab, name, seed)
            skills[name] = localize_skill(
                base, tuned_mlp(lab, seed, name, "SGD"), parts["train"], parts["valid"],
                size=0.05, steps=lab.pick(smoke=2, desk=40), compare=False, seed=seed,
            )  # fmt: skip

            def judge(state: Mapping[str, Tensor], test: Batch = parts["test"][0]) -> float:
                with torch.no_grad():
                    out = torch.func.functional_call(base, dict(state), kwargs=test)
                return float((out.logits.argmax(1) == test["labels"]).float().mean())

            judges[name] = judge
        found = skill_map(base, skills, judges)
        return {"judged": found.judged, "overlaps": found.overlaps}

    return lab.cached("skills-map", {"seed": seed, "scale": lab.scale}, compute, uses=[localize_skill])


# -- texts -------------------------------------------------------------------------------------------------------------


class Prompted(nn.Module):
    """The masked language model's logits at the mask, of the words that stand for the classes."""

    def __init__(self, model: nn.Module, mask: int, answers: Sequence[int]) -> None:
        super().__init__()
        self.model, self.mask = model, mask
        self.register_buffer("answers", torch.tensor(answers), persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SimpleNamespace:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        logits = out[input_ids == self.mask][:, self.answers]  # type: ignore[index]
        return SimpleNamespace(
            logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels)
        )


def prompted(lab: Lab, draw: reviews.ClozeTask) -> Prompted:
    words = reviews.tokenizer(lab)
    answers: Any = [words.convert_tokens_to_ids(word) for word in draw.verbalizer.values()]
    model = Prompted(reviews.masked_lm(lab), words.mask_token_id, answers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name and ".cls." not in name)
    return model.eval()


def prompt_batches(
    lab: Lab, draw: reviews.ClozeTask, rows: Sequence[Mapping[str, Any]], size: int
) -> list[Batch]:
    words = reviews.tokenizer(lab)
    end = words(draw.template.format(text="", mask=words.mask_token), add_special_tokens=False)["input_ids"]
    room = reviews.LENGTH - len(end) - 2
    batches = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        texts = words([row["text"] for row in some], add_special_tokens=False)["input_ids"]
        ids = [[words.cls_token_id, *text[:room], *end, words.sep_token_id] for text in texts]
        batch = words.pad({"input_ids": ids}, return_tensors="pt")
        batches.append(
            {k: batch[k] for k in ("input_ids", "attention_mask")}
            | {"labels": torch.tensor([r["label"] for r in some])}
        )
    return batches


def texts_unit(lab: Lab, seed: int, name: str, size: float) -> dict[str, Any]:
    per_class = lab.pick(smoke=2, desk=32)

    def parts() -> tuple[reviews.ClozeTask, dict[str, list[Batch]]]:
        draw = reviews.task(lab, name, seed, 2 * per_class * (3 if name == "reviews" else 4))
        half = len(draw.labeled) // 2
        rows = {
            "train": draw.labeled[:half],
            "valid": draw.labeled[half:],
            "test": draw.test[:: lab.pick(smoke=3, desk=2)],
        }
        return draw, {
            part: prompt_batches(lab, draw, some, 16 if part == "train" else 64)
            for part, some in rows.items()
        }

    def tuned() -> dict[str, Tensor]:
        draw, batches = parts()
        tried = []
        for lr in (0.03, 0.1)[:: lab.pick(smoke=2, desk=1)]:
            model = prompted(lab, draw)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(lab.pick(smoke=2, desk=150)):
                batch = batches["train"][int(torch.randint(len(batches["train"]), (), generator=generator))]
                optimizer.zero_grad()
                model(**batch).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            with torch.no_grad():
                outs = [(model(**b), b["labels"]) for b in batches["valid"]]
            right = float(torch.cat([out.logits.argmax(1) == labels for out, labels in outs]).float().mean())
            tried.append(
                ((right, -float(np.mean([float(out.loss) for out, _ in outs]))), lr, model.state_dict())
            )
        return {key: tensor.clone() for key, tensor in max(tried, key=lambda t: t[0])[2].items()}

    def compute() -> dict[str, Any]:
        draw, batches = parts()
        base, after = prompted(lab, draw), prompted(lab, draw)
        after.load_state_dict(
            lab.cached("skills-tuned-bert", {"seed": seed, "task": name, "scale": lab.scale}, tuned)
        )
        region = localize_skill(
            base, after, batches["train"], batches["valid"], batches["test"],
            size=size, steps=lab.pick(smoke=2, desk=12), copy=("*.cls.*",), seed=seed,
        )  # fmt: skip
        return unit(name, region, on_valid(base, after, region.graft(base), batches["valid"]))

    params = {"seed": seed, "task": name, "size": size, "scale": lab.scale}
    return lab.cached("skills-texts", params, compute, uses=[localize_skill])
