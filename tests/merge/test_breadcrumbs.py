"""Breadcrumbs: the masks of the card, step by step; sparse task vectors; the pitfalls the card names."""

from __future__ import annotations

import math

import pytest
import torch

from unfused.merge import add_breadcrumbs, breadcrumbs, extract_breadcrumbs, merge, sparsify


def naive(delta, keep, drop_top):
    """One group, by sorting."""
    n = len(delta)
    order = sorted(range(n), key=lambda i: (-abs(float(delta[i])), i))
    dropped, kept = math.floor(drop_top * n), max(1, math.floor(keep * n))
    out = torch.zeros(n)
    for i in order[dropped : dropped + kept]:
        out[i] = delta[i]
    return out


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    shapes = {"fc.weight": (6, 40), "fc.bias": (40,), "conv.weight": (5, 4, 3, 3), "logit_scale": ()}
    return [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(4)]


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_the_algorithm_of_the_card(models, granularity):
    base, *tuned = models
    found = merge("breadcrumbs", base, tuned, scale=0.4, keep=0.25, drop_top=0.05, granularity=granularity)
    for name, before in base.items():
        total = torch.zeros_like(before)
        for model in tuned:
            delta = model[name] - before
            if delta.ndim == 0:
                total = total + delta
                continue
            groups = delta.reshape(len(delta) if granularity == "row" and delta.ndim > 1 else 1, -1)
            total = total + torch.stack([naive(g, 0.25, 0.05) for g in groups]).view(before.shape)
        assert torch.equal(found[name], before + 0.4 * total), name


def test_small_tensors_keep_their_largest_and_lose_nothing_to_rounding():
    delta = torch.tensor([5.0, 1.0, 3.0])
    assert sparsify(delta, keep=0.9, drop_top=0.01).tolist() == [5.0, 0.0, 3.0]  # 0.01 * 3 < 1: no outlier
    assert sparsify(delta, keep=0.1, drop_top=0.0).tolist() == [5.0, 0.0, 0.0]  # one survivor at least
    assert torch.equal(sparsify(delta, keep=1.0, drop_top=0.0), delta)
    assert sparsify(delta, keep=1.0, drop_top=0.5).tolist() == [
        0.0,
        1.0,
        3.0,
    ]  # full density drops outliers still
    assert sparsify(torch.tensor([2.0]), keep=0.5, drop_top=0.9).tolist() == [2.0]
    assert sparsify(torch.zeros(0, 4)).shape == (0, 4)


def test_ties_at_zero_do_not_make_the_mask_denser():
    delta = torch.zeros(4, 20)
    delta[:, 0] = 1
    assert int((sparsify(delta, keep=0.25, drop_top=0.0) != 0).sum()) == 4
    ones = torch.ones(1, 20)
    assert int((sparsify(ones, keep=0.25, drop_top=0.1) != 0).sum()) == 5


def test_kernels_are_flattened_to_rows():
    delta = torch.arange(1.0, 37.0).view(2, 2, 3, 3)
    found = sparsify(delta, keep=1 / 9, drop_top=0.0)
    assert (found != 0).flatten(1).sum(1).tolist() == [2, 2]


def test_each_model_may_have_its_own_settings(models):
    base, *tuned = models
    name = "fc.weight"
    deltas = [m[name] - base[name] for m in tuned]
    found = breadcrumbs(
        base[name], deltas, scale=[0.1, 0.2, 0.3], keep=[0.1, 0.5, 1.0], drop_top=[0, 0.1, 0.05]
    )
    want = base[name].clone()
    for d, s, k, t in zip(deltas, (0.1, 0.2, 0.3), (0.1, 0.5, 1.0), (0, 0.1, 0.05), strict=True):
        want += s * sparsify(d, keep=k, drop_top=t)
    torch.testing.assert_close(found, want)


def test_crumbs_stored_and_added_later_are_the_merge(models, tmp_path):
    from safetensors.torch import load_file, save_file

    base, *tuned = models
    crumbs = []
    for i, model in enumerate(tuned):
        save_file(extract_breadcrumbs(base, model, keep=0.2), tmp_path / f"{i}.safetensors")
        crumbs.append(load_file(tmp_path / f"{i}.safetensors"))
    assert crumbs[0]["fc.weight.index"].dtype == torch.int64
    assert len(crumbs[0]["fc.weight.values"]) == 6 * 8
    first_two = merge("breadcrumbs", base, tuned[:2], keep=0.2)
    want = merge("breadcrumbs", base, tuned, keep=0.2)
    for found in (add_breadcrumbs(base, *crumbs), add_breadcrumbs(first_two, crumbs[2])):
        for name, tensor in want.items():
            torch.testing.assert_close(found[name], tensor)


def test_extraction_names_what_differs(models):
    base, model, *_ = models
    with pytest.raises(ValueError, match=r"only one of base and model has tensor 'fc.bias'"):
        extract_breadcrumbs(base, {k: v for k, v in model.items() if k != "fc.bias"})
    with pytest.raises(ValueError, match=r"tensor 'fc.bias' is \(40,\) in base and \(3,\) in model"):
        extract_breadcrumbs(base, model | {"fc.bias": torch.ones(3)})
