"""The unified view's arithmetic: gated prefixes, heads, counts, presets; what is stored of a prefix."""

from __future__ import annotations

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from unfused.adapters import BottleneckConfig, MamConfig
from unfused.nn.attention import AttentionLayer, PrefixLayer, PrefixTrunk, attention_modules
from unfused.nn.bottleneck import Bottleneck

pytestmark = pytest.mark.filterwarnings("ignore")
D, HEADS, LAYERS = 16, 4, 2
SIZES = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
BART = {
    "d_model": D,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
}
BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 30, "max_position_embeddings": 32}


def make(kind: str, implementation: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    config, model = {
        "bert": lambda: (BertConfig(vocab_size=30, max_position_embeddings=32, **SIZES), BertModel),
        "vit": lambda: (ViTConfig(image_size=8, patch_size=4, num_channels=1, **SIZES), ViTModel),
        "gpt2": lambda: (
            GPT2Config(n_embd=D, n_layer=LAYERS, n_head=HEADS, vocab_size=30, n_positions=32, pad_token_id=0),
            GPT2LMHeadModel,
        ),
        "llama": lambda: (
            LlamaConfig(vocab_size=30, num_key_value_heads=2, pad_token_id=0, **SIZES),
            LlamaForCausalLM,
        ),
        "clip": lambda: (
            CLIPTextConfig(vocab_size=30, max_position_embeddings=32, eos_token_id=29, **SIZES),
            CLIPTextModel,
        ),
        "bart": lambda: (BartConfig(**BART), BartForConditionalGeneration),
    }[kind]()
    config._attn_implementation = implementation
    network = model(config).eval()
    for parameter in network.parameters():  # attention that is far from uniform
        parameter.data.mul_(4.0) if parameter.ndim == 2 else None
    return network


def batch(kind: str, padded: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8)}
    found = {"input_ids": torch.randint(4, 29, (2, 7))}
    if padded:
        found["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
        found["attention_mask"][0, -3:] = 0
    if kind == "bart":
        found["decoder_input_ids"] = torch.randint(4, 29, (2, 5))
    return found


def outputs(model: nn.Module, kind: str, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch(kind, **kwargs))
    return found.logits if "logits" in found else found.last_hidden_state


def prefixed(kind: str, implementation: str = "sdpa", length: int = 3, **options) -> PeftModel:
    model = make(kind, implementation)
    config = BottleneckConfig.preset("prefix", prefix_length=length, prefix_hidden=0, **options)
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(2)
    for layer in prefix_layers(model):
        for container in (layer.unfused_bottleneck_prefix_key, layer.unfused_bottleneck_prefix_value):
            container["default"].data = torch.randn(container["default"].shape, generator=generator)
    return model


def prefix_layers(model: nn.Module) -> list[PrefixLayer]:
    return [m for m in model.modules() if isinstance(m, PrefixLayer)]


def test_prefix_is_the_gated_sum():
    """(1 - lam) Attn(q, K, V) + lam softmax(q P_k') P_v, lam from the log-sum-exps; per head, masks respected."""
    model = prefixed("bert")
    layer = prefix_layers(model)[0]
    base, dim = layer.base_layer, D // HEADS
    x = torch.randn(2, 7, D)
    mask = torch.zeros(2, 1, 7, 7)
    mask[0, ..., -3:] = float("-inf")
    split = lambda t: t.view(2, 7, HEADS, dim).transpose(1, 2)  # noqa: E731
    q, k, v = split(base.query(x)), split(base.key(x)), split(base.value(x))
    prefix_key, prefix_value = (
        container["default"].view(3, HEADS, dim).transpose(0, 1)  # (heads, length, head_dim)
        for container in (layer.unfused_bottleneck_prefix_key, layer.unfused_bottleneck_prefix_value)
    )
    own = q @ k.transpose(-1, -2) / math.sqrt(dim) + mask
    new = q @ prefix_key.transpose(-1, -2) / math.sqrt(dim)
    lam = torch.sigmoid(new.logsumexp(-1) - own.logsumexp(-1)).unsqueeze(-1)
    expected = (1 - lam) * (own.softmax(-1) @ v) + lam * (new.softmax(-1) @ prefix_value)
    expected = expected.transpose(1, 2).flatten(-2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, attention_mask=mask)[0], expected)
        torch.testing.assert_close(layer(hidden_states=x, attention_mask=torch.isfinite(mask))[0], expected)
    assert base.config is model.config, "the config is swapped for the time of the call alone"


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama", "clip", "bart"])
def test_eager_and_sdpa_agree(kind):
    for padded in (False, True):
        one, two = (outputs(prefixed(kind, way), kind, padded=padded) for way in ("eager", "sdpa"))
        real = batch(kind, padded).get("attention_mask", torch.ones(one.shape[:2])).bool()
        real = torch.ones(one.shape[:2], dtype=torch.bool) if kind == "bart" else real[:, : one.shape[1]]
        torch.testing.assert_close(one[real], two[real], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(two, outputs(make(kind), kind, padded=padded), atol=1e-2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prefix_equals_a_cache_that_is_filled_beforehand(kind):
    """As transformers' own machinery computes it: keys and values of three tokens that have no position."""
    model = prefixed(kind)
    expected = outputs(model, kind, padded=False)
    cache = DynamicCache()
    for index, layer in enumerate(prefix_layers(model)):
        heads = 2 if kind == "llama" else HEADS
        key, value = (
            container["default"].detach().view(3, heads, D // HEADS).transpose(0, 1).expand(2, -1, -1, -1)
            for container in (layer.unfused_bottleneck_prefix_key, layer.unfused_bottleneck_prefix_value)
        )
        cache.update(key, value, index)
    with torch.no_grad():
        found = make(kind)(
            **batch(kind, padded=False), past_key_values=cache, position_ids=torch.arange(7)[None]
        ).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bart"])
def test_generation_with_a_cache(kind):
    model = prefixed(kind)
    inputs = batch(kind)
    inputs.pop("decoder_input_ids", None)
    if kind != "bart":  # decoders are padded on the left
        inputs = {name: value.flip(-1) for name, value in inputs.items()}
    inputs |= {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generate(m, **options):
        return m.generate(**inputs, **options)

    slow = generate(model, use_cache=False)
    for implementation in (None, "static") if kind != "bart" else (None,):
        assert torch.equal(slow, generate(model, use_cache=True, cache_implementation=implementation))
    with model.disable_adapter():
        assert not torch.equal(slow, generate(model))
    if kind != "bart":
        with torch.no_grad():
            assert (
                model(**inputs, use_cache=True).past_key_values.get_seq_length() == 7
            )  # the prefix is not in it


def test_threads_that_share_a_model():
    model = prefixed("bert")
    inputs = [torch.randint(4, 29, (2, 7)) for _ in range(24)]

    def run(ids):
        with torch.no_grad():
            return model(input_ids=ids).last_hidden_state

    expected = [run(ids) for ids in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(run, inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_attention_weights_keep_their_shape():
    model = prefixed("bert", "eager")
    with torch.no_grad():
        weights = model(**batch("bert"), output_attentions=True).attentions
    assert [w.shape for w in weights] == [(2, HEADS, 7, 7)] * LAYERS
    assert (weights[0].sum(-1) < 0.999).any()  # the rest went to the prefix


def test_what_cannot_have_a_prefix():
    t5 = T5Model(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5Model has no transformer blocks"):
        get_peft_model(t5, MamConfig())
    with pytest.raises(
        ValueError, match=r"a BertAttention is not an attention module .* name the module inside"
    ):
        get_peft_model(make("bert"), MamConfig(target_attention=["attention"]))
    model = prefixed("bert")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        ValueError, match=r"attn_implementation='flex_attention': prefixes .* need 'sdpa' or 'eager'"
    ):
        prefix_layers(model)[0](torch.randn(1, 2, D))


def test_heads_have_bottlenecks_of_their_own():
    """Written out head by head: softmax's place taken by ReLU, added before the output projection."""
    for kind in ("vit", "llama"):
        model = get_peft_model(
            make(kind), BottleneckConfig.preset("mh_pa", bottleneck_dim=3, scaling=2.0)
        ).eval()
        layer = next(m for m in model.modules() if isinstance(m, AttentionLayer))
        net = layer.unfused_bottleneck_heads["default"]
        assert sum(p.numel() for p in net.parameters()) == HEADS * 3 * (D + 1) + 3 * D + D
        nn.init.normal_(net.up)
        nn.init.normal_(net.bias)
        base, x = layer.base_layer, torch.randn(2, 5, D)
        kwargs = {}
        if kind == "llama":
            kwargs["position_embeddings"] = model.base_model.model.model.rotary_emb(x, torch.arange(5)[None])
        before = {}
        hook = base.o_proj.register_forward_pre_hook(lambda _, args, seen=before: seen.update(x=args[0]))
        with torch.no_grad():
            base(x, **kwargs)
            own = before["x"].view(2, 5, HEADS, -1)
            layer(x, **kwargs)
            found = before["x"].view(2, 5, HEADS, -1)
            for head in range(HEADS):
                rows = slice(3 * head, 3 * head + 3)
                hidden = torch.relu(x @ net.down.weight[rows].T + net.down.bias[rows])
                bias = net.bias.view(HEADS, -1)[head]
                torch.testing.assert_close(
                    found[:, :, head], own[:, :, head] + 2 * (hidden @ net.up[head].T + bias)
                )
        hook.remove()


def test_lora_is_pefts_lora():
    for kind, targets in (("bert", ["query", "value"]), ("gpt2", ["c_attn"])):
        ours = get_peft_model(
            make(kind), BottleneckConfig.preset("lora", bottleneck_dim=4, scaling=2.0)
        ).eval()
        fan = kind == "gpt2"
        theirs = get_peft_model(
            make(kind), LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=fan)
        ).eval()
        nets = [m for m in ours.modules() if isinstance(m, Bottleneck)]
        layers = [m for m in theirs.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
        assert len(nets) == len(layers) == LAYERS * len(targets)
        for net, layer in zip(nets, layers, strict=True):
            nn.init.normal_(net.up.weight, std=0.1)
            layer.lora_A["default"].weight.data = net.down.weight.data.clone()
            layer.lora_B["default"].weight.data = net.up.weight.data.clone()
        torch.testing.assert_close(outputs(ours, kind), outputs(theirs, kind))
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
        torch.testing.assert_close(
            outputs(ours.merge_and_unload(), kind), outputs(theirs, kind), rtol=1e-3, atol=1e-4
        )


def test_linear_bottleneck_with_biases_is_merged():
    model = get_peft_model(
        make("vit"),
        BottleneckConfig(
            target_modules=["fc1", "o_proj"], activation="linear", bottleneck_dim=3, scaling=0.5
        ),
    ).eval()
    for net in (m for m in model.modules() if isinstance(m, Bottleneck)):
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
    expected = outputs(model, "vit")
    torch.testing.assert_close(
        outputs(model.merge_and_unload(safe_merge=True), "vit"), expected, rtol=1e-4, atol=1e-4
    )
    model = get_peft_model(make("vit"), BottleneckConfig(activation="linear"))
    with pytest.raises(ValueError, match=r"cannot be merged: 'layers.0.mlp' is no linear map"):
        model.merge_and_unload()


def test_scaling_multiplies_the_branch_with_its_bias():
    model = get_peft_model(make("vit"), MamConfig(prefix_length=2, bottleneck_dim=4, scaling=4.0)).eval()
    layer = model.base_model.model.layers[0].mlp
    net, x = layer.unfused_mam_net["default"], torch.randn(1, 3, D)
    nn.init.normal_(net.up.weight)
    nn.init.normal_(net.up.bias)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 4 * net.up(torch.relu(net.down(x))))


def test_mam_is_one_adapter_and_its_file_holds_keys_and_values(tmp_path):
    torch.manual_seed(0)
    length, r, hidden = 5, 6, 800
    model = get_peft_model(make("bert"), MamConfig(prefix_length=length, bottleneck_dim=r, scaling=2.0))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ffn = 2 * r * D + r + D
    trunk = length * D + hidden * (D + 1)
    assert trained == LAYERS * (ffn + 2 * D * (hidden + 1)) + trunk
    assert len({id(m) for m in model.modules() if isinstance(m, PrefixTrunk)}) == 1
    expected = outputs(model.eval(), "bert")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in state.values()) == LAYERS * (ffn + 2 * length * D)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "UNFUSED_MAM"
    again = PeftModel.from_pretrained(make("bert"), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(outputs(again, "bert"), expected)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == LAYERS * (ffn + 2 * length * D)
    model.load_adapter(tmp_path, "default", is_trainable=True)  # as a Trainer does for the best checkpoint
    torch.testing.assert_close(outputs(model, "bert"), expected)
    assert not any(isinstance(m, PrefixTrunk) for m in model.modules())


def test_baking_keeps_the_function():
    model = get_peft_model(
        make("llama"), MamConfig(prefix_length=3, bottleneck_dim=4, prefix_hidden=8)
    ).eval()
    expected = outputs(model, "llama")
    copied = copy.deepcopy(model)
    model.base_model.bake_prefix()
    torch.testing.assert_close(outputs(model, "llama"), expected)
    assert all(p.requires_grad for n, p in model.named_parameters() if "unfused_mam" in n)
    assert not any("prefix_net" in n for n in model.state_dict())
    torch.testing.assert_close(outputs(copied, "llama"), expected)
    trunks = {id(m) for m in copied.modules() if isinstance(m, PrefixTrunk)}
    assert len(trunks) == 1 and trunks != {id(m) for m in model.modules() if isinstance(m, PrefixTrunk)}


def test_encoder_decoder_has_three_tables_and_keeps_fc1s_input():
    model = get_peft_model(make("bart"), MamConfig(prefix_length=3, bottleneck_dim=4, prefix_hidden=8)).eval()
    assert len({id(m) for m in model.modules() if isinstance(m, PrefixTrunk)}) == 3
    assert len(prefix_layers(model)) == 5 and len(attention_modules(model.base_model.model)) == 5
    block = model.base_model.model.model.encoder.layers[0]
    x, net = torch.randn(1, 4, D), block.fc2.unfused_mam_net["default"]
    nn.init.normal_(net.up.weight)
    with torch.no_grad():
        hidden = block.fc1(x)
        torch.testing.assert_close(block.fc2(hidden), block.fc2.base_layer(hidden) + 4 * net(x) / net.scaling)


def test_prefix_dropout_and_second_prefix():
    model = prefixed("vit", prefix_dropout=0.5)
    layer = prefix_layers(model)[0]
    key, value = layer.prefix(["default"])
    torch.testing.assert_close(key, layer.unfused_bottleneck_prefix_key["default"])
    layer.train()
    key, value = layer.prefix(["default"])
    own = layer.unfused_bottleneck_prefix_key["default"]
    torch.testing.assert_close(key, torch.where(key == 0, 0, 2 * own))
    assert 0 < (key == 0).float().mean() < 1
    model.add_adapter("other", BottleneckConfig.preset("prefix", prefix_length=2, prefix_hidden=4))
    key, value = layer.eval().prefix(["default", "other"])
    assert key.shape == value.shape == (5, D)


def test_where_it_goes():
    config = MamConfig(prefix_length=2, bottleneck_dim=4, layers_to_transform=[1])
    names = [n for n, _ in get_peft_model(make("bert"), config).named_parameters() if "unfused_mam" in n]
    assert names and all(".layer.1." in name for name in names)
    config = MamConfig(prefix_length=2, bottleneck_dim=4, target_attention=["self_attn"], target_ffn=["mlp"])
    model = get_peft_model(make("llama"), config)
    assert len(prefix_layers(model)) == LAYERS
    assert sum(isinstance(m, Bottleneck) for m in model.modules()) == LAYERS
    for targets, missing in ((["mlp"], "attention"), (["self_attn"], "FFN")):
        with pytest.raises(ValueError, match=f"has no {missing}: MAM needs both"):
            get_peft_model(make("llama"), MamConfig(target_modules=targets))
    config = BottleneckConfig(sublayers=["heads", "ffn"], bottleneck_dim=2)
    model = get_peft_model(make("bert"), config)
    assert sum("_heads.default.up" in n for n in model.state_dict()) == LAYERS
    assert sum(isinstance(m, Bottleneck) for m in model.modules()) == LAYERS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "softmax"}, "form='softmax': choose from 'bottleneck', 'prefix'"),
        ({"insertion": "serial"}, "insertion='serial': choose from"),
        ({"sublayers": ["mlp"]}, r"sublayers=\['mlp'\]: choose from"),
        ({"form": "prefix"}, r"preset\('prefix'\) is that"),
        ({"composition": "gated"}, "composition='gated' is a prefix's"),
        ({"composition": "add", "scaling": 2.0}, "composition='add' has no scaling=2.0: choose 'scaled'"),
        (
            {"sublayers": ["query"], "insertion": "sequential"},
            "insertion='sequential' is for attention and ffn",
        ),
        ({"sublayers": ["heads", "attention"]}, "'heads' and 'attention' wrap the same module"),
        ({"bottleneck_dim": 0}, "bottleneck_dim=0: give 1 or more"),
        ({"activation": "step"}, "activation='step' is not in transformers' ACT2FN"),
        ({"dropout": 1.0}, r"dropout=1.0: give a number in \[0, 1\)"),
        ({"prefix_length": 0}, "prefix_length=0"),
        ({"init": "xavier"}, "init='xavier'"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**options)


def test_presets():
    with pytest.raises(ValueError, match=r"preset 'mam' is not known: choose from houlsby, .* MamConfig"):
        BottleneckConfig.preset("mam")
    assert BottleneckConfig.preset("scaled_parallel").scaling == 4
    assert BottleneckConfig.preset("lora", bottleneck_dim=3).bottleneck_dim == 3
    plain = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="residual stream around '0' is not known"):
        get_peft_model(plain, BottleneckConfig.preset("pfeiffer", target_modules=["0"]))
