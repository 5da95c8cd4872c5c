"""Encoders from elsewhere (`--encoder`): features of a corpus, class names in the same space, fine-tuning.

A model of transformers or sentence-transformers has a front end of its own, so the items themselves are read again and given
to it. `open_foreign` makes one `Foreign` for a run; nothing is loaded before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unfused.data.files import BadFile, printable
from unfused.train.data import ArrayDataset
from unfused.workflow.modality import Corpus, Modality
from unfused.workflow.settings import TEACHERS

__all__ = ["Foreign", "open_foreign"]

TEXT_SCALE = (
    20.0  # of cosines, where a model has no temperature of its own: what sentence-transformers train with
)


def open_foreign(teacher: str, modality: Modality, corpus: Corpus, cache: Path | None = None) -> Foreign:
    """The encoder called `teacher` for this kind of items; `cache` is a folder for its features.

    Raises
    ------
    ValueError
        For rows of a table, whose columns no pretrained encoder knows.
    """
    kinds = {"audio": _Recordings, "image": _Pictures, "text": _Texts}
    if modality.name not in kinds:
        raise ValueError(
            f"teacher={teacher!r}: no pretrained encoder knows the columns of a table; give {', '.join(TEACHERS)}"
        )
    return kinds[modality.name](teacher, modality, corpus, cache)


class Foreign:
    """See `open_foreign`."""

    def __init__(self, teacher: str, modality: Modality, corpus: Corpus, cache: Path | None) -> None:
        self.teacher, self.modality, self.corpus, self.cache = teacher, modality, corpus, cache

    def features(self) -> tuple[np.ndarray, int]:
        """What is clustered: (n, d), and how many weights the encoder has."""
        encoder = self.encoder()  # kept until the end: what it has loaded is not loaded again to be counted
        found = _named_teacher(lambda: encoder.transform(self.items()))
        tower = encoder._tower(*encoder._source())
        return found.astype(np.float32), sum(p.numel() for p in tower.model.parameters())

    def trainable(self, rows: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, Iterator[torch.Tensor]]:
        """The encoder to fine-tune, the labelled items as it takes them, and, when asked for, embeddings of all items."""
        raise NotImplementedError

    # -- the space that it may share with texts --------------------------------------------------------------

    def encoder(self) -> Any:
        """A `FrozenEncoder` for these items."""
        from unfused.data.frozen_encoder import FrozenEncoder

        return FrozenEncoder(
            self.teacher, modality=self.modality.name, bf16=False, progress=False, cache_dir=self.cache
        )

    def shared_features(self) -> np.ndarray:
        """Features in the space of the class names, where there is one."""
        return _named_teacher(lambda: self.encoder().transform(self.items()))

    @cached_property
    def reads_texts(self) -> bool:
        from unfused.nn.frozen import describe

        return "text" in _named_teacher(lambda: describe(self.teacher)).modalities

    def class_features(
        self, names: Sequence[str], templates: Sequence[str] | None
    ) -> tuple[np.ndarray, float]:
        """Unit vectors of the class names (underscores are blanks), and the factor on cosines with them."""
        spoken = [name.replace("_", " ") for name in names]
        if len(set(spoken)) < len(spoken):
            spoken = list(names)
        encoder = self.encoder()
        found = encoder.encode_classes(spoken, templates)
        try:
            return found, float(encoder.logit_scale)
        except ValueError:
            return found, TEXT_SCALE

    def items(self) -> list[Any]:
        root = self.corpus.manifest.root
        return [root / path for path in self.corpus.manifest.paths]


class _Recordings(Foreign):
    def waveforms(self, rows: np.ndarray, sampling_rate: int, chunk: int = 16) -> Iterator[list[np.ndarray]]:
        """Decoded anew, in chunks."""
        from unfused.data.audio import decode

        names, root = self.corpus.manifest.paths, self.corpus.manifest.root
        for start in range(0, len(rows), chunk):
            chosen = [names[row] for row in rows[start : start + chunk]]
            yield [_again(name, decode, root / name, sampling_rate) for name in chosen]

    def features(self) -> tuple[np.ndarray, int]:
        from unfused.nn.encoders import load_teacher

        model = load_teacher(self.teacher)
        chunks = self.waveforms(np.arange(len(self.corpus)), model.sampling_rate)
        found = np.concatenate([model.embed_waveforms(chunk) for chunk in chunks])
        return found.astype(np.float32), sum(p.numel() for p in model.parameters())

    def trainable(self, rows: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, Iterator[torch.Tensor]]:
        from unfused.nn.encoders import load_teacher

        model = load_teacher(self.teacher)
        waveforms = next(self.waveforms(rows, model.sampling_rate, len(rows)))
        every = self.waveforms(np.arange(len(self.corpus)), model.sampling_rate)
        embedded = (torch.from_numpy(model.embed_waveforms(chunk)) for chunk in every)
        return model, _Waveforms(model, waveforms, labels), embedded


class _Pictures(Foreign):
    def trainable(self, rows: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, Iterator[torch.Tensor]]:
        from unfused.nn import frozen
        from unfused.nn.encoders import PretrainedImageEncoder

        model = PretrainedImageEncoder(frozen.load(frozen.describe(self.teacher), "image"))
        paths = self.items()
        data = _Files(model, [paths[row] for row in rows.tolist()], labels)
        chunks = (paths[start : start + 32] for start in range(0, len(paths), 32))
        return model, data, (model.embed(**model.prepare(_pictures(chunk))) for chunk in chunks)


class _Texts(Foreign):
    def items(self) -> list[Any]:
        return list(self.corpus.raw)

    def trainable(self, rows: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, Iterator[torch.Tensor]]:
        from unfused.nn import frozen
        from unfused.nn.text_encoder import PretrainedTextEncoder

        model = PretrainedTextEncoder(frozen.load(frozen.describe(self.teacher), "text"))
        texts = self.items()
        data = ArrayDataset(
            **model.prepare([texts[row] for row in rows.tolist()]), labels=torch.from_numpy(labels)
        )
        chunks = (texts[start : start + 64] for start in range(0, len(texts), 64))
        return model, data, (model.embed(**model.prepare(chunk)) for chunk in chunks)


class _Waveforms(ArrayDataset):
    """Labelled waveforms, cut at `seconds`, as batches of a transformers encoder's own inputs."""

    def __init__(
        self, teacher: Any, waveforms: list[np.ndarray], labels: np.ndarray, seconds: float = 5.0
    ) -> None:
        super().__init__(labels=torch.from_numpy(labels))
        longest, shortest = int(seconds * teacher.sampling_rate), teacher.sampling_rate // 10
        self.teacher = teacher
        self.waveforms = [np.pad(w[:longest], (0, max(0, shortest - len(w)))) for w in waveforms]

    def __getitems__(self, indices: Any) -> dict[str, Any]:
        return super().__getitems__(indices) | self.teacher.prepare([self.waveforms[i] for i in indices])


class _Files(ArrayDataset):
    """Labelled pictures, read when their batch is drawn, as batches of an encoder's own inputs."""

    def __init__(self, encoder: Any, paths: list[Any], labels: np.ndarray) -> None:
        super().__init__(labels=torch.from_numpy(labels))
        self.encoder, self.paths = encoder, paths

    def __getitems__(self, indices: Any) -> dict[str, Any]:
        pictures = _pictures([self.paths[index] for index in indices])
        return super().__getitems__(indices) | self.encoder.prepare(pictures)


def _pictures(paths: Sequence[Any]) -> list[Any]:
    from unfused.data.images import open_rgb

    return [_again(path, open_rgb, path) for path in paths]


def _again(name: Any, read: Callable[..., Any], *how: Any) -> Any:
    """Read a file that was good when the run began."""
    try:
        return read(*how)
    except BadFile as error:
        raise ValueError(f"{printable(name)}: {error.reason}; run the same command again") from None


def _named_teacher(ask: Any) -> Any:
    """What `ask` gives; its complaints name the argument that the user knows."""
    try:
        return ask()
    except ValueError as error:
        said = str(error)
        if said.startswith("modality="):  # what it reads instead
            said = f"teacher={said.partition(': ')[2]}, which these items are not"
        raise ValueError(said.replace("model=", "teacher=", 1)) from error
