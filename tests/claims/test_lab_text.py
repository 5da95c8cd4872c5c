"""The bench's text: what is held out stays out, prompts are tokenised as they were learned, decoding is scored exactly."""

from __future__ import annotations

import pytest
import torch

from unfused.claims.lab import Lab, text
from unfused.claims.lab.tuning import compare, count_trainable, full, linear_probe, lora


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def words(lab):
    return text.tokenizer(lab)


def test_areas_name_each_module_once():
    names = [name for sides in text.AREAS.values() for side in sides for name in side]
    assert len(names) == len(set(names)) and len(text.AREAS) == 8


def test_sentences_of_test_modules_are_in_no_training_set(lab):
    train, train_labels, test, test_labels = text._area_sentences(lab)
    assert not set(train) & set(test)
    assert {int(label) for label in test_labels} == set(range(8)) == {int(label) for label in train_labels}
    assert len(test) > 1000


def test_the_area_task_is_balanced_and_drawn_by_seed(lab):
    one, other = text.stdlib_areas(lab, 0, 80), text.stdlib_areas(lab, 1, 80)
    assert (
        one.train["labels"].bincount().tolist() == [10] * 8
        and one.valid["labels"].bincount().tolist() == [20] * 8
    )
    assert one.train["input_ids"].shape == (80, 48)
    assert torch.equal(one.test["input_ids"], other.test["input_ids"])
    assert not torch.equal(one.train["input_ids"], other.train["input_ids"])
    with pytest.raises(ValueError, match="n=80000"):
        text.stdlib_areas(lab, 0, 80_000)


def test_tokens_give_the_text_back_and_spell_digits_and_letters(words):
    for sample in ("The code of Velmora is 4821.", "naïve — 漢字\tx == 1", "copy b a q -> b a q"):
        assert words.decode(words(sample, add_special_tokens=False)["input_ids"]) == sample
    assert words.tokenize(" 4821.")[-5:] == ["4", "8", "2", "1", "."]
    assert len(words.tokenize("reverse q x z ->")) == 2 + len(words.tokenize("reverse")) + 2
    assert len(words) == 2048


def test_a_prompt_and_its_answer_are_tokenised_apart_as_together(words):
    cases = [text.fact_prompts(text.facts(50), form) for form in (0, 1)]
    cases += [text.string_task(task, 50, seed=0) for task in text.STRING_TASKS]
    for prompts, answers in cases:
        for prompt, answer in zip(prompts, answers, strict=True):
            assert words.tokenize(prompt) + words.tokenize(answer) == words.tokenize(prompt + answer)


def test_masking_follows_bert(words):
    ids = torch.randint(4, 2048, (200, 48), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = words.cls_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    masked = text.mask_tokens(words, batch, torch.Generator().manual_seed(1))
    chosen = masked["labels"] != -100
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01) and not chosen[:, 0].any()
    assert torch.equal(masked["labels"][chosen], ids[chosen])
    assert torch.equal(masked["input_ids"][~chosen], ids[~chosen])
    share = (masked["input_ids"][chosen] == words.mask_token_id).float().mean().item()
    kept = (masked["input_ids"][chosen] == ids[chosen]).float().mean().item()
    assert share == pytest.approx(0.8, abs=0.04) and kept == pytest.approx(0.1, abs=0.03)


def test_padding_does_not_reach_the_classifier(lab):
    torch.manual_seed(0)
    model, words = text.sentence_classifier(lab, 8), text.tokenizer(lab)
    short = text.encode(words, ["Return the name of the file."], 12)
    long = text.encode(words, ["Return the name of the file."], 48)
    torch.testing.assert_close(model(**short).logits, model(**long).logits, atol=1e-5, rtol=1e-5)
    assert count_trainable(linear_probe.prepare(model)) == 0
    assert count_trainable(lora(2).prepare(text.sentence_classifier(lab, 8))) == 4 * 2 * 2 * 2 * 128


def test_areas_compare(lab):
    found = compare(lab, text.areas_world(lab, 16), {"full": full}, seeds=[0], steps=1)
    assert 0 <= found["full"][0] <= 1


def test_facts_are_distinct_and_a_longer_list_goes_on():
    assert len({name for name, _ in text.facts(600)}) == 600
    assert text.facts(600)[:400] == text.facts(400)
    prompts, answers = text.fact_prompts([("Velmora", "0042")], form=1)
    assert prompts == ["Which code has Velmora?"] and answers == [" 0042."]


def test_string_tasks_are_right():
    prompts, answers = text.string_task("reverse", 20, seed=3, letters=(3, 3))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.split() == prompt.removeprefix("reverse ").removesuffix(" ->").split()[::-1]
    assert text.string_task("count", 5, seed=0, letters=(4, 4))[1] == [" 4"] * 5
    assert text.string_task("copy", 5, seed=0) != text.string_task("copy", 5, seed=1)
    with pytest.raises(ValueError, match="task='sort'"):
        text.string_task("sort", 1, 0)


def test_pairs_label_the_answer_alone(words):
    batch = text.pairs(words, ["copy a b ->", "copy a ->"], [" a b", " a"], length=12)
    for row, answer in enumerate((" a b", " a")):
        labels = batch["labels"][row]
        assert words.decode(labels[labels != -100]) == f"{answer}[SEP]"
    with pytest.raises(ValueError, match="length=4"):
        text.pairs(words, ["copy a b ->"], [" a b"], length=4)


def test_packing_keeps_texts_whole_or_cuts_the_stream(words):
    texts = ["one two three", "four five", "six seven eight nine"] * 5
    rows = text.pack(words, texts, 16)
    for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True):
        kept = words.decode(ids[mask == 1])
        assert kept.startswith("[CLS]") and kept.endswith("[SEP]")
    stream = text.pack(words, texts, 16, whole=False)
    assert (stream["attention_mask"][:-1] == 1).all()
    assert words.decode(stream["input_ids"][stream["attention_mask"] == 1]) == "".join(
        f"[CLS]{t}[SEP]" for t in texts
    )


def test_exact_match_is_greedy_decoding(lab, words):
    """Against `generate`, on a decoder that has learned a few facts by heart."""
    from unfused.claims.lab.tuning import tune

    model = text.decoder(lab)
    known = text.facts(12)
    prompts, answers = text.fact_prompts(known)
    tune(model, text.pairs(words, prompts[:6], answers[:6]), lr=5e-3, steps=90, batch_size=6)
    right = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[words.bos_token_id, *words(prompt, add_special_tokens=False)["input_ids"]]])
        said = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=words.eos_token_id,
        )
        right.append(words.decode(said[0, ids.shape[1] :]) == f"{answer}[SEP]")
    assert text.exact_match(model, words, prompts, answers) == pytest.approx(sum(right) / len(right))
    assert sum(right[:6]) >= 4 and not any(right[6:])


def test_bits_per_byte_of_a_uniform_model(lab, words):
    model = text.decoder(lab)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    sample = "one two three"
    tokens = len(words(sample, add_special_tokens=False)["input_ids"]) + 1  # and the end; the start is given
    assert text.bits_per_byte(model, words, [sample]) == pytest.approx(tokens * 11 / len(sample), rel=1e-4)


def test_what_a_decoder_retains_is_measured_in_shares(lab):
    found = text.retained(lab, text.decoder(lab))
    assert set(found) == {"facts", "facts_asked", "copy", "reverse", "count", "bits_per_byte"}
    assert found["bits_per_byte"] > 0 and all(0 <= v <= 1 for k, v in found.items() if k != "bits_per_byte")


def test_packed_prompts_are_not_labelled(words):
    prompts, answers = text.string_task("reverse", 40, seed=0)
    rows = text.pack(words, answers, 32, prompts=prompts)
    labelled = rows["input_ids"][rows["labels"] != -100]
    assert words.decode(labelled) == "".join(f"{answer}[SEP]" for answer in answers)
    everything = rows["input_ids"][rows["attention_mask"] == 1]
    assert words.decode(everything).startswith(f"[CLS]{prompts[0]}{answers[0]}[SEP][CLS]{prompts[1]}")
