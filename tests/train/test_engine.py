"""What `fit` promises about a run that nobody disturbs."""

from __future__ import annotations

import io
import math
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from unfused.train import ArrayDataset, Engine, StageProgress, collate, fit
from unfused.train.engine import Recipe, parameter_groups


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(64, 3)

    def forward(self, input_values, labels):
        logits = self.head(self.body(input_values))
        loss = F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Scalar(nn.Module):
    """One weight; the loss is what `law(weight, x)` says."""

    def __init__(self, law=lambda w, x: (w - x).square().mean()) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.law = law

    def forward(self, x):
        return {"loss": self.law(self.w, x)}


def digits(rows: int = 40) -> ArrayDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    pictures = torch.randn(rows, 1, 6, 6, generator=generator) + labels[:, None, None, None]
    return ArrayDataset(input_values=pictures, labels=labels)


def build(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.state_dict().values()])


def test_it_learns():
    model = build()
    result = fit(model, digits(), steps=60, batch_size=20, lr=1e-2)
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < 0.5 * first["loss"]
    assert (result.steps, last["step"], result.resumed_from) == (60, 60, None)
    assert result.seconds > 0 and result.peak_mib > 10
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_same_seed_same_bits(threads, bf16):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for seed in (0, 0, 1):
            model = build()
            history = fit(model, digits(), steps=8, batch_size=16, seed=seed, bf16=bf16).history
            runs.append((weights(model), history))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not torch.equal(runs[0][0], runs[2][0])


def test_global_generators_are_left_as_they_were():
    import random

    model = build()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    random.seed(1), np.random.seed(2), torch.manual_seed(3)  # noqa: NPY002
    fit(model, digits(), steps=2)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected  # noqa: NPY002


def test_nothing_is_printed_or_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    level = transformers.logging.get_verbosity()
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        fit(build(), digits(), steps=3)
    assert (out.getvalue(), err.getvalue()) == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert transformers.logging.get_verbosity() == level


def test_config_of_a_pretrained_model_is_left_alone():
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4],
        depths=[1],
        num_labels=2,
        downsample_in_first_stage=False,
    )
    before = config.to_dict()
    model = transformers.ResNetForImageClassification(config)
    fit(model, ArrayDataset(pixel_values=torch.randn(8, 1, 8, 8), labels=torch.arange(8) % 2), steps=2)
    after = model.config.to_dict()
    assert {k for k in after if after[k] != before.get(k)} <= {
        "problem_type"
    }  # the model's own forward sets it


def test_a_plain_trainer_trains_the_same_module(tmp_path):
    model = build()
    before = weights(model).clone()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    transformers.Trainer(model=model, args=args, train_dataset=digits(), data_collator=collate).train()
    assert not torch.equal(before, weights(model))
    assert issubclass(Engine, transformers.Trainer)


def test_rows_one_by_one_and_a_batch_are_the_same():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return digits()[index]

    one, other = build(), build()
    fit(one, digits(), steps=4, batch_size=8)
    fit(other, Rows(), steps=4, batch_size=8)
    assert torch.equal(weights(one), weights(other))


# ---- hooks and history


def test_hooks_terms_and_history():
    calls = []

    class Hooked(Scalar):
        def on_train_begin(self, steps):
            calls.append(("begin", steps))

        def on_step_end(self):
            calls.append(("step", self.w.item()))
            assert self.w.grad is None

        def forward(self, x):
            loss = super().forward(x)["loss"]
            return {"loss": loss, "terms": {"twice": 2 * loss, "three": 3, "never": float("nan")}}

    model = Hooked()
    result = fit(model, ArrayDataset(x=torch.ones(10)), steps=100, batch_size=5, bf16=False)
    assert calls[0] == ("begin", 100) and len(calls) == 101 and calls[-1][1] == model.w.item()
    assert [r["step"] for r in result.history] == list(range(2, 101, 2))
    for record in result.history:
        assert record["twice"] == pytest.approx(2 * record["loss"]) and record["three"] == 3
        assert set(record) == {"step", "loss", "learning_rate", "twice", "three"}


def test_eval_fn_is_called_ten_times_without_effect_on_training():
    modes = []

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled()))
        torch.rand(3)
        return {"accuracy": 0.5, "undefined": float("nan")}

    one, other = build(), build()
    result = fit(one, digits(), steps=40, batch_size=8, eval_fn=evaluate)
    fit(other, digits(), steps=40, batch_size=8)
    assert modes == [(False, False)] * 10
    assert [r["step"] for r in result.history if "accuracy" in r] == list(range(4, 41, 4))
    assert result.history[-1]["accuracy"] == 0.5 and result.history[-1]["undefined"] is None
    assert torch.equal(weights(one), weights(other))


def test_progress_and_callbacks():
    seen, logs = [], []

    class Listener(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            globals_seen.append(logs)

    globals_seen = logs
    fit(build(), digits(), steps=5, progress=lambda *a: seen.append(a), callbacks=[Listener()], bf16=False)
    assert seen[-1][:2] == (5, 5) and math.isfinite(seen[-1][2])
    assert [line["step"] for line in logs if "loss" in line] == [1, 2, 3, 4, 5]
    out = io.StringIO()
    with StageProgress(out) as progress, progress.stage("pretrain") as stage:
        fit(build(), digits(), steps=5, progress=stage)
    assert out.getvalue().startswith("pretrain: done in ") and "loss" in out.getvalue()


# ---- optimizers and schedules


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_optimizer_equals_torch(optimizer):
    """The weights of a loop written by hand: same batches, optimizer and rates."""
    from unfused.train.data import EpochBatches

    data, recipe = digits(), dict(lr=5e-3, weight_decay=0.1)
    model, hand = build(), build()
    for m in (model, hand):
        m.body[4].p = 0.0
        m.body[0].bias = None  # batch norm takes it away: its gradient is rounding, which Adam would blow up
    fit(model, data, steps=10, batch_size=16, optimizer=optimizer, bf16=False, warmup=0.3, **recipe)

    groups = parameter_groups(hand, 0.1)
    if optimizer == "sgd":
        rule = torch.optim.SGD(groups, momentum=0.9, **recipe)
    else:
        rule = torch.optim.AdamW(groups, **recipe)
    rates = [(t + 1) / 4 if t < 3 else (1 + math.cos(math.pi * (t - 3) / 7)) / 2 for t in range(10)]
    batches = EpochBatches(40, 16, 0)
    hand.train()
    for step, rate in enumerate(rates):
        if step % 2 == 0:
            batches.set_epoch(step // 2)
            rows = iter(batches)
        for group in rule.param_groups:
            group["lr"] = 5e-3 * rate
        rule.zero_grad()
        hand(**data.__getitems__(next(rows))).loss.backward()
        rule.step()
    torch.testing.assert_close(weights(model), weights(hand), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("constant", 0.0, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("constant", 0.3, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)]),
    ],
)
def test_schedules(schedule, warmup, expected):
    result = fit(
        Scalar(),
        ArrayDataset(x=torch.ones(4)),
        steps=10,
        lr=0.1,
        schedule=schedule,
        warmup=warmup,
        bf16=False,
    )
    assert [r["learning_rate"] / 0.1 for r in result.history] == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 1000])
def test_one_cycle_rises_then_falls_to_zero(steps):
    recipe = Recipe(steps, 1, 1.0, 0.0, "adamw", 0.9, "one-cycle", 0.15, 0, False, 0.0)
    rates = [recipe.factor(t) for t in range(steps)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < rate <= 1 for rate in rates) and max(rates) > 0.5
    assert steps < 100 or (rates[-1] < 1e-3 and 0.1 < top / steps < 0.2)


def test_param_groups_have_their_own_rates():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(3, 1)), nn.Parameter(torch.zeros(3, 1))

        def forward(self, x):
            return {"loss": (self.a + self.b).sum()}

    model = Two()
    fit(
        model,
        ArrayDataset(x=torch.ones(4)),
        steps=3,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        schedule="constant",
        bf16=False,
        lr=1.0,
        param_groups=lambda m: [{"params": [m.a]}, {"params": iter([m.b]), "lr": 0.1}],
    )
    assert model.a.flatten().tolist() == [-3.0] * 3
    assert model.b.flatten().tolist() == pytest.approx([-0.3] * 3)


def test_biases_and_norms_do_not_decay():
    model = build()
    decayed, free = parameter_groups(model, 0.1)
    assert {id(p) for p in decayed["params"]} == {id(model.body[0].weight), id(model.head.weight)}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    model.head.weight.requires_grad_(False)
    assert len(parameter_groups(model, 0.1)[0]["params"]) == 1


def test_clipping():
    def run(norm):
        model = Scalar(lambda w, x: 100 * w * x.mean())
        fit(
            model,
            ArrayDataset(x=torch.ones(4)),
            steps=1,
            optimizer="sgd",
            momentum=0,
            lr=1.0,
            schedule="constant",
            max_grad_norm=norm,
            bf16=False,
        )
        return model.w.item()

    assert run(None) == -100 and run(2.0) == pytest.approx(-2, abs=1e-4)


def test_bf16_autocast_keeps_weights_and_loss_in_float32():
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            seen.append(y.dtype)
            return {"loss": y.square().mean()}

    model = Watched()
    result = fit(model, ArrayDataset(x=torch.randn(8, 4)), steps=2, bf16=True)
    assert seen == [torch.bfloat16] * 2 and model.layer.weight.dtype == torch.float32
    assert model.forward.__func__ is Watched.forward  # not wrapped for good
    assert math.isfinite(result.history[-1]["loss"])


# ---- data


def test_sampler_decides_the_rows():
    seen = []

    class Watch(Scalar):
        def forward(self, x):
            seen.append(x.tolist())
            return super().forward(x)

    fit(
        Watch(),
        ArrayDataset(x=torch.arange(10.0)),
        steps=4,
        batch_size=2,
        bf16=False,
        sampler=lambda epoch, generator: torch.tensor([1, 1, 2, 2]) + 3 * epoch,
    )
    assert seen == [[1, 1], [2, 2], [4, 4], [5, 5]]


# ---- mistakes


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "steps=0 must be a whole number of at least 1"),
        (dict(batch_size=0), "batch_size=0 must be a whole number of at least 1"),
        (dict(lr=-1.0), r"lr=-1\.0 must be a finite number"),
        (dict(lr=float("nan")), "lr=nan must be a finite number"),
        (dict(optimizer="adam"), "optimizer='adam' must be 'adamw' or 'sgd'"),
        (dict(schedule="step"), "schedule='step' must be one of 'one-cycle', 'cosine'"),
        (dict(warmup=1.5), r"warmup=1\.5 must be a fraction of the steps"),
        (dict(steps=2.5), r"steps=2\.5 must be a whole number"),
        (dict(seed=-1), "seed=-1 must be a whole number in"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        fit(build(), digits(), **({"steps": 2} | changes))


def test_numbers_of_numpy_are_numbers(tmp_path):
    run = dict(steps=np.int64(2), batch_size=np.int32(8), lr=np.float32(1e-3), seed=np.uint8(1))
    run["fingerprint"] = {"rows": np.int64(40)}
    assert fit(build(), digits(), output_dir=tmp_path, **run).resumed_from is None
    assert fit(build(), digits(), output_dir=tmp_path, **run).resumed_from == 2


def test_empty_data_and_frozen_model():
    with pytest.raises(ValueError, match="data is empty"):
        fit(build(), ArrayDataset(x=torch.zeros(0)), steps=1)
    with pytest.raises(ValueError, match="requires_grad=True"):
        fit(build().requires_grad_(False), digits(), steps=1)


@pytest.mark.parametrize("output", [{"logits": 1}, torch.zeros(()), None])
def test_output_without_loss(output):
    class Mute(Scalar):
        def forward(self, x):
            return output

    with pytest.raises(
        TypeError, match=r"Mute\.forward must return a ModelOutput or dict with a tensor `loss`"
    ):
        fit(Mute(), ArrayDataset(x=torch.ones(4)), steps=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_its_step(bad, tmp_path):
    class Breaks(Scalar):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return {"loss": self.w * (bad if self.calls == 37 else 1.0) + (bad if self.calls == 37 else 0.0)}

    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 37 of 400"):
        fit(
            Breaks(),
            ArrayDataset(x=torch.ones(4)),
            steps=400,
            output_dir=tmp_path,
            save_seconds=0,
            bf16=False,
        )
    assert not (tmp_path / "done.json").exists()


def test_weights_that_are_not_finite_at_the_end(tmp_path):
    model = Scalar(lambda w, x: (w * 1e38).square().sqrt())  # gradient of |.| at 0 is 0 / 0
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1"):
        fit(model, ArrayDataset(x=torch.ones(4)), steps=1, output_dir=tmp_path, bf16=False)
    assert not (tmp_path / "done.json").exists()
