"""FrozenEncoder against bare transformers, its cache, its manners as a transformer, and everything that can go wrong."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from unfused.data import frozen_encoder
from unfused.data.frozen_encoder import FrozenEncoder
from unfused.data.object_cache import ObjectCache, stack
from unfused.nn import frozen
from unfused.nn.encoders import image_processor

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
WORDS = "<pad> <unk> <start> <end> a photo of red green blue dog cat . runs the sound this is".split()
RATE = 16000


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    names = dict(pad_token="<pad>", unk_token="<unk>", bos_token="<start>", eos_token="<end>")
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=12, **names)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny random models."""
    from transformers import (
        BertConfig,
        BertModel,
        CLIPConfig,
        CLIPModel,
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Model,
    )

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    text = SMALL | dict(vocab_size=len(WORDS), max_position_embeddings=12)
    special = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
    vision = SMALL | dict(image_size=32, patch_size=16)
    pixels = image_processor(32, mean=[0.5] * 3, std=[0.5] * 3)

    def save(name, model, *tools):
        for part in (model, *tools):
            part.save_pretrained(root / name)

    clip = CLIPConfig(text_config=text | special, vision_config=vision, projection_dim=8)
    save("clip", CLIPModel(clip), word_tokenizer(), pixels)
    save("vit", ViTForImageClassification(ViTConfig(**vision)), pixels)
    sizes = dict(embedding_size=4, hidden_sizes=[4, 8, 8, 16], depths=[1] * 4, layer_type="basic")
    save("resnet", ResNetForImageClassification(ResNetConfig(**sizes)), pixels)
    save("bert", BertModel(BertConfig(**text)), word_tokenizer())
    audio = Wav2Vec2Config(
        **SMALL, conv_dim=[8] * 7, num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=16
    )
    save("wav2vec2", Wav2Vec2Model(audio), Wav2Vec2FeatureExtractor(return_attention_mask=True))
    save("sentences", BertModel(BertConfig(**text)), word_tokenizer())
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (root / "sentences" / "modules.json").write_text(json.dumps(modules))
    (root / "sentences" / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    }
    (root / "sentences" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return root


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for index, mode in enumerate(["RGB", "L", "RGBA", "P", "RGB"]):
        path = tmp_path / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).convert(mode).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture
def make(tmp_path, models):
    def make(name, **how):
        return FrozenEncoder(models / name, **{"cache_dir": tmp_path / "cache", "bf16": False} | how)

    return make


def by_hand(folder, inputs):
    """What bare transformers gives, of whatever part of a CLIP the inputs are for."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        if "clip" in str(folder):
            get = model.get_image_features if "pixel_values" in inputs else model.get_text_features
            return get(**inputs).pooler_output.numpy()
        return model(**inputs)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_pictures_are_those_of_bare_transformers(make, models, pictures):
    opened = [Image.open(path) for path in pictures]
    opened[2] = Image.alpha_composite(Image.new("RGBA", (50, 40), "white"), opened[2])
    pixels = image_processor(32, [0.5] * 3, [0.5] * 3)(
        [picture.convert("RGB") for picture in opened], return_tensors="pt"
    )
    clip = make("clip").transform(pictures)
    assert clip.dtype == np.float32
    np.testing.assert_allclose(clip, by_hand(models / "clip", pixels), atol=1e-5)
    vit = by_hand(models / "vit", pixels).last_hidden_state.numpy()
    np.testing.assert_allclose(make("vit").transform(pictures), vit[:, 0], atol=1e-5)
    np.testing.assert_allclose(make("vit", pooling="mean").transform(pictures), vit.mean(1), atol=1e-5)
    resnet = by_hand(models / "resnet", pixels).pooler_output.flatten(1).numpy()
    np.testing.assert_allclose(make("resnet").transform(pictures), resnet, atol=1e-5)


@pytest.mark.parametrize("cache", ["auto", None])
def test_every_form_of_a_picture_gives_the_same(make, pictures, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("UNFUSED_CACHE", str(tmp_path / "elsewhere"))
    encoder = make("clip", cache_dir=cache, batch_size=2)
    paths = [pictures[0], pictures[4]]
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    wanted = encoder.transform(paths)
    forms = [
        [Image.open(path) for path in paths],
        arrays,
        list(arrays),
        arrays.transpose(0, 3, 1, 2),
        torch.from_numpy(arrays),
        (arrays / 255).astype(np.float32),
        np.array(paths, object)[:, None],
        pd.DataFrame({"file": paths}),
        pd.Series(paths),
        [paths[0], arrays[1]],
    ]
    for form in forms:
        np.testing.assert_allclose(encoder.transform(form), wanted, atol=1e-5)
    assert (tmp_path / "elsewhere" / "features" / "index.sqlite").exists() == (cache == "auto")


def test_texts_are_means_over_their_own_tokens(make, models):
    texts = ["a red dog", "the cat runs . the dog runs . a cat", "blue"]
    found = make("bert", batch_size=2).transform(texts)
    for text, row in zip(texts, found, strict=True):
        states = (
            by_hand(models / "bert", word_tokenizer()([text], return_tensors="pt"))
            .last_hidden_state[0]
            .numpy()
        )
        np.testing.assert_allclose(row, states.mean(0), atol=1e-5)
        np.testing.assert_allclose(make("bert", pooling="cls").transform([text])[0], states[0], atol=1e-5)
        np.testing.assert_allclose(make("bert", pooling="last").transform([text])[0], states[-1], atol=1e-5)
    assert make("bert").transform(np.array(texts)).shape == (3, 16)
    np.testing.assert_array_equal(
        make("bert").transform(["a " * 50]), make("bert").transform(["a " * 40])
    )  # cut


def test_a_sentence_folder_needs_no_library(make):
    rows = make("sentences").transform(["a red dog", "cat"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_a_sentence_folder_of_other_modules_asks_for_the_library(make, models, tmp_path, monkeypatch):
    import shutil
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    shutil.copytree(models / "sentences", tmp_path / "dense")
    (tmp_path / "dense" / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_max_tokens": True})
    )
    with pytest.raises(ValueError, match="needs the sentence-transformers library: pip install"):
        make("bert").set_params(model=tmp_path / "dense").transform(["a"])


def test_recordings(make, tmp_path):
    rng = np.random.default_rng(0)
    waves = [rng.normal(0, 0.1, n).astype(np.float32) for n in (RATE, RATE // 2)]
    paths = []
    for index, wave in enumerate(waves):
        soundfile.write(tmp_path / f"{index}.wav", wave, RATE, subtype="FLOAT")
        paths.append(tmp_path / f"{index}.wav")
    encoder = make("wav2vec2")
    rows = encoder.transform(paths)
    assert rows.shape == (2, 16)
    np.testing.assert_allclose(encoder.transform(waves), rows, atol=1e-5)
    dicts = [{"array": wave, "sampling_rate": RATE} for wave in waves]
    np.testing.assert_allclose(encoder.transform(dicts), rows, atol=1e-5)
    assert not np.allclose(make("wav2vec2", sampling_rate=8000).transform(waves), rows, atol=1e-5)
    assert encoder.fit(paths).get_feature_names_out()[-1] == "frozenencoder15"


def test_texts_of_clip_and_the_text_classifier(make, models):
    encoder = make("clip")
    names, templates = ["red dog", "cat"], ("a photo of a {}", "the {}")
    raw = [
        by_hand(models / "clip", word_tokenizer()([t.format(n)], return_tensors="pt"))[0]
        for n in names
        for t in templates
    ]
    each = np.stack([row / np.linalg.norm(row) for row in raw]).reshape(2, 2, -1).mean(1)
    wanted = each / np.linalg.norm(each, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode_classes(names, templates), wanted, atol=1e-5)
    by_sentence = {name: [t.format(name) for t in templates] for name in names}
    np.testing.assert_allclose(encoder.encode_classes(by_sentence), wanted, atol=1e-5)
    assert encoder.encode_classes(names).shape == (2, 8)
    texts = make("clip", modality="text", normalize=True).transform(["a photo of a cat"])
    np.testing.assert_allclose(texts, encoder.encode_classes(["cat"], "a photo of a {}"), atol=1e-5)
    assert make("bert").encode_classes(names).shape == (2, 16)
    assert encoder.logit_scale == pytest.approx(np.exp(2.6592), rel=1e-3)


def test_models_in_memory(models, pictures, make, tmp_path):
    from transformers import AutoModel, CLIPModel, ViTForImageClassification

    tools = (word_tokenizer(), image_processor(32, [0.5] * 3, [0.5] * 3))
    clip = CLIPModel.from_pretrained(models / "clip").train()
    encoder = FrozenEncoder(clip, processor=tools, cache_dir=tmp_path, bf16=False)
    np.testing.assert_allclose(encoder.transform(pictures), make("clip").transform(pictures), atol=1e-6)
    assert clip.training, "its mode is as it was"
    before = encoder.transform(pictures)
    with torch.no_grad():
        clip.visual_projection.weight.mul_(2)  # a model that goes on being trained is not found in the cache
    np.testing.assert_allclose(encoder.transform(pictures), 2 * before, atol=1e-5)
    assert clone(encoder).model is clip
    headed = ViTForImageClassification.from_pretrained(models / "vit")
    rows = FrozenEncoder(headed, processor=tools, cache_dir=tmp_path, bf16=False).transform(pictures)
    np.testing.assert_allclose(rows, make("vit").transform(pictures), atol=1e-6)
    with pytest.raises(ValueError, match="processor=None: BertModel comes without its tokenizer"):
        bert = AutoModel.from_pretrained(models / "bert")
        bert.config._name_or_path = ""
        FrozenEncoder(bert, cache_dir=tmp_path).transform(["a"])


def other_families():
    import transformers as T

    text = SMALL | dict(vocab_size=len(WORDS), max_position_embeddings=16)
    special = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
    vision = SMALL | dict(image_size=32, patch_size=16)
    yield (
        "text",
        T.GPT2Model(T.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
        "last",
    )
    yield (
        "text",
        T.T5Model(T.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
        "auto",
    )
    yield "image", T.Dinov2Model(T.Dinov2Config(**{**vision, "intermediate_size": None})), "auto"
    yield "image", T.CLIPVisionModel(T.CLIPVisionConfig(**vision)), "auto"
    yield "both", T.SiglipModel(T.SiglipConfig(text_config=text | special, vision_config=vision)), "auto"
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    whisper = T.WhisperConfig(
        **sizes,
        d_model=16,
        num_mel_bins=16,
        max_source_positions=50,
        vocab_size=20,
        decoder_start_token_id=2,
        **special,
    )
    yield "audio", T.WhisperModel(whisper), "auto"
    audio = dict(
        spec_size=64, patch_size=4, patch_stride=[4, 4], num_mel_bins=16, window_size=4, depths=[1, 1]
    )
    audio |= dict(num_attention_heads=[1, 2], patch_embeds_hidden_size=8, hidden_size=16, num_classes=2)
    yield (
        "clap",
        T.ClapModel(T.ClapConfig(text_config=text | special, audio_config=audio, projection_dim=8)),
        "auto",
    )


def test_other_families():
    """Every family runs, and no row depends on its batch."""
    import transformers as T

    rng = np.random.default_rng(0)
    tokenizer, pixels = word_tokenizer(), image_processor(32, [0.5] * 3, [0.5] * 3)
    tokenizer.pad_token = None  # as GPT-2's
    window = dict(
        fft_window_size=400, truncation="rand_trunc", padding="repeatpad", max_length_s=1, hop_length=160
    )
    ears = {
        "audio": T.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
        "clap": T.ClapFeatureExtractor(feature_size=16, sampling_rate=RATE, **window),
    }
    waves = [rng.normal(0, 0.1, n).astype(np.float32) for n in (8000, 16000, 40000)]
    items = {
        "text": ["a red dog", "cat", "the dog runs . a cat"],
        "image": rng.integers(0, 256, (3, 40, 30, 3), np.uint8),
    }
    torch.manual_seed(0)
    for kind, model, pooling in other_families():
        tools = [tokenizer, pixels, *([ears[kind]] if kind in ears else [])]
        data = items.get("image" if kind == "both" else kind, waves)
        how = dict(processor=tools, pooling=pooling, bf16=False, cache_dir=None)
        rows = FrozenEncoder(model, **how).transform(data)
        assert rows.shape[0] == 3 and np.isfinite(rows).all() and len(np.unique(rows.round(5), axis=0)) == 3
        np.testing.assert_allclose(FrozenEncoder(model, batch_size=1, **how).transform(data), rows, atol=1e-5)
        if kind in ("both", "clap"):
            assert FrozenEncoder(model, **how).encode_classes(["cat", "red dog"]).shape == (2, rows.shape[1])


def test_what_adapt_made(make, pictures, tmp_path, models):
    """A run's folder, and the object that `unfused.load` gives."""
    import shutil

    from unfused.workflow.predict import AdaptedModel

    shutil.copytree(models / "resnet", tmp_path / "run" / "model")
    rows = make("resnet").transform(pictures)
    np.testing.assert_array_equal(make("resnet").set_params(model=tmp_path / "run").transform(pictures), rows)
    adapted = AdaptedModel.load(tmp_path / "run")
    np.testing.assert_allclose(make("resnet").set_params(model=adapted).transform(pictures), rows, atol=1e-6)


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_what_is_known_is_not_computed_again(make, pictures, monkeypatch):
    texts = ["a dog", "a cat", "a dog"]
    first, written = make("clip").transform(pictures), make("bert").transform(texts)

    def never(*_, **__):
        raise AssertionError("the model was loaded again")

    frozen_encoder._LOADED.clear()
    monkeypatch.setattr(frozen, "load", never)
    np.testing.assert_array_equal(make("clip").transform(pictures), first)
    np.testing.assert_array_equal(make("clip").transform(pictures[::-1]), first[::-1])
    np.testing.assert_array_equal(make("bert").transform(texts), written)
    for changed in (dict(bf16=True), dict(modality="text")):
        with pytest.raises(AssertionError):
            make("clip", **changed).transform(pictures)
    with pytest.raises(AssertionError):
        make("clip").transform([np.zeros((9, 9), np.uint8)])


def test_a_text_model_in_memory_is_found_again(models, tmp_path, monkeypatch):
    from transformers import BertModel

    encoder = FrozenEncoder(
        BertModel.from_pretrained(models / "bert"), processor=word_tokenizer(), cache_dir=tmp_path, bf16=False
    )
    first = encoder.transform(["a dog", "a cat"])  # which leaves truncation set in the tokenizer

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(frozen._Text, "embed", never)
    np.testing.assert_array_equal(encoder.transform(["a dog", "a cat"]), first)


def test_other_weights_are_another_model(make, models, pictures, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(models / "vit", tmp_path / "vit")
    encoder = make("vit").set_params(model=tmp_path / "vit")
    before = encoder.transform(pictures)
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layernorm.weight"))
    save_file(
        weights | {name: weights[name] * 2}, tmp_path / "vit" / "model.safetensors", metadata={"format": "pt"}
    )
    assert not np.allclose(encoder.transform(pictures), before)


def test_objects_are_kept_by_content(tmp_path):
    import hashlib

    calls = []

    def compute(texts):
        calls.extend(texts)
        return [np.full(3, len(text)) for text in texts]

    def ask(texts):
        cache = ObjectCache(tmp_path, "k", shape=(-1,))
        return stack(
            cache.get_objects(texts, lambda t: hashlib.blake2b(t.encode()).digest(), str, compute), width=3
        )

    texts = [f"{n}" * (n % 7 + 1) for n in range(600)] + ["0"]
    first = ask(texts)
    assert first[:, 0].tolist() == [len(text) for text in texts] and len(calls) == 600
    np.testing.assert_array_equal(ask(texts[::-1]), first[::-1])
    assert len(calls) == 600
    with pytest.raises(ValueError, match="have \\[3\\] numbers, not 2"):
        stack(
            ObjectCache(tmp_path, "k", (-1,)).get_objects(
                ["0"], lambda t: hashlib.blake2b(b"0").digest(), str, compute
            ),
            2,
        )


# -- manners -----------------------------------------------------------------------------------------------------------


def test_in_a_pipeline(make, pictures):
    texts = np.array(["a red dog", "a cat", "a green dog", "the cat runs"] * 5)
    labels = np.array(["dog", "cat"] * 10)
    pipeline = make_pipeline(make("bert"), LogisticRegression(C=100))
    assert cross_val_score(pipeline, texts, labels, cv=2).min() > 0.9
    again = pickle.loads(pickle.dumps(pipeline.fit(texts, labels)))
    assert (again.predict(texts) == labels).all()
    frame = (
        make("clip")
        .set_output(transform="pandas")
        .fit_transform(pd.DataFrame({"file": pictures}, index=list("abcde")))
    )
    assert (
        frame.shape == (5, 8)
        and frame.index.tolist() == list("abcde")
        and frame.columns[0] == "frozenencoder0"
    )
    copy = clone(make("clip", batch_size=7))
    assert copy.batch_size == 7 and copy.get_params()["modality"] is None
    assert "FrozenEncoder(" in repr(copy)


def test_exported():
    import unfused
    import unfused.label

    assert unfused.FrozenEncoder is unfused.label.FrozenEncoder is FrozenEncoder
    assert "FrozenEncoder" in dir(unfused)


def test_progress_is_shown_on_request(make, capsys):
    make("bert", progress=True).transform(["a", "b"])
    assert "encoding texts" in capsys.readouterr().err
    make("vit").transform([np.zeros((9, 9), np.uint8)])
    assert capsys.readouterr().err == ""


# -- what can go wrong -------------------------------------------------------------------------------------------------


def test_unreadable_files_are_named_or_nan(make, pictures, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    paths = [pictures[0], str(tmp_path / "broken.jpg"), str(tmp_path / "absent.png")]
    with pytest.raises(ValueError, match=r"X\[1\]=.*broken.jpg: not a picture.*2 of 3 items.*errors='nan'"):
        make("clip").transform(paths)
    for cache in ({}, {"cache_dir": None}):
        with pytest.warns(UserWarning, match=r"X\[1\]"):
            rows = make("clip", errors="nan", **cache).transform(paths)
        assert np.isfinite(rows[0]).all() and np.isnan(rows[1:]).all()
        with pytest.warns(UserWarning):
            assert make("clip", errors="nan", **cache).transform(paths[1:]).shape == (2, 8)
    with pytest.raises(ValueError, match=r"X\[1\]=float: not a string but float"):
        make("bert").transform(["a", float("nan")])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.full((4, 4, 3), 2.0), "outside of 0..1"),
        (np.full((4, 4, 3), np.nan), "outside of 0..1"),
        (np.full((4, 4, 3), 300), "outside of 0..255"),
        (np.zeros((5, 4, 7), np.uint8), r"shape \(5, 4, 7\) is no picture"),
        (np.zeros((0, 4, 3), np.uint8), "is no picture"),
        (None, "not a picture: NoneType"),
    ],
)
def test_bad_pictures(make, item, message):
    with pytest.raises(ValueError, match=message):
        make("vit").transform([item])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((2, 100), np.float32), "no mono recording"),
        (np.array([0.0, np.inf]), "NaN or infinite"),
        (np.array([1, 2]), "whole-number samples"),
        ({"path": "x"}, "a dict needs 'array'"),
        (None, "not a recording|no mono recording"),
    ],
)
def test_bad_recordings(make, item, message):
    with pytest.raises(ValueError, match=message):
        make("wav2vec2").transform([item])


def test_one_line_says_what_is_wrong(make, models, tmp_path, pictures):
    def error(kind, match, do):
        with pytest.raises(kind, match=match) as caught:
            do()
        assert "\n" not in str(caught.value)

    (tmp_path / "empty").mkdir()
    error(ValueError, "there is no such folder", lambda: FrozenEncoder("./nowhere").transform(["a"]))
    error(ValueError, "no config.json", lambda: FrozenEncoder(tmp_path / "empty").transform(["a"]))
    error(TypeError, "model=int", lambda: FrozenEncoder(3).transform(["a"]))
    error(TypeError, "model=Linear", lambda: FrozenEncoder(torch.nn.Linear(1, 1)).transform(["a"]))
    error(ValueError, "modality='smell'", lambda: make("clip", modality="smell").transform(pictures))
    error(
        ValueError,
        "modality='audio'.*image and text",
        lambda: make("clip", modality="audio").transform(pictures),
    )
    error(ValueError, "pooling='max'", lambda: make("clip", pooling="max").transform(pictures))
    error(ValueError, "errors='ignore'", lambda: make("clip", errors="ignore").transform(pictures))
    error(ValueError, "batch_size=0", lambda: make("clip", batch_size=0).transform(pictures))
    error(ValueError, "max_seconds=0", lambda: make("clip", max_seconds=0).transform(pictures))
    error(TypeError, "X is one str: give a list of strings", lambda: make("bert").transform("a"))
    error(TypeError, "X is one str: give a list of paths", lambda: make("clip").fit(pictures[0]))
    error(
        TypeError,
        "X is one PngImageFile|X is one Image",
        lambda: make("clip").transform(Image.open(pictures[0])),
    )
    error(
        ValueError, "X has 2 columns", lambda: make("bert").transform(pd.DataFrame({"a": ["x"], "b": ["y"]}))
    )
    error(TypeError, r"shape \(3, 4\)", lambda: make("bert").transform(np.zeros((3, 4))))
    error(TypeError, "X is a int", lambda: make("bert").transform(3))
    error(ValueError, "X is empty", lambda: make("bert").transform([]))
    error(ValueError, "reads no texts", lambda: make("vit").encode_classes(["a"]))
    error(ValueError, "names=", lambda: make("clip").encode_classes([]))
    error(ValueError, "names=", lambda: make("clip").encode_classes("cat"))
    error(ValueError, "names=", lambda: make("clip").encode_classes(["cat", " "]))
    error(ValueError, "'cat' more than once", lambda: make("clip").encode_classes(["cat", "dog", "cat"]))
    error(ValueError, "needs a {}", lambda: make("clip").encode_classes(["cat"], ["a photo"]))
    error(ValueError, "no logit scale", lambda: make("vit").logit_scale)


def test_incomplete_folders(models, tmp_path, make):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(models / "bert", tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "bert" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        make("bert").set_params(model=tmp_path / "bert").transform(["a"])
    shutil.copytree(models / "vit", tmp_path / "vit")
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layernorm.weight"))
    weights.pop(name)
    save_file(weights, tmp_path / "vit" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of ViTModel.*layernorm.weight"):
        make("vit").set_params(model=tmp_path / "vit").transform([np.zeros((9, 9), np.uint8)])
    (tmp_path / "vit" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        make("vit").set_params(model=tmp_path / "vit").transform([np.zeros((9, 9), np.uint8)])


def test_a_model_that_gives_nan_is_found_out(models, tmp_path):
    from transformers import ViTModel

    vit = ViTModel.from_pretrained(models / "vit", add_pooling_layer=False)
    with torch.no_grad():
        vit.layernorm.weight.fill_(float("nan"))
    encoder = FrozenEncoder(
        vit, processor=image_processor(32, [0.5] * 3, [0.5] * 3), cache_dir=tmp_path, bf16=False
    )
    with pytest.raises(ValueError, match="the model gave NaN"):
        encoder.transform([np.zeros((9, 9), np.uint8)])
