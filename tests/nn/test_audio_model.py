"""AudioNTT, its Hugging Face classes, and saved folders that load anywhere."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    pipeline,
)

from unfused.nn import audio_model
from unfused.nn.audio_model import (
    AudioNTT,
    UnfusedAudioConfig,
    UnfusedAudioForClassification,
    UnfusedAudioModel,
    UnfusedFeatureExtractor,
)
from unfused.nn.log_mel import FrontEnd, fit_frames, log_mel_many
from unfused.nn.register import register

register()
LABELS = {0: "no", 1: "yes", 2: "later"}
SMALL = {"n_mels": 40, "width": 4, "dim": 8}
POOLINGS = ["max-mean", "mean", "segments"]


def small_config(**fields):
    return UnfusedAudioConfig(
        **SMALL | {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}} | fields
    )


def small_model(seed=0, **fields):
    torch.manual_seed(seed)
    model = UnfusedAudioForClassification(small_config(**fields))
    with torch.no_grad():  # as after training: no buffer at its initial value
        for name, buffer in model.named_buffers():
            buffer.add_(3) if name.endswith("tracked") else buffer.add_(torch.rand_like(buffer))
    return model.eval()


def state_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    small_model(pooling="segments", cepstra=13).save_pretrained(path)
    UnfusedFeatureExtractor(n_mels=40, frames=32, trim_db=30, std=2.0).save_pretrained(path)
    return path


def test_the_published_size():
    encoder = AudioNTT()
    assert sum(p.numel() for p in encoder.parameters()) == 5_321_856
    assert encoder.block_dims == [2048, 1024, 512] and encoder.embedding_dim == 2048
    shapes = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    frames, blocks = encoder(torch.randn(2, 1, 64, 96))
    assert shapes == [(64, 32, 48), (64, 16, 24), (64, 8, 12)]
    assert frames.shape == (2, 12, 2048) and [b.shape for b in blocks] == [(2, 2048), (2, 1024), (2, 512)]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("n_mels", "frames", "cepstra"), [(8, 8, 0), (13, 9, 4), (41, 31, 0), (80, 101, 20)])
def test_any_size_works(pooling, n_mels, frames, cepstra):
    encoder = AudioNTT(n_mels=n_mels, width=3, dim=5, pooling=pooling, segments=4, cepstra=cepstra)
    x = torch.randn(2, 1, n_mels, frames)
    out, blocks = encoder(x)
    assert out.shape == (2, frames // 8, encoder.frame_dim)
    assert [block.shape[1] for block in blocks] == encoder.block_dims
    assert encoder.embed(x).shape == (2, encoder.embedding_dim)
    (encoder.embed(x).sum() + sum(block.sum() for block in blocks)).backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_pooling():
    frames = torch.randn(2, 8, 5)
    torch.testing.assert_close(AudioNTT(dim=5, width=2).pool(frames), frames.mean(1) + frames.amax(1))
    torch.testing.assert_close(AudioNTT(dim=5, width=2, pooling="mean").pool(frames), frames.mean(1))
    parts = AudioNTT(dim=5, width=2, pooling="segments", segments=4).pool(frames)
    torch.testing.assert_close(parts, frames.unflatten(1, (4, 2)).mean(2).flatten(1))
    alike = AudioNTT(dim=5, width=2, pooling="segments", segments=4).pool(frames[:, :1])
    torch.testing.assert_close(alike, frames[:, 0].repeat(1, 4))


def test_channels_last_gives_the_same():
    encoder = AudioNTT(**SMALL).eval()
    x = torch.randn(3, 1, 40, 32)
    plain = encoder(x)
    fast = encoder.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(fast[0], plain[0])
    for a, b in zip(fast[1], plain[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"pooling": "max"}, "pooling"), ({"n_mels": 7}, "n_mels"), ({"cepstra": 65}, "cepstra")],
)
def test_bad_settings_are_named(fields, name):
    with pytest.raises(ValueError, match=name):
        AudioNTT(**fields)


@pytest.mark.parametrize("shape", [(1, 40, 32), (1, 2, 40, 32), (1, 1, 39, 32), (1, 1, 40, 7)])
def test_bad_shapes_are_named(shape):
    with pytest.raises(ValueError, match="T >= 8"):
        AudioNTT(**SMALL)(torch.zeros(shape))


def test_initialisation_is_seeded_and_is_torchs_own():
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(AutoModelForAudioClassification.from_config(small_config(cepstra=13)))
    assert state_equal(*models)
    torch.manual_seed(8)
    assert not state_equal(models[0], AutoModelForAudioClassification.from_config(small_config(cepstra=13)))
    ours = UnfusedAudioForClassification(small_config(width=32, dim=64)).encoder
    theirs = AudioNTT(n_mels=40, width=32, dim=64)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if name.endswith("weight") and a.ndim > 1:
            torch.testing.assert_close(a.abs().max(), b.abs().max(), rtol=0.05, atol=0, msg=name)
            torch.testing.assert_close(a.std(), b.std(), rtol=0.15, atol=0, msg=name)
        elif "blocks" in name and name.split(".")[2] == "1":
            assert torch.equal(a, b), name


def test_one_window_is_plain():
    model = small_model()
    x = torch.randn(3, 1, 40, 32)
    expected = model.classifier(model.encoder.embed(x))
    for same in (
        model(x),
        model(x[:, 0]),
        model(x, attention_mask=torch.ones(3, 1)),
        model(x, return_dict=False)[0],
    ):
        torch.testing.assert_close(same if isinstance(same, torch.Tensor) else same.logits, expected)


def test_windows_are_averaged_as_probabilities():
    model = small_model()
    x = torch.randn(2, 3, 40, 32)
    per_window = torch.stack([model(x[:, i]).logits.softmax(-1) for i in range(3)])
    out = model(x, labels=torch.tensor([2, 0]))
    torch.testing.assert_close(out.logits.exp(), per_window.mean(0))
    torch.testing.assert_close(out.loss, -per_window.mean(0)[[0, 1], [2, 0]].log().mean())
    soft = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(model(x, labels=soft).loss, -(soft * per_window.mean(0).log()).sum(1).mean())
    torch.testing.assert_close(model(x.flip(1)).logits, out.logits)


def test_padding_windows_change_nothing():
    model = small_model()
    x = torch.randn(2, 4, 40, 32)
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]])
    junk = torch.where(mask.bool()[..., None, None], x, torch.full_like(x, torch.nan))
    for dtype in (torch.int64, torch.bool, torch.float32):
        out = model(junk, attention_mask=mask.to(dtype), output_hidden_states=True)
        expected = model(x[:1, [0, 2]], output_hidden_states=True)
        torch.testing.assert_close(out.logits[:1], expected.logits)
        torch.testing.assert_close(out.hidden_states[2][:1], expected.hidden_states[2])
    alone = model(
        torch.stack([x[0, 0], torch.zeros(40, 32)])[None], attention_mask=torch.tensor([[1, 0]])
    ).logits
    torch.testing.assert_close(alone, model(x[:1, :1]).logits.log_softmax(-1))
    encoder = UnfusedAudioModel(model.config).eval()
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("classifier")})
    out = encoder(junk, attention_mask=mask)
    torch.testing.assert_close(out.pooler_output[0], model.encoder.embed(x[0, [0, 2], None]).mean(0))
    assert out.last_hidden_state.shape == (2, 16, 8) and (out.last_hidden_state[0, 4:8] == 0).all()


def test_padding_windows_stay_out_of_the_batch_statistics_and_gradients():
    x, mask = torch.randn(2, 2, 40, 32), torch.tensor([[1, 1], [1, 0]])
    results = []
    for fill in (0.0, 1e4):
        model = small_model(dropout=0.0).train()
        inputs = torch.where(mask.bool()[..., None, None], x, torch.full_like(x, fill)).requires_grad_()
        model(inputs, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
        assert torch.isfinite(inputs.grad).all() and (inputs.grad[1, 1] == 0).all()
        results.append(model)
    assert state_equal(*results)
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_bad_masks_and_inputs_are_named():
    model = small_model()
    with pytest.raises(ValueError, match="attention_mask"):
        model(torch.zeros(2, 3, 40, 32), attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="at least one valid window"):
        model(torch.zeros(2, 3, 40, 32), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match="input_values"):
        model(torch.zeros(40, 32))


def test_to_classifier_shares_the_encoder(tmp_path):
    encoder = AudioNTT(**SMALL, pooling="segments", segments=3, dropout=0.1, cepstra=5).eval()
    model = encoder.to_classifier(LABELS)
    assert model.encoder is encoder and not model.training
    assert model.config.id2label == LABELS and model.config.label2id["later"] == 2
    model.save_pretrained(tmp_path)
    assert state_equal(AutoModelForAudioClassification.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cepstra", [0, 13])
def test_save_and_load_is_exact(tmp_path, dtype, cepstra):
    model = small_model(pooling="segments", cepstra=cepstra).to(dtype)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "audio_model.py", "config.json", "log_mel.py", "model.safetensors",
    ]  # fmt: skip
    loaded, info = AutoModelForAudioClassification.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not loaded.training
    assert type(loaded) is UnfusedAudioForClassification and loaded.dtype == dtype
    assert state_equal(loaded, model)
    x = torch.randn(2, 3, 40, 32, dtype=dtype)
    out = loaded(x, labels=torch.tensor([0, 1]))
    assert torch.equal(out.logits, model(x).logits) and torch.isfinite(out.loss)
    body, info = AutoModel.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert type(body) is UnfusedAudioModel and not info["missing_keys"]
    assert state_equal(body.encoder, model.encoder)


def test_loading_with_another_head_leaves_the_encoder_alone(folder):
    torch.manual_seed(0)
    model, info = AutoModelForAudioClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.classifier.weight.shape[0] == 5 and model.classifier.weight.abs().max() > 0
    assert {entry[0] for entry in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert state_equal(model.encoder, AutoModel.from_pretrained(folder).encoder)


def test_autocast():
    model = small_model(cepstra=13)
    x = torch.randn(2, 2, 40, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(out.logits.float(), model(x).logits, atol=0.1, rtol=0.1)
    out.loss.backward()


def test_feature_extractor_is_the_front_end(folder):
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert type(extractor) is UnfusedFeatureExtractor
    front_end = FrontEnd(n_mels=40, frames=32, trim_db=30, std=2.0)
    assert (
        extractor.front_end == front_end
        and extractor.to_dict() == extractor.from_dict(extractor.to_dict()).to_dict()
    )
    clips = [
        np.random.default_rng(i).normal(size=n).astype(np.float32) for i, n in enumerate((1, 3000, 16000))
    ]
    batch = extractor(clips, sampling_rate=16000, return_tensors="pt")
    assert batch["attention_mask"].dtype == torch.int64
    for clip, values, mask in zip(clips, batch["input_values"], batch["attention_mask"], strict=True):
        expected = fit_frames(log_mel_many([clip], front_end)[0], front_end)
        assert torch.equal(values[: len(expected)], expected) and (values[len(expected) :] == 0).all()
        assert mask.tolist() == [1] * len(expected) + [0] * (len(values) - len(expected))


def test_feature_extractor_takes_what_others_take():
    extractor = UnfusedFeatureExtractor(n_mels=40)
    clip = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    expected = extractor([clip])["input_values"]
    assert isinstance(expected, np.ndarray) and expected.shape == (1, 1, 40, 96)
    for same in (
        clip,
        clip[None],
        torch.from_numpy(clip),
        [torch.from_numpy(clip)],
        clip.tolist(),
        [clip.tolist()],
    ):
        got = extractor(same, sampling_rate=16000, padding=True, return_tensors="np")["input_values"]
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="sampling_rate=44100"):
        extractor(clip, sampling_rate=44100)
    with pytest.raises(ValueError, match="waveform"):
        extractor([np.zeros((2, 100))])
    with pytest.raises(ValueError, match="n_fft"):
        UnfusedFeatureExtractor(n_fft=3)


def test_pipeline(folder, caplog):
    pipe = pipeline("audio-classification", model=str(folder))
    assert "not supported" not in caplog.text
    rng = np.random.default_rng(0)
    clips = [rng.normal(size=n).astype(np.float32) for n in (16000, 900, 40000)]
    results = [pipe(clip, top_k=3) for clip in clips]
    for clip, result in zip(clips, results, strict=True):
        assert {entry["label"] for entry in result} == set(LABELS.values())
        assert sum(entry["score"] for entry in result) == pytest.approx(1, abs=1e-5)
        for key in ("array", "raw"):
            assert pipe({key: clip, "sampling_rate": 16000}, top_k=3) == result
    for one, batched in zip(
        results, pipe(clips, top_k=3, batch_size=3), strict=True
    ):  # one has 5 windows, two have 1
        for a, b in zip(one, batched, strict=True):
            assert a["label"] == b["label"] and a["score"] == pytest.approx(b["score"], abs=1e-5)


FRESH = """
import json, sys
import numpy as np
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, pipeline
try:
    import unfused
except ImportError:
    pass
else:
    raise SystemExit("unfused is importable: this would prove nothing")
folder, target = sys.argv[1:]
clip = np.random.default_rng(0).normal(size=40000).astype(np.float32)
pipe = pipeline("audio-classification", model=folder, trust_remote_code=True)
result = pipe(clip)
model = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(target)
AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True).save_pretrained(target)
again = pipeline("audio-classification", model=target, trust_remote_code=True)(clip)
assert again == result
print(json.dumps(result))
"""


def test_the_folder_loads_where_unfused_is_not_installed(folder, tmp_path):
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COVERAGE_PROCESS_START")}
    environment |= {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # an import of the installed package, if there is one, must fail like that of a package that is not there
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'unfused':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, script, folder, tmp_path / "again"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "log_mel.py").exists()
    clip = np.random.default_rng(0).normal(size=40000).astype(np.float32)
    ours = pipeline("audio-classification", model=str(folder))(clip)
    for a, b in zip(json.loads(done.stdout.splitlines()[-1]), ours, strict=True):
        assert a["label"] == b["label"] and a["score"] == pytest.approx(b["score"], abs=1e-6)


def test_push_to_hub_uploads_weights_config_and_code(folder, monkeypatch):
    from huggingface_hub import ModelCard
    from transformers.utils import hub

    commits = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, **kwargs):
            commits.append(kwargs)

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("words"))
    AutoModelForAudioClassification.from_pretrained(folder).push_to_hub("someone/words")
    AutoFeatureExtractor.from_pretrained(folder).push_to_hub("someone/words")
    names = [{operation.path_in_repo for operation in commit["operations"]} for commit in commits]
    assert all(commit["repo_id"] == "someone/words" for commit in commits)
    assert names[0] >= {"model.safetensors", "config.json", "audio_model.py", "log_mel.py"}
    assert names[1] >= {"preprocessor_config.json", "audio_model.py", "log_mel.py"}


def test_saved_configuration_points_at_the_code(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "unfused-audio" and config["architectures"] == [
        "UnfusedAudioForClassification"
    ]
    assert config["auto_map"]["AutoConfig"] == "audio_model.UnfusedAudioConfig"
    assert (
        config["auto_map"]["AutoModelForAudioClassification"] == "audio_model.UnfusedAudioForClassification"
    )
    loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded) is UnfusedAudioConfig and loaded.cepstra == 13 and loaded.id2label == LABELS
    assert (folder / "audio_model.py").read_text() == open(audio_model.__file__).read()


def test_trains_under_the_transformers_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    x = torch.randn(24, 1, 40, 16)
    y = torch.arange(24) % 3
    x[:, 0, :20] += 3 * y[:, None, None]
    data = [{"input_values": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=12, learning_rate=0.02, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(small_model(dropout=0.0), arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < min(before, math.log(3)) / 2
    assert trainer.predict(data).predictions.shape == (24, 3)


def test_cross_entropy_of_many_windows_has_the_gradient_of_the_mean_probability():
    model = small_model().double()
    x = torch.randn(2, 3, 40, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 2])
    (gradient,) = torch.autograd.grad(model(x, labels=labels).loss, x)
    logits = model.classifier(model.encoder.embed(x.flatten(0, 1)[:, None])).unflatten(0, (2, 3))
    (expected,) = torch.autograd.grad(F.nll_loss(logits.softmax(-1).mean(1).log(), labels), x)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
