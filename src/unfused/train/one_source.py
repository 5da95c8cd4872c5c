"""Batches that each come from one of several data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, Dataset

__all__ = ["OneSourceBatches", "Sources"]


class Sources(Dataset):
    """Rows of several data sets, one after another, each with its source's number."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts, self.sizes = parts, [len(part) for part in parts]
        self.places = [(source, row) for source, size in enumerate(self.sizes) for row in range(size)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: int) -> tuple[Any, int]:
        source, row = self.places[at]
        return self.parts[source][row], source


class OneSourceBatches(BatchSampler):
    """Full batches of one source each, in random order; the same in every process."""

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        if min(sizes) < batch_size:
            raise ValueError(
                f"train_dataset: a source has {min(sizes)} rows, fewer than one batch of {batch_size}"
            )
        self.sizes, self.batch_size, self.drop_last = sizes, batch_size, True
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return sum(size // self.batch_size for size in self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        start, batches = 0, []
        for size in self.sizes:
            rows = (
                start
                + torch.randperm(size, generator=self.generator)[: size // self.batch_size * self.batch_size]
            )
            batches += rows.view(-1, self.batch_size).tolist()
            start += size
        for at in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[at]
