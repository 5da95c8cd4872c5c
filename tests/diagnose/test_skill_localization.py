"""Skill localization: the search against the card's formulas, grafts, regions, several tasks, and bad input."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from unfused.diagnose import SkillRegion, compose_skills, localize_skill, skill_map
from unfused.diagnose import _region as regions
from unfused.nn.calibration import calibration_error, fit_temperature


class Net(nn.Module):
    def __init__(self, seed=0, classes=3):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(6, 10)
        self.layers = nn.ModuleList([nn.Linear(10, 10), nn.LayerNorm(10), nn.Linear(10, 10)])
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Linear(10, classes)

    def forward(self, x, labels=None):
        h = torch.tanh(self.embed(x))
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        logits = self.classifier(self.drop(h))
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def batches(seed, n=96, answer=lambda x: x[:, :3].argmax(1)):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return [{"x": part, "labels": answer(part)} for part in x.split(32)]


def tune(model, data, steps=150, lr=0.3):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("layers"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.eval()
    for step in range(steps):
        optimizer.zero_grad()
        model(**data[step % len(data)]).loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def pair():
    return Net(), tune(Net(), batches(0))


@pytest.fixture(scope="module")
def region(pair):
    return localize_skill(*pair, batches(0), batches(1), batches(2), size=0.02, steps=25, seed=3)


# --- the search --------------------


def test_steps_are_the_formula(pair):
    """Two steps of the card's pseudo-code, entry by entry, with autograd through the mask itself."""
    base, tuned = pair
    data, bias, lr = batches(0), 3.0, 40.0
    found = localize_skill(
        base, tuned, data, batches(1), size=0.05, steps=2, lr=lr, sigmoid_bias=bias, seed=7, compare=False
    )
    names = [n for n, _ in base.named_parameters() if n.startswith("layers")]
    pre, post = base.state_dict(), tuned.state_dict()
    d = {n: post[n] - pre[n] for n in names}
    flat = torch.cat([d[n].abs().flatten() for n in names])
    threshold = flat.sort(descending=True).values[round(0.05 * len(flat)) - 1]
    g0 = {n: (d[n].abs() >= threshold).float() for n in names}
    generator = torch.Generator().manual_seed(7)
    scores = {n: torch.rand(d[n].shape, generator=generator) for n in names}
    losses = []
    for _ in range(2):
        leaves = {n: s.clone().requires_grad_() for n, s in scores.items()}
        params = {
            n: pre[n] + (g0[n] + (1 - 2 * g0[n]) * torch.sigmoid(s - bias)) * d[n] for n, s in leaves.items()
        }
        loss = sum(
            torch.func.functional_call(Net().eval(), {**pre, **params}, kwargs=batch).loss for batch in data
        ) / len(data)
        losses.append(float(loss))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        scores = {n: scores[n] - lr * g for n, g in zip(names, grads, strict=True)}
    assert [h["loss"] for h in found.history[1:]] == pytest.approx(losses, rel=1e-5)
    hard = {n: torch.round(g0[n] + (1 - 2 * g0[n]) * torch.sigmoid(scores[n] - bias)).bool() for n in names}
    assert found.history[-1]["entries"] == sum(int(m.sum()) for m in hard.values())
    if found.history[-1]["kept"]:
        assert all(torch.equal(found.mask[n], hard[n]) for n in names)


def test_the_search_finds_more_than_movement(pair, region):
    table = region.table().set_index("arm")
    accuracy = table["accuracy"]
    assert region.entries == table.loc["graft", "entries"] == sum(len(v) for v in region.indices.values())
    assert accuracy["tuned"] > 0.85 and accuracy["base"] < 0.6
    assert accuracy["graft"] > accuracy["random"]
    first, kept = region.history[0], [h for h in region.history if h["kept"]]
    best = max(region.history, key=lambda h: h["train"] + h["valid"])
    assert (
        kept[-1]["train"] + kept[-1]["valid"]
        == best["train"] + best["valid"]
        >= first["train"] + first["valid"]
    )
    assert region.entries == kept[-1]["entries"]
    values = [h["train"] + h["valid"] for h in kept]
    assert all(a < b for a, b in itertools.pairwise(values))  # strict improvement


def test_no_steps_is_the_largest_movement(pair):
    base, tuned = pair
    region = localize_skill(base, tuned, batches(0), batches(1), size=0.1, steps=0)
    flat = torch.cat([(tuned.state_dict()[n] - base.state_dict()[n]).abs().flatten() for n in region.shapes])
    assert region.entries == round(0.1 * len(flat)) and set(region.shapes) == {
        n for n in base.state_dict() if n.startswith("layers")
    }
    mask = torch.cat([region.mask[n].flatten() for n in region.shapes])
    assert flat[mask].min() >= flat[~mask].max()
    table = region.table().set_index("arm")
    assert table.loc["graft", "loss"] == pytest.approx(table.loc["top movement", "loss"])


def test_the_whole_region_is_the_tuned_model_and_models_stay(pair):
    base, tuned = pair
    before = {n: t.clone() for n, t in base.state_dict().items()}
    region = localize_skill(base, tuned, batches(0), iter(batches(1)), size=1.0, steps=1)
    grafted = region.graft(base)
    assert region.size == 1.0
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(grafted[name], tensor)
        assert torch.equal(base.state_dict()[name], before[name])
    table = region.table().set_index("arm")
    assert table.loc["graft", "agreement"] == 1.0
    assert list(table.index) == [
        "base", "tuned", "tuned, temperature", "graft", "top movement", "top |d grad|", "random", "interpolated",
    ]  # fmt: skip


def test_same_seed_same_region(pair):
    one, two, other = (
        localize_skill(*pair, batches(0), batches(1), size=0.01, steps=8, seed=s, compare=False)
        for s in (1, 1, 2)
    )
    assert all(torch.equal(one.indices[n], two.indices[n]) for n in one.indices)
    assert one.scores == two.scores and other.settings["seed"] == 2


def test_state_dicts_bfloat16_and_ood(pair):
    base, tuned = pair
    half = {n: t.to(torch.bfloat16) for n, t in tuned.state_dict().items()}
    region = localize_skill(base, half, batches(0), batches(1), size=0.2, steps=1, ood={"noise": batches(5)})
    assert {v.dtype for v in region.values.values()} == {torch.bfloat16}
    assert "noise" in region.table().columns
    assert region.graft(base)["layers.0.weight"].dtype == torch.float32


def test_f1_and_functions(pair):
    for metric in ("f1", lambda predicted, labels: float((predicted == labels).float().mean())):
        region = localize_skill(
            *pair, batches(0), batches(1), size=0.5, steps=0, metric=metric, compare=False
        )
        row = region.table().set_index("arm").loc["tuned"]
        logits = torch.cat([pair[1](**b).logits for b in batches(1)])
        labels = torch.cat([b["labels"] for b in batches(1)])
        from sklearn.metrics import accuracy_score, f1_score

        expected = (
            f1_score(labels == 1, logits.argmax(1) == 1)
            if metric == "f1"
            else accuracy_score(labels, logits.argmax(1))
        )
        assert row[region.metric] == pytest.approx(expected)


def test_a_new_head_is_copied_whole(pair):
    tuned = pair[1]
    other = Net(classes=5)
    region = localize_skill(other, tuned, batches(0), batches(1), size=0.3, steps=0, compare=False)
    assert region.copied_entries == 33 and set(region.copied) == {"classifier.weight", "classifier.bias"}
    assert "copied whole" in region.notes()[-1]
    grafted = region.graft(other)
    assert torch.equal(grafted["classifier.weight"], tuned.classifier.weight)
    with pytest.raises(ValueError, match=r"'classifier\.weight' of shape \(3, 10\).*name it in copy"):
        localize_skill(other, tuned, batches(0), batches(1), copy=())


def test_masked_language_models_are_judged_at_the_mask():
    from unfused.diagnose._skill_task import answers

    logits, labels = torch.randn(2, 4, 7), torch.full((2, 4), -100)
    labels[0, 2], labels[1, 1] = 3, 5
    chosen, truth = answers({"logits": logits}, {"labels": labels})
    with pytest.raises(ValueError, match="give outputs_fn"):
        answers({"logits": logits}, {"labels": labels[:, :2]})
    assert torch.equal(chosen, torch.stack([logits[0, 2], logits[1, 1]])) and truth.tolist() == [3, 5]


# --- regions --------------------


def test_save_and_load(region, pair, tmp_path):
    region.save(tmp_path / "skill.safetensors")
    again = SkillRegion.load(tmp_path / "skill.safetensors")
    assert again.scores == region.scores and again.history == region.history and again.size == region.size
    one, two = region.graft(pair[0]), again.graft(pair[0])
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert (tmp_path / "skill.safetensors").stat().st_size < 40_000
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no skill region"):
        SkillRegion.load(tmp_path / "other.safetensors")


def test_report(region):
    assert json.loads(region.to_json())["entries"] == region.entries
    layers = region.by_layer()
    assert layers["entries"].sum() == region.entries and set(layers["layer"]) == {"0", "1", "2"}
    page = region.to_html()
    assert page.count("data:image/png") == 1 and "interpolated" in page


def test_top_entries_across_tensors_and_ties():
    rng = np.random.default_rng(0)
    tensors = [(f"t{i}", torch.from_numpy(rng.integers(0, 5, (4, 7)).astype(np.float32))) for i in range(5)]
    flat = torch.cat([t.flatten() for _, t in tensors])
    for k in (1, 3, 20, 139, 140):
        found = regions.top_entries(tensors, k)
        chosen = torch.cat([t.flatten()[found.get(n, [])] for n, t in tensors if n in found])
        assert len(chosen) == k
        assert torch.equal(chosen.sort().values, flat.sort(descending=True).values[:k].sort().values)
    assert regions.top_entries(tensors, 1)["t0"][0] == int((tensors[0][1].flatten() == 4).nonzero()[0])


def test_random_entries_are_spread_by_size():
    found = regions.random_entries({"a": 900, "b": 90, "c": 10}, 500, seed=0)
    assert sum(map(len, found.values())) == 500 and 410 < len(found["a"]) < 490
    assert all(len(set(v.tolist())) == len(v) for v in found.values())
    assert max(found["b"]) < 90


def test_concentration():
    alike, one = torch.full((100, 100), 0.3), torch.zeros(100, 100)
    one[3, 4] = 2.0
    assert regions.concentration([("a", alike)]) == (
        pytest.approx(0, abs=1e-3),
        pytest.approx(0.01, abs=1e-3),
    )
    assert regions.concentration([("a", one)]) == (pytest.approx(1, abs=1e-3), pytest.approx(1))
    d = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    gini, top = regions.concentration([("a", d[:20_000]), ("b", d[20_000:])])
    ordered = d.abs().double().sort().values
    n = len(d)
    exact = float((2 * torch.arange(1, n + 1) - n - 1).double() @ ordered / (n * ordered.sum()))
    assert gini == pytest.approx(exact, abs=1e-3)
    assert top == pytest.approx(float(ordered[-n // 100 :].square().sum() / ordered.square().sum()), rel=0.01)


def test_hold_keeps_entries_still(pair):
    model = Net()
    where = {"layers.0.weight": torch.tensor([0, 5, 99])}
    kept = model.layers[0].weight.detach().flatten()[where["layers.0.weight"]].clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with regions.hold(model, where):
        for batch in batches(0):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            assert model.layers[0].weight.grad.flatten()[where["layers.0.weight"]].tolist() == [0, 0, 0]
            optimizer.step()
    assert torch.equal(model.layers[0].weight.detach().flatten()[where["layers.0.weight"]], kept)
    assert not torch.equal(model.layers[0].weight, Net().layers[0].weight)
    with (
        pytest.raises(ValueError, match="lacks parameter 'x'"),
        regions.hold(model, {"x": torch.tensor([0])}),
    ):
        pass


# --- several tasks --------------------


def test_map_of_two_tasks(pair):
    base = Net()
    answers = {"first": lambda x: x[:, :3].argmax(1), "last": lambda x: x[:, 3:].argmax(1)}
    skills, judges = {}, {}
    for task, answer in answers.items():
        data, test = batches(0, answer=answer), batches(2, answer=answer)
        skills[task] = localize_skill(
            base, tune(Net(), data), data, batches(1, answer=answer), size=0.2, steps=3, compare=False
        )

        def judge(state, test=test):
            model = Net().eval()
            model.load_state_dict(state)
            return float(np.mean([(model(**b).logits.argmax(1) == b["labels"]).float().mean() for b in test]))

        judges[task] = judge
    found = skill_map(base, skills, judges)
    assert list(found.judged) == ["base", "first", "last", "first + last"]
    for task, other in (("first", "last"), ("last", "first")):
        assert found.judged[task][task] > found.judged[other][task]
        assert found.overlaps[task][task] == 1.0
    shared = found.overlaps["first"]["last"] * skills["first"].entries
    assert shared == pytest.approx(found.overlaps["last"]["first"] * skills["last"].entries)
    assert len(found.table()) == 6 and found.to_html().count("data:image/png") == 2
    with pytest.raises(ValueError, match="give the same tasks"):
        skill_map(base, skills, {"first": judges["first"]})


def test_composition_means_what_is_shared(pair):
    base = {"w": torch.zeros(6)}

    def part(where, values):
        return {"w": torch.tensor(where)}, {"w": torch.tensor(values)}, {}

    state = regions.compose(base, [part([0, 2], [1.0, 2.0]), part([2, 5], [4.0, 6.0])])
    assert state["w"].tolist() == [1.0, 0.0, 3.0, 0.0, 0.0, 6.0]
    with pytest.raises(ValueError, match="copy tensor 'h' whole, differently"):
        regions.compose(base, [({}, {}, {"h": torch.ones(1)}), ({}, {}, {"h": torch.zeros(1)})])
    assert compose_skills(base, [])["w"] is base["w"]


# --- calibration --------------------


def test_calibration_error_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (400,), generator=generator)
    logits = 4 * torch.randn(400, 3, generator=generator) + 3 * nn.functional.one_hot(labels)
    confidence, predicted = logits.softmax(1).max(1)
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            right = (predicted == labels)[inside].float().mean()
            expected += float(inside.float().mean() * (confidence[inside].mean() - right).abs())
    assert calibration_error(logits, labels) == pytest.approx(expected, abs=1e-5)
    t = fit_temperature(logits, labels)
    at = [float(nn.functional.cross_entropy(logits / v, labels)) for v in (t * 0.9, t, t * 1.1)]
    assert at[1] == min(at)


# --- the command, and errors --------------------


def test_files(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    from unfused.diagnose.skill_localization import diagnose_files

    words = ["[PAD]", "[UNK]", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = BertConfig(
        vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=16, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.bert.encoder.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "tuned"
    )
    (tmp_path / "d.csv").write_text("text,label\n" + "good film,yes\nbad film,no\nbad,no\n" * 3)
    (tmp_path / "v.jsonl").write_text(
        '{"text": "good", "label": "yes"}\n{"text": "bad film", "label": "no"}\n'
    )
    given = dict(
        base=str(tmp_path / "base"), tuned=str(tmp_path / "tuned"), data=tmp_path / "d.csv", val=tmp_path / "v.jsonl",
        test=None, text="text", label="label", size=0.1, steps=2, batch_size=4, save=tmp_path / "s.safetensors", seed=0,
    )  # fmt: skip
    region = diagnose_files(**given)
    assert SkillRegion.load(tmp_path / "s.safetensors").entries == region.entries
    assert not any("embeddings" in name for name in region.shapes)
    for change, message in (
        ({"label": "class"}, r"d\.csv has no column 'class'"),
        ({"data": tmp_path / "none.csv"}, r"none\.csv cannot be read"),
        ({"data": tmp_path / "d.txt"}, r"d\.txt: give a \.csv"),
        ({"label": "text"}, r"d\.csv: label 'bad' is none of the model's"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnose_files(**given | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 1.5}, r"size=1\.5"),
        ({"steps": -1}, "steps=-1"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"metric": "mse"}, "metric='mse'"),
        ({"data": []}, "gave no batch"),
        ({"val": []}, "gave no batch"),
        ({"tuned": Net()}, "do not differ"),
    ],
)
def test_errors_name_the_argument(pair, change, message):
    given = {"base": pair[0], "tuned": pair[1], "data": batches(0), "val": batches(1), "steps": 1} | change
    with pytest.raises((ValueError, RuntimeError), match=message):
        localize_skill(**given)


def test_models_that_do_not_fit(pair):
    base, tuned = pair
    state = dict(tuned.state_dict())
    bad = {**state, "layers.0.weight": torch.full((10, 10), float("nan"))}
    with pytest.raises(ValueError, match=r"tuned: tensor 'layers\.0\.weight'.*not finite"):
        localize_skill(base, bad, batches(0), batches(1))
    del state["layers.2.bias"]
    with pytest.raises(ValueError, match=r"tuned lacks tensor 'layers\.2\.bias'"):
        localize_skill(base, state, batches(0), batches(1))
    with pytest.raises(TypeError, match="give one of them as a model"):
        localize_skill(base.state_dict(), tuned.state_dict(), batches(0), batches(1))
    with pytest.raises(TypeError, match="data is a mapping"):
        localize_skill(base, tuned, batches(0)[0], batches(1))
    with pytest.raises(TypeError, match="exclude='x'"):
        localize_skill(base, tuned, batches(0), batches(1), exclude="x")
    region = localize_skill(base, tuned, batches(0), batches(1), steps=0, compare=False)
    with pytest.raises(ValueError, match="base lacks tensor"):
        region.graft({"x": torch.ones(1)})


def test_tied_weights_are_grafted_under_all_names():
    base = {"embed.weight": torch.zeros(2, 3), "other": torch.zeros(3)}
    base["lm_head.weight"] = base["embed.weight"]
    state = regions.graft(
        base, {"embed.weight": torch.tensor([4])}, {"embed.weight": torch.tensor([7.0])}, {}
    )
    assert state["lm_head.weight"] is state["embed.weight"] and state["embed.weight"][1, 1] == 7
    assert not base["embed.weight"].any()
