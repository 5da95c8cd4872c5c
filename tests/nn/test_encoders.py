from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from unfused.nn.audio_model import (
    UnfusedAudioConfig,
    UnfusedAudioForClassification,
    UnfusedFeatureExtractor,
)
from unfused.nn.augment import ImageAugment
from unfused.nn.encoders import (
    ResNetEncoder,
    TransformersAudioEncoder,
    ViTEncoder,
    embed_all,
    image_processor,
    load_teacher,
)

RATE = 4000
SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Pictures


def image_encoders():
    return [ResNetEncoder(width=4, depths=(1, 1, 1, 1)), ViTEncoder(32, 8, dim=12, depth=4, heads=2)]


@pytest.mark.parametrize("index", [0, 1], ids=["resnet", "vit"])
def test_image_encoders_keep_the_contract(index):
    encoder = image_encoders()[index]
    x = torch.randn(3, 3, 32, 32)
    encoder.eval()
    frames, blocks = encoder(x)
    assert frames.shape[::2] == (3, encoder.embedding_dim)
    assert [block.shape for block in blocks] == [(3, dim) for dim in encoder.block_dims] and len(blocks) == 3
    assert encoder.pool(frames).equal(encoder.embed(x))
    (encoder.pool(frames).sum() + sum(block.sum() for block in blocks)).backward()
    grown = {name.split(".")[1] for name, p in encoder.named_parameters() if p.grad is not None}
    assert len(grown) >= 2


@pytest.mark.parametrize("index", [0, 1], ids=["resnet", "vit"])
def test_the_classifier_is_a_head_on_the_embedding(index):
    encoder = image_encoders()[index].eval()
    x, head = torch.randn(3, 3, 32, 32), nn.Linear(encoder.embedding_dim, 5)
    model = encoder.to_classifier(5, {i: f"class {i}" for i in range(5)})
    encoder.load_head(model, head)
    torch.testing.assert_close(model(pixel_values=x).logits, head(encoder.embed(x)))
    assert not model.training and model.config.label2id["class 3"] == 3
    assert encoder.to_classifier(7).config.num_labels == 7
    assert encoder.to_classifier({0: "a", 1: "b", 2: "c"}).config.num_labels == 3
    with pytest.raises(ValueError, match="num_labels=3, but id2label names 2"):
        encoder.to_classifier(3, {0: "a", 1: "b"})


@pytest.mark.parametrize("index", [0, 1], ids=["resnet", "vit"])
def test_a_saved_folder_works_in_transformers_pipeline(index, tmp_path):
    """What the pipeline answers for a file is what encoder, head and our own preparation answer.

    torchvision is no dependency of ours: this is to pass where it is missing.
    """
    encoder = image_encoders()[index].eval()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    model = encoder.to_classifier(3, {0: "ant", 1: "bee", 2: "cat"})
    model.save_pretrained(tmp_path / "model")
    image_processor(32, mean, std).save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    Image.new("L", (50, 90), 77).save(tmp_path / "grey.png")

    classify = transformers.pipeline("image-classification", model=str(tmp_path / "model"))
    answer = classify(str(tmp_path / "picture.png"), top_k=3)
    prepared = ImageAugment(mean=mean, std=std).eval()(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    expected = model(pixel_values=prepared).logits.softmax(-1)[0]
    for row in answer:
        assert abs(row["score"] - expected[model.config.label2id[row["label"]]]) < 1e-5
    assert len(classify([str(tmp_path / "grey.png"), Image.new("RGBA", (33, 31))], top_k=1)) == 2
    saved = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "ViTImageProcessor"  # known to transformers with torchvision too
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_processor_decoder_and_eval_mode_prepare_a_file_alike(tmp_path):
    from unfused.data.images import decode_image

    rng = np.random.default_rng(0)
    pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((48, 48)))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mean, std = (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)
    theirs = image_processor(32, mean, std)(Image.open(tmp_path / "a.png"), return_tensors="pt")[
        "pixel_values"
    ]
    augment = ImageAugment(32, mean=mean, std=std).eval()
    whole = augment(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
    decoded = augment(torch.from_numpy(decode_image(tmp_path / "a.png", 32))[None])
    for ours in (whole, decoded):  # rounded to whole levels once or twice, or not at all
        assert (theirs - ours).abs().max() < 1.6 / 255


def test_mistakes_in_the_image_encoders_are_named():
    with pytest.raises(ValueError, match="4 stages"):
        ResNetEncoder(depths=(1, 1))
    with pytest.raises(ValueError, match="patch_size=7"):
        ViTEncoder(32, 7)


# Teachers


def speech_extractor(mask):
    return transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=mask)


def wav2vec2():
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SPEECH)), speech_extractor(False)


def wav2vec2_large():
    config = transformers.Wav2Vec2Config(**SPEECH, feat_extract_norm="layer", do_stable_layer_norm=True)
    return transformers.Wav2Vec2Model(config), speech_extractor(True)


def wav2vec2_ctc():
    config = transformers.Wav2Vec2Config(**SPEECH, vocab_size=9)
    return transformers.Wav2Vec2ForCTC(config), speech_extractor(False)


def hubert():
    return transformers.HubertModel(transformers.HubertConfig(**SPEECH)), speech_extractor(False)


def wavlm():
    config = transformers.WavLMConfig(**SPEECH, feat_extract_norm="layer")
    return transformers.WavLMModel(config), speech_extractor(True)


def ast(head=False):
    config = transformers.ASTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        num_mel_bins=32,
        max_length=64,
        patch_size=16,
        frequency_stride=10,
        time_stride=10,
    )
    extractor = transformers.ASTFeatureExtractor(sampling_rate=16000, num_mel_bins=32, max_length=64)
    return (transformers.ASTForAudioClassification if head else transformers.ASTModel)(config), extractor


def ast_classifier():
    return ast(head=True)


def clap_parts(fusion=False):
    audio = transformers.ClapAudioConfig(
        patch_embeds_hidden_size=8,
        hidden_size=64,
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        spec_size=128,
        num_mel_bins=32,
        window_size=4,
        enable_fusion=fusion,
        fusion_type=None,
        patch_embed_input_channels=1,
    )
    extractor = transformers.ClapFeatureExtractor(
        feature_size=32,
        sampling_rate=8000,
        hop_length=80,
        max_length_s=2,
        fft_window_size=256,
        frequency_max=4000,
        truncation="fusion" if fusion else "rand_trunc",
    )
    return audio, extractor


def clap_audio():
    config, extractor = clap_parts()
    return transformers.ClapAudioModel(config), extractor


def clap_projected():
    config, extractor = clap_parts()
    return transformers.ClapAudioModelWithProjection(config), extractor


def clap_fused():
    config, extractor = clap_parts(fusion=True)
    return transformers.ClapAudioModel(config), extractor


def clap():
    audio, extractor = clap_parts()
    text = transformers.ClapTextConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20
    )
    return transformers.ClapModel(transformers.ClapConfig(text_config=text, audio_config=audio)), extractor


def whisper():
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=4,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        vocab_size=40,
        num_mel_bins=16,
        max_source_positions=100,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, sampling_rate=16000, chunk_length=2)
    return transformers.WhisperModel(config), extractor


def ours():
    config = UnfusedAudioConfig(n_mels=16, width=4, dim=12, num_labels=3)
    extractor = UnfusedFeatureExtractor(sampling_rate=RATE, n_fft=256, hop_length=40, n_mels=16, f_max=2000.0)
    return UnfusedAudioForClassification(config), extractor


FAMILIES = [wav2vec2, wav2vec2_large, wav2vec2_ctc, hubert, wavlm, ast, ast_classifier]
FAMILIES += [clap_audio, clap_projected, clap_fused, clap, whisper, ours]


def save(family, folder):
    model, extractor = family()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model


def clips(rate, seconds=(0.4, 1.1, 0.7, 2.9)):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(int(s * rate)).astype(np.float32) * 0.1 for s in seconds]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_is_loaded_from_a_folder_and_embeds_clips_of_any_length(family, tmp_path):
    save(family, tmp_path)
    teacher = load_teacher(tmp_path)
    waveforms = clips(teacher.sampling_rate)
    together = teacher.embed_waveforms(waveforms, batch_size=3)
    assert together.shape == (4, teacher.embedding_dim) and together.dtype == np.float32
    assert np.isfinite(together).all() and together.std(0).max() > 1e-4
    alone = np.concatenate([teacher.embed_waveforms([waveform]) for waveform in waveforms])
    np.testing.assert_allclose(together, alone, atol=2e-5)  # neither padding nor companions count
    np.testing.assert_array_equal(load_teacher(tmp_path).embed_waveforms(waveforms, batch_size=3), together)
    assert teacher.embed_waveforms([np.ones(3, np.float32)]).shape == (1, teacher.embedding_dim)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_keeps_the_encoder_contract_and_can_be_trained(family, tmp_path):
    save(family, tmp_path)
    teacher = load_teacher(tmp_path)
    inputs = teacher.prepare(clips(teacher.sampling_rate, (0.4, 0.6)))
    frames, blocks = teacher(**inputs)
    assert frames.shape[::2] == (2, teacher.model.config.hidden_size if family is not ours else 12)
    assert [block.shape for block in blocks] == [(2, dim) for dim in teacher.block_dims]
    embedded = teacher.embed(**inputs)
    torch.testing.assert_close(teacher.pool(frames, inputs.get("attention_mask")), embedded)
    teacher.train()
    teacher.embed(**inputs).square().sum().backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in teacher.parameters()) > 4


def test_the_embedding_is_the_mean_over_the_frames_of_the_clip(tmp_path):
    model = save(wav2vec2_large, tmp_path)
    waveform = clips(RATE)[1]
    inputs = speech_extractor(True)(waveform, sampling_rate=RATE, return_tensors="pt")
    expected = model.eval()(inputs["input_values"]).last_hidden_state.mean(1)
    out = load_teacher(tmp_path).embed_waveforms([waveform, waveform[:900]])
    np.testing.assert_allclose(out[:1], expected.detach(), atol=1e-5)


def test_ast_leaves_the_padding_and_the_class_tokens_out(tmp_path):
    save(ast, tmp_path)
    teacher = load_teacher(tmp_path)
    inputs = teacher.prepare([np.random.default_rng(0).standard_normal(400 + 160 * 24).astype(np.float32)])
    assert int(inputs["attention_mask"].sum()) == 25
    tokens = teacher.model(inputs["input_values"]).last_hidden_state[:, 2:]  # 2 x 5 patches
    frames = teacher(**inputs)[0]
    torch.testing.assert_close(frames[:, 1], (tokens[:, 1] + tokens[:, 6]) / 2)
    torch.testing.assert_close(teacher.embed(**inputs), frames[:, :2].mean(1))  # 5 x 25 / 64, rounded up


def test_long_clips_are_the_mean_of_equal_windows(tmp_path):
    save(wav2vec2, tmp_path)
    teacher = load_teacher(tmp_path, max_seconds=0.5)
    (clip,) = clips(RATE, (1.5,))
    done = []
    out = teacher.embed_waveforms([clip], progress=lambda *state: done.append(state))
    expected = teacher.embed_waveforms(list(clip.reshape(3, -1))).mean(0)
    np.testing.assert_allclose(out[0], expected, atol=1e-6)
    assert done == [(3, 3)]


def test_the_classifier_we_save_is_a_teacher_with_its_own_pooling(tmp_path):
    model = save(ours, tmp_path).eval()
    teacher, waveform = load_teacher(tmp_path), clips(RATE)[1]
    inputs = teacher.prepare([waveform])
    assert inputs["input_values"].shape[1] > 1  # several windows
    expected = model.encoder.embed(inputs["input_values"][0].unsqueeze(1)).mean(0, keepdim=True)
    np.testing.assert_allclose(teacher.embed_waveforms([waveform]), expected.detach(), atol=1e-5)


def test_bf16_only_when_asked(tmp_path):
    save(hubert, tmp_path)
    teacher, waveforms = load_teacher(tmp_path), clips(RATE)
    exact, rough = teacher.embed_waveforms(waveforms), teacher.embed_waveforms(waveforms, bf16=True)
    assert rough.dtype == np.float32 and not np.array_equal(exact, rough)
    np.testing.assert_allclose(exact, rough, atol=0.1)


def test_a_teacher_fine_tunes_like_any_encoder(tmp_path):
    from unfused.finetune.fine_tune import FineTune

    save(wav2vec2, tmp_path)
    rng = np.random.default_rng(0)
    tones = np.sin(np.outer(np.repeat([0.1, 1.0], 8), np.arange(1200)) + rng.uniform(0, 6, (16, 1)))
    teacher = load_teacher(tmp_path)
    inputs = teacher.prepare(list(tones.astype(np.float32)))["input_values"]
    model = FineTune(teacher, num_classes=2, dropout=0.0).train()
    optimizer, labels = torch.optim.Adam(model.parameters(), 5e-3), torch.arange(16) // 8
    losses = []
    for _ in range(30):
        loss = model(input_values=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Teachers that must be refused


def test_a_checkpoint_that_lacks_weights_is_refused_and_they_are_named(tmp_path):
    save(wav2vec2, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layers.1.attention.k_proj.weight"], weights["masked_spec_embed"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of .*: encoder.layers.1.attention.k_proj.weight"):
        load_teacher(tmp_path)
    save_file({"other." + name: w for name, w in weights.items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"which would stay random: .* and \d+ more"):
        load_teacher(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    save(wav2vec2, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(tmp_path)


def test_only_the_audio_part_of_clap_has_to_be_there(tmp_path):
    save(clap, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: w for name, w in load_file(path).items() if not name.startswith("text_model")}
    save_file(weights, path, metadata={"format": "pt"})
    assert isinstance(load_teacher(tmp_path), TransformersAudioEncoder)
    del weights[next(name for name in weights if name.startswith("audio_model"))]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"audio_model\."):
        load_teacher(tmp_path)


def test_folders_that_hold_no_teacher_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_teacher(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no config.json.*notes.txt"):
        (tmp_path / "notes.txt").write_text("hello")
        load_teacher(tmp_path)
    save(wav2vec2, tmp_path / "full")
    (tmp_path / "full" / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    with pytest.raises(ValueError, match="no feature extractor"):
        load_teacher(tmp_path / "full")
    (tmp_path / "full" / "model.safetensors").rename(tmp_path / "full" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no weights in \*.safetensors"):
        load_teacher(tmp_path / "full")
    encoder = image_encoders()[0]
    encoder.to_classifier(2).save_pretrained(tmp_path / "image")
    image_processor(32, [0.5] * 3, [0.5] * 3).save_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match=r"teacher .*image"):
        load_teacher(tmp_path / "image")


def test_waveforms_must_be_mono_and_not_empty(tmp_path):
    save(wav2vec2, tmp_path)
    teacher = load_teacher(tmp_path)
    for bad in (np.zeros((2, 400)), np.zeros(0)):
        with pytest.raises(ValueError, match=r"waveforms\[1\] has shape"):
            teacher.embed_waveforms([np.zeros(400), bad])


# A whole corpus


class Rows(torch.utils.data.Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"pixel_values": self.x[index], "labels": 0}


def test_embed_all_gives_the_same_from_tensor_array_memory_map_and_data_set(tmp_path):
    encoder = ResNetEncoder(width=4).train()
    encoder.model.embedder.eval()  # a part that was frozen by hand stays so
    modes = [module.training for module in encoder.modules()]
    x = torch.randn(7, 3, 32, 32)
    memory_map = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, tuple(x.shape))
    memory_map[:] = x
    memory_map = np.load(tmp_path / "x.npy", mmap_mode="r")
    done = []
    out = embed_all(encoder, x, batch_size=3, progress=lambda *state: done.append(state))
    assert done == [(3, 7), (6, 7), (7, 7)] and out.shape == (7, 32) and out.dtype == np.float32
    assert [module.training for module in encoder.modules()] == modes
    for data in (x.numpy(), memory_map, Rows(x)):
        np.testing.assert_array_equal(embed_all(encoder, data, batch_size=3), out)
    np.testing.assert_allclose(embed_all(encoder, x, bf16=True), out, atol=0.1, rtol=0.1)
    np.testing.assert_allclose(out, encoder.eval().embed(x).detach(), atol=1e-4)


def test_embed_all_normalises_raw_pictures_by_a_transform_and_refuses_them_without():
    encoder, x = ResNetEncoder(width=4), torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    augment = ImageAugment()
    out = embed_all(encoder, x, transform=augment)
    np.testing.assert_allclose(out, embed_all(encoder, augment.eval()(x)), atol=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        embed_all(encoder, x)
    assert augment.train().training


def test_embed_all_passes_masks_on(tmp_path):
    save(wavlm, tmp_path)
    teacher, waveforms = load_teacher(tmp_path), clips(RATE, (0.4, 0.6))
    batch = teacher.prepare(waveforms)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(2)]
    np.testing.assert_allclose(embed_all(teacher, rows), teacher.embed_waveforms(waveforms), atol=1e-5)
