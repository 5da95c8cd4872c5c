"""Embeddings of different vocabularies; and whole models through transformers."""

from __future__ import annotations

import pytest
import torch

from unfused.merge import merge, merge_to_folder

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<unk>", "the", "cat", "sat"]


def words(folder, vocabulary):
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>").save_pretrained(folder)


def llama(folder, vocabulary, seed, rows=None, tied=False, like=None, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=rows or len(vocabulary),
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    if like is not None:
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), like.parameters(), strict=True):
                if mine.shape == theirs.shape:
                    mine.copy_(theirs + 0.02 * torch.randn_like(theirs))
    model.save_pretrained(folder, **options)
    words(folder, vocabulary)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_the_result_loads_and_is_the_merge_in_plain_torch(tmp_path, tied):
    base = llama(tmp_path / "base", WORDS, 0, tied=tied)
    a = llama(tmp_path / "a", WORDS, 1, tied=tied, like=base, max_shard_size="1KB")
    b = llama(tmp_path / "b", WORDS, 2, tied=tied, like=base)
    out = merge_to_folder(
        "task-arithmetic",
        tmp_path / "base",
        [tmp_path / "a", tmp_path / "b"],
        tmp_path / "out",
        scale=0.3,
        max_shard_bytes=1000,
    )
    found = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    states = [m.state_dict() for m in (base, a, b)]
    for name, tensor in found.items():
        zero, one, two = (s[name] for s in states)
        assert torch.equal(tensor, zero + 0.3 * ((one - zero) + (two - zero))), name
    assert transformers.AutoTokenizer.from_pretrained(out).tokenize("the cat") == ["the", "cat"]
    modules = merge("task-arithmetic", base, [a, b], scale=0.3)
    assert all(torch.equal(modules[name], found[name]) for name in found)


@pytest.fixture
def family(tmp_path):
    """The second model has its words in another order and one of its own; the base has a padding row."""
    llama(tmp_path / "base", WORDS, 0, rows=5)
    llama(tmp_path / "a", WORDS, 1, rows=5)
    llama(tmp_path / "b", ["<unk>", "sat", "dog", "the"], 2)
    states = {
        n: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict()
        for n in ("base", "a", "b")
    }
    return tmp_path, states


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("mode", ["base", "union"])
def test_rows_are_matched_by_their_tokens(family, mode):
    folder, states = family
    inputs = [folder / "base", [folder / "a", folder / "b"]]
    with pytest.raises(ValueError, match=r"vocab='base' or 'union' \(--vocab\) matches tokens"):
        merge_to_folder("task-arithmetic", *inputs, folder / "out")
    out = merge_to_folder("task-arithmetic", *inputs, folder / "out", vocab=mode, scale=0.5)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    rows = tokenizer.get_vocab()
    assert list(rows)[:1] and rows["cat"] == 2 and ("dog" in rows) == (mode == "union")
    theirs = {"<unk>": 0, "sat": 1, "dog": 2, "the": 3}
    for name in (EMBED, HEAD):
        found, base, a, b = (s[name] for s in (model.state_dict(), *(states[n] for n in ("base", "a", "b"))))
        assert len(found) == 5 == model.config.vocab_size
        for token in WORDS:
            row = WORDS.index(token)
            change = a[row] - base[row]
            if token in theirs:
                change = change + b[theirs[token]] - base[row]
            torch.testing.assert_close(found[row], base[row] + 0.5 * change)
        if mode == "union":  # the base has a row at its place but not its meaning: that of who knows it
            torch.testing.assert_close(found[rows["dog"]], b[2])
        else:
            torch.testing.assert_close(found[4], base[4] + 0.5 * (a[4] - base[4]))


def test_rows_in_another_order_are_noticed_where_shapes_agree(tmp_path):
    llama(tmp_path / "a", WORDS, 0)
    llama(tmp_path / "b", WORDS[::-1], 1)
    with pytest.raises(ValueError, match=r"token '.*' is row . by .*a/tokenizer.json and row . by"):
        merge_to_folder("linear", None, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(ValueError, match="vocab='all' must be 'base' or 'union'"):
        merge_to_folder("linear", None, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", vocab="all")
    merge_to_folder("linear", None, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", vocab="base")


def test_without_a_tokenizer_there_is_nothing_to_match(tmp_path):
    llama(tmp_path / "a", WORDS, 0)
    llama(tmp_path / "b", WORDS, 1)
    for file in (tmp_path / "b").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"b has no tokenizer, which vocab \(--vocab\) needs"):
        merge_to_folder("linear", None, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", vocab="union")
