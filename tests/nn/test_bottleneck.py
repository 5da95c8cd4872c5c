"""Bottlenecks and their sites: the sublayers written out by hand, on every architecture."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    ASTConfig,
    AutoModel,
    BartConfig,
    BertConfig,
    CLIPConfig,
    GPT2Config,
    LlamaConfig,
    ViTConfig,
    Wav2Vec2Config,
)

from unfused.nn.bottleneck import Bottleneck, SiteLayer, SiteModel, features, find_sites
from unfused.nn.peft_register import register
from unfused.nn.tuner import TunerConfig

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
ENCODER = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
ENCODER |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 20, "max_position_embeddings": 16}
SPEECH = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}


@dataclass
class SiteTestConfig(TunerConfig):
    sublayers: list[str] = field(default_factory=lambda: ["ffn"])
    insertion: str = "input"


class SiteTestLayer(SiteLayer):
    adapter_modules = ("unfused_site_test_bottleneck",)

    def make(self, site, config):
        net = Bottleneck(site.dim_in, 3, dim_out=site.dim_out)
        nn.init.normal_(net.up.weight)
        nn.init.normal_(net.down.bias)
        return net


class SiteTestModel(SiteModel):
    site_layer = SiteTestLayer

    def reads(self, config):
        return config.insertion


register("site_test", SiteTestConfig, SiteTestModel)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = {
        "bert": lambda: BertConfig(vocab_size=20, max_position_embeddings=16, **SIZES),
        "gpt2": lambda: GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16),
        "llama": lambda: LlamaConfig(vocab_size=20, num_key_value_heads=1, **SIZES),
        "vit": lambda: ViTConfig(image_size=8, patch_size=4, **SIZES),
        "ast": lambda: ASTConfig(max_length=16, num_mel_bins=16, patch_size=8, **SIZES),
        "clip": lambda: CLIPConfig(
            text_config={"vocab_size": 20, "max_position_embeddings": 16, **SIZES},
            vision_config={"image_size": 8, "patch_size": 4, **SIZES},
        ),
        "wav2vec2": lambda: Wav2Vec2Config(**SPEECH, **SIZES),
        "wav2vec2-stable": lambda: Wav2Vec2Config(do_stable_layer_norm=True, **SPEECH, **SIZES),
        "bart": lambda: BartConfig(**ENCODER),
    }[kind]()
    model = AutoModel.from_config(config).eval()
    for name, parameter in model.named_parameters():  # norms of pretrained models are not the identity
        if "norm" in name.lower() or "ln_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def batch(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids, pixels = torch.randint(4, 20, (2, 6)), torch.randn(2, 3, 8, 8)
    if kind == "vit":
        return {"pixel_values": pixels}
    if kind == "ast":
        return {"input_values": torch.randn(2, 16, 16)}
    if kind == "clip":
        return {"input_ids": ids, "pixel_values": pixels}
    if kind.startswith("wav2vec2"):
        return {"input_values": torch.randn(2, 200)}
    return {"input_ids": ids}


KINDS = ("bert", "gpt2", "llama", "vit", "ast", "clip", "wav2vec2", "wav2vec2-stable", "bart")


def by_hand(kind: str, block: nn.Module, sublayer: str, reads: str, correction, x: torch.Tensor):
    """A block's FFN (or attention) with its residual sum, written out."""
    if kind == "bert":
        h = block.output.dropout(block.output.dense(block.intermediate(x)))
        z = {"input": x, "stream": x, "output": h, "sum": block.output.LayerNorm(h + x)}[reads]
        return block.output.LayerNorm(h + x + correction(z))
    if kind == "wav2vec2":
        h = block.feed_forward(x)
        z = {"input": x, "stream": x, "output": h, "sum": block.final_layer_norm(h + x)}[reads]
        return block.final_layer_norm(h + x + correction(z))
    norm, mlp = {
        "gpt2": ("ln_2", "mlp"),
        "llama": ("post_attention_layernorm", "mlp"),
        "vit": ("layernorm_after", "mlp"),
        "ast": ("layernorm_after", "mlp"),
        "clip": ("layer_norm2", "mlp"),
        "wav2vec2-stable": ("final_layer_norm", "feed_forward"),
    }[kind]
    u = getattr(block, norm)(x)
    h = getattr(block, mlp)(u)
    z = {"input": u, "stream": x, "output": h, "sum": x + h}[reads]
    return x + h + correction(z)


def run_ffn(kind: str, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The FFN part of a (wrapped) block as transformers runs it."""
    if kind == "bert":
        return block.feed_forward_chunk(x)
    if kind == "wav2vec2":
        return block.final_layer_norm(x + block.feed_forward(x))
    norm, mlp = {
        "gpt2": ("ln_2", "mlp"),
        "llama": ("post_attention_layernorm", "mlp"),
        "clip": ("layer_norm2", "mlp"),
        "wav2vec2-stable": ("final_layer_norm", "feed_forward"),
    }.get(kind, ("layernorm_after", "mlp"))
    return x + getattr(block, mlp)(getattr(block, norm)(x))


def the_block(kind: str, model: nn.Module) -> nn.Module:
    return {
        "bert": lambda: model.encoder.layer[0],
        "gpt2": lambda: model.h[0],
        "clip": lambda: model.text_model.encoder.layers[0],
        "wav2vec2": lambda: model.encoder.layers[0],
        "wav2vec2-stable": lambda: model.encoder.layers[0],
    }.get(kind, lambda: model.layers[0])()


@pytest.mark.parametrize("reads", ["input", "output", "stream", "sum"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bart"])
def test_ffn_sites_equal_the_formulas(kind: str, reads: str) -> None:
    base = make(kind)
    plain = copy.deepcopy(base)
    model = get_peft_model(base, SiteTestConfig(insertion=reads)).eval()
    layer = next(m for m in the_block(kind, base).modules() if isinstance(m, SiteTestLayer))
    correction = layer.unfused_site_test_bottleneck["default"]
    x = torch.randn(2, 5, 8)
    expected = by_hand(kind, the_block(kind, plain), "ffn", reads, correction, x)
    with torch.no_grad():
        torch.testing.assert_close(run_ffn(kind, the_block(kind, base), x), expected)
    assert not torch.allclose(expected, run_ffn(kind, the_block(kind, plain), x), atol=1e-3)
    model(**batch(kind))


def outputs(model: nn.Module, kind: str) -> torch.Tensor:
    with torch.no_grad():
        out = model(**batch(kind))
    return out.logits_per_text if kind == "clip" else out.last_hidden_state


@pytest.mark.parametrize("reads", ["input", "output", "stream", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_models(kind: str, reads: str) -> None:
    base = make(kind)
    before = outputs(base, kind)
    model = get_peft_model(base, SiteTestConfig(insertion=reads, sublayers=["attention", "ffn"])).eval()
    after = outputs(model, kind)
    assert not torch.allclose(before, after, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, kind), before)
    for module in model.modules():
        if isinstance(module, SiteLayer):
            torch.nn.init.zeros_(module.unfused_site_test_bottleneck["default"].up.weight)
            assert not any(memory.values for memory in module._memories.values())
    torch.testing.assert_close(outputs(model, kind), before)
    torch.testing.assert_close(outputs(copy.deepcopy(model), kind), before)
    restored = model.unload()
    assert not any(module._forward_pre_hooks for module in restored.modules())
    torch.testing.assert_close(outputs(restored, kind), before)


def test_parallel_attention_reads_what_the_attention_reads() -> None:
    for kind in ("bert", "vit"):
        base = make(kind)
        plain = copy.deepcopy(base)
        get_peft_model(base, SiteTestConfig(sublayers=["attention"])).eval()
        block, old = the_block(kind, base), the_block(kind, plain)
        correction = next(m for m in block.modules() if isinstance(m, Bottleneck))
        x = torch.randn(2, 5, 8)
        with torch.no_grad():
            if kind == "bert":
                h = old.attention.output.dense(old.attention.self(x)[0])
                expected = old.attention.output.LayerNorm(h + x + correction(x))
            else:
                expected = old.attention(x)[0] + correction(x)
            torch.testing.assert_close(block.attention(x)[0], expected)


def test_gradients_reach_the_bottleneck_under_checkpointing() -> None:
    base = make("vit")
    model = get_peft_model(base, SiteTestConfig(insertion="stream"))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(**batch("vit")).last_hidden_state.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, two in zip(*grads, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, two)


def test_two_adapters_at_one_module_read_different_things() -> None:
    base = make("vit")
    model = get_peft_model(base, SiteTestConfig(insertion="input"), adapter_name="one").eval()
    model.add_adapter("two", SiteTestConfig(insertion="stream"))
    block = the_block("vit", base)
    layer, x = block.mlp, torch.randn(1, 5, 8)
    one, two = (layer.unfused_site_test_bottleneck[name] for name in ("one", "two"))
    model.base_model.set_adapter(["one", "two"])
    with torch.no_grad():
        u = block.layernorm_after(x)
        torch.testing.assert_close(layer(u), layer.base_layer(u) + one(u) + two(x))


def test_threads_that_share_a_model_do_not_mix_their_inputs() -> None:
    model = get_peft_model(make("vit"), SiteTestConfig(insertion="stream")).eval()
    inputs = [{"pixel_values": torch.randn(2, 3, 8, 8)} for _ in range(24)]

    def run(one: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return model(**one).last_hidden_state

    expected = [run(one) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(run, inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_bottleneck() -> None:
    x = torch.randn(4, 6)
    net = Bottleneck(6, 3, activation="gelu", init="bert", layernorm=True, scaling=2.0, dim_out=5)
    hidden = nn.functional.gelu(net.down(nn.functional.layer_norm(x, (6,), net.norm.weight, net.norm.bias)))
    torch.testing.assert_close(net(x), 2 * (hidden @ net.up.weight.T + net.up.bias))
    net = Bottleneck(6, 3)
    assert net(x).abs().max() == 0 and net.down.weight.abs().max() <= 1 / 6**0.5  # Kaiming, a = sqrt 5
    assert sum(p.numel() for p in Bottleneck(6, 3, bias=False).parameters()) == 36
    with pytest.raises(ValueError, match="init='x': choose"):
        Bottleneck(6, 3, init="x")


def test_features_and_errors() -> None:
    assert features(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))) == (3, 5)
    assert features(make("gpt2").h[0].mlp) == (8, 8)
    with pytest.raises(ValueError, match="no linear map"):
        features(nn.ReLU())
    with pytest.raises(ValueError, match="no transformer blocks"):
        find_sites(nn.Linear(2, 2), "ffn")
    with pytest.raises(ValueError, match="has to come before: leave target_modules out"):
        get_peft_model(make("bert"), SiteTestConfig(target_modules=["attention"]))
