from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    HubertConfig,
    HubertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from unfused.adapters import AstAdapterConfig
from unfused.adapters.ast_adapters import ConformerAdapter

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def ast() -> ASTForAudioClassification:
    torch.manual_seed(0)
    config = ASTConfig(
        max_length=24, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=4, num_labels=3, **SIZES
    )
    return ASTForAudioClassification(config).eval()  # 2 x 5 patches


def clips(n: int = 4, seed: int = 5) -> torch.Tensor:
    return torch.randn(n, 24, 16, generator=torch.Generator().manual_seed(seed))


def adapt(model: nn.Module, **options) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, AstAdapterConfig(**{"reduction": 4, "kernel_size": 3, **options})).eval()


def shake(model: nn.Module, size: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().astype(np.float64)


def conformer_by_hand(adapter: ConformerAdapter, u: np.ndarray) -> np.ndarray:
    """In eval mode, one clip and channel at a time."""
    z = u @ array(adapter.down.weight).T + array(adapter.down.bias)
    size = z.shape[-1] // 2
    z = z[..., :size] / (1 + np.exp(-z[..., size:]))
    kernel, out = array(adapter.conv.weight)[:, 0], np.empty_like(z)
    k = kernel.shape[-1]
    for b in range(len(z)):
        for c in range(size):
            padded = np.pad(z[b, :, c], k // 2)
            out[b, :, c] = [padded[t : t + k] @ kernel[c] for t in range(z.shape[1])]
    norm = adapter.norm
    out = out + array(adapter.conv.bias) - array(norm.running_mean)
    out = out / np.sqrt(array(norm.running_var) + norm.eps) * array(norm.weight) + array(norm.bias)
    return (out / (1 + np.exp(-out))) @ array(adapter.up.weight).T + array(adapter.up.bias)


def test_conformer_against_the_formula():
    torch.manual_seed(0)
    adapter = shake(ConformerAdapter(6, 6, 3, AstAdapterConfig(kernel_size=5), None))
    adapter.norm.running_mean.normal_()
    adapter.norm.running_var.uniform_(0.5, 2)
    u = torch.randn(2, 9, 6)
    np.testing.assert_allclose(
        array(adapter.eval()(u)), conformer_by_hand(adapter, array(u)), rtol=1e-5, atol=1e-6
    )


def test_number_of_weights_of_the_card():
    """12 blocks of 12: 0.35 M; 12 of 8 with their norms: 0.252 M, 0.29 % of 85.5 M."""
    per_block = [
        sum(p.numel() for p in ConformerAdapter(768, 768, b, AstAdapterConfig(), None).parameters())
        for b in (12, 8)
    ]
    assert 12 * per_block[0] == 12 * (768 * 24 + 24 + 12 * 31 + 12 + 24 + 12 * 768 + 768)
    assert round(12 * (per_block[1] + 2 * 768) / 85.5e6, 5) == 0.00295
    names = [n for n, _ in adapt(ast(), reduction=96).named_parameters() if ".conv.weight" in n]
    assert len(names) == 2


@pytest.mark.parametrize("block", ["conformer", "bottleneck"])
@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("residual", [True, False, "auto"])
def test_placements_against_the_formula(block, placement, residual):
    model = shake(adapt(ast(), block=block, placement=placement, residual=residual))
    layer = model.base_model.model.audio_spectrogram_transformer.layers[0]
    seen = {}
    layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        model(clips())
        x = seen["x"]
        h = x + layer.attention(layer.layernorm_before(x))[0]
        u = layer.layernorm_after(h)
        ffn, adapter = layer.mlp.base_layer(u), layer.mlp.unfused_ast_adapters_block["default"]
        skip = placement == "sequential" if residual == "auto" else residual
        if placement == "parallel":
            expected = h + ffn + adapter(u) + (u if skip else 0)
        else:
            expected = h + adapter(ffn) + (ffn if skip else 0)
        torch.testing.assert_close(seen["y"], expected, rtol=1e-5, atol=1e-5)


def test_houlsby_adapts_attention_too():
    model = shake(adapt(ast(), sublayers=["attention", "ffn"], train_layernorm=False))
    layer = model.base_model.model.audio_spectrogram_transformer.layers[1]
    seen = {}
    layer.attention.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out[0]))
    with torch.no_grad():
        model(clips())
        adapter = layer.attention.unfused_ast_adapters_block["default"]
        expected = layer.attention.base_layer(seen["x"], None)[0] + adapter(seen["x"])
        torch.testing.assert_close(seen["y"], expected, rtol=1e-5, atol=1e-5)


def test_starts_as_the_backbone_and_every_part_learns():
    base = ast()
    with torch.no_grad():
        before = base(clips()).logits
    for options in ({}, {"placement": "sequential"}, {"block": "bottleneck"}):
        model = adapt(copy.deepcopy(base), **options)
        torch.testing.assert_close(model(clips()).logits, before)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):  # the last map first, all others through it
            optimizer.zero_grad()
            model.train()(clips()).logits.square().sum().backward()
            optimizer.step()
        still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad.abs().sum() == 0]
        assert still == []
    released = adapt(copy.deepcopy(base), init="released")
    assert not torch.allclose(released(clips()).logits, before)
    weights = [
        p for n, p in adapt(ast(), block="bottleneck", init="released").named_parameters() if "up.weight" in n
    ]
    assert 0.01 < weights[0].std() < 0.03


def test_batchnorm_statistics_belong_to_the_adapter(tmp_path):
    model = adapt(ast())
    norm = (
        model.base_model.model.audio_spectrogram_transformer.layers[0]
        .mlp.unfused_ast_adapters_block["default"]
        .norm
    )
    model(clips())
    assert norm.running_mean.abs().sum() == 0  # eval
    model.train()(clips())
    assert norm.running_mean.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    assert sum("running_" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 4
    again = PeftModel.from_pretrained(ast(), tmp_path)
    torch.testing.assert_close(again(clips()).logits, model(clips()).logits)
    frozen = {k: v.clone() for k, v in again.state_dict().items() if "running_" in k}
    again.train()(clips())  # loaded for inference: nothing of it may move
    assert all(torch.equal(again.state_dict()[k], v) for k, v in frozen.items())
    model.add_adapter("other", AstAdapterConfig(reduction=4, kernel_size=3))
    model.set_adapter("other")
    before = norm.running_mean.clone()
    model.train()(clips(seed=6))
    assert torch.equal(norm.running_mean, before)


def test_groupnorm_keeps_clips_apart():
    model = shake(adapt(ast(), norm="group")).train()
    assert not any("running_" in key for key in model.state_dict())
    both, alone = model(clips()).logits, model(clips()[:1]).logits
    torch.testing.assert_close(both[:1], alone)


def test_inner_norm():
    model = adapt(ast(), inner_norm=True, train_layernorm=False)
    assert sum("inner_norm.weight" in n for n, _ in model.named_parameters()) == 2
    assert not any("inner_norm" in n for n, _ in adapt(ast()).named_parameters())


def test_2d_convolves_the_grid_and_leaves_class_tokens_alone():
    model = shake(adapt(ast(), layout="2d"))
    adapter = model.base_model.model.audio_spectrogram_transformer.layers[0].mlp.unfused_ast_adapters_block[
        "default"
    ]
    assert adapter.grid == (2, 5) and adapter.conv.weight.shape == (4, 1, 3, 3)
    z = torch.randn(2, 4, 12)  # 2 class tokens, 10 patches
    out = adapter._convolve(z)
    assert torch.equal(out[:, :, :2], z[:, :, :2])
    expected = adapter.conv(z[:, :, 2:].reshape(2, 4, 2, 5)).reshape(2, 4, 10)  # mel-major
    torch.testing.assert_close(out[:, :, 2:], expected)
    with pytest.raises(ValueError, match="fewer"):
        adapter._convolve(z[:, :, :5])
    vit = ViTForImageClassification(ViTConfig(image_size=(8, 16), patch_size=4, **SIZES)).eval()
    model = shake(adapt(vit, layout="2d"))
    assert model.base_model.model.vit.layers[0].mlp.unfused_ast_adapters_block["default"].grid == (2, 4)
    assert model(torch.randn(2, 3, 8, 16)).logits.shape == (2, 2)


def test_norms_are_trained_as_differences():
    model = adapt(ast())
    body = model.base_model.model.audio_spectrogram_transformer
    trained = {
        n.split(".unfused")[0].split("transformer.")[1]
        for n, p in model.named_parameters()
        if "adapters_weight" in n
    }
    assert trained == {"layers.0.layernorm_after", "layers.1.layernorm_after", "layernorm"}
    shake(model)
    x = torch.randn(2, 5, 16)
    norm = body.layernorm
    weight = norm.base_layer.weight + norm.unfused_ast_adapters_weight["default"]
    bias = norm.base_layer.bias + norm.unfused_ast_adapters_bias["default"]
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (16,), weight, bias, norm.base_layer.eps))
    assert not any("adapters_weight" in n for n, _ in adapt(ast(), train_layernorm=False).named_parameters())


def test_mean_pooling_reads_all_tokens():
    base = ast()
    model = adapt(copy.deepcopy(base), pooling="mean", train_layernorm=False)
    hidden = base.audio_spectrogram_transformer(clips()).last_hidden_state
    torch.testing.assert_close(model(clips()).logits, base.classifier(hidden.mean(1)))
    clip = CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": 9, **SIZES}, vision_config={"image_size": 8, "patch_size": 4, **SIZES}
        )
    )
    with pytest.raises(ValueError, match="pooling='mean' needs"):
        adapt(clip, pooling="mean")


def test_clip_is_adapted_in_its_vision_tower():
    clip = CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": 9, **SIZES}, vision_config={"image_size": 8, "patch_size": 4, **SIZES}
        )
    )
    names = [n for n, p in adapt(copy.deepcopy(clip)).named_parameters() if p.requires_grad]
    assert names and all(".vision_model." in n for n in names)
    both = [n for n, p in adapt(clip, block="bottleneck").named_parameters() if p.requires_grad]
    assert any(".text_model." in n for n in both)


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
@pytest.mark.parametrize("stable", [False, True])
def test_speech_models(kind, stable):
    speech = {
        "conv_dim": (8, 8),
        "conv_stride": (4, 4),
        "conv_kernel": (8, 8),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": stable,
    }
    torch.manual_seed(0)
    model_class, config_class = {
        "wav2vec2": (Wav2Vec2ForSequenceClassification, Wav2Vec2Config),
        "hubert": (HubertForSequenceClassification, HubertConfig),
    }[kind]
    base = model_class(config_class(**speech, **SIZES)).eval()
    waves = torch.randn(3, 400)
    with torch.no_grad():
        before = base(waves).logits
        model = adapt(base, sublayers=["attention", "ffn"], layers_to_transform=[1])
        torch.testing.assert_close(model(waves).logits, before)
        assert not torch.allclose(shake(model)(waves).logits, before)
    trained = {
        n.split("layers.")[1].split(".unfused")[0]
        for n, p in model.named_parameters()
        if p.requires_grad and "layers." in n
    }
    assert trained == {"1.attention", "1.feed_forward", "1.layer_norm", "1.final_layer_norm"}


def test_a_causal_model_takes_the_bottleneck_only():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, n_positions=8)).eval()
    with pytest.raises(ValueError, match="tokens to come"):
        adapt(gpt2)
    model = shake(adapt(gpt2, block="bottleneck"))
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(model(ids).logits[:, :2], model(ids[:, :2]).logits)


def test_a_conformer_needs_a_sequence():
    model = adapt(nn.Sequential(nn.Linear(8, 8)), target_modules=["0"])
    with pytest.raises(ValueError, match="bottleneck"):
        model(torch.randn(3, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "lora"}, "block='lora'"),
        ({"placement": "beside"}, "placement='beside'"),
        ({"sublayers": []}, "sublayers="),
        ({"sublayers": "ffn"}, "sublayers='ffn'"),
        ({"sublayers": ["mlp"]}, "sublayers="),
        ({"reduction": 0}, "reduction=0"),
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"residual": "maybe"}, "residual='maybe'"),
        ({"norm": "layer"}, "norm='layer'"),
        ({"layout": "3d"}, "layout='3d'"),
        ({"init": "zeros"}, "init='zeros'"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AstAdapterConfig(**options)


def test_layer_errors():
    with pytest.raises(ValueError, match="give indices from 0 to 1"):
        adapt(ast(), layers_to_transform=[2])
    with pytest.raises(ValueError, match="no grid of patches"):
        adapt(nn.Sequential(nn.Linear(8, 8)), target_modules=["0"], layout="2d")
    with pytest.raises(ValueError, match="8 inputs and 4 outputs"):
        adapt(nn.Sequential(nn.Linear(8, 4)), target_modules=["0"], block="bottleneck", residual=True)


def test_unload_gives_the_model_back():
    base = ast()
    with torch.no_grad():
        before = base(clips()).logits
        again = shake(adapt(base)).unload()
        torch.testing.assert_close(again(clips()).logits, before)
    assert not any("unfused_" in name for name in again.state_dict())
