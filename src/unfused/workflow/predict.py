"""A saved model on new files, texts or rows: read, cut, predict, or embed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unfused.data.files import BadFile, Quarantine

if TYPE_CHECKING:
    from unfused.workflow.estimators import AdaptedEstimator

__all__ = ["AdaptedModel", "load"]


CLASSES: dict[str, tuple[str, ...]] = {
    "audio": ("AutoModelForAudioClassification", "AutoFeatureExtractor"),
    "image": ("AutoModelForImageClassification", "AutoImageProcessor"),
    "text": ("AutoModelForSequenceClassification", "AutoTokenizer"),
    "table": ("AutoModelForSequenceClassification",),
}


def _kind(config: Any) -> str:
    if config.model_type in ("unfused-audio", "unfused-table"):
        return config.model_type.removeprefix("unfused-")
    return "text" if str((config.architectures or [""])[0]).endswith("ForSequenceClassification") else "image"


def whole_records(path: str | os.PathLike[str], quarantine: Quarantine | None) -> Any:
    """A table's records; rows that cannot be read go to quarantine, and without one raise ValueError."""
    from unfused.data.records import read_records

    aside = Quarantine()
    records = read_records(path, aside)
    for row, reason in aside.rows:
        if quarantine is None:
            raise ValueError(f"{os.fspath(path)}, {row}: {reason}")
        quarantine.add(row, reason)
    return records


class AdaptedModel:
    """A classifier that `adapt` made, with the reading of files, texts or tables around it.

    Every attribute that is not here is that of the transformers model inside (`config`, `save_pretrained`, ...), and
    calling it calls that model.

    Parameters
    ----------
    model : PreTrainedModel
        For audio, image or text classification, or for rows of a table.
    processor : feature extractor, image processor, tokenizer or None
    folder : Path
        Where it was loaded from.

    Examples
    --------
    >>> model = AdaptedModel.load("runs/sample/model")       # doctest: +SKIP
    >>> model.predict(["a.wav", "b.wav"])                    # doctest: +SKIP
    ['mango', 'taxi']
    >>> AdaptedModel.load("runs/texts/model").predict(["A text.", "Another."])  # doctest: +SKIP
    >>> AdaptedModel.load("runs/flowers/model").predict("new.csv")              # doctest: +SKIP
    """

    def __init__(self, model: Any, processor: Any, folder: Path) -> None:
        self.model, self.processor, self.folder = model.eval(), processor, Path(folder)
        self.kind = _kind(model.config)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AdaptedModel:
        """Load `runs/NAME/model`, or `runs/NAME`."""
        import transformers
        from transformers import AutoConfig

        from unfused.nn.register import register
        from unfused.workflow.progress import no_bars_of_transformers

        register()
        path = Path(folder)
        if (path / "model" / "config.json").exists():
            path = path / "model"
        if not (path / "config.json").exists():
            raise ValueError(
                f"model={os.fspath(folder)!r} holds no config.json: give the folder that `unfused adapt` wrote"
            )
        config = AutoConfig.from_pretrained(path)
        model_class, *processors = (getattr(transformers, name) for name in CLASSES[_kind(config)])
        with no_bars_of_transformers():
            processor = processors[0].from_pretrained(path) if processors else None
            return cls(model_class.from_pretrained(path), processor, path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the folder as it is: weights, config, feature extractor, model code and the card of the run.

        Parameters
        ----------
        repo_id : str
            "name" or "owner/name"; made if it does not exist.
        private, token : optional
            As in `huggingface_hub`.

        Returns
        -------
        str
            Address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo.repo_id, folder_path=self.folder, commit_message="Made by unfused adapt"
        )
        return str(done.commit_url)

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the columns of `predict_proba`."""
        names = self.model.config.id2label
        return [names[index] for index in range(len(names))]

    def predict_proba(self, paths: Any, quarantine: Quarantine | None = None) -> np.ndarray:
        """Class probabilities of files, texts or rows.

        Parameters
        ----------
        paths : sequence
            Recordings of any length, rate and channel count (pictures of any size) by their paths. Of a model of texts the
            texts themselves; of a model of rows a data frame, dicts, or a dict of columns. For these two also the path of a
            table, in which the texts stand in the same column as they did, and the cells in the same columns.
        quarantine : Quarantine, optional
            Gets what cannot be read, whose rows are then NaN. Without it such an item raises ValueError.

        Returns
        -------
        ndarray of shape (len(paths), n_classes), float32
        """
        return self._each(paths, quarantine, self._probabilities, len(self.classes))

    def embed(self, paths: Any, quarantine: Quarantine | None = None) -> np.ndarray:
        """What the linear head sees of each item, the mean over its windows; arguments as of `predict_proba`.

        Returns
        -------
        ndarray of shape (len(paths), d), float32
        """
        return self._each(paths, quarantine, self._features, self._head().in_features)

    def _each(
        self, paths: Any, quarantine: Quarantine | None, run: Callable[..., np.ndarray], width: int
    ) -> np.ndarray:
        if self.kind in ("text", "table"):
            if isinstance(paths, str | os.PathLike):
                paths = self.read_table(paths, quarantine)[1]
            if self.kind == "text":
                return self._of_texts(paths, quarantine, run, width)
            return self._of_rows(paths, run, width)
        if isinstance(paths, str | os.PathLike):
            raise TypeError(f"paths={os.fspath(paths)!r} is one path: give a list of paths")
        result = np.full((len(paths), width), np.nan, np.float32)
        for start in range(0, len(paths), 32):
            rows, items = [], []
            for row, path in enumerate(paths[start : start + 32], start):
                try:
                    items.append(self._read(path))
                    rows.append(row)
                except BadFile as error:
                    if quarantine is None:
                        raise ValueError(f"{os.fspath(path)}: {error.reason}") from None
                    quarantine.add(path, error.reason)
            if rows:
                result[rows] = run(**self._batch(items))
        return result

    def predict(self, paths: Any) -> list[str]:
        """Most probable class of each item; see `predict_proba`."""
        probabilities = self.predict_proba(paths)
        return [self.classes[index] for index in probabilities.argmax(1)] if len(probabilities) else []

    def read_table(
        self, path: str | os.PathLike[str], quarantine: Quarantine | None = None
    ) -> tuple[list[str], Any]:
        """What the rows of a table are called, and what `predict_proba` takes of them.

        Parameters
        ----------
        path : path
            CSV, TSV, JSON lines or Parquet.
        quarantine : Quarantine, optional
            Gets unreadable rows; without it the first one raises ValueError.
        """
        from unfused.data.records import TABLE_SUFFIXES

        name = os.fspath(path)
        if self.kind not in ("text", "table"):
            raise ValueError(f"{name!r}: this model takes {self.kind} files, no tables")
        if os.path.splitext(name)[1].lower() not in TABLE_SUFFIXES:
            raise ValueError(f"{name!r}: give a table ({', '.join(sorted(TABLE_SUFFIXES))})")
        records = whole_records(path, quarantine)
        if self.kind == "text":
            column = self.model.config.text_column
            if records.find(column) is None and len(records.columns) == 1:
                column = records.columns[0]
            return records.ids, [cell or "" for cell in records.column(column)]
        cells = {}
        for column in self.model.config.columns:
            if (index := records.find(column["name"])) is None:
                absent = [c["name"] for c in self.model.config.columns if records.find(c["name"]) is None]
                more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
                raise ValueError(f"{name!r} lacks the columns {', '.join(map(repr, absent[:5]))}{more}")
            cells[column["name"]] = [row[index] for row in records.rows]
        return records.ids, cells

    def _of_rows(self, rows: Any, run: Callable[..., np.ndarray], width: int) -> np.ndarray:
        encoded = self.model.encode(rows)
        blocks = [np.empty((0, width), np.float32)]
        for start in range(0, len(encoded), 4096):
            blocks.append(run(input_values=encoded[start : start + 4096]))
        return np.concatenate(blocks)

    def _of_texts(
        self, texts: Sequence[str], quarantine: Quarantine | None, run: Callable[..., np.ndarray], width: int
    ) -> np.ndarray:
        """Mean over a text's windows, as in training; blank ones have nothing to be told by."""
        import torch

        from unfused.nn.text_encoder import cut_texts

        result = np.full((len(texts), width), np.nan, np.float32)
        window = int(getattr(self.model.config, "window", 128))
        for start in range(0, len(texts), 256):
            rows = []
            for row, text in enumerate(texts[start : start + 256], start):
                if not isinstance(text, str):
                    raise TypeError(f"texts[{row}] is {type(text).__name__}: give strings")
                if text.strip():
                    rows.append(row)
                elif quarantine is None:
                    raise ValueError(f"texts[{row}] is empty")
            if not rows:
                continue
            found = list(cut_texts(self.processor, [texts[row] for row in rows], window))
            clip, ids = np.array([row for row, _ in found]), np.stack([piece for _, piece in found])
            sums = np.zeros((len(rows), width), np.float32)
            for first in range(0, len(ids), 256):
                batch = torch.from_numpy(ids[first : first + 256]).long()
                batch = batch[:, : int((batch != self.processor.pad_token_id).sum(1).max())]
                mask = (batch != self.processor.pad_token_id).long()
                np.add.at(sums, clip[first : first + 256], run(input_ids=batch, attention_mask=mask))
            result[rows] = sums / np.bincount(clip, minlength=len(rows))[:, None]
        return result

    def _read(self, path: Any) -> Any:
        if self.kind == "audio":
            from unfused.data.audio import decode

            return decode(path, self.processor.sampling_rate)
        from unfused.data.images import decode_image

        size = self.processor.size
        return decode_image(path, size["height"] if "height" in size else size["shortest_edge"])

    def _batch(self, items: list[Any]) -> dict[str, Any]:
        if self.kind == "audio":
            return dict(
                self.processor(items, sampling_rate=self.processor.sampling_rate, return_tensors="pt")
            )
        return dict(self.processor(list(items), return_tensors="pt", input_data_format="channels_first"))

    def _probabilities(self, **batch: Any) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.model(**batch).logits.float().softmax(-1).numpy()

    def _features(self, **batch: Any) -> np.ndarray:
        import torch

        seen: list[Any] = []
        hook = self._head().register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
        try:
            with torch.inference_mode():
                self.model(**batch)
        finally:
            hook.remove()
        found = seen[0].float()
        if self.kind == "audio":  # windows of all clips, one after the other
            from unfused.nn.audio_model import _mean_of_windows

            found = _mean_of_windows(found, self.model._windows(**batch)[1])
        return found.numpy()

    def _head(self) -> Any:
        import torch

        return [part for part in self.model.classifier.modules() if isinstance(part, torch.nn.Linear)][-1]


def load(folder: str | os.PathLike[str]) -> AdaptedModel | AdaptedEstimator:
    """What `unfused adapt` or `unfused.label.save` wrote into a folder, ready to predict.

    Parameters
    ----------
    folder : path
        `runs/NAME/model`, or `runs/NAME`, or that of a saved estimator.

    Raises
    ------
    ValueError
        If there is neither.
    """
    path = Path(folder)
    for place in (path, path / "model"):
        if (place / "estimator.json").exists():
            from unfused.workflow.estimators import AdaptedEstimator

            return AdaptedEstimator.load(place)
    return AdaptedModel.load(folder)
