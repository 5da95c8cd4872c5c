"""A saved estimator on new files, texts or rows: what `unfused adapt` keeps of a method on frozen features.

    model/estimator.json, arrays-DIGEST.safetensors   the estimator, see `unfused.data.estimator_io`
    model/adapted.json                                what it is given: kind of items, encoder, names of the classes
    model/encoder/                                    the run's own encoder; one from elsewhere is named, not copied

A folder without `adapted.json` holds what `unfused.label.save` wrote: a pipeline that begins with a `FrozenEncoder`, or an
estimator on arrays.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unfused.data.files import Quarantine, printable, read_json, write_json

__all__ = ["AdaptedEstimator"]

RECORD = "adapted.json"


class AdaptedEstimator:
    """An estimator with the reading of files, texts, tables or arrays around it.

    Parameters
    ----------
    estimator : estimator
        With `predict_proba`.
    kind : {"audio", "image", "text", "table", "array"}
    classes : list of str
        In the order of the columns of `predict_proba`.
    encoder : AdaptedModel, FrozenEncoder or None
        Makes features of items; None where the estimator takes the items themselves.
    text_column : str, optional
        Of tables of texts.

    Examples
    --------
    >>> from unfused.label import GDAClassifier, save
    >>> import tempfile
    >>> X, y = np.random.default_rng(0).normal(size=(20, 4)), np.array(["hum", "hiss"] * 10)
    >>> folder = save(GDAClassifier().fit(X, y), tempfile.mkdtemp())
    >>> loaded = AdaptedEstimator.load(folder)
    >>> loaded.kind, loaded.classes, loaded.predict_proba(X).shape
    ('array', ['hiss', 'hum'], (20, 2))
    """

    def __init__(
        self,
        estimator: Any,
        kind: str,
        classes: Sequence[str],
        encoder: Any = None,
        text_column: str | None = None,
    ) -> None:
        self.estimator, self.kind, self.classes = estimator, kind, list(classes)
        self.encoder, self.text_column = encoder, text_column

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AdaptedEstimator:
        """What `adapt` or `unfused.label.save` wrote."""
        from unfused.data import estimator_io
        from unfused.data.frozen_encoder import FrozenEncoder

        path = Path(folder)
        estimator = estimator_io.load(path)
        if not hasattr(estimator, "predict_proba"):
            raise ValueError(
                f"model={printable(path)}: {type(estimator).__name__} gives no probabilities; use it in Python, by "
                "`unfused.label.load`"
            )
        if not (path / RECORD).is_file():
            first = estimator[0] if hasattr(estimator, "steps") else estimator
            kind = first._source()[1] if isinstance(first, FrozenEncoder) else "array"
            return cls(estimator, kind, [str(name) for name in estimator.classes_])
        record = read_json(path / RECORD)
        encoder: Any
        if record["encoder"] is None:
            from unfused.workflow.predict import AdaptedModel

            encoder = AdaptedModel.load(path / "encoder")
        else:
            encoder = FrozenEncoder(record["encoder"], modality=record["kind"], bf16=False, progress=False)
        return cls(estimator, record["kind"], record["classes"], encoder, record.get("text_column"))

    @staticmethod
    def write(
        folder: Path, kind: str, classes: Sequence[str], teacher: str | None, text_column: str | None = None
    ) -> None:
        """The record beside a saved estimator; `teacher` None: the encoder lies in `encoder/`."""
        if teacher is not None and os.path.isdir(teacher):
            teacher = os.path.abspath(teacher)
        record: dict[str, Any] = {"format": 1, "kind": kind, "encoder": teacher, "classes": list(classes)}
        if text_column is not None:
            record["text_column"] = text_column
        write_json(folder / RECORD, record)

    def predict_proba(self, items: Any, quarantine: Quarantine | None = None) -> np.ndarray:
        """Class probabilities.

        Parameters
        ----------
        items : sequence
            Paths of recordings or pictures, texts, rows (a data frame, dicts, a dict of columns), or an array
            (n, n_features); of texts, rows and arrays also the path of a table (of an array: or of a .npy file).
        quarantine : Quarantine, optional
            Gets what cannot be read, whose rows are then NaN. Without it such an item raises ValueError.

        Returns
        -------
        ndarray of shape (n, n_classes), float32
        """
        if self.kind in ("text", "table", "array"):
            if isinstance(items, str | os.PathLike):
                items = self.read_table(items, quarantine)[1]
        elif isinstance(items, str | os.PathLike):
            raise TypeError(f"items={os.fspath(items)!r} is one path: give a list of paths")
        features, usable = self._features(items, quarantine)
        result = np.full((len(usable), len(self.classes)), np.nan, np.float32)
        if usable.any():
            result[usable] = self.estimator.predict_proba(features)
        return result

    def predict(self, items: Any) -> list[str]:
        """Most probable class of each item; see `predict_proba`."""
        return [self.classes[index] for index in self.predict_proba(items).argmax(1)]

    def read_table(
        self, path: str | os.PathLike[str], quarantine: Quarantine | None = None
    ) -> tuple[list[str], Any]:
        """What the rows of a table are called, and what `predict_proba` takes of them; see `AdaptedModel.read_table`."""
        if self.kind == "array":
            return _numbers(path, getattr(self.estimator, "feature_names_in_", None))
        if hasattr(self.encoder, "read_table"):
            return self.encoder.read_table(path, quarantine)
        from unfused.workflow.predict import whole_records

        records = whole_records(path, quarantine)
        column = self.text_column
        if column is None or (records.find(column) is None and len(records.columns) == 1):
            texts = [records.columns[0]] if len(records.columns) == 1 else _texts(records)
            if len(texts) != 1:
                raise ValueError(
                    f"{os.fspath(path)!r} has the columns {', '.join(map(repr, records.columns[:8]))}: "
                    "say which holds the texts by text_column"
                )
            column = texts[0]
        return records.ids, [cell or "" for cell in records.column(column)]

    def _features(self, items: Any, quarantine: Quarantine | None) -> tuple[Any, np.ndarray]:
        """What the estimator takes, of the usable items, and which these are."""
        if self.kind == "array":
            X = items if hasattr(items, "columns") else np.asarray(items)
            return X, np.ones(len(X), bool)
        if hasattr(self.encoder, "embed"):  # the run's own: it reads as it did in training
            found = self.encoder.embed(items, quarantine)
            usable = ~np.isnan(found).any(1)
            return found[usable], usable
        items = list(items)
        usable = np.ones(len(items), bool)
        if self.kind == "text":
            for row, text in enumerate(items):
                if not isinstance(text, str):
                    raise TypeError(f"items[{row}] is {type(text).__name__}: give strings")
                usable[row] = bool(text.strip())
            if quarantine is None and not usable.all():
                raise ValueError(f"items[{int(np.flatnonzero(~usable)[0])}] is an empty text")
        if quarantine is not None and self.kind != "text":
            usable &= [_readable(item, self.kind, quarantine) for item in items]
        chosen = [item for item, good in zip(items, usable, strict=True) if good]
        if self.encoder is None or not chosen:  # of a pipeline the first step encodes
            return chosen, usable
        return self.encoder.transform(chosen), usable


def _readable(path: Any, kind: str, quarantine: Quarantine) -> bool:
    """Whether the file can be decoded; if not, quarantine says why."""
    from unfused.data.audio import decode
    from unfused.data.files import BadFile
    from unfused.data.images import open_rgb

    try:
        decode(path, 16000) if kind == "audio" else open_rgb(path)
    except BadFile as error:
        quarantine.add(path, error.reason)
        return False
    return True


def _texts(records: Any) -> list[str]:
    return [records.columns[index] for index in records.texts_and_others(set())[0]]


def _numbers(path: str | os.PathLike[str], names: Any) -> tuple[list[str], Any]:
    """Rows of numbers: a .npy file, or the columns of a table, those called as in training where they had names."""
    name = os.fspath(path)
    if name.endswith(".npy"):
        try:
            X = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name!r} is no array of numbers: {str(error).splitlines()[0]}") from None
        if X.ndim != 2:
            raise ValueError(f"{name!r} has shape {X.shape}: give (n, n_features)")
        return [f"row {row}" for row in range(1, len(X) + 1)], X
    from unfused.data.records import TABLE_SUFFIXES, read_records
    from unfused.nn.table_model import as_numbers

    if os.path.splitext(name)[1].lower() not in TABLE_SUFFIXES:
        raise ValueError(f"{name!r}: this estimator takes rows of numbers: give a .npy file or a table")
    records = read_records(path, Quarantine())
    columns = list(records.columns) if names is None else [str(one) for one in names]
    if absent := [column for column in columns if records.find(column) is None]:
        raise ValueError(f"{name!r} lacks the columns {', '.join(map(repr, absent[:5]))}")
    X = np.stack([as_numbers(records.column(column)) for column in columns], 1)
    if names is None:
        return records.ids, X
    import pandas as pd

    return records.ids, pd.DataFrame(X, columns=columns)
