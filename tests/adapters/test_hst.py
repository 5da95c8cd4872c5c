from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from unfused.adapters import HstConfig
from unfused.adapters.hst import SideBlock, SideNetwork

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
STAGES = {"hidden_sizes": [4, 6], "num_heads": [1, 2]}
pytestmark = pytest.mark.filterwarnings("ignore")


def vit(kind=ViTModel, depth=3, size=32, **options):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=size, patch_size=8, num_hidden_layers=depth, num_labels=3, **SIZES, **options
    )
    return kind(config).eval()


def adapt(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, HstConfig(**{**STAGES, **options})).eval()


def shake(model):
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return model


def side_network(model) -> SideNetwork:
    return next(module for module in model.modules() if isinstance(module, SideNetwork))


def attention(block: SideBlock, y, keys):
    """One head, one query at a time."""
    out = torch.zeros_like(y)
    q, (k, v) = block.query(block.norm1(y)), block.key_value(keys).chunk(2, -1)
    width = y.shape[-1] // block.heads
    for b in range(len(y)):
        for n in range(y.shape[1]):
            for h in range(block.heads):
                part = slice(h * width, (h + 1) * width)
                weights = torch.softmax(k[b, :, part] @ q[b, n, part] / width**0.5, 0)
                out[b, n, part] = weights @ v[b, :, part]
    return block.out(out)


@torch.no_grad()
def naive(model, image):
    """The card's pseudo-code on the bare blocks, the map resized before the bridge, as the published code does."""
    net, base = side_network(model), model.get_base_model()
    x = base.embeddings(image)
    h, w = image.shape[-2] // 8, image.shape[-1] // 8
    metas, maps = [], []
    handles = [h for m in model.modules() for h in getattr(m, "handles", ())]
    hooks = [(h.hooks_dict_ref(), h.id) for h in handles]
    taken = [(d, i, d.pop(i)) for d, i in hooks if i in d]  # the bare blocks
    for token, layer in zip(net.meta_tokens, base.layers, strict=True):
        x = layer(torch.cat([token.expand(len(x), -1, -1), x], 1), None)
        metas.append(x[:, : len(token)])
        x = x[:, len(token) :]
        maps.append(x[:, 1:].mT.unflatten(2, (h, w)))
    for hooks_of, key, hook in taken:
        hooks_of[key] = hook
    y, pyramid = image, []
    for stage, (start, end) in zip(net.stages, net.groups, strict=True):
        y = stage.make_map(y)
        size, y = y.shape[-2:], stage.norm(y.flatten(2).mT)
        for at, block, norm in zip(range(start, end), stage.blocks, stage.meta_norms, strict=True):
            resized = F.interpolate(maps[at], size, mode="bilinear", align_corners=False)
            f = stage.bridge(resized.flatten(2).mT)
            keys = torch.cat([norm(stage.bridge(metas[at])), f.mean(1, keepdim=True)], 1)
            y = y + attention(block, y, keys)
            y = y + f
            y = y + block.mlp(block.norm2(y))
        y = stage.end_norm(y).mT.unflatten(2, size)
        pyramid.append(y)
    return pyramid


@pytest.mark.parametrize("meta_tokens", [1, 2])
def test_the_card_step_by_step(meta_tokens):
    model = shake(adapt(vit(), num_meta_tokens=meta_tokens, num_labels=5))
    image = torch.randn(2, 3, 32, 32)
    expected = naive(model, image)
    with torch.no_grad():
        maps, out = model.pyramid(image), model(pixel_values=image)
    assert [tuple(m.shape) for m in maps] == [(2, 4, 8, 8), (2, 6, 4, 4)]
    for found, want in zip(maps, expected, strict=True):
        assert torch.allclose(found, want, atol=1e-5)
    net = side_network(model)
    pooled = expected[-1].flatten(2).mean(2)
    bn = net.head_norm
    pooled = (pooled - bn.running_mean) / torch.sqrt(bn.running_var + 1e-6)
    assert torch.allclose(out.logits, pooled @ net.head.weight.T + net.head.bias, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "stages", "groups"),
    [
        (12, 4, [(0, 3), (3, 6), (6, 9), (9, 12)]),
        (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (6, 4, [(0, 2), (2, 3), (3, 4), (4, 6)]),
        (5, 2, [(0, 2), (2, 5)]),
    ],
)
def test_groups_of_any_depth(depth, stages, groups):
    config = HstConfig(hidden_sizes=[4] * stages, num_heads=[1] * stages, drop_path=0.2)
    net = SideNetwork(config, 8, depth, 3, None)
    assert net.groups == groups
    assert [len(stage.blocks) for stage in net.stages] == [end - start for start, end in groups]
    drops = [block.drop for stage in net.stages for block in stage.blocks]
    assert drops == pytest.approx([0.2 * i / (depth - 1) for i in range(depth)])


def test_size_and_freeze_rule_of_vit_b():
    with torch.device("meta"):
        base = ViTModel(ViTConfig(), add_pooling_layer=False)
        model = get_peft_model(base, HstConfig(num_labels=100))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert 0.76e6 < sum(trained.values()) < 0.79e6  # the paper: 0.78 M
    norms = [name for name in trained if "unfused_hst_norm" in name]
    assert len(norms) == 2 * 2 * 12 and all("layernorm_" in name for name in norms)
    assert not [name for name in trained if "unfused_hst_" not in name]
    net = side_network(model)
    assert [stage.bridge.out_features for stage in net.stages] == [32, 48, 64, 72]
    bound = (6 / (2 * 768)) ** 0.5
    assert net.meta_tokens.shape == (12, 1, 768) and 0.05 < bound < 0.07


def test_meta_tokens_start_xavier_uniform():
    tokens = SideNetwork(HstConfig(**STAGES), 1000, 3, 1, None).meta_tokens
    bound = (6 / 2000) ** 0.5
    assert tokens.abs().max() <= bound and tokens.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_gradients_run_through_the_vit_but_its_weights_are_frozen():
    model = adapt(vit(), num_labels=3).train()
    model(pixel_values=torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == ("unfused_hst_" in name), name
    first = model.get_base_model().layers[0].layernorm_before.unfused_hst_norm["default"]
    assert first.weight.grad.abs().sum() > 0  # the norm before every block feels the loss
    assert side_network(model).meta_tokens.grad.abs().sum((1, 2)).min() > 0


def test_norms_can_stay_frozen():
    model = adapt(vit(), train_layernorm=False)
    assert not [name for name, _ in model.named_parameters() if "unfused_hst_norm" in name]


def test_not_square_pictures_and_spectrograms():
    model = adapt(vit(), num_labels=3)
    with torch.no_grad():
        maps = model.pyramid(torch.randn(1, 3, 32, 64), interpolate_pos_encoding=True)
    assert [tuple(m.shape[-2:]) for m in maps] == [(8, 16), (4, 8)]
    torch.manual_seed(0)
    config = ASTConfig(
        max_length=40,
        num_mel_bins=16,
        patch_size=8,
        time_stride=8,
        num_hidden_layers=2,
        num_labels=3,
        **SIZES,
    )
    model = shake(adapt(ASTForAudioClassification(config)))  # patches overlap across frequencies: 1 x 5
    sound = torch.randn(2, 40, 16)
    with torch.no_grad():
        maps, logits = model.pyramid(sound), model(input_values=sound).logits
        assert [tuple(m.shape[-2:]) for m in maps] == [(4, 10), (2, 5)]  # (frequency, time) / 4, / 8
        late = sound.clone()
        late[:, -4:] += 5  # only the last frames
        change = (model.pyramid(late)[0] - maps[0]).abs().mean((0, 1, 2))
    assert logits.shape == (2, 3) and change[-1] > 2 * change[0]


def test_what_comes_out():
    image = torch.randn(2, 3, 32, 32)
    dense = adapt(vit())
    assert [tuple(m.shape) for m in dense(image).feature_maps] == [(2, 4, 8, 8), (2, 6, 4, 4)]
    assert dense(image).feature_maps[0].requires_grad
    model = adapt(vit(ViTForImageClassification))
    out = model(image, labels=torch.tensor([0, 2]), output_hidden_states=True)
    assert out.logits.shape == (2, 3) and len(out.hidden_states) == 4
    assert out.loss.item() == pytest.approx(F.cross_entropy(out.logits, torch.tensor([0, 2])).item())
    as_tuple = model(image, labels=torch.tensor([0, 2]), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], out.logits)
    soft = torch.tensor([[0.5, 0.5, 0], [0, 0.1, 0.9]])
    assert model(image, labels=soft).loss.item() == pytest.approx(
        -(soft * out.logits.log_softmax(-1)).sum(1).mean().item(), rel=1e-5
    )
    with model.disable_adapter():
        assert model(image, labels=torch.tensor([0, 2])).logits.shape == (2, 3)
        with pytest.raises(ValueError, match="no HST adapter is active"):
            model.pyramid(image)
    clip = adapt(CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, num_hidden_layers=2, **SIZES)))
    assert [tuple(m.shape) for m in clip(pixel_values=image).feature_maps] == [(2, 4, 8, 8), (2, 6, 4, 4)]


def test_inside_a_module_of_ones_own():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = vit(), nn.Conv2d(4, 2, 1)

        def forward(self, image):
            return self.head(self.backbone(image).feature_maps[0])

    model = adapt(Segmenter(), modules_to_save=["head"])
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 2, 8, 8)


def test_batch_norm_of_the_head_learns_only_in_training():
    model = adapt(vit(), num_labels=3)
    image, bn = torch.randn(4, 3, 32, 32), side_network(model).head_norm
    before = bn.running_mean.clone()
    model(image)
    assert torch.equal(bn.running_mean, before) and bn.weight is None and bn.eps == 1e-6
    model.train()(image)
    assert not torch.equal(bn.running_mean, before)


def test_drop_path_leaves_out_whole_samples_in_training_alone():
    torch.manual_seed(0)
    block = SideBlock(4, 1, 2.0, 0.5)
    x = torch.ones(4000, 3, 4)
    dropped = block._drop_path(x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and dropped.mean().item() == pytest.approx(
        1, abs=0.05
    )
    assert (dropped == dropped[:, :1, :1]).all()
    assert torch.equal(block.eval()._drop_path(x), x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_both_kinds(reentrant):
    grads = []
    for on in (False, True):
        model = shake(adapt(vit(ViTForImageClassification))).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        assert not side_network(model).training or next(iter(model.modules())).training
    assert len(grads[0]) == len(grads[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_copied_and_unloaded():
    base, image = vit(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = base(image).last_hidden_state
        model = shake(adapt(base, num_labels=3))
        twin = copy.deepcopy(model)
        assert torch.equal(twin(image).logits, model(image).logits)
        side_network(twin).meta_tokens.data.zero_()
        assert not torch.equal(twin(image).logits, model(image).logits)
        plain = model.unload()
        assert torch.equal(plain(image).last_hidden_state, expected)
    assert not plain._forward_hooks and not plain.layers[0]._forward_pre_hooks
    with pytest.raises(ValueError, match="cannot be merged"):
        twin.merge_and_unload()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_sizes": [8, 8], "num_heads": [2]}, "one positive number a stage"),
        ({"hidden_sizes": [8, 9], "num_heads": [2, 2]}, "9 is no multiple of its 2 heads"),
        ({"num_meta_tokens": 0}, "num_meta_tokens=0"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"layers_to_transform": [0]}, "reads every block"),
    ],
)
def test_what_a_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        HstConfig(**options)


def test_what_a_model_refuses():
    with pytest.raises(ValueError, match="4 stages for a model of 3 blocks"):
        adapt(vit(), hidden_sizes=None, num_heads=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="HST finds its places itself"):
        adapt(vit(), target_modules=["q_proj"])
    model = adapt(vit())
    with pytest.raises(ValueError, match="attention_mask is given"):
        model(
            torch.randn(1, 3, 32, 32),
            attention_mask=torch.ones(1, 17).long().index_fill(1, torch.tensor(3), 0),
        )
