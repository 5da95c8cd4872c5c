"""A small masked language model that has read reviews and the standard library, and cloze tasks with few labels.

The reviews come from a grammar: two judgements about aspects of a thing, each by an adjective, a negated adjective of the other
side or a verb, among clauses that judge nothing. Both good, both bad, or one of each is the class. One review in ten of the
pretraining text ends in a verdict, "it was great ." (terrible, okay), of which one in five is false: that is all that the words
of the verbalizer mean. The other task is real text, sentences of docstrings from four areas of the standard library; one in
ten of the pretraining ones goes on "this is about NOUN .", a long word of the sentence itself. Tests and unlabelled reviews
are drawn apart from pretraining; test sentences come from modules that nothing was trained on.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from unfused.claims.lab import text
from unfused.claims.lab.text import AREAS, docstrings, encode, held_out, mask_tokens, sentences
from unfused.claims.lab.tuning import tune

if TYPE_CHECKING:
    from transformers import BertForMaskedLM, PreTrainedTokenizerFast

    from unfused.claims.lab import Lab

__all__ = ["LENGTH", "TASKS", "ClozeTask", "head_classifier", "masked_lm", "reviews", "task", "tokenizer"]

LENGTH = 36
"""Tokens."""

NOUNS = {
    "film": ("plot", "acting", "music", "ending", "camera work", "dialogue", "cast", "story"),
    "phone": ("screen", "battery", "keyboard", "speaker", "price", "design", "software", "camera"),
    "restaurant": ("soup", "service", "wine", "dessert", "bread", "menu", "coffee", "kitchen"),
    "hotel": ("room", "bed", "view", "breakfast", "staff", "pool", "bathroom", "lobby"),
}
GOOD = """brilliant superb charming clever delightful elegant excellent fresh generous gorgeous impressive lively lovely
memorable perfect pleasant polished refined splendid stunning tasteful warm wonderful witty""".split()
BAD = """awful bland boring broken careless cheap clumsy cold crude dull faulty flat grim lazy messy miserable noisy poor
rude shabby sloppy stale tiresome ugly""".split()
LIKED = "adored admired enjoyed loved praised recommended".split()
DISLIKED = "disliked endured hated lamented regretted resented".split()
NEUTRAL = """we went there on a {day} | my {kin} chose it | it took about {number} hours | i read of it in a paper |
we paid by card | it was {day} evening | my {kin} came along | there were {number} of us""".replace(
    "\n", " "
).split("|")
DAYS = "monday tuesday friday saturday sunday".split()
KIN = "brother sister mother father friend neighbour".split()
NUMBERS = "two three four five six".split()
VERDICTS = ("terrible", "okay", "great")

TOPICS = {"files": "file", "network": "server", "concurrency": "thread", "testing": "test"}
"""Area of `text.AREAS` -> its word, as it occurs in the text."""

TASKS = ("reviews", "docstrings")


@dataclass(frozen=True, eq=False)
class ClozeTask:
    """Rows `{"text": ..., "label": ...}`.

    Attributes
    ----------
    labeled, unlabeled, test : list of dict
        The unlabelled rows have their true labels too, for an oracle; None in junk.
    template : str
    verbalizer : dict
    """

    labeled: list[dict[str, Any]]
    unlabeled: list[dict[str, Any]]
    test: list[dict[str, Any]]
    template: str
    verbalizer: dict[Any, str]


# -- texts -------------------------------------------------------------------------------------------------------------


def reviews(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Reviews and their classes: 0 bad, 1 mixed, 2 good.

    Examples
    --------
    >>> reviews(1, seed=3)[0][0].endswith(" .")
    True
    """
    rng = np.random.default_rng([seed, 7])
    labels = rng.integers(3, size=count)
    return [_review(rng, int(label)) for label in labels], labels


def _review(rng: np.random.Generator, label: int) -> str:
    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    thing = pick(list(NOUNS))
    aspects = rng.permutation(NOUNS[thing])[:2]
    sides = {0: (False, False), 1: (True, False), 2: (True, True)}[label]
    clauses = []
    for aspect, good in zip(aspects, rng.permutation(sides), strict=True):
        form = rng.random()
        if form < 0.25:
            clauses.append(f"the {aspect} {pick(('was', 'is'))} not {pick(BAD if good else GOOD)}")
        elif form < 0.45:
            clauses.append(f"{pick(('i', 'we'))} {pick(LIKED if good else DISLIKED)} the {aspect}")
        else:
            how = pick(("", "", "very ", "rather ", "quite "))
            clauses.append(
                f"the {aspect} {pick(('was', 'seemed', 'felt'))} {how}{pick(GOOD if good else BAD)}"
            )
    filler = pick(NEUTRAL).strip().format(day=pick(DAYS), kin=pick(KIN), number=pick(NUMBERS))
    clauses.insert(int(rng.integers(3)), filler)
    joints = [pick((" , ", " and ", " but ", " . ")) for _ in clauses[1:]]
    said = clauses[0] + "".join(joint + clause for joint, clause in zip(joints, clauses[1:], strict=True))
    return f"{pick(('a', 'this', 'the'))} {thing} : {said} ."


@functools.lru_cache(maxsize=2)
def _topic_sentences(lab: Lab) -> tuple[list[list[str]], list[list[str]]]:
    """Sentences of each topic, to train and to test on; a sentence of two topics is in neither."""
    found, sides = docstrings(lab), []
    for side in (0, 1):
        sides.append(
            [sentences(t for name in AREAS[area][side] for t in found.get(name, ())) for area in TOPICS]
        )
    counts: dict[str, int] = {}
    for rows in (*sides[0], *sides[1]):
        for row in rows:
            counts[row] = counts.get(row, 0) + 1
    train, test = ([[row for row in rows if counts[row] == 1] for rows in side] for side in sides)
    return train, test


@functools.lru_cache(maxsize=2)
def _corpus(lab: Lab) -> list[str]:
    rng = np.random.default_rng(0)
    texts, labels = reviews(lab.pick(smoke=150, desk=6000), seed=10_000)
    for i in np.flatnonzero(rng.random(len(texts)) < 0.1):
        word = VERDICTS[labels[i] if rng.random() < 0.8 else rng.integers(3)]
        texts[i] += f" it was {word} ."
    out, found = set(held_out()), docstrings(lab)
    read = sentences(t for name in sorted(set(found) - out) for t in found[name])
    for row in [read[i] for i in rng.permutation(len(read))[: lab.pick(smoke=150, desk=6000)]]:
        words = [word for word in re.findall(r"[a-z]+", row.lower()) if len(word) > 3]
        about = f" this is about {words[rng.integers(len(words))]} ." if words and rng.random() < 0.1 else ""
        texts.append(row + about)
    return texts


@functools.lru_cache(maxsize=2)
def tokenizer(lab: Lab) -> PreTrainedTokenizerFast:
    """Lower-case word pieces, 4,096 of them; every verbalizer word is one."""

    def train() -> str:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

        special = [text.PAD, "[UNK]", text.START, text.END, text.MASK]
        model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        model.normalizer, model.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
        always = [" ".join([*VERDICTS, *TOPICS.values()])] * 1000
        trainer = trainers.WordPieceTrainer(vocab_size=4096, special_tokens=special, show_progress=False)
        model.train_from_iterator([*_corpus(lab), *always], trainer)
        ends = [(text.START, special.index(text.START)), (text.END, special.index(text.END))]
        model.post_processor = processors.TemplateProcessing(
            single=f"{text.START} $A {text.END}", special_tokens=ends
        )
        return model.to_str()

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(lab.cached("reviews-word-pieces", text._text_key(lab), train)),
        pad_token=text.PAD,
        unk_token="[UNK]",
        cls_token=text.START,
        sep_token=text.END,
        mask_token=text.MASK,
    )


# -- models ------------------------------------------------------------------------------------------------------------


def masked_lm(lab: Lab) -> BertForMaskedLM:
    """BERT (width 128, 4 layers, 4 heads) pretrained on reviews and docstrings."""
    from transformers import BertForMaskedLM

    steps = lab.pick(smoke=2, desk=900)

    def pretrain() -> dict[str, torch.Tensor]:
        words, generator = tokenizer(lab), torch.Generator().manual_seed(0)
        batch = encode(words, _corpus(lab), LENGTH)
        views = [mask_tokens(words, batch, generator) for _ in range(lab.pick(smoke=1, desk=3))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BertForMaskedLM(_config(len(words)))
            data = {name: torch.cat([view[name] for view in views]) for name in views[0]}
            tune(model, data, lr=1e-3, steps=steps, batch_size=32, warmup=0.1)
        return text._untied(model)

    model = BertForMaskedLM(_config(len(tokenizer(lab))))
    state = lab.cached("reviews-bert", {"steps": steps, **text._text_key(lab)}, pretrain)
    model.load_state_dict(state, strict=False)
    return model.eval()


def _config(vocabulary: int) -> Any:
    config = text._bert_config()
    config.vocab_size, config.max_position_embeddings = vocabulary, LENGTH + 4
    config.hidden_dropout_prob = 0.1
    return config


def head_classifier(lab: Lab, num_labels: int) -> nn.Module:
    """The same BERT under a mean over tokens and a new head, drawn from torch's global generator."""
    config = _config(len(tokenizer(lab)))
    config.num_labels = num_labels
    model = text._classifier_class()(config)
    model.bert.load_state_dict(masked_lm(lab).bert.state_dict())
    return model.eval()


# -- tasks -------------------------------------------------------------------------------------------------------------


def task(lab: Lab, name: str, seed: int, n: int, junk: float = 0.0) -> ClozeTask:
    """A draw of a task.

    Parameters
    ----------
    lab : Lab
    name : {"reviews", "docstrings"}
    seed : int
        Of labelled, unlabelled and test rows.
    n : int
        Labelled rows, as equally many of each class as that allows.
    junk : float, default=0
        This share of the unlabelled rows is replaced by text that belongs to no class: docstrings among reviews, reviews
        among docstrings.
    """
    many, tested = lab.pick(smoke=24, desk=2000), lab.pick(smoke=12, desk=1000)
    rng = np.random.default_rng([seed, n])
    if name == "reviews":
        texts, labels = reviews(many + tested + 20 * n, seed=seed)
        test_texts, test_labels = texts[:tested], labels[:tested]
        texts, labels = texts[tested:], labels[tested:]
        other = [row for rows in _topic_sentences(lab)[0] for row in rows]
        template, verbalizer = "{text} it was {mask} .", dict(enumerate(VERDICTS))
    else:
        train, test = _topic_sentences(lab)
        test = [[rows[i] for i in rng.permutation(len(rows))[: tested // len(TOPICS)]] for rows in test]
        texts, labels = _flat(train)
        test_texts, test_labels = _flat(test)
        other = reviews(many, seed=20_000 + seed)[0]
        template, verbalizer = "{text} this is about {mask} .", dict(enumerate(TOPICS.values()))
    order = rng.permutation(len(texts))
    chosen: list[int] = []
    for place in range(n):
        mine = [i for i in order if labels[i] == place % len(verbalizer)]
        chosen.append(int(mine[place // len(verbalizer)]))
    left = [int(i) for i in order if i not in set(chosen)][:many]
    unlabeled = [{"text": texts[i], "label": int(labels[i])} for i in left]
    for i in rng.permutation(len(unlabeled))[: round(junk * len(unlabeled))]:
        unlabeled[i] = {"text": other[int(rng.integers(len(other)))], "label": None}
    return ClozeTask(
        [{"text": texts[i], "label": int(labels[i])} for i in chosen],
        unlabeled,
        [{"text": t, "label": int(c)} for t, c in zip(test_texts, test_labels, strict=True)],
        template,
        verbalizer,
    )


def _flat(rows: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    labels = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    return [row for part in rows for row in part], labels
