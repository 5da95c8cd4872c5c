"""LoRAMoE: forward, balancing loss, types, usage, training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from unfused.adapters import LoraMoeConfig, LoraMoeTrainer, localized_balancing_loss
from unfused.train.peft import RegularizedTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


def moe(base=None, move=0.3, **options):
    model = get_peft_model(
        base or llama(), LoraMoeConfig(**{"num_experts": 4, "lora_dropout": 0.0} | options)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "unfused_loramoe" in name:
                parameter.add_(move * torch.randn(parameter.shape, generator=generator))
    return model


def layer(n=4, r=2, **options):
    torch.manual_seed(0)
    model = moe(nn.Sequential(nn.Linear(5, 3)), target_modules=["0"], num_experts=n, r=r, **options)
    return model, model.base_model.model[0]


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (4, 6), generator=generator)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 4:] = mask[3, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def test_forward_in_numpy():
    model, moe_layer = layer(lora_alpha=6)
    x = torch.randn(2, 7, 5)
    y = model.eval()(x).detach().numpy()
    get = lambda k: getattr(moe_layer, f"unfused_loramoe_{k}")["default"].detach().numpy()  # noqa: E731
    logits = x.numpy() @ get("router").T
    w = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    experts = np.einsum("onr,nri,bti->btno", get("b"), get("a"), x.numpy())
    expected = moe_layer.base_layer(x).detach().numpy() + 6 / 2 * np.einsum("btn,btno->bto", w, experts)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_one_expert_is_lora():
    model, moe_layer = layer(n=1, balance_weight=0.0, lora_alpha=8)
    lora = get_peft_model(
        nn.Sequential(copy.deepcopy(moe_layer.base_layer)),
        LoraConfig(r=2, lora_alpha=8, target_modules=["0"]),
    )
    lora_layer = lora.base_model.model[0]
    lora_layer.lora_A["default"].weight.data = moe_layer.unfused_loramoe_a["default"].data[0]
    lora_layer.lora_B["default"].weight.data = moe_layer.unfused_loramoe_b["default"].data[:, 0]
    x = torch.randn(4, 5)
    torch.testing.assert_close(model(x), lora(x))


def test_initial_scale_is_each_matrixs_own():
    base = nn.Sequential(nn.Linear(100, 50))
    moe_layer = get_peft_model(base, LoraMoeConfig(target_modules=["0"])).base_model.model[0]
    for name in ("router", "a"):
        values = getattr(moe_layer, f"unfused_loramoe_{name}")["default"]
        assert 0.08 < values.abs().max() <= 0.1  # 1 / sqrt(in)
    assert not moe_layer.unfused_loramoe_b["default"].any()


def test_dropout_is_each_experts_own():
    model, moe_layer = layer(n=2, r=1, lora_dropout=0.5, move=0.0)
    with torch.no_grad():
        moe_layer.unfused_loramoe_router["default"].zero_()
        moe_layer.unfused_loramoe_a["default"].copy_(torch.ones(2, 1, 5))
        moe_layer.unfused_loramoe_b["default"][0] = torch.tensor([[1.0], [100.0]])
    x = torch.zeros(400, 5)
    x[:, 0] = 1.0
    y = (
        (model.train()(x) - moe_layer.base_layer(x))[:, 0] / 32 * 2
    )  # kept inputs count double: 0, 2, 200, 202
    assert set(y.round().int().tolist()) == {0, 2, 200, 202}
    model.eval()
    assert torch.allclose(model(x), model(x))


@pytest.mark.parametrize("form", ["cv2", "dispersion"])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("swap", [False, True])
def test_loss_in_numpy(form, per_token, swap):
    model, moe_layer = layer(
        balance_form=form,
        balance_per_token=per_token,
        swap_groups=swap,
        balance_delta=0.3,
        balance_weight=0.7,
    )
    x, types = torch.randn(3, 6, 5), torch.tensor([0, 1, 1])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    with model.base_model.sample_types(types, attention_mask=mask):
        model.train()(x)
    loss = model.base_model.regularization_loss()
    logits = x.numpy() @ moe_layer.unfused_loramoe_router["default"].detach().numpy().T
    w = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    q = (w * mask.numpy()[..., None]).sum(1)
    if per_token:
        q = q / mask.numpy().sum(1, keepdims=True)
    kind_of_expert = np.array([1, 1, 0, 0])
    agree = types.numpy()[:, None] == kind_of_expert
    z = q * np.where(agree != swap, 1.3, 0.7)
    expected = 0.7 * z.var() / (z.mean() ** 2 + 1e-10 if form == "cv2" else z.mean())
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-4)


def test_loss_is_zero_for_constant_z():
    q = torch.tensor([[1 / 0.7, 1 / 1.3]])
    assert localized_balancing_loss(q, torch.tensor([[0.7, 1.3]])).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("swap", [False, True])
def test_the_loss_parts_two_experts(swap):
    """Towards weights (1 -+ delta) / 2: without the swap, the expert of a sample's own type gets less."""
    model, moe_layer = layer(n=2, move=0.0, balance_delta=0.4, swap_groups=swap)
    x = torch.randn(40, 1, 5)
    x[:20, 0, 0], x[20:, 0, 0] = 3.0, -3.0
    types = torch.tensor([0] * 20 + [1] * 20)
    router = moe_layer.unfused_loramoe_router["default"]
    optimizer = torch.optim.Adam([router], lr=0.03)
    for _ in range(150):
        with model.base_model.sample_types(types):
            model.train()(x)
        optimizer.zero_grad()
        model.base_model.regularization_loss().backward()
        optimizer.step()
    with torch.no_grad(), model.base_model.sample_types(types):
        model.eval()(x)
    usage = model.base_model.expert_usage().set_index(["type", "expert"]).weight
    own = (usage[0, 1] + usage[1, 0]) / 2  # the second half of the experts is of type 0
    assert own == pytest.approx(0.7 if swap else 0.3, abs=0.05)


def test_three_types():
    model, _ = layer(n=3, expert_groups=[[2], [0], [1]], balance_delta=0.5)
    assert LoraMoeConfig(num_experts=3, expert_groups=[[2], [0], [1]]).expert_types() == [1, 2, 0]
    types = torch.tensor([0, 1, 2])
    with model.base_model.sample_types(types):
        model.train()(torch.randn(3, 4, 5))
    assert model.base_model.regularization_loss() > 0
    assert sorted(model.base_model.expert_usage().type.unique()) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"types=\[3\]: choose them from 0 to 2"):
        with model.base_model.sample_types([3]):
            pass


def test_padding_counts_nowhere():
    model = moe()
    first, second = batch(), batch()
    second["input_ids"] = torch.where(first["attention_mask"] > 0, first["input_ids"], 7)
    losses = []
    for each in (first, second):
        with model.base_model.sample_types([0, 1, 0, 1], each["attention_mask"]):
            model.train()(input_ids=each["input_ids"], attention_mask=each["attention_mask"])
        losses.append(model.base_model.regularization_loss().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_gradient_is_the_same_under_checkpointing():
    def gradients(on):
        model = moe(balance_weight=5.0)
        model.train()
        if on:
            model.gradient_checkpointing_enable()
        with model.base_model.sample_types([0, 1, 0, 1], batch()["attention_mask"]):
            loss = model(**batch()).loss
        (loss + model.base_model.regularization_loss()).backward()
        kept = [
            m.unfused_loramoe_record["default"][0]
            for m in model.modules()
            if hasattr(m, "unfused_loramoe_record")
        ]
        assert len(kept) == 6 and all(w.grad_fn is not None for w in kept)
        usage = model.base_model.expert_usage()
        return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}, usage

    plain, usage = gradients(False)
    again, usage_again = gradients(True)
    assert plain.keys() == again.keys() and len(plain) == 18
    for key in plain:
        torch.testing.assert_close(plain[key], again[key], atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(usage.weight, usage_again.weight, rtol=1e-5)


def test_reentrant_checkpointing_says_why_it_cannot():
    model = moe().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with model.base_model.sample_types([0, 1, 0, 1]):
        model(**batch())
    with pytest.raises(ValueError, match="use_reentrant"):
        model.base_model.regularization_loss()


def test_evaluation_adds_nothing_and_copies_are_free_of_the_graph():
    model = moe().train()
    with model.base_model.sample_types([0, 1, 0, 1]):
        model(**batch())
    assert model.base_model.regularization_loss() > 0
    other = copy.deepcopy(model)
    assert other.base_model.regularization_loss() == 0
    model.eval()(**batch())
    assert model.base_model.regularization_loss() == 0


def test_without_types_it_is_ordinary_balancing():
    model, reference = moe(balance_delta=0.3), moe(balance_delta=0.0)
    model.train()(**batch())
    with pytest.warns(UserWarning, match="no types of samples"):
        loss = model.base_model.regularization_loss()
    reference.train()(**batch())
    assert loss.item() == pytest.approx(reference.base_model.regularization_loss().item())


def test_usage_is_a_mean_over_real_tokens():
    model = moe()
    with torch.no_grad(), model.base_model.sample_types([0, 1, 0, 1], batch()["attention_mask"]):
        model.eval()(**batch())
    usage = model.base_model.expert_usage(reset=True)
    assert set(usage.layer) == {0, 1} and set(usage.matrix) == {
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    }
    totals = usage.groupby(["layer", "matrix", "type"]).weight.sum()
    np.testing.assert_allclose(totals, 1.0, rtol=1e-5)
    assert len(totals) == 12 and model.base_model.expert_usage().empty


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=16):
        self.rows = [{**{k: v[i % 4] for k, v in batch(i).items()}, "task_type": i % 2} for i in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def arguments(tmp_path, **options):
    return TrainingArguments(
        str(tmp_path),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        **options,
    )


def test_trainer_reads_the_types(tmp_path):
    model = moe(balance_weight=1.0)
    trainer = LoraMoeTrainer(
        model,
        arguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=4,
            gradient_checkpointing=True,
            eval_strategy="steps",
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(4),
    )
    trainer.train()
    assert set(model.base_model.expert_usage().type) == {0, 1}
    plain = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(plain) == 3 and np.isfinite(plain).all()
    trainer.predict(Rows(4))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_term_weighs_the_same_under_accumulation(accumulate, tmp_path):
    """Two batches of 2 that are alike, against one batch of 2."""
    model = moe(balance_weight=1.0)
    rows = Rows(4)
    rows.rows = [rows.rows[0], rows.rows[1]] * 4
    seen = {}

    class Watch(LoraMoeTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            seen["grad"] = next(p for n, p in model.named_parameters() if "router" in n).grad.clone()
            return loss

    Watch(
        model,
        arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential",
        ),
        train_dataset=rows,
    ).train()
    reference = moe(balance_weight=1.0).train()
    one = {k: torch.stack([torch.as_tensor(r[k]) for r in rows.rows[:2]]) for k in rows.rows[0]}
    with reference.base_model.sample_types(one.pop("task_type"), one["attention_mask"]):
        loss = reference(**one).loss
    (loss + reference.base_model.regularization_loss()).backward()
    expected = next(p for n, p in reference.named_parameters() if "router" in n).grad
    torch.testing.assert_close(seen["grad"], expected, atol=1e-6, rtol=1e-3)


def test_trainer_is_a_regularized_trainer():
    assert issubclass(LoraMoeTrainer, RegularizedTrainer)


def test_types_and_batches_that_do_not_fit():
    model = moe()
    with pytest.raises(ValueError, match="3 types for a batch"), model.base_model.sample_types([0, 1, 0]):
        model(**batch())
    with pytest.raises(ValueError, match="attention_mask of shape"):
        with model.base_model.sample_types([0, 1, 0, 1], torch.ones(4, 3)):
            model(**batch())
    model(**batch())  # the context is gone


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_experts": 3}, "num_experts=3 has no halves"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"r": 0}, "r=0"),
        ({"balance_delta": 1.1}, "balance_delta=1.1"),
        ({"balance_weight": -1.0}, "balance_weight=-1.0"),
        ({"balance_form": "std"}, "balance_form='std'"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"num_experts": 2, "expert_groups": [[0], [0, 1]]}, "expert_groups="),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=f"LoraMoeConfig: {message}"):
        LoraMoeConfig(**options)
    assert LoraMoeConfig(num_experts=3, balance_delta=0.0).num_experts == 3
