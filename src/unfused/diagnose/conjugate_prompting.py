"""Conjugate Prompting: tells skills that fine-tuning suppressed from skills that it erased, and gets the former back.

A model infers which task a prompt means, and answers with a mixture of skills; fine-tuning raises the posterior of its own
task. A transform s takes a prompt away from the fine-tuning data but needs the same skill, and its inverse takes the answer
back, so that the tuned model f1 is asked as `f1^s(P) = s^-1(f1(s(P)))`. With scores of the pretrained model f0,

    forgetting = f0 - f1,    recovered fraction = (f1^s - f1) / (f0 - f1),    to be read beside f0^s:

a transform that breaks f0 shows nothing. In linear regression in context, with w from N(0, tau^2 I) or from a fixed set, the
exact answer is a mixture of ridge and a softmax over the set (`MixtureRegression`), and s is `y -> gamma y`: ridge is
equivariant, while gamma w lies in no set, so that the posterior of the set falls. The paper also shows refusals, trained mainly
in English, weaken under translation: what a safety test finds in one language does not hold for others. That study is not
shipped.

Reference: Understanding Catastrophic Forgetting in Language Models via Implicit Inference, ICLR 2024, arXiv:2309.10105.
Needs: the pretrained model, prompts with answers, a transform of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unfused.diagnose._report import Report, axes

__all__ = [
    "ConjugatePrompt",
    "ForgettingReport",
    "MixtureRegression",
    "forgetting_report",
    "implicit_weight",
    "rank_transforms",
]

COMMAND = {
    "function": "diagnose_models",
    "arguments": {
        "base": {"type": "str", "help": "Pretrained causal language model: folder or hub id."},
        "tuned": {"type": "str", "help": "The fine-tuned one, or a folder with a PEFT adapter."},
        "prompts": {
            "type": "path",
            "default": None,
            "help": "CSV or JSON lines with columns prompt, answer and, per transform, prompt:NAME, answer:NAME. "
            "By default prompts that show a task by two examples and end in another task's question.",
        },
        "transforms": {
            "type": "strs",
            "default": None,
            "help": "Of the built-in prompts: fr, es, nl, hu, leetspeak, pig-latin; by default all.",
        },
        "count": {"type": "int", "default": 100, "help": "Built-in prompts per kind."},
        "max_new_tokens": {"type": "int", "default": 10, "help": "Of an answer."},
        "device": {"type": "str", "default": "cpu", "help": "cpu, cuda, ..."},
        "seed": {"type": "int", "default": 0, "help": "Of prompts and intervals."},
    },
}

RESAMPLES = 2000
KEEPS = 0.9
"""A transform serves where f0^s keeps this share of f0's score."""


@dataclass(frozen=True)
class ConjugatePrompt:
    """A transform of prompts with the inverse for answers; called with a model, it gives the model asked that way.

    Parameters
    ----------
    transform : callable (prompt) -> prompt
        Away from the fine-tuning data, to where the same skill is needed.
    inverse : callable (answer) -> answer, optional
        By default the answer is left as it is: where the gold answer is known in the target language, say.
    score_fn : callable (prompt, answer) -> float, optional
        In place of the report's for this transform: compares with the gold answer of the target language.

    Examples
    --------
    >>> loud = ConjugatePrompt(str.upper, str.lower)
    >>> loud(lambda prompt: prompt[::-1])("abc")
    'cba'
    >>> cipher = ConjugatePrompt.cipher({"a": "x", "x": "a"})
    >>> cipher.transform("a fax"), cipher.inverse(cipher.transform("a fax"))
    ('x fxa', 'a fax')
    """

    transform: Callable[[Any], Any]
    inverse: Callable[[Any], Any] = lambda answer: answer
    score_fn: Callable[[Any, Any], float] | None = None

    def __call__(self, model: Callable[[Any], Any], batched: bool = False) -> Callable[[Any], Any]:
        """`model` behind the transform; with `batched`, one of lists of prompts."""
        if batched:
            return lambda prompts: [self.inverse(a) for a in model([self.transform(p) for p in prompts])]
        return lambda prompt: self.inverse(model(self.transform(prompt)))

    @classmethod
    def cipher(cls, letters: Mapping[str, str]) -> ConjugatePrompt:
        """Exchange single letters; those that are not named stay.

        Raises
        ------
        ValueError
            If two letters would become one, so that no inverse exists.
        """
        kept = set(letters.values()) - set(letters)
        if len(set(letters.values())) < len(letters) or kept:
            raise ValueError(
                f"letters is not one to one: {sorted(kept) or 'a value occurs twice'}; give a permutation"
            )
        forth = str.maketrans(dict(letters))
        back = str.maketrans({v: k for k, v in letters.items()})
        return cls(lambda text: text.translate(forth), lambda text: text.translate(back))

    @classmethod
    def scale_labels(cls, gamma: float) -> ConjugatePrompt:
        """Of regression prompts (X, y, x_query): y times gamma, the answer divided by it."""
        if not np.isfinite(gamma) or gamma == 0:
            raise ValueError(f"gamma={gamma}: a finite number other than 0")
        return cls(lambda p: (p[0], gamma * p[1], *p[2:]), lambda answer: answer / gamma)


# -- the report --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ForgettingReport(Report):
    """What fine-tuning took, and what transforms bring back.

    Attributes
    ----------
    results : tuple of dict
        One per group of prompts and transform: `f0`, `f1`, `f0^s`, `f1^s`, `forgetting`, `recovered` (None unless the interval
        of the forgetting lies above 0), its interval, and `verdict`.
    prompts : tuple of dict
        With 0/1 scores or a `threshold`, per prompt what became of it: "kept", "suppressed" (some transform that serves
        brings the answer back), "not recovered", "gained", "never known".
    level : float
        Of the bootstrap intervals over prompts.
    """

    results: tuple[dict[str, Any], ...]
    prompts: tuple[dict[str, Any], ...] = ()
    higher_is_better: bool = True
    level: float = 0.95
    scores: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def rows(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.results]

    def headline(self) -> str:
        lost = sum(p["fate"] in ("suppressed", "not recovered") for p in self.prompts)
        if lost:
            back = sum(p["fate"] == "suppressed" for p in self.prompts)
            return f"Of {lost} answers that fine-tuning lost, {back} were suppressed: a transformed prompt brings them back."
        found = [r for r in self.results if r["recovered"] is not None and r["serves"]]
        if not found:
            return "No forgetting above noise that a transform which serves the pretrained model could show."
        best = max(found, key=lambda r: r["recovered"])
        return f"{best['transform']} recovers {best['recovered']:.0%} of what fine-tuning took ({best['group']})."

    def notes(self) -> list[str]:
        return [
            "f0 and f1: pretrained and fine-tuned model; ^s: asked by a transformed prompt, the answer mapped back. "
            f"Intervals: {self.level:.0%} bootstrap over prompts. A transform serves where f0^s keeps {KEEPS:.0%} of f0.",
            "What no transform recovers is not proven erased: another transform might.",
        ]

    def plot(self, ax: Any = None) -> Any:
        """Scores of both models, with and without each transform."""
        ax = axes(ax)
        names = [f"{r['group']}\n{r['transform']}" for r in self.results]
        for shift, column in zip((-0.3, -0.1, 0.1, 0.3), ("f0", "f1", "f0^s", "f1^s"), strict=True):
            ax.bar(np.arange(len(names)) + shift, [r[column] for r in self.results], 0.2, label=column)
        ax.set_xticks(range(len(names)), names, fontsize="small")
        ax.set(ylabel="score" if self.higher_is_better else "loss")
        ax.legend(ncols=4, fontsize="small")
        return ax


def forgetting_report(
    pretrained: Callable[[Any], Any],
    finetuned: Callable[[Any], Any],
    prompts: Sequence[Any],
    score_fn: Callable[[Any, Any], float],
    transforms: Mapping[str, ConjugatePrompt],
    *,
    groups: Sequence[Any] | None = None,
    batched: bool = False,
    higher_is_better: bool = True,
    threshold: float | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> ForgettingReport:
    """Score both models on a task's prompts, plain and transformed.

    Parameters
    ----------
    pretrained, finetuned : callable (prompt) -> answer
    prompts : sequence
        Of the task that may be forgotten.
    score_fn : callable (prompt, answer) -> float
        Sees the prompt as it was, and the answer mapped back.
    transforms : mapping of str to ConjugatePrompt
    groups : sequence, optional
        One label a prompt, the number of exemplars say: effects differ between groups, and a mean hides them.
    batched : bool, default=False
        Models take a list of prompts and give a list of answers.
    higher_is_better : bool, default=True
        False for losses.
    threshold : float, optional
        From which score on (up to which loss) a prompt counts as answered; by default 1 where all scores are 0 or 1.
    level : float, default=0.95
    seed : int, default=0
        Of the bootstrap.

    Raises
    ------
    ValueError
        For no prompts, a wrong number of groups or answers, scores that are not finite.

    Examples
    --------
    >>> f0 = lambda p: p
    >>> f1 = lambda p: p if p.isupper() else "42"
    >>> prompts = [a + b for a in "abcd" for b in "abcd"]
    >>> same = lambda prompt, answer: float(prompt == answer)
    >>> report = forgetting_report(
    ...     f0, f1, prompts, same, {"upper": ConjugatePrompt(str.upper, str.lower)}
    ... )
    >>> report.results[0]["recovered"], report.results[0]["verdict"]
    (1.0, 'suppressed')
    """
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts is empty: give prompts of the task that may be forgotten")
    labels = ["all"] * len(prompts) if groups is None else list(groups)
    if len(labels) != len(prompts):
        raise ValueError(f"groups has {len(labels)} labels for {len(prompts)} prompts: give one each")
    if not transforms:
        raise ValueError("transforms is empty: give at least one ConjugatePrompt by name")
    scores: dict[str, np.ndarray] = {}
    for which, model in (("f0", pretrained), ("f1", finetuned)):
        scores[which] = _score(model, prompts, score_fn, batched, which)
        for name, s in transforms.items():
            scores[f"{which}^{name}"] = _score(
                s(model, batched), prompts, s.score_fn or score_fn, batched, f"{which}^{name}"
            )
    rng, sign = np.random.default_rng(seed), 1.0 if higher_is_better else -1.0
    results = []
    for group in dict.fromkeys(labels):
        rows = np.array([label == group for label in labels])
        draws = rng.integers(rows.sum(), size=(RESAMPLES, rows.sum()))
        for name in transforms:
            part = [scores[key][rows] for key in ("f0", "f1", f"f0^{name}", f"f1^{name}")]
            results.append({"group": str(group), "transform": name} | _compare(part, draws, sign, level))
    if threshold is None and all(np.isin(values, (0.0, 1.0)).all() for values in scores.values()):
        threshold = 1.0
    fates: tuple[dict[str, Any], ...] = ()
    if threshold is not None:
        fates = _fates(prompts, labels, scores, results, sign, threshold)
    return ForgettingReport(tuple(results), fates, higher_is_better, level, scores)


def _score(
    model: Callable[[Any], Any],
    prompts: list[Any],
    score_fn: Callable[[Any, Any], float],
    batched: bool,
    name: str,
) -> np.ndarray:
    answers = list(model(prompts)) if batched else [model(prompt) for prompt in prompts]
    if len(answers) != len(prompts):
        raise ValueError(
            f"{name} gave {len(answers)} answers to {len(prompts)} prompts: with batched=True, one each"
        )
    values = np.array([float(score_fn(p, a)) for p, a in zip(prompts, answers, strict=True)])
    if not np.isfinite(values).all():
        raise ValueError(f"score_fn gave {values[~np.isfinite(values)][0]} for {name}: scores must be finite")
    return values


def _compare(part: list[np.ndarray], draws: np.ndarray, sign: float, level: float) -> dict[str, Any]:
    """Of one group and transform, from scores per prompt of f0, f1, f0^s, f1^s."""
    tails = ((1 - level) / 2, (1 + level) / 2)
    f0, f1, f0s, f1s = (float(values.mean()) for values in part)
    b0, b1, b1s = (values[draws].mean(1) for values in (part[0], part[1], part[3]))
    lost, gain = sign * (b0 - b1), sign * (b1s - b1)
    low, high = np.quantile(lost, tails)
    gain_low, gain_high = np.quantile(gain, tails)
    forgot = bool(low > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(lost > 0, gain / lost, np.nan)
    serves = f0s >= KEEPS * f0 if sign > 0 else KEEPS * f0s <= f0
    if not forgot:
        verdict = "nothing forgotten above noise"
    elif not serves:
        verdict = "says nothing: the transform costs the pretrained model too much"
    else:
        verdict = "suppressed" if gain_low > 0 else "not recovered"
    span = [float(q) for q in np.nanquantile(ratios, tails)] if forgot else None
    return {
        "f0": f0,
        "f1": f1,
        "f0^s": f0s,
        "f1^s": f1s,
        "forgetting": sign * (f0 - f1),
        "forgetting interval": [float(low), float(high)],
        "recovered": sign * (f1s - f1) / (sign * (f0 - f1)) if forgot else None,
        "recovered interval": span,
        "gain interval": [float(gain_low), float(gain_high)],
        "serves": bool(serves),
        "verdict": verdict,
    }


def _fates(
    prompts: list[Any],
    labels: list[Any],
    scores: Mapping[str, np.ndarray],
    results: list[dict[str, Any]],
    sign: float,
    threshold: float,
) -> tuple[dict[str, Any], ...]:
    right = {name: sign * values >= sign * threshold for name, values in scores.items()}
    serving = {(r["group"], r["transform"]) for r in results if r["serves"]}
    names = list(dict.fromkeys(r["transform"] for r in results))
    found = []
    for i, prompt in enumerate(prompts):
        back = [
            n for n in names if (str(labels[i]), n) in serving and right[f"f0^{n}"][i] and right[f"f1^{n}"][i]
        ]
        if right["f0"][i]:
            fate = "kept" if right["f1"][i] else "suppressed" if back else "not recovered"
        else:
            fate = "gained" if right["f1"][i] else "never known"
        shown = prompt if isinstance(prompt, str) else None
        found.append(
            {"number": i, "group": str(labels[i]), "prompt": shown, "fate": fate, "by": ", ".join(back)}
        )
    return tuple(found)


def rank_transforms(
    transforms: Mapping[str, ConjugatePrompt],
    prompts: Sequence[Any],
    logp_pretrained: Callable[[Any], float],
    logp_finetuned: Callable[[Any], float],
    *,
    labelled: Sequence[Any] = (),
    pretrained: Callable[[Any], Any] | None = None,
    score_fn: Callable[[Any, Any], float] | None = None,
) -> list[dict[str, Any]]:
    """Transforms by conjugacy, the drop of `log p_f1 - log p_f0` from a prompt to its transform; best first.

    Parameters
    ----------
    transforms : mapping of str to ConjugatePrompt
    prompts : sequence
        Without labels.
    logp_pretrained, logp_finetuned : callable (prompt) -> float
        Log-probability of a prompt.
    labelled, pretrained, score_fn : optional
        A few prompts, f0 and the (higher is better) score: those transforms with which f0 keeps less than 0.9 of its score
        come last, whatever their drop.

    Returns
    -------
    list of dict
        `transform`, `drop` (mean over prompts), `kept` (f0^s over f0, None without labels), `serves`.

    Examples
    --------
    >>> f1 = lambda p: 0.0 if p.islower() else -9.0
    >>> pair = {"upper": ConjugatePrompt(str.upper), "same": ConjugatePrompt(str)}
    >>> [r["transform"] for r in rank_transforms(pair, ["a", "b"], lambda p: -1.0, f1)]
    ['upper', 'same']
    """
    if not len(prompts):
        raise ValueError("prompts is empty: a drop needs prompts")
    if len(labelled) and (pretrained is None or score_fn is None):
        raise ValueError("labelled is given without pretrained and score_fn: give all three")
    plain = np.array([logp_finetuned(p) - logp_pretrained(p) for p in prompts])
    known = [float(score_fn(p, pretrained(p))) for p in labelled] if pretrained and score_fn else []
    found = []
    for name, s in transforms.items():
        moved = [s.transform(p) for p in prompts]
        drop = float(np.mean(plain - [logp_finetuned(p) - logp_pretrained(p) for p in moved]))
        kept = None
        if known and pretrained and score_fn:
            judge, asked = s.score_fn or score_fn, s(pretrained)
            score = float(np.mean([judge(p, asked(p)) for p in labelled]))
            kept = score / max(float(np.mean(known)), 1e-12)
        found.append({"transform": name, "drop": drop, "kept": kept, "serves": kept is None or kept >= KEEPS})
    return sorted(found, key=lambda r: (not r["serves"], -r["drop"]))


# -- linear regression in context --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MixtureRegression:
    """The exact predictor of linear regression in context, where w is one of some tasks, or drawn afresh.

    Parameters
    ----------
    tasks : array (n, d)
        The fixed set; the same in pretraining, fine-tuning and evaluation.
    sigma, tau : float, default=1.0
        Deviation of the noise, and of the entries of a fresh w.
    alpha : float, default=0.5
        Prior weight of the set. Fine-tuning on it looks like a larger alpha.

    Examples
    --------
    >>> tasks = np.random.default_rng(0).normal(size=(32, 5))
    >>> before, after = (MixtureRegression(tasks, alpha=a) for a in (0.5, 0.999))
    >>> X = np.random.default_rng(1).normal(size=(100, 6, 5))
    >>> y = np.einsum("bkd,bd->bk", X, np.random.default_rng(2).normal(size=(100, 5)))
    >>> bool((after.posterior(X, y) > before.posterior(X, y)).all())
    True
    """

    tasks: np.ndarray
    sigma: float = 1.0
    tau: float = 1.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if np.ndim(self.tasks) != 2 or not len(self.tasks):
            raise ValueError(f"tasks has shape {np.shape(self.tasks)}: give (n, d), n at least 1")
        for name in ("sigma", "tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a number above 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: between 0 and 1")

    def ridge(self, X: Any, y: Any) -> np.ndarray:
        """Mean of a fresh w: prompts X (..., k, d), y (..., k) -> (..., d)."""
        X, y = self._checked(X, y)
        gram = np.swapaxes(X, -1, -2) @ X + (self.sigma / self.tau) ** 2 * np.eye(X.shape[-1])
        return np.linalg.solve(gram, np.einsum("...kd,...k->...d", X, y)[..., None])[..., 0]

    def discrete(self, X: Any, y: Any) -> np.ndarray:
        """Mean of w over the set, (..., d)."""
        from scipy.special import softmax

        return softmax(self._log_likelihoods(*self._checked(X, y)), -1) @ np.asarray(self.tasks, float)

    def posterior(self, X: Any, y: Any) -> np.ndarray:
        """g, the posterior weight of the set, (...)."""
        from scipy.special import expit, logsumexp

        X, y = self._checked(X, y)
        k = X.shape[-2]
        if self.alpha in (0, 1):
            return np.full(X.shape[:-2], float(self.alpha))
        of_set = logsumexp(self._log_likelihoods(X, y), -1) - np.log(len(self.tasks))
        covariance = self.sigma**2 * np.eye(k) + self.tau**2 * X @ np.swapaxes(X, -1, -2)  # (..., k, k)
        fitted = np.linalg.solve(covariance, y[..., None])[..., 0]
        fresh = -0.5 * ((y * fitted).sum(-1) + np.linalg.slogdet(covariance)[1] + k * np.log(2 * np.pi))
        return expit(np.log(self.alpha) - np.log1p(-self.alpha) + of_set - fresh)

    def weights(self, X: Any, y: Any) -> np.ndarray:
        """Mean of w under the mixture, (..., d)."""
        g = self.posterior(X, y)[..., None]
        return g * self.discrete(X, y) + (1 - g) * self.ridge(X, y)

    def predict(self, X: Any, y: Any, x_query: Any) -> np.ndarray:
        """The answer that has the least expected squared error, (...), for queries (..., d)."""
        return np.einsum("...d,...d->...", self.weights(X, y), np.asarray(x_query, float))

    def _log_likelihoods(self, X: np.ndarray, y: np.ndarray) -> np.ndarray:
        residual = y[..., None] - X @ np.asarray(self.tasks, float).T  # (..., k, n)
        constant = X.shape[-2] * np.log(2 * np.pi * self.sigma**2)
        return -0.5 * ((residual / self.sigma) ** 2).sum(-2) - 0.5 * constant

    def _checked(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        X, y = np.asarray(X, float), np.asarray(y, float)
        if X.ndim < 2 or X.shape[-1] != np.shape(self.tasks)[1] or X.shape[:-1] != y.shape:
            raise ValueError(
                f"X has shape {X.shape} and y {y.shape}: give (..., k, {np.shape(self.tasks)[1]}) and (..., k)"
            )
        return X, y


def implicit_weight(predictions: Any, ridge: Any, discrete: Any) -> float:
    """Where a model's predictions lie between the two references: `<yhat - y_c, y_d - y_c> / |y_d - y_c|^2`, all over a batch.

    0 is ridge, 1 the set; it compares with the mean of `MixtureRegression.posterior`, weighted by how far the two differ.

    Examples
    --------
    >>> implicit_weight([1.0, 2.5], ridge=[0.0, 2.0], discrete=[4.0, 4.0])
    0.25
    """
    y, c, d = (np.asarray(values, float).ravel() for values in (predictions, ridge, discrete))
    span = float((d - c) @ (d - c))
    if span == 0:
        raise ValueError("ridge and discrete are the same: the batch does not tell them apart")
    return float((y - c) @ (d - c) / span)


# -- the command -------------------------------------------------------------------------------------------------------


def diagnose_models(
    base: str,
    tuned: str,
    prompts: Any = None,
    transforms: Sequence[str] | None = None,
    count: int = 100,
    max_new_tokens: int = 10,
    device: str = "cpu",
    seed: int = 0,
) -> ForgettingReport:
    """`unfused diagnose conjugate-prompting`: greedy answers that begin with the right one, of two language models."""
    from unfused.diagnose import _icl_prompts
    from unfused.diagnose._language_model import adapter_off, greedy_answers, load_pair

    if prompts is not None:
        if transforms:
            raise ValueError("transforms are those of the built-in prompts: the file's columns name its own")
        asked, labels, variants = _icl_prompts.read_prompts(prompts)
    else:
        asked, labels, variants = _icl_prompts.built_in(transforms or _icl_prompts.VARIANTS, count, seed)
    f0, f1, tokenizer = load_pair(base, tuned, device)
    after = greedy_answers(f1, tokenizer, max_new_tokens)
    plain = after if f0 is None else greedy_answers(f0, tokenizer, max_new_tokens)

    def before(texts: Sequence[str]) -> list[str]:
        if f0 is not None:
            return plain(texts)
        with adapter_off(f1):
            return plain(texts)

    numbers = list(range(len(asked)))

    def ask(model: Callable[[Sequence[str]], list[str]]) -> Callable[[list[Any]], list[str]]:
        return lambda items: model([item if isinstance(item, str) else asked[item].prompt for item in items])

    report = forgetting_report(
        ask(before),
        ask(after),
        numbers,
        lambda i, answer: float(_icl_prompts.begins_with(answer, asked[i].answer)),
        {
            name: ConjugatePrompt(
                lambda i, rows=rows: rows[i].prompt,  # type: ignore[misc]
                score_fn=lambda i, answer, rows=rows: float(  # type: ignore[misc]
                    _icl_prompts.begins_with(answer, rows[i].answer)
                ),
            )
            for name, rows in variants.items()
        },
        groups=labels,
        batched=True,
        seed=seed,
    )
    named = tuple({**row, "prompt": asked[row["number"]].prompt} for row in report.prompts)
    return ForgettingReport(report.results, named, report.higher_is_better, report.level, report.scores)
