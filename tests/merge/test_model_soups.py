"""Soups: means against torch, the greedy pass by hand, gradients of the learned one, the gap in closed form, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unfused.merge._compose import Block, LowRank, block_of
from unfused.merge.model_soups import (
    average_tensors,
    greedy_soup,
    learned_soup,
    predict_gap,
    rank_models,
    refresh_batch_norm,
    uniform_soup,
)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def near(base: nn.Module, count: int, scale: float = 0.05) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [
        {name: value + scale * torch.randn_like(value) for name, value in base.state_dict().items()}
        for _ in range(count)
    ]


# -- uniform -----------------------------------------------------------------------------------------------------------


def test_uniform_is_the_mean_and_leaves_inputs_alone():
    models = near(net(), 4)
    kept = copy.deepcopy(models)
    soup = uniform_soup(models, base=net())
    for name, value in soup.items():
        torch.testing.assert_close(value, torch.stack([m[name] for m in models]).mean(0))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(models, kept, strict=True) for n in a)
    weighted = uniform_soup(models[:2], weights=[3, 1])
    torch.testing.assert_close(weighted["0.bias"], 0.75 * models[0]["0.bias"] + 0.25 * models[1]["0.bias"])


@given(st.permutations(range(4)), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_permutation_and_self_merge(order, copies):
    models = near(net(), 4)
    one, other = uniform_soup(models), uniform_soup([models[i] for i in order])
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
    same = uniform_soup([models[0]] * copies)
    for name in same:
        torch.testing.assert_close(same[name], models[0][name], rtol=1e-6, atol=1e-7)


def test_half_precision_is_summed_wide_and_rounded_once():
    torch.manual_seed(0)
    tensors = [(1 + 0.01 * torch.randn(100)).bfloat16() for _ in range(150)]
    exact = torch.stack([t.double() for t in tensors]).mean(0).bfloat16()
    found = average_tensors(tensors)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact)


def test_integers_are_copied_and_ties_stay():
    shared = torch.randn(3, 3)
    one = {"a.weight": shared, "b.weight": shared, "steps": torch.tensor(5), "ids": torch.arange(3)}
    other = torch.randn(3, 3) + shared
    two = {"a.weight": other, "b.weight": other, "steps": torch.tensor(9), "ids": torch.arange(3)}
    soup = uniform_soup([one, two], check_descent=False)
    assert soup["steps"] == 5 and soup["ids"].tolist() == [0, 1, 2]
    assert soup["a.weight"].data_ptr() == soup["b.weight"].data_ptr()
    greedy = greedy_soup([one, two], lambda state: 0.0, check_descent=False)
    assert greedy.members == (0, 1) and greedy.state_dict["steps"] == 5
    torch.testing.assert_close(greedy.state_dict["a.weight"], soup["a.weight"])


def test_empty_tensors_pass():
    models = [{"w": torch.zeros(0, 4), "v": torch.ones(2)}] * 2
    assert uniform_soup(models)["w"].shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("2.bias"), r"models\[1\] lacks '2.bias'"),
        (lambda m: m.update(more=torch.ones(1)), r"models\[1\] has 'more'"),
        (lambda m: m.update({"2.bias": torch.ones(4)}), r"models\[1\]: '2.bias' has shape \(4,\)"),
        (
            lambda m: m["0.weight"].__setitem__((0, 0), float("nan")),
            r"models\[1\]: '0.weight' has values that are not finite",
        ),
        (lambda m: m.update({"2.bias": torch.ones(3, dtype=torch.long)}), r"'2.bias' is torch.int64"),
    ],
)
def test_models_that_do_not_fit_are_named(change, message):
    models = near(net(), 2)
    change(models[1])
    for merge in (uniform_soup, lambda m: greedy_soup(m, lambda state: 0.0)):
        with pytest.raises(ValueError, match=message):
            merge(models)


def test_unrelated_models_are_refused():
    big = [nn.Linear(60, 60).state_dict() for _ in range(2)]
    with pytest.raises(ValueError, match=r"models\[1\]: its weights have cosine .* do not descend"):
        uniform_soup(big)
    with pytest.raises(ValueError, match="those of the base"):
        uniform_soup(big, base=nn.Linear(60, 60))
    assert uniform_soup(big, check_descent=False)


def test_other_mistakes():
    models = near(net(), 2)
    with pytest.raises(ValueError, match="models is empty"):
        uniform_soup([])
    with pytest.raises(TypeError, match="give a list"):
        uniform_soup(models[0])
    with pytest.raises(ValueError, match="weights has 3 numbers for 2"):
        uniform_soup(models, weights=[1, 2, 3])
    with pytest.raises(ValueError, match="do not add up to 0"):
        uniform_soup(models, weights=[1, -1])
    with pytest.raises(ValueError, match="merge each adapter first"):
        uniform_soup([{"q.lora_A.weight": torch.ones(2, 2)}] * 2)
    with pytest.raises(ValueError, match="accept='>>'"):
        greedy_soup(models, lambda state: 0.0, accept=">>")
    with pytest.raises(ValueError, match=r"score gave nan for models\[0\]"):
        greedy_soup(models, lambda state: float("nan"))
    with pytest.raises(ValueError, match="order="):
        greedy_soup(models, lambda state: 0.0, order=[0, 0])


# -- greedy ------------------------------------------------------------------------------------------------------------


def test_greedy_is_the_pass_of_the_paper():
    """Against the loop written out, on random scores that only depend on the weights."""
    models = near(net(), 8)
    x, y = torch.randn(40, 6), torch.randint(3, (40,))

    def score(state):
        model = net()
        model.load_state_dict(state)
        return float((model(x).argmax(1) == y).float().mean())

    singles = [score(m) for m in models]
    order = sorted(range(8), key=lambda i: -singles[i])
    for accept in (">=", ">"):
        kept, best = [order[0]], singles[order[0]]
        for i in order[1:]:
            mean = {n: torch.stack([models[j][n] for j in [*kept, i]]).mean(0) for n in models[0]}
            found = score(mean)
            if found >= best if accept == ">=" else found > best:
                kept.append(i)
                best = found
        soup = greedy_soup(models, score, accept=accept)
        assert soup.members == tuple(kept) and soup.score == pytest.approx(best)
        assert soup.score >= max(singles) and soup.scores == tuple(singles)
        for name in models[0]:
            torch.testing.assert_close(
                soup.state_dict[name], torch.stack([models[j][name] for j in kept]).mean(0)
            )
    assert [i for i, _ in rank_models(models, score)] == order


def test_greedy_streams_into_one_model():
    models = near(net(), 5)
    x = torch.randn(20, 6)
    target = net(3)

    def by_state(state):
        model = net()
        model.load_state_dict(state)
        return float(-model(x).detach().square().mean())

    plain = greedy_soup(models, by_state)
    streamed = greedy_soup(models, lambda model: float(-model(x).detach().square().mean()), model=target)
    assert plain.members == streamed.members
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict[name])
    known = greedy_soup(models, by_state, scores=plain.scores)
    assert known.members == plain.members and len(known.trace) == 5


def test_greedy_reads_lazily():
    reads = []

    class Lazy(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    models = [Lazy(m) for m in near(net(), 3)]
    uniform_soup(models)
    assert len(reads) <= 4 * (3 + 2)


# -- learned -----------------------------------------------------------------------------------------------------------


def test_block_has_the_gradient_of_the_plain_sum():
    torch.manual_seed(0)
    base, deltas = torch.randn(4, 5), [torch.randn(4, 5) for _ in range(3)]
    low = [LowRank(torch.randn(4, 2), torch.randn(2, 5), 0.5) for _ in range(3)]
    groups = torch.randint(2, (4, 5))
    target = torch.randn(4, 5)
    for given_deltas, given_groups, shape in (
        (deltas, None, (3,)),
        (low, None, (3,)),
        (deltas, groups, (3, 2)),
        (low, groups, (3, 2)),
    ):
        c = torch.randn(shape, requires_grad=True)
        dense = torch.stack([d.dense() if isinstance(d, LowRank) else d for d in given_deltas])
        spread = c[:, groups] if given_groups is not None else c[:, None, None]
        plain = base + (spread * dense).sum(0)
        (wanted,) = torch.autograd.grad(((plain - target) ** 2).sum(), c)
        composed = Block(base, given_deltas, given_groups)(c)
        (found,) = torch.autograd.grad(((composed - target) ** 2).sum(), c)
        torch.testing.assert_close(composed, plain)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    half = Block(base, deltas, dtype=torch.bfloat16)
    c = torch.ones(3, requires_grad=True)
    half(c).sum().backward()
    torch.testing.assert_close(c.grad, torch.stack(deltas).sum((1, 2)), rtol=0.05, atol=0.05)


def test_learned_soup_takes_what_answers_right():
    torch.manual_seed(0)
    model = net()
    x = torch.randn(64, 6)
    good = net(5).state_dict()
    labelled = net(5)
    y = labelled(x).argmax(1)
    bad = net(9).state_dict()
    before = copy.deepcopy(model.state_dict())
    for per, shape in (
        ("tensor", (4, 2)),
        ("model", (2,)),
        ("block", (2, 2)),
        (lambda name: name[-1], (2, 2)),
    ):
        found = learned_soup(model, [good, bad], [(x, y)], per=per, lr=0.3, epochs=40, check_descent=False)
        assert found.alpha.shape == shape and found.losses[-1] < found.losses[0]
        torch.testing.assert_close(found.alpha.sum(-1), torch.ones(shape[:-1]))
        assert found.groups == () or len(found.groups) == shape[0]
        model2 = net()
        model2.load_state_dict(found.state_dict)
        assert (model2(x).argmax(1) == y).float().mean() > 0.75
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert found.beta != 1


def test_learned_soup_starts_at_the_uniform_one():
    models = near(net(), 3)
    x, y = torch.randn(30, 6), torch.randint(3, (30,))
    uniform = net()
    uniform.load_state_dict(uniform_soup(models))
    found = learned_soup(net(), models, [{"input": x, "labels": y}], epochs=1)
    assert found.losses[0] == pytest.approx(
        float(nn.functional.cross_entropy(uniform(x), y).detach()), rel=1e-5
    )
    assert float(abs(found.alpha - 1 / 3).max()) < 0.03


def test_learned_soup_mistakes():
    models = near(net(), 2)
    data = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(TypeError, match="read only once"):
        learned_soup(net(), models, iter(data))
    with pytest.raises(ValueError, match="no labels"):
        learned_soup(net(), models, [data[0][0]])
    with pytest.raises(ValueError, match="batches is empty"):
        learned_soup(net(), models, [])
    with pytest.raises(ValueError, match="per='head'"):
        learned_soup(net(), models, data, per="head")
    with pytest.raises(ValueError, match="which the model has"):
        learned_soup(nn.Sequential(*net(), nn.Linear(3, 3)), models, data)


def test_block_names():
    assert block_of("vit.encoder.layer.11.output.dense.bias") == "vit.encoder.layer.11"
    assert block_of("embeddings.cls_token") == "embeddings" and block_of("0.weight") == "0"


# -- as the engine calls them --------------------------------------------------------------------------------------------


def test_engine_and_python_agree(tmp_path, monkeypatch):
    from unfused.merge._engine import merge

    models = near(net(), 4)
    (tmp_path / "my_scores.py").write_text(
        "import torch\n"
        "def score(state):\n"
        "    return -float(state['2.bias'].abs().sum())\n"
        "def data():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))\n"
        "    generator = torch.Generator().manual_seed(0)\n"
        "    x = torch.randn(30, 6, generator=generator)\n"
        "    return model, [(x, torch.randint(3, (30,), generator=generator))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_scores

    wanted = {
        "uniform-soup": (uniform_soup(models), {}),
        "greedy-soup": (greedy_soup(models, my_scores.score).state_dict, {"score": "my_scores:score"}),
        "learned-soup": (
            learned_soup(*(lambda model, batches: (model, models, batches))(*my_scores.data())).state_dict,
            {"data": "my_scores:data"},
        ),
    }
    for method, (state, options) in wanted.items():
        found = merge(method, None, models, **options)
        for name, value in state.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    for score, message in (
        ("my_scores", "give module:function"),
        ("my_scores:no", "has no no"),
        ("no_such_module:f", "no_such_module"),
    ):
        with pytest.raises(ValueError, match=message):
            merge("greedy-soup", None, models, score=score)


# -- gap and batch norms -----------------------------------------------------------------------------------------------


def test_gap_is_right_to_second_order():
    """Of a small chord; the error falls with its cube."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 6), torch.randint(3, (200,))
    base = net()
    direction = [torch.randn_like(p) for p in base.parameters()]
    errors = []
    for size in (0.1, 0.05):
        ends = []
        for sign in (-1, 1):
            model = copy.deepcopy(base)
            for p, d in zip(model.parameters(), direction, strict=True):
                p.data.add_(d, alpha=sign * size / 2)
            ends.append(model)
        gap = predict_gap(base, *ends, [(x[:120], y[:120]), (x[120:], y[120:])])
        errors.append(abs(gap.predicted - gap.measured))
    assert errors[1] < errors[0] / 8


def test_gap_of_a_linear_model_is_zero():
    """There soup and ensemble are one: the curvature is the variance of the disagreement."""
    torch.manual_seed(0)
    one, two = nn.Linear(6, 3), nn.Linear(6, 3)
    gap = predict_gap(nn.Linear(6, 3), one, two, [(torch.randn(50, 6), torch.randint(3, (50,)))], alpha=0.3)
    assert gap.measured == pytest.approx(0, abs=1e-6) and gap.predicted == pytest.approx(0, abs=1e-3)
    assert gap.disagreement > 0.05


def test_batch_norms_are_recomputed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.9)).train()
    batches = [(torch.randn(64, 4) + 3, torch.zeros(64)) for _ in range(4)]
    refresh_batch_norm(model, batches)
    every = model[0](torch.cat([x for x, _ in batches]))
    torch.testing.assert_close(model[1].running_mean, every.mean(0).detach(), rtol=1e-4, atol=1e-4)
    assert model.training and model[1].momentum == 0.1
    assert refresh_batch_norm(net(), []) is not None
