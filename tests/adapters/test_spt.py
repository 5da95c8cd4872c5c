from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from unfused.adapters import SptConfig, allocate_spt
from unfused.adapters.spt import SptLayer, SptTokenLayer
from unfused.nn.tuner import tuner_layers

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "tiny.py")
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

BATCHES = [tiny.make_batch("vit", seed) for seed in (1, 2, 3)]
TOKEN = 16


def vit():
    return tiny.make_model("vit")


def config(**options):
    return SptConfig(**{"budget": 1000, "r": 2, "dropout": 0.0, "drop_path": 0.0, **options})


def planned(base=None, batches=BATCHES, **options):
    base, cfg = base or vit(), config(**options)
    return allocate_spt(base, cfg, batches), cfg, base


def naive_scores(model, batches):
    scores = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, p in model.named_parameters():
            scores[name] = scores.get(name, 0) + p.grad.square()
    return scores


def in_the_plan(name):
    return "embeddings" not in name and "classifier" not in name


def naive_cost(scores, top, r, alpha, beta):
    """The card's rule, tensor by tensor, for one T."""
    names = list(scores)
    flat = torch.cat([scores[n].reshape(-1) for n in names])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(top).indices] = True
    total, plan = TOKEN, {}
    for name, part in zip(names, mask.split([scores[n].numel() for n in names]), strict=True):
        count, shape = int(part.sum()), scores[name].shape
        if len(shape) == 2 and count >= r * sum(shape) / alpha:
            plan[name], cost = "structured", r * sum(shape)
        elif len(shape) == 1 and count >= shape[0] / beta:
            plan[name], cost = "whole", shape[0]
        else:
            plan[name], cost = part.nonzero().squeeze(1), count
        total += cost
    return total, plan


@pytest.mark.parametrize(("budget", "alpha", "beta"), [(600, 10.0, 5.0), (1500, 1.0, 1.0), (1000, 3.0, 5.0)])
def test_plan_is_the_cards_rule(budget, alpha, beta):
    plan, cfg, base = planned(budget=budget, structured_ratio=alpha, vector_ratio=beta)
    scores = {n: s for n, s in naive_scores(vit(), BATCHES).items() if in_the_plan(n)}
    cost, naive = naive_cost(scores, plan.entries, 2, alpha, beta)
    assert cost == plan.cost
    assert all(abs(plan.cost - budget) <= abs(c - budget) for _, c in plan.sweep)
    assert len(plan.sweep) > 100
    for top, c in plan.sweep[:: len(plan.sweep) // 10]:
        assert naive_cost(scores, top, 2, alpha, beta)[0] == c
    for name, what in naive.items():
        module = name.rpartition(".")[0]
        parts = cfg.allocation.get(module, {})
        if isinstance(what, str) and what == "structured":
            assert parts["structured"] and "weight" not in parts and name not in cfg.positions
        elif isinstance(what, str):
            assert cfg.positions[name].tolist() == list(range(scores[name].numel()))
        else:
            assert cfg.positions.get(name, torch.empty(0)).tolist() == what.tolist()
    kinds = {w if isinstance(w, str) else "direct" for w in naive.values()}
    assert budget != 1000 or kinds == {"structured", "whole", "direct"}
    model = get_peft_model(base, cfg)
    assert sum(p.numel() for n, p in model.named_parameters() if "unfused_spt" in n) == plan.cost


def test_squares_of_batches_are_not_of_samples():
    cfg = config(structured_ratio=0, vector_ratio=0, budget=50)
    allocate_spt(vit(), cfg, BATCHES, grad_square="sample")
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in BATCHES for i in range(8)]
    scores = {n: s for n, s in naive_scores(vit(), singles).items() if in_the_plan(n)}
    _, naive = naive_cost(scores, 50 - TOKEN, 2, 1e-9, 1e-9)
    found = {n: i.tolist() for n, i in cfg.positions.items()}
    assert found == {n: i.tolist() for n, i in naive.items() if len(i)}
    _, batchwise, _ = planned(structured_ratio=0, vector_ratio=0, budget=50)
    assert found != {n: i.tolist() for n, i in batchwise.positions.items()}


def test_without_modules_the_budget_is_met_exactly_even_with_ties():
    base, cfg = vit(), config(structured_ratio=0, vector_ratio=0, budget=500)
    flat = {n: torch.ones_like(p) for n, p in base.named_parameters() if in_the_plan(n)}
    plan = allocate_spt(base, cfg, scores=flat)
    assert plan.cost == 500 and plan.entries == 500 - TOKEN
    assert not any(parts.get("structured") for parts in plan.modules.values())


def test_head_and_embeddings_are_left_out_and_the_class_token_is_in():
    plan, _, _ = planned(budget=3000)
    assert not any("classifier" in name or "patch" in name for name in plan.modules)
    assert plan.modules["vit.embeddings"] == {"token": 1}
    assert plan.costs["vit.embeddings"] == {"token": TOKEN}
    assert {n for n in plan.modules if "norm" in n}
    _, own, _ = planned(budget=500, modules_to_save=["vit.layers.1.mlp.fc2", "fc1"])
    assert not any("fc1" in name for name in own.allocation)


@pytest.mark.parametrize("warmup", [0, 3])
def test_measuring_leaves_the_model(warmup):
    base = vit()
    base.classifier.requires_grad_(False)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    allocate_spt(base, cfg := config(), iter(BATCHES), warmup_head_steps=warmup)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert not base.training and not base.classifier.weight.requires_grad
    assert base.vit.layernorm.weight.requires_grad
    assert all(p.grad is None for p in base.parameters())
    if warmup:
        _, cold, _ = planned()
        assert {k: v.tolist() for k, v in cfg.positions.items()} != {
            k: v.tolist() for k, v in cold.positions.items()
        }


def test_summary():
    plan, _, _ = planned()
    text = plan.summary()
    assert f"{plan.cost:,} of 1,000 numbers" in text
    for name, parts in plan.costs.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert [int(word) for word in line.split()[1:]] == [
            parts[k] for k in ("structured", "weight", "bias", "token") if k in parts
        ]


def everything(cfg, key):
    """A plan with all three parts on one matrix is impossible; this one has each somewhere."""
    return {name for name, parts in cfg.allocation.items() if parts.get(key)}


def test_forward_is_the_changed_matrix():
    _, cfg, base = planned()
    assert all(everything(cfg, key) for key in ("structured", "weight", "bias"))
    model = get_peft_model(base, cfg).eval()
    layers = [m for m in tuner_layers(model) if isinstance(m, SptLayer)]
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "unfused_spt" in n:
                p.normal_()
        for layer in layers:
            norm = hasattr(layer.get_base_layer(), "normalized_shape")
            weight, bias = layer.get_base_layer().weight.clone(), layer.get_base_layer().bias.clone()
            for target, container in ((weight, layer.unfused_spt_weight), (bias, layer.unfused_spt_bias)):
                if "default" in container:
                    target.view(-1)[container["default"].index] += container["default"].values
            x = torch.randn(3, 5, 16 if norm else weight.shape[1])
            if norm:
                expected = F.layer_norm(x, (16,), weight, bias, layer.get_base_layer().eps)
            else:
                if "default" in layer.unfused_spt_down:
                    weight += layer.unfused_spt_up["default"] @ layer.unfused_spt_down["default"]
                expected = F.linear(x, weight, bias)
            assert torch.allclose(layer(x), expected, atol=1e-4)


def test_adapters_come_after_their_matrix(tmp_path):
    _, cfg, base = planned(structured="adapter", budget=1200)
    name = sorted(everything(cfg, "structured"))[0]
    model = get_peft_model(base, cfg).eval()
    layer = model.base_model.model.get_submodule(name)
    a, x = "default", torch.randn(2, 3, layer.get_base_layer().in_features)
    with torch.no_grad():
        before = layer(x)
        for n, p in model.named_parameters():
            if "unfused_spt" in n:
                p.normal_()
        bias = layer.get_base_layer().bias.clone()
        if a in layer.unfused_spt_bias:
            bias[layer.unfused_spt_bias[a].index] += layer.unfused_spt_bias[a].values
        z = F.linear(x, layer.get_base_layer().weight, bias)
        hidden = F.gelu(z @ layer.unfused_spt_down[a].t() + layer.unfused_spt_down_bias[a])
        expected = z + hidden @ layer.unfused_spt_up[a].t() + layer.unfused_spt_up_bias[a]
        assert torch.allclose(layer(x), expected, atol=1e-4) and not torch.allclose(before, expected)
        out = tiny.output(model, BATCHES[0])
    with pytest.raises(ValueError, match="nonlinearity"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["positions"] is None
    again = PeftModel.from_pretrained(vit(), tmp_path)
    with torch.no_grad():
        assert torch.allclose(tiny.output(again, BATCHES[0]), out)


def test_dropout_and_drop_path_act_in_training_alone():
    _, cfg, base = planned(dropout=0.0, drop_path=0.5)
    name = sorted(everything(cfg, "structured"))[0]
    model = get_peft_model(base, cfg).eval()
    layer = model.base_model.model.get_submodule(name)
    with torch.no_grad():
        layer.unfused_spt_up["default"].normal_()
        x = torch.randn(64, 3, layer.get_base_layer().in_features)
        plain, full = layer.get_base_layer()(x), layer(x)
        if "default" in layer.unfused_spt_bias:
            layer.unfused_spt_bias["default"].values.zero_()
        layer.train()
        ratio = (layer(x) - plain).norm(dim=(1, 2)) / (full - plain).norm(dim=(1, 2))
    assert set(ratio.round().tolist()) == {0.0, 2.0}  # whole samples, the rest scaled up


def test_class_token_merges_and_unmerges_exactly():
    _, cfg, base = planned()
    before = base.vit.embeddings.cls_token.detach().clone()
    model = get_peft_model(base, cfg).eval()
    layer = next(m for m in tuner_layers(model) if isinstance(m, SptTokenLayer))
    assert layer.patch_embeddings is layer.get_base_layer().patch_embeddings
    with torch.no_grad():
        start = tiny.output(model, BATCHES[0])
        layer.unfused_spt_token["default"].normal_()
        moved = tiny.output(model, BATCHES[0])
        assert not torch.allclose(start, moved)
        model.merge_adapter()
        assert torch.equal(
            base.vit.embeddings.get_base_layer().cls_token, before + layer.unfused_spt_token["default"][None]
        )
        assert torch.allclose(tiny.output(model, BATCHES[0]), moved, atol=1e-6)
        model.unmerge_adapter()
        assert torch.equal(base.vit.embeddings.get_base_layer().cls_token, before)
        layer.unfused_spt_token["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)


def test_a_plan_is_needed_and_must_fit(tmp_path):
    with pytest.raises(ValueError, match="call allocate_spt"):
        get_peft_model(vit(), config())
    _, cfg, _ = planned()
    with pytest.raises(ValueError, match="for another model"):
        get_peft_model(tiny.make_model("bert"), cfg)
    get_peft_model(vit(), cfg).save_pretrained(tmp_path)
    without = get_peft_model(vit(), SptConfig.from_pretrained(tmp_path)).train()
    with pytest.raises(RuntimeError, match="which entries"):
        without(**BATCHES[0])


def test_hostile_positions(tmp_path):
    _, cfg, base = planned()
    get_peft_model(base, cfg).save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in state if k.endswith("spt_weight.index"))
    for bad in (state[key] + 10_000, -state[key] - 1, state[key].flip(0)):
        save_file({**state, key: bad.contiguous()}, tmp_path / "adapter_model.safetensors")
        fresh = vit()
        with pytest.raises(ValueError, match="adapter file"):
            PeftModel.from_pretrained(fresh, tmp_path)
        assert fresh.state_dict().keys() == vit().state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0"),
        ({"r": 0}, "r=0"),
        ({"structured": "prefix"}, "'lora' or 'adapter'"),
        ({"structured_ratio": -1}, "structured_ratio=-1"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SptConfig(**options)


def test_allocation_errors():
    with pytest.raises(ValueError, match="no batch"):
        allocate_spt(vit(), config(), [])
    with pytest.raises(ValueError, match="grad_square"):
        allocate_spt(vit(), config(), BATCHES, grad_square="sum")
    with pytest.raises(ValueError, match="names no matrix"):
        allocate_spt(vit(), config(target_modules=["nothing"]), BATCHES)
    with pytest.raises(ValueError, match="chooses from Linear"):
        allocate_spt(vit(), config(target_modules=["layernorm_before"]), BATCHES)
    with pytest.raises(ValueError, match="right shape"):
        allocate_spt(vit(), config(), scores={})
    assert np.isfinite(planned(budget=10**9)[0].cost)  # more than there is
