"""aTLAS: composition against plain sums, its gradients, every way of learning, LoRA vectors, files, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from unfused.merge import atlas
from unfused.merge._atlas_model import groups_of
from unfused.merge._atlas_training import accuracy


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.first(x))))


@pytest.fixture
def world():
    torch.manual_seed(0)
    base = Net()
    models = []
    for _ in range(3):
        model = copy.deepcopy(base)
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
        models.append(model)
    return base, models


def task(model: nn.Module, n: int = 64, seed: int = 0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, model(x).argmax(1)


def added(base, models, coefficients):
    """theta_0 + sum c tau, written out."""
    states = [m.state_dict() for m in models]
    return {
        name: value + sum(c * (s[name] - value) for c, s in zip(coefficients, states, strict=True))
        if value.is_floating_point()
        else value
        for name, value in base.state_dict().items()
    }


# -- composing ---------------------------------------------------------------------------------------------------------


def test_composition_and_its_gradients_are_those_of_the_plain_sum(world):
    base, models = world
    x, y = task(models[0])
    composed = atlas.TaskVectorModel(base, models)
    assert composed.values.shape == (6, 3, 1) and composed.names == tuple(dict(base.named_parameters()))
    assert torch.equal(composed(x), base(x))
    torch.manual_seed(1)
    nn.init.normal_(composed.values, std=0.3)
    loss = F.cross_entropy(composed(x), y)
    loss.backward()
    values = composed.values.detach().clone().requires_grad_(True)
    weights = {}
    for j, name in enumerate(composed.names):
        start = base.get_parameter(name).detach()
        weights[name] = start + sum(
            values[j, i, 0] * (m.get_parameter(name).detach() - start) for i, m in enumerate(models)
        )
    plain = F.cross_entropy(functional_call(base, weights, (x,)), y)
    plain.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(composed.values.grad, values.grad)
    assert not any(p.grad is not None for p in base.parameters())
    assert [name for name, _ in composed.named_parameters()] == ["values"]


def test_isotropic_is_task_arithmetic(world):
    base, models = world
    composed = atlas.TaskVectorModel(base, models, per="model")
    composed.values.data[0, :, 0] = torch.tensor([0.3, -0.2, 1.0])
    wanted = added(base, models, [0.3, -0.2, 1.0])
    for name, value in composed.merged_state().items():
        torch.testing.assert_close(value, wanted[name])


def test_partitions_are_elementwise(world):
    base, models = world
    composed = atlas.TaskVectorModel(base, models, partitions=5, seed=3)
    torch.manual_seed(1)
    nn.init.normal_(composed.values)
    start = base.last.weight.detach()
    groups = groups_of(tuple(start.shape), 5, 3)
    assert groups.flatten().bincount().tolist() == [13, 13, 13, 13, 12]
    j = composed.names.index("last.weight")
    wanted = start + sum(
        composed.values[j, i][groups] * (m.last.weight - start) for i, m in enumerate(models)
    )
    state = composed.merged_state()
    torch.testing.assert_close(state["last.weight"], wanted.detach())
    j = composed.names.index("norm.bias")  # one coefficient
    wanted = base.norm.bias + sum(
        composed.values[j, i, 0] * (m.norm.bias - base.norm.bias) for i, m in enumerate(models)
    )
    torch.testing.assert_close(state["norm.bias"], wanted.detach())
    assert composed.coefficients()["last.weight"].shape == (3, 5)
    assert composed.coefficients()["norm.bias"].shape == (3,)
    again = atlas.scale_task_vectors(base, models, composed)
    for name in state:
        torch.testing.assert_close(again[name], state[name])


@given(st.permutations(range(3)), st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=15, deadline=None)
def test_merging_is_linear_and_knows_no_order(order, a, b):
    torch.manual_seed(0)
    base, deltas = torch.randn(4, 3), [torch.randn(4, 3) for _ in range(3)]
    c = [a, b, 1.0]
    found = atlas.anisotropic(base, deltas, coefficients=c)
    other = atlas.anisotropic(base, [deltas[i] for i in order], coefficients=[c[i] for i in order])
    torch.testing.assert_close(found, other)
    torch.testing.assert_close(found, base + a * deltas[0] + b * deltas[1] + deltas[2], rtol=1e-4, atol=1e-5)
    assert torch.equal(atlas.anisotropic(base, deltas, coefficients=0.0), base)
    flat = atlas.anisotropic(base, deltas, coefficients=[a] * 4 + [b] * 4 + [1.0] * 4)
    torch.testing.assert_close(flat, found, rtol=1e-4, atol=1e-5)


def test_bfloat16_vectors_and_lazy_checkpoints(world):
    base, models = world
    reads = []

    class Lazy(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    lazy = [Lazy(m.state_dict()) for m in models]
    composed = atlas.TaskVectorModel(base, lazy, dtype=torch.bfloat16)
    assert len(reads) == 18
    nn.init.constant_(composed.values, 0.5)
    wanted = added(base, models, [0.5] * 3)
    for name, value in composed.merged_state().items():
        torch.testing.assert_close(value, wanted[name], rtol=0.02, atol=0.02)
    composed(torch.randn(5, 6)).sum().backward()
    assert composed.values.grad.abs().sum() > 0


def test_linearized_is_the_tangent(world):
    base, models = world
    x = torch.randn(9, 6)
    tangent = atlas.TaskVectorModel(base, models, linearized=True)
    curved = atlas.TaskVectorModel(base, models)
    assert torch.allclose(tangent(x), base(x))
    errors = []
    for size in (0.02, 0.01):
        for composed in (tangent, curved):
            nn.init.constant_(composed.values, size)
        errors.append(float((tangent(x) - curved(x)).detach().abs().max()))
    assert errors[1] < errors[0] / 3 and errors[1] > 0
    one, two = tangent(x), None
    nn.init.constant_(tangent.values, 0.02)
    two = tangent(x)
    torch.testing.assert_close(two - base(x), 2 * (one - base(x)), rtol=1e-3, atol=1e-4)
    F.cross_entropy(two, torch.zeros(9, dtype=torch.long)).backward()
    assert tangent.values.grad.abs().min() > 0


def test_linearized_transformers_model():
    from unfused.claims.lab.fine_tunings import _vit

    torch.manual_seed(0)
    vit = _vit(8, 4, 1)
    other = copy.deepcopy(vit)
    for p in other.parameters():
        p.data += 0.01 * torch.randn_like(p)
    composed = atlas.TaskVectorModel(
        vit, [other], output=lambda out: out.last_hidden_state[:, 0], linearized=True
    )
    composed(pixel_values=torch.randn(2, 1, 8, 8)).square().sum().backward()
    assert composed.values.grad.abs().sum() > 0


def test_tied_weights_stay_tied(world):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    base, tuned = Tied(), Tied()
    composed = atlas.TaskVectorModel(base, [tuned])
    assert composed.names == ("a.weight",)
    nn.init.ones_(composed.values)
    x = torch.randn(2, 3)
    torch.testing.assert_close(composed(x), tuned(x))
    state = composed.merged_state()
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()


# -- learning ----------------------------------------------------------------------------------------------------------


def test_few_shot_finds_the_mixture(world):
    base, models = world
    target = Net()
    target.load_state_dict(added(base, models, [1.0, 0.0, 0.0]))
    x, y = task(target, 400)
    composed = atlas.TaskVectorModel(base, models)
    before = accuracy(composed, [(x, y)])
    report = atlas.learn_few_shot(composed, [(x[:100], y[:100]), (x[100:], y[100:])], lr=0.05, epochs=8)
    assert report.select == "last" and report.epoch == 8 and len(report.losses) == 8
    assert report.losses[-1] < report.losses[0] and accuracy(composed, [(x, y)]) > before
    assert composed.values[:, 0].mean() > composed.values[:, 1:].mean()


def test_best_epoch_counts_the_start(world):
    base, models = world
    data = [task(models[0])]
    composed = atlas.TaskVectorModel(base, models)
    report = atlas.learn_few_shot(composed, data, evaluate=lambda m: -float(m.values.abs().sum()), epochs=3)
    assert report.epoch == 0 and report.select == "best" and len(report.scores) == 4
    assert not composed.values.any()


def test_few_batches_are_repeated(world):
    base, models = world
    composed, calls = atlas.TaskVectorModel(base, models), []
    atlas.learn_few_shot(
        composed, [task(models[0])] * 4, epochs=2, augment=lambda x, generator: calls.append(1) or x
    )
    assert len(calls) == 2 * 12  # 4 batches three times


def test_decay_and_penalty_pull_to_the_base(world):
    base, models = world
    data = [task(models[0])]
    sizes = []
    for options in ({}, {"penalty": 10.0}, {"penalty": 10.0, "penalty_norm": 2}):
        composed = atlas.TaskVectorModel(base, models)
        atlas.learn_few_shot(composed, data, epochs=4, lr=0.02, **options)
        sizes.append(float(composed.values.detach().abs().mean()))
    assert sizes[1] < sizes[0] and sizes[2] < sizes[0]


def test_addition_serves_all_tasks(world):
    base, models = world
    tasks = {str(i): [task(m, 128, i)] * 5 for i, m in enumerate(models)}
    composed = atlas.TaskVectorModel(base, models)
    reference = {name: 1.0 for name in tasks}
    start = atlas.normalized_accuracy(composed, tasks, reference)
    report = atlas.learn_addition(
        composed,
        tasks,
        evaluate=lambda m: atlas.normalized_accuracy(m, tasks, reference),
        epochs=8,
        lr=0.02,
    )
    assert max(report.scores) > start and atlas.normalized_accuracy(composed, tasks, reference) == max(
        report.scores
    )
    heads = {name: (lambda out: out) for name in tasks}
    same = atlas.TaskVectorModel(base, models)
    atlas.learn_addition(same, tasks, heads=heads, epochs=2, lr=0.02)
    with pytest.raises(ValueError, match="heads lack '1'"):
        atlas.learn_addition(same, tasks, heads={"0": lambda out: out, "2": lambda out: out})


def test_negation_forgets_and_keeps_the_control(world):
    base, models = world
    x, y = task(base, 200)
    easy, hard = (x[:, 0] > 0), (x[:, 0] <= 0)
    target, control = [(x[easy], y[easy])], [(x[hard], y[hard])]
    composed = atlas.TaskVectorModel(base, models)
    report = atlas.learn_negation(composed, target, control, lr=0.05, epochs=20)
    assert accuracy(composed, control) >= 0.95
    assert (
        accuracy(composed, target) == pytest.approx(min(-s for s in report.scores), abs=0)
        or report.epoch == 0
    )
    assert accuracy(composed, target) == pytest.approx(-max(report.scores))


def test_trusted_samples():
    torch.manual_seed(0)
    p = torch.randn(300, 5).softmax(-1)
    rows = atlas.trusted_samples(p)  # 300 / 5 / 10 = 6 a class
    assert len(rows) <= 30
    for k in range(5):
        assert set(p[:, k].topk(6).indices.tolist()) <= set(rows.tolist())
    assert len(atlas.trusted_samples(p[:3])) <= 3


@pytest.mark.parametrize("objective", ["ufm", "entropy", "pseudo-labels"])
def test_adaptation_without_labels(world, objective):
    base, models = world
    x = torch.randn(200, 6)
    composed = atlas.TaskVectorModel(base, models)
    report = atlas.learn_unlabelled(composed, x, objective=objective, lr=0.02, epochs=3, threshold=0.5)
    assert len(report.losses) == 3 and report.select == "last" and composed.values.any()
    if objective == "entropy":
        after = composed(x).softmax(-1)
        before = base(x).softmax(-1)
        assert (after * after.log()).sum() > (before * before.log()).sum()
    again = atlas.TaskVectorModel(base, models)
    atlas.learn_unlabelled(
        again, {"x": x, "labels": torch.zeros(200)}, objective=objective, lr=0.02, epochs=3, threshold=0.5
    )
    assert torch.equal(again.values, composed.values)


def test_search_without_gradients(world):
    base, models = world
    x, y = task(models[1], 100)

    def loss(m):
        return float(F.cross_entropy(m(x), y).detach())

    composed = atlas.TaskVectorModel(base, models, per="model")
    start = loss(composed)
    assert atlas.search_without_gradients(composed, loss, evaluations=40) < start
    with pytest.raises(ValueError, match="has 3600 coefficients"):
        atlas.search_without_gradients(atlas.TaskVectorModel(base, models * 2, partitions=100), loss)


def test_select_blocks_is_the_largest_gradients(world):
    base, models = world
    x, y = task(models[0])
    composed = atlas.TaskVectorModel(base, models)
    F.cross_entropy(composed(x), y).backward()
    chosen = atlas.select_blocks(base, models, [(x[:40], y[:40]), (x[40:], y[40:])], budget=2)
    for j, name in enumerate(composed.names):
        assert set(chosen[name]) == set(composed.values.grad[j, :, 0].abs().topk(2).indices.tolist())
    small = atlas.TaskVectorModel(base, models, blocks=chosen)
    nn.init.ones_(small.values)
    for name, value in small.coefficients().items():
        assert value.nonzero().flatten().tolist() == list(chosen[name])


# -- LoRA --------------------------------------------------------------------------------------------------------------


def test_lora_vectors_are_the_merged_change(world, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, _ = world
    torch.manual_seed(0)
    peft = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=2, lora_alpha=6, target_modules=["first", "last"], init_lora_weights=False),
    )
    peft.save_pretrained(tmp_path / "adapter")
    x = torch.randn(5, 6)
    vector = atlas.lora_task_vector(tmp_path / "adapter")
    assert set(vector) == {"first.weight", "last.weight"}
    composed = atlas.TaskVectorModel(base, [vector])
    nn.init.ones_(composed.values)
    torch.testing.assert_close(composed(x), peft(x))
    composed(x).sum().backward()
    dense = peft.merge_and_unload()
    full = atlas.TaskVectorModel(base, [dense])
    nn.init.ones_(full.values)
    full(x).sum().backward()
    rows = [full.names.index(name) for name in composed.names]
    torch.testing.assert_close(composed.values.grad, full.values.grad[rows], rtol=1e-4, atol=1e-4)
    mixed = atlas.TaskVectorModel(base, [vector, dense], partitions=2)
    nn.init.ones_(mixed.values)
    mixed(x).sum().backward()
    assert mixed.values.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="scale: with a state dict"):
        atlas.lora_task_vector({})
    with pytest.raises(ValueError, match="save_pretrained"):
        atlas.lora_task_vector(tmp_path)


# -- heads -------------------------------------------------------------------------------------------------------------


def test_heads_on_features_beat_the_text():
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(5, 16), dim=-1)
    labels = torch.arange(5).repeat(40)
    features = F.normalize(centres[labels] + 0.15 * torch.randn(200, 16), dim=-1)
    text = F.normalize(centres + 0.4 * torch.randn(5, 16), dim=-1)
    shots, rest = slice(0, 40), slice(40, 200)
    zero = ((features @ text.T).argmax(1) == labels)[rest].float().mean()
    for head in (
        atlas.fit_tip(features[shots], labels[shots], text, scale=5.0),
        atlas.fit_lp_plus(features[shots], labels[shots], text),
    ):
        found = (head(features).argmax(1) == labels)[rest].float().mean()
        assert found >= zero and not any(p.requires_grad for p in head.parameters())
    with pytest.raises(ValueError, match="text has shape"):
        atlas.fit_tip(features, labels, text[:, :3])
    with pytest.raises(ValueError, match="labels reach 4"):
        atlas.fit_lp_plus(features, labels, text[:3])


def test_crop_and_flip_keeps_a_plain_picture():
    flat = torch.full((4, 3, 8, 8), 0.7)
    torch.testing.assert_close(atlas.crop_and_flip(flat, torch.Generator().manual_seed(0)), flat)
    noise = torch.randn(4, 3, 8, 8)
    assert not torch.allclose(atlas.crop_and_flip(noise, torch.Generator().manual_seed(0)), noise)


# -- files and mistakes ------------------------------------------------------------------------------------------------


def test_coefficients_are_kept_with_their_base(world, tmp_path):
    base, models = world
    composed = atlas.TaskVectorModel(base, models, partitions=3, seed=5)
    nn.init.normal_(composed.values)
    path = tmp_path / "lambda.safetensors"
    atlas.save_coefficients(path, composed)
    kept = atlas.load_coefficients(path)
    state = atlas.scale_task_vectors(base, models, kept)
    for name, value in composed.merged_state().items():
        torch.testing.assert_close(state[name], value)
    assert state["steps"] == 3
    with pytest.raises(ValueError, match="is not the tensor"):
        atlas.scale_task_vectors(models[0], models, kept)
    with pytest.raises(ValueError, match="those of 3"):
        atlas.scale_task_vectors(base, models[:2], kept)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        atlas.load_coefficients(path)
    with pytest.raises(ValueError, match="does not exist"):
        atlas.load_coefficients(tmp_path / "none")


def test_engine_merges_by_a_file_of_coefficients(world, tmp_path):
    from unfused.merge._engine import merge

    base, models = world
    composed = atlas.TaskVectorModel(base, models, partitions=3)
    nn.init.normal_(composed.values)
    path = str(tmp_path / "lambda.safetensors")
    atlas.save_coefficients(path, composed)
    state, states = base.state_dict(), [m.state_dict() for m in models]
    found = merge("atlas", state, states, coefficients=path)
    for name, value in composed.merged_state().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="is not the tensor"):
        merge("atlas", states[0], states, coefficients=path)
    with pytest.raises(ValueError, match="are those of 3 models, 2 are given"):
        merge("atlas", state, states[:2], coefficients=path)


def test_mistakes_are_named(world):
    base, models = world
    state = models[1].state_dict()
    with pytest.raises(ValueError, match=r"models\[1\] lacks 'last.bias'"):
        atlas.TaskVectorModel(base, [models[0], {k: v for k, v in state.items() if k != "last.bias"}])
    with pytest.raises(ValueError, match=r"models\[0\]: 'last.bias' has shape"):
        atlas.TaskVectorModel(base, [state | {"last.bias": torch.zeros(7)}])
    with pytest.raises(ValueError, match=r"models\[0\]: 'last.bias' has values that are not finite"):
        atlas.TaskVectorModel(base, [state | {"last.bias": torch.full((4,), float("nan"))}])
    with pytest.raises(ValueError, match="give a list"):
        atlas.TaskVectorModel(base, models[0])
    with pytest.raises(ValueError, match="partitions=0"):
        atlas.TaskVectorModel(base, models, partitions=0)
    with pytest.raises(ValueError, match="per='row'"):
        atlas.TaskVectorModel(base, models, per="row")
    composed = atlas.TaskVectorModel(base, models)
    data = [task(base)]
    with pytest.raises(TypeError, match="read only once"):
        atlas.learn_few_shot(composed, iter(data))
    with pytest.raises(ValueError, match="batches is empty"):
        atlas.learn_few_shot(composed, [])
    with pytest.raises(ValueError, match="no labels"):
        atlas.learn_few_shot(composed, [data[0][0]])
    with pytest.raises(ValueError, match="schedule='linear'"):
        atlas.learn_few_shot(composed, data, schedule="linear")
    with pytest.raises(ValueError, match="objective='tent'"):
        atlas.learn_unlabelled(composed, data[0][0], objective="tent")
    with pytest.raises(ValueError, match="budget=4"):
        atlas.select_blocks(base, models, data, budget=4)
    with pytest.raises(ValueError, match="coefficients has 2 numbers for 3 models"):
        atlas.anisotropic(torch.zeros(2), [torch.ones(2)] * 3, coefficients=[1.0, 2.0])
    with pytest.raises(ValueError, match="which the base lacks"):
        atlas.scale_task_vectors(base, models, {"nothing": [1, 1, 1]})
