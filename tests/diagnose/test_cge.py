"""Contrastive generation: scores, caches that follow beams, updates that leave both models alone, the report."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch

from unfused.diagnose import ContrastiveLogitsProcessor, explore_novelty, rank_by_ratio, sample_texts
from unfused.diagnose._language_model import NextToken, start_token, token_logprobs
from unfused.diagnose.cge import _beam_sample, explore_models

pytestmark = pytest.mark.filterwarnings("ignore:alpha=.*may begin a text")
SMALL = dict(n=3, max_length=8, alpha=0.01)


@pytest.fixture
def pair(llama, nudge):
    base = llama()
    return nudge(base), base


def whole(model):
    """Next tokens without a cache."""
    return lambda ids: model(input_ids=ids).logits[:, -1].float().log_softmax(-1)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, gamma", [(0.1, 1.0), (0.0, 0.5), (1.0, 1.0)])
def test_scores_against_the_formula(alpha, gamma):
    rng = np.random.default_rng(0)
    logits, base = rng.normal(size=(2, 3, 20)) * 2
    p_ft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    log_pre = base - np.log(np.exp(base).sum(-1, keepdims=True))
    wanted = np.where(p_ft >= alpha * p_ft.max(-1, keepdims=True), np.log(p_ft) - gamma * log_pre, -np.inf)
    process = ContrastiveLogitsProcessor(lambda ids: torch.tensor(log_pre), alpha, gamma)
    found = process(torch.zeros(3, 1, dtype=torch.long), torch.tensor(logits)).numpy()
    assert np.allclose(found, wanted, atol=1e-5)


def test_alpha_of_the_first_token_alone():
    process = ContrastiveLogitsProcessor(lambda ids: torch.zeros(1, 3), 0.5, alpha_first=0.01)
    scores = torch.tensor([[0.9, 0.09, 0.001]]).log()
    assert process(torch.zeros(1, 1, dtype=torch.long), scores).isfinite().sum() == 2 and process.begin == 2
    assert process(torch.zeros(1, 2, dtype=torch.long), scores).isfinite().sum() == 1 and process.begin == 2


def test_floors_raise_what_the_base_calls_impossible():
    base = torch.tensor([[0.5, 0.3, 0.1999, 0.0001]]).log()
    scores, ids = torch.full((1, 4), 0.25).log(), torch.zeros(1, 1, dtype=torch.long)
    for floor, lowest in (
        (("top_k", 2), 0.3),
        (("top_p", 0.9), 0.1999),
        (("top_p", 0.4), 0.5),
        (("top_k", 99), 1e-4),
    ):
        found = ContrastiveLogitsProcessor(lambda ids: base, 0.0, floor=floor)(ids, scores)
        wanted = math.log(0.25) - base.clamp_min(math.log(lowest))
        assert torch.allclose(found, wanted, atol=1e-5)


def test_vocabularies_of_two_sizes_share_the_common_ids():
    process = ContrastiveLogitsProcessor(lambda ids: torch.zeros(1, 3), 0.0)
    found = process(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 5))
    assert found.isfinite().tolist() == [[True] * 3 + [False] * 2]


@pytest.mark.parametrize(
    "bad, match",
    [
        (dict(alpha=2), "alpha=2"),
        (dict(alpha_first=-1), "alpha_first=-1"),
        (dict(gamma=-1), "gamma=-1"),
        (dict(floor=("x", 1)), "floor="),
    ],
)
def test_bad_processors(bad, match):
    with pytest.raises(ValueError, match=match):
        ContrastiveLogitsProcessor(lambda ids: ids, **bad)


# -- caches and beams --------------------------------------------------------------------------------------------------


def test_the_cache_follows_rows_that_move_are_repeated_and_dropped(llama):
    model = llama()
    cached, plain = NextToken(model), whole(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(3, 1, dtype=torch.long)
    for order in ([0, 1, 2], [2, 0, 0], [1, 1, 2, 0], [3, 0], [0, 1]):
        ids = torch.cat([ids[order], torch.randint(258, (len(order), 1), generator=generator)], 1)
        with torch.no_grad():
            assert torch.allclose(cached(ids), plain(ids), atol=1e-4)
        assert cached.cache.get_seq_length() == ids.shape[1]
    other = torch.randint(2, 258, (2, 4), generator=generator)  # another text: nothing is taken over
    with torch.no_grad():
        assert torch.allclose(cached(other), plain(other), atol=1e-4)


def test_works_in_generate_with_beams(pair):
    """Beam search with the cached base gives what it gives with the base run on whole rows."""
    tuned, base = pair
    ids = torch.zeros(2, 1, dtype=torch.long)
    found = [
        tuned.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=[ContrastiveLogitsProcessor(model, 0.01)],
            num_beams=3,
            do_sample=False,
            max_new_tokens=6,
            pad_token_id=1,
        )
        for model in (base, whole(base))
    ]
    assert torch.equal(*found)


def test_one_beam_draws_from_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    ids = torch.zeros(4000, 1, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    rows = _beam_sample(lambda i: logits.expand(len(i), -1), None, ids, 1, 1, 1.0, generator)
    share = torch.bincount(rows[:, 1], minlength=4) / len(rows)
    assert torch.allclose(share, logits.softmax(-1)[0], atol=0.03)


def test_beams_keep_the_best_of_what_is_drawn():
    """With as many draws as there are tokens, nothing is left to chance: beam search."""
    table = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0], [9.0, 0.0, 0.0]])  # next scores by last token
    rows = _beam_sample(
        lambda i: table[i[:, -1]],
        None,
        torch.zeros(2, 1, dtype=torch.long),
        3,
        2,
        1.0,
        torch.Generator().manual_seed(0),
    )
    assert rows.tolist() == [[0, 2, 0]] * 2  # 1 + 9 beats 3 + 5


# -- exploring ---------------------------------------------------------------------------------------------------------


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("update", ["full", "lora", "unlearn"])
def test_neither_model_is_changed_and_the_seed_decides(pair, tokenizer, update):
    tuned, base = pair
    before, flags = (state(tuned), state(base)), [p.requires_grad for p in base.parameters()]
    base.train()
    first, again = (
        explore_novelty(tuned, base, tokenizer, update=update, lr=1e-3, max_drift=None, seed=4, **SMALL)
        for _ in range(2)
    )
    assert [t.tokens for t in first.texts] == [t.tokens for t in again.texts]
    assert base.training and [p.requires_grad for p in base.parameters()] == flags
    for model, old in zip((tuned, base), before, strict=True):
        assert model.state_dict().keys() == old.keys()
        assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    assert len(first.base_loss) == (0 if update == "unlearn" else 4)
    if update != "unlearn":
        assert first.base_loss[0] != first.base_loss[-1]
        assert first.texts[0].logp_base == first.texts[0].logp_pre  # no step before the first
        assert first.texts[2].logp_base != first.texts[2].logp_pre


def test_recorded_numbers_are_those_of_whole_rows(pair, tokenizer):
    tuned, base = pair
    report = explore_novelty(tuned, base, tokenizer, iterative=False, batch_size=2, **SMALL)
    assert [t.step for t in report.texts] == [0, 1, 2] and not report.base_loss
    for text in report.texts:
        assert len(text.tokens) == 8
        row = torch.tensor([[0, *text.tokens[: text.counted]]])
        with torch.no_grad():
            sums = [
                float(m(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None]).sum())
                for m in (tuned, base)
            ]
        assert np.allclose(sums, (text.logp_ft, text.logp_pre), atol=1e-3)
        assert np.isclose(text.ratio_per_token, (sums[0] - sums[1]) / text.counted, atol=1e-3)


def test_learned_texts_are_less_new(pair, tokenizer):
    """After many steps on one candidate, the base likes it better than the pretrained model did."""
    tuned, base = pair
    report = explore_novelty(
        tuned, base, tokenizer, n=4, candidates=["abc abc"] * 4, lr=1e-2, max_drift=None, max_length=10
    )
    gains = [t.logp_base - t.logp_pre for t in report.texts]
    assert gains[0] == 0 and gains[-1] > 1


def test_drift_stops(pair, tokenizer):
    tuned, base = pair
    report = explore_novelty(tuned, base, tokenizer, lr=0.5, **SMALL)
    assert len(report.texts) < 3 and "lower lr" in report.stopped and report.stopped in report.notes()


def test_candidates_are_picked_by_ratio_once_each(pair, tokenizer):
    tuned, base = pair
    words = ["hello", "abc", "12 + 3", "zzzz"]
    ranked = rank_by_ratio(words, tuned, base, tokenizer)
    picked = explore_novelty(tuned, base, tokenizer, n=9, candidates=words, iterative=False)
    assert [t.text for t in ranked.texts] == [t.text for t in picked.texts] and "All 4" in picked.stopped
    ratios = [t.ratio_per_token for t in ranked.texts]
    assert ratios == sorted(ratios, reverse=True) and {t.text for t in ranked.texts} == set(words)


def test_text_ends_at_the_first_eos(pair, tokenizer):
    tuned, base = pair
    rows = [[5, 6, 1, 7], [1, 5], [5, 6]]
    by_length = {t.tokens: t for t in rank_by_ratio(rows, tuned, base, tokenizer).texts}
    assert by_length[5, 6, 1, 7].counted == 3 and by_length[5, 6, 1, 7].text == tokenizer.decode([5, 6])
    assert by_length[1, 5].counted == 1 and by_length[1, 5].text == ""
    assert by_length[5, 6].counted == 2


def test_peft_model_is_its_own_base(llama, tokenizer):
    from peft import LoraConfig, get_peft_model

    base = llama()
    tuned = get_peft_model(
        llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    for settings in (dict(iterative=False), dict(update="full", lr=1e-3), dict(update="lora", lr=1e-3)):
        alone, both = (
            explore_novelty(tuned, given, tokenizer, max_drift=None, **SMALL | settings)
            for given in (None, base)
        )
        assert [t.tokens for t in alone.texts] == [t.tokens for t in both.texts]
        assert np.allclose([t.logp_pre for t in alone.texts], [t.logp_pre for t in both.texts], atol=1e-3)
    assert alone.texts[-1].logp_base != alone.texts[-1].logp_pre
    with pytest.raises(TypeError, match="no adapter to switch off"):
        explore_novelty(base, None, tokenizer)


def test_groups_and_report(pair, tokenizer):
    tuned, base = pair
    report = explore_novelty(tuned, base, tokenizer, iterative=False, groups=len_parity, **SMALL)
    assert set(report.groups()) <= {"even", "odd"} and report.discovered()[-1] == len(report.groups())
    clustered = explore_novelty(tuned, base, tokenizer, iterative=False, groups=2, **SMALL)
    assert clustered.texts[0].group == "group 1" and len(clustered.groups()) == 2
    assert len(report.table()) == 3 and "<" not in report.headline()
    assert json.loads(report.to_json())["texts"][0]["step"] == 0
    assert report.plot().get_ylabel() == "groups found"
    assert report.plot(part="ratio").get_ylabel() == "log ratio per token"
    assert "evidence, not quotation" in report.to_html()
    with pytest.raises(ValueError, match="part='x'"):
        report.plot(part="x")


def len_parity(text):
    return "odd" if len(text) % 2 else "even"


def test_a_narrow_beginning_warns(pair, tokenizer):
    tuned, base = pair
    with pytest.warns(UserWarning, match="leaves 1 tokens"):
        report = explore_novelty(tuned, base, tokenizer, n=1, max_length=2, alpha=1.0, iterative=False)
    assert report.first_tokens == 1 and "Only 1 tokens" in " ".join(report.notes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explore_novelty(tuned, base, tokenizer, n=1, max_length=2, alpha=1.0, alpha_first=0, iterative=False)


@pytest.mark.parametrize(
    "bad, match",
    [
        (dict(n=0), "n=0"),
        (dict(update="x"), "update='x'"),
        (dict(temperature=0), "temperature=0"),
        (dict(candidates=[]), "candidates is empty"),
        (dict(alpha=7), "alpha=7"),
    ],
)
def test_bad_arguments(pair, tokenizer, bad, match):
    with pytest.raises(ValueError, match=match):
        explore_novelty(*pair, tokenizer, **bad)
    with pytest.raises(ValueError, match="texts is empty"):
        rank_by_ratio([], *pair, tokenizer)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_token_logprobs_of_rows_of_any_length(llama):
    model = llama()
    rows = [[0, 5, 6, 7], [0], [0, 9]]
    found = token_logprobs(model, rows, batch_size=2)
    assert [len(f) for f in found] == [3, 0, 1]
    with torch.no_grad():
        wanted = model(torch.tensor([[0, 9]])).logits[0, 0].log_softmax(-1)[9]
    assert torch.allclose(found[2][0], wanted, atol=1e-5)


def test_samples_and_start(pair, tokenizer):
    rows = sample_texts(pair[0], tokenizer, 5, max_length=4, batch_size=2)
    assert [len(r) for r in rows] == [4] * 5 and rows == sample_texts(
        pair[0], tokenizer, 5, max_length=4, batch_size=2
    )
    assert start_token(tokenizer) == 0

    class Bare:
        bos_token_id = cls_token_id = eos_token_id = None

        def __call__(self, text):
            return {"input_ids": []}

    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        start_token(Bare())


def test_command_on_folders(tiny_pair, tmp_path, llama, tokenizer):
    base, tuned = tiny_pair
    report = explore_models(str(base), str(tuned), n=2, max_length=4, groups=0, alpha=0.0)
    assert len(report.texts) == 2 and report.settings["iterative"]
    from peft import LoraConfig, get_peft_model

    adapter = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    assert (
        len(
            explore_models(
                str(base), str(tmp_path / "adapter"), n=1, max_length=4, static=True, alpha=0.0
            ).texts
        )
        == 1
    )
    other = tmp_path / "other"
    llama().save_pretrained(other)
    (tokens := tokenizer.__class__.from_pretrained(base)).add_tokens(["zz"])
    changed = dict(tokens.get_vocab())
    assert "zz" in changed  # an added token leaves the common ids alone: no error
    tokens.save_pretrained(other)
    assert explore_models(str(base), str(other), n=1, max_length=2, static=True, alpha=0.0).texts


def test_command_line(tiny_pair, tmp_path):
    from typer.testing import CliRunner

    from unfused.cli.main import make_app

    base, tuned = tiny_pair
    page = tmp_path / "page.html"
    asked = f"diagnose cge --base {base} --tuned {tuned} --n 2 --static --max-length 4 --alpha 0 --groups 2 --html {page}"
    found = CliRunner().invoke(make_app(), asked.split())
    assert found.exit_code == 0, found.output
    assert "evidence, not quotation" in page.read_text()
