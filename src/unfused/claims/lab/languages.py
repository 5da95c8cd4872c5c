"""Two languages for transfer without labels: the standard library's English, and a made-up one.

Language B is English under a fixed transformation: seven in ten words become pseudo-words with endings of their own, and the
verb goes to the end of its clause; names of code, numbers and the other words are shared. Texts of the two come from
different modules, and nothing aligns them. A small BERT has seen nine sentences of A for each of B.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unfused.claims.lab import text
from unfused.claims.lab.text import AREAS, docstrings, encode, held_out, mask_tokens, sentences
from unfused.claims.lab.tuning import Batch, Task, tune

if TYPE_CHECKING:
    from transformers import BertForMaskedLM, PreTrainedTokenizerFast

    from unfused.claims.lab import Lab

__all__ = [
    "bilingual_bert",
    "bilingual_classifier",
    "corpus",
    "masked",
    "tokenizer",
    "transfer_task",
    "translate",
]

LENGTH = 40
"""Tokens of a sentence."""

VERBS = frozenset(
    """is are was were be been has have had does do did can may will should must return returns get gets set sets read reads
    write writes open opens close closes create creates make makes call calls called use used uses add adds remove removes
    parse parses convert converts raise raises raised check checks test tests run runs start starts stop stops wait waits
    send sends receive receives handle handles format formats print prints load loads find finds given gives give copy
    copies build builds delete deletes list lists match matches compare compares contains contain specifies specify
    indicates indicate defines define represents represent provides provide""".split()
)
CLAUSE_ENDS = frozenset("and or but if when that which unless because while where".split())
ENDINGS = {"ing": "ava", "ed": "ost", "es": "im", "s": "im", "ly": "ux"}


def translate(sentence: str) -> str:
    """A sentence in language B.

    Examples
    --------
    >>> translate("Return the number of open files, or None if `os.stat` fails.")
    'Bi semo fe kile files teti, li none ra `os.stat` fails.'
    """
    clauses: list[list[str]] = [[]]
    for token in sentence.split():
        if token.lower() in CLAUSE_ENDS and clauses[-1]:
            clauses.append([])
        clauses[-1].append(token)
        if token[-1] in ",;:":
            clauses.append([])
    words = [_word(token) for clause in clauses for token in _verb_last(clause)]
    translated = " ".join(words)
    return translated[:1].upper() + translated[1:]


def _verb_last(clause: list[str]) -> list[str]:
    for at, token in enumerate(clause[:-1]):
        if token.lower() in VERBS:
            last = clause[-1]
            stem = last.rstrip(".,;:!?")
            rest = [*clause[:at], *clause[at + 1 : -1]]
            if at == 0 and rest and token[:1].isupper():
                token = token.lower()
            return [*rest, stem, token + last[len(stem) :]] if stem else [*rest, token, last]
    return clause


def _word(token: str) -> str:
    found = re.fullmatch(r"([(\"']*)([A-Z]?[a-z]+)([)\"'.,;:!?]*)", token)
    if not found:
        return token
    before, word, after = found.groups()
    pseudo = _pseudo(word.lower())
    return (
        before
        + (pseudo.capitalize() if word[0].isupper() and pseudo != word.lower() else pseudo or word)
        + after
    )


@functools.cache
def _pseudo(word: str) -> str:
    stem, ending = word, ""
    for english, other in ENDINGS.items():
        if word.endswith(english) and len(word) - len(english) >= 3:
            stem, ending = word[: -len(english)], other
            break
    seed = int.from_bytes(hashlib.blake2b(stem.encode(), digest_size=8).digest(), "little")
    generator = np.random.default_rng(seed)
    if generator.random() >= 0.7:
        return word
    letters = "".join(
        "bdfgklmnprstvz"[generator.integers(14)] + "aeiou"[generator.integers(5)]
        for _ in range(max(1, round(len(stem) / 2.5)))
    )
    return letters + ending


# -- texts -------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def corpus(lab: Lab) -> tuple[list[str], list[str]]:
    """Unlabelled sentences of A and of B, from different modules, none of them held out."""
    found, areas = docstrings(lab), {name for train, _ in AREAS.values() for name in train}
    others = sorted(set(found) - areas - set(held_out()))
    mine, theirs = others[::2], others[1::2]
    if not theirs:  # at smoke scale only the areas' modules are read
        names = sorted(areas & set(found))
        areas, theirs = set(names[::2]), names[1::2]
    a = sentences(t for name in sorted(areas & set(found)) + mine for t in found[name])
    b, known = sentences(t for name in theirs for t in found[name]), set(a)
    return a, [translate(sentence) for sentence in b if sentence not in known]


@functools.lru_cache(maxsize=4)
def tokenizer(lab: Lab) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2,048 tokens, trained on nine sentences of A for each of B."""

    def train() -> str:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        a, b = corpus(lab)
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=2048,
            special_tokens=[text.PAD, text.START, text.END, text.MASK],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator([*a, *b[: len(a) // 9]], trainer)
        return model.to_str()

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(lab.cached("bilingual-bpe", text._text_key(lab), train)),
        pad_token=text.PAD,
        cls_token=text.START,
        sep_token=text.END,
        mask_token=text.MASK,
    )


def masked(lab: Lab, rows: Sequence[str], views: int, seed: int) -> Batch:
    """Sentences under BERT's corruption, each in several views."""
    words, generator = tokenizer(lab), torch.Generator().manual_seed(seed)
    batch = encode(words, rows, LENGTH)
    parts = [mask_tokens(words, batch, generator) for _ in range(views)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# -- models ------------------------------------------------------------------------------------------------------------


def bilingual_bert(lab: Lab) -> BertForMaskedLM:
    """BERT (width 128, 3 layers, 4 heads, 40 positions) pretrained on 90 % A and 10 % B."""
    from transformers import BertForMaskedLM

    steps = lab.pick(smoke=4, desk=800)

    def pretrain() -> dict[str, torch.Tensor]:
        a, b = corpus(lab)
        rows = [*a, *b[: len(a) // 9]][: lab.pick(smoke=200, desk=None)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BertForMaskedLM(_config())
            data = masked(lab, rows, views=lab.pick(smoke=1, desk=3), seed=0)
            tune(model, data, lr=1e-3, steps=steps, batch_size=32, warmup=0.1)
        named = {name for name, _ in model.named_parameters()}  # tied weights once
        return {name: value for name, value in model.state_dict().items() if name in named}

    model = BertForMaskedLM(_config())
    state = lab.cached("bilingual-bert", {"steps": steps, **text._text_key(lab)}, pretrain)
    model.load_state_dict(state, strict=False)
    return model.eval()


def _config() -> Any:
    config = text._bert_config()
    config.num_hidden_layers, config.max_position_embeddings = 3, LENGTH
    return config


def bilingual_classifier(lab: Lab, num_labels: int) -> Any:
    """The pretrained BERT under a mean over tokens and a new head, drawn from torch's global generator."""
    config = _config()
    config.num_labels = num_labels
    model = text._classifier_class()(config)
    model.bert.load_state_dict(bilingual_bert(lab).bert.state_dict())
    return model.eval()


@functools.lru_cache(maxsize=8)
def transfer_task(lab: Lab, seed: int, n: int = 400) -> tuple[Task, Batch]:
    """Which area of the standard library? `n` labelled sentences of A, 160 more to validate, none of B.

    Returns
    -------
    Task
        Its test part is in A, of other modules.
    dict of str to Tensor
        The same test sentences in B.
    """
    words = tokenizer(lab)
    train_texts, train_labels, test_texts, test_labels = text._area_sentences(lab)
    if lab.scale == "smoke":
        test_texts, test_labels = test_texts[::60], test_labels[::60]
    order = np.random.default_rng(seed).permutation(len(train_texts))
    chosen: dict[str, list[int]] = {"train": [], "valid": []}
    for area in range(len(AREAS)):
        rows = order[train_labels[order] == area]
        chosen["train"] += rows[: n // len(AREAS)].tolist()
        chosen["valid"] += rows[n // len(AREAS) :][: lab.pick(smoke=2, desk=20)].tolist()

    def part(texts: Sequence[str], labels: np.ndarray) -> Batch:
        return {**encode(words, texts, LENGTH), "labels": torch.from_numpy(labels)}

    parts = {name: part([train_texts[i] for i in rows], train_labels[rows]) for name, rows in chosen.items()}
    task = Task(parts["train"], parts["valid"], part(test_texts, test_labels), num_labels=len(AREAS))
    return task, part([translate(sentence) for sentence in test_texts], test_labels)
