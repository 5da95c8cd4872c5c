"""Batches: arrays, memory maps, and an order that is a function of seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from unfused.train import ArrayDataset, collate
from unfused.train.data import EpochBatches


def test_columns_of_every_kind(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(24, dtype=np.float32).reshape(6, 2, 2))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = ArrayDataset(x=x, y=torch.arange(6), z=[1, 2, 3, 4, 5, 6])
    batch = data.__getitems__([4, 0])
    assert (
        batch["x"].tolist() == x[[4, 0]].tolist()
        and batch["y"].tolist() == [4, 0]
        and batch["z"].tolist() == [5, 1]
    )
    assert batch["x"].dtype == torch.float32 and batch["z"].dtype == torch.int64
    batch["x"].add_(1)  # a copy, not the file
    assert x[4, 0, 0] == 16
    assert {k: v.tolist() for k, v in data[3].items()} == {"x": x[3].tolist(), "y": 3, "z": 4}
    assert collate(batch) is batch
    assert collate([data[4], data[0]])["y"].tolist() == [4, 0]
    assert Subset(data, [5, 1]).__getitems__([0])["y"].tolist() == [5]


def test_bad_columns():
    with pytest.raises(ValueError, match=r"same length, got \{'x': 2, 'y': 3\}"):
        ArrayDataset(x=torch.zeros(2), y=torch.zeros(3))
    with pytest.raises(ValueError, match="at least one column"):
        ArrayDataset()


def test_an_epoch_is_a_permutation():
    batches = EpochBatches(10, 3, seed=0)
    epochs = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
    assert epochs[0] == epochs[2] != epochs[1]
    assert [len(b) for b in epochs[0]] == [3, 3, 3] and len(batches) == 3
    assert len({i for batch in epochs[0] for i in batch}) == 9
    assert list(EpochBatches(10, 3, seed=1)) != epochs[0]


def test_few_rows_make_one_batch():
    assert sorted(*EpochBatches(5, 64, seed=0)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="1 rows are too few for 2 process"):
        EpochBatches(1, 64, seed=0, processes=2)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batch(processes):
    whole = list(EpochBatches(100, 12, seed=4))
    parts = [list(EpochBatches(100, 12, 4, None, rank, processes)) for rank in range(processes)]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert {len(share) for share in shares} == {12 // processes}
        assert sorted(i for share in shares for i in share) == sorted(batch)


def test_order_is_given():
    def order(epoch, generator):
        return torch.tensor([epoch, 7, 7, int(torch.randint(5, (), generator=generator))])

    batches = EpochBatches(8, 2, seed=0, order=order)
    first = list(batches)
    assert first[0] == [0, 7] and len(batches) == 2 and list(batches) == first
    batches.set_epoch(3)
    assert next(iter(batches)) == [3, 7]
