from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from unfused.adapters import DvptConfig, cross_entropy_dice
from unfused.adapters.dvpt import SharedModule

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def vit(layers: int = 4) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_hidden_layers=layers, num_labels=3, **SIZES)
    ).eval()


def swin() -> SwinForImageClassification:
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 4], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return SwinForImageClassification(config).eval()


SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [3, 2],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
    "num_labels": 3,
}


def segformer(kind: type = SegformerForImageClassification) -> nn.Module:
    torch.manual_seed(0)
    return kind(SegformerConfig(**SEGFORMER)).eval()


def adapt(model: nn.Module, **options) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, DvptConfig(**options)).eval()


def open_gates(model: nn.Module, value: float = 0.7) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.fill_(value)
    return model


def pictures(size: int = 8, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_shared_module_against_the_formula():
    torch.manual_seed(0)
    module, x = open_gates(SharedModule(6, 3)), torch.randn(2, 7, 6)
    down, up = module.down, module.up
    z = x.numpy() @ down.weight.detach().numpy().T + down.bias.detach().numpy()
    z = z / (1 + np.exp(-1.702 * z))
    t, q = z[:, :5], z[:, 5:]
    q = np.stack([softmax(q[b] @ t[b].T / np.sqrt(3)) @ t[b] for b in range(2)])  # q never looks at q
    expected = 0.7 * (np.concatenate([t, q], 1) @ up.weight.detach().numpy().T + up.bias.detach().numpy())
    np.testing.assert_allclose(module(x, 2).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    expected = 0.7 * (z @ up.weight.detach().numpy().T + up.bias.detach().numpy())
    np.testing.assert_allclose(module(x, 0).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def by_hand(
    model: nn.Module, adapted: PeftModel, pixels: torch.Tensor, m: int, share: int, look: bool
) -> torch.Tensor:
    """DVPT on a ViT written out, with the paper's order: prompts first."""
    state = {k.replace("base_model.model.", ""): v for k, v in adapted.state_dict().items()}
    body = model.vit
    x = body.embeddings(pixels)
    prompts = (
        state["vit.embeddings.unfused_dvpt_prompt.default"]
        + state["vit.embeddings.unfused_dvpt_position.default"]
    )
    x = torch.cat([prompts.expand(len(x), -1, -1), x], 1)
    for i, block in enumerate(body.layers):
        x = x + block.attention(block.layernorm_before(x))[0]
        g = SharedModule(16, 4)
        start = f"vit.layers.{i - i % share}.mlp.unfused_dvpt_shared.default."
        g.load_state_dict({k[len(start) :]: v for k, v in state.items() if k.startswith(start)})
        z = g.down(x)
        z = z * torch.sigmoid(1.702 * z)
        if look:
            q, t = z[:, :m], z[:, m:]
            z = torch.cat([(q @ t.mT / 4**0.5).softmax(-1) @ t, t], 1)
        x = x + block.mlp(block.layernorm_after(x)) + g.gate * g.up(z)
    return model.classifier(body.layernorm(x)[:, : m + 1].mean(1))


@pytest.mark.parametrize("look", [True, False])
def test_vit_against_the_method_written_out(look):
    base = vit()
    model = open_gates(
        adapt(
            copy.deepcopy(base), num_virtual_tokens=5, bottleneck_size=4, share_every=3, cross_attention=look
        )
    )
    with torch.no_grad():
        expected = by_hand(base, model, pictures(), 5, 3, look)
        torch.testing.assert_close(model(pictures()).logits, expected, rtol=1e-5, atol=1e-5)


def test_modules_are_shared_and_saved_once(tmp_path):
    model = adapt(vit(7), num_virtual_tokens=2, bottleneck_size=4, share_every=3)
    model.save_pretrained(tmp_path)
    downs = [k for k in load_file(tmp_path / "adapter_model.safetensors") if k.endswith("down.weight")]
    assert [k.split("layers.")[1][0] for k in sorted(downs)] == ["0", "3", "6"]
    open_gates(model)(pictures()).logits.sum().backward()
    gates = [p for n, p in model.named_parameters() if n.endswith("gate")]
    assert len(gates) == 3 and all(p.grad.abs() > 0 for p in gates)


def test_groups_of_two_adapters_are_their_own():
    model = adapt(vit(4), num_virtual_tokens=2, bottleneck_size=4, share_every=2)
    model.add_adapter("other", DvptConfig(num_virtual_tokens=3, bottleneck_size=2, share_every=3))
    owners = {
        name: [k.split("layers.")[1][0] for k in model.state_dict() if k.endswith(f"{name}.gate")]
        for name in ("default", "other")
    }
    assert owners == {"default": ["0", "2"], "other": ["0", "3"]}
    model.set_adapter("other")
    assert model(pictures()).logits.isfinite().all()


def test_the_gate_moves_first():
    model = adapt(vit(), num_virtual_tokens=5, bottleneck_size=4)
    model(pictures()).logits.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g.abs().sum() == 0 for n, g in grads.items() if ".down." in n or ".up." in n)
    assert all(g.abs().sum() > 0 for n, g in grads.items() if n.endswith("gate") or "prompt" in n)


def test_paper_sizes_and_initial_values():
    model = adapt(vit(1))
    state = model.state_dict()
    prompt = state["base_model.model.vit.embeddings.unfused_dvpt_prompt.default"]
    position = state["base_model.model.vit.embeddings.unfused_dvpt_position.default"]
    assert prompt.shape == (50, 16) and abs(prompt.std() - 1) < 0.1
    assert abs(position.std() - 16**-0.5) < 0.05
    config = model.peft_config["default"]
    assert (config.num_virtual_tokens, config.bottleneck_size, config.share_every) == (50, 20, 3)


def test_blocks_can_be_chosen():
    model = adapt(vit(4), num_virtual_tokens=2, bottleneck_size=4, layers_to_transform=[1, 3], share_every=1)
    owners = [k.split("layers.")[1][0] for k in model.state_dict() if k.endswith("gate")]
    assert owners == ["1", "3"] and model(pictures()).logits.shape == (3, 3)
    with pytest.raises(ValueError, match="give indices from 0 to 3"):
        adapt(vit(4), layers_to_transform=[4])


def test_clip_reads_out_prompts_and_class_token():
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 2, "projection_dim": 6}
    base = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, **SIZES)).eval()
    model = open_gates(adapt(copy.deepcopy(base), num_virtual_tokens=5, bottleneck_size=4))
    out = model(pictures())
    hidden = out.last_hidden_state  # (3, 5 + 5, 16), prompts last
    assert hidden.shape == (3, 10, 16)
    norm, projection = base.vision_model.post_layernorm, base.visual_projection
    expected = projection(norm(torch.cat([hidden[:, :1], hidden[:, 5:]], 1)).mean(1))
    torch.testing.assert_close(out.image_embeds, expected)
    with pytest.raises(ValueError, match="last block, 1"):
        adapt(copy.deepcopy(base), layers_to_transform=[0])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(pictures())


@pytest.mark.parametrize("aggregate", ["corner", "broadcast"])
@pytest.mark.parametrize("make", [swin, segformer])
def test_hierarchical_block_against_the_formula(make, aggregate):
    model = open_gates(adapt(make(), num_virtual_tokens=3, bottleneck_size=4, aggregate=aggregate))
    block = next(m for m in model.modules() if type(m).__name__ in ("SwinLayer", "SegformerLayer"))
    norm, mlp = block.layernorm_after, block.mlp
    seen = {}
    norm.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    block.register_forward_hook(
        lambda m, args, out: seen.update(y=out[0] if isinstance(out, tuple) else out, args=args)
    )
    with torch.no_grad():
        model(pictures(32))
        x, query = seen["x"], norm.unfused_dvpt_query["default"]
        answers = (query @ x.mT / 8**0.5).softmax(-1) @ x
        if make is segformer:
            answers = answers * 0.7
        x = x.clone()
        if aggregate == "corner":
            x[:, :3] += answers
        else:
            x += answers.mean(1, keepdim=True)
        g = mlp.unfused_dvpt_shared["default"]
        z = g.down(x)
        extra = seen["args"][1:] if make is segformer else ()
        expected = x + mlp.base_layer(norm.base_layer(x), *extra) + 0.7 * g.up(z * torch.sigmoid(1.702 * z))
        torch.testing.assert_close(seen["y"], expected, rtol=1e-5, atol=1e-5)


def test_hierarchical_sizes_and_sharing_inside_a_stage():
    for make, share, groups in ((swin, 3, ["0.0", "1.0", "1.3"]), (segformer, 2, ["0.0", "0.2", "1.0"])):
        model = adapt(make())
        config = model.peft_config["default"]
        assert (config.num_virtual_tokens, config.bottleneck_size, config.share_every) == (10, 10, share)
        owners = [k for k in model.state_dict() if k.endswith("default.gate")]
        assert [".".join(k.replace(".blocks", "").split(".")[-6:-4]) for k in owners] == groups
        queries = [k for k in model.state_dict() if k.endswith("dvpt_query.default")]
        assert len(queries) == sum(model.base_model.model.config.depths)


def test_segformer_starts_as_the_base_model_and_swin_does_not(tmp_path):
    for make, same in ((segformer, True), (swin, False)):
        base = make()
        with torch.no_grad():
            before = base(pictures(32)).logits
            model = adapt(copy.deepcopy(base))
            assert torch.allclose(model(pictures(32)).logits, before, atol=1e-6) is same
            open_gates(model)
            expected = model(pictures(32)).logits
            assert not torch.allclose(expected, before, atol=1e-4)
            model.save_pretrained(tmp_path / make.__name__)
            again = PeftModel.from_pretrained(base, tmp_path / make.__name__)
            torch.testing.assert_close(again(pictures(32)).logits, expected)


def test_a_map_smaller_than_the_queries_and_the_ablation():
    assert adapt(segformer(), num_virtual_tokens=30)(pictures(32)).logits.shape == (3, 3)
    model = adapt(segformer(), cross_attention=False)
    assert not any("query" in name for name in model.state_dict())
    assert model(pictures(32)).logits.shape == (3, 3)


def test_segmentation_trains_with_its_loss():
    model = adapt(segformer(SegformerForSemanticSegmentation), modules_to_save=["decode_head"])
    logits = model(pictures(32)).logits  # (3, 3, 8, 8)
    labels = torch.randint(0, 3, (3, 8, 8))
    labels[0, 0] = 255
    loss = cross_entropy_dice(logits, labels)
    loss.backward()
    assert loss.isfinite() and any(
        p.grad is not None for n, p in model.named_parameters() if "decode_head" in n
    )
    chance, keep = logits.softmax(1).detach().numpy(), labels.numpy() != 255
    dice = [
        2
        * (chance[:, c] * (labels.numpy() == c))[keep].sum()
        / (chance[:, c][keep].sum() + (labels.numpy() == c).sum())
        for c in range(3)
    ]
    cross = nn.functional.cross_entropy(logits, labels, ignore_index=255).item()
    assert loss.item() == pytest.approx(cross + 1 - np.mean(dice), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"bottleneck_size": -1}, "bottleneck_size=-1"),
        ({"share_every": 0}, "share_every=0"),
        ({"aggregate": "mean"}, "aggregate='mean'"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DvptConfig(**options)


def test_targets_are_its_own_business():
    with pytest.raises(ValueError, match="layers_to_transform"):
        get_peft_model(vit(), DvptConfig(target_modules=["mlp"]))


def test_unload_gives_the_model_back():
    base = vit()
    with torch.no_grad():
        before = base(pictures()).logits
        again = adapt(base).unload()
        torch.testing.assert_close(again(pictures()).logits, before)
    assert not any("unfused_" in name for name in again.state_dict())
