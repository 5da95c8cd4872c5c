"""Hidden states of a frozen model on disk: written once, read in any order through memory maps.

A folder holds `layer-I.bin` with the states of all items one after the other (of a sequence its real tokens, padding is
left out), `offsets.bin` that says where each item begins, `index.json`, written last, and where a pooled embedding goes with
the states, `anchor.bin` and `summary.bin`. Plain numbers, little-endian; nothing is pickled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from unfused.data.files import disk_errors, read_json, write_json

__all__ = ["HiddenStates", "HiddenStatesWriter", "States"]

DTYPES = ("float32", "float16")


class States(NamedTuple):
    """Of one batch.

    Attributes
    ----------
    hidden : list of Tensor
        Of each layer: tokens (B, N, D) or maps (B, C, H, W).
    mask : Tensor, optional
        (B, N), nonzero at real tokens; None where all are.
    anchor : Tensor, optional
        (B, D), the pooled embedding.
    summary : Tensor, optional
        (B,), which token it came from.
    """

    hidden: list[torch.Tensor]
    mask: torch.Tensor | None = None
    anchor: torch.Tensor | None = None
    summary: torch.Tensor | None = None


class HiddenStatesWriter:
    """Appends batches to a new folder; the states can be read after `close`.

    Parameters
    ----------
    folder : path
        Must not hold states already.
    dtype : {"float32", "float16"}, default="float32"
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: choose 'float32' or 'float16'")
        self.folder, self.dtype = Path(folder), np.dtype(dtype)
        if (self.folder / "index.json").exists():
            raise ValueError(
                f"folder={str(folder)!r} holds hidden states already: open them, or name another"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shapes: list[list[int]] = []
        self.offsets, self.tokens, self.anchor = [0], True, 0
        self._files: dict[str, Any] = {}

    def append(self, states: States) -> None:
        first, mask = states.hidden[0], states.mask
        self.tokens = first.ndim == 3
        if self.tokens:
            mask = torch.ones(first.shape[:2]) if mask is None else mask
            mask = mask.to(first.device).bool()
            lengths, rows = mask.sum(1), [one[mask] for one in states.hidden]
        else:
            lengths, rows = torch.ones(len(first), dtype=torch.long), list(states.hidden)
        shapes = [list(one.shape[1:]) for one in rows]
        if self.shapes and self.shapes != shapes:
            raise ValueError(
                f"states of shapes {shapes} after {self.shapes}: all items must have the same size, resize them"
            )
        self.shapes = shapes
        with disk_errors(self.folder):
            for index, one in enumerate(rows):
                self._write(f"layer-{index}", one, self.dtype)
            if states.anchor is not None and states.summary is not None:
                self.anchor = states.anchor.shape[1]
                at = states.summary if mask is None else mask.cumsum(1).gather(1, states.summary[:, None]) - 1
                self._write("anchor", states.anchor, self.dtype)
                self._write("summary", at, np.dtype("int64"))  # counted without padding
        self.offsets += (self.offsets[-1] + lengths.cumsum(0)).tolist()

    def close(self, **about: Any) -> HiddenStates:
        """Finish; `about` (form and place of the states, say) is kept with them."""
        if not self.shapes:
            raise ValueError("no hidden states were written: the dataset is empty")
        with disk_errors(self.folder):
            self._write("offsets", torch.tensor(self.offsets), np.dtype("int64"))
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            write_json(
                self.folder / "index.json",
                {
                    "dtype": self.dtype.name,
                    "shapes": self.shapes,
                    "tokens": self.tokens,
                    "anchor": self.anchor,
                    "items": len(self.offsets) - 1,
                    "rows": self.offsets[-1],
                    "about": about,
                },
            )
        return HiddenStates(self.folder)

    def _write(self, name: str, tensor: torch.Tensor, dtype: np.dtype) -> None:
        if name not in self._files:
            self._files[name] = open(self.folder / f"{name}.bin", "wb")
        numbers = tensor.detach().cpu()
        numbers = numbers.float() if numbers.is_floating_point() else numbers
        self._files[name].write(
            np.ascontiguousarray(numbers.numpy().astype(dtype.newbyteorder("<"))).tobytes()
        )


class HiddenStates:
    """The states in a folder.

    Attributes
    ----------
    about : dict
        What the writer was told.
    shapes : list of list of int
        Of a token's, or an item's, state in each layer.

    Examples
    --------
    >>> import tempfile
    >>> writer = HiddenStatesWriter(Path(tempfile.mkdtemp()) / "states")
    >>> writer.append(States([torch.ones(2, 4, 8)] * 3, mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])))
    >>> states = writer.close()
    >>> len(states), [tuple(one.shape) for one in states.batch([0]).hidden]
    (2, [(1, 2, 8), (1, 2, 8), (1, 2, 8)])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / "index.json").exists():
            raise ValueError(f"folder={str(folder)!r} has no index.json: its writing was never finished")
        index = read_json(self.folder / "index.json")
        self.about, self.shapes, self.items = index["about"], index["shapes"], int(index["items"])
        self.tokens = bool(index["tokens"])
        dtype, rows = np.dtype(index["dtype"]), int(index["rows"])
        self._layers = [self._map(f"layer-{i}", dtype, (rows, *shape)) for i, shape in enumerate(self.shapes)]
        self._offsets = np.array(self._map("offsets", np.dtype("int64"), (self.items + 1,)))
        self._anchor = self._map("anchor", dtype, (self.items, index["anchor"])) if index["anchor"] else None
        self._summary = (
            self._map("summary", np.dtype("int64"), (self.items,)) if self._anchor is not None else None
        )
        if self._offsets[0] != 0 or self._offsets[-1] != rows or (np.diff(self._offsets) < 0).any():
            raise ValueError(f"folder={str(folder)!r}: its offsets are damaged; write the states anew")

    def __len__(self) -> int:
        return self.items

    def batch(self, chosen: Sequence[int] | np.ndarray | torch.Tensor) -> States:
        """States of some items as float32, padded with zeros to the longest of them."""
        rows = np.asarray(chosen)
        starts = self._offsets[rows]
        if not self.tokens:
            return States([_tensor(layer[starts]) for layer in self._layers])
        lengths = self._offsets[rows + 1] - starts
        steps = np.arange(max(1, lengths.max(initial=0)))
        real = steps < lengths[:, None]  # (B, N)
        at = np.where(real, starts[:, None] + steps, 0)
        mask = torch.from_numpy(real)
        hidden = [_tensor(layer[at]).masked_fill(~mask[..., None], 0) for layer in self._layers]
        if self._anchor is None or self._summary is None:
            return States(hidden, mask)
        return States(
            hidden, mask, _tensor(self._anchor[rows]), torch.from_numpy(np.array(self._summary[rows]))
        )

    def _map(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        path, dtype = self.folder / f"{name}.bin", dtype.newbyteorder("<")
        size = path.stat().st_size if path.exists() else -1
        if size != int(np.prod(shape)) * dtype.itemsize:
            raise ValueError(f"{str(path)!r} is missing or has the wrong size; write the states anew")
        return np.memmap(path, dtype, "r", shape=shape) if size else np.empty(shape, dtype)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))
