"""Two black boxes that learn in context: a small decoder trained to, and cosines of word vectors that imitate one.

*Rules.* A sequence is four prompt tokens, then texts of six symbols, each with its label. A symbol has four binary attributes;
one of twelve rules gives the label (majority of an attribute, the first or last symbol's, order, agreement, some negated).
Prompt tokens are names of the rule, eight synonyms each, lost in half of the sequences and now and then another rule's; up to a
fifth of the labels shown are false. So prompt and demonstrations both carry evidence, and neither all of it.

*Topics.* Which area of the standard library does a docstring's sentence come from? The score of a class is the cosine of the
sentence to prompt words and class word in a latent semantic space, plus a vote of the demonstrations. It answers like an API,
but is no language model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unfused.claims.lab.text import AREAS, docstrings, held_out, sentences
from unfused.claims.lab.tuning import tune

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from unfused.claims.lab import Lab

__all__ = [
    "RULES",
    "Problem",
    "RuleBox",
    "TopicBox",
    "decoder",
    "rule_labels",
    "rules_problem",
    "topics_problem",
]

SYMBOLS, TEXT, PROMPT, DEMOS, SYNONYMS, FILLERS = 16, 6, 4, 8, 8, 24
RULES = (
    *(f"majority of attribute {j}" for j in range(4)),
    *(f"no majority of attribute {j}" for j in range(2)),
    *(f"attribute {j} of the first" for j in range(2)),
    *(f"attribute {j} of the last" for j in (2, 3)),
    "attribute 0 in the first half",
    "first and last agree in attribute 1",
)
LABEL, NAME = 1 + SYMBOLS, 3 + SYMBOLS
FILLER = NAME + len(RULES) * SYNONYMS
VOCABULARY = FILLER + FILLERS
LENGTH = PROMPT + (DEMOS + 1) * (TEXT + 1)


@dataclass(frozen=True, eq=False)
class Problem:
    """What a learner is given, and what it is judged by.

    Attributes
    ----------
    box : callable
    classes : list of str
    vocab : list of str
        Candidate tokens of the prompt.
    texts, test : list of str
    labels, test_labels : ndarray of int
    initial_prompt : tuple of str
    """

    box: Any
    classes: list[str]
    vocab: list[str]
    texts: list[str]
    labels: np.ndarray
    test: list[str]
    test_labels: np.ndarray
    initial_prompt: tuple[str, ...]


# -- rules -------------------------------------------------------------------------------------------------------------


def rule_labels(rule: np.ndarray | int, x: np.ndarray) -> np.ndarray:
    """Labels 0 or 1 of texts by their rules: rules (n,), symbols 0 to 15 (n, k, 6) -> (n, k)."""
    bit = [(x >> j) & 1 for j in range(4)]  # each (n, k, 6)

    def majority(j: int) -> np.ndarray:
        count = bit[j].sum(-1)
        return np.where(count == TEXT // 2, bit[j][..., 0], count > TEXT // 2)

    first_half, second_half = bit[0][..., : TEXT // 2].sum(-1), bit[0][..., TEXT // 2 :].sum(-1)
    found = np.stack(
        [
            *(majority(j) for j in range(4)),
            *(1 - majority(j) for j in range(2)),
            *(bit[j][..., 0] for j in range(2)),
            *(bit[j][..., -1] for j in (2, 3)),
            np.where(first_half == second_half, bit[0][..., 0], first_half > second_half),
            bit[1][..., 0] == bit[1][..., -1],
        ]
    ).astype(np.int64)
    return found[rule, np.arange(len(x))] if np.ndim(rule) else found[rule]


def _sequences(count: int, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng([seed, 11])
    rule = rng.integers(len(RULES), size=count)
    x = rng.integers(SYMBOLS, size=(count, DEMOS + 1, TEXT))
    true = rule_labels(rule, x)
    false = rng.random(true.shape) < 0.2 * rng.random((count, 1))
    shown = np.where(false, 1 - true, true)
    name = np.where(
        rng.random((count, PROMPT)) < 0.1, rng.integers(len(RULES), size=(count, PROMPT)), rule[:, None]
    )
    tokens = NAME + name * SYNONYMS + rng.integers(SYNONYMS, size=name.shape)
    kept = (rng.random((count, PROMPT)) < rng.random((count, 1))) & (rng.random((count, 1)) < 0.5)
    prompt = np.where(kept, tokens, rng.integers(FILLER, VOCABULARY, size=name.shape))
    pairs = np.concatenate([1 + x, (LABEL + shown)[..., None]], -1)
    wanted = np.full_like(pairs, -100)
    wanted[..., -1] = LABEL + true  # the truth is asked for, whatever is shown
    ids = np.concatenate([prompt, pairs.reshape(count, -1)], 1)
    labels = np.concatenate([np.full_like(prompt, -100), wanted.reshape(count, -1)], 1)
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def decoder(lab: Lab) -> LlamaForCausalLM:
    """Llama (width 96, 3 layers, 4 heads) trained on sequences of all rules."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH + 1,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    steps = lab.pick(smoke=3, desk=1500)

    def pretrain() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
            tune(model, _sequences(steps * 64, seed=0), lr=2e-3, steps=steps, batch_size=64, warmup=0.05)
        return dict(model.state_dict())

    model = LlamaForCausalLM(config)
    model.load_state_dict(lab.cached("rules-decoder", {"steps": steps}, pretrain))
    return model.eval()


def _words() -> dict[str, int]:
    """Every word of the black box: symbols, names without a meaning to the eye, fillers."""
    shuffled = np.random.default_rng(0).permutation(FILLERS + len(RULES) * SYNONYMS)
    words = {f"s{i}": 1 + i for i in range(SYMBOLS)}
    return words | {f"w{w}": NAME + place for place, w in enumerate(shuffled.tolist())}


class RuleBox:
    """The decoder, asked by `unfused.label.Query`: texts of words `s0` to `s15`, prompts of words `w0` to `w119`."""

    class_words = ("no", "yes")

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model, self.words = model, _words()

    def __sklearn_clone__(self) -> RuleBox:
        return self

    def __call__(self, queries: Sequence[Any]) -> np.ndarray:
        rows = [self._ids(query) for query in queries]
        ends = torch.tensor([len(row) - 1 for row in rows])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            hidden = self.model.model(input_ids=ids)[0][torch.arange(len(rows)), ends]
            logits = self.model.lm_head(hidden)[:, [LABEL, LABEL + 1]]
        return logits.softmax(-1).double().numpy()

    def _ids(self, query: Any) -> list[int]:
        prompt = [self.words.get(word, FILLER) for token in query.prompt for word in token.split()][:PROMPT]
        row = prompt + [FILLER] * (PROMPT - len(prompt))
        for text, label in query.demos[-DEMOS:]:
            row += [*(self.words.get(word, FILLER) for word in text.split()[:TEXT]), LABEL + label]
        return row + [self.words.get(word, FILLER) for word in query.text.split()[:TEXT]]


def rules_problem(lab: Lab, seed: int, prompt: str) -> Problem:
    """A rule to find, another for each seed.

    Parameters
    ----------
    lab : Lab
    seed : int
    prompt : {"wrong", "mixed"}
        The first prompt has a name of a rule that agrees with the true one on about two texts in three, and in "mixed" a name
        of the true one besides, which the vocabulary lacks.
    """
    rng = np.random.default_rng([seed, 5])
    n = lab.pick(smoke=30, desk=400)
    x = rng.integers(SYMBOLS, size=(2 * n, TEXT))
    rule = int(np.random.default_rng(3).permutation(len(RULES))[seed % len(RULES)])
    labels = rule_labels(rule, x)
    probe = rng.integers(SYMBOLS, size=(2000, TEXT))
    agree = np.array([(rule_labels(r, probe) == rule_labels(rule, probe)).mean() for r in range(len(RULES))])
    wrong = int(np.abs(agree - 0.67).argmin())
    names = np.array(sorted(_words(), key=_words().__getitem__)[SYMBOLS:])
    synonyms, fillers = names[:-FILLERS].reshape(len(RULES), SYNONYMS), names[-FILLERS:]
    candidates = [str(word) for word in rng.permutation([*synonyms[:, :2].ravel(), *fillers])]  # 48
    first = [synonyms[wrong, 5], *([synonyms[rule, 6]] if prompt == "mixed" else [])]
    first += fillers[: PROMPT - len(first)].tolist()
    texts = [" ".join(f"s{i}" for i in row) for row in x.tolist()]
    box = RuleBox(decoder(lab))
    return Problem(
        box,
        list(box.class_words),
        candidates,
        texts[:n],
        labels[:n],
        texts[n:],
        labels[n:],
        tuple(map(str, first)),
    )


# -- topics ------------------------------------------------------------------------------------------------------------

TOPICS = {"files": "paper", "network": "remote", "concurrency": "together", "testing": "trial"}
"""Area of `text.AREAS` -> its class word, poor on purpose."""


class TopicBox:
    """Scores by cosines in the space of a truncated SVD of TF-IDF, as probabilities."""

    class_words = tuple(TOPICS.values())

    def __init__(self, corpus: Sequence[str], dimensions: int) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline

        words = TfidfVectorizer(sublinear_tf=True, min_df=2)
        self.space = make_pipeline(words, TruncatedSVD(dimensions, random_state=0)).fit(corpus)
        self._known: dict[str, np.ndarray] = {}

    def __sklearn_clone__(self) -> TopicBox:
        return self

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Rows of length 1, (n, d); 0 for texts without a known word."""
        fresh = list(dict.fromkeys(text for text in texts if text not in self._known))
        if fresh:
            rows = self.space.transform(fresh)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
            self._known.update(zip(fresh, rows, strict=True))
        return np.array([self._known[text] for text in texts])

    def __call__(self, queries: Sequence[Any]) -> np.ndarray:
        x = self.embed([query.text for query in queries])  # (n, d)
        named = [
            self.embed([" ".join([*query.prompt, word]) for word in self.class_words]) for query in queries
        ]
        scores = np.einsum("nd,ncd->nc", x, np.array(named))
        for i, query in enumerate(queries):
            if query.demos:
                near = self.embed([text for text, _ in query.demos]) @ x[i]
                np.add.at(scores[i], [label for _, label in query.demos], near / len(query.demos))
        scores = np.exp(8 * (scores - scores.max(1, keepdims=True)))
        return scores / scores.sum(1, keepdims=True)


@functools.lru_cache(maxsize=2)
def _topic_box(lab: Lab) -> TopicBox:
    out, found = set(held_out()), docstrings(lab)
    corpus = sentences(t for name in sorted(set(found) - out) for t in found[name])
    return TopicBox(corpus[: lab.pick(smoke=400, desk=None)], lab.pick(smoke=16, desk=100))


def topics_problem(lab: Lab, seed: int) -> Problem:
    """Sentences of modules that the space was made from, and of others to test."""
    rng, n = np.random.default_rng([seed, 9]), lab.pick(smoke=32, desk=400)
    found, box = docstrings(lab), _topic_box(lab)
    parts = []
    for side in (0, 1):
        rows = [sentences(t for name in AREAS[area][side] for t in found.get(name, ())) for area in TOPICS]
        picked = [[part[i] for i in rng.permutation(len(part))[: n // len(TOPICS)]] for part in rows]
        labels = np.repeat(np.arange(len(TOPICS)), [len(part) for part in picked])
        order = rng.permutation(len(labels))
        texts = [text for part in picked for text in part]
        parts.append(([texts[i] for i in order], labels[order]))
    counts = np.asarray((box.space[0].transform(parts[0][0]) > 0).sum(0)).ravel()
    frequent = np.argsort(-counts, kind="stable")[:200]
    words = box.space[0].get_feature_names_out()[rng.permutation(frequent)[:48]]
    vocab = [str(word) for word in words]
    return Problem(box, list(box.class_words), vocab, *parts[0], *parts[1], initial_prompt=(vocab[0],))
