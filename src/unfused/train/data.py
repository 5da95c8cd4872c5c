"""Arrays as a training set, and the order in which a run visits them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

Sampler = Callable[[int, torch.Generator], torch.Tensor]


class ArrayDataset(Dataset):
    """Columns of equal length; a batch is fetched with one indexing operation per column.

    A `transformers.Trainer` takes it with `data_collator=unfused.train.collate` and
    `remove_unused_columns=False`.

    Parameters
    ----------
    **columns : tensor, array or memory map, each of shape (n, ...)
        Named as the model's `forward` names them. A memory map stays on disk: a batch reads its own rows
        only.

    Examples
    --------
    >>> import numpy as np
    >>> data = ArrayDataset(input_values=np.zeros((10, 1, 4, 6), np.float32), labels=np.arange(10))
    >>> len(data), data[3]["labels"].item(), data.__getitems__([1, 2])["input_values"].shape
    (10, 3, torch.Size([2, 1, 4, 6]))
    """

    def __init__(self, **columns: Any) -> None:
        if not columns:
            raise ValueError("ArrayDataset needs at least one column, e.g. input_values=array")
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all columns must have the same length, got {lengths}")
        self.columns = {
            name: column if isinstance(column, torch.Tensor | np.ndarray) else np.asarray(column)
            for name, column in columns.items()
        }

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows of `indices` as one batch: column -> (len(indices), ...)."""
        return {
            name: column[torch.as_tensor(indices)]
            if isinstance(column, torch.Tensor)
            else torch.from_numpy(np.ascontiguousarray(column[np.asarray(indices)]))
            for name, column in self.columns.items()
        }


def collate(rows: Any) -> dict[str, torch.Tensor]:
    """A batch from a list of rows (dicts); a batch that the data set has already made is passed on."""
    return rows if isinstance(rows, dict) else default_collate(rows)


class EpochBatches:
    """Index batches of one epoch: a function of (seed, epoch) only, so any point of a run can be found again.

    All batches have the same size; what is left over at the end of an epoch (less than a batch, other rows
    every epoch) is dropped. With fewer rows than `batch_size`, every batch is the whole set. In a distributed
    run `batch_size` is that of all processes, and each takes every `processes`-th row of the common batch.

    Parameters
    ----------
    size : int
        Rows in the data set.
    batch_size : int
        Rows of a batch, over all processes.
    seed : int
    order : callable (epoch, generator) -> (m,) int64 tensor of row indices, optional
        The rows of an epoch in their order, repeats allowed. Default: a random permutation.
    rank, processes : int
        This process and how many there are.

    Examples
    --------
    >>> batches = EpochBatches(5, batch_size=2, seed=0)
    >>> len(batches), len(list(batches)[0])
    (2, 2)
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        order: Sampler | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.size, self.seed, self.order = size, seed, order
        self.rank, self.processes = rank, processes
        self.epoch = 0
        rows = size if order is None else len(self._order(0))
        self.batch_size = min(batch_size, rows) // processes * processes
        if self.batch_size == 0:
            raise ValueError(f"{rows} rows are too few for {processes} process(es): each needs at least one")
        self.batches = rows // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self.epoch)
        for start in range(0, self.batches * self.batch_size, self.batch_size):
            yield order[start + self.rank : start + self.batch_size : self.processes].tolist()

    def _order(self, epoch: int) -> torch.Tensor:
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(2, np.uint32)
        generator = torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
        if self.order is None:
            return torch.randperm(self.size, generator=generator)
        return torch.as_tensor(self.order(epoch, generator))
