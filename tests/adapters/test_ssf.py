"""SSF: the equations, layer by layer; what merges into what; the paper's counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

from unfused.adapters import SsfConfig
from unfused.train.peft import param_groups


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def adapted(*layers, **options):
    return get_peft_model(net(*layers), SsfConfig(**options))


def vectors(model, name="0", adapter="default"):
    layer = model.base_model.model.get_submodule(name)
    return (
        layer.unfused_ssf_scale[adapter].detach().numpy(),
        layer.unfused_ssf_shift[adapter].detach().numpy(),
    )


def spread(model):
    """Far from the identity, one scale 0 and one negative: nothing may divide by them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "unfused_ssf" in name:
                parameter.normal_(0.5)
                parameter[0] = 0.0 if "scale" in name else 1.0
                parameter[1] = -1.0
    return model


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "conv1d of gpt-2": (lambda: Conv1D(4, 6), (3, 5, 6)),
    "conv": (lambda: nn.Conv2d(6, 4, 3), (3, 6, 5, 5)),
    "depth-wise conv without bias": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), (3, 6, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 5, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 5, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (3, 6, 5, 5)),
}


@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_scales_and_shifts_the_output_and_merges_into_the_layer(make, shape):
    model = spread(adapted(make(), target_modules=["0"])).eval()
    x = torch.randn(shape)
    scale, shift = vectors(model)
    with torch.no_grad():
        got = model(x).numpy()
        with model.disable_adapter():
            base = model(x).numpy()
        channel = (-1, 1, 1) if len(shape) == 4 else (-1,)
        np.testing.assert_allclose(got, base * scale.reshape(channel) + shift.reshape(channel), atol=1e-5)
        model.merge_adapter()
        np.testing.assert_allclose(model(x).numpy(), got, atol=1e-5)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert np.array_equal(model(x).numpy(), base)  # bit for bit, through a scale of 0
        plain = model.merge_and_unload()
        np.testing.assert_allclose(plain(x).numpy(), got, atol=1e-5)
        assert type(plain[0]) is type(make()) and plain[0].bias is not None


def test_merged_weights_are_the_equations():
    model = spread(adapted(nn.Linear(6, 4), target_modules=["0"]))
    base = model.base_model.model[0].base_layer
    weight, bias = base.weight.detach().numpy().copy(), base.bias.detach().numpy().copy()
    scale, shift = vectors(model)
    plain = model.merge_and_unload()
    np.testing.assert_allclose(plain[0].weight.detach().numpy(), np.diag(scale) @ weight, rtol=1e-6)
    np.testing.assert_allclose(plain[0].bias.detach().numpy(), scale * bias + shift, rtol=1e-6)


def test_gradients_are_the_equations():
    model = spread(adapted(nn.Linear(6, 4), target_modules=["0"]))
    x, pull = torch.randn(7, 6), torch.randn(7, 4)
    (model(x) * pull).sum().backward()
    layer = model.base_model.model[0]
    base = layer.base_layer(x)
    torch.testing.assert_close(layer.unfused_ssf_scale["default"].grad, (base * pull).sum(0))
    torch.testing.assert_close(layer.unfused_ssf_shift["default"].grad, pull.sum(0))
    assert layer.base_layer.weight.grad is None


def test_a_tied_weight_is_copied_before_it_is_scaled():
    embedding, out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    out.weight = embedding.weight
    model = spread(adapted(embedding, out, target_modules=["1"]))
    before = embedding.weight.detach().clone()
    plain = model.merge_and_unload()
    assert torch.equal(plain[0].weight, before) and not torch.equal(plain[1].weight, before)


@pytest.mark.parametrize("names", [["default", "other"], ["other", "default"]])
def test_active_adapters_compose_in_activation_order(names):
    model = adapted(nn.Linear(6, 4), target_modules=["0"])
    model.add_adapter("other", SsfConfig(target_modules=["0"]))
    spread(model)
    x = torch.randn(3, 6)
    y = model.base_model.model[0].base_layer(x).detach().numpy()
    for name in names:
        scale, shift = vectors(model, adapter=name)
        y = scale * y + shift
    model.base_model.set_adapter(names)
    np.testing.assert_allclose(model(x).detach().numpy(), y, atol=1e-5)
    plain = model.merge_and_unload(adapter_names=names)
    np.testing.assert_allclose(plain(x).detach().numpy(), y, atol=1e-5)


def test_the_papers_start_is_near_the_identity_and_ours_at_it():
    near = adapted(nn.Linear(4, 20_000), target_modules=["0"])
    scale, shift = vectors(near)
    assert scale.mean() == pytest.approx(1, abs=1e-3) and scale.std() == pytest.approx(0.02, rel=0.03)
    assert shift.mean() == pytest.approx(0, abs=1e-3) and shift.std() == pytest.approx(0.02, rel=0.03)
    scale, shift = vectors(adapted(nn.Linear(4, 5), target_modules=["0"], init_weights="identity"))
    assert (scale == 1).all() and (shift == 0).all()


def vit(width, depth, mlp, **options):
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=2,
    )
    model = get_peft_model(
        ViTForImageClassification(config), SsfConfig(modules_to_save=["classifier"], **options)
    )
    return model, sum(p.numel() for n, p in model.named_parameters() if "unfused_ssf" in n)


def test_places_and_counts_are_the_papers():
    """22 widths a block and 4 outside; ViT-B/16 has 205,824."""
    assert 12 * 22 * 768 + 4 * 768 == 205_824
    model, count = vit(16, 3, 64)
    assert count == 3 * 22 * 16 + 4 * 16
    wrapped = {
        n.removesuffix(".base_layer").split(".")[-1]
        for n, _ in model.named_modules()
        if n.endswith(".base_layer")
    }
    assert wrapped == {
        "projection",
        "layernorm_before",
        "layernorm_after",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "fc1",
        "fc2",
        "layernorm",
    }
    assert vit(16, 3, 64, shift=False)[1] == count // 2


def test_no_decay_reaches_the_vectors():
    model, count = vit(16, 1, 64)
    groups = param_groups(model, adapter_lr=1e-2, head_lr=1e-3, weight_decay=0.05)
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert [p.ndim for p in decayed] == [2]  # the head's matrix
    assert sum(p.numel() for g in groups if g["lr"] == 1e-2 for p in g["params"]) == count


def test_a_shift_cannot_be_merged_into_an_rms_norm():
    x = torch.randn(3, 6)
    model = spread(adapted(nn.RMSNorm(6), target_modules=["0"]))
    with pytest.raises(ValueError, match="shift=False"):
        model.merge_and_unload()
    model = spread(adapted(nn.RMSNorm(6), target_modules=["0"], shift=False))
    got = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), got)


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(6, elementwise_affine=False), nn.BatchNorm2d(6, affine=False)]
)
def test_a_norm_without_weights_is_named(layer):
    with pytest.raises(ValueError, match="exclude_modules"):
        adapted(layer, nn.Linear(6, 6))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"SsfConfig: init_weights='zeros': choose 'normal' or 'identity'"):
        SsfConfig(init_weights="zeros")
    with pytest.raises(ValueError, match="'0' is a ReLU; SsfConfig adapts Linear, Conv1D"):
        adapted(nn.ReLU(), nn.Linear(6, 6), target_modules=["0", "1"])
