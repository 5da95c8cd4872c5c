"""OGEN against its formulas: the generator, who learns what from which loss, the teacher's window, both classifiers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unfused.label import (
    FeatureGenerator,
    LocalMeanTeacher,
    LocalMeanTeacherCallback,
    OGENClassifier,
    OGENPromptClassifier,
    OGENRegularizer,
)

B, C, NEW, D = 12, 5, 6, 8


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def rows(n):
        return F.normalize(torch.randn(n, D, generator=generator), dim=-1)

    return {"z": rows(B), "y": torch.arange(B) % C, "base": rows(C), "new": rows(NEW)}


def make(batch, **how):
    torch.manual_seed(0)
    regularizer = OGENRegularizer(D, dropout=0.0, **how)
    return regularizer.fit_statistics(batch["z"], batch["y"])


def loss_of(regularizer, batch, epoch=5, **how):
    torch.manual_seed(1)
    return regularizer(
        batch["z"],
        batch["y"],
        batch["base"],
        batch["new"],
        logit_scale=10.0,
        epoch=epoch,
        num_epochs=10,
        **how,
    )


# -- the generator and the statistics ----------------------------------------------------------------------------------


def test_generator_is_attention_plus_mlp():
    torch.manual_seed(0)
    generator = FeatureGenerator(D, num_heads=1, dropout=0.0)
    q, k, v = (torch.randn(3, n, D) for n in (2, 4, 4))
    weights, biases = generator.attention.in_proj_weight.split(D), generator.attention.in_proj_bias.split(D)
    query, key, value = (x @ w.T + b for x, w, b in zip((q, k, v), weights, biases, strict=True))
    mixed = (query @ key.mT / math.sqrt(D)).softmax(-1) @ value
    expected = F.normalize(generator.mlp(q) + generator.attention.out_proj(mixed), dim=-1)
    torch.testing.assert_close(generator(q, k, v), expected)
    with pytest.raises(ValueError, match="num_heads=3 must divide dim=8"):
        FeatureGenerator(D, 3)


def test_statistics(batch):
    regularizer = make(batch)
    for c in range(C):
        mine = batch["z"][batch["y"] == c]
        torch.testing.assert_close(regularizer.means[c], mine.mean(0))
        torch.testing.assert_close(regularizer.deviations[c], mine.std(0))
    cosine = F.cosine_similarity(regularizer.means[:, None], regularizer.means[None], dim=-1)
    cosine.fill_diagonal_(-2)
    assert torch.equal(regularizer.neighbors, cosine.argsort(1, descending=True)[:, :3])
    one_each = OGENRegularizer(D).fit_statistics(batch["z"][:2], torch.arange(2))
    assert not one_each.deviations.any() and one_each.neighbors.tolist() == [[1], [0]]
    for labels in (torch.zeros(B), torch.tensor([0, 2])):
        with pytest.raises(ValueError, match="labels: "):
            OGENRegularizer(D).fit_statistics(batch["z"][: len(labels)], labels)


def test_the_sum_is_that_of_the_paper(batch):
    """Everything by hand, sample by sample."""
    regularizer = make(batch)
    out = loss_of(regularizer, batch)
    torch.manual_seed(1)
    u1, u3 = torch.rand(D), torch.rand(D)
    z, y, base, new = batch.values()
    g, near = regularizer.generator, regularizer.neighbors
    known, unknown = {"mse": 0.0, "ce": 0.0}, {"mse": 0.0, "ce": 0.0}
    ce3 = real = 0.0
    for i in range(B):
        values = regularizer.means[near[y[i]]] + u1 * regularizer.deviations[near[y[i]]]
        z1 = g(base[y[i]][None, None], base[near[y[i]]][None], values[None])[0, 0]
        known["mse"] += (z1 - z[i]).square().sum() / B
        known["ce"] += F.cross_entropy(10 * z1 @ base.T, y[i]) / B
        z2 = g(base[near[y[i]]][None], base[y[i]][None, None], z[i][None, None])[0]
        unknown["mse"] += (z2 - values).square().sum() / (3 * B)
        unknown["ce"] += F.cross_entropy(10 * z2 @ base.T, near[y[i]]) / B
        for c in (base[y[i]] @ new.T).topk(3).indices:
            related = (new[c] @ base.T).topk(3).indices
            values = regularizer.means[related] + u3 * regularizer.deviations[related]
            z3 = g(new[c][None, None], base[related][None], values[None])[0, 0]
            ce3 += F.cross_entropy(10 * z3 @ new.T, c) / (3 * B)
        real += F.cross_entropy(10 * z[i] @ base.T, y[i]) / B
    expected = (
        known["mse"]
        + unknown["mse"]
        + 0.25 * known["ce"]
        + 0.25 / 3 * unknown["ce"]
        + 0.5 / 3 * ce3
        + 0.25 * real
    )
    torch.testing.assert_close(out.ce_known, known["ce"])
    torch.testing.assert_close(out.ce_unknown, ce3)
    torch.testing.assert_close(out.loss, expected)
    assert out.distillation is None


def test_single_extrapolation_is_the_new_text_and_one_image(batch):
    regularizer = make(batch, extrapolation="single")
    z3, new = regularizer.extrapolate(batch["z"], batch["y"], batch["base"], batch["new"])
    assert z3.shape == (B, 3, D)
    attention = regularizer.generator.attention
    value = batch["z"] @ attention.in_proj_weight[2 * D :].T + attention.in_proj_bias[2 * D :]
    expected = (
        regularizer.generator.mlp(batch["new"][new]) + attention.out_proj(value)[:, None]
    )  # no attention left
    torch.testing.assert_close(z3, F.normalize(expected, dim=-1))


def test_joint_extrapolation_depends_on_the_class_alone(batch):
    regularizer = make(batch)
    z3, new = regularizer.extrapolate(batch["z"], batch["y"], batch["base"], batch["new"])
    for c in new.unique():
        same = z3[new == c]
        torch.testing.assert_close(same, same[:1].expand_as(same))


def test_upward_draws_only_ever_add(batch):
    up, both = make(batch), make(batch, spread="symmetric")
    draws = [torch.stack([r._draw(batch["z"]) for _ in range(200)]) for r in (up, both)]
    assert draws[0].min() >= 0 and draws[1].min() < -0.9 and draws[1].max() < 1


# -- who learns what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extrapolation", ["joint", "single"])
@pytest.mark.parametrize("detach", [False, True])
def test_gradients(batch, extrapolation, detach):
    regularizer = make(batch, extrapolation=extrapolation, detach_synthetic=detach)
    base, new = batch["base"].requires_grad_(), batch["new"].requires_grad_()
    weights = list(regularizer.generator.parameters())

    def grads(part):
        return torch.autograd.grad(part, [base, new, *weights], retain_graph=True, allow_unused=True)

    def moves(grad):
        return grad is not None and bool(grad.abs().sum() > 0)

    warm = loss_of(regularizer, batch, epoch=1)
    assert [moves(grad) for grad in grads(warm.loss)[:2]] == [False, False], (
        "the warm-up moves the generator only"
    )
    assert any(map(moves, grads(warm.loss)[2:])) and warm.ce is None
    out = loss_of(regularizer, batch)
    for part in (out.mse_known, out.mse_reverse):
        assert [moves(grad) for grad in grads(part)[:2]] == [False, False]
    for part in (out.ce_known, out.ce_reverse, out.ce):
        assert [moves(grad) for grad in grads(part)[:2]] == [True, False]
    assert [moves(grad) for grad in grads(out.ce_unknown)[:2]] == [False, True]
    for part in (out.ce_known, out.ce_reverse, out.ce_unknown):
        assert any(map(moves, grads(part)[2:])) == (not detach)
    assert not any(map(moves, grads(out.ce)[2:]))


def test_new_texts_learn_through_the_generated_features_too(batch):
    """CE(z3) moves the new texts as classifier and as query; detached, as classifier alone."""
    new = batch["new"].requires_grad_()
    through = [
        torch.autograd.grad(loss_of(make(batch, detach_synthetic=detach), batch).ce_unknown, new)[0]
        for detach in (False, True)
    ]
    assert not torch.allclose(*through)


def test_keys_and_queries_of_known_classes_are_detached(batch):
    """Were the known texts not detached as Q and K, CE would give them another gradient than the logits' alone."""
    regularizer = make(batch)
    base = batch["base"].requires_grad_()
    torch.manual_seed(1)
    out = loss_of(regularizer, batch)
    (found,) = torch.autograd.grad(out.ce_known, base)
    torch.manual_seed(1)
    near = regularizer.neighbors[batch["y"]]
    values = regularizer.means[near] + torch.rand(D) * regularizer.deviations[near]
    fixed = base.detach()
    z1 = regularizer.generator(fixed[batch["y"]][:, None], fixed[near], values)[:, 0].detach()
    (expected,) = torch.autograd.grad(F.cross_entropy(10 * z1 @ base.T, batch["y"]), base)
    torch.testing.assert_close(found, expected)


def test_an_image_side_tuner_meets_generated_features(batch):
    layer = nn.Linear(D, D)

    def adapt(x):
        return F.normalize(layer(x), dim=-1)

    regularizer = make(batch, detach_synthetic=True)
    out = loss_of(regularizer, batch, adapt=adapt)
    for part in (out.ce_known, out.ce_reverse, out.ce_unknown, out.ce):
        assert torch.autograd.grad(part, layer.weight, retain_graph=True)[0].abs().sum() > 0


def test_distillation(batch):
    regularizer = make(batch, distill_weight=2.0)
    everything = torch.cat([batch["base"], batch["new"]])
    same = loss_of(regularizer, batch, teacher=lambda x: 10 * x @ everything.T)
    assert same.distillation < 1e-10
    other = loss_of(regularizer, batch, teacher=lambda x: torch.zeros(len(x), C + NEW))
    without = loss_of(regularizer, batch)
    assert other.distillation > 0
    torch.testing.assert_close(other.loss, without.loss + 2 * other.distillation)
    assert loss_of(regularizer, batch, epoch=1, teacher=lambda x: 1 / 0).distillation is None


def test_without_unknown_classes_and_with_few(batch):
    regularizer = make(batch)
    for new in (None, batch["new"][:0]):
        torch.manual_seed(1)
        out = regularizer(batch["z"], batch["y"], batch["base"], new, 10.0, epoch=5, num_epochs=10)
        assert out.ce_unknown is None and torch.isfinite(out.loss)
    one = regularizer(batch["z"], batch["y"], batch["base"], batch["new"][:1], 10.0, epoch=5, num_epochs=10)
    assert one.ce_unknown < 1e-6, "a single unknown class is always right"


def test_regularizer_settings(batch):
    for how, match in (
        ({"extrapolation": "both"}, "extrapolation='both'"),
        ({"spread": "down"}, "spread='down'"),
        ({"k": 0}, "k=0"),
        ({"weights": (1, 1)}, "weights="),
    ):
        with pytest.raises(ValueError, match=match):
            OGENRegularizer(D, **how)
    with pytest.raises(RuntimeError, match="fit_statistics"):
        OGENRegularizer(D)(batch["z"], batch["y"], batch["base"], epoch=0, num_epochs=1)


# -- the teacher -------------------------------------------------------------------------------------------------------


def test_window_grows_and_the_average_starts_anew():
    teacher, layer = LocalMeanTeacher(m_min=1, m_max=4, decay=0.7), nn.Linear(1, 1, bias=False)
    epochs = 12
    assert [teacher.window(t, epochs) for t in range(epochs + 1)] == sorted(
        teacher.window(t, epochs) for t in range(epochs + 1)
    )
    assert (teacher.window(0, epochs), teacher.window(epochs, epochs)) == (1, 4)
    seen = []
    for epoch in range(epochs):
        seen.append(float(epoch**2))
        nn.init.constant_(layer.weight, seen[-1])
        teacher.update(layer, epoch, epochs)
        recent = seen[-(teacher.window(epoch, epochs) + 1) :]
        average = recent[0]
        for value in recent[1:]:
            average = 0.7 * average + 0.3 * value
        assert teacher.module.weight.item() == pytest.approx(average, rel=1e-5)
    assert len(teacher.checkpoints) == 5 and not teacher.module.weight.requires_grad
    with pytest.raises(ValueError, match="m_min=3, m_max=2"):
        LocalMeanTeacher(3, 2)
    with pytest.raises(ValueError, match="decay=2"):
        LocalMeanTeacher(decay=2)
    with pytest.raises(RuntimeError, match="before the first update"):
        _ = LocalMeanTeacher().module


def test_callback_of_the_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tuner = nn.Linear(2, 1)

        def forward(self, x, labels=None):
            return {"loss": (self.tuner(x) - labels).square().mean()}

    model, teacher = Model(), LocalMeanTeacher(m_min=1, m_max=2, decay=0.5)
    data = [{"x": torch.randn(2), "labels": torch.ones(1)} for _ in range(8)]
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(
        model, arguments, train_dataset=data, callbacks=[LocalMeanTeacherCallback(teacher, model.tuner)]
    ).train()
    assert len(teacher.checkpoints) == 3
    torch.testing.assert_close(teacher.checkpoints[-1]["weight"], model.tuner.weight.detach())
    assert teacher.module.weight.shape == (1, 2)


# -- the classifiers ---------------------------------------------------------------------------------------------------


def world(seed=0, rows=40, classes=8, dim=16):
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(classes, dim))
    y = np.arange(rows) % (classes - 3)
    return text[y] + 0.6 * rng.normal(size=(rows, dim)), y, text[: classes - 3], text[classes - 3 :]


SMALL = {"epochs": 5, "logit_scale": 20.0, "random_state": 0}


def test_training_starts_at_zero_shot():
    X, _y, base, new = world()
    y = np.arange(40) % 5
    clf = OGENClassifier(base, new, epochs=1, learning_rate=1e-12, logit_scale=20.0, random_state=0).fit(X, y)
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (X, base)]
    np.testing.assert_allclose(clf.decision_function(X), 20 * unit[0] @ unit[1].T, atol=1e-4)


@pytest.mark.parametrize("tuner", ["image", "text", "both"])
@pytest.mark.parametrize(
    ("synthetic", "teacher"), [("generator", "local"), ("generator", "ema"), ("text", None), (None, None)]
)
def test_every_variant_learns(tuner, synthetic, teacher):
    X, y, base, new = world()
    names = np.array(["a", "b", "c", "d", "e"])[y]
    clf = OGENClassifier(
        base, new, tuner=tuner, synthetic=synthetic, teacher=teacher, batch_size=16, **SMALL
    ).fit(X, names)
    assert clf.score(X, names) > 0.9 and len(clf.loss_curve_) == 5 and np.isfinite(clf.loss_curve_).all()
    tuned = {"image": [True, False], "text": [False, True], "both": [True, True]}[tuner]
    assert [len(clf.image_down_) > 0, len(clf.text_down_) > 0] == tuned
    np.testing.assert_allclose(clf.logits(X, base), clf.decision_function(X), atol=1e-6)
    assert clf.logits(X, new).shape == (40, 3)


def test_it_does_not_depend_on_names_or_their_order():
    X, y, base, new = world()
    one = OGENClassifier(base, new, **SMALL).fit(X, y)
    two = OGENClassifier(base[::-1], new, classes=[4, 3, 2, 1, 0], **SMALL).fit(X, y)
    np.testing.assert_allclose(one.decision_function(X), two.decision_function(X), atol=1e-5)
    scaled = OGENClassifier(3 * base, new, **SMALL).fit(7 * X, y)
    np.testing.assert_allclose(one.decision_function(X), scaled.decision_function(X), atol=1e-3)


def test_the_generator_is_not_trained_without_synthetic_features():
    X, y, base, new = world()
    plain = OGENClassifier(base, new, synthetic=None, **SMALL).fit(X, y)
    same = OGENClassifier(base, None, synthetic=None, teacher=None, k=1, **SMALL).fit(X, y)
    assert plain.score(X, y) == same.score(X, y)
    assert not np.allclose(plain.image_up_, OGENClassifier(base, new, **SMALL).fit(X, y).image_up_)


def test_saved_without_pickle(tmp_path):
    from unfused.label import load, save

    X, y, base, new = world()
    clf = OGENClassifier(base, new, **SMALL).fit(X, y)
    save(clf, tmp_path / "clf")
    np.testing.assert_array_equal(load(tmp_path / "clf").decision_function(X), clf.decision_function(X))


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"tuner": "prompt"}, "tuner='prompt'"),
        ({"synthetic": "gan"}, "synthetic='gan'"),
        ({"teacher": "oracle"}, "teacher='oracle'"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"logit_scale": -1}, "logit_scale=-1"),
        ({"reduction": 0}, "reduction=0"),
        ({"new_text_features": np.ones((2, 3))}, "new_text_features has 3 columns"),
        ({"text_features": np.ones((5, 3))}, "text_features has 3 columns"),
        ({"text_features": np.ones((4, 16))}, "has 4 rows, y has 5 classes"),
        ({"text_features": np.ones((6, 16)), "classes": range(6)}, "class 5 has no sample"),
        ({"classes": [0, 0, 1, 2, 3]}, "more than once"),
    ],
)
def test_bad_settings(how, match):
    X, y, base, new = world()
    with pytest.raises(ValueError, match=match):
        OGENClassifier(**({"text_features": base, "new_text_features": new, "epochs": 1} | how)).fit(X, y)


def test_bad_input():
    X, y, base, new = world()
    clf = OGENClassifier(base, new, **SMALL)
    with pytest.raises(ValueError, match="one class"):
        OGENClassifier(**SMALL).fit(X[y == 0], y[y == 0])
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            clf.fit(np.where(np.arange(16) == 3, bad, X), y)
    zeros = np.where(np.arange(40)[:, None] == 7, 0, X)  # a row of norm 0 is kept and tells nothing
    assert np.isfinite(clf.fit(zeros, y).decision_function(zeros)).all()
    one_each = clf.fit(X[:5], y[:5])
    assert np.isfinite(one_each.predict_proba(X)).all()


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    from unfused.claims.lab import image_text

    torch.manual_seed(0)
    return image_text._untrained(32, 1), image_text._tokenizer()


def prompts(clip, **how):
    model, tokenizer = clip
    small = {"epochs": 3, "new_names": ["red star", "pink bar"], "template": "{} {}", "random_state": 0}
    return OGENPromptClassifier(model, tokenizer, **small | how)


def test_prompts_start_at_their_words_and_leave_the_model_alone(clip):
    model, tokenizer = clip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    X, names = (
        np.random.default_rng(0).normal(size=(12, 64)),
        np.array(["red circle", "blue ring", "pink star"] * 4),
    )
    clf = prompts(clip, epochs=1, learning_rate=1e-12).fit(X, names)
    assert clf.classes_.tolist() == ["blue ring", "pink star", "red circle"] and clf.context_.shape == (4, 64)
    text = tokenizer([f"a photo of a {name}" for name in clf.classes_], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = F.normalize(model.get_text_features(**text).pooler_output, dim=-1).numpy()
    np.testing.assert_allclose(clf.text_features_, expected, atol=1e-5)
    np.testing.assert_allclose(clf.encode(["pink star", "red star"])[0], expected[1], atol=1e-5)
    np.testing.assert_allclose(clf.encode(["red star"])[0], clf.new_text_features_[0], atol=1e-5)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.text_model.embeddings.token_embedding._forward_hooks
    assert clf.logit_scale_ == pytest.approx(float(model.logit_scale.detach().exp()))


@pytest.mark.parametrize(("synthetic", "teacher"), [("generator", "local"), (None, None)])
def test_prompts_learn(clip, synthetic, teacher):
    names = np.array(["red circle", "blue ring", "pink star"] * 8)
    centres = np.random.default_rng(0).normal(size=(3, 64))
    X = centres[np.arange(24) % 3] + 0.1 * np.random.default_rng(1).normal(size=(24, 64))
    clf = prompts(clip, epochs=8, learning_rate=0.3, synthetic=synthetic, teacher=teacher).fit(X, names)
    assert clf.loss_curve_[-1] < clf.loss_curve_[0 if synthetic is None else 3]
    assert np.allclose(np.linalg.norm(clf.text_features_, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"names": ["a"]}, "names has 1 entries"),
        ({"new_names": ["red circle"]}, "more than once"),
        ({"new_names": [" "]}, "empty name"),
        ({"template": "{}"}, "needs two"),
        ({"context": ""}, "context=''"),
        ({"learning_rate": -1}, "learning_rate=-1"),
    ],
)
def test_prompts_bad_settings(clip, how, match):
    X, names = np.ones((4, 64)), np.array(["red circle", "blue ring"] * 2)
    with pytest.raises(ValueError, match=match):
        prompts(clip, **how).fit(X, names)


def test_prompts_bad_input(clip):
    names = np.array(["red circle", "blue ring"] * 2)
    with pytest.raises(ValueError, match="X has 5 features, the model's texts 64"):
        prompts(clip).fit(np.ones((4, 5)), names)
    with pytest.raises(ValueError, match="one class"):
        prompts(clip).fit(np.ones((4, 64)), names[[0, 0, 0, 0]])
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    )
    with pytest.raises(ValueError, match="give an image-text model"):
        OGENPromptClassifier(bert, clip[1]).fit(np.ones((4, 8)), names)
