"""SaRA: the mask, the values, the rank penalty and its subgradient, the second selection, under optimisers and Trainer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments

from unfused.adapters import SaraCallback, SaraConfig
from unfused.nn.sparse_layer import sparse_deltas
from unfused.train.peft import RegularizedTrainer


class Net(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)
        self.fc1, self.fc2 = nn.Linear(4 * 2 * 2, width), nn.Linear(width, 3)

    def forward(self, x, labels=None):
        logits = self.fc2(torch.relu(self.fc1(torch.relu(self.norm(self.conv(x))).flatten(1))))
        return {
            "loss": None if labels is None else nn.functional.cross_entropy(logits, labels),
            "logits": logits,
        }


def net():
    torch.manual_seed(0)
    return Net()


def batch(seed=0, items=8):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(items, 1, 4, 4, generator=generator), "labels": torch.arange(items) % 3}


class Wide(nn.Module):
    """One matrix large enough for the penalty."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 70), nn.Linear(70, 66)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def wide():
    torch.manual_seed(0)
    return Wide()


def adapted(base, **options):
    options.setdefault("density", 0.3)
    return get_peft_model(base, SaraConfig(**options))


def deltas(model, name="default"):
    return {n: (delta, original) for n, (_, delta, original) in sparse_deltas(model, name).items()}


def test_mask_is_one_absolute_threshold_for_all_tensors_and_values_are_signed():
    base = wide()
    model = adapted(base, density=None, threshold=0.05)
    found = deltas(model)
    assert set(found) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    for delta, original in found.values():
        flat = original.detach().flatten()
        assert torch.equal(delta.index, (flat.abs() < 0.05).nonzero().squeeze(1))
        assert torch.equal(delta.values.detach(), flat[delta.index])
    assert any((delta.values < 0).any() for delta, _ in found.values())


def test_density_sets_the_threshold():
    base = net()
    model = adapted(base, density=0.25)
    total = sum(p.numel() for p in net().parameters())
    chosen = sum(len(delta.index) for delta, _ in deltas(model).values())
    assert abs(chosen - 0.25 * total) <= 1 + sum(b.numel() for b in (base.norm.base_layer.bias,))
    assert 0 < model.peft_config["default"].threshold < 1
    assert {"norm.weight", "norm.bias", "conv.weight"} <= set(deltas(model))
    assert SaraConfig().threshold == 2e-3 and SaraConfig(density=0.1).threshold is None


def test_merged_model_has_the_values_in_place():
    base = net()
    start = copy.deepcopy(base.state_dict())
    model = adapted(base)
    wanted = {}
    for name, (delta, _) in deltas(model).items():
        delta.values.data.normal_()
        wanted[name] = (delta.index.clone(), delta.values.detach().clone())
    expected = model(**batch())["logits"]
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch())["logits"], expected)
    for name, value in merged.state_dict().items():
        index, values = wanted[name]
        torch.testing.assert_close(value.flatten()[index], values)
        same = torch.ones(value.numel(), dtype=torch.bool)
        same[index] = False
        assert torch.equal(value.flatten()[same], start[name].flatten()[same])


@pytest.mark.parametrize("target", ["value", "delta"])
def test_nuclear_norm_and_its_subgradient(target):
    model = adapted(wide(), density=0.4, nuclear_weight=0.5, rank_target=target, nuclear_min_dim=64)
    delta, original = deltas(model)["fc2.weight"]  # fc1 is 70 x 8: too small
    with torch.no_grad():
        delta.values += 0.1 * torch.randn(len(delta.values))
    start = original.detach().flatten()[delta.index]
    masked = torch.zeros(66 * 70)
    masked[delta.index] = delta.values.detach() - (start if target == "delta" else 0)
    u, s, v = torch.linalg.svd(masked.view(66, 70), full_matrices=False)
    loss = model.base_model.regularization_loss()
    torch.testing.assert_close(loss, 0.5 * s.sum(), rtol=1e-3, atol=0)
    loss.backward()
    torch.testing.assert_close(delta.values.grad, 0.5 * (u @ v).flatten()[delta.index], atol=1e-3, rtol=1e-2)
    assert all(d.values.grad is None for n, (d, _) in deltas(model).items() if n != "fc2.weight")


def test_nuclear_norm_draws_one_matrix_and_skips_small_ones():
    model = adapted(wide(), density=0.8, nuclear_weight=1.0, nuclear_min_dim=4)
    torch.manual_seed(0)
    losses = {round(model.base_model.regularization_loss().item(), 4) for _ in range(20)}
    assert len(losses) == 2  # fc1.weight or fc2.weight, never a bias
    assert adapted(wide(), nuclear_weight=0.0).base_model.regularization_loss().item() == 0
    assert adapted(wide(), nuclear_min_dim=66).base_model.regularization_loss().item() == 0
    few = adapted(wide(), density=0.005, nuclear_min_dim=4)
    assert few.base_model.regularization_loss().item() == 0, "fewer than 100 entries"


def test_convolutions_count_as_matrices():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(8, 70, 3, bias=False))
    model = adapted(base, density=0.5, nuclear_weight=1.0)
    ((delta, _),) = deltas(model).values()
    expected = torch.linalg.matrix_norm(
        torch.zeros(70 * 72).index_put((delta.index,), delta.values.detach()).view(70, 72), "nuc"
    )
    torch.testing.assert_close(model.base_model.regularization_loss().detach(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_second_selection_freezes_what_has_grown(optimizer):
    """Under momentum and weight decay: frozen values stay exactly, the others go on with a fresh state."""
    model = adapted(wide(), nuclear_weight=0.0, reselect_at=3)
    chosen = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    optimizer, threshold = optimizer(chosen, **options), model.peft_config["default"].threshold
    x, settled, moved = torch.randn(16, 8), {}, 0
    for step in range(1, 7):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        if step > 3:
            for name, (delta, _) in deltas(model).items():
                assert (delta.values.grad[delta.frozen] == 0).all(), name
        optimizer.step()
        restart = model.base_model.update_and_allocate(step)
        assert (len(restart) == len(chosen)) == (step == 3) and (step == 3 or restart == [])
        for parameter in restart:
            optimizer.state.pop(parameter, None)
        if step == 3:
            assert {id(p) for p in chosen} == {id(p) for p in model.parameters() if p.requires_grad}
            for name, (delta, _) in deltas(model).items():
                assert torch.equal(delta.frozen, delta.values.abs() >= threshold)
                settled[name] = delta.values.detach().clone()
            assert (
                0
                < sum(int(d.frozen.sum()) for d, _ in deltas(model).values())
                < sum(map(len, settled.values()))
            )
        if step > 3:
            for name, (delta, original) in deltas(model).items():
                assert torch.equal(delta.values[delta.frozen], settled[name][delta.frozen])
                start = original.flatten()[delta.index]
                assert not delta.frozen.any() or (settled[name] != start)[delta.frozen].any(), "not set back"
                moved += int((delta.values != settled[name]).sum())
    assert moved > 0


def test_fractions_need_the_length_of_the_run():
    model = adapted(net(), reselect_at=0.5)
    with pytest.raises(ValueError, match=r"begin_training\(total_steps\)"):
        model.base_model.update_and_allocate(1)
    model.base_model.begin_training(5)
    assert model.base_model.update_and_allocate(2) == []
    assert len(model.base_model.update_and_allocate(3)) == len(deltas(model))
    assert model.base_model.update_and_allocate(4) == []
    never = adapted(net(), reselect_at=None)
    assert never.base_model.update_and_allocate(10**6) == []


def test_frozen_values_survive_saving(tmp_path):
    model = adapted(wide(), reselect_at=1, nuclear_weight=0.0)
    with torch.no_grad():
        for delta, _ in deltas(model).values():
            delta.values[::3] += 1.0
    model.base_model.update_and_allocate(1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(wide(), tmp_path, is_trainable=True)
    again.base_model.begin_training(10)
    before = {n: (d.frozen.clone(), d.values.detach().clone()) for n, (d, _) in deltas(again).items()}
    assert sum(int(frozen.sum()) for frozen, _ in before.values()) > 0
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 4):
        optimizer.zero_grad()
        again(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        assert again.base_model.update_and_allocate(step) == [], "selected again already, in the first half"
    for name, (delta, _) in deltas(again).items():
        frozen, values = before[name]
        assert torch.equal(delta.frozen, frozen) and torch.equal(delta.values[frozen], values[frozen])
    assert any(not torch.equal(d.values, before[n][1]) for n, (d, _) in deltas(again).items())


def test_other_base_model_gets_the_same_values(tmp_path):
    """The file holds positions and values, not a threshold that selects others on another base."""
    model = adapted(wide())
    model.save_pretrained(tmp_path)
    other = wide()
    for parameter in other.parameters():
        parameter.data.mul_(3)
    again = PeftModel.from_pretrained(other, tmp_path)
    for name, (delta, _) in deltas(again).items():
        assert torch.equal(delta.index, deltas(model)[name][0].index)
    merged = again.merge_and_unload()
    for name, (delta, _) in deltas(model).items():
        value = merged.state_dict()[name].flatten()[delta.index]
        torch.testing.assert_close(value, delta.values.detach(), atol=1e-6, rtol=1e-4)


def test_half_precision_base_keeps_small_steps():
    base = wide().to(torch.bfloat16)
    model = adapted(base)
    delta, _ = deltas(model)["fc2.weight"]
    assert delta.values.dtype == torch.float32
    before = delta.values.detach().clone()
    delta.values.data += 1e-6
    model.to(torch.bfloat16)
    assert (delta.values > before).all()


def test_callback_in_a_trainer(tmp_path):
    model, seen = adapted(net(), reselect_at=0.5, nuclear_min_dim=4, nuclear_weight=1e-3), []

    class Watch(SaraCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            super().on_step_end(args, state, control, model=model, optimizer=optimizer, **kwargs)
            seen.append((sum(int(d.frozen.sum()) for d, _ in deltas(model).values()), len(optimizer.state)))

    rows = [{"x": x, "labels": y} for x, y in zip(*batch(items=32).values(), strict=True)]
    args = TrainingArguments(
        tmp_path,
        max_steps=6,
        learning_rate=0.05,
        weight_decay=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = RegularizedTrainer(model, args, train_dataset=rows)
    trainer.pop_callback(trainer.callback_handler.callbacks[-1])
    trainer.add_callback(Watch())
    trainer.train()
    counts, states = zip(*seen, strict=True)
    assert counts[:2] == (0, 0) and counts[2] > 0 and counts[3:] == (counts[2],) * 3
    assert states[2] == 0 and states[1] == states[3] > 0


def test_diffusers_unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 50])
    with torch.no_grad():
        before = unet(x, t).sample
        names = {name for name, _ in unet.named_parameters()}
        model = adapted(unet)
        assert set(deltas(model)) == names, "every tensor, the last convolution too"
        torch.testing.assert_close(model(x, t).sample, before)
    loss = (model(x, t).sample - x).square().mean() + model.base_model.regularization_loss()
    loss.backward()
    assert all(d.values.grad is not None for d, _ in deltas(model).values())
    assert type(model.merge_and_unload()) is diffusers.UNet2DModel


def test_suggested_rate():
    assert SaraConfig.suggest_lr(2e-3) == pytest.approx(1e-3 * math.exp(-0.7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"density": 1.0}, "density=1.0"),
        ({"nuclear_weight": -1.0}, "nuclear_weight=-1.0"),
        ({"rank_target": "both"}, "rank_target='both'"),
        ({"reselect_at": 0}, "reselect_at=0"),
        ({"reselect_at": 2.5}, "reselect_at=2.5"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=f"SaraConfig: {message}"):
        SaraConfig(**options)


def test_hostile_frozen_mask(tmp_path):
    from safetensors.torch import load_file, save_file

    adapted(wide()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(k for k in state if k.endswith(".frozen") and len(state[k]) > 1)
    for broken, message in ((state[key].float(), "type bool"), (state[key][:-1], "shape")):
        save_file({**state, key: broken.contiguous()}, file)
        with pytest.raises(ValueError, match=f"adapter file.*{message}"):
            PeftModel.from_pretrained(wide(), tmp_path)
