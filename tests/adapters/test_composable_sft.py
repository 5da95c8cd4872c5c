"""LT-SFT: both phases against a by-hand run, what is rewound, composition, tied outputs, several sources."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, TrainingArguments

from unfused.adapters import (
    LtSftConfig,
    LtSftTrainer,
    from_state_dict_delta,
    lottery_ticket_select,
    to_state_dict_delta,
)
from unfused.nn.sparse_layer import sparse_deltas
from unfused.train.one_source import OneSourceBatches
from unfused.train.peft import RegularizedTrainer

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(10, 6, padding_idx=0), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, ids, labels=None):
        logits = self.head(self.norm(torch.relu(self.fc(self.table(ids)))).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def net():
    torch.manual_seed(0)
    return Net()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, 10, (16, 5), generator=generator),
        "labels": torch.randint(0, 3, (16,), generator=generator),
    }


def sgd(model, steps=3, lr=0.5):
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(step))["loss"].backward()
        optimizer.step()


def adapted(base=None, **options):
    options.setdefault("num_entries", 20)
    return get_peft_model(base or net(), LtSftConfig(modules_to_save=["head"], **options))


def test_both_phases_equal_masked_fine_tuning_by_hand():
    """theta1 by full training, the K largest changes, rewind, training with masked gradients."""
    model = adapted()
    counts = lottery_ticket_select(model, sgd)
    sgd(model)

    plain = net()
    start = copy.deepcopy(plain.state_dict())
    plain.norm.requires_grad_(False)
    sgd(plain)
    names = ["table.weight", "fc.weight", "fc.bias"]
    changes = {name: (plain.state_dict()[name] - start[name]).abs() for name in names}
    changes["table.weight"][0] = -1  # the padding row
    flat = torch.cat([changes[name].flatten() for name in names])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.topk(20).indices] = True
    masks = dict(zip(names, chosen.split([changes[n].numel() for n in names]), strict=True))
    assert counts == {name: int(mask.sum()) for name, mask in masks.items()}

    plain.load_state_dict(start)
    for name, parameter in plain.named_parameters():
        if name in masks:
            mask = masks[name].view(parameter.shape)
            parameter.register_hook(lambda grad, mask=mask: grad * mask)
    sgd(plain)
    merged = model.merge_and_unload()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)
    moved = sum(int((merged.state_dict()[n] != start[n]).sum()) for n in names)
    assert moved <= 20


def test_first_phase_leaves_everything_as_it_was():
    base = net()
    model = adapted(base)
    before = {k: v.clone() for k, v in model.state_dict().items() if "unfused" not in k}
    parameters = dict(model.named_parameters())

    def train(m):
        assert sum(p.numel() for p in m.parameters() if p.requires_grad) == 60 + 42 + 21  # no norm, no values
        sgd(m)
        assert not torch.equal(
            m.base_model.model.fc.base_layer.weight, before["base_model.model.fc.base_layer.weight"]
        )

    lottery_ticket_select(model, train)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[k] for k, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="stop"):
        lottery_ticket_select(model, lambda m: (sgd(m), (_ for _ in ()).throw(RuntimeError("stop"))))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {
        k for k in parameters if "unfused" in k or "modules_to_save" in k
    }


def test_random_and_bias_masks():
    def entries(model):
        return {name: delta.index for name, (_, delta, _) in sparse_deltas(model, "default").items()}

    first, again = entries(adapted()), entries(adapted())
    assert sum(len(i) for i in first.values()) == 20
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], i) for k, i in entries(adapted(seed=1)).items())
    everything = entries(adapted(num_entries=None, density=1.0))
    assert everything["table.weight"].tolist() == list(range(6, 60)), "all but the padding row"
    assert len(everything["fc.weight"]) == 36
    biases = entries(adapted(mask="bias"))
    assert {k: len(i) for k, i in biases.items()} == {"table.weight": 0, "fc.weight": 0, "fc.bias": 6}


def test_iterations_add_entries_and_keep_values():
    model = adapted(iterations=2)
    assert sum(lottery_ticket_select(model, sgd, iteration=0).values()) == 10
    sgd(model)
    first = {n: dict(zip(d.index.tolist(), d.values.tolist(), strict=True)) for n, (_, d, _) in deltas(model)}
    assert sum(lottery_ticket_select(model, sgd, iteration=1).values()) == 10
    second = {
        n: dict(zip(d.index.tolist(), d.values.tolist(), strict=True)) for n, (_, d, _) in deltas(model)
    }
    assert sum(map(len, second.values())) == 20
    for name, entries in first.items():
        assert entries.items() <= second[name].items()
    added = [v for n, entries in second.items() for i, v in entries.items() if i not in first[n]]
    assert added == [0.0] * 10


def deltas(model, name="default"):
    return sparse_deltas(model, name).items()


def test_l1_pull_in_both_phases():
    model = adapted(l1_weight=0.1)
    total = sum(p.numel() for p in net().parameters()) + 21  # PEFT's copy of the head
    for _, (_, delta, _) in deltas(model):
        delta.values.data.fill_(2.0)
    assert model.base_model.regularization_loss().item() == pytest.approx(0.1 / total * 20 * 2, rel=1e-5)

    def train(m):
        assert m.base_model.regularization_loss().item() == 0
        m.base_model.model.fc.base_layer.bias.data += 1
        loss = m.base_model.regularization_loss()
        assert loss.item() == pytest.approx(0.1 / total * 6, rel=1e-5)
        loss.backward()
        assert m.base_model.model.fc.base_layer.bias.grad[0].item() == pytest.approx(0.1 / total, rel=1e-5)

    lottery_ticket_select(model, train)
    assert adapted().base_model.regularization_loss().item() == 0


def test_task_on_top_of_a_language_and_composition(tmp_path):
    base = net()
    model = get_peft_model(base, LtSftConfig(num_entries=15), adapter_name="lang")
    lottery_ticket_select(model, sgd)
    sgd(model)
    model.save_pretrained(tmp_path, selected_adapters=["lang"])
    language = {n: d.values.clone() for n, (_, d, _) in deltas(model, "lang")}

    fresh = net()
    start = copy.deepcopy(fresh.state_dict())
    model = get_peft_model(fresh, LtSftConfig(num_entries=20, modules_to_save=["head"]), adapter_name="task")
    model.load_adapter(tmp_path / "lang", "lang")
    model.base_model.set_adapter(["lang", "task"])
    lottery_ticket_select(model, sgd, "task")
    sgd(model)
    assert all(torch.equal(d.values, language[n]) for n, (_, d, _) in deltas(model, "lang"))
    together = model(**batch(7))["logits"]
    model.base_model.set_adapter(["task", "lang"])
    torch.testing.assert_close(model(**batch(7))["logits"], together)

    vectors = [to_state_dict_delta(model, name) for name in ("lang", "task")]
    assert not any(key.startswith("head") for key in vectors[0]) and "head.weight" in vectors[1]
    plain = net()
    plain.load_state_dict(from_state_dict_delta(start, *vectors))
    torch.testing.assert_close(plain(**batch(7))["logits"], together)
    torch.testing.assert_close(
        from_state_dict_delta(start, *vectors[::-1])["fc.weight"], plain.fc.weight.detach()
    )
    assert from_state_dict_delta(start, vectors[1], heads=False)["head.weight"] is start["head.weight"]
    model.base_model.set_adapter(["lang", "task"])
    merged = model.merge_and_unload(adapter_names=["lang", "task"])
    torch.testing.assert_close(merged(**batch(7))["logits"], together)


def test_state_dict_delta_refuses():
    state = {"fc.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"changes 'fc.bias', which"):
        from_state_dict_delta(state, {"fc.bias.index": torch.tensor([0]), "fc.bias.values": torch.ones(1)})
    with pytest.raises(ValueError, match="positions from 4 to 4"):
        from_state_dict_delta(
            state, {"fc.weight.index": torch.tensor([4]), "fc.weight.values": torch.ones(1)}
        )
    model = adapted()
    next(iter(sparse_deltas(model, "default").values()))[1].values.data[0] = 1e-8
    assert not any(key.endswith(".values") for key in to_state_dict_delta(model)), "below 1e-7"


def test_adapter_has_to_be_named_where_several_are_active():
    model = adapted()
    model.add_adapter("second", LtSftConfig(num_entries=5))
    with pytest.raises(ValueError, match="'second': not active; active are default"):
        lottery_ticket_select(model, sgd, "second")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 adapters are active: default, second"):
        lottery_ticket_select(model, sgd)
    with pytest.raises(ValueError, match="no LT-SFT adapter"):
        lottery_ticket_select(net(), sgd)


def masked_lm():
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(vocab_size=40, max_position_embeddings=16, **SIZES, **NO_DROPOUT)
    ).eval()


def test_tied_output_embedding_is_never_trained(tmp_path):
    base = masked_lm()
    tied = base.get_input_embeddings().weight
    assert base.get_output_embeddings().weight is tied
    start, ids = tied.detach().clone(), torch.randint(1, 40, (4, 8))
    model = get_peft_model(base, LtSftConfig(density=0.3))

    def train(m):
        assert base.get_output_embeddings().weight is tied and not tied.requires_grad
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0)
        m(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    counts = lottery_ticket_select(model, train)
    assert counts["bert.embeddings.word_embeddings.weight"] > 0
    train(model)
    assert torch.equal(tied, start)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected)
        merged.save_pretrained(tmp_path)
        again = BertForMaskedLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(input_ids=ids).logits, expected)


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def bert(**options):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **SIZES, **NO_DROPOUT)
    return get_peft_model(
        BertForSequenceClassification(config),
        LtSftConfig(num_entries=200, modules_to_save=["classifier"], **options),
    )


def arguments(path, **options):
    options = {"num_train_epochs": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 8} | options
    return TrainingArguments(path, report_to=[], use_cpu=True, disable_tqdm=True, **options)


def test_trainer_runs_both_phases(tmp_path, monkeypatch):
    model, phases = bert(iterations=2), []
    plain_step = RegularizedTrainer.training_step

    def step(self, module, *args, **kwargs):
        phases.append(module.base_model.model.bert.encoder.layer[0].output.dense.dense_for)
        return plain_step(self, module, *args, **kwargs)

    monkeypatch.setattr(RegularizedTrainer, "training_step", step)
    before = {k: v.clone() for k, v in model.state_dict().items() if ".base_layer." in k}
    args = arguments(tmp_path, save_strategy="epoch")
    trainer = LtSftTrainer(model, args, train_dataset=rows(32), dense_epochs=1, sparse_epochs=2)
    trainer.train()
    assert phases == (["default"] * 4 + [""] * 8) * 2
    assert args.num_train_epochs == 1 and str(args.save_strategy.value) == "epoch"
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    found = sparse_deltas(model, "default")
    assert sum(len(d.index) for _, d, _ in found.values()) == 200
    assert all(
        (d.values != 0).all() for n, (_, d, _) in found.items() if "query.weight" in n and len(d.index)
    )
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]

    torch.manual_seed(0)
    again = bert(iterations=2)
    LtSftTrainer(again, arguments(tmp_path), train_dataset=rows(32), sparse_epochs=2).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    for name, (_, delta, _) in sparse_deltas(again, "default").items():
        assert torch.equal(delta.index, found[name][1].index)
        torch.testing.assert_close(delta.values, found[name][1].values)


def test_trainer_refuses_a_ready_optimizer(tmp_path):
    model = bert()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="each phase makes its own"):
        LtSftTrainer(model, arguments(tmp_path), train_dataset=rows(8), optimizers=(optimizer, None))


def test_several_sources(tmp_path):
    """Every batch runs under its own source's vector, which stays as it is."""
    model = bert()
    for n, name in enumerate(("a", "b")):
        model.add_adapter(name, LtSftConfig(num_entries=50, seed=n + 1))
        for _, (_, delta, _) in deltas(model, name):
            delta.values.data.normal_()
    before = {n: [d.values.clone() for _, (_, d, _) in deltas(model, n)] for n in "ab"}
    data, seen = {"a": rows(20), "b": rows(16, seed=1)}, []
    layer = model.base_model.model.bert.encoder.layer[0].output.dense
    layer.register_forward_pre_hook(lambda module, args: seen.append(tuple(module.active_adapters)))
    LtSftTrainer(model, arguments(tmp_path, save_strategy="no"), train_dataset=data).train()
    assert sorted(seen[:4]) == sorted(seen[4:]) == [("a", "default")] * 2 + [("b", "default")] * 2
    assert layer.active_adapters == ["default"]
    for name in "ab":
        assert all(
            torch.equal(d.values, v)
            for (_, (_, d, _)), v in zip(deltas(model, name), before[name], strict=True)
        )
    with pytest.raises(ValueError, match="'c' is no adapter"):
        LtSftTrainer(model, arguments(tmp_path), train_dataset={"c": rows(8)})


def test_one_source_batches():
    batches = list(OneSourceBatches([5, 7], 2, seed=0))
    assert len(batches) == 5 == len(OneSourceBatches([5, 7], 2, seed=0))
    assert all({row < 5 for row in b} in ({True}, {False}) and len(b) == 2 for b in batches)
    assert len({row for b in batches for row in b}) == 10
    with pytest.raises(ValueError, match="3 rows, fewer than one batch of 4"):
        OneSourceBatches([8, 3], 4, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density=0.0"),
        ({"density": 1.5}, "density=1.5"),
        ({"num_entries": 0}, "num_entries=0"),
        ({"l1_weight": -1.0}, "l1_weight=-1.0"),
        ({"iterations": 0}, "iterations=0"),
        ({"mask": "fisher"}, "mask='fisher'"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=f"LtSftConfig: {message}"):
        LtSftConfig(**options)


def test_hostile_positions_in_a_file(tmp_path):
    from safetensors.torch import load_file, save_file

    model = adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(k for k in state if k.endswith("weight.index") and len(state[k]) > 1)
    for broken, message in (
        (state[key].flip(0), "ascending"),
        (state[key] + 10_000, "positions from"),
        (state[key] - 10_000, "positions from"),
        (state[key].double(), "vector of int64"),
        (state[key][:-1], "shape"),
    ):
        save_file({**state, key: broken.contiguous()}, file)
        fresh = net()
        with pytest.raises(ValueError, match=f"adapter file.*{message}"):
            PeftModel.from_pretrained(fresh, tmp_path)
        assert type(fresh.fc) is nn.Linear
    save_file(state, file)
    assert isinstance(PeftModel.from_pretrained(net(), tmp_path), PeftModel)


def test_quantised_weights_are_refused():
    base = net()
    base.fc.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        adapted(base)


def test_tensor_dataset_is_not_taken_for_sources(tmp_path):
    trainer = LtSftTrainer(bert(), arguments(tmp_path), train_dataset=TensorDataset(torch.zeros(3)))
    assert trainer.sources == []
