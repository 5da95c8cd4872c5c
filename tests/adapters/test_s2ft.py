from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from unfused.adapters import S2ftConfig, initialize_s2ft
from unfused.adapters.s2ft import S2ftLayer, column_linear
from unfused.nn.tuner import tuner_layers

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "tiny.py")
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def llama(seed=0):
    return tiny.make_model("llama", seed)


def channels(model, name, adapter="default"):
    """Chosen channels of the layers whose name ends so, in order."""
    return [
        m.unfused_s2ft_index[adapter].tolist()
        for key, m in model.named_modules()
        if isinstance(m, S2ftLayer) and key.endswith(name)
    ]


def saved_bytes(run, *modules_and_parameters):
    """Bytes that autograd keeps for backward, those parameters left out; each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    for item in modules_and_parameters:
        for p in item.parameters() if isinstance(item, nn.Module) else [item]:
            kept.pop(p.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("n", [0, 1, 3])
def test_column_linear_is_the_dense_product(n):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    delta = torch.randn(4, n, dtype=torch.float64, requires_grad=True)
    index = torch.randperm(6)[:n].sort().values
    y = column_linear(x, weight, bias, delta, index)
    changed = weight.clone()
    changed[:, index] += delta.detach()
    assert torch.allclose(y, F.linear(x, changed, bias))
    if n:
        assert torch.autograd.gradcheck(lambda x, d: column_linear(x, weight, bias, d, index), (x, delta))
    y.sum().backward()
    assert torch.allclose(x.grad, F.linear(torch.ones_like(y), changed.t()))


def test_overlapping_adapters_add():
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight, delta = torch.randn(4, 6).double(), torch.randn(4, 3).double().requires_grad_()
    index = torch.tensor([2, 5, 2])
    assert torch.autograd.gradcheck(lambda x, d: column_linear(x, weight, None, d, index), (x, delta))


def test_backward_keeps_the_chosen_channels_alone():
    torch.manual_seed(0)
    x = torch.randn(50, 64, requires_grad=True)
    frozen, trained = nn.Linear(64, 32).requires_grad_(False), nn.Linear(64, 32)
    index = torch.tensor([3, 8, 40])
    delta = nn.Parameter(torch.zeros(32, 3))
    ours = saved_bytes(lambda: column_linear(x, frozen.weight, frozen.bias, delta, index), frozen, delta)
    full = saved_bytes(lambda: trained(x), trained)
    assert ours == 50 * 3 * 4 + 3 * 8  # x[..., index] and index
    assert full == 50 * 64 * 4


def test_permuted_block_and_gathered_columns_are_one_function():
    """The paper's form: chosen channels first on both sides of the FFN, then a slice."""
    torch.manual_seed(0)
    up, gate, down = nn.Linear(5, 8, bias=False), nn.Linear(5, 8, bias=False), nn.Linear(8, 5, bias=False)
    x, chosen, s = torch.randn(4, 5), torch.tensor([1, 6]), torch.randn(5, 2)
    h = F.silu(gate(x)) * up(x)
    ours = column_linear(h, down.weight, None, s, chosen)
    order = torch.cat([chosen, torch.tensor([j for j in range(8) if j not in chosen])])
    h = F.silu(F.linear(x, gate.weight[order])) * F.linear(x, up.weight[order])
    theirs = F.linear(h, down.weight[:, order]) + h[:, :2] @ s.t()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_random_selection_over_all_layers_together():
    counts = set()
    for seed in range(6):
        model = get_peft_model(llama(), S2ftConfig(ratio={"down_proj": 0.2, "o_proj": 0.5}, seed=seed))
        ffn, heads = channels(model, "down_proj"), channels(model, "o_proj")
        assert sum(map(len, ffn)) == int(0.2 * 2 * 32)
        assert sum(map(len, heads)) == 2 * 8  # two of four heads of 8 channels
        assert all(np.array(h) % 8 == i % 8 for layer in heads for i, h in enumerate(layer))
        counts.add(len(ffn[0]))
        again = get_peft_model(llama(), S2ftConfig(ratio={"down_proj": 0.2, "o_proj": 0.5}, seed=seed))
        assert channels(again, "down_proj") == ffn
    assert len(counts) > 1  # layers differ in what they get


def test_at_least_one_head():
    model = get_peft_model(llama(), S2ftConfig())  # 5 % of 4 heads
    assert sum(map(len, channels(model, "o_proj"))) == 8


def test_grouped_queries_choose_query_heads():
    import transformers as hf

    config = hf.LlamaConfig(vocab_size=40, num_key_value_heads=1, **tiny.SIZES)
    model = get_peft_model(hf.LlamaForCausalLM(config), S2ftConfig(ratio={"o_proj": 0.25, "value": 0.5}))
    assert sum(map(len, channels(model, "o_proj"))) == 8
    assert sum(map(len, channels(model, "v_proj"))) == 8  # one of two key-value heads
    model(**tiny.make_batch("llama")).loss.backward()


def test_weight_selection():
    base = llama()
    norms = [layer.mlp.down_proj.weight.detach().norm(dim=0) for layer in base.model.layers]
    scores = torch.cat([n / n.mean() for n in norms]).numpy()
    for largest in (False, True):
        config = S2ftConfig(ratio={"down_proj": 0.2}, selection="weight", select_largest=largest)
        model = get_peft_model(llama(), config)
        found = np.concatenate(
            [np.array(c, int) + 32 * i for i, c in enumerate(channels(model, "down_proj"))]
        )
        order = np.argsort(-scores if largest else scores)
        assert sorted(found) == sorted(order[:12])


@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
def test_selections_from_data(selection):
    batches = [tiny.make_batch("llama", seed) for seed in (1, 2)]
    base = llama()
    downs = [layer.mlp.down_proj for layer in base.model.layers]
    seen = [[], []]
    hooks = [d.register_forward_pre_hook(lambda m, a, i=i: seen[i].append(a[0])) for i, d in enumerate(downs)]
    grads = [torch.zeros(32), torch.zeros(32)]
    for batch in batches:
        base.zero_grad()
        base(**batch).loss.backward()
        grads = [g + d.weight.grad.square().sum(0) for g, d in zip(grads, downs, strict=True)]
    for hook in hooks:
        hook.remove()
    scores = [torch.cat(s).abs().mean((0, 1)).detach() for s in seen]
    if selection == "product":
        scores = [s * d.weight.detach().norm(dim=0) for s, d in zip(scores, downs, strict=True)]
    if selection == "gradient":
        scores = [g.sqrt() for g in grads]
    flat = torch.cat([s / s.mean() for s in scores]).numpy()

    model = get_peft_model(llama(), S2ftConfig(ratio={"down_proj": 0.2}, selection=selection)).train()
    with pytest.raises(RuntimeError, match="initialize_s2ft"):
        model(**batches[0])
    initialize_s2ft(model, batches)
    assert model.training and not any(p.requires_grad for n, p in model.named_parameters() if "s2ft" not in n)
    found = np.concatenate([np.array(c, int) + 32 * i for i, c in enumerate(channels(model, "down_proj"))])
    assert sorted(found) == sorted(np.argsort(flat)[:12])
    model(**batches[0]).loss.backward()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "s2ft" in n and p.numel()).fill_(1)
    with pytest.raises(ValueError, match="trained already"):
        initialize_s2ft(model, batches)


def test_initialize_wants_a_selection_from_data():
    model = get_peft_model(llama(), S2ftConfig())
    with pytest.raises(ValueError, match="needs no data"):
        initialize_s2ft(model, [tiny.make_batch("llama")])
    model = get_peft_model(llama(), S2ftConfig(selection="activation"))
    with pytest.raises(ValueError, match="no batch"):
        initialize_s2ft(model, [])


def test_disjoint_adapters_add_without_interference():
    ratio = {"down_proj": 0.4, "o_proj": 0.5}
    model = get_peft_model(llama(), S2ftConfig(ratio=ratio), adapter_name="math")
    model.add_adapter("code", S2ftConfig(ratio=ratio, disjoint=True))
    for name in ("down_proj", "o_proj"):
        for a, b in zip(channels(model, name, "math"), channels(model, name, "code"), strict=True):
            assert not set(a) & set(b)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "s2ft" in n:
                p.normal_()
    layer = next(
        m for m in tuner_layers(model) if m.role == "mlp_out" and m.unfused_s2ft_delta["code"].numel()
    )
    before, index = layer.get_base_layer().weight.clone(), layer.unfused_s2ft_index
    wanted = before.clone()
    for name in ("math", "code"):
        wanted[:, index[name]] += layer.unfused_s2ft_delta[name].detach()
    model.base_model.set_adapter(["math", "code"])
    model.merge_adapter()
    assert torch.allclose(layer.get_base_layer().weight, wanted)
    rest = [j for j in range(32) if j not in {*index["math"].tolist(), *index["code"].tolist()}]
    assert torch.equal(layer.get_base_layer().weight[:, rest], before[:, rest])
    with pytest.raises(ValueError, match="entries may be chosen"):
        model.add_adapter("third", S2ftConfig(ratio=ratio, disjoint=True))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_rows(kind):
    """The up and value projections' ablation: whole rows."""
    base, batch = tiny.make_model(kind), tiny.make_batch(kind)
    model = get_peft_model(base, S2ftConfig(ratio={"mlp_in": 0.2, "value": 0.5})).eval()
    layers = list(tuner_layers(model))
    assert {layer.role for layer in layers} == {"mlp_in", "value"}
    with torch.no_grad():
        for layer in layers:
            layer.unfused_s2ft_delta["default"].normal_()
        expected = tiny.output(model, batch)
    layer = next(
        layer for layer in layers if layer.role == "mlp_in" and layer.unfused_s2ft_delta["default"].numel()
    )
    before = layer.get_base_layer().weight.clone()
    model.merge_adapter()
    changed = (layer.get_base_layer().weight != before).any(1).nonzero().squeeze(1)
    assert changed.tolist() == layer.unfused_s2ft_index["default"].tolist()
    with torch.no_grad():
        assert torch.allclose(tiny.output(model, batch), expected, atol=1e-5)


def test_conv1d_takes_input_channels():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_proj = Conv1D(4, 10)

        def forward(self, x):
            return self.c_proj(x)

    net = Net()
    weight = net.c_proj.weight.clone()
    model = get_peft_model(net, S2ftConfig(target_modules=["c_proj"], ratio=0.2))
    layer = next(tuner_layers(model))
    index = layer.unfused_s2ft_index["default"]
    assert layer.unfused_s2ft_delta["default"].shape == (4, 2)
    with torch.no_grad():
        layer.unfused_s2ft_delta["default"].normal_()
    wanted = weight.clone()
    wanted[index] += layer.unfused_s2ft_delta["default"].detach().t()
    x = torch.randn(3, 10)
    assert torch.allclose(model(x), x @ wanted + net.c_proj.get_base_layer().bias, atol=1e-6)


def test_half_precision_agrees():
    model = get_peft_model(llama(), S2ftConfig(ratio={"down_proj": 0.2}))
    batch = tiny.make_batch("llama")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.1)
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(**batch).loss.backward()
        grads.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    assert F.cosine_similarity(*grads, dim=0) > 0.99


@pytest.mark.parametrize(
    "damage",
    [lambda i: i + 1000, lambda i: -i - 1, lambda i: i.flip(0), lambda i: i.float(), lambda i: i[:, None]],
)
def test_hostile_index(damage, tmp_path):
    model = get_peft_model(llama(), S2ftConfig(ratio={"down_proj": 0.4}))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = max((k for k in state if k.endswith("index")), key=lambda k: state[k].numel())
    state[key] = damage(state[key]).contiguous()
    save_file(state, file)
    fresh = llama()
    with pytest.raises(ValueError, match="adapter file"):
        PeftModel.from_pretrained(fresh, tmp_path)
    assert fresh.state_dict().keys() == llama().state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "best"}, "choose one of random"),
        ({"ratio": 0.0}, "above 0"),
        ({"ratio": {}}, "above 0"),
        ({"num_heads": "many"}, "give 'auto' or a number"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        S2ftConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj"], "ratio": {"down_proj": 0.1}}, "no entry for the target"),
        ({"num_heads": 3}, "does not divide"),
    ],
)
def test_injection_errors_leave_the_model(options, message):
    base = llama()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, S2ftConfig(**options))
    assert base.state_dict().keys() == llama().state_dict().keys()
