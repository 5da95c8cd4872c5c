"""The distillation loss against a naive reference, and what its arguments promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unfused.pretrain.unfused import UnFuSeD

K = 5


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def naive_loss(c, auxiliary, targets, weights, alpha=0.7, beta=0.3, gamma=0.003):
    """The card's formula on numpy arrays, item by item."""

    def cross_entropy(logits):
        losses = [-(t * np.log(p)).sum() for t, p in zip(targets, softmax(logits), strict=True)]
        return np.average(losses, weights=weights)

    def kl(logits):
        return np.mean([(a * np.log(a / b)).sum() for a, b in zip(softmax(c), softmax(logits), strict=True)])

    def cosine(logits):
        return np.mean(
            [2 - 2 * a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(c, logits, strict=True)]
        )

    return (
        cross_entropy(c)
        + alpha * sum(map(cross_entropy, auxiliary))
        + beta * sum(map(kl, auxiliary))
        + gamma * sum(map(cosine, auxiliary))
    )


def arrays(out):
    return out.logits.detach().double().numpy(), [p.detach().double().numpy() for p in out.aux_logits]


@pytest.fixture
def labels():
    return torch.arange(24) % K


@pytest.mark.parametrize("detach_teacher", [True, False])
def test_the_loss_is_the_papers(encoder, inputs, labels, detach_teacher):
    out = UnFuSeD(encoder, K, detach_teacher=detach_teacher)(input_values=inputs, labels=labels)
    expected = naive_loss(*arrays(out), np.eye(K)[labels], np.ones(24))
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    assert out.logits.shape == (24, K) and [p.shape for p in out.aux_logits] == [(24, K)] * 2
    parts = out.terms
    total = parts["cross_entropy"] + 0.7 * parts["auxiliary"] + 0.3 * parts["kl"] + 0.003 * parts["cosine"]
    torch.testing.assert_close(total, out.loss.detach())
    assert not any(term.requires_grad for term in parts.values())


def test_soft_labels_and_weights(encoder, inputs):
    targets, weights = torch.rand(24, K).softmax(1), torch.rand(24)
    out = UnFuSeD(encoder, K)(input_values=inputs, labels=targets, label_weights=weights)
    assert out.loss.item() == pytest.approx(
        naive_loss(*arrays(out), targets.numpy(), weights.numpy()), rel=1e-5
    )


def test_one_hot_rows_are_ids(encoder, inputs, labels):
    student = UnFuSeD(encoder, K)
    hard = student(input_values=inputs, labels=labels)
    soft = student(input_values=inputs, labels=torch.eye(K)[labels])
    torch.testing.assert_close(hard.loss, soft.loss)


def test_minus_one_and_rows_of_zeros_have_no_cross_entropy(encoder, inputs, labels):
    student = UnFuSeD(encoder, K)
    ids = labels.clone()
    ids[::3] = -1
    out = student(input_values=inputs, labels=ids)
    counted = (ids >= 0).numpy().astype(float)
    assert out.loss.item() == pytest.approx(naive_loss(*arrays(out), np.eye(K)[labels], counted), rel=1e-5)
    rows = torch.eye(K)[labels] * (ids >= 0)[:, None]
    torch.testing.assert_close(student(input_values=inputs, labels=rows).loss, out.loss)

    nothing = student(input_values=inputs, labels=torch.full_like(ids, -1))
    assert nothing.terms["cross_entropy"] == 0 and torch.isfinite(nothing.loss) and nothing.terms["kl"] > 0


def test_the_teacher_gets_no_gradient_from_self_distillation_unless_asked(encoder, inputs):
    def gradient(detach_teacher):
        student = UnFuSeD(encoder, K, alpha=0.0, beta=1.0, gamma=1.0, detach_teacher=detach_teacher)
        student(input_values=inputs, labels=torch.full((24,), -1)).loss.backward()
        return student.classifier.weight.grad

    assert not gradient(True).any()
    assert gradient(False).any()


def test_heads_are_three_layer_projectors_of_width_k_without_bias(encoder):
    student = UnFuSeD(encoder, K)
    linear = [m for m in student.heads.modules() if isinstance(m, torch.nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(K, 16), (K, K), (K, K), (K, 12), (K, K), (K, K)]
    assert all(m.bias is None for m in linear)


def test_it_learns_the_clusters(encoder, inputs, noise):
    torch.manual_seed(0)
    student = UnFuSeD(encoder, 4, augment=noise)
    labels = torch.arange(24) // 6
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(40):
        student(input_values=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    predicted = student.eval()(input_values=inputs, labels=labels).logits.argmax(1)
    assert (predicted == labels).float().mean() > 0.9


@pytest.mark.parametrize("bad", [torch.zeros(24, K + 1), torch.zeros(24, K, 2)])
def test_labels_of_a_wrong_shape_are_refused(encoder, inputs, bad):
    with pytest.raises(ValueError, match="labels of shape"):
        UnFuSeD(encoder, K)(input_values=inputs, labels=bad)


def test_one_cluster_is_refused(encoder):
    with pytest.raises(ValueError, match="num_clusters=1"):
        UnFuSeD(encoder, 1)
