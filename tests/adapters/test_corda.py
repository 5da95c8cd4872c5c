"""CorDA: the covariances, the decomposition against PEFT's own, the start, the export."""

from __future__ import annotations

import copy
import dataclasses
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from unfused.adapters import calibrate_corda, collect_covariances, export_as_lora

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
pytestmark = pytest.mark.filterwarnings("ignore")


def corda(mode="kpm", r=2, **options):
    return LoraConfig(
        **{
            "r": r,
            "lora_alpha": r,
            "init_lora_weights": "corda",
            "corda_config": CordaConfig(corda_method=mode),
        }
        | options
    )


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=30, **SIZES)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def batches(sizes=(3, 2), length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 30, (size, length), generator=generator)} for size in sizes]


@pytest.fixture
def pefts(monkeypatch):
    """PEFT's module, which needs `attrs` without requiring it."""
    if "attr" not in sys.modules:
        stub = ModuleType("attr")
        stub.dataclass = dataclasses.dataclass
        monkeypatch.setitem(sys.modules, "attr", stub)
    import peft.tuners.lora.corda as module

    return module


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_equals_pefts_initialiser_on_the_same_covariance(mode, make, pefts):
    ours, theirs = make(), make()
    names = ["query", "output.dense"] if make is bert else ["c_attn", "c_proj"]
    config = corda(mode, target_modules=names)
    found = collect_covariances(ours, config, batches())
    calibrate_corda(ours, config, covariances=found)
    for name, module in pefts.target_modules(theirs, config):
        module.covariance_matrix, module.corda_method, module.rank = found[name].clone(), mode, 2
    pefts.collect_eigens(theirs, config, verbose=False)
    pefts.crop_corda_eigens(theirs, config)
    compared = 0
    for name, module in pefts.target_modules(theirs, config):
        mine = ours.get_submodule(name).eigens
        for which in ("U_WC", "S_WC", "V_WC"):
            torch.testing.assert_close(getattr(mine, which), getattr(module.eigens, which))
        compared += 1
    assert compared == 6
    mine, other = get_peft_model(ours, config), get_peft_model(theirs, config)
    for (name, a), (_, b) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_covariances_equal_pefts_one_sequence_at_a_time(pefts):
    """Where the largest entry is positive; PEFT divides by |max(X)| and takes batches of one."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.rand(5, 7, 6)
    config = corda(target_modules=["0", "2"])
    mine = collect_covariances(base, config, [x[:2], x[2:]])
    for _, module in pefts.target_modules(base, config):
        module.rank = 2
    pefts.calib_cov_distribution(base, config, lambda: [base(one[None]) for one in x], None, None)
    for name, module in pefts.target_modules(base, config):
        torch.testing.assert_close(mine[name], module.covariance_matrix)


def test_covariance_in_numpy():
    x = torch.randn(4, 5, 3)
    found = collect_covariances(nn.Sequential(nn.Linear(3, 3)), corda(target_modules=["0"]), [x])["0"]
    expected = sum((s / np.abs(s).max()).T @ (s / np.abs(s).max()) for s in x.numpy()) / 4
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_batches_padding_and_passes_do_not_matter():
    config = corda(target_modules="all-linear")
    ids = torch.cat([batch["input_ids"] for batch in batches((4,), 6)])
    one = collect_covariances(
        bert(), config, [{"input_ids": i[None], "attention_mask": torch.ones(1, 6)} for i in ids]
    )
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(4, 3, dtype=torch.long)], 1),
        "attention_mask": torch.cat([torch.ones(4, 6), torch.zeros(4, 3)], 1),
    }
    many = collect_covariances(bert(), config, [padded])
    assert one.keys() == many.keys() and len(one) >= 12
    for name in one:
        torch.testing.assert_close(many[name], one[name], atol=1e-5, rtol=1e-4)
    whole, grouped = bert(), bert()
    calibrate_corda(whole, config, [padded])
    calibrate_corda(grouped, config, [padded], layers_per_pass=3)
    for name in one:
        torch.testing.assert_close(
            grouped.get_submodule(name).eigens.V_WC,
            whole.get_submodule(name).eigens.V_WC,
            atol=1e-4,
            rtol=1e-3,
        )
    assert not any(hasattr(m, "covariance_matrix") for m in whole.modules())


def test_flattened_tokens_are_put_back_into_sequences():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x, attention_mask):
            return self.fc(x.flatten(0, 1))

    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = collect_covariances(Flat(), corda(target_modules=["fc"]), [{"x": x, "attention_mask": mask}])[
        "fc"
    ]
    kept = [s[: int(n)] for s, n in zip(x.numpy(), mask.sum(1), strict=True)]
    expected = sum((s / np.abs(s).max()).T @ (s / np.abs(s).max()) for s in kept) / 2
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("alpha", [2, 5])
def test_peft_starts_at_the_base_model(mode, make, alpha):
    base, ids = make(), batches()[0]
    before = base(**ids).logits
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    config = corda(mode, lora_alpha=alpha, target_modules=None if make is bert else "all-linear")
    calibrate_corda(base, config, batches())
    assert all(torch.equal(v, weights[k]) for k, v in base.state_dict().items())
    model = get_peft_model(base, config).eval()
    torch.testing.assert_close(model(**ids).logits, before, atol=1e-5, rtol=1e-4)
    moved = [k for k, v in base.state_dict().items() if "base_layer.weight" in k]
    assert moved
    for name, layer in base.named_modules():
        if hasattr(layer, "lora_A"):
            product = layer.get_delta_weight("default")
            original = weights[f"{name}.weight"]
            torch.testing.assert_close(layer.base_layer.weight + product, original, atol=1e-6, rtol=1e-5)
            assert product.abs().max() > 0 and layer.lora_A["default"].weight.shape[0] == 2


def test_components_weighted_by_the_inputs_reconstruct_better():
    """Of W C, which is what the paper's figure shows: with k components, better than plain SVD's best k of W."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 12)
    x = torch.randn(64, 20, 12) * torch.logspace(0, -2, 12)
    config = corda("ipm", target_modules=["0"])
    covariance = collect_covariances(nn.Sequential(linear), config, [x])["0"]
    weight = linear.weight.detach()
    u, s, v = torch.linalg.svd(weight)
    for k in (2, 4, 8):
        base = nn.Sequential(copy.deepcopy(linear))
        calibrate_corda(base, corda("ipm", r=k, target_modules=["0"]), covariances={"0": covariance})
        e = base[0].eigens
        ours = (e.U_WC * e.S_WC) @ e.V_WC.T
        plain = (u[:, :k] * s[:k]) @ v[:k]
        assert ((weight - ours) @ covariance).norm() < 0.9 * ((weight - plain) @ covariance).norm()


def test_the_modes_train_opposite_ends():
    ends = {}
    for mode in ("kpm", "ipm"):
        base = bert()
        calibrate_corda(base, corda(mode, target_modules=["query"]), batches())
        ends[mode] = base.get_submodule("bert.encoder.layer.0.attention.self.query").eigens.S_WC.max()
    assert ends["kpm"] < ends["ipm"] / 10


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("from_disk", [False, True])
def test_export_is_a_plain_lora_on_the_untouched_base(rslora, from_disk, tmp_path):
    base, ids = bert(), batches()[0]
    config = corda(
        target_modules=["query", "dense"],
        lora_alpha=3,
        use_rslora=rslora,
        rank_pattern={"query": 3},
        alpha_pattern={"query": 6} if not rslora else {},
        modules_to_save=["classifier"],
    )
    calibrate_corda(base, config, batches())
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = model(**ids).logits
    if from_disk:
        for module in base.modules():
            module.__dict__.pop("_unfused_corda_initial", None)
        with pytest.raises(ValueError, match="give initial="):
            export_as_lora(model, tmp_path / "lora")
    export_as_lora(model, tmp_path / "lora", initial=tmp_path / "start" if from_disk else None)
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "lora").eval()
    torch.testing.assert_close(loaded(**ids).logits, expected, atol=1e-5, rtol=1e-4)
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    ranks = {k: len(v) for k, v in state.items() if "lora_A" in k}
    assert {ranks[k] for k in ranks if "query" in k} == {6} and {ranks[k] for k in ranks if "dense" in k} == {
        4
    }
    torch.testing.assert_close(loaded.merge_and_unload()(**ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_the_model_keeps_its_mode_and_hooks():
    base = bert().train()
    with pytest.raises(ValueError, match="exactly one of"):
        calibrate_corda(base, corda(target_modules=["query"]), [{"no_such_argument": torch.ones(2, 2)}])
    assert base.training
    assert not any(m._forward_pre_hooks for m in base.modules())


@pytest.mark.parametrize(
    "config, data, message",
    [
        (LoraConfig(), [], 'init_lora_weights="corda"'),
        (corda(target_modules=["nowhere"]), [], "names no Linear"),
        (corda(target_modules=["query"]), [], "dataloader is empty"),
        (corda(target_modules=["query"]), None, "give one of the two"),
        (corda(target_modules=["query"], r=17), [], "r=17 is above the 16 components"),
        (corda("best", target_modules=["query"]), [], "corda_method='best'"),
        (corda(target_modules=["query"], corda_config=CordaConfig(covariance_file="c.pt")), [], "pickles"),
        (
            corda(target_modules=["query"], corda_config=CordaConfig(use_float16_for_covariance=True)),
            [],
            "layers_per_pass",
        ),
    ],
)
def test_errors(config, data, message):
    with pytest.raises(ValueError, match=message):
        calibrate_corda(bert(), config, data)


def test_bad_calibration_data_is_named():
    config = corda(target_modules=["0", "2"], r=1)
    make = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))  # noqa: E731
    with pytest.raises(ValueError, match="'0' is zero or not finite"):
        calibrate_corda(make(), config, [torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="'0' is zero or not finite"):
        calibrate_corda(make(), config, [torch.full((2, 4), float("nan"))])
    with pytest.raises(ValueError, match="only once"):
        calibrate_corda(make(), config, iter([torch.ones(2, 4)]), layers_per_pass=1)
    with pytest.raises(ValueError, match="lack '2'"):
        calibrate_corda(make(), config, covariances={"0": torch.eye(4)})
    with pytest.raises(ValueError, match="has shape"):
        calibrate_corda(make(), config, covariances={"0": torch.eye(3), "2": torch.eye(4)})

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x)

    with pytest.raises(ValueError, match="'b' saw no input"):
        calibrate_corda(Unused(), corda(target_modules=["a", "b"], r=1), [torch.ones(2, 4)])
