"""H0 separability: the score's definition, the stopping rule, the callback in a Trainer, and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.cluster.hierarchy import linkage
from torch import nn
from transformers import Trainer, TrainingArguments

from unfused.diagnose import SeparabilityStopping, class_separability, separability_curve
from unfused.diagnose.class_separability import _Rule, diagnose_files


def groups(spread=0.1, n=90, d=6, seed=0):
    rng = np.random.default_rng(seed)
    return spread * rng.normal(size=(n, d)) + np.repeat(rng.normal(size=(3, d)), n // 3, axis=0)


# --- the score --------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("statistic", ["mean", "median", "entropy"])
@pytest.mark.parametrize("normalizer", ["max", "q99"])
def test_the_definition(normalize, statistic, normalizer):
    Z = groups()
    unit = Z / np.linalg.norm(Z, axis=1, keepdims=True) if normalize else Z
    p = linkage(unit, "single")[:, 2]
    q = np.minimum(p / (p.max() if normalizer == "max" else np.quantile(p, 0.99)), 1)
    w = p / p.sum()
    expected = {
        "mean": 1 - q.mean(),
        "median": 1 - np.median(q),
        "entropy": 1 + (w * np.log(w)).sum() / np.log(len(p)),
    }[statistic]
    found = class_separability(Z, normalize=normalize, statistic=statistic, normalizer=normalizer)
    assert found.score == pytest.approx(expected)
    np.testing.assert_allclose(found.persistence, np.sort(p), atol=1e-12)
    assert found.entropy == pytest.approx(-(w * np.log(w)).sum())
    assert found.max_over_median == pytest.approx(p.max() / np.median(p))
    assert found.persistence.shape == (89,)


def test_groups_score_higher_the_tighter_they_are():
    for statistic in ("mean", "median", "entropy"):
        scores = [class_separability(groups(s), statistic=statistic).score for s in (0.8, 0.3, 0.05, 0.01)]
        assert scores == sorted(scores)


def test_scale_and_turns_change_nothing():
    Z = groups()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    for normalize in (True, False):
        a, b = (class_separability(z, normalize=normalize).score for z in (Z, 7 * Z @ turn))
        assert a == pytest.approx(b)


def test_copies_are_left_out_and_collapse_is_no_success():
    Z = groups()
    twice = np.concatenate([Z, Z[:30]])
    found = class_separability(twice)
    assert found.copies == 30 and found.score == pytest.approx(class_separability(Z).score)
    assert class_separability(twice, deduplicate=False).score > found.score
    assert np.isnan(class_separability(np.ones((20, 4))).score)
    assert np.isnan(class_separability(np.ones((20, 4)), deduplicate=False).score)
    assert json.loads(class_separability(np.ones((20, 4))).to_json())["score"] is None


def test_samples_are_drawn_by_the_seed():
    Z = groups(n=300)
    a, b, c = (class_separability(Z, max_samples=100, seed=seed) for seed in (0, 0, 1))
    assert a.points == 100 and a.score == b.score != c.score
    assert class_separability(Z, max_samples=None).points == 300


def test_other_metrics_and_tensors():
    Z = groups()
    cosine = class_separability(Z, metric="cosine")
    euclidean = class_separability(torch.from_numpy(Z))
    np.testing.assert_allclose(np.sort(cosine.persistence), euclidean.persistence**2 / 2, atol=1e-9)


# --- the rule --------------------


@pytest.mark.parametrize(
    ("scores", "patience", "tol", "best", "stop"),
    [
        ([0.1, 0.2, 0.3], 2, 0.0, 2, None),
        ([0.1, 0.3, 0.2, 0.2, 0.9], 2, 0.0, 1, 3),
        ([0.5, 0.502, 0.51], 4, 0.005, 2, None),
        ([0.5, 0.501, 0.502, 0.5024], 3, 0.005, 0, 3),  # earliest within the tolerance
        ([float("nan"), 0.2, float("nan"), float("nan")], 2, 0.0, 1, 3),
        ([float("nan")] * 3, 2, 0.0, 0, 2),
        ([0.0, 0.0, 0.0], 2, 0.1, 0, 2),
    ],
)
def test_patience(scores, patience, tol, best, stop):
    rule = _Rule(patience, tol)
    stopped = next((i for i, score in enumerate(scores) if rule.stops(score)), None)
    assert (rule.best, stopped) == (best, stop)


def test_curve():
    arrays = [groups(s) for s in (0.5, 0.2, 0.05, 0.1, 0.2, 0.3)]
    curve = separability_curve(arrays, patience=2, labels=list("abcdef"))
    assert curve.best == 2 and curve.stop == 4
    assert curve.scores == tuple(class_separability(Z).score for Z in arrays)
    table = curve.table()
    assert list(table["verdict"]) == ["", "", "keep", "", "stop", ""]
    page = curve.to_html()
    assert page.count("data:image/png") == 2 and "keep c" in page
    assert class_separability(arrays[0]).to_html().count("data:image/png") == 1


# --- the callback --------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.drop, self.head = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def embed(self, x):
        return self.drop(self.body(x))

    def forward(self, x, labels=None):
        logits = self.head(self.embed(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(tmp_path, callback, epochs=6, **more):
    Z = torch.from_numpy(groups(0.3)).float()
    rows = [{"x": x, "labels": int(i)} for x, i in zip(Z, np.repeat([0, 1, 2], 30), strict=True)]
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=30, learning_rate=0.1, report_to=[],
        disable_tqdm=True, seed=0, use_cpu=True, **{"save_strategy": "no", **more},
    )  # fmt: skip
    trainer = Trainer(Net(), args, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
    trainer.train()
    return trainer


def loader():
    return [{"x": part} for part in torch.from_numpy(groups(0.3)).float().split(40)]


def encode(model, batch):
    assert not model.training and not torch.is_grad_enabled()
    return model.embed(batch["x"])


def test_the_callback_stops_and_puts_the_best_back(tmp_path):
    callback = SeparabilityStopping(encode, loader(), patience=2, tol=0.5)  # nothing rises by half
    trainer = train(tmp_path, callback)
    assert len(callback.history) == 3 and trainer.state.epoch == 3.0
    assert [h["separability"] for h in trainer.state.log_history if "separability" in h] == [
        h["separability"] for h in callback.history
    ]
    assert callback.best == callback.history[0]
    assert callback.measure(trainer.model) == pytest.approx(callback.best["separability"])
    assert trainer.model.training


def test_every_so_many_steps_and_without_putting_back(tmp_path):
    callback = SeparabilityStopping(
        encode, loader(), patience=50, every=2, restore_best=False, statistic="entropy"
    )
    trainer = train(tmp_path, callback, epochs=2)
    assert [h["step"] for h in callback.history] == [2, 4, 6]
    assert callback.measure(trainer.model) == pytest.approx(callback.history[-1]["separability"])


def test_the_trainer_can_choose_its_checkpoint_by_it(tmp_path):
    callback = SeparabilityStopping(encode, loader(), patience=50, restore_best=False)
    trainer = train(
        tmp_path, callback, epochs=3, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="separability", greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_metric == pytest.approx(max(h["separability"] for h in callback.history))
    assert callback.measure(trainer.model) == pytest.approx(trainer.state.best_metric, abs=1e-5)


def test_an_exhausted_loader_is_named():
    callback = SeparabilityStopping(encode, iter(loader()))
    model = Net()
    assert callback.measure(model) > 0
    with pytest.raises(ValueError, match="loader gave no batch"):
        callback.measure(model)


# --- the command, and errors --------------------


def command(**given):
    settings = {
        "base": "", "tuned": [], "inputs": None, "embeddings": [], "statistic": "mean", "normalizer": "max",
        "max_samples": 1000, "patience": 2, "seed": 0,
    }  # fmt: skip
    return diagnose_files(**settings | given)


def test_files_of_embeddings(tmp_path):
    np.save(tmp_path / "a.npy", groups(0.4))
    save_file({"z": torch.from_numpy(groups(0.1))}, tmp_path / "b.safetensors")
    curve = command(embeddings=[tmp_path / "a.npy", tmp_path / "b.safetensors"])
    assert curve.labels == ("a", "b") and curve.best == 1
    assert command(embeddings=[tmp_path / "a.npy"]).score == pytest.approx(curve.scores[0])


def test_checkpoints_and_texts(tmp_path, monkeypatch):
    class Encoder:
        def __init__(self, model):
            self.spread = float(model)

        def fit_transform(self, items):
            assert len(items) == 30
            return groups(self.spread, n=30)

    import unfused.data.frozen_encoder

    monkeypatch.setattr(unfused.data.frozen_encoder, "FrozenEncoder", Encoder)
    (tmp_path / "texts.txt").write_text("".join(f"text {i}\n\n" for i in range(30)), encoding="utf-8")
    curve = command(base="0.5", tuned=["0.1"], inputs=tmp_path / "texts.txt")
    assert curve.best == 1 and len(curve.scores) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give --embeddings"),
        ({"base": "x"}, "--inputs is missing"),
        ({"embeddings": ["no.npy"]}, r"no\.npy: no such file"),
        ({"embeddings": ["bad.npy"]}, r"bad\.npy is no \.npy array"),
        ({"embeddings": ["pickle.npy"]}, r"pickle\.npy is no \.npy array"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, given, message):
    (tmp_path / "bad.npy").write_bytes(b"nonsense")
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    if "embeddings" in given:
        given = {"embeddings": [tmp_path / name for name in given["embeddings"]]}
    with pytest.raises(ValueError, match=message):
        command(**given)


@pytest.mark.parametrize(
    ("Z", "settings", "message"),
    [
        (np.ones((2, 3)), {}, r"shape \(2, 3\)"),
        (np.ones(9), {}, r"shape \(9,\)"),
        (np.array([["a"]] * 5), {}, "at least 3 points"),
        (np.array([[1.0], [np.inf], [2.0]]), {}, "row 1 holds values that are not finite"),
        (groups(), {"statistic": "max"}, "statistic='max'"),
        (groups(), {"normalizer": "mean"}, "normalizer='mean'"),
        (groups(), {"max_samples": 2}, "max_samples=2"),
    ],
)
def test_errors_name_the_argument(Z, settings, message):
    with pytest.raises(ValueError, match=message):
        class_separability(Z, **settings)


def test_curve_and_callback_errors():
    for arguments, message in (
        (([],), "embeddings is empty"),
        (([groups(), groups(n=60)],), r"embeddings have \[60, 90\] rows"),
        (([groups()], 0), "patience=0"),
        (([groups()], 1, 1.0), r"tol=1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            separability_curve(*arguments)
    with pytest.raises(ValueError, match="labels has 2 names for 1"):
        separability_curve([groups()], labels=["a", "b"])
    with pytest.raises(ValueError, match="every=0"):
        SeparabilityStopping(encode, [], every=0)
    with pytest.raises(ValueError, match="statistic='x'"):
        SeparabilityStopping(encode, [], statistic="x")
