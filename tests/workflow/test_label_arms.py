"""Classifiers on frozen features as methods of a run: class names in place of labels, kept estimators, what each needs."""

from __future__ import annotations

from pathlib import Path

import corpora
import numpy as np
import pytest
import torch

from unfused import load
from unfused.data.files import Quarantine
from unfused.data.frozen_encoder import FrozenEncoder
from unfused.workflow.estimators import AdaptedEstimator

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
TEXT_COLUMNS = dict(text_column="body", target="topic")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP with random weights."""
    from transformers import CLIPConfig, CLIPModel

    from unfused.nn.encoders import image_processor
    from unfused.nn.text_encoder import train_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(["a photo of a red blue picture colour"], 60)
    ends = dict(pad_token_id=0, bos_token_id=2, eos_token_id=tokenizer.sep_token_id)
    text = SMALL | ends | dict(vocab_size=max(64, len(tokenizer)), max_position_embeddings=32)
    tokenizer.model_max_length = 32
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config=SMALL | dict(image_size=32, patch_size=16), projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(32, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    from unfused.nn.text_encoder import train_tokenizer

    folder = tmp_path_factory.mktemp("masked")
    words = [f"It was {name}. {' '.join(words)}" for name, words in corpora.WORDS.items()]
    tokenizer = train_tokenizer(words * 20, 400)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SMALL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    corpora.write_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


def test_class_names_alone(tmp_path, adapt_tiny, clip, pictures):
    files = sorted(pictures.rglob("*.png"))
    (tmp_path / "flat").mkdir()
    for file in files:
        file.rename(tmp_path / "flat" / f"{file.parent.name}-{file.name}")
    run = adapt_tiny(
        tmp_path / "flat",
        classes="red,blue",
        encoder=clip,
        templates="a {} picture",
        method="zero-shot,gda-clip,tfup,tfup-t",
    )
    assert list(run.metrics["methods"]) == ["zero-shot", "gda-clip", "tfup", "tfup-t"]
    assert all(row["accuracy"]["mean"] is None for row in run.metrics["methods"].values())
    assert run.metrics["data"]["classes"] == ["red", "blue"] and run.metrics["data"]["labels_used"] == 0
    assert (run.path / "report.html").exists() and (run.path / "to_label.csv").exists()

    encoder = FrozenEncoder(clip, modality="image", bf16=False, cache_dir=None)
    paths = sorted((tmp_path / "flat").iterdir())
    features, text = encoder.transform(paths), encoder.encode_classes(["red", "blue"], "a {} picture")
    logits = encoder.logit_scale * features @ text.T / np.linalg.norm(features, axis=1, keepdims=True)
    wanted = torch.from_numpy(logits).softmax(1).numpy()
    np.testing.assert_allclose(run.model.predict_proba(paths), wanted, atol=2e-4)
    pseudo = {row["path"]: row["predicted"] for row in corpora.read_rows(run.path / "pseudo_labels.csv")}
    assert pseudo == {path.name: ["red", "blue"][k] for path, k in zip(paths, wanted.argmax(1), strict=True)}


def test_class_names_and_labels_that_are_kept_for_the_evaluation(adapt_tiny, clip, pictures):
    run = adapt_tiny(pictures, classes=["blue", "red"], encoder=clip, labels_per_class=0, method=None)
    assert list(run.metrics["methods"]) == ["gda-clip", "tfup", "zero-shot"]  # the default with class names
    assert all(row["accuracy"]["mean"] is not None for row in run.metrics["methods"].values())
    assert run.metrics["data"]["labels_used"] == 0
    again = corpora.computed(run.path)
    assert corpora.computed(adapt_tiny(config=run.path / "config.yaml", method=None).path) == again


def test_pictures_with_an_encoder_from_elsewhere(adapt_tiny, clip, pictures):
    methods = "ogen,gda-clip,tfup,unfused,fine-tune,linear-probe"
    run = adapt_tiny(pictures, encoder=clip, method=methods, seeds=2)
    assert run.metrics["stages"]["pretrain"]["dim"] == 8
    assert all(row["accuracy"]["mean"] is not None for row in run.metrics["methods"].values())
    assert isinstance(run.model, AdaptedEstimator) and run.model.classes == ["blue", "red"]
    folder = run.path / "model"
    assert not (folder / "encoder").exists() and "unfused.load" in (folder / "README.md").read_text()
    bad = pictures / "bad.png"
    bad.write_bytes(b"")
    aside = Quarantine()
    found = run.model.predict_proba([pictures / "red" / "1.png", bad], aside)
    assert np.isnan(found[1]).all() and found[0].sum() == pytest.approx(1, abs=1e-4) and len(aside) == 1
    with pytest.raises(ValueError, match=r"bad\.png"):
        run.model.predict_proba([bad])


def test_features_are_those_of_training(tones, adapt_tiny):
    """Of our own encoder, which is kept beside the estimator: recordings, texts, rows, pictures go through `embed`."""
    run = adapt_tiny(tones, tones.parent / "labels.csv", method="gda-clip,tfup,ogen")
    assert (run.path / "model" / "encoder" / "model.safetensors").exists()
    rows = corpora.read_rows(run.path / "pseudo_labels.csv")
    found = load(run.path).predict_proba([tones / row["path"] for row in rows])
    kept = np.load(run.path / "stages" / "gda-clip" / "0" / "probabilities.npy")
    np.testing.assert_allclose(found, kept, atol=2e-3)
    assert load(run.path).predict([tones / rows[0]["path"]]) == [rows[0]["predicted"]]


@pytest.mark.parametrize("kind", ["text", "table", "image"])
def test_features_are_those_of_training_elsewhere_too(tmp_path, adapt_tiny, kind):
    if kind == "image":
        corpora.write_pictures(tmp_path / "source")
        source, options = tmp_path / "source", {}
    elif kind == "text":
        corpora.write_texts(tmp_path / "source.csv")
        source, options = tmp_path / "source.csv", TEXT_COLUMNS
    else:
        corpora.write_rows(tmp_path / "source.csv")
        source, options = tmp_path / "source.csv", {"target": "species"}
    run = adapt_tiny(source, method="gda-clip", **options)
    kept = np.load(run.path / "stages" / "gda-clip" / "0" / "probabilities.npy")
    names = [row["path"] for row in corpora.read_rows(run.path / "pseudo_labels.csv")]
    found = run.model.predict_proba([source / name for name in names] if kind == "image" else source)
    np.testing.assert_allclose(found, kept, atol=2e-3)


def test_texts_with_a_masked_language_model(tmp_path, adapt_tiny, masked_lm):
    corpora.write_texts(tmp_path / "texts.csv")
    methods = "list,zero-shot,gda-clip,tfup"
    run = adapt_tiny(tmp_path / "texts.csv", **TEXT_COLUMNS, encoder=masked_lm, method=methods)
    assert all(row["accuracy"]["mean"] is not None for row in run.metrics["methods"].values())
    assert run.metrics["methods"]["list"]["parameters"] > 0
    assert (
        run.model.predict(["engine wheel", "kitten milk"])[0] in corpora.WORDS
    )  # of zero-shot, the first that is kept
    with pytest.raises(ValueError, match="empty text"):
        run.model.predict([" "])


def test_groups_that_differ_in_their_classes(tmp_path, adapt_tiny):
    corpora.write_rows(tmp_path / "flowers.csv", count=60)
    options = dict(target="species", method="latent-label-shift", group="site")
    run = adapt_tiny(tmp_path / "flowers.csv", **options)
    assert run.metrics["methods"]["latent-label-shift"]["accuracy"]["mean"] is not None
    found = run.model.predict_proba(tmp_path / "flowers.csv")
    assert found.shape == (60, 3) and np.allclose(found.sum(1), 1, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "zero-shot"}, "needs an encoder that reads the names"),
        ({"method": "latent-label-shift"}, "needs at least as many groups: there are 0"),
        ({"method": "list"}, "is for texts, with a masked language model"),
        ({"method": "vision-therapy"}, "needs a second model that verifies"),
        ({"method": "caps-adapter"}, "needs a captioner"),
        ({"classes": "blue,red", "labels_per_class": 0}, "need an encoder that reads texts too"),
        ({"classes": "blue,green"}, "'red' is a label of the data and not among"),
        ({"classes": "blue"}, "give at least two names"),
        ({"classes": "blue,blue"}, "each must be there once"),
        ({"templates": "a picture"}, "needs a {} where"),
        ({"labels_per_class": 0}, "labels_per_class=0 must be at least 1"),
    ],
)
def test_what_a_method_needs_is_said(adapt_tiny, pictures, options, message):
    with pytest.raises(ValueError, match=message):
        adapt_tiny(pictures, **options)


def test_methods_that_need_labels(adapt_tiny, pictures, clip):
    with pytest.raises(
        ValueError, match="method='unfused' needs labels; with class names alone there are zero-shot"
    ):
        adapt_tiny(pictures, classes="blue,red", encoder=clip, labels_per_class=0, method="zero-shot,unfused")


def test_a_saved_estimator_of_the_family(tmp_path):
    from sklearn.cluster import KMeans
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from unfused.label import GDAClassifier, save

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 3)), np.array(["hiss", "hum", "pop"] * 10)
    X[:, 0] += np.arange(30) % 3 * 4
    clf = make_pipeline(StandardScaler(), GDAClassifier()).fit(X, y)
    save(clf, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    np.save(tmp_path / "new.npy", X)
    names, rows = loaded.read_table(tmp_path / "new.npy")
    assert names[:2] == ["row 1", "row 2"]
    np.testing.assert_allclose(loaded.predict_proba(rows), clf.predict_proba(X), atol=1e-6)
    corpora.write_labels(tmp_path / "new.csv", X.tolist(), ["a", "b", "c"])
    assert loaded.predict(tmp_path / "new.csv") == clf.predict(X).tolist()
    with pytest.raises(ValueError, match="no array of numbers"):
        (tmp_path / "bad.npy").write_bytes(b"?")
        loaded.read_table(tmp_path / "bad.npy")
    save(KMeans(2, n_init=1).fit(X), tmp_path / "clusters")
    with pytest.raises(ValueError, match="KMeans gives no probabilities"):
        load(tmp_path / "clusters")


def test_a_saved_pipeline_that_begins_with_an_encoder(tmp_path, clip, pictures):
    from sklearn.pipeline import make_pipeline

    from unfused.label import GDAClassifier, save

    paths = [str(path) for path in sorted(pictures.rglob("*.png"))]
    y = [Path(path).parent.name for path in paths]
    encoder = FrozenEncoder(str(clip), modality="image", bf16=False, cache_dir=None)
    clf = make_pipeline(encoder, GDAClassifier()).fit(paths, y)
    save(clf, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert loaded.kind == "image" and loaded.classes == ["blue", "red"]
    np.testing.assert_allclose(loaded.predict_proba(paths), clf.predict_proba(paths), atol=1e-5)
