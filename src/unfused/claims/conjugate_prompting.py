"""More than half of what fine-tuning seems to erase comes back when prompts are moved away from its data, and answers back.

*Regression* (`unfused.claims.lab.implicit_tasks`): a GPT pretrained half on fresh w, half on 32 fixed ones, is tuned for 400
steps on the fixed ones. On prompts with fresh w, s multiplies the labels by 2. The metric is the squared error against <w,
x>, over k = 5, 10, 15 exemplars. Refuted if the 95 % interval over seeds of the gain of f1^s over f1 reaches 0, or the mean
recovered fraction is at most 0.5; if f0^s loses a tenth or more against f0, the transform shows nothing and the claim is
refuted as well. *Nearness*: refuted if the loss that tuning adds is not larger, beyond the interval, for the third of the
fresh w that lies nearest to a fixed one than for the farthest. *Alphabets*: a tiny Llama that copies or adds, by example, is
tuned for 200 steps to add in one alphabet; s enciphers the prompt. Refuted if the interval of the gain in copies reaches 0 or
the recovered fraction is at most 0.5. Baselines: the tuned model, f0, f1 at five exemplars more, weights half way between f0
and f1, and tuning that mixes in as much of the pretraining data. The five seeds are of tuning and of prompts, on one
pretrained model each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab import implicit_tasks as tasks
from unfused.claims.lab.tuning import tune
from unfused.diagnose import ConjugatePrompt, MixtureRegression, forgetting_report, implicit_weight

RULE = (
    "the 95 % interval of the paired gain of f1^s (labels times 2) over f1 in squared error on fresh w reaches 0, the mean "
    "recovered fraction is at most 0.5, or f0^s is worse than f0 by a tenth or more"
)
NEAR = "the 95 % interval of (added loss, nearest third of fresh w) - (farthest third) reaches 0"
CIPHER = (
    "the 95 % interval of the paired gain of f1^s (cipher) over f1 in copies reaches 0, or the mean recovered fraction is at "
    "most 0.5"
)
KS = (5, 10, 15)
SHOWN = (5, 10, 15, 20)
GAMMAS = (1.5, 2.0, 3.0)


def claim(lab: Lab) -> list[Verdict]:
    return [*_regression(lab), _alphabets(lab)]


# -- regression --------------------------------------------------------------------------------------------------------


def _regression(lab: Lab) -> list[Verdict]:
    units = [_regression_unit(lab, seed) for seed in lab.seeds]

    def mean(arm: str, ks: tuple[int, ...] = KS) -> list[float]:
        return [float(np.mean([unit["loss"][arm][str(k)] for k in ks])) for unit in units]

    f0, f1, f0s, f1s = (mean(arm) for arm in ("f0", "f1", "f0^s 2", "f1^s 2"))
    gain = lab.paired(f1, f1s)
    recovered = [(b - c) / (b - a) if b > a else 0.0 for a, b, c in zip(f0, f1, f1s, strict=True)]
    fine = np.mean(f0s) < 1.1 * np.mean(f0)
    by_k = {
        f"k = {k}": {
            arm: f"{np.mean([u['loss'][arm][str(k)] for u in units]):.3f}"
            for arm in ("exact", "f0", "f1", "f0^s 2", *(f"f1^s {g:g}" for g in GAMMAS))
        }
        | {
            name: f"{np.mean([u[name][str(k)] for u in units]):.2f}"
            for name in ("g exact", "g f0", "g f1", "g f1^s")
        }
        for k in SHOWN
    }
    steps = {f"{n} steps": [u["by steps"][str(n)] for u in units] for n in _steps(lab)}
    first = lab.verdict(
        world="regression in context, fresh w",
        name="f1^s, labels times 2",
        metric="squared error",
        method=f1s,
        baselines={
            "f1, tuned": f1,
            "f0, pretrained": f0,
            "f1 with five exemplars more": mean("f1", tuple(k + 5 for k in KS)),
            "weights half way": mean("half way"),
            "tuned on both mixed": mean("mixed"),
            "f0^s": f0s,
        },
        rule=RULE,
        holds=gain.above_zero and float(np.mean(recovered)) > 0.5 and bool(fine),
        higher_is_better=False,
        ablations={
            "By exemplars": by_k,
            "Recovered fraction by tuning steps": steps,
            "Squared error on the fixed w": {
                arm: [float(np.mean([u["known"][arm][str(k)] for k in KS])) for u in units]
                for arm in ("f0", "f1", "half way", "mixed")
            },
        },
        notes=[
            f"recovered fraction {lab.paired(recovered)}; f0 against the exact mixture predictor: "
            f"{np.mean(f0):.3f} and {np.mean(mean('exact')):.3f}"
        ],
    )
    near, far = ([u["bins"][i] for u in units] for i in (0, 2))
    second = lab.verdict(
        world="regression in context, nearness to the fixed w",
        name="nearest third",
        metric="added squared error",
        method=near,
        baselines={"farthest third": far, "middle third": [u["bins"][1] for u in units]},
        rule=NEAR,
        holds=lab.paired(near, far).above_zero,
    )
    return [first, second]


def _steps(lab: Lab) -> tuple[int, ...]:
    return lab.pick(smoke=(2, 3), desk=(100, 400))


def _regression_unit(lab: Lab, seed: int) -> dict[str, Any]:
    few, steps = _steps(lab)
    count = lab.pick(smoke=60, desk=2000)

    def compute() -> dict[str, Any]:
        f0 = tasks.regressor(lab)
        f1 = tasks.tuned_regressor(lab, seed, 1.0, steps)
        early = tasks.tuned_regressor(lab, seed, 1.0, few)
        arms = {
            "f0": f0,
            "f1": f1,
            "mixed": tasks.tuned_regressor(lab, seed, 0.5, steps),
            "half way": _half(f0, f1),
        }
        data = tasks.regression_data(count, 0.0, seed=1000 + seed)
        wanted = torch.einsum("bkd,bd->bk", data["X"], data["w"]).numpy()

        def errors(model: Callable[[Any], np.ndarray]) -> np.ndarray:
            return (model((data["X"], data["y"])) - wanted) ** 2  # (B, 21)

        found = {name: errors(_answers(model)) for name, model in arms.items()}
        for gamma in GAMMAS:
            s = ConjugatePrompt.scale_labels(gamma)
            found[f"f0^s {gamma:g}"], found[f"f1^s {gamma:g}"] = (
                errors(s(_answers(f0))),
                errors(s(_answers(f1))),
            )
        early_loss, early_s = (
            errors(m)[:, list(KS)].mean()
            for m in (_answers(early), ConjugatePrompt.scale_labels(2.0)(_answers(early)))
        )
        known = tasks.regression_data(count, 1.0, seed=2000 + seed)
        target = torch.einsum("bkd,bd->bk", known["X"], known["w"]).numpy()
        on_known = {n: (_answers(m)((known["X"], known["y"])) - target) ** 2 for n, m in arms.items()}
        exact = MixtureRegression(tasks.fixed_tasks(), sigma=tasks.NOISE)
        X, y = data["X"].double().numpy(), data["y"].double().numpy()
        weights: dict[str, dict[str, float]] = {name: {} for name in ("g exact", "g f0", "g f1", "g f1^s")}
        found["exact"] = np.zeros_like(found["f0"])
        said = {
            "g f0": _answers(f0),
            "g f1": _answers(f1),
            "g f1^s": ConjugatePrompt.scale_labels(2.0)(_answers(f1)),
        }
        answers = {name: model((data["X"], data["y"])) for name, model in said.items()}
        for k in SHOWN:
            query, c, d = X[:, k], exact.ridge(X[:, :k], y[:, :k]), exact.discrete(X[:, :k], y[:, :k])
            ridge, discrete = (query * c).sum(-1), (query * d).sum(-1)
            best = exact.predict(X[:, :k], y[:, :k], query)
            found["exact"][:, k] = (best - wanted[:, k]) ** 2
            weights["g exact"][str(k)] = implicit_weight(best, ridge, discrete)
            for name, values in answers.items():
                weights[name][str(k)] = implicit_weight(values[:, k], ridge, discrete)
        w = data["w"].double().numpy()
        distance = np.linalg.norm(w[:, None] - tasks.fixed_tasks(), axis=-1).min(1)
        added = (found["f1"] - found["f0"])[:, list(KS)].mean(1)
        thirds = np.array_split(np.argsort(distance), 3)
        lost = found["f1"][:, list(KS)].mean() - found["f0"][:, list(KS)].mean()
        early_lost = early_loss - found["f0"][:, list(KS)].mean()
        return {
            "loss": {name: {str(k): float(v[:, k].mean()) for k in SHOWN} for name, v in found.items()},
            "known": {name: {str(k): float(v[:, k].mean()) for k in SHOWN} for name, v in on_known.items()},
            "bins": [float(added[third].mean()) for third in thirds],
            "by steps": {
                str(few): float((early_loss - early_s) / early_lost) if early_lost > 0 else 0.0,
                str(steps): float((found["f1"] - found["f1^s 2"])[:, list(KS)].mean() / lost)
                if lost > 0
                else 0.0,
            },
            **weights,
        }

    return lab.cached("conjugate-regression", {"seed": seed, "steps": [few, steps], "count": count}, compute)


def _half(f0: nn.Module, f1: nn.Module) -> nn.Module:
    middle = copy.deepcopy(f0)
    other = f1.state_dict()
    middle.load_state_dict(
        {n: v + 0.5 * (other[n] - v) if v.is_floating_point() else v for n, v in f0.state_dict().items()}
    )
    return middle


def _answers(model: nn.Module) -> Callable[[Any], np.ndarray]:
    @torch.inference_mode()
    def answer(prompt: Any) -> np.ndarray:
        return torch.cat(
            [model(X, y).logits for X, y in zip(prompt[0].split(250), prompt[1].split(250), strict=True)]
        ).numpy()

    return answer


# -- alphabets ---------------------------------------------------------------------------------------------------------


def _alphabets(lab: Lab) -> Verdict:
    grid = lab.pick(smoke=(2, 3), desk=(50, 200, 800))
    main = grid[1]
    units = {n: [_alphabet_unit(lab, seed, n) for seed in lab.seeds] for n in grid}
    row = units[main]
    f1, f1s = [u["f1"] for u in row], [u["f1^s"] for u in row]
    recovered = [u["recovered"] for u in row]
    gain = lab.paired(f1s, f1)
    return lab.verdict(
        world="copying in two alphabets",
        name="f1^s, enciphered",
        metric="copies",
        method=f1s,
        baselines={
            "f1, tuned": f1,
            "f0, pretrained": [u["f0"] for u in row],
            "f0^s": [u["f0^s"] for u in row],
            "weights half way": [u["half way"] for u in row],
            "tuned on both mixed": [u["mixed"] for u in row],
        },
        rule=CIPHER,
        holds=gain.above_zero and float(np.mean(recovered)) > 0.5,
        ablations={
            "By tuning steps": {
                f"{n} steps": {
                    name: f"{np.mean([u[name] for u in units[n]]):.3f}"
                    for name in ("f1", "f1^s", "recovered", "suppressed")
                }
                for n in grid
            }
        },
        notes=[f"recovered fraction {lab.paired(recovered)} (0 where nothing was forgotten above noise)"],
    )


def _alphabet_unit(lab: Lab, seed: int, steps: int) -> dict[str, float]:
    count = lab.pick(smoke=20, desk=300)

    def compute() -> dict[str, float]:
        f0, f1, mixed = (tasks.alphabet_model(lab) for _ in range(3))
        tune(f1, tasks.add_or_copy(steps * 64, ("add",), 1, seed=7 + seed), lr=1e-3, steps=steps, seed=seed)
        both = tasks.add_or_copy(steps * 64, ("add", "copy"), 2, seed=7 + seed)
        tune(mixed, both, lr=1e-3, steps=steps, seed=seed)
        prompts, answers = tasks.questions(count, "copy", seed=999 + seed)
        gold = dict(zip(prompts, answers, strict=True))
        cipher = ConjugatePrompt(tasks.encipher, tasks.decipher)

        def score(prompt: str, answer: str) -> float:
            return float(answer == gold[prompt])

        report = forgetting_report(
            lambda p: tasks.replies(f0, p),
            lambda p: tasks.replies(f1, p),
            prompts,
            score,
            {"s": cipher},
            batched=True,
        )
        found, fates = report.results[0], [p["fate"] for p in report.prompts]
        lost = sum(fate in ("suppressed", "not recovered") for fate in fates)
        others = {"half way": _half(f0, f1), "mixed": mixed}
        return {
            **{name: float(found[name]) for name in ("f0", "f1", "f0^s", "f1^s")},
            "recovered": float(found["recovered"] or 0.0),
            "suppressed": fates.count("suppressed") / max(1, lost),
            **{
                name: float(
                    np.mean(
                        [score(p, a) for p, a in zip(prompts, tasks.replies(model, prompts), strict=True)]
                    )
                )
                for name, model in others.items()
            },
        }

    return lab.cached("conjugate-alphabets", {"seed": seed, "steps": steps, "count": count}, compute)
