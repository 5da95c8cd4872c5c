"""A prompt and pseudo-labels learned together beat calibrated in-context learning from confident pseudo-labels.

The paper reports gains over zero-shot, over in-context learning with pseudo-labels and over prompts learned without
demonstrations; its numbers could not be confirmed. Here two black boxes (`unfused.claims.lab.in_context`): a decoder that has
learned to learn in context, asked for a rule under a first prompt that names another rule ("wrong") or both ("mixed"); and
cosines of word vectors, which is no language model, asked for the area of docstrings. 400 unlabelled texts, 400 to test, 48
candidate words, 4 places, 4 demonstrations, 5 seeds (rule, texts, vocabulary). Every arm may send 8,000 queries; in-context
learning labels again until nothing changes, or its queries are spent.

Refuted on a box if the 95 % interval over seeds of the paired gain in test accuracy over in-context learning from confident
pseudo-labels, both calibrated by the batch, reaches 0. The key ablation, prompts trained without the demonstrations that they
are used with, the best of random prompts, BDPL's estimator, what calibration does and what 32 labels would give are reported.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.in_context import Problem, rules_problem, topics_problem
from unfused.label import BlackBoxPromptLearner

RULE = (
    "the 95 % interval over seeds of the paired gain in test accuracy over in-context learning from confident pseudo-labels, "
    "both calibrated, reaches 0"
)
FULL, ICL = "prompt and labels together", "pseudo-label in-context learning"
BATCH: dict[str, Any] = {"calibration": "batch"}
ARMS: dict[str, dict[str, Any]] = {
    FULL: BATCH,
    ICL: {"vocab": (), **BATCH},
    "zero-shot": {"vocab": (), "rounds": 0, "n_demos": 0},
    "zero-shot, calibrated": {"vocab": (), "rounds": 0, "n_demos": 0, **BATCH},
    f"{ICL}, not calibrated": {"vocab": ()},
    "prompt trained without demonstrations": {"train_with_demos": False, **BATCH},
    "best of random prompts": BATCH,
    f"{FULL}, BDPL's estimator": {"estimator": "bdpl", **BATCH},
    f"{FULL}, not calibrated": {},
    "32 labels, BDPL's estimator": {"estimator": "bdpl", **BATCH},
}
JUDGED = (
    ICL,
    "zero-shot",
    "zero-shot, calibrated",
    "prompt trained without demonstrations",
    "best of random prompts",
)


def claim(lab: Lab) -> list[Verdict]:
    boxes: dict[str, tuple[str, ...]] = lab.pick(
        smoke={"rules, a decoder": ("wrong",)},
        desk={"rules, a decoder": ("wrong", "mixed"), "topics, cosines": ("one word",)},
    )
    found = []
    for box, prompts in boxes.items():
        rows = {
            arm: {prompt: [_unit(lab, box, prompt, seed, arm) for seed in lab.seeds] for prompt in prompts}
            for arm in ARMS
        }

        def column(arm: str, name: str, rows: Any = rows) -> dict[str, list[float]]:
            return {prompt: [row[name] for row in units] for prompt, units in rows[arm].items()}

        accuracy = {arm: column(arm, "test") for arm in ARMS}
        gain = lab.paired(accuracy[FULL], accuracy[ICL], over="seeds")
        apart = lab.paired(accuracy[FULL], accuracy["prompt trained without demonstrations"], over="seeds")
        found.append(
            lab.verdict(
                world=box,
                name=FULL,
                metric="test accuracy",
                method=accuracy[FULL],
                baselines={arm: accuracy[arm] for arm in JUDGED},
                rule=RULE,
                holds=gain.above_zero,
                over="seeds",
                ablations={
                    "Other arms": {arm: accuracy[arm] for arm in ARMS if arm not in (FULL, *JUDGED)},
                    "Accuracy of the pseudo-labels": {arm: column(arm, "labels") for arm in ARMS},
                    "Queries": {
                        arm: {"mean": float(np.mean([r["calls"] for u in rows[arm].values() for r in u]))}
                        for arm in ARMS
                    },
                },
                notes=[f"gain from the demonstrations in training: {apart}"],
            )
        )
    return found


def _unit(lab: Lab, box: str, prompt: str, seed: int, arm: str) -> dict[str, float]:
    def compute() -> dict[str, float]:
        problem = topics_problem(lab, seed) if box.startswith("topics") else rules_problem(lab, seed, prompt)
        return _run(lab, problem, arm, seed)

    params = {"box": box, "prompt": prompt, "seed": seed, "arm": arm, "scale": lab.scale}
    return lab.cached("unsupervised-prompt-unit", params, compute)


def _run(lab: Lab, problem: Problem, arm: str, seed: int) -> dict[str, float]:
    budget = lab.pick(smoke=400, desk=8000)
    options = {
        "vocab": problem.vocab,
        "initial_prompt": problem.initial_prompt,
        "batch_size": lab.pick(smoke=8, desk=32),
        "steps": lab.pick(smoke=1, desk=5),
        "rounds": lab.pick(smoke=2, desk=40),
        "n_samples": lab.pick(smoke=2, desk=8),
        "budget": budget,
        "embedder": getattr(problem.box, "embed", None),
        "call_size": 256,
        "random_state": seed,
        **ARMS[arm],
    }
    calls = 0
    if arm.startswith("32 labels"):
        rows = np.random.default_rng([seed, 2]).permutation(len(problem.texts))[:32]
        learner = BlackBoxPromptLearner(problem.box, problem.classes, **options)
        names = np.array(problem.classes)[problem.labels[rows]]
        learner.fit([problem.texts[i] for i in rows], names)
        labels = learner.predict_proba(problem.texts).argmax(1)
    elif arm == "best of random prompts":
        learner, calls = _best_of_random(problem, options, budget, seed)
        labels = learner.pseudo_labels_
    else:
        learner = BlackBoxPromptLearner(problem.box, problem.classes, **options).fit(problem.texts)
        labels = learner.pseudo_labels_
    test = learner.predict_proba(problem.test).argmax(1)
    return {
        "test": float((test == problem.test_labels).mean()),
        "labels": float((labels == problem.labels).mean()),
        "calls": learner.n_calls_ + calls,
    }


def _best_of_random(
    problem: Problem, options: dict[str, Any], budget: int, seed: int
) -> tuple[BlackBoxPromptLearner, int]:
    """In-context learning under the random prompt with the least cross-entropy to its pseudo-labels."""
    rng, size = np.random.default_rng([seed, 4]), options["batch_size"]
    options = {**options, "vocab": (), "rounds": 3}
    start = BlackBoxPromptLearner(problem.box, problem.classes, **options).fit(problem.texts)
    rows = rng.permutation(len(problem.texts))[:size]
    left = budget - 2 * start.n_calls_  # it is fitted once more
    best, least, asked = problem.initial_prompt, np.inf, start.n_calls_
    for _ in range(max(0, left // size)):
        prompt = tuple(problem.vocab[j] for j in rng.integers(len(problem.vocab), size=start.prompt_length))
        proba = start.predict_proba([problem.texts[i] for i in rows], prompt=prompt)
        loss = float(-np.log(proba[np.arange(size), start.pseudo_labels_[rows]].clip(1e-6)).mean())
        asked += size
        if loss < least:
            best, least = prompt, loss
    again = {**options, "initial_prompt": best}
    return BlackBoxPromptLearner(problem.box, problem.classes, **again).fit(problem.texts), asked
