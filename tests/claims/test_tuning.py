"""The bench for tuning: arms train what they should, the rate is chosen by validation, keys hold the contents."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn

from unfused.adapters import SsfConfig
from unfused.claims.lab import Lab, tuning
from unfused.claims.lab.tuning import (
    Arm,
    Task,
    TuningWorld,
    adapter,
    bias_only,
    classification,
    compare,
    count_trainable,
    full,
    layernorm_only,
    linear_probe,
    lora,
    measure,
    select,
    tune,
)
from unfused.claims.lab.vision import digits_backbone, digits_world


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", cache_dir=tmp_path_factory.mktemp("cache"))


class Toy(nn.Module):
    """Two classes told apart by a direction; `classifier` is the head."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, labels=None):
        logits = self.classifier(self.body(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return types.SimpleNamespace(loss=loss, logits=logits)


def toy_task(seed):
    x = torch.randn(120, 4, generator=torch.Generator().manual_seed(seed))
    y = (x.sum(1) > 0).long()
    parts = [{"x": x[i : i + 40], "labels": y[i : i + 40]} for i in (0, 40, 80)]
    return Task(*parts, num_labels=2)


def toy_world(name="toy", shift=0.0):
    def backbone(num_labels):
        model = Toy()
        with torch.no_grad():
            model.body.weight.copy_(torch.eye(4) + shift)
        return model

    return TuningWorld(name, backbone, toy_task)


# --- arms ------------------------------------------------------------------------------------------------------------


def test_arms_train_what_their_names_say(lab):
    counts = {}
    arms = {"linear": linear_probe, "bias": bias_only, "norm": layernorm_only, "full": full, "lora": lora(4)}
    for name, arm in arms.items():
        model = arm.prepare(digits_backbone(lab, 10))
        assert {n for n, p in model.named_parameters() if p.requires_grad and "classifier" in n}, name
        counts[name] = count_trainable(model)
        assert count_trainable(model, head=True) == counts[name] + 650
    # 64-wide: per block q, k, v, o, fc2, two norms of 64, fc1 of 128; one norm and the patch projection outside
    assert counts["linear"] == 0 and counts["lora"] == 4 * 2 * 2 * 4 * 64
    assert counts["bias"] == 4 * (7 * 64 + 128) + 2 * 64
    assert counts["norm"] == (4 * 2 + 1) * 2 * 64 and counts["full"] > 130_000


def test_an_adapter_arm_leaves_its_config_alone():
    config = SsfConfig(target_modules=["body"])
    arm = adapter(config)
    for _ in range(2):
        model = arm.prepare(Toy())
        assert count_trainable(model) == 8 and count_trainable(model, head=True) == 18
    assert config.modules_to_save is None


# --- training --------------------------------------------------------------------------------------------------------


def test_tune_learns_repeats_and_leaves_the_global_generator_alone():
    task, ends = toy_task(0), []
    for _ in range(2):
        torch.manual_seed(3)
        model = Toy()
        before = torch.random.get_rng_state()
        tune(model, task, lr=0.05, steps=60, seed=1)
        assert torch.equal(before, torch.random.get_rng_state()) and not model.training
        ends.append(model.body.weight.detach())
    assert torch.equal(*ends)
    assert classification(model, task)["test"] > 0.9


def test_the_head_has_a_rate_of_its_own():
    model = Toy()
    body, head = model.body.weight.clone(), model.classifier.weight.clone()
    tune(model, toy_task(0), lr=0.0, head_lr=0.01, steps=3)
    assert torch.equal(model.body.weight, body) and not torch.equal(model.classifier.weight, head)


def test_schedules_and_regularisers_run_once_a_step():
    calls = []

    class Tuner(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **batch):
            return self.inner(**batch)

        def begin_training(self, total):
            calls.append(("begin", total))

        def regularization_loss(self):
            return 100 * self.inner.body.bias.square().sum()

        def update_and_allocate(self, step):
            calls.append(step)
            return [self.inner.body.weight]

    model = Tuner(Toy())
    tune(model, toy_task(0), lr=0.05, steps=40)
    assert calls == [("begin", 40), *range(1, 41)]
    assert model.inner.body.bias.abs().max() < 0.05


def test_batches_are_whole_and_cover_the_data():
    rows = tuning._batches(10, 4, seed=0)
    five = torch.cat([next(rows) for _ in range(5)])
    assert five.bincount().tolist() == [2] * 10
    assert len(next(tuning._batches(3, 64, seed=0))) == 64


# --- comparing -------------------------------------------------------------------------------------------------------


def test_the_rate_is_chosen_by_validation_and_ties_by_its_loss():
    row = lambda valid, loss, test: {"valid": valid, "valid_loss": loss, "test": test}  # noqa: E731
    grid = {
        "a": {1e-3: [row(0.5, 1.0, 0.1), row(0.5, 1.0, 0.2)], 1e-2: [row(0.5, 0.5, 0.3), row(0.4, 0.1, 0.9)]}
    }
    assert [r["test"] for r in select(grid)["a"]] == [0.3, 0.2]
    lower = select({"a": {1.0: [{"bits": 2.0}], 2.0: [{"bits": 1.0}]}}, by="bits", higher_is_better=False)
    assert lower == {"a": [{"bits": 1.0, "lr": 2.0}]}


def test_units_are_kept_and_baselines_shared_between_claims(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tuning, "tune", lambda *a, **k: calls.append(k["lr"]) or tune(*a, **k))
    desk = Lab("desk", seeds=2, cache_dir=tmp_path)
    arms = {"linear": linear_probe, "mine": Arm(full.prepare, lrs=(0.01, 0.1))}
    first = compare(desk, toy_world(), arms, steps=5)
    assert len(calls) == 2 * (4 + 2) and {len(v) for v in first.values()} == {2}
    other = Lab("desk", seeds=2, cache_dir=tmp_path)
    assert compare(other, toy_world(), {"linear": linear_probe}, steps=5)["linear"] == first["linear"]
    assert len(calls) == 12
    compare(other, toy_world(shift=0.1), {"linear": linear_probe}, steps=5)  # another backbone
    assert len(calls) == 20
    compare(other, toy_world(), {"linear": Arm(linear_probe.prepare, recipe={"batch_size": 8})}, steps=5)
    assert len(calls) == 28


def test_measure_gives_all_metrics_and_an_arm_may_train_itself(lab):
    def train(model, task, *, lr, steps, seed):
        other = Toy()
        tune(other, task, lr=lr, steps=steps, seed=seed)
        return other.requires_grad_(False)

    def evaluate(model, task):
        return {"sum": float(model.body.weight.sum()), **classification(model, task)}

    world = TuningWorld("toy", toy_world().backbone, toy_task, evaluate)
    arms = {"own": Arm(full.prepare, steps=2, train=train), "full": full}
    grid = measure(lab, world, arms, seeds=[0, 1], steps=3)
    assert list(grid["own"]) == [1e-2] and len(grid["own"][1e-2]) == 2  # one rate at smoke scale
    assert grid["own"][1e-2][0]["parameters"] == 0 and grid["full"][1e-2][0]["parameters"] == 20
    assert {"sum", "valid", "test", "test_loss"} <= set(grid["full"][1e-2][0])


def test_keys_tell_settings_apart_that_code_does_not():
    def make(value):
        return lambda model: value

    same = [make(1), make(1)]
    assert tuning._describe(same[0]) == tuning._describe(same[1]) != tuning._describe(make(2))
    assert tuning._describe(functools.partial(make, 1)) != tuning._describe(functools.partial(make, 2))
    assert tuning._describe({"b", "a"}) == tuning._describe({"a", "b"})
    assert tuning._describe(torch.ones(2)) != tuning._describe(torch.zeros(2))
    assert tuning._describe(SsfConfig(shift=False)) != tuning._describe(SsfConfig())
    uses = []
    tuning._describe(adapter(SsfConfig()).prepare, uses)
    assert SsfConfig in uses


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "per_class"), [("shifted", 10), ("blurred", 1), ("pasted", 10)])
def test_digit_tasks_draw_by_seed_and_test_on_the_same(lab, kind, per_class):
    world = digits_world(lab, kind, per_class)
    one, again, other = world.task(0), world.task(0), world.task(1)
    assert one.train["labels"].bincount().tolist() == [per_class] * one.num_labels
    assert one.valid["labels"].bincount().tolist() == [4] * one.num_labels
    assert torch.equal(one.train["pixel_values"], again.train["pixel_values"])
    assert not torch.equal(one.train["pixel_values"], other.train["pixel_values"])
    assert torch.equal(one.test["pixel_values"], other.test["pixel_values"])
    assert len(one.test["labels"]) == (1000 if kind == "pasted" else 447)
    assert one.train["pixel_values"].shape[1:] == (1, 8, 8)
    both = torch.cat([one.train["pixel_values"], one.valid["pixel_values"]]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


def test_pasted_digits_are_two_halves_and_their_parity():
    from unfused.claims.lab.vision import _paste

    images = torch.arange(1, 11).view(10, 1, 1, 1).expand(10, 1, 8, 8).float()  # digit d is all d + 1
    pictures, parity = _paste(images, torch.arange(10), 50, torch.Generator().manual_seed(0))
    left, right = pictures[..., :4].amax((1, 2, 3)) - 1, pictures[..., 4:].amax((1, 2, 3)) - 1
    assert torch.equal((left + right).long() % 2, parity)
    assert (pictures != 0).sum((1, 2, 3)).eq(32).all()


def test_blur_keeps_the_mean_of_a_flat_picture():
    from unfused.claims.lab.vision import blur_digits

    torch.testing.assert_close(blur_digits(torch.full((2, 1, 8, 8), 0.7)), torch.full((2, 1, 8, 8), 0.7))


def test_worlds_that_cannot_be_are_named(lab):
    with pytest.raises(ValueError, match="kind='turned'"):
        digits_world(lab, "turned")
    with pytest.raises(ValueError, match="per_class=60"):
        digits_world(lab, per_class=60).task(0)
