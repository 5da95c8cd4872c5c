"""A classifier of texts, pictures or recordings from its folder, and samples with labels from files."""

from __future__ import annotations

import os
from typing import Any

import torch

__all__ = ["load_classifier", "read_samples"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def load_classifier(folder: str) -> Any:
    """In eval mode; safetensors only."""
    from transformers import (
        AutoConfig,
        AutoModelForAudioClassification,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    config = AutoConfig.from_pretrained(folder)
    for auto in (
        AutoModelForSequenceClassification,
        AutoModelForImageClassification,
        AutoModelForAudioClassification,
    ):
        if type(config) in auto._model_mapping:
            return auto.from_pretrained(folder, use_safetensors=True).eval()
    raise ValueError(f"{folder}: {config.model_type} has no classifier in transformers")


def read_samples(source: Any, folder: str, model: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Inputs with `labels` (numbers of the model's classes by name, else in alphabetical order), and names of samples.

    Parameters
    ----------
    source : path
        A CSV or JSON-lines file with columns text and label, or what `unfused.data.manifest.read_manifest` takes.
    folder : str
        Of the model: its tokenizer or processor.
    model : nn.Module
    """
    kind = model.main_input_name
    if kind == "input_ids":
        from transformers import AutoTokenizer

        from unfused.data.tables import read_table

        table = read_table(source)
        texts = [text or "" for text in table.column("text", "sentence")]
        names = table.column("label", "class", "category", "target")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        longest = min(512, getattr(model.config, "max_position_embeddings", 512) or 512)
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        inputs, ids = dict(encoded), [f"row {i + 1}" for i in range(len(texts))]
    else:
        inputs, names, ids = _media(source, folder, kind)
    return {**inputs, "labels": _numbers(names, model.config, str(source))}, ids


def _media(
    source: Any, folder: str, kind: str
) -> tuple[dict[str, torch.Tensor], list[str | None], list[str]]:
    from unfused.data.manifest import read_manifest

    if kind == "pixel_values":
        from transformers import AutoImageProcessor

        from unfused.data.images import open_rgb

        found = read_manifest(source, extensions=PICTURES)
        processor = AutoImageProcessor.from_pretrained(folder)
        pictures = [open_rgb(found.root / path) for path in found.paths]
        return dict(processor(pictures, return_tensors="pt")), found.labels, found.paths
    from transformers import AutoFeatureExtractor

    from unfused.data.audio import decode

    found = read_manifest(source)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    rate = extractor.sampling_rate
    sounds = [decode(found.root / path, rate) for path in found.paths]
    return (
        dict(extractor(sounds, sampling_rate=rate, padding=True, return_tensors="pt")),
        found.labels,
        found.paths,
    )


def _numbers(names: list[str | None], config: Any, source: str) -> torch.Tensor:
    if any(name is None or not name.strip() for name in names):
        raise ValueError(f"{os.fspath(source)!r}: a sample has no label; every sample needs one")
    said = [str(name).strip() for name in names]
    known = {str(k): int(v) for k, v in (getattr(config, "label2id", None) or {}).items()}
    if set(said) <= set(known):
        return torch.tensor([known[name] for name in said])
    if all(name.isdigit() and int(name) < config.num_labels for name in said):
        return torch.tensor([int(name) for name in said])
    order = sorted(set(said))
    if len(order) != config.num_labels:
        raise ValueError(
            f"{source!r} has the labels {order[:5]}, the model {list(known)[:5]}: name them alike, or by number"
        )
    return torch.tensor([order.index(name) for name in said])
