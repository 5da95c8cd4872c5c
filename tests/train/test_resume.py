"""A run killed at any moment and started again ends with the bits of one that was not."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import killing
import pytest
import torch
from resumable import Noisy, data, train
from safetensors.torch import load_file
from torch import nn

from unfused.train import fit


def outcome(folder: Path) -> tuple[bytes, list]:
    assert sorted(p.name for p in folder.iterdir()) == ["done.json", "history.json", "model.safetensors"]
    return (folder / "model.safetensors").read_bytes(), json.loads((folder / "history.json").read_text())


class Stop(Exception):
    pass


def stop_at(step: int):
    from transformers import TrainerCallback

    class At(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Stop

    return At()


@pytest.fixture(scope="module")
def forks() -> killing.Forks:
    return killing.Forks(["unfused.train.engine", "torch._dynamo"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[bytes, list]:
    folder = tmp_path_factory.mktemp("reference") / "run"
    train(str(folder))
    return outcome(folder)


def test_without_checkpoints_the_same_bits(tmp_path, reference):
    train(str(tmp_path / "run"), save_seconds=1000)
    assert outcome(tmp_path / "run") == reference


def test_killed_at_random_moments(tmp_path, forks, reference):
    folder = tmp_path / "run"
    forks.run(print)  # the first process waits for the imports
    seconds = forks.run(train, str(tmp_path / "timed"))
    hits = forks.run_killed(train, str(folder), delays=killing.random_delays(4, seconds / 2, seed=5))
    assert hits >= 1
    assert outcome(folder) == reference


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_changes_of_files(tmp_path, forks, reference, seed):
    folder = tmp_path / "run"
    generator = random.Random(seed)
    deaths = 0
    while forks.run_until_event(train, str(folder), folder=folder, events=generator.randint(1, 120)):
        deaths += 1
    assert deaths >= 2
    assert outcome(folder) == reference


def test_every_change_of_the_final_writing(tmp_path, forks):
    """Two steps with a checkpoint, then the final files: die at each change, later at every fourth."""
    events, results = 1, set()
    while True:
        folder = tmp_path / f"run-{events}"
        died = forks.run_until_event(train, str(folder), 2, 0.0, folder=folder, events=events)
        if died:
            train(str(folder), steps=2)
        results.add(outcome(folder)[0])
        if not died:
            break
        events += 1 if events < 3 else 4
    assert events > 20 and len(results) == 1


def stopped(folder: Path, step: int = 7, **changes) -> None:
    torch.manual_seed(3)
    with pytest.raises(Stop):
        fit(Noisy(), data(), output_dir=folder, callbacks=[stop_at(step)], **(ARGUMENTS | changes))


ARGUMENTS = dict(steps=12, batch_size=8, lr=1e-2, bf16=False, save_seconds=0)


def resumed(folder: Path, rows=None, model=None, **changes):
    torch.manual_seed(3)
    return fit(model or Noisy(), rows or data(), output_dir=folder, **(ARGUMENTS | changes))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("step", [1, 6, 9])
def test_stopped_at_a_step(tmp_path, step, optimizer):
    """After the first step, at the end of an epoch, within one."""
    expected = resumed(tmp_path / "whole", optimizer=optimizer)
    stopped(tmp_path / "halves", step, optimizer=optimizer)
    result = resumed(tmp_path / "halves", optimizer=optimizer)
    assert (result.resumed_from, result.history) == (step, expected.history)
    assert outcome(tmp_path / "halves") == outcome(tmp_path / "whole")


def test_two_checkpoints_are_kept(tmp_path):
    stopped(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7"]
    names = {
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "run.json",
        "trainer_state.json",
    }
    assert {p.name for p in (tmp_path / "checkpoint-7").iterdir()} == names


@pytest.mark.parametrize("file", ["model.safetensors", "run.json"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, file):
    expected = resumed(tmp_path / "whole")
    stopped(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-7" / file
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="checkpoint-7 is damaged"):
        result = resumed(tmp_path / "run")
    assert result.resumed_from == 6
    assert result.history == expected.history
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(lr=2e-2), "lr was 0.01, is 0.02"),
        (dict(seed=1), "seed was 0, is 1"),
        (dict(fingerprint={"input": "b"}), "input was absent, is b"),
        (dict(rows=torch.utils.data.Subset(data(), range(20))), "rows was 50, is 20"),
    ],
)
def test_checkpoint_of_another_run_is_discarded(tmp_path, changes, named):
    stopped(tmp_path / "run")
    with pytest.warns(UserWarning, match=named):
        result = resumed(tmp_path / "run", **changes)
    assert result.resumed_from is None
    fresh = resumed(tmp_path / "fresh", **changes)
    assert result.history == fresh.history


def test_other_shapes_are_named(tmp_path):
    stopped(tmp_path)
    wider = Noisy()
    wider.head = wider.tied = nn.Linear(64, 4)
    wider.average = torch.zeros(4, 64)
    with pytest.warns(UserWarning, match=r"model head.weight was \[.*3, 64\], is \[.*4, 64\]"):
        assert resumed(tmp_path, model=wider).resumed_from is None


def test_finished_run_is_loaded_and_not_repeated(tmp_path):
    first = resumed(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    model = Noisy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = resumed(tmp_path, model=model, callbacks=[stop_at(1)])
    assert (again.resumed_from, again.steps, again.history) == (12, 12, first.history)
    assert not model.training
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    assert torch.equal(model.head.weight, load_file(tmp_path / "model.safetensors")["head.weight"])


def test_finished_run_with_damaged_weights_is_repeated(tmp_path):
    first = resumed(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"done\.json is damaged"):
        again = resumed(tmp_path)
    assert again.resumed_from is None and again.history == first.history


def test_second_process_is_refused(tmp_path):
    import fcntl
    import os

    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError, match="another process is training into"):
        resumed(tmp_path)
    os.close(descriptor)
    resumed(tmp_path)


def test_no_pickle(tmp_path, monkeypatch):
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, lambda *a, **k: pytest.fail("torch.save/load called"))
    stopped(tmp_path)
    assert resumed(tmp_path).resumed_from == 7
