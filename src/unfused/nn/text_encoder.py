"""Encoders of texts: a small transformer from random weights, and a pretrained one of transformers to fine-tune.

The small one is a ModernBERT with mean pooling, since its classifier of transformers pools so too: `pipeline
("text-classification", model=folder)` works with what is saved here, without this package. Its tokenizer (byte-level BPE, lower
case, any language) is trained on the texts themselves.

Same contract as the other encoders: ``forward(ids) -> (frames (batch, 1, D), [block features])``, ``pool``, ``embed``,
``embedding_dim``, ``block_dims``. Padding is known by its id, so that ids alone are an input.

Reference: Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast, Memory Efficient, and Long Context
Finetuning and Inference, 2024, arXiv:2412.13663.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertForSequenceClassification, PreTrainedTokenizerFast

__all__ = [
    "PAD",
    "SPECIAL",
    "PretrainedTextEncoder",
    "TextEncoder",
    "count_tokens",
    "cut_texts",
    "num_windows",
    "train_tokenizer",
]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))


def train_tokenizer(
    texts: Iterable[str], vocabulary: int = 8000, longest: int = 128
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts, lower case; the same texts give the same tokenizer.

    Parameters
    ----------
    texts : iterable of str
    vocabulary : int, default=8000
        At most so many tokens; few texts give fewer. The 256 bytes and 5 marks are always there, so no text is unknown.
    longest : int, default=128
        `model_max_length` of the tokenizer.

    Examples
    --------
    >>> tokenizer = train_tokenizer(["the cat sat", "the dog sat"] * 3)
    >>> tokenizer.decode(tokenizer("The cat")["input_ids"])
    '[CLS] the cat[SEP]'
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    names = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def cut_texts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Windows of ids of texts, one after the other.

    A text of more than `length - 2` tokens is cut into equal steps of windows that overlap by a quarter; the last one ends
    with the text.

    Yields
    ------
    row : int
        Which text.
    ids : int32 array of shape (length,)
        `[CLS]`, up to `length - 2` tokens, `[SEP]`, padding.

    Examples
    --------
    >>> tokenizer = train_tokenizer(["a b c d e f g h i j"])
    >>> [(row, tokenizer.decode(ids, skip_special_tokens=True).strip())
    ...  for row, ids in cut_texts(tokenizer, ["A", "a b c d e f g h i j"], length=14)]
    [(0, 'a'), (1, 'a b c d e f'), (1, 'e f g h i j')]
    """
    for row, ids in enumerate(_tokenized(tokenizer, texts)):
        over = max(0, len(ids) + 2 - length)
        for place in np.linspace(0, over, num_windows(len(ids), length)).round().astype(int).tolist():
            window = np.full(length, PAD, np.int32)
            piece = ids[place : place + length - 2]
            window[: len(piece) + 2] = [CLS, *piece, SEP]
            yield row, window


def num_windows(tokens: int, length: int) -> int:
    """Windows of `length` that `cut_texts` makes of a text of so many tokens."""
    inside = length - 2
    return 1 + -(-max(0, tokens - inside) // max(1, inside - inside // 4))


def count_tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text, without marks: (n_texts,)."""
    return np.fromiter((len(ids) for ids in _tokenized(tokenizer, texts)), np.int64, len(texts))


def _tokenized(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Iterator[list[int]]:
    whole = tokenizer.backend_tokenizer  # no warning about long texts, which are cut here
    whole.no_truncation()
    whole.no_padding()
    for start in range(0, len(texts), 1024):
        for one in whole.encode_batch(list(texts[start : start + 1024]), add_special_tokens=False):
            yield one.ids


class TextEncoder(nn.Module):
    """A small ModernBERT, the mean of its last states and the layer that its classifier has before the head.

    Parameters
    ----------
    vocabulary : int
    width : int, default=128
    depth : int, default=2
        Layers.
    dropout : float, default=0.1
        Of the tokens' embeddings.

    Attributes
    ----------
    takes_ids : bool
        Its inputs are whole numbers.
    block_dims : list of int
        Of the states before the last one, means over the text.

    Examples
    --------
    >>> encoder = TextEncoder(300, width=16)
    >>> ids = torch.tensor([[CLS, 7, 8, SEP], [CLS, 7, SEP, PAD]])
    >>> frames, blocks = encoder(ids)
    >>> frames.shape, [block.shape[1] for block in blocks], encoder.embed(ids).shape
    (torch.Size([2, 1, 16]), [16, 16], torch.Size([2, 16]))
    """

    takes_ids = True

    def __init__(self, vocabulary: int, width: int = 128, depth: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.vocabulary, self.width, self.depth = vocabulary, width, depth
        config = ModernBertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=depth,
            num_attention_heads=_heads(width),
            layer_types=["full_attention"] * depth,
            classifier_pooling="mean",
            embedding_dropout=dropout,
            pad_token_id=PAD,
            bos_token_id=CLS,
            eos_token_id=SEP,
            cls_token_id=CLS,
            sep_token_id=SEP,
        )
        whole = ModernBertForSequenceClassification(config)
        self.model, self.head = whole.model, whole.head
        self.block_dims, self.embedding_dim = [width] * depth, width

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Ids (batch, tokens) to (batch, 1, width) and the means of the earlier states."""
        mask = x != PAD
        x, mask = x[:, : int(mask.sum(1).max())].long(), mask[:, : int(mask.sum(1).max())]
        out = self.model(input_ids=x, attention_mask=mask.long(), output_hidden_states=True)
        *earlier, _ = out.hidden_states
        pooled = self.head(_mean(out.last_hidden_state, mask))
        return pooled[:, None], [_mean(state, mask) for state in earlier]

    def pool(self, frames: Tensor) -> Tensor:
        return frames[:, 0]

    def embed(self, x: Tensor) -> Tensor:
        """Ids (batch, tokens) to embeddings (batch, width)."""
        return self.pool(self(x)[0])

    def to_classifier(self, id2label: Mapping[int, str], **more: Any) -> ModernBertForSequenceClassification:
        """A classifier of transformers around THIS encoder (shared, not copied), with a new head.

        Parameters
        ----------
        id2label : mapping of class index to name
        **more
            Further attributes of its config.
        """
        config = copy.deepcopy(self.model.config)
        config.num_labels = len(id2label)
        config.id2label = dict(id2label)
        config.label2id = {name: index for index, name in id2label.items()}
        for name, value in more.items():
            setattr(config, name, value)
        classifier = ModernBertForSequenceClassification(config)
        classifier.model, classifier.head = self.model, self.head
        classifier.model.config = classifier.head.config = config
        return classifier.train(self.training)


def _heads(width: int) -> int:
    """Heads of about 32 dimensions; rotary positions want an even number of them."""
    return max((heads for heads in range(1, max(1, width // 32) + 1) if width % (2 * heads) == 0), default=1)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """States (batch, tokens, D) to their means (batch, D) where the mask holds."""
    weight = mask[..., None].to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)


class PretrainedTextEncoder(nn.Module):
    """A text tower of `unfused.nn.frozen`, with gradients: what a pretrained model is fine-tuned as.

    Parameters
    ----------
    tower : Frozen
        What `unfused.nn.frozen.load(source, "text")` gives.

    Raises
    ------
    ValueError
        The model runs in the sentence-transformers library alone.
    """

    takes_ids = True

    def __init__(self, tower: Any) -> None:
        super().__init__()
        if not hasattr(tower, "tokenizer"):
            raise ValueError(
                "teacher: this model only runs inside sentence-transformers, which cannot be fine-tuned here"
            )
        self.model = tower.model.requires_grad_(True)
        self._tower = [tower]  # in a list: not a part of this module
        with torch.no_grad():
            self.embedding_dim = self.eval().embed(**self.prepare(["one"])).shape[1]

    def prepare(self, texts: Sequence[str], longest: int = 256) -> dict[str, Tensor]:
        """Texts to the arguments of `embed`, cut at `longest` tokens."""
        (tower,) = self._tower
        [(rows, inputs)] = tower._batches([text[: 20 * longest] for text in texts], len(texts))
        order = torch.as_tensor(np.argsort(rows))
        inputs = {name: value[order, :longest] for name, value in inputs.items()}
        return {"input_values": inputs.pop("input_ids"), **inputs}

    def embed(self, input_values: Tensor, **inputs: Tensor) -> Tensor:
        (tower,) = self._tower
        return tower._run({"input_ids": input_values, **inputs})
