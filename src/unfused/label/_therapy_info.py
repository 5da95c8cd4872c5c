"""What `VisionTherapy.relabel` found about each image, and its file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from unfused.data.files import atomic_write

__all__ = ["ACCEPTED", "FAILED", "PENDING", "THERAPY", "UNKNOWN", "TherapyInfo"]

PENDING, ACCEPTED, THERAPY, FAILED, UNKNOWN = range(5)
STATUS = np.array(["pending", "accepted", "therapy", "failed", "no exemplars"])


@dataclass
class TherapyInfo:
    """What became of each image. Classes are column numbers of the probabilities.

    Attributes
    ----------
    predicted, chosen : ndarray of int, shape (n,)
        p and y*; they are equal unless the status is "therapy".
    confidence : ndarray of shape (n,)
        Probability of p, at the temperature used.
    candidates : ndarray of int, shape (n, N)
        p first.
    scores : ndarray of shape (n, N)
        q of the candidates; NaN where none was asked for, or none came.
    calls : ndarray of int, shape (n,)
        Questions put to the verifier.
    failures : list of dict
        `image`, `class`, `round`, `reason`.
    """

    predicted: np.ndarray
    confidence: np.ndarray
    candidates: np.ndarray
    chosen: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    scores: np.ndarray = field(default_factory=lambda: np.empty(0))
    calls: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    codes: np.ndarray = field(default_factory=lambda: np.empty(0, int), repr=False)
    failures: list[dict[str, Any]] = field(default_factory=list)
    key: str = field(default="", repr=False)

    @property
    def status(self) -> np.ndarray:
        """For each image: "accepted", "therapy", "pending" (not asked), "failed" (no answer that decides), "no exemplars"
        (the support has none of p)."""
        return STATUS[self.codes]

    @property
    def accepted(self) -> np.ndarray:
        """Mask (n,): the diagnosis left p."""
        return self.codes == ACCEPTED

    @property
    def targets(self) -> np.ndarray:
        """For `therapy_loss`: the class where there was therapy, else -1; shape (n,)."""
        return np.where(self.codes == THERAPY, self.chosen, -1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a safetensors file, atomically."""
        arrays = {
            name: np.ascontiguousarray(value)
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray)
        }
        notes = {"failures": json.dumps(self.failures, default=str), "key": self.key}
        with atomic_write(path, "wb") as file:
            file.write(save(arrays, metadata=notes))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TherapyInfo:
        """Read what `save` wrote."""
        try:
            with safe_open(path, "np") as file:
                notes = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}
            return cls(**arrays, failures=json.loads(notes["failures"]), key=notes["key"])
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path} is no file of TherapyInfo.save ({type(error).__name__}): delete it"
            ) from None
