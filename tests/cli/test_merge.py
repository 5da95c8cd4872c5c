"""`unfused merge`: words, our YAML, mergekit's YAML."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from unfused.merge import merge

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q", "mlp.up")),
    "lm_head.weight",
]


@pytest.fixture
def states(tmp_path):
    generator = torch.Generator().manual_seed(0)
    made = {}
    for folder in "BXY":
        made[folder] = {name: torch.randn(6, 10, generator=generator) for name in NAMES}
        (tmp_path / folder).mkdir()
        save_file(made[folder], tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    return made


def out(tmp_path, name="out"):
    return load_file(tmp_path / name / "model.safetensors")


def equal(found, want):
    assert set(found) == set(want)
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor)


def test_words(unfused, tmp_path, states):
    code, printed, err = unfused(
        *"merge breadcrumbs --base B X Y --scale 0.2,0.4 --granularity=tensor --out out --keep 0.5".split()
    )
    assert (code, printed.strip()) == (0, str(tmp_path / "out")), err
    equal(
        out(tmp_path),
        merge(
            "breadcrumbs",
            states["B"],
            [states["X"], states["Y"]],
            scale=[0.2, 0.4],
            granularity="tensor",
            keep=0.5,
        ),
    )
    assert (
        unfused(*"merge linear X Y --no-normalize --out sum -q --dtype bfloat16 --shard-size 300".split())[0]
        == 0
    )
    names = json.loads((tmp_path / "sum/model.safetensors.index.json").read_text())["weight_map"]
    assert set(names) == set(NAMES)
    assert len(list((tmp_path / "sum").glob("*.safetensors"))) == len(NAMES) / 2


def test_the_list_of_methods(unfused):
    _, printed, _ = unfused("merge", "--methods")
    assert "breadcrumbs: The base plus" in printed and "    --keep 0.15" in printed


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("merge", "give a method and its models"),
        ("merge ties --base B X", "out is missing"),
        ("merge ties X Y --out o", "ties needs the common base of the models: give base (--base)"),
        ("merge ties --base B X --density 0.3 --out o", "ties has no parameter 'density'"),
        ("merge ties --base B X --keep 7 --out o", "keep=7.0 must be a share in (0, 1]"),
        ("merge ties --base B Z --out o", "Z: no such folder or file"),
        ("merge ties --base B X --out B", "out=B is the folder of an input"),
        ("merge median X Y --out o", "method='median' is unknown: choose one of"),
        ("merge linear X Y --out o --shard-size lots", "shard_size='lots' must be a size"),
    ],
)
def test_mistakes_are_one_line(unfused, states, tmp_path, words, line):
    code, printed, err = unfused(*words.split())
    assert code == 2 and not printed and line in err and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_our_yaml(unfused, tmp_path, states):
    (tmp_path / "merge.yaml").write_text(
        "method: ties\nbase: B\nmodels: [X, Y]\nparameters: {keep: 0.5}\nout: out\ncopy: lm_head\n"
    )
    assert unfused("merge", "--config", "merge.yaml", "-q")[0] == 0
    want = merge("ties", states["B"], [states["X"], states["Y"]], keep=0.5, copy=["lm_head"])
    equal(out(tmp_path), want)
    (tmp_path / "merge.yaml").write_text("method: ties\nmodel: X")
    assert "key 'model' is unknown" in unfused("merge", "--config", "merge.yaml", "--out", "o")[2]
    (tmp_path / "merge.yaml").write_text("a: [")
    assert "is not valid YAML" in unfused("merge", "--config", "merge.yaml", "--out", "o")[2]


THEIRS = {
    "linear": """
merge_method: linear
models:
  - {model: X, parameters: {weight: 1.0}}
  - {model: Y, parameters: {weight: 3.0}}
dtype: float32
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: B
models:
  - {model: X, parameters: {weight: 0.5}}
  - {model: Y, parameters: {weight: 0.25}}
parameters: {lambda: 2.0, int8_mask: true}
""",
    "ties": """
merge_method: ties
base_model: B
models:
  - model: B
  - {model: X, parameters: {weight: 0.5, density: 0.3}}
  - {model: Y, parameters: {weight: 1.0, density: 0.6}}
parameters: {normalize: true}
""",
    "breadcrumbs": """
merge_method: breadcrumbs
base_model: B
models:
  - {model: X, parameters: {weight: 0.5, density: 0.3, gamma: 0.05}}
  - {model: Y, parameters: {weight: 1.0, density: 0.6}}
""",
    "slerp": """
merge_method: slerp
base_model: X
slices:
  - sources:
      - {model: X, layer_range: [0, 3]}
      - {model: Y, layer_range: [0, 3]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - {filter: mlp, value: [1, 0.5, 0]}
    - value: 0.25
""",
}


@pytest.mark.parametrize("method", THEIRS)
def test_mergekit_s_yaml(unfused, tmp_path, states, method):
    (tmp_path / "merge.yaml").write_text(THEIRS[method])
    code, _, err = unfused("merge", "--config", "merge.yaml", "--out", "out", "-q")
    assert code == 0, err
    base, x, y = (states[n] for n in "BXY")
    for name, found in out(tmp_path).items():
        b, dx, dy = base[name], x[name] - base[name], y[name] - base[name]
        if method == "linear":
            want = (x[name] + 3 * y[name]) / 4
        elif method == "task_arithmetic":
            want = b + dx + 0.5 * dy
        elif method == "ties":
            want = b + _ties([dx, dy], [0.5, 1.0], [0.3, 0.6])
        elif method == "breadcrumbs":
            want = b + 0.5 * _band(dx, 3, 18) + 1.0 * _band(dy, 0, 36)  # floors of 60 entries
        else:
            want = _slerp(x[name], y[name], _t(name))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    if method == "slerp":
        assert '"filter": "self_attn"' in (tmp_path / "out/README.md").read_text()


def _band(delta, dropped, kept):
    out, flat = torch.zeros(delta.numel()), delta.flatten()
    chosen = flat.abs().argsort(descending=True)[dropped : dropped + kept]
    out[chosen] = flat[chosen]
    return out.view(delta.shape)


def _ties(deltas, weights, densities):
    trimmed = torch.stack(
        [_band(d, 0, math.floor(k * d.numel())) for d, k in zip(deltas, densities, strict=True)]
    )
    weighted = trimmed * torch.tensor(weights).view(-1, 1, 1)
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = (weighted.sign() == sign).float()
    total = (agree * torch.tensor(weights).view(-1, 1, 1)).sum(0)
    return (weighted * agree).sum(0) / torch.where(total == 0, 1.0, total)


def _t(name):
    layer = int(name.split(".")[2]) / 2 if "layers" in name else None
    return 0.25 if layer is None else layer if "self_attn" in name else 1 - layer


def _slerp(a, b, t):
    angle = torch.acos((a * b).sum() / a.norm() / b.norm())
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("merge_method: ties", "merge_method: model_stock"), "merge_method 'model_stock' is not one of"),
        (("base_model: B\n", ""), "ties needs base_model"),
        (("weight: 0.5, ", ""), "ties needs the parameter 'weight' for each model"),
        (("density: 0.3", "epsilon: 0.3"), "parameter 'epsilon' of ties is not read here"),
        (("parameters: {n", "chat_template: auto\nparameters: {n"), "chat_template is not read here"),
    ],
)
def test_what_mergekit_s_yaml_may_not_say(unfused, tmp_path, states, change, line):
    (tmp_path / "merge.yaml").write_text(THEIRS["ties"].replace(*change))
    code, _, err = unfused("merge", "--config", "merge.yaml", "--out", "o")
    assert code == 2 and line in err and "merge.yaml" in err and err.count("\n") == 1


def test_parts_of_models_are_refused(unfused, tmp_path, states):
    (tmp_path / "merge.yaml").write_text(
        THEIRS["slerp"].replace("[0, 3]}\n      - {model: Y", "[0, 2]}\n      - {model: Y")
    )
    assert "layer_range [0, 2] is a part of X" in unfused("merge", "--config", "merge.yaml", "--out", "o")[2]


def test_greedy_soup_by_a_function_of_the_user(unfused, tmp_path, states):
    pytest.importorskip("unfused.merge.model_soups")
    (tmp_path / "own_scores.py").write_text(
        "def score(state):\n    return -float(abs(state['lm_head.weight']).sum())\n"
    )
    code, _, err = unfused(
        *"merge greedy-soup X Y --score own_scores:score --no-check-descent --out out -q".split()
    )
    assert code == 0, err
    assert set(out(tmp_path)) == set(NAMES)
