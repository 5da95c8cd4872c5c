"""Tokenizer, windows, the small transformer, and the pretrained one as an encoder."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unfused.nn.augment_tokens import TokenAugment
from unfused.nn.encoders import embed_all
from unfused.nn.text_encoder import (
    CLS,
    MASK,
    PAD,
    SEP,
    PretrainedTextEncoder,
    TextEncoder,
    cut_texts,
    train_tokenizer,
)

TEXTS = [
    f"the {animal} number {k} sat on the {place}"
    for k in range(40)
    for animal, place in (("cat", "mat"), ("dog", "log"))
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, 32)


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    again = train_tokenizer(iter(TEXTS), 400, 32)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) <= 400 and tokenizer.convert_ids_to_tokens([PAD, CLS, SEP, MASK]) == [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
    ]


@pytest.mark.parametrize(
    "text", ["Der Bär", "我想取消", "🦊🦊", "<b>&amp;</b>", "a\tb\n\nc", "ﬁne Ⅻ", "\0\u200d"]
)
def test_no_text_is_unknown(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert 1 not in ids and ids[0] == CLS and ids[-1] == SEP
    assert tokenizer(text.upper())["input_ids"] == tokenizer(text.lower())["input_ids"]


def test_windows_cover_every_token_once_or_twice(tokenizer):
    long = " ".join(TEXTS[:30])
    whole = tokenizer.backend_tokenizer.encode(long, add_special_tokens=False).ids
    found = list(cut_texts(tokenizer, ["short", long, "", "the cat"], 20))
    rows = [row for row, _ in found]
    assert rows == sorted(rows) and set(rows) == {0, 1, 2, 3} and rows.count(1) > len(whole) / 18
    pieces = [[i for i in ids if i not in (PAD, CLS, SEP)] for row, ids in found if row == 1]
    assert pieces[0] == whole[:18] and pieces[-1] == whole[-18:]
    covered, place = list(pieces[0]), 0
    for piece in pieces[1:]:
        step = next(s for s in range(1, 19) if whole[place + s : place + s + 18] == piece)
        assert step <= 18 - 18 // 4 + 1
        place += step
        covered = whole[: place + 18]
    assert covered == whole
    empty = next(ids for row, ids in found if row == 2)
    assert empty.tolist() == [CLS, SEP] + [PAD] * 18


def test_padding_changes_nothing():
    torch.manual_seed(0)
    encoder = TextEncoder(300, width=16).eval()
    ids = torch.tensor([[CLS, 7, 8, 9, SEP]])
    padded = torch.cat([ids, torch.full((1, 6), PAD)], 1)
    with torch.inference_mode():
        alone = encoder.embed(ids)
        beside = encoder.embed(torch.cat([padded, torch.full((1, 11), 9)]))[:1]
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-4)


def test_classifier_is_what_was_trained():
    torch.manual_seed(0)
    encoder, head = TextEncoder(300, width=16).eval(), torch.nn.Linear(16, 3)
    model = encoder.to_classifier({0: "a", 1: "b", 2: "c"}, text_column="body").eval()
    model.classifier.load_state_dict(head.state_dict())
    ids = torch.tensor([[CLS, 7, 8, SEP, PAD], [CLS, 9, 10, 11, SEP]])
    with torch.inference_mode():
        logits = model(ids, attention_mask=(ids != PAD).long()).logits
        torch.testing.assert_close(logits, head(encoder.embed(ids)), atol=1e-5, rtol=1e-4)
    assert model.config.text_column == "body" and model.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("width", [4, 12, 20, 36, 64, 100, 128, 132])
def test_every_width(width):
    assert TextEncoder(300, width=width).eval().embed(torch.tensor([[CLS, 7, SEP]])).shape == (1, width)


def test_ids_are_embedded_in_batches():
    encoder = TextEncoder(300, width=16)
    ids = np.random.default_rng(0).integers(5, 300, (7, 6)).astype(np.int32)
    assert embed_all(encoder, ids, batch_size=3).shape == (7, 16)
    with pytest.raises(ValueError, match=r"data is torch\.int32"):
        embed_all(_Floats(), ids)


class _Floats(torch.nn.Module):
    embedding_dim = 2

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


# --- augmentation ----------------------------------------------------------------------------------------


def ids_of(batch: int, length: int) -> torch.Tensor:
    x = torch.arange(batch * length).reshape(batch, length) + 10
    return torch.cat(
        [torch.full((batch, 1), CLS), x, torch.full((batch, 1), SEP), torch.full((batch, 3), PAD)], 1
    )


def test_tokens_left_out_and_masked():
    torch.manual_seed(0)
    x = ids_of(400, 20)
    augment = TokenAugment(PAD, MASK, (CLS, SEP), drop=0.2, span=0.05, longest=3)
    y = augment(x)
    assert y.shape == x.shape and augment.eval()(x) is x
    assert (y[:, 0] == CLS).all() and ((y == SEP).sum(1) == 1).all()
    for before, after in zip(x.tolist(), y.tolist(), strict=True):
        words = [i for i in after if i >= 10]
        assert words and words == sorted(words) and set(words) <= set(before)
        end = after.index(SEP)
        assert PAD not in after[:end] and set(after[end + 1 :]) == {PAD}
    lengths = (y != PAD).sum(1).float().mean() - 2
    assert lengths == pytest.approx(20 * (1 - 0.2 * 0.95), rel=0.03)
    assert 0.04 < (y == MASK).float().sum() / (400 * 20) < 0.12


def test_one_word_stays():
    torch.manual_seed(0)
    for length in (1, 2, 5):
        y = TokenAugment(PAD, MASK, (CLS, SEP), drop=1.0, span=1.0)(ids_of(64, length))
        assert ((y >= 10).sum(1) == 1).all()
    empty = torch.tensor([[CLS, SEP, PAD]])
    assert TokenAugment(PAD, MASK, (CLS, SEP), drop=1.0)(empty).equal(empty)


def test_what_it_does_not_take():
    with pytest.raises(ValueError, match="must be whole numbers"):
        TokenAugment(PAD, MASK, (CLS, SEP))(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="drop=2"):
        TokenAugment(PAD, MASK, (CLS, SEP), drop=2)


# --- a pretrained one ------------------------------------------------------------------------------------


def test_pretrained_encoder_is_the_frozen_one_with_gradients(tmp_path, tokenizer):
    from transformers import BertConfig, BertModel

    from unfused.nn import frozen

    small = BertConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(small).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["the cat sat", "a dog", "the cat sat on the log again and again"]
    expected = frozen.load(frozen.describe(str(tmp_path)), "text").embed(texts, 2, False)
    encoder = PretrainedTextEncoder(frozen.load(frozen.describe(str(tmp_path)), "text")).eval()
    inputs = encoder.prepare(texts)
    embedded = encoder.embed(**inputs)
    np.testing.assert_allclose(embedded.detach(), expected, atol=1e-5)
    embedded.sum().backward()
    assert encoder.embedding_dim == 16
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    with pytest.raises(ValueError, match="only runs inside sentence-transformers"):
        PretrainedTextEncoder(SimpleNamespace(model=torch.nn.Linear(1, 1)))
