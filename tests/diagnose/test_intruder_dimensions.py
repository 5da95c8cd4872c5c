"""Intruder dimensions: against plain SVDs, on every kind of source, with PEFT, and what bad input says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from unfused.diagnose import intruder_dimensions, scale_intruders
from unfused.diagnose._spectrum import align, align_exactly, top_singular


def spectrum(shape, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) / max(shape) ** 0.5
    if kind == "power":
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        w = u * torch.arange(1, len(s) + 1) ** -0.7 @ v
    return w


def intrude(w, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    left = nn.functional.normalize(torch.randn(w.shape[0], generator=generator), dim=0)
    right = nn.functional.normalize(torch.randn(w.shape[1], generator=generator), dim=0)
    return w + size * torch.outer(left, right)


def naive(w0, w, k, eps):
    """The card's six lines, in numpy."""
    u0 = np.linalg.svd(w0.double().numpy(), full_matrices=False)[0]
    u, s, vh = np.linalg.svd(w.double().numpy(), full_matrices=False)
    similarity = np.abs(u.T @ u0).max(axis=1)[:k]
    return similarity, np.flatnonzero(similarity < eps), (u, s, vh)


# --- detection --------------------


@pytest.mark.parametrize("shape", [(40, 40), (60, 30), (30, 60)])
@pytest.mark.parametrize("kind", ["power", "flat"])
def test_exact_is_the_definition(shape, kind):
    w0 = spectrum(shape, kind)
    w = intrude(w0, 0.7)
    report = intruder_dimensions({"a.weight": w0}, {"a.weight": w}, k=8, method="exact")
    similarity, found, (_, s, _) = naive(w0, w, 8, 0.5)
    (row,) = report.per_matrix
    np.testing.assert_allclose(row.similarities, similarity, atol=1e-4)
    assert list(row.indices) == found.tolist() and row.n == report.total == len(found)
    np.testing.assert_allclose(row.singular_values, s[:8], rtol=1e-4)
    assert row.energy == pytest.approx((s[found] ** 2).sum() / (s**2).sum(), rel=1e-4)
    assert row.update_size == pytest.approx(float((w - w0).norm() / w0.norm()), rel=1e-5)
    assert row.effective_rank == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("shape", [(300, 300), (400, 200), (200, 400)])
@pytest.mark.parametrize("kind", ["power", "flat"])
@pytest.mark.parametrize("size", [0.0, 0.7])
def test_fast_gives_the_verdicts_of_torch_linalg_svd(shape, kind, size):
    w0 = spectrum(shape, kind)
    w = intrude(w0 + 0.02 * spectrum(shape, "flat", seed=5), size)
    pair = {"a.weight": w0}, {"a.weight": w}
    fast, exact = (intruder_dimensions(*pair, method=method).per_matrix[0] for method in ("fast", "exact"))
    borderline = {j for j, s in enumerate(exact.similarities) if abs(s - 0.5) < 0.01}
    assert set(fast.indices) ^ set(exact.indices) <= borderline
    np.testing.assert_allclose(fast.singular_values, exact.singular_values, rtol=1e-4)
    for value, bound, truth in zip(fast.similarities, fast.bounds, exact.similarities, strict=True):
        if bound:
            assert truth - 5e-3 <= value < 0.5
        else:
            assert value == pytest.approx(truth, abs=5e-3)
    assert np.abs(np.subtract(fast.rotation, exact.rotation)).max() < 0.1


def test_top_vectors_are_those_of_the_svd():
    w = spectrum((300, 260), "power")
    vectors, values = top_singular(w, 10)
    u, s, _ = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(values, s[:10], rtol=1e-5, atol=0)
    assert float((vectors * u[:, :10]).sum(0).abs().min()) > 1 - 1e-4


@pytest.mark.parametrize("eps", [0.2, 0.35, 0.5, 0.8])
def test_bounds_lie_above_the_truth_for_any_vector(eps):
    w0 = spectrum((250, 250), "flat", seed=3)
    vectors = nn.functional.normalize(torch.randn(250, 12, generator=torch.Generator().manual_seed(2)), dim=0)
    u0 = torch.linalg.svd(w0).U
    for j in range(6):  # half of them lean on one base vector
        vectors[:, j] = nn.functional.normalize(vectors[:, j] + (j + 1) * 0.3 * u0[:, 7 * j], dim=0)
    singular = torch.ones(12)
    exact, found = align_exactly(w0, vectors, singular), align(w0, vectors, singular, eps)
    assert ((found.similarity < eps) == (exact.similarity < eps)).all()
    assert (found.similarity >= exact.similarity - 1e-3).all()


def test_a_base_without_some_directions_has_no_vectors_there():
    w0 = spectrum((40, 40), "power")
    w0[30:] = 0
    w = w0.clone()
    w[35, 3] = 5.0  # along a direction that the base does not have
    for method in ("exact", "fast"):
        row = intruder_dimensions({"a.weight": w0}, {"a.weight": w}, k=1, method=method).per_matrix[0]
        assert row.n == 1 and row.similarities[0] < 0.1


def test_rotation_tells_mixing_from_new_directions():
    w0 = torch.diag(torch.tensor([5.0, 5.0, 5.0, 5.0, 0.2, 0.1]) + torch.arange(6) * 1e-3)
    angle = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    turn = torch.eye(6)
    turn[:4, :4] = angle
    w = turn @ w0
    mixed = intruder_dimensions({"a.weight": w0}, {"a.weight": w}, k=4, eps=0.99).per_matrix[0]
    new = intruder_dimensions({"a.weight": w0}, {"a.weight": intrude(w0, 30)}, k=1, eps=0.99).per_matrix[0]
    assert mixed.n and min(mixed.rotation) > 0.99
    assert new.n == 1 and new.rotation[0] < 0.1


def test_sweep_counts_every_threshold():
    w0 = spectrum((30, 30), "flat")
    report = intruder_dimensions({"a.weight": w0}, {"a.weight": intrude(w0, 1)}, k=5)
    grid, counts = report.sweep()
    similarity = np.array(report.per_matrix[0].similarities)
    assert counts == [int((similarity < e).sum()) for e in grid] and counts[0] == 0 and counts[-1] == 5


def test_no_change_no_intruder_and_zero_matrices():
    w0 = spectrum((30, 20), "power")
    assert intruder_dimensions({"a.weight": w0}, {"a.weight": w0.clone()}).total == 0
    nothing = {"a.weight": torch.zeros(20, 20)}
    row = intruder_dimensions(nothing, nothing).per_matrix[0]
    assert (row.n, row.update_size, row.effective_rank, row.energy) == (0, 0.0, 0.0, 0.0)


def test_which_matrices():
    names = ("embed_tokens", "layers.0.q_proj", "layers.0.mlp.down_proj", "lm_head", "classifier", "norm")
    state = {f"{name}.weight": torch.eye(8) for name in names} | {"layers.0.q_proj.bias": torch.ones(8)}
    state["norm.weight"] = torch.ones(8)
    found = [row.name for row in intruder_dimensions(state, state).per_matrix]
    assert found == ["layers.0.q_proj.weight", "layers.0.mlp.down_proj.weight"]
    found = [
        row.name
        for row in intruder_dimensions(state, state, include=["*proj*", "lm*"], exclude=["*q_*"]).per_matrix
    ]
    assert found == ["layers.0.mlp.down_proj.weight", "lm_head.weight"]


# --- sources --------------------


class Small(nn.Module):
    def __init__(self, conv=False):
        super().__init__()
        torch.manual_seed(0)
        self.up = Conv1D(24, 16) if conv else nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))


def tuned_lora(model, scale=3.0, **more):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"], **more))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=scale * 0.3)
    return model.eval()


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"rank_pattern": {"up": 3}, "alpha_pattern": {"up": 9}}]
)
@pytest.mark.parametrize("conv", [False, True])
def test_folders_adapters_and_peft_models_agree(tmp_path, conv, more):
    base = Small(conv)
    # A folder is known to store (in, out) by its config; a config has one answer for all its matrices.
    include = ["up.weight"] if conv else None
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2" if conv else "llama"}))
    model = tuned_lora(Small(conv), **more, fan_in_fan_out=False)
    expected = intruder_dimensions(model, include=include)
    assert expected.total > 0
    model.save_pretrained(tmp_path / "adapter")
    if conv:  # PEFT corrects the flag in the layer
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        config["fan_in_fan_out"] = True
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merged = tuned_lora(Small(conv), **more, fan_in_fan_out=False).merge_and_unload()
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged.safetensors").rename(tmp_path / "merged" / "model.safetensors")
    (tmp_path / "merged" / "config.json").write_text((tmp_path / "config.json").read_text())
    for one, two in (
        (tmp_path, tmp_path / "adapter"),
        (tmp_path, tmp_path / "merged"),
        (base, merged),
        (base, model),
    ):
        found = intruder_dimensions(one, two, include=include)
        rows = {row.name: row for row in found.per_matrix}  # a file has its own order
        assert len(rows) == len(expected.per_matrix)
        for row in expected.per_matrix:
            assert rows[row.name].indices == row.indices
            np.testing.assert_allclose(rows[row.name].similarities, row.similarities, atol=1e-4)


def test_any_adapter_that_merges_is_compared_and_left_as_it_was():
    model = tuned_lora(Small(), use_dora=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert intruder_dimensions(model).total > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    x = torch.randn(4, 16)
    merged = tuned_lora(Small(), use_dora=True).merge_and_unload()
    torch.testing.assert_close(model(x), merged(x))


# --- scaling --------------------


def test_scaling_is_the_formula_and_the_controls_match_it():
    w0 = spectrum((120, 90), "power")
    base, tuned = (
        {"a.weight": w0, "bias": torch.ones(3)},
        {"a.weight": intrude(intrude(w0, 0.8), 0.55, seed=9), "bias": torch.zeros(3)},
    )
    report = intruder_dimensions(base, tuned, k=6)
    assert report.total >= 2
    _, found, (u, s, vh) = naive(w0, tuned["a.weight"], 6, 0.5)
    new = scale_intruders(base, tuned, report, lam=0.3)
    expected = tuned["a.weight"].double().numpy() - 0.7 * (u[:, found] * s[found]) @ vh[found]
    np.testing.assert_allclose(new["a.weight"].numpy(), expected, atol=1e-5)
    assert new["bias"] is tuned["bias"]
    uniform = scale_intruders(base, tuned, report, lam=0.3, control="uniform")["a.weight"]
    update = tuned["a.weight"] - w0
    torch.testing.assert_close((uniform - w0).norm(), (new["a.weight"] - w0).norm())
    torch.testing.assert_close((uniform - w0) / (uniform - w0).norm(), update / update.norm())
    others = scale_intruders(base, tuned, report, lam=0.3, control="others")["a.weight"]
    rest = [j for j in range(6) if j not in found][: len(found)]
    expected = tuned["a.weight"].double().numpy() - 0.7 * (u[:, rest] * s[rest]) @ vh[rest]
    np.testing.assert_allclose(others.numpy(), expected, atol=1e-5)
    top = scale_intruders(base, tuned, report, lam=0.3, which="top")["a.weight"]
    expected = tuned["a.weight"].double().numpy() - 0.7 * s[found[0]] * np.outer(u[:, found[0]], vh[found[0]])
    np.testing.assert_allclose(top.numpy(), expected, atol=1e-5)
    same = scale_intruders(base, tuned, report, lam=1.0)
    torch.testing.assert_close(same["a.weight"], tuned["a.weight"])


@pytest.mark.parametrize("control", [None, "uniform"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"modules_to_save": ["head"]}])
@pytest.mark.parametrize("conv", [False, True])
def test_the_new_adapter_is_the_scaled_model(control, more, conv, tmp_path):
    model = tuned_lora(Small(conv), **more)
    if more.get("modules_to_save"):
        nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    x = torch.randn(5, 16)
    report = intruder_dimensions(model)
    merged = tuned_lora(Small(conv), **more).merge_and_unload()
    if more.get("modules_to_save"):
        merged.head.load_state_dict(model.base_model.model.head.modules_to_save["default"].state_dict())
    merged.load_state_dict(scale_intruders(Small(conv), merged, report, lam=0.2, control=control))
    before = model(x)
    assert scale_intruders(model, report=report, lam=0.2, control=control) is model
    assert not torch.allclose(model(x), before, atol=1e-2)
    torch.testing.assert_close(model(x), merged(x), atol=1e-4, rtol=1e-4)
    for row in report.per_matrix:
        layer = model.base_model.model.get_submodule(row.name.removesuffix(".weight"))
        assert layer.r["intruder_reduced"] == 2 + (row.n if control is None else 0)
    model.save_pretrained(tmp_path, selected_adapters=["intruder_reduced"])
    again = PeftModel.from_pretrained(Small(conv), tmp_path / "intruder_reduced").eval()
    torch.testing.assert_close(again(x), model(x))
    with pytest.raises(ValueError, match="intruder_reduced"):
        scale_intruders(model, report=report)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), before)


def test_rank_keep_cuts_back_to_the_old_rank():
    model = tuned_lora(Small())
    report = intruder_dimensions(model)
    scale_intruders(model, report=report, lam=0.5, rank="keep")
    assert model.base_model.model.up.r["intruder_reduced"] == 2


def test_a_checkpoint_is_written_in_shards_that_load(tmp_path):
    base, tuned = Small(), Small().to(torch.bfloat16)
    tuned.up.weight.data = intrude(base.up.weight.data, 3).to(torch.bfloat16)
    for name, model in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    report = intruder_dimensions(tmp_path / "base", tmp_path / "tuned")
    out = scale_intruders(
        tmp_path / "base", tmp_path / "tuned", report, output=tmp_path / "out", max_shard_bytes=900
    )
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1 and (out / "config.json").is_file()
    found = {name: t for shard in shards for name, t in load_file(shard).items()}
    expected = scale_intruders(base, tuned, report)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert found["up.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not empty"):
        scale_intruders(tmp_path / "base", tmp_path / "tuned", report, output=out)


# --- report and errors --------------------


def test_report_is_a_table_a_picture_and_a_page():
    w0 = spectrum((30, 20), "power")
    report = intruder_dimensions(
        {"a<b>.weight": w0}, {"a<b>.weight": intrude(w0, 2)}, similarity_maps=["*"], label="<one>"
    )
    table = report.table()
    assert list(table["intruders"]) == [report.total] and "energy" in table.columns
    assert report.table(rich=True).row_count == 1
    assert json.loads(report.to_json())["per_matrix"][0]["n"] == report.total
    page = report.to_html()
    assert "a&lt;b&gt;" in page and "<one>" not in page and page.count("data:image/png") == 3
    assert report.similarity_maps["a<b>.weight"].shape == (20, 20)
    with pytest.raises(ValueError, match="kind='x'"):
        report.plot(kind="x")
    with pytest.raises(ValueError, match="similarity_maps"):
        report.plot(kind="similarity", matrix="other")


GOOD = {"a.weight": torch.eye(6)}


@pytest.mark.parametrize(
    ("base", "tuned", "arguments", "message"),
    [
        (GOOD, {"b.weight": torch.eye(6)}, {}, "'a.weight' of the base is missing"),
        (GOOD, {"a.weight": torch.eye(5)}, {}, r"'a.weight' has the shape \(6, 6\) in the base and \(5, 5\)"),
        (GOOD, {"a.weight": torch.full((6, 6), float("nan"))}, {}, "tuned: tensor 'a.weight'.*not finite"),
        (GOOD, GOOD, {"k": 0}, "k=0"),
        (GOOD, GOOD, {"k": True}, "k=True"),
        (GOOD, GOOD, {"eps": 0}, "eps=0"),
        (GOOD, GOOD, {"method": "slow"}, "method='slow'"),
        (GOOD, GOOD, {"include": ["x*"]}, "names no matrix"),
        ({"a": torch.ones(3)}, {"a": torch.ones(3)}, {}, "no matrix"),
        (GOOD, None, {}, "tuned is None"),
        ("/no/such/folder", GOOD, {}, "no such folder"),
    ],
)
def test_errors_name_tensor_or_argument(base, tuned, arguments, message):
    with pytest.raises(ValueError, match=message):
        intruder_dimensions(base, tuned, **arguments)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="base is a int"):
        intruder_dimensions(3, GOOD)
    with pytest.raises(TypeError, match=r"include='\*'"):
        intruder_dimensions(GOOD, GOOD, include="*")
    report = intruder_dimensions(GOOD, GOOD)
    for arguments, message in (
        ({"lam": -1.0}, "lam=-1"),
        ({"control": "none"}, "control='none'"),
        ({"which": "some"}, "which='some'"),
        ({"report": None}, "report is None"),
    ):
        with pytest.raises(ValueError, match=message):
            scale_intruders(GOOD, GOOD, **{"report": report, **arguments})


def test_adapters_that_are_no_plain_lora_are_refused(tmp_path):
    tuned_lora(Small(), use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_dora is set"):
        intruder_dimensions(Small(), tmp_path)
    model = tuned_lora(Small(), use_dora=True)
    with pytest.raises(ValueError, match="no plain LoRA"):
        scale_intruders(model, report=intruder_dimensions(model))
    tuned_lora(Small()).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"'(up|down)\.weight', which the base does not have"):
        intruder_dimensions({"x.weight": torch.eye(3)}, tmp_path / "plain")
