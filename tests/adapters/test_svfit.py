"""SVFit: the start, the gradient, the ranks, the shapes of weights."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    ViTConfig,
    ViTModel,
)
from transformers.pytorch_utils import Conv1D

from unfused.adapters import SvFitConfig
from unfused.train.peft import param_groups

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def layer_of(model, name="0"):
    return model.base_model.model.get_submodule(name)


def move(layer, scale=0.1):
    with torch.no_grad():
        layer.unfused_svfit_t["default"].normal_(0, scale)
    return layer.unfused_svfit_t["default"].detach().numpy()


@pytest.mark.parametrize("r", [3, 8])  # token by token, and through the weight
def test_forward_and_gradient_are_the_papers(r):
    model = get_peft_model(net(nn.Linear(8, 12)), SvFitConfig(target_modules=["0"], r=r))
    layer = layer_of(model)
    x = torch.randn(4 if r == 3 else 200, 8)
    assert layer._through_weight(["default"], x) == (r == 8)
    t = move(layer)
    weight, bias = layer.base_layer.weight.detach().numpy(), layer.base_layer.bias.detach().numpy()
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    residual = weight - (u[:, :r] * s[:r]) @ v[:r]
    changed = residual + (u[:, :r] * (s[:r] + t)) @ v[:r]
    y = model(x)
    np.testing.assert_allclose(y.detach().numpy(), x.numpy() @ changed.T + bias, atol=1e-5)
    target = torch.randn_like(y)
    (y * target).sum().backward()
    by_weight = target.numpy().T @ x.numpy()  # dL/dW'
    np.testing.assert_allclose(
        layer.unfused_svfit_t["default"].grad.numpy(),
        np.einsum("ir,ij,rj->r", u[:, :r], by_weight, v[:r]),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("kind", ["absolute", "relative", "exp"])
def test_parameterizations(kind):
    model = get_peft_model(
        net(nn.Linear(6, 5)), SvFitConfig(target_modules=["0"], r=4, parameterization=kind)
    )
    t = torch.from_numpy(move(layer_of(model), 1.0))
    before, after = model.base_model.singular_values()["0"]
    expected = {"absolute": before + t, "relative": before * (1 + t), "exp": before * torch.exp(t)}[kind]
    torch.testing.assert_close(after, expected)
    assert kind != "exp" or (after > 0).all()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_energy_chooses_the_fewest_values(power, energy):
    linear = nn.Linear(10, 10)
    values = np.array([8, 4, 2, 1, 0.5, 0.25, 0.1, 0.1, 0.1, 0.1], dtype=np.float32)
    left, right = (np.linalg.qr(np.random.default_rng(i).normal(size=(10, 10)))[0] for i in (0, 1))
    linear.weight.data = torch.from_numpy(((left * values) @ right).astype(np.float32))
    model = get_peft_model(net(linear), SvFitConfig(target_modules=["0"], energy=energy, power=power))
    share = np.cumsum(values**power) / np.sum(values**power)
    assert layer_of(model).unfused_svfit_t["default"].numel() == 1 + int((share < energy - 1e-6).sum())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution_is_unfolded_group_by_group(groups):
    conv = nn.Conv2d(
        4,
        8,
        3,
        stride=2,
        padding=1,
        dilation=1,
        groups=groups,
        padding_mode="reflect" if groups == 1 else "zeros",
    )
    model = get_peft_model(net(conv), SvFitConfig(target_modules=["0"], r=5))
    layer, x = layer_of(model), torch.randn(2, 4, 8, 8)
    t = move(layer).reshape(groups, -1)
    weight = conv.weight.detach().numpy().reshape(groups, 8 // groups, -1)
    changed = []
    for part, change in zip(weight, t, strict=True):
        u, _, v = np.linalg.svd(part, full_matrices=False)
        changed.append(part + (u[:, : len(change)] * change) @ v[: len(change)])
    expected = conv._conv_forward(x, torch.from_numpy(np.stack(changed)).view_as(conv.weight), conv.bias)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-5, rtol=1e-5)


def test_conv1d_is_transposed():
    model = get_peft_model(net(Conv1D(6, 4)), SvFitConfig(target_modules=["0"], r=2))
    layer, x = layer_of(model), torch.randn(3, 4)
    t, weight = move(layer), layer.base_layer.weight.detach().numpy()
    u, _, v = np.linalg.svd(weight.T, full_matrices=False)
    np.testing.assert_allclose(
        model(x).detach().numpy(), x.numpy() @ (weight.T + (u[:, :2] * t) @ v[:2]).T, atol=1e-5
    )


@pytest.mark.parametrize("parts", ["qv", "k", "qkv"])
def test_gpt2s_fused_matrix_is_three(parts):
    gpt2 = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8))
    model = get_peft_model(gpt2, SvFitConfig(r=2, fused_parts=parts))
    layer = layer_of(model, "h.0.attn.c_attn")
    assert layer.unfused_svfit_t["default"].numel() == 2 * len(parts)
    t = move(layer).reshape(len(parts), 2)
    delta = layer.get_delta_weight("default").detach().numpy().T.reshape(3, 16, 16)
    weight = layer.base_layer.weight.detach().numpy().T.reshape(3, 16, 16)
    for i, part in enumerate("qkv"):
        u, _, v = np.linalg.svd(weight[i])
        expected = (u[:, :2] * t[parts.index(part)]) @ v[:2] if part in parts else np.zeros((16, 16))
        np.testing.assert_allclose(delta[i], expected, atol=1e-5)


def test_fused_by_head_is_three_too():
    neox = GPTNeoXModel(GPTNeoXConfig(vocab_size=20, max_position_embeddings=8, **SIZES))
    model = get_peft_model(neox, SvFitConfig(r=2, fused_parts="k"))
    layer = layer_of(model, "layers.0.attention.query_key_value")
    move(layer)
    delta = layer.get_delta_weight("default").view(2, 3, 8, 16)  # (heads, part, rows of a head, columns)
    weight = layer.base_layer.weight.view(2, 3, 8, 16)
    assert not delta[:, [0, 2]].any()
    u, _, v = np.linalg.svd(weight[:, 1].detach().numpy().reshape(16, 16))
    expected = (u[:, :2] * layer.unfused_svfit_t["default"].detach().numpy()) @ v[:2]
    np.testing.assert_allclose(delta[:, 1].detach().numpy().reshape(16, 16), expected, atol=1e-5)


@pytest.mark.parametrize("save_basis", [False, True])
def test_the_file_holds_r_numbers_a_matrix(save_basis, tmp_path):
    bert = BertModel(BertConfig(vocab_size=20, **SIZES))
    state = bert.state_dict()
    state = {key: value.clone() for key, value in state.items()}
    model = get_peft_model(bert, SvFitConfig(energy=0.9, save_basis=save_basis))
    names = list(model.base_model.singular_values())
    assert [name.rpartition(".")[2] for name in names] == ["query", "value"]
    for name in names:
        move(layer_of(model, name))
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert len(file) == (8 if save_basis else 2)
    again = BertModel(BertConfig(vocab_size=20, **SIZES))
    again.load_state_dict(state)
    ids = torch.arange(6)[None]
    loaded = PeftModel.from_pretrained(again, tmp_path)
    torch.testing.assert_close(loaded.eval()(ids)[0], model.eval()(ids)[0])


def test_the_rank_chosen_by_energy_is_the_files(tmp_path):
    base = net(nn.Linear(9, 9))
    model = get_peft_model(base, SvFitConfig(target_modules=["0"], energy=0.6))
    r = layer_of(model).unfused_svfit_t["default"].numel()
    model.save_pretrained(tmp_path)
    flat = net(nn.Linear(9, 9))
    flat[0].weight.data = torch.eye(9)  # where 60 % of the energy takes more values
    loaded = PeftModel.from_pretrained(flat, tmp_path, is_trainable=True)
    t = layer_of(loaded).unfused_svfit_t["default"]
    assert t.shape == (r,) and t.requires_grad and r < 6


def test_a_second_adapter_decomposes_the_unmerged_weight():
    model = get_peft_model(net(nn.Linear(5, 5)), SvFitConfig(target_modules=["0"], r=5))
    layer = layer_of(model)
    move(layer, 1.0)
    model.merge_adapter()
    model.add_adapter("other", SvFitConfig(target_modules=["0"], r=5))
    torch.testing.assert_close(layer.unfused_svfit_basis["other"].s, layer.unfused_svfit_basis["default"].s)


def test_half_precision_keeps_the_values_in_single():
    model = get_peft_model(net(nn.Linear(8, 8)).to(torch.bfloat16), SvFitConfig(target_modules=["0"], r=2))
    basis = layer_of(model).unfused_svfit_basis["default"]
    assert basis.u.dtype == torch.bfloat16 and basis.s.dtype == torch.float32
    assert layer_of(model).unfused_svfit_t["default"].dtype == torch.float32


def test_merging_logs_flipped_directions(caplog):
    model = get_peft_model(net(nn.Linear(4, 4)), SvFitConfig(target_modules=["0"], r=2))
    with torch.no_grad():
        layer_of(model).unfused_svfit_t["default"].fill_(-100.0)
    with caplog.at_level(logging.WARNING):
        model.merge_and_unload()
    assert "2 singular values went below 0" in caplog.text


def test_default_targets_by_kind_of_model():
    def last_names(model):
        found = get_peft_model(model, SvFitConfig(r=1)).base_model.singular_values()
        return {name.rpartition(".")[2] for name in found}

    assert last_names(ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES))) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert last_names(BertModel(BertConfig(vocab_size=20, **SIZES))) == {"query", "value"}
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    assert last_names(unet) == {"to_q", "to_k", "to_v", "0"}
    with pytest.raises(ValueError, match="target_modules is not given"):
        get_peft_model(net(nn.Linear(2, 2)), SvFitConfig())


def test_param_groups_keep_decay_off_the_values():
    bert = BertModel(BertConfig(vocab_size=20, **SIZES))
    model = get_peft_model(bert, SvFitConfig(r=2, modules_to_save=["pooler"]))
    groups = param_groups(model, adapter_lr=1e-2, head_lr=1e-3, weight_decay=0.1)
    assert groups[0]["weight_decay"] == 0 and groups[0]["lr"] == 1e-2 and len(groups[0]["params"]) == 2
    assert [group["weight_decay"] for group in groups[1:]] == [0.1, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"energy": 0.0},
        {"energy": 1.5},
        {"power": 3},
        {"parameterization": "log"},
        {"fused_parts": "qq"},
        {"fused_parts": ""},
    ],
)
def test_config_errors_name_the_argument(options):
    with pytest.raises(ValueError, match=f"SvFitConfig: {next(iter(options))}="):
        SvFitConfig(**options)
