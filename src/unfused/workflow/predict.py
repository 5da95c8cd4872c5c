"""A saved model on new files: read, cut, predict."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unfused.data.files import BadFile, Quarantine

__all__ = ["AdaptedModel", "load"]


class AdaptedModel:
    """A classifier that `adapt` made, with the reading of files around it.

    Every attribute that is not here is that of the transformers model inside (`config`, `save_pretrained`, ...), and
    calling it calls that model.

    Parameters
    ----------
    model : PreTrainedModel
        For audio or image classification.
    processor : feature extractor or image processor
    folder : Path
        Where it was loaded from.

    Examples
    --------
    >>> model = AdaptedModel.load("runs/sample/model")       # doctest: +SKIP
    >>> model.predict(["a.wav", "b.wav"])                    # doctest: +SKIP
    ['mango', 'taxi']
    """

    def __init__(self, model: Any, processor: Any, folder: Path) -> None:
        self.model, self.processor, self.folder = model.eval(), processor, Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AdaptedModel:
        """Load `runs/NAME/model`, or `runs/NAME`."""
        from transformers import (
            AutoConfig,
            AutoFeatureExtractor,
            AutoImageProcessor,
            AutoModelForAudioClassification,
            AutoModelForImageClassification,
        )

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
        audio = config.model_type == "unfused-audio"
        model_class = AutoModelForAudioClassification if audio else AutoModelForImageClassification
        processor_class = AutoFeatureExtractor if audio else AutoImageProcessor
        with no_bars_of_transformers():
            return cls(model_class.from_pretrained(path), processor_class.from_pretrained(path), path)

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

    def predict_proba(
        self, paths: Sequence[str | os.PathLike[str]], quarantine: Quarantine | None = None
    ) -> np.ndarray:
        """Class probabilities of files.

        Parameters
        ----------
        paths : sequence of path
            Recordings of any length, rate and channel count (pictures of any size).
        quarantine : Quarantine, optional
            Gets the files that cannot be read, whose rows are then NaN. Without it such a file raises ValueError.

        Returns
        -------
        ndarray of shape (len(paths), n_classes), float32
        """
        if isinstance(paths, str | os.PathLike):
            raise TypeError(f"paths={os.fspath(paths)!r} is one path: give a list of paths")
        result = np.full((len(paths), len(self.classes)), np.nan, np.float32)
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
                result[rows] = self._probabilities(items)
        return result

    def predict(self, paths: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Most probable class of each file; see `predict_proba`."""
        return [self.classes[index] for index in self.predict_proba(paths).argmax(1)] if len(paths) else []

    def _read(self, path: Any) -> Any:
        if self.model.config.model_type == "unfused-audio":
            from unfused.data.audio import decode

            return decode(path, self.processor.sampling_rate)
        from unfused.data.images import decode_image

        size = self.processor.size
        return decode_image(path, size["height"] if "height" in size else size["shortest_edge"])

    def _probabilities(self, items: list[Any]) -> np.ndarray:
        import torch

        if self.model.config.model_type == "unfused-audio":
            batch = self.processor(items, sampling_rate=self.processor.sampling_rate, return_tensors="pt")
        else:
            batch = self.processor(list(items), return_tensors="pt", input_data_format="channels_first")
        with torch.inference_mode():
            return self.model(**batch).logits.float().softmax(-1).numpy()


load = AdaptedModel.load
