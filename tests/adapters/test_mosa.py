"""MoSA's arithmetic: parts, their mean, the loss of two passes, what is stored."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from unfused.adapters import BottleneckConfig, MosaConfig, MosaTrainer, mosa_loss
from unfused.adapters.mosa import SplitBottleneck, _divergence
from unfused.nn.bottleneck import Site

pytestmark = pytest.mark.filterwarnings("ignore")
D = 16
SITE = Site("layers.0.mlp", "output", "stream", "", D, D)


def vit(seed: int = 0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)
    config.num_labels = 3
    return ViTForImageClassification(config).eval()


def batch(items: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(items, 1, 8, 8, generator=generator),
        "labels": torch.arange(items) % 3,
    }


def mosa(seed: int = 0, **options) -> PeftModel:
    options = {
        "bottleneck_dim": 4,
        "scaling": 1.0,
        "dropout": 0.0,
        "modules_to_save": ["classifier"],
    } | options
    model = get_peft_model(vit(), MosaConfig(**options))
    generator = torch.Generator().manual_seed(seed + 7)
    for net in nets(model):
        for linear in (net.up, net.down):
            for parameter in linear.parameters():
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def nets(model: nn.Module) -> list[SplitBottleneck]:
    return [m for m in model.modules() if isinstance(m, SplitBottleneck)]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()["pixel_values"]).logits


def part(net: SplitBottleneck, x: torch.Tensor, down: int, up: int) -> torch.Tensor:
    """One part written out from the definition."""
    weights = {}
    for side, index in (("down", down), ("up", up)):
        weight, bias = getattr(net, side).weight, getattr(net, side).bias
        if side in net.split:
            start = net.down_start if side == "down" else torch.zeros_like(weight)
            weight = torch.where(getattr(net, f"{side}_part") == index, weight, start)
            bias = torch.where(getattr(net, f"{side}_bias_part") == index, bias, 0)
        weights[side] = (weight, bias)
    hidden = nn.functional.gelu(nn.functional.linear(net.norm(x), *weights["down"]))
    return net.scaling * nn.functional.linear(hidden, *weights["up"])


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_parts_are_disjoint_and_complete(experts):
    net = SplitBottleneck(SITE, MosaConfig(bottleneck_dim=5, num_experts=experts))
    counts = torch.bincount(net.up_part.flatten().long(), minlength=experts)
    assert len(counts) == experts and counts.sum() == 5 * D and counts.max() - counts.min() <= 1
    assert net.split == ("up",) and not hasattr(net, "down_part")
    again = SplitBottleneck(SITE, MosaConfig(bottleneck_dim=5, num_experts=experts))
    elsewhere = Site("layers.1.mlp", "output", "stream", "", D, D)
    other = SplitBottleneck(elsewhere, MosaConfig(bottleneck_dim=5, num_experts=experts))
    seeded = SplitBottleneck(SITE, MosaConfig(bottleneck_dim=5, num_experts=experts, seed=1))
    assert torch.equal(net.up_part, again.up_part)
    assert not torch.equal(net.up_part, other.up_part) and not torch.equal(net.up_part, seeded.up_part)
    assert sum(p.numel() for p in net.parameters()) == 2 * 5 * D + 5 + D + 2 * D  # the plain adapter's count


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_training_draws_a_part_and_evaluation_is_their_mean(share):
    experts = 3
    net = nets(mosa(share=share, num_experts=experts))[0]
    x = torch.randn(2, 4, D)
    pairs = [(a, b) for a in range(experts) for b in range(experts)]
    outputs = {pair: part(net, x, *pair) for pair in pairs}
    net.train()
    seen = set()
    for _ in range(150):
        found = net(x)
        match = [pair for pair in pairs if torch.allclose(outputs[pair], found, atol=1e-6)]
        assert match
        seen.add(match[0])
    assert len(seen) == (9 if share == "none" else 3), "two independent draws where both are split"
    net.eval()
    if share == "down":  # linear in what is split: the mean over parts, exactly
        torch.testing.assert_close(net(x), torch.stack([outputs[0, i] for i in range(experts)]).mean(0))
    for side in net.split:
        parts = [net.weights(side, torch.tensor(i)) for i in range(experts)]
        merged = net.weights(side, None)
        for kind in (0, 1):
            torch.testing.assert_close(merged[kind], torch.stack([p[kind] for p in parts]).mean(0))


def test_only_the_drawn_part_and_the_shared_map_get_a_gradient():
    net = nets(mosa())[0].train()
    net(torch.randn(2, 4, D)).square().sum().backward()
    moved = net.up.weight.grad != 0
    assert (
        len(net.up_part[moved].unique()) == 1 and (net.up_part == net.up_part[moved][0]).sum() == moved.sum()
    )
    assert (net.down.weight.grad != 0).all()


def test_blocks_and_passes_draw_independently():
    model = mosa(num_experts=2).train()
    drawn = []
    for net in nets(model):
        original = net.weights

        def weights(side, part, original=original):
            if side == "up":
                drawn.append(int(part))
            return original(side, part)

        net.weights = weights
    for _ in range(40):
        mosa_loss(model, batch(2))
    patterns = torch.tensor(drawn).view(40, 4)  # two passes of two blocks
    assert len(patterns.unique(dim=0)) == 16


def test_adaptformer_reads_the_residual_stream():
    model = mosa()
    block = model.base_model.model.vit.layers[0]
    net, h = nets(model)[0], torch.randn(2, 5, D)
    with torch.no_grad():
        found = block.mlp(block.layernorm_after(h))
        expected = block.mlp.base_layer(block.layernorm_after(h)) + net(h)
    torch.testing.assert_close(found, expected)
    assert isinstance(net.norm, nn.LayerNorm)


def test_loss_of_two_passes():
    model = mosa(num_experts=4).train()
    inputs = batch()
    torch.manual_seed(6)
    one, two = model(**inputs), model(**inputs)
    p, q = one.logits.softmax(-1), two.logits.softmax(-1)
    divergence = ((q * (q.log() - p.log())).sum(-1) + (p * (p.log() - q.log())).sum(-1)).mean() / 2
    assert divergence > 1e-4
    for weight, second in ((1.0, 0.0), (0.5, 0.3)):
        config = MosaConfig(consistency_weight=weight, second_loss_weight=second)
        torch.manual_seed(6)
        found = mosa_loss(model, inputs, config)
        torch.testing.assert_close(found, one.loss + weight * divergence + second * two.loss)
    # the target sides are constants: the gradient at p is (softmax(p) - softmax(q)) / 2N
    a, b = one.logits.detach().requires_grad_(), two.logits.detach().requires_grad_()
    _divergence(a, b, None).backward()
    torch.testing.assert_close(a.grad, (p - q) / (2 * len(p)))
    torch.testing.assert_close(b.grad, (q - p) / (2 * len(p)))
    tokens, labels = torch.randn(2, 2, 3, 4), torch.tensor([[0, -100, 1], [-100, -100, 2]])
    keep = labels != -100
    torch.testing.assert_close(
        _divergence(*tokens, labels), _divergence(tokens[0][keep], tokens[1][keep], None)
    )
    config = MosaConfig(consistency_weight=0.0, hidden_weight=2.0, hidden_layers=1)
    torch.manual_seed(6)
    found = mosa_loss(model, inputs, config)
    torch.manual_seed(6)
    one, two = (model(**inputs, output_hidden_states=True) for _ in range(2))
    torch.testing.assert_close(
        found, one.loss + 2 * (one.hidden_states[1] - two.hidden_states[1]).square().mean()
    )


@pytest.mark.parametrize("share", ["down", "up", "none"])
@pytest.mark.parametrize("style", ["adaptformer", "pfeiffer", "houlsby", "lora"])
def test_saved_as_a_plain_bottleneck(style, share, tmp_path):
    model = mosa(style=style, share=share)
    assert len(nets(model)) == {"houlsby": 4, "lora": 8}.get(style, 2)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "UNFUSED_BOTTLENECK"
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(v.numel() for v in state.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    again = PeftModel.from_pretrained(vit(), tmp_path)
    assert isinstance(again.peft_config["default"], BottleneckConfig)
    torch.testing.assert_close(logits(again), expected)
    if style == "lora":
        torch.testing.assert_close(logits(again.merge_and_unload()), expected)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected)
    else:
        with pytest.raises(ValueError, match="Mosa cannot be merged: a bottleneck with a nonlinearity"):
            model.merge_and_unload()


def test_merging_for_good(tmp_path):
    for share in ("down", "none"):
        model = mosa(share=share)
        expected = logits(model)
        model.base_model.merge_experts()
        torch.testing.assert_close(logits(model), expected)
        torch.testing.assert_close(logits(model.train()), expected)
        assert model.peft_config["default"].num_experts == 1
        model.eval().save_pretrained(tmp_path / share)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(vit(), tmp_path / share)), expected)
        model.load_adapter(tmp_path / share, "default")
        torch.testing.assert_close(logits(model.eval()), expected)


def trainer(model: nn.Module, folder, **options) -> MosaTrainer:
    rows = batch(12)
    rows = [{name: column[i] for name, column in rows.items()} for i in range(12)]
    arguments = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    arguments |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0} | options
    return MosaTrainer(model, TrainingArguments(folder, **arguments), train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("share", ["down", "none"])
def test_trainer_resumes_where_it_was(share, tmp_path):
    runs = []
    for resume in (None, str(tmp_path / "whole/checkpoint-2")):
        run = trainer(mosa(share=share), tmp_path / ("resumed" if resume else "whole"))
        run.train(resume_from_checkpoint=resume)
        runs.append({n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad})
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-5, atol=1e-6)


def test_trainer_trains_with_two_passes_and_evaluates_the_merged_adapter(tmp_path):
    model = mosa()
    run = trainer(model, tmp_path)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(model.training))
    found = run.compute_loss(model.train(), batch())
    assert calls == [True, True] and found > 0
    calls.clear()
    loss = run.evaluate()["eval_loss"]
    assert set(calls) == {False} and len(calls) == 2  # 12 rows by 8
    with torch.no_grad():
        expected = nn.functional.cross_entropy(
            model.eval()(batch(12)["pixel_values"]).logits, batch(12)["labels"]
        )
    assert abs(loss - expected.item()) < 1e-5
    with pytest.raises(ValueError, match="without MoSA"):
        trainer(vit(), tmp_path).train()


def test_accumulation_weighs_the_divergence_as_the_loss(tmp_path):
    """The Trainer divides a loss by the accumulated steps, unless the model has divided it by the items of all of them."""
    model = mosa().train()
    run = trainer(model, tmp_path)
    extra = {}
    for accepts, steps in ((True, 1), (True, 2), (False, 2)):
        run.model_accepts_loss_kwargs, run.current_gradient_accumulation_steps = accepts, steps
        losses = []
        for weight in (1.0, 0.0):
            model.peft_config["default"].consistency_weight = weight
            torch.manual_seed(6)
            losses.append(
                run.compute_loss(model, batch(), num_items_in_batch=torch.tensor(12) if accepts else None)
            )
        extra[accepts, steps] = (losses[0] - losses[1]).item()
    assert extra[True, 1] > 1e-4
    assert abs(extra[True, 2] - extra[True, 1] / 2) < 1e-6 and abs(extra[False, 2] - extra[True, 1]) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "lisa"}, "style='lisa': choose from 'adaptformer'"),
        ({"share": "both"}, "share='both': choose 'down', 'up' or 'none'"),
        ({"num_experts": 0}, "num_experts=0: give 1 or more"),
        ({"num_experts": 300}, "num_experts=300: give 255 at most"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"consistency_weight": -1.0}, "consistency_weight=-1.0: give 0 or more"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MosaConfig(**options)


def test_biases_whole():
    net = nets(mosa(split_bias=False, num_experts=2))[0]
    assert not hasattr(net, "up_bias_part")
    for index in (torch.tensor(0), torch.tensor(1), None):
        assert torch.equal(net.weights("up", index)[1], net.up.bias)
