"""Mask tuning: the masked map and its gradient, the packed file, the trainer's rule."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel, TrainingArguments

from unfused.adapters import MaskTuningConfig, MaskTuningTrainer
from unfused.nn.tuner import tuner_layers
from unfused.train.gradient_dropout import gradient_dropout

pytestmark = pytest.mark.filterwarnings("ignore")


def linear(**options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 3))
    return get_peft_model(base, MaskTuningConfig(target_modules=["0"], **options))


def scores_of(model, name="default"):
    return [layer.unfused_mask_tuning_scores[name] for layer in tuner_layers(model)]


def tiny_clip(seed=0, **vision):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39, **sizes},
            vision_config={"image_size": 8, "patch_size": 4, **sizes, **vision},
            projection_dim=8,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name and "logit_scale" not in name:
            parameter.data.normal_(0, 0.2)
    return model.eval()


def few_shot(n=8):
    draw = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(3, 8, 8, generator=draw), "labels": torch.tensor(i % 3)}
        for i in range(n)
    ]


TEXT = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))


def trainer(tmp_path, model, steps=1, batch=8, lr=1.0, optim="sgd", more=(), **options):
    args = TrainingArguments(
        tmp_path,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        optim=optim,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **dict(more),
    )
    return MaskTuningTrainer(model, args, train_dataset=few_shot(), text_features=TEXT, **options)


# --- the layer ---------------------------------------------------------------------------------------------------


def test_forward_and_straight_through_gradient():
    model = linear()
    (scores,) = scores_of(model)
    layer = next(iter(tuner_layers(model)))
    with torch.no_grad():
        scores[0, 1] = scores[2, 4] = 0.005  # at the threshold is off
    x, target = torch.randn(7, 5), torch.randn(7, 3)
    weight, bias = layer.base_layer.weight.detach().numpy(), layer.base_layer.bias.detach().numpy()
    mask = np.ones((3, 5), np.float32)
    mask[0, 1] = mask[2, 4] = 0
    y = model(x)
    np.testing.assert_allclose(y.detach().numpy(), x.numpy() @ (weight * mask).T + bias, rtol=1e-5, atol=1e-6)
    ((y - target) ** 2).sum().backward()
    dense = 2 * (y.detach() - target).numpy().T @ x.numpy()  # dL/dW'
    np.testing.assert_allclose(scores.grad.numpy(), dense * weight, rtol=1e-4, atol=1e-5)
    assert scores.grad[0, 1] != 0, "an entry that is off must be able to come back"
    assert all(p.grad is None for p in layer.base_layer.parameters())


def test_adam_flips_after_the_distance_over_the_rate():
    """Card: 5e-3 at 8e-5 a step is about 63 consistent steps."""
    model = linear()
    (scores,) = scores_of(model)
    optimizer = torch.optim.Adam([scores], lr=8e-5)
    for step in range(1, 70):  # noqa: B007
        scores.grad = torch.ones_like(scores)
        optimizer.step()
        if model.base_model.sparsity()[""] == 1.0:
            break
    assert step in (62, 63)


def test_two_adapters_are_a_logical_and():
    model = linear()
    model.add_adapter("other", MaskTuningConfig(target_modules=["0"]))
    first, second = scores_of(model)[0], scores_of(model, "other")[0]
    with torch.no_grad():
        first[0, 0] = second[1, 1] = -1.0
    model.base_model.set_adapter(["default", "other"])
    assert model.base_model.sparsity() == {"": 2 / 15, "0": 2 / 15}
    x, base = torch.randn(4, 5), next(iter(tuner_layers(model))).base_layer
    weight = base.weight.detach().clone()
    weight[0, 0] = weight[1, 1] = 0
    expected = F.linear(x, weight, base.bias)
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    dense = x.sum(0).expand(3, 5)
    torch.testing.assert_close(first.grad, dense * base.weight * (second > 0))  # through the other's mask
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(merged(x), expected)


def test_default_targets_are_the_image_towers_attention():
    names = get_peft_model(tiny_clip(), MaskTuningConfig()).base_model.targeted_module_names
    assert len(names) == 8 and all(
        "vision_model" in n and "self_attn" in n and n.endswith("_proj") for n in names
    )
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=4))
    names = get_peft_model(gpt, MaskTuningConfig()).base_model.targeted_module_names
    assert sorted(names) == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    with pytest.raises(ValueError, match="target_modules is not given"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), MaskTuningConfig())


def test_errors():
    with pytest.raises(ValueError, match=r"init_score=0.001 is not above threshold=0.005"):
        MaskTuningConfig(init_score=0.001)
    base = nn.Sequential(nn.Linear(2, 2))
    base[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        get_peft_model(base, MaskTuningConfig(target_modules=["0"]))
    masked = linear()
    for options, message in (
        ({"gdr_lambda": 2}, "gdr_lambda=2"),
        ({"knowledge": "clip"}, "knowledge='clip'"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskTuningTrainer(masked, **options)
    with pytest.raises(ValueError, match="mask adapter"):
        MaskTuningTrainer(base)


# --- the file ----------------------------------------------------------------------------------------------------


def test_the_file_is_bits(tmp_path):
    model = get_peft_model(tiny_clip(), MaskTuningConfig())
    with torch.no_grad():
        for i, scores in enumerate(scores_of(model)):
            scores.add_(0.01 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(i)))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 16
    assert sum(value.numel() for key, value in state.items() if key.endswith("_bits")) == 8 * 16 * 16 // 8
    again = PeftModel.from_pretrained(tiny_clip(), tmp_path, is_trainable=True)
    for a, b in zip(scores_of(model), scores_of(again), strict=True):
        assert torch.equal(a > 0.005, b > 0.005)
        assert set(b.unique().tolist()) <= {np.float32(0.01).item(), 0.0}
    assert 0.2 < again.base_model.sparsity()[""] < 0.5
    again.set_adapter("default")


def test_scores_are_saved_on_request(tmp_path):
    model = linear(save_scores=True)
    with torch.no_grad():
        scores_of(model)[0].normal_()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(5, 3)), tmp_path)
    assert torch.equal(scores_of(again)[0], scores_of(model)[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"shape": torch.tensor([5, 3])}, "has shape"),
        ({"shape": torch.tensor([3, 50])}, "one bit for each weight"),
        ({"shape": torch.tensor([-3, -5])}, "one bit for each weight"),
        ({"shape": None}, "lacks"),
        ({"bits": torch.zeros(2)}, "one bit for each weight"),
    ],
)
def test_hostile_bits(tmp_path, damage, message):
    from safetensors.torch import save_file

    linear().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    for name, value in damage.items():
        key = f"base_model.model.0.unfused_mask_tuning_{name}"
        assert key in state
        del state[key]
        if value is not None:
            state[key] = value
    save_file(state, file)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(5, 3)), tmp_path)


# --- the trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_one_step_by_hand(tmp_path, lam):
    """Knowledge gradient from the original's predictions, task gradient with the norms, dropout, then the optimiser."""
    model = get_peft_model(tiny_clip(), MaskTuningConfig())
    with torch.no_grad():
        for i, scores in enumerate(
            scores_of(model)
        ):  # away from the start, where the knowledge gradient is 0
            scores.add_(0.005 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(i)))
    rows = few_shot()
    pixels, labels = torch.stack([r["pixel_values"] for r in rows]), torch.stack([r["labels"] for r in rows])
    before = [scores.detach().clone() for scores in scores_of(model)]
    scale, text = model.get_base_model().logit_scale.exp().detach(), F.normalize(TEXT, dim=-1)

    def logits(net):
        return scale * F.normalize(net.get_image_features(pixels).pooler_output, dim=-1) @ text.T

    with torch.no_grad():
        known = logits(tiny_clip()).softmax(-1)
    scores, out = scores_of(model), logits(model.get_base_model())
    against = torch.autograd.grad(-(known * out.log_softmax(-1)).sum(-1).mean(), scores, retain_graph=True)
    task = F.cross_entropy(out, labels) + 1e-4 * sum(s.norm() for s in scores)
    along = torch.autograd.grad(task, scores)
    expected = [torch.zeros_like(s, requires_grad=True) for s in scores]
    gradient_dropout(expected, along, against, lam, torch.Generator().manual_seed(42 * 1_000_003))
    trainer(tmp_path, model, gdr_lambda=lam, logit_scale=None).train()
    for now, was, step in zip(scores_of(model), before, expected, strict=True):
        torch.testing.assert_close(was - now.detach(), step.grad, rtol=1e-3, atol=1e-5)


def test_accumulated_batches_are_one_batch(tmp_path):
    ends = []
    for batch, accumulate in ((8, 1), (4, 2)):
        model = get_peft_model(tiny_clip(), MaskTuningConfig())
        more = {"gradient_accumulation_steps": accumulate}
        trainer(
            tmp_path / str(batch), model, steps=2, batch=batch, lr=0.01, gdr_lambda=1.0, more=more
        ).train()
        ends.append(torch.cat([s.detach().flatten() for s in scores_of(model)]))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)
    assert (ends[0] != 0.01).any()


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    ends = []
    for resume in (False, True):
        model = get_peft_model(tiny_clip(), MaskTuningConfig())
        run = {"steps": 4, "lr": 1e-3, "optim": "adamw_torch", "more": {"save_steps": 2}}
        trainer(tmp_path, model, **run).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None
        )
        ends.append(torch.cat([s.detach().flatten() for s in scores_of(model)]))
        assert not model.peft_config["default"].save_scores
    assert torch.equal(*ends) and (ends[0] != 0.01).any()


def test_knowledge_from_elsewhere_evaluation_and_batch_norm(tmp_path):
    """Without text features the model's own logits count; BatchNorm keeps its pretrained statistics."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {
        "num_channels": 3,
        "embedding_size": 8,
        "hidden_sizes": [8],
        "depths": [1],
        "layer_type": "basic",
    }
    net = ResNetForImageClassification(ResNetConfig(num_labels=3, **sizes))
    model = get_peft_model(net, MaskTuningConfig(target_modules="all", modules_to_save=["classifier"]))
    statistics = {k: v.clone() for k, v in model.state_dict().items() if "running_" in k}
    asked = []

    def knowledge(inputs):
        asked.append(sorted(inputs))
        return torch.zeros(8, 3)

    run = trainer(tmp_path, model, steps=2, knowledge=knowledge, gdr_lambda=1.0)
    run.text_features = None
    run.train()
    assert asked == [["pixel_values"]] * 2
    assert all(torch.equal(model.state_dict()[k], v) for k, v in statistics.items())
    assert run.predict(few_shot(4)).predictions.shape == (4, 3)
    assert len(asked) == 2 and run.evaluate(few_shot(4))["eval_loss"] > 0


@pytest.mark.slow
def test_two_processes_are_one_batch(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import importlib.util, os, sys, torch
            spec = importlib.util.spec_from_file_location("tests_of_mask_tuning", {str(Path(__file__))!r})
            own = importlib.util.module_from_spec(spec); spec.loader.exec_module(own)
            torch.set_num_threads(1)
            model = own.get_peft_model(own.tiny_clip(), own.MaskTuningConfig())
            batch = 8 // int(os.environ.get("WORLD_SIZE", "1"))
            more = {{"save_strategy": "no", **({{"ddp_backend": "gloo"}} if batch == 4 else {{}})}}
            own.trainer({str(tmp_path)!r}, model, steps=2, batch=batch, lr=0.01, gdr_lambda=1.0, more=more).train()
            if os.environ.get("RANK", "0") == "0":
                torch.set_printoptions(precision=8)
                print("RESULT", *torch.cat([s.detach().flatten() for s in own.scores_of(model)]).tolist())
            """
        )
    )
    ends = []
    for launch in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533"]):
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, *launch, str(script)], capture_output=True, text=True, env=env, timeout=300
        )
        assert run.returncode == 0, run.stderr[-2000:]
        line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))
        ends.append(np.array([float(v) for v in line.split()[1:]]))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-3, atol=1e-5)
