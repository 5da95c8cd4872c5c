"""LiST: template, adapter, meta weights against double backward, the stages of its Trainer, resuming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from unfused.label import ListConfig, ListTrainer, PromptTemplate, lite_prompted_self_training, meta_weights
from unfused.nn.prompt_template import logits_at, word_ids

WORDS = "[PAD] [MASK] [UNK] [CLS] it was . great terrible fine poor film plot and the cast a".split()
TEMPLATE = PromptTemplate("{text} it was {mask} .", verbalizer={"neg": "terrible", "pos": "great"})
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
LABELED = [
    {"text": "the film fine", "label": "pos"},
    {"text": "a poor plot", "label": "neg"},
    {"text": "fine cast and plot", "label": "pos"},
    {"text": "the cast poor", "label": "neg"},
]
UNLABELED = ["the plot", "poor film", "a fine film and cast", "fine", "poor poor plot", "a cast"]


@pytest.fixture(scope="module")
def tokenizer():
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]"
    )


@pytest.fixture(scope="module")
def byte_level():
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokens.train_from_iterator(["It was great.", "great", "It was bad."] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", mask_token="<mask>")


def bert(seed=0, scale=0.3):
    torch.manual_seed(seed)
    model = BertForMaskedLM(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **SIZES))
    for parameter in model.parameters():
        parameter.data.normal_(0, scale)
    return model.eval()


def shaken(model, size=0.3):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model


# -- template --------------------------------------------------------------------------------------------------------


def test_a_template_puts_the_mask_where_it_says(tokenizer):
    batch = TEMPLATE.encode(tokenizer, LABELED)
    assert batch["input_ids"].shape == (4, 8) and batch["labels"].tolist() == [1, 0, 1, 0]
    rows = torch.arange(4)
    assert (batch["input_ids"][rows, batch["mask_position"]] == tokenizer.mask_token_id).all()
    assert tokenizer.decode(batch["input_ids"][0][:7]) == "the film fine it was [MASK] ."
    assert batch["attention_mask"].sum(1).tolist() == [7, 7, 8, 7]
    assert "labels" not in TEMPLATE.encode(tokenizer, UNLABELED)


def test_long_fields_are_cut_and_the_template_is_not(tokenizer):
    pair = PromptTemplate("{a} ? {mask} , {b}", verbalizer={0: "great", 1: "fine"})
    rows = [{"a": "film " * 50, "b": "plot cast"}, {"a": "a", "b": "plot " * 9}]
    batch = pair.encode(tokenizer, rows, max_length=12)
    assert batch["input_ids"].shape == (2, 12)
    film, plot = tokenizer.convert_tokens_to_ids(["film", "plot"])
    assert (batch["input_ids"] == film).sum(1).tolist() == [7, 0]
    assert (batch["input_ids"] == plot).sum(1).tolist() == [1, 8]
    with pytest.raises(ValueError, match="max_length=4"):
        pair.encode(tokenizer, rows, max_length=4)


def test_words_have_their_leading_space(byte_level):
    great = byte_level.convert_tokens_to_ids("Ġgreat")
    assert word_ids(byte_level, ["great"]) == [great]
    assert word_ids(byte_level, ["great"], leading_space=False) == [byte_level.convert_tokens_to_ids("great")]
    template = PromptTemplate("{text} It was {mask}.", verbalizer={1: "great", 0: "bad"})
    assert template.token_ids(byte_level)[0] == great
    batch = template.encode(byte_level, ["great"])
    tokens = byte_level.convert_ids_to_tokens(batch["input_ids"][0])
    assert "".join(tokens) == "greatĠItĠwas<mask>."
    with pytest.raises(ValueError, match=r"'unheard' is \['Ġ"):
        word_ids(byte_level, ["unheard"])


def test_a_template_refuses_what_it_cannot_use(tokenizer):
    for text in ("{text}", "{mask}", "{text} {mask} {mask}", "{} {mask}"):
        with pytest.raises(ValueError, match="template="):
            PromptTemplate(text, verbalizer={0: "great", 1: "poor"})
    for words in ({0: "great"}, {0: "great", 1: "great"}):
        with pytest.raises(ValueError, match="verbalizer="):
            PromptTemplate("{text} {mask}", verbalizer=words)
    with pytest.raises(ValueError, match="verbalizer: 'unheard'"):
        PromptTemplate("{text} {mask}", verbalizer={0: "great", 1: "unheard"}).token_ids(tokenizer)
    with pytest.raises(ValueError, match="label 'so-so' is none"):
        TEMPLATE.encode(tokenizer, [{"text": "film", "label": "so-so"}])
    with pytest.raises(ValueError, match="no text in 'text'"):
        TEMPLATE.encode(tokenizer, [{"body": "film"}])


@pytest.mark.parametrize("kind", ["bert", "peft", "gpt2"])
def test_logits_at_a_position_are_those_of_the_whole(kind, tokenizer):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)
        ).eval()
    else:
        model = bert() if kind == "bert" else get_peft_model(bert(), ListConfig(r=2)).eval()
    batch = TEMPLATE.encode(tokenizer, UNLABELED)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        whole = model(**inputs).logits[torch.arange(6), batch["mask_position"]]
        assert torch.allclose(logits_at(model, inputs, batch["mask_position"]), whole, atol=1e-6)
        assert model(**inputs).logits.shape[1] > 1  # the hook is gone


# -- adapter ---------------------------------------------------------------------------------------------------------


def test_the_adapter_is_a_linear_map_behind_the_layer_and_merges_into_it(tokenizer, tmp_path):
    model = shaken(get_peft_model(bert(), ListConfig(r=3)).eval())
    layer = model.get_base_model().bert.encoder.layer[0].output.dense
    up, down = layer.unfused_list_up["default"], layer.unfused_list_down["default"]
    x, base = torch.randn(5, 8), layer.base_layer
    with torch.no_grad():
        whole = torch.eye(8) + up @ down
        assert torch.allclose(layer(x), base(x) @ whole.T, atol=1e-5)
        inputs = {"input_ids": torch.randint(3, 16, (2, 6))}
        before, weight, bias = model(**inputs).logits, base.weight.clone(), base.bias.clone()
        merged = model.merge_and_unload()
        dense = merged.bert.encoder.layer[0].output.dense
        assert torch.allclose(dense.weight, whole @ weight, atol=1e-5)
        assert torch.allclose(dense.bias, whole @ bias, atol=1e-5)
        assert torch.allclose(merged(**inputs).logits, before, atol=1e-5)
        merged.save_pretrained(tmp_path)
        assert torch.allclose(BertForMaskedLM.from_pretrained(tmp_path)(**inputs).logits, before, atol=1e-5)


def test_the_head_is_trained_but_not_its_vocabulary(tokenizer):
    trained = {n for n, p in get_peft_model(bert(), ListConfig(r=2)).named_parameters() if p.requires_grad}
    head = [name for name in trained if "cls." in name]
    assert len(head) == 5 and len(trained) == 5 + 4 and not any(n.endswith("decoder.weight") for n in head)
    alone = get_peft_model(bert(), ListConfig(r=2, train_head=False))
    assert not any("cls." in name for name, p in alone.named_parameters() if p.requires_grad)
    model, inputs = (
        shaken(get_peft_model(bert(), ListConfig(r=2)).eval()),
        {"input_ids": torch.arange(3, 9)[None]},
    )
    with torch.no_grad():
        before = model(**inputs).logits
        tied = model.get_base_model().cls.predictions.bias
        was = tied.clone()
        model.merge_adapter()
        assert torch.allclose(model(**inputs).logits, before, atol=1e-5) and not torch.equal(tied, was)
        model.unmerge_adapter()
        assert torch.equal(tied, was) and torch.allclose(model(**inputs).logits, before, atol=1e-6)
    with pytest.raises(ValueError, match="init_std"):
        ListConfig(init_std=0.0)


# -- meta weights ----------------------------------------------------------------------------------------------------


def cloze(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return logits_at(model, inputs, batch["mask_position"])[:, [7, 8]]


def test_meta_weights_are_those_of_the_look_ahead_step(tokenizer):
    model = shaken(get_peft_model(bert(), ListConfig(r=2)))
    unlabeled, labeled = TEMPLATE.encode(tokenizer, UNLABELED), TEMPLATE.encode(tokenizer, LABELED)
    soft = torch.tensor([[0.9, 0.1], [0.1, 0.9]] * 3)
    model.train()
    weights = meta_weights(model, unlabeled, soft, labeled, cloze)
    assert model.training and not weights.requires_grad and weights.sum() == pytest.approx(1)

    model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def losses():
        return F.kl_div(cloze(model, unlabeled).log_softmax(-1), soft, reduction="none").sum(-1)

    labeled_gradient = torch.autograd.grad(
        F.cross_entropy(cloze(model, labeled), labeled["labels"]),
        list(parameters.values()),
        allow_unused=True,
    )
    naive = torch.zeros(6)  # per-example gradients, one after the other
    for i in range(6):
        mine = torch.autograd.grad(losses()[i], list(parameters.values()), allow_unused=True)
        naive[i] = sum((a * b).sum() for a, b in zip(mine, labeled_gradient, strict=True) if a is not None)
    expected = naive.relu() / naive.relu().sum()
    assert torch.allclose(weights, expected, atol=1e-5) and 0 < (weights == 0).sum() < 6

    epsilon = torch.zeros(6, requires_grad=True)  # the paper's way: through a step, twice backward
    with sdpa_kernel(SDPBackend.MATH):
        step = torch.autograd.grad((epsilon * losses()).sum(), list(parameters.values()), create_graph=True)
        moved = {name: p - g for (name, p), g in zip(parameters.items(), step, strict=True)}
        after = lite_prompted_self_training.call_with(model, moved, cloze, labeled)
        (g,) = torch.autograd.grad(F.cross_entropy(after, labeled["labels"]), epsilon)
    assert torch.allclose(-g, naive, atol=1e-5)


def test_meta_weights_without_anything_to_gain(tokenizer):
    class Fixed(nn.Linear):
        def forward(self, x):
            return type("Output", (), {"logits": super().forward(x)})

    model = Fixed(2, 2)
    labeled = {"x": torch.tensor([[1.0, 0.0]]), "labels": torch.tensor([0])}
    against = torch.tensor([[0.0, 1.0]])
    assert meta_weights(model, {"x": torch.tensor([[1.0, 0.0]])}, against, labeled).tolist() == [0.0]
    with pytest.raises(ValueError, match="requires a gradient"):
        meta_weights(model.requires_grad_(False), {"x": torch.eye(2)}, torch.eye(2), labeled)


# -- the Trainer -----------------------------------------------------------------------------------------------------


def trainer(folder, tokenizer, model=None, save="no", **options):
    args = TrainingArguments(
        str(folder),
        learning_rate=options.pop("learning_rate", 1e-2),
        save_strategy=save,
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    options = {
        "peft_config": ListConfig(r=2),
        "sessions": 2,
        "teacher_epochs": 2,
        "finetune_epochs": 1,
        "update_teacher_steps": 5,
        "unlabeled_batch_size": 3,
        "unlabeled_dataset": UNLABELED,
        "train_dataset": LABELED,
        **options,
    }
    made = ListTrainer(
        bert() if model is None else model, args, template=TEMPLATE, processing_class=tokenizer, **options
    )
    made.remove_callback(PrinterCallback)
    return made


def test_the_stages_and_what_they_leave(tokenizer, tmp_path):
    made = trainer(tmp_path, tokenizer, teacher_epochs=20, update_teacher_steps=3, learning_rate=3e-2)
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    made.train()
    stages = [(row["stage"], row["session"]) for row in made.history_]
    assert stages == [
        ("teacher", 0),
        ("self-training", 1),
        ("fine-tuning", 1),
        ("self-training", 2),
        ("fine-tuning", 2),
    ]
    assert 0 <= made.history_[1]["zero_weights"] <= 1
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert all(
        torch.equal(p, before[name]) == (name not in trained) for name, p in made.model.named_parameters()
    )
    found = made.predict(LABELED)
    assert found.predictions.shape == (4, 2) and found.metrics["test_accuracy"] >= 0.5
    assert made.predict(UNLABELED).predictions.shape == (6, 2)
    assert type(made.model.merge_and_unload()).__name__ == "BertForMaskedLM"
    assert not list(tmp_path.iterdir())  # save_strategy="no"


def test_a_student_begins_anew_or_goes_on(tokenizer, tmp_path):
    for anew in (True, False):
        made = trainer(
            tmp_path, tokenizer, sessions=1, finetune_epochs=0, update_teacher_steps=1, learning_rate=0.0,
            teacher_learning_rate=1e-2, reinit_student=anew,
        )  # fmt: skip
        first = made._trained()
        made.train()
        assert all(torch.equal(v, first[k]) for k, v in made._trained().items()) == anew


def test_soft_labels_come_from_the_teacher_and_weights_are_uniform_at_first(tokenizer, tmp_path):
    made = trainer(tmp_path, tokenizer, threshold=0.6, temperature=0.5)
    made.teacher, made.stage, made.number = made._trained(), "self-training", 1
    batch = TEMPLATE.encode(tokenizer, UNLABELED)
    with torch.no_grad():
        expected = (made.cloze(made.model.eval(), batch) / 0.5).softmax(-1)
    shaken(made.model)
    soft = made._soft_labels(batch)
    assert torch.allclose(soft, expected, atol=1e-6)
    sure = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]])
    assert made._weights(batch, sure).tolist() == [0.5, 0.0, 0.5]
    made.state.global_step, made.counts = 3, [0, 0, 0, 0]  # of 5: beyond 60 %
    weights = made._weights(batch, soft)
    assert made.counts[0] == 6 and weights.sum() in (pytest.approx(0), pytest.approx(1))


def test_a_batch_that_helps_nothing_is_skipped(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        lite_prompted_self_training, "meta_weights", lambda model, batch, soft, *_: soft.new_zeros(len(soft))
    )
    made = trainer(tmp_path, tokenizer, sessions=1, meta_warmup=0.0, finetune_epochs=0, teacher_epochs=0)
    first = made._trained()
    made.train()
    assert all(torch.equal(value, first[name]) for name, value in made._trained().items())
    assert made.history_[0]["skipped"] == 1 and made.history_[0]["zero_weights"] == 1


class Kill(TrainerCallback):
    def __init__(self, at):
        self.left = at

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_to_the_same_weights(tokenizer, tmp_path):
    whole = trainer(tmp_path / "whole", tokenizer, save="steps", sessions=1)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", tokenizer, save="steps", sessions=1, callbacks=[Kill(6)]).train()
    again = trainer(tmp_path / "killed", tokenizer, model=bert(), save="steps", sessions=1)
    again.train(resume_from_checkpoint=True)
    theirs = whole._trained()
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in again._trained().items())
    assert [row["stage"] for row in again.history_] == [row["stage"] for row in whole.history_]


def test_full_fine_tuning_and_plain_prompting(tokenizer, tmp_path):
    plain = trainer(tmp_path, tokenizer, peft_config=None, sessions=0, unlabeled_dataset=())
    plain.train()
    assert [row["stage"] for row in plain.history_] == ["teacher"]
    whole = trainer(  # embeddings and vocabulary are tied, in teacher and look-ahead too
        tmp_path,
        tokenizer,
        peft_config=None,
        sessions=1,
        meta_warmup=0.0,
        update_teacher_steps=1,
        finetune_epochs=0,
    )
    whole.train()
    assert whole._trained().keys() == dict(whole.model.named_parameters()).keys()
    assert np.isfinite(whole.predict(LABELED).predictions).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"unlabeled_dataset": []}, "unlabeled_dataset is empty"),
        ({"train_dataset": ["film"]}, "no column 'label'"),
        ({"meta_warmup": 60}, "meta_warmup=60"),
        ({"temperature": 0}, "temperature=0"),
        ({"threshold": 1}, "threshold=1"),
        ({"sessions": -1}, "sessions=-1"),
    ],
)
def test_bad_arguments(tokenizer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tokenizer, **options)
