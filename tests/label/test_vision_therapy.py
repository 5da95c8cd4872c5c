"""Vision therapy against plain loops, its verifiers when they misbehave, its fine-tuning, and a tiny LLaVA as verifier."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import unfused.train
from unfused.label import (
    TherapyInfo,
    TherapyStudent,
    TransformersVerifier,
    VisionTherapy,
    therapy_fine_tune,
    therapy_loss,
)

C = 5
NAMES = [f"c{i}" for i in range(C)]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def world(n_support=40, n=30, seed=0):
    """Images are (number, class) pairs; the classifier confuses neighbours."""
    rng = np.random.default_rng(seed)
    confusion = 2.0 * np.eye(C) + 1.6 * np.roll(np.eye(C), 1, axis=1)
    y = np.arange(n_support + n) % C
    probs = softmax(confusion[y] + rng.normal(size=(len(y), C)))
    images = [(i, int(c)) for i, c in enumerate(y)]
    s = slice(n_support)
    t = slice(n_support, None)
    return (images[s], y[s], probs[s]), (images[t], y[t], probs[t])


def knowing(images, captions, answers):
    """Mostly right, a little different for each triplet, so that means and ties can be told apart."""
    asked = captions[2].split(" of ")[1].split(",")[0]
    noise = (images[0][0] * 31 + images[1][0] * 17 + images[2][0] * 7) % 10 / 50
    return 0.75 + noise if asked == f"c{images[2][1]}" else 0.1 + noise


class Many:
    """The same, in batches."""

    batch_size = 7

    def __init__(self):
        self.sizes = []

    def __call__(self, images, captions, answers):
        self.sizes.append(len(images))
        return [knowing(*row) for row in zip(images, captions, answers, strict=True)]


def fitted(verifier=knowing, support=None, **how):
    images, y, probs = support or world()[0]
    return VisionTherapy(verifier, **{"n_candidates": 3, "random_state": 0, **how}).fit(
        images, y, probs, names=NAMES
    )


def naive(support, target, N, M, threshold, order, verifier):
    """The card, line by line, on sorted Python lists; every class has the same number of support images, all kept."""
    images, y, probs = support
    T = np.array([probs[y == c].mean(0) for c in range(C)])
    T = (T - T.min()) / (T.max() - T.min())
    labels, scores, calls = [], [], []
    for x, s in zip(target[0], target[2], strict=True):
        p, conf = int(s.argmax()), s.max()
        by = T[:, p] if order == "transition" else s
        cut = [p, *[c for c in np.argsort(-by) if c != p][: N - 1]]
        cut = [p, *sorted(cut[1:], key=lambda c: -s[c])]
        exemplars = {
            c: [images[k] for k in sorted(np.flatnonzero(y == c), key=lambda k: abs(probs[k, p] - s[p]))[:M]]
            for c in cut
        }
        q = []
        for i, c in enumerate(cut):
            own = exemplars[c]
            against = exemplars[cut[1]] if i == 0 else own[1:] + own[:1]
            sentences = [
                f"This image <img> shows a photo of {NAMES[k]}, True or False? Answer:" for k in (p, c, c)
            ]
            q.append(
                np.mean(
                    [
                        verifier([a, b, x], sentences, ["False", "True", None])
                        for a, b in zip(against, own, strict=True)
                    ]
                )
            )
            if i == 0 and (q[0] + conf) / 2 >= threshold:
                break
        labels.append(p if len(q) == 1 else cut[int(np.argmax(q))])
        scores.append(q + [np.nan] * (N - len(q)))
        calls.append(M * len(q))
    return np.array(labels), np.array(scores), np.array(calls), T


@pytest.mark.parametrize("order", ["transition", "confidence"])
@pytest.mark.parametrize("verifier", [knowing, Many()], ids=["single", "batched"])
def test_it_is_what_the_card_says(order, verifier):
    support, target = world()
    vt = fitted(verifier, support, candidate_order=order, accept_threshold=0.65)
    labels, info = vt.relabel(target[0], target[2])
    want, scores, calls, T = naive(support, target, 3, 3, 0.65, order, knowing)
    assert np.allclose(vt.transition_matrix_, T)
    assert np.array_equal(labels, want) and np.allclose(info.scores, scores, equal_nan=True)
    assert np.array_equal(info.calls, calls) and set(info.calls) == {3, 9}
    assert np.array_equal(info.accepted, calls == 3) and not info.failures
    assert np.array_equal(info.targets, np.where(info.accepted, -1, labels))
    before = (target[2].argmax(1) == target[1]).mean()
    assert (labels == target[1]).mean() > before + 0.1
    if isinstance(verifier, Many):
        assert max(verifier.sizes) == 7  # full batches, over images and candidates


def test_candidates_come_from_the_column_of_the_matrix_and_are_cut_before_they_are_sorted():
    """Truth 0 is taken for 1, truth 1 for 2: candidates for a prediction of 1 are 1 and 0, whatever else is probable."""
    probs = np.array([[0.3, 0.7, 0.0, 0.0], [0.0, 0.4, 0.6, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    vt = VisionTherapy(lambda *_: 0.5, n_candidates=2, labeling_budget=2).fit(
        list("abcd"), [0, 1, 2, 3], probs
    )
    query = np.array([[0.05, 0.5, 0.4, 0.05]])
    assert vt.relabel(["x"], query)[1].candidates.tolist() == [[1, 0]]
    assert vt.set_params(candidate_order="confidence").relabel(["x"], query)[1].candidates.tolist() == [
        [1, 2]
    ]
    vt.set_params(candidate_order="transition", n_candidates=3)
    assert vt.relabel(["x"], query)[1].candidates.tolist() == [[1, 2, 0]]  # then by probability


def test_random_candidates_hold_p_first_and_do_not_depend_on_the_batches():
    support, target = world()
    found = [
        fitted(verifier, support, candidate_order="random").relabel(target[0], target[2])[1].candidates
        for verifier in (knowing, Many())
    ]
    assert np.array_equal(*found) and np.array_equal(found[0][:, 0], target[2].argmax(1))
    assert all(len(set(row)) == 3 for row in found[0].tolist())
    other = fitted(knowing, support, candidate_order="random", random_state=1).relabel(target[0], target[2])[
        1
    ]
    assert not np.array_equal(other.candidates, found[0])


def test_the_exemplars_are_the_nearest_by_confidence_or_by_cosine():
    images, y, probs = (
        ["a0", "a1", "a2", "b0", "b1"],
        [0, 0, 0, 1, 1],
        [[0.9, 0.1], [0.6, 0.4], [0.5, 0.5], [0.2, 0.8], [0.4, 0.6]],
    )
    features = [[1, 0], [0, 1], [1, 1], [0, 1], [1, 0]]
    seen = []

    def verifier(images, captions, answers):
        seen.append((*images, *(caption[-2] for caption in captions), *answers))
        return 0.1

    vt = VisionTherapy(
        verifier, n_candidates=2, n_exemplars=2, template="This image <img> shows a photo of {name}?"
    )
    vt.fit(images, y, probs, features=features).relabel(["x"], [[0.63, 0.37]])
    rest = ("False", "True", None)
    assert seen == [
        ("b1", "a1", "x", "0", "0", "0", *rest),  # of p: an image of the next candidate, said to be p
        ("b0", "a2", "x", "0", "0", "0", *rest),
        ("b0", "b1", "x", "0", "1", "1", *rest),  # of another: its own images, one said to be p
        ("b1", "b0", "x", "0", "1", "1", *rest),
    ]
    seen.clear()
    vt.set_params(retrieval="features").fit(images, y, probs, features=features)
    vt.relabel(["x"], [[0.63, 0.37]], features=[[1, 0.1]])
    assert [row[1] for row in seen] == ["a0", "a2", "b1", "b0"]


def test_support_ranks_are_regular_and_a_class_may_have_few():
    images = list(range(12))
    y = [0] * 9 + [1] * 3
    probs = np.array([[0.5 + 0.05 * i, 0.5 - 0.05 * i] for i in range(9)] + [[0.2, 0.8]] * 3)
    vt = VisionTherapy(lambda *_: 0.9, labeling_budget=3, n_stored=5, n_exemplars=4).fit(images, y, probs)
    raw = np.array([probs[[0, 4, 8]].mean(0), [0.2, 0.8]])
    assert np.allclose(vt.transition_matrix_, (raw - raw.min()) / (raw.max() - raw.min()))
    assert [vt.exemplars_[i] for i in vt.exemplar_rows_[0]] == [8, 6, 4, 2, 0]
    assert vt.exemplar_rows_[1].tolist() == [5, 6, 7, -1, -1]
    assert vt.relabel(["x"], [[0.1, 0.9]])[1].calls.tolist() == [3]  # rounds: as many as there are


def test_classes_without_support_are_no_candidates():
    images, y, probs = world()[0]
    keep = y != 2
    vt = VisionTherapy(knowing, n_candidates=5).fit(
        [image for image, k in zip(images, keep, strict=True) if k],
        y[keep],
        probs[keep],
        classes=range(C),
        names=NAMES,
    )
    _, (target, _, p) = world()
    labels, info = vt.relabel(target, p)
    of_2 = p.argmax(1) == 2
    assert of_2.any() and set(info.status[of_2]) == {"no exemplars"} and (labels[of_2] == 2).all()
    assert info.candidates.shape == (30, 4) and not (info.candidates[~of_2] == 2).any()
    assert not info.calls[of_2].any() and not vt.transition_matrix_[2].any()


def test_string_labels_in_the_order_of_the_columns():
    (images, y, probs), (target, _, p) = world()
    words = np.array(["elk", "ant", "dog", "bee", "cow"])
    vt = VisionTherapy(knowing, n_candidates=3).fit(images, words[y], probs, classes=words, names=NAMES)
    assert np.array_equal(vt.relabel(target, p)[0], words[fitted().relabel(target, p)[0]])
    order = np.argsort(words)  # without `classes`: scikit-learn's order
    sorted_ = VisionTherapy(knowing, n_candidates=3).fit(
        images, words[y], probs[:, order], names=np.array(NAMES)[order]
    )
    assert np.array_equal(sorted_.relabel(target, p[:, order])[0], vt.relabel(target, p)[0])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_order_of_images_and_classes_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    (images, y, probs), (target, _, p) = world()
    labels, info = fitted().relabel(target, p)
    a, b, c = rng.permutation(len(y)), rng.permutation(len(p)), rng.permutation(C)
    place = np.argsort(c)
    vt = VisionTherapy(knowing, n_candidates=3, random_state=seed)
    vt.fit([images[i] for i in a], place[y[a]], probs[a][:, c], names=[NAMES[i] for i in c])
    again, info_again = vt.relabel([target[i] for i in b], p[b][:, c])
    assert np.array_equal(c[again], labels[b]) and np.allclose(
        info_again.scores, info.scores[b], equal_nan=True
    )


def test_temperature():
    rng = np.random.default_rng(0)
    y = np.arange(400) % C
    logits = 1.5 * np.eye(C)[y] + rng.normal(size=(400, C))
    sharp = VisionTherapy(knowing, temperature="support").fit(range(400), y, softmax(5 * logits))
    plain = VisionTherapy(knowing, temperature="support").fit(range(400), y, softmax(logits))
    assert (
        sharp.temperature_ == pytest.approx(5 * plain.temperature_, rel=0.01)
        and 0.4 < plain.temperature_ < 1.2
    )
    assert np.allclose(sharp.transition_matrix_, plain.transition_matrix_, atol=1e-3)
    assert np.allclose(fitted(temperature=2.0).exemplar_probs_.sum(1), 1)


# -- verifiers that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rubbish",
    [float("nan"), 1.5, -0.1, None, "True", [0.1, 0.2], object()],
    ids=["nan", "above 1", "below 0", "none", "text", "list", "object"],
)
def test_rubbish_for_one_image_costs_that_image(rubbish):
    _, (target, _, p) = world()
    whole, info = fitted().relabel(target, p)
    sick = int(np.flatnonzero(info.status == "therapy")[0])

    def verifier(images, captions, answers):
        return rubbish if images[2] == target[sick] else knowing(images, captions, answers)

    vt = fitted(verifier)
    labels, found = vt.relabel(target, p)
    assert found.status[sick] == "failed" and labels[sick] == p[sick].argmax() and found.targets[sick] == -1
    others = np.arange(len(target)) != sick
    assert np.array_equal(labels[others], whole[others])
    assert [f["image"] for f in found.failures] == [sick] * 3 and all(
        "returned" in f["reason"] for f in found.failures
    )
    # repaired, only that image is asked about again
    mended, again = vt.set_params(verifier=knowing).relabel(target, p, resume=found)
    assert np.array_equal(mended, whole) and not again.failures and again.calls.sum() == info.calls.sum() + 3


def test_rounds_and_candidates_without_an_answer_are_left_out():
    _, (target, truth, p) = world()
    _, info = fitted(accept_threshold=2).relabel(target, p)
    sick = int(np.flatnonzero((info.chosen == truth) & (info.chosen != info.predicted))[0])
    seen = []

    def verifier(images, captions, answers):
        if images[2] == target[sick]:
            seen.append(captions[2])
            if len(seen) == 2 or f"of c{truth[sick]}," in captions[2]:
                raise RuntimeError("no luck\nat all")
        return knowing(images, captions, answers)

    labels, found = fitted(verifier, accept_threshold=2).relabel(target, p)
    assert found.status[sick] == "therapy" and labels[sick] != truth[sick]
    assert len(found.failures) == 4 and {f["reason"] for f in found.failures} == {"RuntimeError: no luck"}
    assert np.isnan(found.scores[sick]).sum() == 1 and found.calls[sick] == 9


def test_a_batch_that_fails_is_asked_one_by_one_and_becomes_smaller():
    support, target = world()
    limited = Many()
    calls = []

    def verifier(images, captions, answers):
        calls.append(len(images))
        if len(images) > 2:
            raise MemoryError("too many")
        return limited(images, captions, answers)

    labels, info = fitted(verifier, support, batch_size=8).relabel(target[0], target[2])
    assert np.array_equal(labels, fitted().relabel(target[0], target[2])[0]) and not info.failures
    assert sorted({size for size in calls if size > 2}) == [4, 8] and calls.count(8) == calls.count(4) == 1

    def short(images, *_):
        return [0.5] * (len(images) - 1)

    with pytest.warns(UserWarning, match="0 numbers for 1 questions"):
        _, info = fitted(short, support, batch_size=8).relabel(target[0], target[2])
    assert set(info.status) == {"failed", "pending"} and len(info.failures) == 20


def test_a_verifier_that_hangs_or_dies_stops_the_run_and_nothing_is_lost(tmp_path):
    _, (target, _, p) = world()
    whole, _ = fitted().relabel(target, p)
    left = [40]

    def verifier(images, captions, answers):
        left[0] -= 1
        if left[0] < 0:
            time.sleep(1.5)
        return knowing(images, captions, answers)

    vt = fitted(verifier, timeout=0.3, max_failures=3)
    path = tmp_path / "therapy.safetensors"
    with pytest.warns(UserWarning, match=r"3 times in a row \(TimeoutError: no answer within 0.3 s\)"):
        labels, info = vt.relabel(target, p, checkpoint=path)
    done = info.status != "pending"
    assert 0 < done.sum() < len(target) and np.array_equal(
        labels[done & (info.status != "failed")], whole[done & (info.status != "failed")]
    )
    assert np.array_equal(labels[~done], p[~done].argmax(1))
    asked = []
    vt.set_params(
        timeout=None, verifier=lambda images, *rest: asked.append(images[2]) or knowing(images, *rest)
    )
    labels, again = vt.relabel(target, p, checkpoint=path)
    assert np.array_equal(labels, whole) and not again.failures
    assert not {target[i] for i in np.flatnonzero(done & (info.status != "failed"))} & set(asked)
    assert TherapyInfo.load(path).status.tolist() == again.status.tolist()


def test_an_interrupted_run_goes_on_from_info_(tmp_path):
    _, (target, _, p) = world()
    whole, info = fitted().relabel(target, p)
    left = [int(info.calls[:9].sum()) + 4]

    def verifier(*question):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return knowing(*question)

    vt = fitted(verifier)
    with pytest.raises(KeyboardInterrupt):
        vt.relabel(target, p)
    assert (vt.info_.status[:9] != "pending").all() and (vt.info_.status[9:] == "pending").all()
    labels, found = vt.set_params(verifier=knowing).relabel(target, p, resume=vt.info_)
    assert np.array_equal(labels, whole) and found.status.tolist() == info.status.tolist()
    with pytest.raises(ValueError, match="other images"):
        vt.relabel(target[::-1], p[::-1], resume=found)
    with pytest.raises(ValueError, match="other settings"):
        vt.set_params(accept_threshold=0.9).relabel(target, p, resume=found)
    (tmp_path / "broken").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="delete it"):
        vt.relabel(target, p, checkpoint=tmp_path / "broken")


def test_a_part_of_the_images_then_the_rest():
    _, (target, _, p) = world()
    steps = []
    vt = fitted()
    labels, info = vt.relabel(
        target, p, max_images=10, progress=lambda done, todo: steps.append((done, todo))
    )
    assert (info.calls > 0).sum() == 10 and (info.status == "pending").sum() == 20 and steps[-1] == (10, 10)
    labels, info = vt.relabel(target, p, resume=info)
    assert np.array_equal(labels, fitted().relabel(target, p)[0])
    assert vt.relabel(target, p, max_images=0)[1].calls.sum() == 0


def test_a_target_that_is_in_the_support_is_pointed_out():
    (_, y, probs), _ = world()
    pictures = [np.full((2, 2), i, np.uint8) for i in range(len(y))]
    vt = VisionTherapy(lambda *_: 1.0).fit(pictures, y, probs)
    with pytest.warns(UserWarning, match="image 1 is in the support"):
        vt.relabel([np.full((2, 2), 99, np.uint8), pictures[3].copy()], probs[:2])


@pytest.mark.parametrize(
    ("how", "fit", "match"),
    [
        ({}, {"probs": np.full((40, C), 1.0)}, "sum to 1"),
        ({}, {"probs": np.full((40, C), np.nan)}, "NaN"),
        ({}, {"probs": np.eye(C)[:3]}, "3 rows for 40 images"),
        ({}, {"y": np.zeros(40, int), "classes": range(C)}, "one class"),
        ({}, {"y": np.zeros(3, int)}, r"shape \(3,\)"),
        ({}, {"classes": ["a"] * C}, "more than once"),
        ({}, {"classes": range(4)}, "5 columns for 4 classes"),
        ({}, {"classes": range(1, 6)}, "holds 0"),
        ({}, {"names": ["a", "b", "c", "d", " "]}, "empty name"),
        ({}, {"names": ["a"]}, "1 entries for 5"),
        ({"retrieval": "features"}, {}, "features=None"),
        ({"retrieval": "features"}, {"features": np.ones((3, 2))}, "3 rows for 40"),
        ({"retrieval": "best"}, {}, "retrieval='best'"),
        ({"candidate_order": "row"}, {}, "candidate_order='row'"),
        ({"n_candidates": 1}, {}, "n_candidates=1"),
        ({"n_exemplars": 0}, {}, "n_exemplars=0"),
        ({"temperature": 0.0}, {}, "temperature=0.0"),
        ({"accept_threshold": float("nan")}, {}, "accept_threshold=nan"),
        ({"template": "a photo"}, {}, "template='a photo'"),
        ({"timeout": 0}, {}, "timeout=0"),
        ({"batch_size": 0}, {}, "batch_size=0"),
    ],
    ids=str,
)
def test_bad_input(how, fit, match):
    images, y, probs = world()[0]
    with pytest.raises(ValueError, match=match):
        VisionTherapy(knowing, **how).fit(images, **{"y": y, "probs": probs, **fit})


def test_bad_targets():
    _, (target, _, p) = world()
    with pytest.raises(ValueError, match="verifier=None"):
        fitted(None).relabel(target, p)
    with pytest.raises(ValueError, match="4 columns, fit saw 5"):
        fitted().relabel(target, softmax(p[:, :4]))
    with pytest.raises(ValueError, match="fit has seen no features"):
        fitted().set_params(retrieval="features").relabel(target, p, features=p)
    images, y, probs = world()[0]
    vt = VisionTherapy(knowing, retrieval="features").fit(images, y, probs, features=probs)
    with pytest.raises(ValueError, match="3 columns, the support's 5"):
        vt.relabel(target, p, features=p[:, :3])
    with pytest.raises(ValueError, match="0 sample"):
        fitted().relabel([], np.empty((0, C)))


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def test_loss():
    torch.manual_seed(0)
    x, W, teacher = torch.randn(6, 8, requires_grad=True), 3 * torch.randn(4, 8), torch.randn(6, 4)
    labels = torch.tensor([0, -1, 2, -1, 3, 1])
    target = torch.where(labels < 0, teacher.argmax(1), labels)
    cosines = (x / x.norm(dim=1, keepdim=True)) @ (W / W.norm(dim=1, keepdim=True)).T
    want = -(cosines / 0.07).log_softmax(1)[torch.arange(6), target].mean()
    assert torch.allclose(therapy_loss(x, W, labels, teacher), want)
    with pytest.raises(ValueError, match="teacher_logits=None"):
        therapy_loss(x, W, labels)
    with pytest.raises(ValueError, match="7 columns"):
        therapy_loss(x, W[:, :7], labels, teacher)
    with pytest.raises(ValueError, match="temperature=0"):
        therapy_loss(x, W, labels, teacher, temperature=0)


class Wrapped(nn.Module):
    """A CLIP-like output, and a norm that shows whether the teacher is left in eval mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))

    def forward(self, x):
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=self.body(x))


def test_fine_tuning_learns_the_labels_and_keeps_the_rest():
    torch.manual_seed(0)
    encoder, W, x = Wrapped().eval(), torch.randn(3, 8), torch.randn(60, 6)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    own = (F.normalize(encoder(x).pooler_output, dim=-1) @ F.normalize(W, dim=-1).T).argmax(1)
    labels = torch.where(x[:, 0] > 0.8, 2, -1)  # therapy says: all of these are 2
    tuned = therapy_fine_tune(
        encoder,
        W,
        x.numpy(),
        labels.numpy(),
        learning_rate=1e-2,
        min_learning_rate=1e-3,
        epochs=25,
        random_state=0,
    )
    now = (F.normalize(tuned(x).pooler_output, dim=-1) @ F.normalize(W, dim=-1).T).argmax(1)
    assert (
        (now == torch.where(labels < 0, own, 2)).float().mean()
        > 0.85
        > (own == torch.where(labels < 0, own, 2)).float().mean()
    )
    assert (
        all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
        and not tuned.training
    )
    again = therapy_fine_tune(
        encoder,
        W,
        list(x),
        labels,
        preprocess=torch.stack,
        learning_rate=1e-2,
        min_learning_rate=1e-3,
        epochs=25,
        random_state=0,
    )
    assert torch.equal(again(x).pooler_output, tuned(x).pooler_output)
    tiny = therapy_fine_tune(encoder, W, x)  # the paper's rate hardly moves it
    assert (tiny.body[0].weight - encoder.body[0].weight).abs().max() < 1e-5


def test_the_student_trains_under_the_engine():
    torch.manual_seed(0)
    student = TherapyStudent(Wrapped(), torch.randn(3, 8))
    teacher = {name: value.clone() for name, value in student.teacher.state_dict().items()}
    x, labels = torch.randn(32, 6), torch.arange(32) % 3
    data = unfused.train.ArrayDataset(pixel_values=x, labels=labels)
    result = unfused.train.fit(student, data, steps=30, batch_size=16, lr=1e-2)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert all(torch.equal(value, teacher[name]) for name, value in student.teacher.state_dict().items())
    assert student.eval()(x)["logits"].shape == (32, 3)  # no labels: the teacher's


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"labels": [3] * 8}, ValueError, "-1..2"),
        ({"labels": [0] * 7}, ValueError, "8 images"),
        ({"images": torch.empty(0, 6)}, ValueError, "empty"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"min_learning_rate": 1.0}, ValueError, "last rate"),
        ({"images": torch.full((8, 6), torch.nan)}, FloatingPointError, "loss is nan"),
        ({"encoder": nn.LSTM(6, 8)}, TypeError, "returned tuple"),
    ],
    ids=str,
)
def test_bad_fine_tuning(how, error, match):
    given = {
        "encoder": nn.Linear(6, 8),
        "text_weights": torch.randn(3, 8),
        "images": torch.randn(8, 6),
        "labels": None,
        **how,
    }
    with pytest.raises(error, match=match):
        therapy_fine_tune(**given)


# -- transformers ------------------------------------------------------------------------------------------------------

WORDS = "this image shows a photo of cat dog true false yes , or ? answer : user says".split()


@pytest.fixture(scope="module")
def llava():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", "<image>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **small),
        text_config=LlamaConfig(
            vocab_size=len(vocabulary),
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            initializer_range=0.3,
            **small,
        ),
        image_token_index=4,
    )
    return LlavaForConditionalGeneration(config), processor


CHAT = (
    "{% for m in messages %}{{ m['role'] }} says {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant says {% endif %}"
)
SENTENCES = [
    f"This image <img> shows a photo of {name}, True or False? Answer:" for name in ("cat", "dog", "dog")
]
ANSWERS = ["False", "True", None]


def pictures(n, seed=0):
    return [np.random.default_rng([seed, i]).integers(0, 255, (30, 34, 3), np.uint8) for i in range(n)]


def test_the_two_logits_of_a_model_are_read(llava):
    model, processor = llava
    verifier = TransformersVerifier(model, processor)
    found = verifier(pictures(3), SENTENCES, ANSWERS)
    shown = "This image <image> shows a photo of {}, True or False? Answer:{}"
    text = "\n".join(shown.format(*pair) for pair in (("cat", " False"), ("dog", " True"), ("dog", "")))
    inputs = processor(
        text=text, images=[verifier_picture for verifier_picture in pictures(3)], return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    ids = [processor.tokenizer.convert_tokens_to_ids(word) for word in ("true", "false")]
    assert found == pytest.approx(float(logits[ids].softmax(0)[0]), abs=1e-5) and 0 < found < 1


def test_a_batch_of_unequal_prompts_is_each_by_itself(llava, tmp_path):
    from PIL import Image

    verifier = TransformersVerifier(*llava, batch_size=2)
    a, b = pictures(3), pictures(3, seed=1)
    long = [
        SENTENCES[0],
        SENTENCES[1],
        "This image <img> shows a photo of a dog or a cat of a dog, True or False? Answer:",
    ]
    both = verifier([a, b], [SENTENCES, long], [ANSWERS, ANSWERS])
    assert both == pytest.approx([verifier(a, SENTENCES, ANSWERS), verifier(b, long, ANSWERS)], abs=1e-5)
    assert abs(both[0] - both[1]) > 1e-4
    Image.fromarray(a[0]).save(tmp_path / "a.png")
    mixed = [tmp_path / "a.png", Image.fromarray(a[1]), a[2]]
    assert verifier(mixed, SENTENCES, ANSWERS) == pytest.approx(float(both[0]), abs=1e-6)


def test_chat_templates_and_other_answers(llava):
    model, processor = llava
    processor.chat_template = CHAT
    try:
        verifier = TransformersVerifier(model, processor, answers=("Yes", "False"))
        assert verifier.chat and not TransformersVerifier(model, processor, chat=False).chat
        prompt = verifier._prompt(SENTENCES, ANSWERS)
        assert prompt.count("<image>") == 3 and prompt.endswith("Answer: assistant says ")
        assert "Answer: assistant says False user says" in prompt and "assistant says Yes user" in prompt
        ids = [processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "false")]
        assert 0 < verifier(pictures(3), SENTENCES, ANSWERS) < 1 and verifier._tokens == ids
    finally:
        processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        TransformersVerifier(model, processor, chat=True)
    with pytest.raises(ValueError, match="begin with the same token"):
        TransformersVerifier(model, processor, answers=("yes dog", "yes cat"))(
            pictures(3), SENTENCES, ANSWERS
        )
    with pytest.raises(ValueError, match="needs its processor"):
        TransformersVerifier(model)
    with pytest.raises(ValueError, match="answers="):
        TransformersVerifier(model, processor, answers=("yes", ""))


def test_a_model_from_a_folder_is_the_verifier_of_a_therapy(llava, tmp_path):
    model, processor = llava
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images, y = pictures(6), np.arange(6) % 2
    vt = VisionTherapy(
        TransformersVerifier(tmp_path, device="cpu", batch_size=4), n_exemplars=2, accept_threshold=2
    )
    vt.fit(images[:4], y[:4], np.eye(2)[y[:4]] * 0.6 + 0.2, names=["cat", "dog"])
    _, info = vt.relabel(images[4:], [[0.6, 0.4], [0.3, 0.7]])
    assert info.calls.tolist() == [4, 4] and np.isfinite(info.scores).all() and not info.failures
    single = VisionTherapy(
        lambda *q: TransformersVerifier(model, processor)(*q), n_exemplars=2, accept_threshold=2
    ).fit(images[:4], y[:4], np.eye(2)[y[:4]] * 0.6 + 0.2, names=["cat", "dog"])
    assert np.allclose(single.relabel(images[4:], [[0.6, 0.4], [0.3, 0.7]])[1].scores, info.scores, atol=1e-5)
