from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from unfused.adapters import DseeConfig, dsee_prune
from unfused.adapters.dsee import DseeLayer
from unfused.nn.blocks import transformer_blocks
from unfused.nn.pruning import SparseLowRankLinear, unpack_mask

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "tiny.py")
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def tuned(kind="bert", **options):
    """An adapter that has learnt something."""
    torch.manual_seed(0)
    config = DseeConfig(**{"r": 2, "lora_alpha": 6, "num_sparse": 10, **options})
    model = get_peft_model(tiny.make_model(kind), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "unfused_dsee" in name:
                p.normal_(1.0 if "coefficient" in name else 0.0, 0.3)
    return model


def layers(model):
    return {
        k.removeprefix("base_model.model."): m for k, m in model.named_modules() if isinstance(m, DseeLayer)
    }


def out(model, kind="bert"):
    with torch.no_grad():
        return tiny.output(model, tiny.make_batch(kind))


def weight_of(layer):
    return layer.get_base_layer().weight.detach()


def on(layer):
    return unpack_mask(layer.unfused_dsee_mask["default"], weight_of(layer).shape)


def test_the_scale_is_of_both_parts():
    model = tuned()
    layer = next(iter(layers(model).values()))
    u, v = layer.unfused_dsee_up["default"], layer.unfused_dsee_down["default"]
    sparse = layer.unfused_dsee_sparse["default"]
    s2 = torch.zeros(16 * 16).index_put((sparse.index,), sparse.values).view(16, 16)
    x = torch.randn(3, 5, 16)
    expected = F.linear(x, weight_of(layer) + 3.0 * (u @ v + s2), layer.get_base_layer().bias)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("support", ["grebsmo", "magnitude", "random"])
def test_supports(support):
    a, b = (layers(tuned(sparse_support=support)) for _ in range(2))
    for key, layer in a.items():
        index = layer.unfused_dsee_sparse["default"].index
        assert len(index) == 10 and torch.equal(index, b[key].unfused_dsee_sparse["default"].index)
        if support == "magnitude":
            assert {*index.tolist()} == {*weight_of(layer).abs().flatten().topk(10).indices.tolist()}
    if support == "random":
        other = layers(tuned(sparse_support=support, seed=1))
        assert any(
            not torch.equal(
                layer.unfused_dsee_sparse["default"].index, other[k].unfused_dsee_sparse["default"].index
            )
            for k, layer in a.items()
        )


def test_default_targets_and_no_sparse_part():
    model = tuned(num_sparse=0)
    assert all(key.endswith(("query", "value")) for key in layers(model)) and len(layers(model)) == 4
    out(model)


@pytest.mark.parametrize("score", ["update", "sum", "low_rank", "weight"])
def test_two_global_rankings(score):
    model = tuned()
    before = out(model)
    updates = {key: layer.get_delta_weight("default").detach() for key, layer in layers(model).items()}
    low = {
        k: (m.unfused_dsee_up["default"] @ m.unfused_dsee_down["default"]).detach()
        for k, m in layers(model).items()
    }
    report = dsee_prune(model, amount=0.3, score=score)
    assert not torch.allclose(out(model), before)
    found = layers(model)
    score_of = {
        "update": lambda k: updates[k],
        "sum": lambda k: updates[k] + weight_of(found[k]),
        "low_rank": lambda k: low[k],
        "weight": lambda k: weight_of(found[k]),
    }[score]
    groups = {"updated": [k for k in found if k in updates], "other": [k for k in found if k not in updates]}
    assert all(k.endswith(("key", "dense")) and "pooler" not in k for k in groups["other"])
    for group, keys in groups.items():
        values = [(score_of(k) if group == "updated" else weight_of(found[k])).abs().flatten() for k in keys]
        flat, gone = torch.cat(values), ~torch.cat([on(found[k]).flatten() for k in keys])
        count = round(0.3 * len(flat))
        assert int(gone.sum()) == count == report.groups[group][0]
        assert {*gone.nonzero().flatten().tolist()} == {
            *np.argsort(flat.numpy(), kind="stable")[:count].tolist()
        }
    assert abs(report.sparsity - 0.3) < 1e-3 and report.sparsity_of_all < report.sparsity
    assert report.weights == sum(p.numel() for p in tiny.make_model("bert").parameters())


def test_nothing_but_the_update_trains_after_pruning_and_the_base_stays():
    model = tuned(modules_to_save=["classifier"])
    base = {k: v.clone() for k, v in tiny.make_model("bert").state_dict().items()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    dsee_prune(model, amount=0.5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    model.train()
    model(**tiny.make_batch("bert")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    plain = tiny.make_model("bert")
    model.eval()
    with model.disable_adapter():
        assert torch.allclose(out(model), out(plain), atol=1e-6)
    restored = model.unload().state_dict()
    assert all(torch.equal(restored[k], v) for k, v in base.items() if "classifier" not in k)


def test_forward_is_the_masked_weight_and_the_unmasked_update():
    model = tuned()
    dsee_prune(model, amount=0.5)
    for layer in layers(model).values():
        x = torch.randn(3, weight_of(layer).shape[1])
        weight = weight_of(layer) * on(layer)
        if "default" in layer.unfused_dsee_up:
            weight = weight + layer.get_delta_weight("default")
        assert torch.allclose(layer(x), F.linear(x, weight, layer.get_base_layer().bias), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_pruned_adapters_are_saved_in_bits_and_merged(kind, tmp_path):
    model = tuned(kind)
    dsee_prune(model, amount=0.5)
    dsee_prune(model, amount=0.6)  # goes on from there
    expected = out(model, kind)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    masks = {k: v for k, v in state.items() if k.endswith("dsee_mask")}
    assert len(masks) == len(layers(model)) and all(v.dtype == torch.uint8 for v in masks.values())
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(tiny.make_model(kind), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.allclose(out(again, kind), expected, atol=1e-6)
    again = PeftModel.from_pretrained(tiny.make_model(kind), tmp_path, is_trainable=True)
    again(**tiny.make_batch(kind)).loss.backward()
    model.merge_adapter()
    assert torch.allclose(out(model, kind), expected, atol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.allclose(out(merged, kind), expected, atol=1e-5)
    assert type(merged) is type(tiny.make_model(kind))


def test_pruning_more_keeps_what_is_gone():
    model = tuned()
    dsee_prune(model, amount=0.3)
    first = {k: on(m) for k, m in layers(model).items()}
    report = dsee_prune(model, amount=0.5, score="weight")
    assert all((on(m) <= first[k]).all() for k, m in layers(model).items())
    assert abs(report.sparsity - 0.5) < 1e-3
    with pytest.raises(ValueError, match="pruned already"):
        dsee_prune(model, amount=0.4)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_kept_sparse(kind):
    model = tuned(kind)
    dsee_prune(model, amount=0.5)
    expected, masks = out(model, kind), {k: on(m) for k, m in layers(model).items()}
    updated = {k for k, m in layers(model).items() if "default" in m.unfused_dsee_up}
    merged = model.merge_and_unload(keep_sparse=True)
    assert torch.allclose(out(merged, kind), expected, atol=1e-5)
    for key, mask in masks.items():
        module = merged.get_submodule(key)
        assert isinstance(module, SparseLowRankLinear) == (key in updated)
        module = getattr(module, "linear", module)
        assert isinstance(module, Conv1D if kind == "gpt2" else torch.nn.Linear)
        assert torch.equal(module.weight != 0, mask)


def naive_heads(model, count):
    """Heads to remove by the card: sums over the rows of query and value."""
    found = {}
    for block in transformer_blocks(model.base_model.model):
        scores = np.zeros(2)
        for name in (block.query, block.value):
            update = layers(model)[name].get_delta_weight("default").detach().abs().numpy()
            scores += update.reshape(2, 8 * 16).sum(1)
        found[block.attention] = np.argsort(scores)[:count].tolist()
    return found


@pytest.mark.parametrize("kind", ["bert", "vit", "llama", "ast", "clip"])
def test_removed_heads_are_masked_heads(kind, tmp_path):
    """In the tuner, merged, kept sparse, and physically: the same function; and that of zeroed head outputs."""
    model = tuned(kind)
    wanted = naive_heads(model, 1)
    inner = model.base_model.model
    handles = []
    for block in transformer_blocks(inner):
        keep = torch.ones(2, 8)
        keep[wanted[block.attention]] = 0
        handles.append(
            inner.get_submodule(block.attention_out).register_forward_pre_hook(
                lambda m, a, keep=keep: (a[0] * keep.flatten(),)
            )
        )
    masked_heads = out(model, kind)
    for handle in handles:
        handle.remove()
    plain = out(model, kind)
    report = dsee_prune(model, heads=1)
    assert report.heads == wanted
    expected = out(model, kind)
    assert torch.allclose(expected, masked_heads, atol=1e-5) and not torch.allclose(expected, plain)
    model.save_pretrained(tmp_path)

    def again():
        return PeftModel.from_pretrained(tiny.make_model(kind), tmp_path)

    assert torch.allclose(out(again(), kind), expected, atol=1e-6)
    assert torch.allclose(out(again().merge_and_unload(), kind), expected, atol=1e-5)
    for keep_sparse in (False, True):
        small = again().merge_and_unload(keep_sparse=keep_sparse, remove_heads=True)
        assert torch.allclose(out(small, kind), expected, atol=1e-5)
        block = transformer_blocks(small)[0]
        assert small.get_submodule(block.attention_out).in_features == 8
        query = small.get_submodule(block.query)
        assert getattr(query, "linear", query).weight.shape[0] == 8
    before = sum(p.numel() for p in tiny.make_model(kind).parameters())
    assert sum(p.numel() for p in again().merge_and_unload(remove_heads=True).parameters()) < before


def test_heads_then_weights():
    model = tuned()
    dsee_prune(model, heads=1)
    report = dsee_prune(model, amount=0.5)
    query = next(m for k, m in layers(model).items() if k.endswith("query"))
    rows = query.unfused_dsee_rows["default"]
    assert int(rows.sum()) == 8
    assert report.sparsity > 0.5  # half of what is left, and the heads
    keys = [k for k in layers(model) if k.endswith(("query", "value"))]
    left = sum(int(on(layers(model)[k])[layers(model)[k].unfused_dsee_rows["default"]].sum()) for k in keys)
    assert left == 4 * 8 * 16 // 2
    with pytest.raises(ValueError, match="one has to stay"):
        dsee_prune(model, heads=1)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        dsee_prune(model, amount=0.8)


def test_coefficients_choose_heads_and_neurons():
    model = tuned(l1=0.1)
    coefficients = {n: p for n, p in model.named_parameters() if "coefficient" in n}
    assert {p.numel() for p in coefficients.values()} == {2, 32} and len(coefficients) == 4
    loss = model.base_model.regularization_loss()
    assert torch.allclose(loss, 0.1 * sum(p.abs().sum() for p in coefficients.values()))
    by_head = {
        k: layers(model)[k].unfused_dsee_coefficient["default"].abs().argmin()
        for k in layers(model)
        if k.endswith("attention.output.dense")
    }
    report = dsee_prune(model, heads=1, neurons=0.4)
    assert all(report.heads[k.removesuffix(".output.dense")] == [int(v)] for k, v in by_head.items())
    assert set(report.neurons.values()) == {int(0.4 * 32)}
    for layer in (m for k, m in layers(model).items() if k.endswith("output.dense") and "attention" not in k):
        kept, size = layer.unfused_dsee_columns["default"], layer.unfused_dsee_coefficient["default"].abs()
        assert size[kept].min() >= size[~kept].max()
    assert model.base_model.regularization_loss() == 0
    expected = out(model)
    small = model.merge_and_unload(remove_heads=True)
    assert torch.allclose(out(small), expected, atol=1e-5)
    assert small.bert.encoder.layer[0].intermediate.dense.out_features == 20


def test_coefficients_start_as_nothing():
    torch.manual_seed(0)
    model = get_peft_model(tiny.make_model("bert"), DseeConfig(r=2, num_sparse=4, l1=1e-3)).eval()
    assert torch.allclose(out(model), out(tiny.make_model("bert")), atol=1e-6)


def test_pruned_adapters_stay_alone():
    model = tuned()
    dsee_prune(model, amount=0.3)
    model.add_adapter("other", DseeConfig(r=2, num_sparse=4))
    model.base_model.set_adapter(["default", "other"])
    for run in (lambda: out(model), model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be active or merged with others"):
            run()
    model.set_adapter("other")
    assert torch.allclose(out(model), out(tiny.make_model("bert")), atol=1e-6)


def test_positions_come_with_the_file(tmp_path):
    tuned().save_pretrained(tmp_path)
    config = DseeConfig.from_pretrained(tmp_path)
    model = get_peft_model(tiny.make_model("bert"), config).train()
    with pytest.raises(RuntimeError, match="support_saved=False"):
        model(**tiny.make_batch("bert"))


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("dsee_sparse.index", lambda v: v + 1000),
        ("dsee_sparse.index", lambda v: v.flip(0)),
        ("dsee_mask", lambda v: v.float()),
        ("dsee_mask", lambda v: v[:-1]),
    ],
)
def test_hostile_files(part, damage, tmp_path):
    model = tuned()
    dsee_prune(model, amount=0.3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(k for k in state if k.endswith(part))
    state[key] = damage(state[key]).contiguous()
    save_file(state, file)
    fresh = tiny.make_model("bert")
    with pytest.raises(ValueError, match="adapter file"):
        PeftModel.from_pretrained(fresh, tmp_path)
    assert fresh.state_dict().keys() == tiny.make_model("bert").state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"num_sparse": -1}, "num_sparse=-1"),
        ({"sparse_support": "omp"}, "choose one of grebsmo"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DseeConfig(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {}, "ask for something"),
        ("bert", {"amount": 1.0}, "shares below 1"),
        ("bert", {"amount": 0.5, "score": "taylor"}, "choose one of update"),
        ("bert", {"amount": 0.5, "other_modules": ["nothing"]}, "names no matrix"),
        ("bert", {"amount": 0.5, "other_modules": ["LayerNorm"]}, "not Linear or Conv1D"),
        ("bert", {"heads": 2}, "one has to stay"),
        ("bert", {"neurons": 0.5}, "go by their coefficients"),
        ("bert", {"heads": 1, "target_modules": ["key"]}, "neither query nor value"),
        ("gpt2", {"heads": 1}, "fused projection"),
    ],
)
def test_pruning_errors_change_nothing(kind, options, message):
    options = dict(options)
    model = tuned(kind, target_modules=options.pop("target_modules", None))
    keys, before = [*model.state_dict()], out(model, kind)
    with pytest.raises(ValueError, match=message):
        dsee_prune(model, **options)
    assert [*model.state_dict()] == keys and torch.equal(out(model, kind), before)


def test_an_untrained_update_cannot_score():
    model = get_peft_model(tiny.make_model("bert"), DseeConfig(r=2, num_sparse=4))
    for options in ({"amount": 0.5}, {"heads": 1}):
        with pytest.raises(ValueError, match="train the adapter first"):
            dsee_prune(model, **options)
    dsee_prune(model, amount=0.5, score="random", other_modules=["key"])
    assert sum(k.endswith("key") for k in layers(model)) == 2 and len(layers(model)) == 6
