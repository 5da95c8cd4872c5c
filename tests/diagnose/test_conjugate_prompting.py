"""Conjugate prompting: the exact mixture predictor, the report, the built-in prompts, the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from unfused.diagnose import (
    ConjugatePrompt,
    MixtureRegression,
    forgetting_report,
    implicit_weight,
    rank_transforms,
)
from unfused.diagnose._icl_prompts import VARIANTS, begins_with, built_in, icl_prompts, read_prompts
from unfused.diagnose.conjugate_prompting import diagnose_models


def draw(count, k, d=5, n=32, seed=0):
    rng = np.random.default_rng(seed)
    tasks, w = rng.normal(size=(n, d)), rng.normal(size=(count, d))
    X, query = rng.normal(size=(count, k, d)), rng.normal(size=(count, d))
    y = np.einsum("bkd,bd->bk", X, w) + rng.normal(size=(count, k))
    return tasks, w, X, y, query


# -- the exact predictor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma, tau, alpha", [(1.0, 1.0, 0.5), (0.5, 2.0, 0.2)])
def test_mixture_against_densities_row_by_row(sigma, tau, alpha):
    tasks, _, X, y, query = draw(4, 3)
    ref = MixtureRegression(tasks, sigma, tau, alpha)
    for i in range(4):
        likelihoods = [multivariate_normal(X[i] @ w, sigma**2 * np.eye(3)).pdf(y[i]) for w in tasks]
        fresh = multivariate_normal(np.zeros(3), sigma**2 * np.eye(3) + tau**2 * X[i] @ X[i].T).pdf(y[i])
        of_set = alpha * np.mean(likelihoods)
        g = of_set / (of_set + (1 - alpha) * fresh)
        discrete = np.average(tasks, axis=0, weights=likelihoods)
        ridge = np.linalg.inv(X[i].T @ X[i] + (sigma / tau) ** 2 * np.eye(5)) @ X[i].T @ y[i]
        assert np.isclose(ref.posterior(X, y)[i], g)
        assert np.allclose(ref.discrete(X, y)[i], discrete) and np.allclose(ref.ridge(X, y)[i], ridge)
        assert np.isclose(ref.predict(X, y, query)[i], query[i] @ (g * discrete + (1 - g) * ridge))


def test_no_exemplars_and_certain_priors():
    tasks, _, X, y, query = draw(3, 2)
    empty = MixtureRegression(tasks, alpha=0.3)
    assert np.allclose(empty.posterior(X[:, :0], y[:, :0]), 0.3)
    assert np.allclose(empty.predict(X[:, :0], y[:, :0], query), 0.3 * query @ tasks.mean(0))
    assert np.allclose(MixtureRegression(tasks, alpha=0).weights(X, y), empty.ridge(X, y))
    assert np.allclose(MixtureRegression(tasks, alpha=1).weights(X, y), empty.discrete(X, y))


def test_ridge_is_equivariant_and_the_posterior_of_the_set_falls():
    tasks, _, X, y, _ = draw(500, 10)
    ref = MixtureRegression(tasks, alpha=0.999)
    assert np.allclose(ref.ridge(X, 3 * y), 3 * ref.ridge(X, y))
    assert ref.posterior(X, 3 * y).mean() < ref.posterior(X, 2 * y).mean() < ref.posterior(X, y).mean()


def test_fine_tuning_as_a_shift_of_alpha_is_undone():
    """The card's part A: losses on fresh tasks at k = 10."""
    tasks, w, X, y, query = draw(2000, 10)
    target = np.einsum("bd,bd->b", query, w)
    f0, f1 = MixtureRegression(tasks, alpha=0.5), MixtureRegression(tasks, alpha=0.999)
    prompts = list(zip(X, y, query, target, strict=True))
    report = forgetting_report(
        lambda p: f0.predict(*p[:3]),
        lambda p: f1.predict(*p[:3]),
        prompts[:300],
        lambda p, answer: (answer - p[3]) ** 2,
        {f"scale {g}": ConjugatePrompt.scale_labels(g) for g in (2.0, 3.0)},
        higher_is_better=False,
    )
    for row in report.results:
        assert row["f1"] > 1.3 * row["f0"] and row["recovered"] > 0.7
        assert row["verdict"] == "suppressed" and row["recovered interval"][0] > 0.5
    ridge = np.mean((np.einsum("bd,bd->b", query, f0.ridge(X, y)) - target) ** 2)
    back = np.mean((f1.predict(X, 3 * y, query) / 3 - target) ** 2)
    assert abs(back / ridge - 1) < 0.1


def test_implicit_weight_reads_the_posterior():
    tasks, _, X, y, query = draw(300, 6)
    ref = MixtureRegression(tasks, alpha=0.7)
    c, d = (np.einsum("bd,bd->b", query, w) for w in (ref.ridge(X, y), ref.discrete(X, y)))
    assert np.isclose(implicit_weight(0.3 * d + 0.7 * c, c, d), 0.3)
    g = implicit_weight(ref.predict(X, y, query), c, d)
    assert abs(g - np.average(ref.posterior(X, y), weights=(d - c) ** 2)) < 1e-9
    with pytest.raises(ValueError, match="the same"):
        implicit_weight(c, c, c)


@pytest.mark.parametrize(
    "bad, match",
    [
        (dict(tasks=np.zeros(3)), "tasks has shape"),
        (dict(tasks=np.zeros((2, 3)), sigma=0), "sigma=0"),
        (dict(tasks=np.zeros((2, 3)), alpha=2), "alpha=2"),
    ],
)
def test_bad_mixtures(bad, match):
    with pytest.raises(ValueError, match=match):
        MixtureRegression(**bad)
    with pytest.raises(ValueError, match=r"give \(\.\.\., k, 3"):
        MixtureRegression(np.zeros((2, 3))).ridge(np.zeros((4, 2)), np.zeros(4))


# -- the report --------------------------------------------------------------------------------------------------------


def same(prompt, answer):
    return float(prompt == answer)


def test_fates_and_groups():
    """f1 forgot lower case; upper case brings it back except for words with z, which both ways are gone."""
    words = ["abc", "bcd", "azb", "zzz", "CDE"] * 8
    report = forgetting_report(
        lambda p: p,
        lambda p: p if p.isupper() and "Z" not in p else "?",
        words,
        same,
        {"upper": ConjugatePrompt(str.upper, str.lower), "noise": ConjugatePrompt(lambda p: "!" + p)},
        groups=["upper" if w.isupper() else "lower" for w in words],
    )
    fates = {p["prompt"]: p["fate"] for p in report.prompts}
    assert fates == {
        "abc": "suppressed",
        "bcd": "suppressed",
        "azb": "not recovered",
        "zzz": "not recovered",
        "CDE": "kept",
    }
    rows = {(r["group"], r["transform"]): r for r in report.results}
    assert rows["lower", "upper"]["recovered"] == 0.5 and rows["lower", "upper"]["verdict"] == "suppressed"
    assert not rows["lower", "noise"]["serves"] and "says nothing" in rows["lower", "noise"]["verdict"]
    assert rows["upper", "upper"]["recovered"] is None  # nothing was forgotten
    assert "16 were suppressed" in report.headline()
    assert len(report.table()) == 4 and report.table(rich=True).row_count == 4
    assert json.loads(report.to_json())["results"][0]["f0"] == 1.0
    assert report.plot().get_ylabel() == "score" and "suppressed" in report.to_html()


def test_gained_and_never_known():
    report = forgetting_report(
        lambda p: "?", lambda p: p if p == "a" else "?", ["a", "b"], same, {"x": ConjugatePrompt(str)}
    )
    assert [p["fate"] for p in report.prompts] == ["gained", "never known"]
    assert "No forgetting" in report.headline()


def test_a_transform_has_its_own_gold():
    cp = ConjugatePrompt(str.upper, score_fn=lambda prompt, answer: float(answer == prompt.upper()))
    report = forgetting_report(
        lambda b: list(b),
        lambda b: [p if p.isupper() else "" for p in b],
        ["ab"] * 9,
        same,
        {"u": cp},
        batched=True,
    )
    assert report.results[0]["recovered"] == 1.0


def test_same_seed_same_intervals():
    rng = np.random.default_rng(0)
    prompts = list(rng.normal(size=50))

    def run(seed):
        return forgetting_report(
            lambda p: p,
            lambda p: p - abs(p),
            prompts,
            lambda p, a: a,
            {"x": ConjugatePrompt(lambda p: p)},
            seed=seed,
        ).results

    assert run(0) == run(0) and run(0) != run(1)


def test_bad_reports():
    x = {"x": ConjugatePrompt(str)}
    with pytest.raises(ValueError, match="prompts is empty"):
        forgetting_report(str, str, [], same, x)
    with pytest.raises(ValueError, match="groups has 1 labels for 2"):
        forgetting_report(str, str, ["a", "b"], same, x, groups=[1])
    with pytest.raises(ValueError, match="transforms is empty"):
        forgetting_report(str, str, ["a"], same, {})
    with pytest.raises(ValueError, match="f0 gave 1 answers to 2"):
        forgetting_report(lambda b: b[:1], lambda b: b, ["a", "b"], same, x, batched=True)
    with pytest.raises(ValueError, match="score_fn gave nan"):
        forgetting_report(str, str, ["a"], lambda p, a: float("nan"), x)
    with pytest.raises(ValueError, match="one to one"):
        ConjugatePrompt.cipher({"a": "x", "b": "x"})
    with pytest.raises(ValueError, match=r"\['x'\]"):
        ConjugatePrompt.cipher({"a": "x"})
    with pytest.raises(ValueError, match="gamma=0"):
        ConjugatePrompt.scale_labels(0)


def test_rank_puts_transforms_that_break_the_pretrained_model_last():
    transforms = {"far": ConjugatePrompt(lambda p: "#"), "upper": ConjugatePrompt(str.upper, str.lower)}
    ranked = rank_transforms(
        transforms,
        ["ab", "cd"],
        lambda p: -1.0,
        lambda p: 0.0 if p.islower() else -5.0 if p.isupper() else -50.0,
        labelled=["ab", "xy"],
        pretrained=str,
        score_fn=same,
    )
    assert [r["transform"] for r in ranked] == ["upper", "far"]
    assert ranked[0] == {"transform": "upper", "drop": 5.0, "kept": 1.0, "serves": True}
    assert ranked[1]["drop"] == 50 and not ranked[1]["serves"]
    with pytest.raises(ValueError, match="labelled is given without"):
        rank_transforms(transforms, ["a"], len, len, labelled=["a"])


# -- prompts and the command -------------------------------------------------------------------------------------------


def test_prompts_have_the_same_contents_in_every_language():
    asked, labels, variants = built_in(VARIANTS, 5, seed=1)
    assert len(asked) == len(labels) == 20 and all(len(rows) == 20 for rows in variants.values())

    def digits(prompt):
        return [c for c in prompt.prompt if c.isdigit()]

    for rows in [variants[name] for name in ("fr", "es", "nl", "hu", "pig-latin")]:
        assert [digits(p) for p, kind in zip(rows, labels, strict=True) if "sum" in kind] == [
            digits(p) for p, kind in zip(asked, labels, strict=True) if "sum" in kind
        ]
    prompt = asked[0]
    given = prompt.prompt.split("Input: ")
    assert len(given) == 4 and given[-1].startswith(prompt.answer) and prompt.prompt.endswith("Output:")
    shouted = icl_prompts("en", "capitalise", "blank", 1)[0]
    assert shouted.answer.isupper() and shouted.answer not in shouted.prompt


def test_answers_may_be_cut_and_blanks_do_not_count():
    assert begins_with(" What is 4 plus 5?\n", "What is 4 plus 5?") and begins_with(
        "What is 4 p", "What is 4 plus 5?"
    )
    assert not begins_with("9", "What is 4 plus 5?") and not begins_with("", "What")


def test_a_table_of_prompts(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,answer,prompt:fr,answer:fr,group\nHello,hi,Bonjour,salut,a\n")
    asked, labels, variants = read_prompts(path)
    assert asked == [("Hello", "hi")] and variants == {"fr": [("Bonjour", "salut")]} and labels == ["a"]
    path.write_text("prompt,answer,prompt:fr\nHello,hi,Bonjour\n")
    with pytest.raises(ValueError, match="lacks the column 'answer:fr'"):
        read_prompts(path)


def test_command_on_folders(tiny_pair):
    base, tuned = tiny_pair
    report = diagnose_models(str(base), str(tuned), transforms=["fr", "leetspeak"], count=2, max_new_tokens=3)
    assert len(report.results) == 8 and len(report.prompts) == 8
    assert {r["transform"] for r in report.results} == {"fr", "leetspeak"}


def test_command_line(tiny_pair, tmp_path):
    from typer.testing import CliRunner

    from unfused.cli.main import make_app

    base, tuned = tiny_pair
    page = tmp_path / "page.html"
    asked = f"diagnose conjugate-prompting --base {base} --tuned {tuned} --transforms nl --count 1 --max-new-tokens 2"
    found = CliRunner().invoke(make_app(), [*asked.split(), "--html", str(page)])
    assert found.exit_code == 0, found.output
    assert "repeat a sum" in page.read_text()
