"""SUFO: its parts on arrays against plain formulas, recording on encoders of text, pictures and sound, the report."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from unfused.diagnose import (
    ProbeRecipe,
    axis_clusters,
    fisher_ratio,
    linear_cka,
    pc_ablation,
    rsa,
    sufo,
    sufo_compare,
)
from unfused.diagnose._encoder_layers import find_layers, layer_features, resolve_pool, rows_of, tail
from unfused.diagnose._feature_space import aligned_axes, explained_variance, kmeans_1d, macro_f1
from unfused.diagnose.sufo import diagnose_files

QUICK = ProbeRecipe(lr=1e-2, epochs=3, runs=2)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# -- arrays ------------------------------------------------------------------------------------------------------------


def test_rsa_and_cka_against_whole_matrices():
    a, b = normal(30, 6), normal(30, 4, seed=1)
    up = np.triu_indices(30, 1)
    far = [np.linalg.norm(H[:, None] - H, axis=-1)[up] for H in (a, b)]
    assert np.isclose(rsa(a, b), spearmanr(*far)[0])
    a0, b0 = a - a.mean(0), b - b.mean(0)
    K, L = a0 @ a0.T, b0 @ b0.T
    assert np.isclose(linear_cka(a, b), (K * L).sum() / np.linalg.norm(K) / np.linalg.norm(L))
    assert np.isclose(rsa(a, 2 * a + 1), 1) and np.isclose(linear_cka(a, 2 * a + 1), 1)
    assert np.isnan(rsa(a, np.ones((30, 2))))


def test_fisher_ratio_against_scatter_matrices():
    H, y = normal(40, 5), np.arange(40) % 3
    mean = H.mean(0)
    S_B = sum((y == c).sum() * np.outer(m := H[y == c].mean(0) - mean, m) for c in range(3))
    S_W = sum((x := H[y == c] - H[y == c].mean(0)).T @ x for c in range(3))
    assert np.isclose(fisher_ratio(H, y), np.trace(S_B) / np.trace(S_W))


@pytest.mark.parametrize("seed", range(4))
def test_one_dimensional_kmeans_is_exact(seed):
    x = np.random.default_rng(seed).normal(size=7).round(1)

    def inertia(groups):
        return sum(((x[groups == g] - x[groups == g].mean()) ** 2).sum() for g in np.unique(groups))

    best = min(inertia(np.array(g)) for g in itertools.product(range(3), repeat=7))
    found = kmeans_1d(x, 3)
    assert np.isclose(inertia(found), best)
    assert all(x[found == g].max() < x[found == g + 1].min() for g in range(2))
    assert (kmeans_1d([2.0, 2.0, 2.0], 3) == 0).all()


def test_cells_and_outliers():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [100, 1], [200, 0]])
    P = np.concatenate(
        [centres[i] + 0.05 * rng.normal(size=(20, 2)) for i in range(3)] + [[[0, 1.0]], [[200, 0.5]]]
    )
    found = axis_clusters(P, 3)
    assert found.outlier.tolist() == [False] * 60 + [True] * 2 and len(found.cells) == 3
    assert found.distance[60:].min() > found.distance[:60].max()
    codes = 3 * kmeans_1d(P[:, 0], 3) + kmeans_1d(P[:, 1], 3)
    assert (found.code == codes).all()
    assert not axis_clusters(
        [[0, 0], [1, 1], [0, 0], [1, 1]], 3
    ).outlier.any()  # two cells, three groups: nothing to say


def test_axes_follow_the_epoch_before():
    H = normal(50, 6) * [5, 3, 1, 1, 1, 1]
    P = aligned_axes(H)
    assert np.allclose(np.abs(aligned_axes(-H, P)), np.abs(P)) and np.allclose(
        aligned_axes(-H[:, ::-1], P), P
    )
    turned = aligned_axes(H + 0.01 * normal(50, 6, seed=2), -P)
    assert np.abs(turned + P).max() < 0.2
    share = np.var(H - H.mean(0), axis=0).sum()
    assert np.isclose(explained_variance(H, 6)[-1], 1) and np.isclose(
        explained_variance(H)[1] * share, np.var(P, axis=0).sum()
    )


def test_removed_components_against_a_projection():
    H, X = normal(60, 5) * [4, 3, 2, 1, 1] + 7, normal(30, 5, seed=1) * [4, 3, 2, 1, 1] + 7
    W = normal(5, 3, seed=2)
    y, yx = ((Z - 7) @ W for Z in (H, X))
    curves = pc_ablation(H, lambda Z: (Z - 7) @ W, y.argmax(1), X, yx.argmax(1), max_removed=3)
    V = np.linalg.eigh(np.cov(H.T))[1][:, ::-1]
    for k in range(4):
        Z = X - (X - H.mean(0)) @ V[:, :k] @ V[:, :k].T
        assert np.isclose(curves.removed[k], macro_f1(yx.argmax(1), ((Z - 7) @ W).argmax(1), range(3)))
    only = H.mean(0) + (X - H.mean(0)) @ V[:, 1:2] @ V[:, 1:2].T
    said = ((only - 7) @ W).argmax(1)
    assert curves.kept["PC2"]["predicted"] == {str(c): int((said == c).sum()) for c in range(3)}
    assert curves.removed[0] == curves.full_f1 == 1


def test_absent_classes_count():
    assert macro_f1([0, 0], [0, 0], range(4)) == 0.25


def test_bad_arrays():
    with pytest.raises(ValueError, match="H_pre has shape"):
        rsa([1.0, 2], [1.0, 2])
    with pytest.raises(ValueError, match="H_pre has 4 samples and H_ft 5"):
        rsa(normal(4, 2), normal(5, 2))
    with pytest.raises(ValueError, match="not finite"):
        fisher_ratio([[0.0], [np.nan], [1.0]], [0, 1, 1])
    with pytest.raises(ValueError, match="groups=0"):
        kmeans_1d([1.0], 0)
    with pytest.raises(ValueError, match="P has shape"):
        axis_clusters(normal(4, 3), 2)
    with pytest.raises(ValueError, match="head gave shape"):
        pc_ablation(normal(5, 2), lambda Z: Z[:, 0], [0] * 5)


# -- encoders ----------------------------------------------------------------------------------------------------------


def bert(seed=0, labels=3):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=labels,
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config).eval()


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_labels=3, initializer_range=0.5, **size)
    ).eval()


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
            num_labels=3,
            mask_time_prob=0.0,
            **size,
        )
    ).eval()


class Mlp(nn.Module):
    """A module of tables with layers of the usual form."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(6, 12)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(3))
        self.classifier = nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def texts(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 30, (n, 7), generator=generator)
    ids[:, 0] = 1
    y = torch.arange(n) % 3
    ids[torch.arange(n), 1 + y] = 3 + y
    mask = torch.ones_like(ids)
    mask[::4, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": y}


KINDS = {
    "text": (bert, lambda: rows_of(texts(9))[0], "cls"),
    "pictures": (vit, lambda: {"pixel_values": torch.randn(9, 3, 8, 8)}, "cls"),
    "sound": (wav2vec2, lambda: {"input_values": torch.randn(9, 400)}, "mean"),
    "tables": (Mlp, lambda: {"x": torch.randn(9, 6)}, "mean"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_head_of_any_encoder(kind):
    make, draw, pool = KINDS[kind]
    model, inputs = make(), draw()
    assert resolve_pool(model, inputs, "auto") == pool
    H, logits = layer_features(model, inputs, pool, batch_size=4)
    assert len(H) == len(find_layers(model)[1]) + 1 and all(len(layer) == 9 for layer in H)
    with tail(model, inputs) as head, torch.no_grad():
        assert np.allclose(
            head(H[-1]).numpy(), logits, atol=1e-4
        )  # the model's own answers from the pooled feature alone
    with torch.no_grad():
        out = model(**inputs)
    assert np.allclose(
        (out if kind == "tables" else out.logits).numpy(), logits, atol=1e-5
    )  # and all is as it was
    assert "forward" not in vars(find_layers(model)[1][-1])


def test_features_are_the_hidden_states():
    model, inputs = bert(), rows_of(texts(9))[0]
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    cls, mean, last = (layer_features(model, inputs, pool)[0] for pool in ("cls", "mean", "last"))
    mask = inputs["attention_mask"][..., None]
    for i, state in enumerate(states):
        assert np.allclose(cls[i], state[:, 0], atol=1e-5)
        assert np.allclose(mean[i], (state * mask).sum(1) / mask.sum(1), atol=1e-5)
        assert np.allclose(last[i], state[torch.arange(9), mask[..., 0].sum(1) - 1], atol=1e-5)


def test_padding_of_sound_does_not_count():
    from transformers import Wav2Vec2ForSequenceClassification

    model = wav2vec2()
    assert isinstance(model, Wav2Vec2ForSequenceClassification)
    x = torch.randn(1, 400)
    padded, mask = torch.cat([x, torch.zeros(1, 200)], 1), torch.ones(1, 600, dtype=torch.long)
    mask[:, 400:] = 0
    before = layer_features(model, {"input_values": padded, "attention_mask": mask}, "mean")[0][0]
    frames = layer_features(model, {"input_values": x}, "mean")[0][0]
    assert before.shape == frames.shape == (1, 16) and np.isfinite(before).all()


# -- the report --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned():
    before = bert()
    model = bert()
    data = texts(90)
    epochs = {}
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(1, 4):
        for _ in range(8):
            optimizer.zero_grad()
            model(**data).loss.backward()
            optimizer.step()
        copied = bert()
        copied.load_state_dict(model.state_dict())
        epochs[epoch] = copied
    return before, model.eval(), epochs


@pytest.fixture(scope="module")
def report(tuned):
    before, model, epochs = tuned
    return sufo(
        model, texts(90), before, epochs, texts(60, seed=5), recipe=QUICK, reference=epochs[2], name="bert"
    )


def test_all_parts(report):
    assert not report.missing and report.pool == "cls" and report.classes == ("0", "1", "2")
    assert report.probe.tuned_f1 > 0.4 and len(report.probe.head_f1) == 2
    assert len(report.probe.linear_pretrained) == len(report.probe.linear_tuned) == 3
    assert np.isnan(report.rsa.rsa[0])  # before the first layer, class tokens are all the same
    assert np.abs(report.rsa.shuffled[1:]).max() < 0.2 and report.rsa.reference[-1] > report.rsa.rsa[-1]
    assert report.dynamics.epochs == (0, 1, 2, 3, 4) and report.dynamics.fisher.shape == (5, 3)
    assert report.dynamics.fisher[-1, -1] > report.dynamics.fisher[0, -1]
    assert report.dynamics.coordinates.shape == (5, 90, 2)
    assert np.allclose([report.pc_curves.full_f1, report.pc_curves.removed[0]], report.probe.tuned_f1)
    distances = [o["distance"] for o in report.outliers]
    assert distances == sorted(distances, reverse=True)
    assert {o["id"] for o in report.outliers} == set(np.flatnonzero(report.clusters.outlier))


def test_table_pictures_and_json(report):
    table = report.table()
    assert set(table["part"]) == {"probe", "similarity", "dynamics", "variance", "components", "outliers"}
    assert report.table(rich=True).row_count == len(table)
    assert len(report.pictures()) == 6
    for part in ("rsa", "probe", "dynamics", "variance", "removal", "outliers"):
        assert report.plot(part=part).get_xlabel()
    with pytest.raises(ValueError, match="part='x'"):
        report.plot(part="x")
    parsed = json.loads(report.to_json())
    assert parsed["name"] == "bert" and "coordinates" not in parsed
    assert "data:image/png" in report.to_html()


def test_missing_inputs_leave_their_part_out(tuned):
    found = sufo(tuned[1], {k: v for k, v in texts(30).items() if k != "labels"})
    assert found.probe is None and found.rsa is None and found.dynamics is None and found.pc_curves is None
    assert set(found.missing) == {"probe", "similarity", "dynamics", "components"}
    assert found.table()["value"].isna().sum() == 4
    assert all(
        o["label"] is None and o["loss"] is None and o["prediction"] is not None for o in found.outliers
    )
    with pytest.raises(ValueError, match="this report has variance, outliers"):
        found.plot()


def test_models_are_left_as_they_were(tuned):
    before, model, _ = tuned
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (before, model)]
    model.train()
    first, again = (
        sufo(model, texts(30), before, held_out=texts(30, 3), recipe=QUICK, seed=1) for _ in range(2)
    )
    assert model.training and first.to_json() == again.to_json()
    model.eval()
    for m, state in zip((before, model), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
        assert all(p.requires_grad for p in m.parameters())


def test_a_bare_encoder_is_a_pretrained_model(tuned):
    before, model, _ = tuned
    bare, whole = (
        sufo(model, texts(30), m, held_out=texts(30, 3), recipe=QUICK) for m in (before.bert, before)
    )
    assert np.allclose(bare.rsa.rsa, whole.rsa.rsa, equal_nan=True) and len(bare.probe.head_f1) == 2


def test_a_head_of_the_users_own(tuned):
    model = tuned[1]

    def head(z):
        with torch.no_grad():
            z = torch.as_tensor(z)
            return model.classifier(torch.tanh(model.bert.pooler.dense(z)))

    given, own = (sufo(model, texts(30), held_out=texts(30, 3), head=h) for h in (head, None))
    assert np.allclose(given.pc_curves.removed, own.pc_curves.removed)


def test_comparison(report, tuned):
    before, model, epochs = tuned
    other = sufo(epochs[2], texts(90), before, name="early")
    compared = sufo_compare([report, other, other])
    assert sufo.compare is sufo_compare
    assert [m["model"] for m in compared.models] == ["bert", "early"] and compared.models[1]["runs"] == 2
    shared = {o["id"] for o in report.outliers} & {o["id"] for o in other.outliers}
    assert {o["id"] for o in compared.common} == shared
    assert compared.plot() is not None and json.loads(compared.to_json())["models"]
    with pytest.raises(ValueError, match="another sample"):
        sufo_compare([report, sufo(model, texts(30))])
    with pytest.raises(ValueError, match="reports is empty"):
        sufo_compare([])


def test_bad_arguments(tuned):
    before, model, epochs = tuned
    with pytest.raises(TypeError, match="data is list"):
        sufo(model, [1, 2])
    with pytest.raises(ValueError, match="samples: give each"):
        sufo(model, {"input_ids": torch.zeros(3, 2), "attention_mask": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match="labels have shape"):
        sufo(model, texts(9), labels=[0, 1])
    with pytest.raises(ValueError, match="max_samples=2"):
        sufo(model, texts(9), max_samples=2)
    with pytest.raises(ValueError, match="ids has 1 entries for 9"):
        sufo(model, texts(9), ids=["a"])
    with pytest.raises(ValueError, match="pool='x'"):
        sufo(model, texts(9), pool="x")
    with pytest.raises(ValueError, match="no ModuleList"):
        sufo(nn.Linear(2, 2), {"input": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match="epoch 1 after 2"):
        sufo(model, texts(9), before, {2: epochs[2], 1: epochs[1]})
    with pytest.raises(ValueError, match="pretrained has 3 layers and model 2"):
        three = Mlp()
        two = Mlp()
        del two.layers[2]
        sufo(two, {"x": torch.randn(9, 6)}, three)


# -- the command -------------------------------------------------------------------------------------------------------


def test_command_on_texts(tuned, tmp_path, tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    config = BertConfig(vocab_size=258, label2id={"cat": 0, "dog": 1}, id2label={0: "cat", 1: "dog"}, **size)
    for name in ("base", "one", "two"):
        model = BertForSequenceClassification(config)
        model.save_pretrained(tmp_path / name)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(tmp_path / name)
    with open(tmp_path / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("text", "label"), *((f"a {i} b", ("dog", "cat")[i % 2]) for i in range(12))]
        )
    reports = diagnose_files(
        str(tmp_path / "base"),
        [str(tmp_path / "one"), str(tmp_path / "two")],
        tmp_path / "data.csv",
        held_out=tmp_path / "data.csv",
        checkpoints=None,
        probe_lr=1e-3,
    )
    assert [type(r).__name__ for r in reports] == ["SufoReport", "SufoReport", "SufoComparison"]
    assert reports[0].ids[0] == "row 1" and reports[0].probe is not None
    alone = diagnose_files(
        str(tmp_path / "base"),
        [str(tmp_path / "one")],
        tmp_path / "data.csv",
        checkpoints=[str(tmp_path / "two")],
    )
    assert alone[0].dynamics.epochs == (0, 1, 2)
    (tmp_path / "bad.csv").write_text("text,label\nhello,bird\n")
    with pytest.raises(ValueError, match="has the labels"):
        diagnose_files(str(tmp_path / "base"), [str(tmp_path / "one")], tmp_path / "bad.csv")
    with pytest.raises(ValueError, match="one tuned model"):
        diagnose_files("b", ["x", "y"], "d", checkpoints=["c"])
