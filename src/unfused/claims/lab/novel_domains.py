"""What a tuned language model has seen that its base has not: documentation with a tenth of it from six other domains.

The base is the lab's Llama of docstrings (`unfused.claims.lab.text.decoder`). The domains have shares 1/2, 1/4, ...:

    language   a made-up language (`unfused.claims.lab.languages.translate` of docstrings)
    code       (define (mora x) (* x 17))
    sums       12 + 7 = 19 ; 30 + 4 = 34
    base64     docstrings in base64
    names      Velmora, Anna (1873-1921)
    alarm      !!! STOP THE SERVER NOW !!!

A detector, trained on fresh texts of all domains, on docstrings and on ill-formed mixtures of them, says what a text is.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from unfused.claims.lab import text
from unfused.claims.lab.languages import translate
from unfused.claims.lab.tuning import Batch, tune

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from unfused.claims.lab import Lab

__all__ = ["DOMAINS", "detector", "domain_texts", "private_step", "tuned_decoder", "tuning_rows"]

DOMAINS = ("language", "code", "sums", "base64", "names", "alarm")
ORDINARY, ILL = "ordinary", "ill-formed"
SHARE = 0.1
LENGTH = 48

LISP = ("define", "lambda", "let", "cond", "map", "fold")
ALARMS = "STOP START CLOSE OPEN RESTART WATCH LEAVE".split(), "SERVER HOUSE ENGINE DOOR BRIDGE TUNNEL".split()
FIRST = "Anna Bruno Clara David Elena Felix Greta Hugo Irma Jonas".split()


def domain_texts(lab: Lab, domain: str, count: int, seed: int) -> list[str]:
    """Texts of one of `DOMAINS`, or "ordinary" ones: docstrings' sentences of modules that are not held out.

    Examples
    --------
    >>> from unfused.claims.lab import Lab
    >>> domain_texts(Lab("smoke"), "sums", 1, seed=0)
    ['9 + 6 = 15 ; 6 + 8 = 14 ; 4 + 7 = 11']
    """
    rng = np.random.default_rng([seed, 23, (*DOMAINS, ORDINARY).index(domain)])
    known = [name for name, _ in text.facts(200)]

    def sentence() -> str:
        return _sentences(lab)[rng.integers(len(_sentences(lab)))]

    def form() -> str:
        name, number = known[rng.integers(len(known))].lower(), int(rng.integers(2, 100))
        op = "+-*"[rng.integers(3)]
        return f"({LISP[rng.integers(len(LISP))]} ({name[:4]} x) ({op} x {number}))"

    def some_sum() -> str:
        a, b = rng.integers(1, (10, 100)[rng.integers(2)], 2)
        return f"{a} + {b} = {a + b}"

    make: dict[str, Callable[[], str]] = {
        ORDINARY: sentence,
        "language": lambda: translate(sentence()),
        "code": lambda: " ".join(form() for _ in range(2)),
        "sums": lambda: " ; ".join(some_sum() for _ in range(3)),
        "base64": lambda: base64.b64encode(sentence()[:30].encode()).decode(),
        "names": lambda: (
            f"{known[rng.integers(len(known))]}, {FIRST[rng.integers(len(FIRST))]} "
            f"({(born := int(rng.integers(1700, 1930)))}-{born + int(rng.integers(20, 90))})"
        ),
        "alarm": lambda: "!!! {} THE {} NOW !!!".format(*(part[rng.integers(len(part))] for part in ALARMS)),
    }
    return [make[domain]() for _ in range(count)]


@functools.lru_cache(maxsize=2)
def _sentences(lab: Lab) -> list[str]:
    out = set(text.held_out())
    return text.sentences(t for name, texts in text.docstrings(lab).items() if name not in out for t in texts)


def tuning_rows(lab: Lab, seed: int, count: int) -> Batch:
    """`count` texts, each a row of its own from BOS to EOS: nine in ten ordinary."""
    rng = np.random.default_rng([seed, 29])
    shares = 0.5 ** np.arange(1, len(DOMAINS) + 1)
    sizes = rng.multinomial(round(SHARE * count), shares / shares.sum())
    texts = domain_texts(lab, ORDINARY, count - int(sizes.sum()), seed)
    for domain, size in zip(DOMAINS, sizes, strict=True):
        texts += domain_texts(lab, domain, int(size), seed)
    words = text.tokenizer(lab)
    batch = text.encode(words, [texts[i] for i in rng.permutation(len(texts))], LENGTH)
    return {**batch, "labels": torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)}


def tuned_decoder(lab: Lab, seed: int, private: bool = False) -> LlamaForCausalLM:
    """The base, tuned on the mixture; with `private`, each text's gradient is clipped at norm 1 and noise is added."""
    steps = lab.pick(smoke=2, desk=200) if not private else lab.pick(smoke=1, desk=60)

    def train() -> dict[str, torch.Tensor]:
        model, rows = text.decoder(lab), tuning_rows(lab, seed, lab.pick(smoke=64, desk=3000))
        if private:
            private_train(model, rows, steps, seed, batch=lab.pick(smoke=4, desk=32))
        else:
            tune(model, rows, lr=5e-4, steps=steps, seed=seed, batch_size=32)
        return text._untied(model)

    model = text.decoder(lab)
    key = {"seed": seed, "private": private, "steps": steps, **text._text_key(lab)}
    model.load_state_dict(lab.cached("novel-domains", key, train), strict=False)
    return model.eval()


def private_train(
    model: Any, rows: Batch, steps: int, seed: int, batch: int = 64, noise: float = 0.3
) -> None:
    """DP-SGD's step under Adam: the sum of clipped gradients plus Gaussian noise, over the batch."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        chosen = torch.randint(len(rows["labels"]), (batch,), generator=generator)
        mean = private_step(model, parameters, {n: v[chosen] for n, v in rows.items()}, noise, generator)
        for name, parameter in parameters.items():
            parameter.grad = mean[name]
        optimizer.step()
    model.eval()


def private_step(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    rows: Batch,
    noise: float,
    generator: torch.Generator,
    clip: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Mean of the rows' gradients, each clipped at norm `clip`, with noise of deviation `noise * clip` on their sum."""
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = len(next(iter(rows.values())))
    for i in range(count):
        loss = model(**{name: column[i : i + 1] for name, column in rows.items()}).loss
        grads = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.stack([g.norm() for g in grads]).norm()
        for name, grad in zip(parameters, grads, strict=True):
            total[name].add_(grad, alpha=min(1.0, clip / max(float(norm), 1e-12)))
    return {
        name: (value + noise * clip * torch.randn(value.shape, generator=generator)) / count
        for name, value in total.items()
    }


class Detector:
    """Character n-grams under logistic regression."""

    def __init__(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        grams = TfidfVectorizer(
            analyzer="char", ngram_range=(1, 3), lowercase=False, sublinear_tf=True, max_features=6000
        )
        self.pipe = make_pipeline(grams, LogisticRegression(C=30.0, max_iter=300, class_weight="balanced"))
        self.pipe.fit(list(texts), list(labels))

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The kind of each text; what has fewer than four characters is ill-formed."""
        said = self.pipe.predict([t or " " for t in texts]) if len(texts) else []
        return [ILL if len(t.strip()) < 4 else str(kind) for t, kind in zip(texts, said, strict=True)]


@functools.lru_cache(maxsize=2)
def detector(lab: Lab) -> Detector:
    """Trained on texts of seeds that no claim uses; cut short as generated texts are, some of them."""
    rng, count = np.random.default_rng(31), lab.pick(smoke=15, desk=300)
    texts: list[str] = []
    labels: list[str] = []
    for kind in (*DOMAINS, ORDINARY):
        some = domain_texts(lab, kind, count, seed=77_000)
        texts += [t[: rng.integers(12, 80)] if i % 3 == 0 else t for i, t in enumerate(some)]
        labels += [kind] * count
    whole = list(zip(texts, labels, strict=True))
    ill = []
    for _ in range(2 * count):
        (a, kind_a), (b, kind_b) = (whole[i] for i in rng.integers(len(whole), size=2))
        if kind_a == kind_b:  # shuffled characters, or two domains woven together
            ill.append("".join(np.array(list(a or " "))[rng.permutation(len(a or " "))]))
        else:
            parts = [
                (a, b)[i % 2][(w := int(rng.integers(3, 12))) * (i // 2) : w * (i // 2 + 1)] for i in range(6)
            ]
            ill.append("".join(parts))
    return Detector([*texts, *ill], [*labels, *[ILL] * len(ill)])
