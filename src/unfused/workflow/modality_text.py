"""Texts: windows of tokens, a small transformer, tokens left out and masked, TF-IDF."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from unfused.data.files import Quarantine
from unfused.data.manifest import Manifest
from unfused.data.records import NO_VALUE, Records
from unfused.workflow.modality import Corpus, Inputs, _new_array

__all__ = ["Text"]

VOCABULARY = 8000
LONGEST = 128  # tokens of a window
SHOWN = 1000  # characters of a text in `to_label.csv`


class Text:
    """One column of a table of records.

    Parameters
    ----------
    records : Records
    column : str
    width : int, default=32
        A quarter of the transformer's.
    """

    name = "text"
    task = "text-classification"
    # Of the directions of TF-IDF the first weigh most, and must: standardised, the labels of 20 intents of Banking77 spread
    # with .65 right instead of .74 (5 labels each; 20 each: .77 instead of .83).
    classic_on_one_scale = True

    def __init__(self, records: Records, column: str, width: int = 32) -> None:
        self.records, self.column, self.width = records, column, width
        self.notes: list[str] = []
        self.tokenizer: Any = None
        self.length = 0
        self.pool: np.ndarray | None = None

    def settings(self) -> dict[str, Any]:
        import tokenizers

        return {
            "modality": self.name,
            "encoder": f"ModernBERT, 2 layers of {4 * self.width}",
            "tokens": [VOCABULARY, LONGEST, tokenizers.__version__],
            "augment": "leave out 0.15, mask 0.05",
        }

    def read(
        self, manifest: Manifest, cache: Path, quarantine: Quarantine, progress: Callable | None = None
    ) -> Corpus:
        """The texts; empty ones and copies are set aside. Of several copies one with a label stays."""
        cells = self.records.column(self.column)
        texts = [" ".join((cell or "").split()) for cell in cells]
        first: dict[str, int] = {}
        for row in sorted(range(len(texts)), key=lambda row: (manifest.labels[row] is None, row)):
            first.setdefault(texts[row], row)
        usable = np.zeros(len(texts), bool)
        for row, text in enumerate(texts):
            kept = first[text]
            if text.lower() in NO_VALUE:
                quarantine.add(manifest.paths[row], f"no text: {text!r}" if text else "an empty text")
            elif kept != row:
                a, b = manifest.labels[row], manifest.labels[kept]
                unlike = f", which is labelled {b!r} and not {a!r}" if a is not None and a != b else ""
                quarantine.add(manifest.paths[row], f"a copy of another text: {manifest.paths[kept]}{unlike}")
            else:
                usable[row] = True
        if progress is not None:
            progress(len(texts), len(texts))
        chosen = manifest.select(usable)
        raw = [str(cell) for cell, good in zip(cells, usable, strict=True) if good]
        content = hashlib.blake2b(b"texts-1", digest_size=16)
        for path, text in zip(chosen.paths, raw, strict=True):
            content.update(f"{path}\0{text}\0".encode("utf-8", "surrogatepass"))
        return Corpus(chosen, raw, np.zeros(len(raw)), content.hexdigest())

    def inputs(self, corpus: Corpus, pool: np.ndarray, folder: Path) -> Inputs:
        """Train a tokenizer on the pool, and cut every text into windows of its tokens."""
        from unfused.nn.text_encoder import count_tokens, cut_texts, num_windows, train_tokenizer

        tokenizer = train_tokenizer(
            (text for text, inside in zip(corpus.raw, pool, strict=True) if inside), VOCABULARY, LONGEST
        )
        tokenizer.save_pretrained(folder / "tokenizer")
        sizes = count_tokens(tokenizer, corpus.raw)
        length = int(min(LONGEST, max(8, sizes.max() + 2)))
        clip = np.repeat(np.arange(len(sizes)), [num_windows(int(size), length) for size in sizes])
        values = _new_array(folder / "inputs.npy", (len(clip), length), np.int32)
        for index, (_, ids) in enumerate(cut_texts(tokenizer, corpus.raw, length)):
            values[index] = ids
        values.flush()  # type: ignore[attr-defined]
        return Inputs(values, clip, {"length": length, "vocabulary": len(tokenizer)})

    def attach(self, folder: Path, pool: np.ndarray) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.length = int(np.load(folder / "inputs.npy", mmap_mode="r").shape[1])
        self.pool = pool

    def encoder(self) -> Any:
        from unfused.nn.text_encoder import TextEncoder

        return TextEncoder(len(self.tokenizer), 4 * self.width)

    def augment(self, normaliser: dict[str, Any]) -> Any:
        from unfused.nn.augment_tokens import TokenAugment
        from unfused.nn.text_encoder import CLS, MASK, PAD, SEP

        return TokenAugment(PAD, MASK, (CLS, SEP))

    def classic_input(self, corpus: Corpus) -> np.ndarray:
        texts = np.empty(len(corpus), object)
        texts[:] = corpus.raw
        return texts

    def classic_features(self, corpus: Corpus) -> np.ndarray:
        """Leading directions of TF-IDF, learned from the pool: (n_texts, up to 128)."""
        from sklearn.decomposition import TruncatedSVD

        from unfused.finetune._classic_text import tf_idf

        inside = np.ones(len(corpus), bool) if self.pool is None else self.pool
        vectorizer = tf_idf("both")
        seen = vectorizer.fit_transform([corpus.raw[row] for row in np.flatnonzero(inside).tolist()])
        components = max(1, min(128, min(seen.shape) - 1))
        directions = TruncatedSVD(components, random_state=0).fit(seen)
        return directions.transform(vectorizer.transform(corpus.raw)).astype(np.float32)

    def classic(self, seed: int) -> Any:
        from unfused.finetune.classic import ClassicText

        return ClassicText(seed=seed)

    def classifier(self, encoder: Any, head: Any, classes: list[str]) -> Any:
        model = encoder.to_classifier(dict(enumerate(classes)), text_column=self.column, window=self.length)
        model.classifier.load_state_dict(head.state_dict())
        return model.eval()

    def processor(self, normaliser: dict[str, Any]) -> Any:
        return self.tokenizer

    def preview(self, path: Path) -> str | None:
        return None

    def shown(self, corpus: Corpus, row: int) -> dict[str, str]:
        text = corpus.raw[row]
        return {self.column: text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"}
