"""LoRA adapters as inputs: against PEFT's own merge; adapter with adapter; what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import save, state

from unfused.merge import merge, merge_to_folder

FC, EMBED = "model.layers.0.fc", "model.embed_tokens"


def adapter(folder, seed, rank=2, alpha=4, modules=(FC,), extra=None, **config):
    generator = torch.Generator().manual_seed(seed)
    shapes = {FC: (8, 6)}
    factors = {}
    for module in modules:
        if module == EMBED:
            factors[f"base_model.model.{module}.lora_embedding_A"] = torch.randn(
                rank, 20, generator=generator
            )
            factors[f"base_model.model.{module}.lora_embedding_B"] = torch.randn(6, rank, generator=generator)
            continue
        out, into = shapes[module]
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    folder.mkdir()
    save_file(factors | (extra or {}), folder / "adapter_model.safetensors")
    text = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [m[-5:] for m in modules]}
    (folder / "adapter_config.json").write_text(json.dumps(text | config))
    return folder


def change(folder, module=FC, scale=2.0):
    factors = load_file(folder / "adapter_model.safetensors")
    if module == EMBED:
        b, a = (factors[f"base_model.model.{module}.lora_embedding_{x}"] for x in "BA")
        return scale * (b @ a).T
    b, a = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "BA")
    return scale * (b @ a)


@pytest.fixture
def base(tmp_path):
    return save(tmp_path / "base", state(0))


def test_adapters_are_merged_into_the_base_on_the_fly(base, tmp_path):
    a = adapter(tmp_path / "a", 1, modules=(FC, EMBED))
    b = adapter(tmp_path / "b", 2, rank=4, use_rslora=True)
    out = merge_to_folder("task-arithmetic", base, [a, b], tmp_path / "out", scale=0.5)
    found, before = load_file(out / "model.safetensors"), state(0)
    want = before[f"{FC}.weight"] + 0.5 * (change(a) + change(b))
    torch.testing.assert_close(found[f"{FC}.weight"], want)
    torch.testing.assert_close(found[f"{EMBED}.weight"], before[f"{EMBED}.weight"] + 0.5 * change(a, EMBED))
    assert torch.equal(found["model.norm.weight"], before["model.norm.weight"])
    assert not (out / "adapter_config.json").exists() and (out / "config.json").exists()
    mixed = merge("linear", None, [f"{base}+{a}", base])
    torch.testing.assert_close(mixed[f"{FC}.weight"], before[f"{FC}.weight"] + 0.5 * change(a))


def test_patterns_prefixes_and_whole_tensors(base, tmp_path):
    short = FC.removeprefix("model.")
    a = adapter(tmp_path / "a", 1, alpha_pattern={"fc": 6})
    factors = {
        k.replace("model.model.layers", "model.layers"): v
        for k, v in load_file(a / "adapter_model.safetensors").items()
    }
    assert f"base_model.model.{short}.lora_A.weight" in factors
    save_file(
        factors
        | {
            "base_model.model.norm.weight": torch.full((6,), 9.0),
            "base_model.model.head.weight": torch.ones(2),
        },
        a / "adapter_model.safetensors",
    )
    found = merge("linear", base, [a])
    b, lora_a = (factors[f"base_model.model.{short}.lora_{x}.weight"] for x in "BA")
    torch.testing.assert_close(found[f"{FC}.weight"], state(0)[f"{FC}.weight"] + 3 * b @ lora_a)
    assert torch.equal(found["model.norm.weight"], torch.full((6,), 9.0))
    assert torch.equal(found["head.weight"], torch.ones(2))


@pytest.mark.parametrize("slug", ["task-arithmetic", "linear", "ties", "breadcrumbs"])
def test_adapter_with_adapter(tmp_path, slug, base):
    folders = [
        adapter(tmp_path / n, i, rank=i, modules=m) for n, i, m in (("a", 1, (FC,)), ("b", 2, (FC, EMBED)))
    ]
    out = merge_to_folder(slug, None, folders, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3 and set(config["target_modules"]) == {
        "ers.0.fc"[-5:],
        "okens",
    }
    a = change(folders[0], scale=4.0)
    want = merge(
        slug,
        None if slug == "linear" else {"w": torch.zeros(8, 6)},
        [{"w": a}, {"w": change(folders[1], scale=2.0)}],
    )["w"]
    found = change(out, scale=1.0)
    if slug in ("task-arithmetic", "linear"):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    else:
        u, s, v = torch.linalg.svd(want)
        torch.testing.assert_close(found, u[:, :3] * s[:3] @ v[:3], rtol=1e-3, atol=1e-4)
    # and it is an adapter that goes into the base like any other
    whole = merge("linear", base, [out])
    torch.testing.assert_close(whole[f"{FC}.weight"] - state(0)[f"{FC}.weight"], found, rtol=1e-4, atol=1e-4)
    assert merge_to_folder(slug, None, folders, tmp_path / "out") == out  # done before


def test_is_what_peft_merges(tmp_path):
    peft = pytest.importorskip("peft")
    from torch import nn

    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.conv = nn.Embedding(9, 5), nn.Linear(5, 7), nn.Conv2d(2, 3, 3)

        def forward(self, x):
            return self.fc(self.embed(x))

    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["embed", "fc", "conv"], rank_pattern={"fc": 2}
    )
    tuned = peft.get_peft_model(net, config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    want = tuned.merge_and_unload().state_dict()
    found = merge("linear", before, [tmp_path / "adapter"])
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"peft_type": "IA3"}, r"adapter_config.json: peft_type 'IA3' is not merged here"),
        ({"use_dora": True}, r"use_dora is set: merge this adapter into its base with PEFT first"),
    ],
)
def test_adapters_that_are_refused(base, tmp_path, config, line):
    a = adapter(tmp_path / "a", 1, **config)
    with pytest.raises(ValueError, match=line):
        merge_to_folder("linear", base, [a], tmp_path / "out")


def test_adapters_of_another_base(base, tmp_path):
    a = adapter(tmp_path / "a", 1)
    narrow = save(tmp_path / "narrow", {f"{FC}.weight": torch.ones(8, 5)})
    with pytest.raises(
        ValueError, match=r"changes 'model.layers.0.fc' as \(8, 6\), and tensor .* is \(8, 5\)"
    ):
        merge("linear", narrow, [a])
    other = save(tmp_path / "other", {"w": torch.ones(8, 6)})
    with pytest.raises(ValueError, match=r"changes 'model.layers.0.fc.weight', which .*other lacks"):
        merge("linear", other, [a])
    with pytest.raises(ValueError, match="names no base model: give base"):
        merge("linear", None, [a, base])
    b = adapter(tmp_path / "b", 2, base_model_name_or_path="one")
    with pytest.raises(ValueError, match="are of different base models: None, one"):
        merge_to_folder("linear", None, [a, b], tmp_path / "out")
    c = adapter(tmp_path / "c", 3, extra={"base_model.model.head.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"brings the whole tensor 'head.weight': give the base"):
        merge_to_folder("linear", None, [a, c], tmp_path / "out")
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        merge_to_folder("linear", None, [a], tmp_path / "out", rank=0)
    assert not (tmp_path / "out").exists()


def test_factors_with_nan(base, tmp_path):
    a = adapter(tmp_path / "a", 1)
    factors = load_file(a / "adapter_model.safetensors")
    factors[f"base_model.model.{FC}.lora_A.weight"][0, 0] = float("nan")
    save_file(factors, a / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"a: the factors of 'model.layers.0.fc' hold NaN"):
        merge("linear", base, [a])
