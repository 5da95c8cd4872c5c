from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unfused.pretrain.decar import DECAR, Reassign


def features(n=24, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)


def test_the_loss_is_the_cross_entropy_of_the_assigned_clusters(encoder, inputs):
    objective = DECAR(encoder, num_items=24, num_clusters=4).eval()
    objective.reassign(features())
    index = torch.tensor([5, 3, 20])
    expected = F.cross_entropy(objective.top(encoder.embed(inputs[index])), objective.assignments[index])
    torch.testing.assert_close(objective(input_values=inputs[index], index=index).loss, expected)


def test_reassigning_draws_new_clusters_and_a_new_top_layer_reproducibly(encoder):
    one, two = (DECAR(deepcopy(encoder), num_items=24, num_clusters=4, seed=3) for _ in range(2))
    one.reassign(features())
    first = one.top.weight.detach().clone()
    torch.manual_seed(99)  # the global generator has no part in it
    two.reassign(features())
    assert torch.equal(first, two.top.weight) and torch.equal(one.assignments, two.assignments)
    one.reassign(features())
    assert not torch.equal(first, one.top.weight) and one.rounds == 2


def test_before_the_first_clustering_there_is_a_clear_error(encoder, inputs):
    with pytest.raises(RuntimeError, match="Reassign"):
        DECAR(encoder, num_items=24, num_clusters=4)(input_values=inputs, index=torch.arange(24))


def test_sizes_are_checked(encoder):
    with pytest.raises(ValueError, match="num_clusters=512"):
        DECAR(encoder, num_items=24)
    with pytest.raises(ValueError, match="num_items=24"):
        DECAR(encoder, num_items=24, num_clusters=4).reassign(features(23))


def test_clusters_are_drawn_uniformly(encoder):
    objective = DECAR(encoder, num_items=24, num_clusters=4)
    generator = torch.Generator().manual_seed(0)
    assert sorted(objective.draw(0, generator).tolist()) == list(range(24))
    objective.reassign(features())
    objective.assignments.copy_(torch.tensor([0] * 18 + [1] * 4 + [3] * 2))  # cluster 2 is empty
    rows = objective.draw(1, generator)
    assert torch.bincount(objective.assignments[rows]).tolist() == [8, 8, 0, 8]
    assert rows.bincount(minlength=24)[:18].max() == 1  # no repeats where there are enough
    assert rows.bincount(minlength=24)[18:].tolist() == [2, 2, 2, 2, 4, 4]


def test_it_resumes_exactly_under_fit(encoder, inputs, noise, tmp_path):
    from unfused.train.data import ArrayDataset
    from unfused.train.engine import fit

    class Killed(Exception):
        pass

    def train(folder, stop_at=None):
        objective = DECAR(deepcopy(encoder), num_items=24, num_clusters=4, augment=noise)
        rounds = []

        def progress(step, steps, loss):
            rounds.append(int(objective.rounds))

        callback = Reassign(objective)
        if stop_at is not None:

            def on_step_begin(args, state, control, **kwargs):
                if state.global_step == stop_at:
                    raise Killed

            callback.on_step_begin = on_step_begin
        data = ArrayDataset(input_values=inputs, index=np.arange(24))
        fit(
            objective, data, output_dir=folder, steps=9, batch_size=8, optimizer="sgd", lr=0.05, weight_decay=1e-5,
            schedule="constant", callbacks=[callback], sampler=objective.draw, save_seconds=0, bf16=False,
            progress=progress,
        )  # fmt: skip
        return objective

    whole = train(tmp_path / "whole")
    assert whole.rounds == 3 and whole.assignments.min() >= 0
    for stop_at in (4, 6):  # within an epoch, and between two
        folder = tmp_path / f"stop-{stop_at}"
        with pytest.raises(Killed):
            train(folder, stop_at)
        resumed = train(folder)
        for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
