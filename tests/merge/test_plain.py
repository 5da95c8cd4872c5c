"""Linear, slerp, task arithmetic, TIES and DARE: against naive code, and what any merge must satisfy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.merge import breadcrumbs, dare, linear, merge, slerp, task_arithmetic, ties
from unfused.merge._masks import between_ranks, top
from unfused.merge._method import find, methods

seeds = st.integers(0, 10_000)


def tensors(seed, count, shape=(5, 7)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_ties_step_by_step():
    base, *models = tensors(0, 4)
    keep, weights = 0.3, [1.0, 0.5, 2.0]
    deltas = []
    for model in models:
        delta = (model - base).flatten()
        chosen = delta.abs().argsort(descending=True)[: math.floor(keep * delta.numel())]
        trimmed = torch.zeros_like(delta)
        trimmed[chosen] = delta[chosen]
        deltas.append(trimmed)
    want = torch.zeros(base.numel())
    for j in range(base.numel()):
        column = [w * float(d[j]) for w, d in zip(weights, deltas, strict=True)]
        sign = 1 if sum(column) >= 0 else -1
        agree = [(c, w) for c, w in zip(column, weights, strict=True) if c * sign > 0]
        if agree:
            want[j] = sum(c for c, _ in agree) / sum(w for _, w in agree)
    found = ties(base, [m - base for m in models], scale=0.7, keep=keep, weights=weights)
    torch.testing.assert_close(found, base + 0.7 * want.view(base.shape))


def test_slerp_turns_evenly():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for t in (0.0, 0.25, 1.0):
        want = torch.tensor([2 * math.cos(t * math.pi / 2), 2 * math.sin(t * math.pi / 2)])
        torch.testing.assert_close(slerp(None, [a.clone(), b.clone()], t=t), want)
    zero = torch.zeros(2)
    torch.testing.assert_close(slerp(None, [zero.clone(), b.clone()], t=0.5), b / 2)


def test_dare_keeps_the_expectation_and_the_seed():
    base, model = torch.zeros(20_000), torch.ones(20_000)
    out = dare(base, [model.clone()], scale=1.0, keep=0.2)
    assert set(out.tolist()) == {0.0, 5.0} and abs(float(out.mean()) - 1) < 0.05
    runs = [merge("dare", {"w": base}, [{"w": model}], seed=seed)["w"] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    names = merge("dare", {"v": base, "w": base}, [{"v": model, "w": model}])
    assert not torch.equal(names["v"], names["w"])
    agreeing = dare(base, [model.clone(), -0.5 * model], scale=1.0, keep=1.0, elect_sign=True)
    assert torch.equal(agreeing, model)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(0, 12))
def test_masks_are_those_of_a_stable_sort(seed, rows, count):
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(0, 4, (rows, 12), generator=generator).float()  # many ties
    (mask,) = top(size, count)
    for row, found in zip(size, mask, strict=True):
        order = sorted(range(12), key=lambda i: (-float(row[i]), i))[:count]
        assert found.nonzero().flatten().tolist() == sorted(order)


@settings(max_examples=20, deadline=None)
@given(
    seeds, st.floats(0.05, 1), st.floats(0, 0.5), st.sampled_from([(9,), (3, 9), (2, 3, 3)]), st.booleans()
)
def test_ranks_survive_exactly(seed, keep, drop, shape, by_row):
    delta = tensors(seed, 1, shape)[0]
    found = between_ranks(delta.clone(), drop, keep, "row" if by_row else "tensor")
    groups = (len(delta), -1) if by_row and len(shape) > 1 else (1, -1)
    for before, after in zip(delta.reshape(groups), found.reshape(groups), strict=True):
        n = len(before)
        dropped = min(math.floor(drop * n + 1e-9), n - 1)
        kept = max(1, math.floor(keep * n + 1e-9))
        order = before.abs().argsort(descending=True)[dropped : dropped + kept]
        want = torch.zeros(n)
        want[order] = before[order]
        assert torch.equal(after, want)


# ---- what any merge must satisfy


def call(slug, base, models, **parameters):
    free = find(slug).base == "none"
    given = {"w": base}
    return merge(slug, None if free else given, [{"w": m} for m in models], **parameters)["w"]


TENSORWISE = [
    slug
    for slug, method in methods().items()
    if method.then is None and all(p.default is not p.empty for p in method.parameters.values())
]


@settings(max_examples=8, deadline=None)
@given(seeds)
@pytest.mark.parametrize("slug", TENSORWISE)
def test_a_model_merged_with_itself_is_itself(slug, seed):
    (model,) = tensors(seed, 1)
    torch.testing.assert_close(call(slug, model, [model, model]), model)


@settings(max_examples=8, deadline=None)
@given(seeds, st.permutations([0, 1, 2]))
@pytest.mark.parametrize("slug", [s for s in TENSORWISE if s not in ("slerp", "dare")])
def test_the_order_of_the_models_does_not_matter(slug, seed, order):
    base, *models = tensors(seed, 4)
    one, two = call(slug, base, models), call(slug, base, [models[i] for i in order])
    torch.testing.assert_close(one, two)


@settings(max_examples=8, deadline=None)
@given(seeds)
@pytest.mark.parametrize("slug", [s for s in TENSORWISE if "scale" in find(s).parameters])
def test_scale_0_gives_the_base(slug, seed):
    base, *models = tensors(seed, 3)
    assert torch.equal(call(slug, base, models, scale=0.0), base)


@settings(max_examples=8, deadline=None)
@given(seeds, st.floats(0.1, 2))
@pytest.mark.parametrize("slug", ["task-arithmetic", "breadcrumbs", "dare"])
def test_linear_in_the_scale(slug, seed, scale):
    base, *models = tensors(seed, 3)
    one, more = call(slug, base, models, scale=1.0), call(slug, base, models, scale=scale)
    torch.testing.assert_close(more - base, scale * (one - base), rtol=1e-4, atol=1e-5)
    each = [call(slug, base, [m], scale=1.0) - base for m in models]
    if slug != "dare":  # which draws for both in turn
        torch.testing.assert_close(one - base, sum(each), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            call(slug, base, models, scale=[1.0, scale]) - base,
            each[0] + scale * each[1],
            rtol=1e-4,
            atol=1e-5,
        )


def test_nothing_given_is_changed():
    base, *models = tensors(3, 3)
    before = [t.clone() for t in (base, *models)]
    for slug in TENSORWISE:
        call(slug, base, models)
        assert all(torch.equal(a, b) for a, b in zip((base, *models), before, strict=True)), slug


# ---- mistakes


@pytest.mark.parametrize(
    ("function", "parameters", "line"),
    [
        (task_arithmetic, {"scale": [1, 2]}, r"scale=\[1, 2\] has 2 numbers for 3 models"),
        (task_arithmetic, {"scale": "big"}, r"scale='big' must be a number"),
        (task_arithmetic, {"scale": math.inf}, r"scale=inf must be finite"),
        (
            task_arithmetic,
            {"alpha": 1},
            r"task-arithmetic has no parameter 'alpha': its parameters are scale",
        ),
        (linear, {"weights": [1, 0, -1]}, r"add up to 0"),
        (slerp, {}, r"slerp merges 2 models, and 3 were given"),
        (ties, {"keep": 0}, r"keep=0\.0 must be a share in \(0, 1\]"),
        (dare, {"keep": 1.5}, r"keep=1\.5 must be a share"),
        (dare, {"seed": 0.5}, r"seed=0\.5 must be a whole number"),
        (breadcrumbs, {"drop_top": 1}, r"drop_top=1\.0 must be a share in \[0, 1\)"),
        (breadcrumbs, {"granularity": "column"}, r"granularity='column' must be 'row' or 'tensor'"),
        ("median", {}, r"method='median' is unknown: choose one of .*breadcrumbs, dare"),
    ],
)
def test_mistakes_are_one_line(function, parameters, line):
    models = [{"w": t} for t in tensors(0, 4)]
    base = None if function in (linear, slerp) else models[0]
    with pytest.raises(ValueError, match=line):
        merge(function, base, models[1:], **parameters)


def test_a_base_where_one_is_needed_and_models_where_they_belong():
    state = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="ties needs the common base"):
        merge("ties", None, [state])
    with pytest.raises(ValueError, match="models is empty"):
        merge("ties", state, [])
    with pytest.raises(TypeError, match="give a list of models"):
        merge("ties", state, state)
    with pytest.raises(ValueError, match=r"t=2 must be a number in \[0, 1\]"):
        merge("slerp", None, [state, state], t=2)
