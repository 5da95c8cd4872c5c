"""Text that ships with Python, a tiny BERT and a tiny Llama pretrained on it, and tasks for them.

The text is the docstrings of the standard library's sources. Eight areas of it (`AREAS`) name modules for training and
others, held out from all pretraining, for tests. The decoder has learned invented facts and small string tasks as well, so
that a claim can ask what tuning made it forget:

    The code of Velmora is 4821.        Which code has Velmora? 4821.
    copy b a t -> b a t                 reverse b a t -> t a b                 count b a t -> 3
"""

from __future__ import annotations

import ast
import functools
import math
import platform
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from unfused.claims.lab.tuning import Batch, Task, TuningWorld, tune

if TYPE_CHECKING:
    from transformers import BertForMaskedLM, LlamaForCausalLM, PreTrainedTokenizerFast

    from unfused.claims.lab import Lab

__all__ = [
    "AREAS",
    "STRING_TASKS",
    "areas_world",
    "bits_per_byte",
    "decoder",
    "docstrings",
    "encode",
    "exact_match",
    "fact_prompts",
    "facts",
    "held_out",
    "mask_tokens",
    "masked_lm",
    "pack",
    "pairs",
    "retained",
    "sentence_classifier",
    "sentences",
    "stdlib_areas",
    "stdlib_source",
    "string_task",
    "tokenizer",
]

LENGTH = 48
"""Tokens of a sentence for the encoder."""
WINDOW = 64
"""Tokens of a row for the decoder."""
INIT = 0.08
"""About 1/sqrt(width). At the usual 0.02 attention of this width stays flat for thousands of steps: no copying."""

AREAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (
        (
            "difflib",
            "textwrap",
            "re",
            "string",
            "html",
            "stringprep",
            "pprint",
            "reprlib",
            "shlex",
            "gettext",
        ),
        ("codecs", "encodings", "locale", "tokenize", "_markupbase"),
    ),
    "numbers": (("statistics", "fractions", "numbers", "random", "colorsys", "secrets"), ("_pydecimal",)),
    "files": (
        (
            "shutil",
            "pathlib",
            "tempfile",
            "os",
            "posixpath",
            "ntpath",
            "genericpath",
            "glob",
            "fnmatch",
            "_pyio",
        ),
        ("zipfile", "tarfile", "fileinput", "filecmp", "gzip", "bz2", "lzma"),
    ),
    "network": (
        ("http", "urllib", "ftplib", "imaplib", "smtplib", "poplib", "wsgiref", "socket"),
        ("ipaddress", "socketserver", "ssl", "xmlrpc"),
    ),
    "concurrency": (
        ("asyncio",),
        ("threading", "multiprocessing", "concurrent", "queue", "sched", "_threading_local"),
    ),
    "screen": (("tkinter",), ("turtle", "curses")),
    "testing": (("unittest",), ("doctest", "timeit", "trace")),
    "data": (
        ("xml", "json", "csv", "tomllib"),
        ("configparser", "plistlib", "pickletools", "pickle", "shelve"),
    ),
}
"""Area -> modules to train on, modules to test on. Some exist in some versions of Python only."""

NOT_LIBRARY = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "site-packages",
    "__pycache__",
}
STRING_TASKS = ("copy", "reverse", "count")

PAD, START, END, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"


# -- the standard library's text ---------------------------------------------------------------------------------------


def held_out() -> list[str]:
    """Modules that no backbone and no tokenizer has seen."""
    return sorted(name for _, test in AREAS.values() for name in test)


def docstrings(lab: Lab) -> dict[str, list[str]]:
    """Top-level module -> docstrings of all that is in it, whitespace collapsed, in the order of the sources."""
    only = (
        sorted({name for sides in AREAS.values() for side in sides for name in side})
        if lab.scale == "smoke"
        else []
    )
    return _once(lab.cached("stdlib-docstrings", _text_key(lab), lambda: _read_docstrings(only)))


def _text_key(lab: Lab) -> dict[str, Any]:
    """What the text depends on; at smoke scale, only the modules of the areas are read."""
    return {"python": platform.python_version(), "whole": lab.scale != "smoke"}


def _read_docstrings(only: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, path in _sources():
        if only and name not in only:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                found.setdefault(name, []).append(" ".join(text.split()))
    return found


def _once(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Each text once, where it comes first."""
    seen: set[str] = set()
    return {
        name: [text for text in texts if not (text in seen or seen.add(text))]  # type: ignore[func-returns-value]
        for name, texts in found.items()
    }


def _sources() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    inside = [p for p in paths if not NOT_LIBRARY & set(p.parts) and not p.parts[0].startswith("config-")]
    return [(p.parts[0].removesuffix(".py"), root / p) for p in sorted(inside)]


def sentences(texts: Iterable[str]) -> list[str]:
    """Sentences of 5 to 40 words, examples of code left out, each once."""
    found: dict[str, None] = {}
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            if ">>>" not in sentence and 5 <= len(re.findall(r"[A-Za-z]+", sentence)) <= 40:
                found[sentence] = None
    return list(found)


def stdlib_source(modules: Sequence[str], limit: int | None = None) -> str:
    """Source code of modules, one after the other, up to `limit` characters."""
    wanted = [path for name, path in _sources() if name in modules]
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in wanted)[:limit]


# -- tokens ------------------------------------------------------------------------------------------------------------


def tokenizer(lab: Lab) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2,048 tokens; digits stand alone, as do the letters of a spelled word."""

    def train() -> str:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        out = set(held_out())
        corpus = [text for name, texts in docstrings(lab).items() if name not in out for text in texts]
        for task in STRING_TASKS:
            prompts, answers = string_task(task, 2000, seed=0)
            corpus += [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        model.decoder = decoders.ByteLevel()
        model.train_from_iterator(
            corpus,
            trainers.BpeTrainer(
                vocab_size=2048,
                special_tokens=[PAD, START, END, MASK],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        return model.to_str()

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(lab.cached("stdlib-bpe", _text_key(lab), train)),
        pad_token=PAD,
        cls_token=START,
        sep_token=END,
        bos_token=START,
        eos_token=END,
        mask_token=MASK,
    )


def encode(words: PreTrainedTokenizerFast, texts: Sequence[str], length: int = LENGTH) -> Batch:
    """`[CLS] text [SEP]`, cut and padded to a length: `input_ids` and `attention_mask`, (N, length)."""
    rows = [
        [words.cls_token_id, *ids[: length - 2], words.sep_token_id]
        for ids in words(list(texts), add_special_tokens=False)["input_ids"]
    ]
    return _padded(rows, length, words.pad_token_id)


def _padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> Batch:
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


# -- the encoder -------------------------------------------------------------------------------------------------------


def mask_tokens(
    words: PreTrainedTokenizerFast, batch: Batch, generator: torch.Generator, probability: float = 0.15
) -> Batch:
    """BERT's corruption: of the chosen tokens 80 % masked, 10 % random, 10 % kept; adds `labels`, -100 elsewhere."""
    ids = batch["input_ids"]

    def uniform() -> torch.Tensor:
        return torch.rand(ids.shape, generator=generator)

    special = torch.tensor(words.all_special_ids)
    chosen = (uniform() < probability) & ~torch.isin(ids, special)
    fate = uniform()
    noise = torch.randint(len(special), len(words), ids.shape, generator=generator)
    corrupted = torch.where(chosen & (fate < 0.8), torch.tensor(words.mask_token_id), ids)
    corrupted = torch.where(chosen & (fate >= 0.9), noise, corrupted)
    return {**batch, "input_ids": corrupted, "labels": torch.where(chosen, ids, -100)}


def masked_lm(lab: Lab) -> BertForMaskedLM:
    """BERT (width 128, 4 layers, 4 heads, 48 positions) pretrained on the sentences of what is not held out."""
    from transformers import BertForMaskedLM

    steps = lab.pick(smoke=4, desk=800)

    def pretrain() -> dict[str, torch.Tensor]:
        words = tokenizer(lab)
        out = set(held_out())
        text = sentences(t for name, texts in docstrings(lab).items() if name not in out for t in texts)
        batch = encode(words, text[: lab.pick(smoke=200, desk=None)])
        generator = torch.Generator().manual_seed(0)
        views = [mask_tokens(words, batch, generator) for _ in range(lab.pick(smoke=1, desk=4))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BertForMaskedLM(_bert_config())
            tune(
                model,
                {name: torch.cat([view[name] for view in views]) for name in views[0]},
                lr=1e-3,
                steps=steps,
                batch_size=32,
                warmup=0.1,
            )
        return _untied(model)

    model = BertForMaskedLM(_bert_config())
    model.load_state_dict(
        lab.cached("stdlib-bert", {"steps": steps, **_text_key(lab)}, pretrain), strict=False
    )
    return model.eval()


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights, tied ones once."""
    named = {name for name, _ in model.named_parameters()}
    return {name: value for name, value in model.state_dict().items() if name in named}


def _bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        type_vocab_size=1,
        initializer_range=INIT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )


@functools.cache
def _classifier_class() -> type:
    """Made on first use: `transformers.BertPreTrainedModel` takes a second to import."""
    from transformers import BertModel
    from transformers.modeling_outputs import SequenceClassifierOutput
    from transformers.models.bert.modeling_bert import BertPreTrainedModel

    class SentenceClassifier(BertPreTrainedModel):
        """BERT, the mean of its tokens, a linear head: masked LM trains no pooler that a head could start from."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert = BertModel(config, add_pooling_layer=False)
            self.classifier = nn.Linear(config.hidden_size, config.num_labels)
            self.post_init()

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            labels: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            hidden = self.bert(input_ids, attention_mask=attention_mask, **kwargs)[0]  # (N, T, D)
            weight = torch.ones(hidden.shape[:2]) if attention_mask is None else attention_mask
            weight = weight[..., None].to(hidden)
            logits = self.classifier((hidden * weight).sum(1) / weight.sum(1))
            loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    return SentenceClassifier


def sentence_classifier(lab: Lab, num_labels: int) -> nn.Module:
    """The pretrained BERT under a mean over tokens and a new head, drawn from torch's global generator."""
    config = _bert_config()
    config.num_labels = num_labels
    model = _classifier_class()(config)
    model.bert.load_state_dict(masked_lm(lab).bert.state_dict())
    return model.eval()


def stdlib_areas(lab: Lab, seed: int, n: int = 800) -> Task:
    """Which of the eight areas does a docstring's sentence come from?

    `n` labelled sentences, as many of each area, 160 more to validate; about 1,400 from other modules to test. Sentences
    that both sides share are in neither.
    """
    words = tokenizer(lab)
    train_texts, train_labels, test_texts, test_labels = _area_sentences(lab)
    chosen: dict[str, list[int]] = {"train": [], "valid": []}
    order = np.random.default_rng(seed).permutation(len(train_texts))
    for area in range(len(AREAS)):
        rows = order[train_labels[order] == area]
        per_area = n // len(AREAS)
        if len(rows) < per_area + 20:
            raise ValueError(
                f"n={n}: the area {list(AREAS)[area]!r} has {len(rows)} sentences, 20 of them validate"
            )
        chosen["train"] += rows[:per_area].tolist()
        chosen["valid"] += rows[per_area : per_area + 20].tolist()

    def part(texts: Sequence[str], labels: np.ndarray) -> Batch:
        return {**encode(words, texts), "labels": torch.from_numpy(labels)}

    parts = {name: part([train_texts[i] for i in rows], train_labels[rows]) for name, rows in chosen.items()}
    return Task(parts["train"], parts["valid"], part(test_texts, test_labels), num_labels=len(AREAS))


def _area_sentences(lab: Lab) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    found = docstrings(lab)
    sides: list[tuple[list[str], list[int]]] = []
    for side, most in ((0, None), (1, 190)):  # at most 190 of an area to test
        texts: list[str] = []
        labels: list[int] = []
        for area, modules in enumerate(AREAS.values()):
            rows = sentences(t for name in modules[side] for t in found.get(name, ()))
            if most is not None:
                rows = [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:most])]
            texts += rows
            labels += [area] * len(rows)
        sides.append((texts, labels))
    (train, train_labels), (test, test_labels) = sides
    counts: dict[str, int] = {}
    for text in train + test:
        counts[text] = counts.get(text, 0) + 1
    keep = [[i for i, text in enumerate(texts) if counts[text] == 1] for texts in (train, test)]
    return (
        [train[i] for i in keep[0]],
        np.array(train_labels)[keep[0]],
        [test[i] for i in keep[1]],
        np.array(test_labels)[keep[1]],
    )


def areas_world(lab: Lab, n: int = 800) -> TuningWorld:
    """The classifier and `stdlib_areas`, for `unfused.claims.lab.tuning.compare`."""
    return TuningWorld(
        "stdlib areas",
        lambda num_labels: sentence_classifier(lab, num_labels),
        lambda seed: stdlib_areas(lab, seed, n),
    )


# -- the decoder -------------------------------------------------------------------------------------------------------


def facts(count: int = 400) -> list[tuple[str, str]]:
    """Invented names and their codes of four digits; the first of a longer list are the shorter list."""
    generator = np.random.default_rng(0)
    starts, ends = "bcdfghjklmnprstvz", ("n", "r", "l", "s", "x", "th", "nd", "m")
    found: dict[str, str] = {}
    while len(found) < count:
        syllables = ["".join(generator.choice(list(part)) for part in (starts, "aeiou")) for _ in range(3)]
        name = "".join(syllables[:2]).capitalize() + syllables[2][0] + "aeiou"[generator.integers(5)]
        name += ends[generator.integers(len(ends))]
        found.setdefault(name, f"{generator.integers(10_000):04d}")
    return list(found.items())


def fact_prompts(known: Sequence[tuple[str, str]], form: int = 0) -> tuple[list[str], list[str]]:
    """Prompts and answers of facts, as a statement (form 0) or as a question (form 1)."""
    template = ("The code of {} is", "Which code has {}?")[form]
    return [template.format(name) for name, _ in known], [f" {code}." for _, code in known]


def string_task(
    task: str, count: int, seed: int, letters: tuple[int, int] = (2, 5)
) -> tuple[list[str], list[str]]:
    """Prompts and answers of "copy", "reverse" or "count" on spelled words of random letters."""
    if task not in STRING_TASKS:
        raise ValueError(f"task={task!r}: choose one of {', '.join(STRING_TASKS)}")
    generator = np.random.default_rng([seed, STRING_TASKS.index(task)])
    prompts, answers = [], []
    for length in generator.integers(letters[0], letters[1] + 1, count):
        word = ["abcdefghijklmnopqrstuvwxyz"[i] for i in generator.integers(26, size=length)]
        answer = {"copy": " ".join(word), "reverse": " ".join(word[::-1]), "count": str(length)}[task]
        prompts.append(f"{task} {' '.join(word)} ->")
        answers.append(f" {answer}")
    return prompts, answers


def pairs(
    words: PreTrainedTokenizerFast, prompts: Sequence[str], answers: Sequence[str], length: int | None = None
) -> Batch:
    """`[CLS] prompt answer [SEP]`, padded at the right; `labels` of the answer and the end alone.

    Without `length`, the longest row's. Longer rows raise ValueError: a cut answer would be no answer.
    """
    asked = words(list(prompts), add_special_tokens=False)["input_ids"]
    said = words(list(answers), add_special_tokens=False)["input_ids"]
    rows = [[words.bos_token_id, *a, *b, words.eos_token_id] for a, b in zip(asked, said, strict=True)]
    longest = max(map(len, rows))
    if length is not None and longest > length:
        raise ValueError(f"length={length}: the longest prompt and answer have {longest} tokens")
    batch = _padded(rows, length or longest, words.pad_token_id)
    at = torch.arange(batch["input_ids"].shape[1])
    answered = at >= torch.tensor([[len(a) + 1] for a in asked])
    batch["labels"] = torch.where(answered & (batch["attention_mask"] == 1), batch["input_ids"], -100)
    return batch


def pack(
    words: PreTrainedTokenizerFast,
    texts: Sequence[str],
    length: int = WINDOW,
    whole: bool = True,
    prompts: Sequence[str] | None = None,
) -> Batch:
    """Texts as rows of `length` tokens, several to a row.

    Parameters
    ----------
    words : PreTrainedTokenizerFast
    texts : sequence of str
        Each is put between `[CLS]` and `[SEP]`.
    length : int, default=64
    whole : bool, default=True
        A text begins a new row where it would not fit. False cuts the stream of all texts into rows.
    prompts : sequence of str, optional
        One before each text, without labels; else all tokens are labels.
    """
    said = words(list(texts), add_special_tokens=False)["input_ids"]
    asked = (
        words(list(prompts), add_special_tokens=False)["input_ids"]
        if prompts is not None
        else [[]] * len(said)
    )
    rows: list[list[tuple[int, int]]] = [[]]  # (token, label)
    for before, after in zip(asked, said, strict=True):
        first = [words.bos_token_id, *before]
        ids = [*first, *after, words.eos_token_id]
        labels = ids if prompts is None else [*[-100] * len(first), *ids[len(first) :]]
        if whole and rows[-1] and len(rows[-1]) + len(ids) > length:
            rows.append([])
        rows[-1] += list(zip(ids, labels, strict=True))[: length if whole else None]
    if not whole:
        rows = [rows[0][i : i + length] for i in range(0, len(rows[0]), length)]
    batch = _padded([[token for token, _ in row] for row in rows], length, words.pad_token_id)
    return {
        **batch,
        "labels": _padded([[label for _, label in row] for row in rows], length, -100)["input_ids"],
    }


def decoder(lab: Lab, num_facts: int = 400) -> LlamaForCausalLM:
    """Llama (width 128, 4 layers, 4 heads, SwiGLU of 384) that knows docstrings, the facts and the string tasks."""
    from transformers import LlamaForCausalLM

    steps, batch_size = lab.pick(smoke=4, desk=900), 32

    def pretrain() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(_llama_config())
            data = _mix(lab, num_facts, steps * batch_size)
            tune(model, data, lr=2e-3, steps=steps, batch_size=batch_size, warmup=0.05)
        return _untied(model)

    model = LlamaForCausalLM(_llama_config())
    params = {"steps": steps, "facts": num_facts, **_text_key(lab)}
    model.load_state_dict(lab.cached("stdlib-llama", params, pretrain), strict=False)
    return model.eval()


def _mix(lab: Lab, num_facts: int, rows: int) -> Batch:
    """Rows of which 30 % are docstrings, 35 % facts in both forms, 35 % string tasks, a fifth of these counting."""
    words, out, generator = tokenizer(lab), set(held_out()), np.random.default_rng(0)
    parts: list[Batch] = []

    def add(share: float, texts: list[str], prompts: list[str] | None = None, whole: bool = True) -> None:
        wanted, found = math.ceil(share * rows), 0
        while found < wanted:
            some = generator.permutation(len(texts))[: 8 * wanted]
            asked = None if prompts is None else [prompts[i] for i in some]
            batch = pack(words, [texts[i] for i in some], WINDOW, whole, asked)
            parts.append({name: column[: wanted - found] for name, column in batch.items()})
            found += len(parts[-1]["labels"])

    add(0.3, [t for name, texts in docstrings(lab).items() if name not in out for t in texts], whole=False)
    known = facts(num_facts)
    add(0.35, [p + a for form in (0, 1) for p, a in zip(*fact_prompts(known, form), strict=True)])
    for task, share in (("copy", 0.14), ("reverse", 0.14), ("count", 0.07)):
        prompts, answers = string_task(task, 8 * math.ceil(share * rows), seed=1)
        add(share, answers, prompts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=INIT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@torch.inference_mode()
def exact_match(
    model: nn.Module, words: PreTrainedTokenizerFast, prompts: Sequence[str], answers: Sequence[str]
) -> float:
    """Share of prompts that greedy decoding answers exactly, the end included.

    The greedy answer is the right one just when each of its tokens is the most likely after the right ones before it, so
    one forward pass tells.
    """
    batch = pairs(words, prompts, answers)
    right = []
    for start in range(0, len(prompts), 256):
        part = {name: column[start : start + 256] for name, column in batch.items()}
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        labels = part["labels"][:, 1:]
        right.append(((logits[:, :-1].argmax(-1) == labels) | (labels == -100)).all(1))
    return float(torch.cat(right).float().mean())


@torch.inference_mode()
def bits_per_byte(model: nn.Module, words: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Cross-entropy of texts in rows of 64 tokens, in bits per byte of UTF-8; a row's first token is not counted."""
    rows = pack(words, texts, WINDOW, whole=False)
    nats = 0.0
    for start in range(0, len(rows["labels"]), 128):
        part = {name: column[start : start + 128] for name, column in rows.items()}
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        nats += float(
            nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                part["labels"][:, 1:].flatten(),
                ignore_index=-100,
                reduction="sum",
            )
        )
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def retained(lab: Lab, model: nn.Module, num_facts: int = 400) -> dict[str, float]:
    """What a decoder still knows: facts in either form, string tasks on new words, docstrings of held-out modules."""
    words, known = tokenizer(lab), facts(num_facts)
    size = lab.pick(smoke=20, desk=300)
    found = {
        "facts": exact_match(model, words, *fact_prompts(known, 0)),
        "facts_asked": exact_match(model, words, *fact_prompts(known, 1)),
    }
    found |= {task: exact_match(model, words, *string_task(task, size, seed=2)) for task in STRING_TASKS}
    unseen = [text for name in held_out() for text in docstrings(lab).get(name, ())]
    return found | {"bits_per_byte": bits_per_byte(model, words, unseen[:: max(1, len(unseen) // size)])}
