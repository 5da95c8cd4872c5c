"""Skill localization from the command line: a sequence classifier, and tables of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unfused.data.files import printable

__all__ = ["read_models", "text_batches"]


def read_models(base: str, tuned: str) -> tuple[Any, Any, Any]:
    """Base, tuned model and the tuned model's tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tuned, use_safetensors=True)
    # The base's head is drawn anew where it has none of this size: it is copied from the tuned model.
    before = AutoModelForSequenceClassification.from_pretrained(
        base, use_safetensors=True, num_labels=model.config.num_labels, ignore_mismatched_sizes=True
    )
    return before, model, AutoTokenizer.from_pretrained(tuned)


def text_batches(path: Path, words: Any, config: Any, text: str, label: str, batch_size: int) -> list[Any]:
    """Batches of a table with a text and a label column."""
    import pandas as pd

    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{printable(path)}: give a .csv or a .jsonl")
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_json(path, lines=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(path)} cannot be read: {error}") from None
    for column in (text, label):
        if column not in table.columns:
            raise ValueError(
                f"{printable(path)} has no column {column!r}: its columns are {list(table.columns)}"
            )
    known = {str(name): int(i) for name, i in (getattr(config, "label2id", None) or {}).items()}
    known |= {str(i): i for i in range(config.num_labels)}
    if unknown := sorted({str(v) for v in table[label]} - set(known)):
        raise ValueError(
            f"{printable(path)}: label {unknown[0]!r} is none of the model's: {', '.join(known)}"
        )
    found = []
    for start in range(0, len(table), batch_size):
        rows = table.iloc[start : start + batch_size]
        batch = words([str(t) for t in rows[text]], padding=True, truncation=True, return_tensors="pt")
        found.append({**batch, "labels": torch.tensor([known[str(v)] for v in rows[label]])})
    return found
