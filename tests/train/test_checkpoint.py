"""Checkpoint files: layouts, ties, full disks."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
import torch
from resumable import Noisy, data
from safetensors import safe_open
from torch import nn

from unfused.data.files import DiskFull
from unfused.train import checkpoint as ckpt
from unfused.train import fit


def test_module_round_trip(tmp_path):
    torch.manual_seed(0)
    one, other = Noisy(), Noisy()
    ckpt.save_module(tmp_path / "m.safetensors", one)
    ckpt.load_module(tmp_path / "m.safetensors", other)
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride(), name
    assert other.tied is other.head
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert "tied.weight" not in file.keys() and file.metadata() == {"format": "pt"}
    first = (tmp_path / "m.safetensors").read_bytes()
    ckpt.save_module(tmp_path / "m.safetensors", other)
    assert (tmp_path / "m.safetensors").read_bytes() == first


def test_views_of_one_memory_are_saved(tmp_path):
    module = nn.Module()
    base = torch.arange(6.0)
    module.register_buffer("left", base[:4])
    module.register_buffer("right", base[2:])
    module.register_buffer("empty", torch.zeros(0))
    module.register_buffer("none", torch.zeros(0))
    ckpt.save_module(tmp_path / "m.safetensors", module)
    module.left = torch.zeros(4)
    ckpt.load_module(tmp_path / "m.safetensors", module)
    assert module.left.tolist() == [0, 1, 2, 3] and module.right.tolist() == [2, 3, 4, 5]


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Module):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(TypeError, match="state '_extra_state' of Odd is a dict: only tensors are saved"):
        ckpt.save_module(tmp_path / "m.safetensors", Odd())


def test_strict_loading(tmp_path):
    ckpt.save_module(tmp_path / "m.safetensors", nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ckpt.load_module(tmp_path / "m.safetensors", nn.Linear(2, 3))


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_optimizer_round_trip_in_the_layout_of_its_parameters(tmp_path, make):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2))
        model.to(memory_format=torch.channels_last)
        return model, make(list(model.parameters()))

    def step(model, optimizer):
        optimizer.zero_grad()
        model[:3](torch.ones(2, 3, 3, 3)).square().sum().backward()  # the last layer has no state
        optimizer.step()

    one, rule = build()
    step(one, rule)
    tensors, rest = ckpt.pack_optimizer(rule)
    ckpt.save_tensors(tmp_path / "o.safetensors", tensors)
    other, again = build()
    other.load_state_dict(one.state_dict())
    ckpt.unpack_optimizer(again, ckpt.load_file(tmp_path / "o.safetensors"), rest)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        for key, value in rule.state.get(a, {}).items():
            if isinstance(value, torch.Tensor):
                assert (
                    torch.equal(value, again.state[b][key]) and value.stride() == again.state[b][key].stride()
                )
    step(one, rule), step(other, again)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_generators_round_trip():
    import random

    import numpy as np

    def draw():
        return random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()  # noqa: NPY002

    draw()  # leaves the second of a pair of Gaussians waiting in two of them
    state = ckpt.rng_state()
    first = draw()
    ckpt.set_rng_state(state)
    assert draw() == first
    with ckpt.preserved_rng():
        second = draw()
    assert draw() == second


def test_atomic_folder_leaves_nothing_of_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), ckpt.atomic_folder(tmp_path / "checkpoint-1") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# ---- full disks

RUN = dict(steps=8, batch_size=8, lr=1e-2, bf16=False, save_seconds=0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["model", "optimizer", "run.json"])
def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, name, code):
    expected = fit(seeded(), data(), output_dir=tmp_path / "whole", **RUN)
    writers = {"model": "save_module", "optimizer": "save_tensors", "run.json": "write_json"}
    original = getattr(ckpt, writers[name])

    def full(path, *args, **kwargs):
        if "checkpoint-5" in str(path) and name in str(path):
            raise OSError(code, os.strerror(code))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(ckpt, writers[name], full)
    with pytest.raises(DiskFull, match=r"^no space left on .*run: free some and run the same command again$"):
        fit(seeded(), data(), output_dir=tmp_path / "run", **RUN)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoint-3", "checkpoint-4"}
    monkeypatch.undo()
    result = fit(seeded(), data(), output_dir=tmp_path / "run", **RUN)
    assert (result.resumed_from, result.history) == (4, expected.history)
    same = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("run", "whole")]
    assert same[0] == same[1]


def seeded() -> Noisy:
    torch.manual_seed(3)
    return Noisy()


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 1 MiB on which the third checkpoint does not find room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("mounting a file system is not allowed here")
    try:
        model = nn.ModuleDict({"noisy": seeded(), "ballast": nn.Linear(400, 200)})
        model.forward = model["noisy"].forward
        with pytest.raises(DiskFull, match="no space left on"):
            fit(model, data(), output_dir=disk / "run", **RUN)
        kept = ckpt.checkpoints(disk / "run")
        assert kept and all(ckpt.read_sealed(path) for path in kept)
        assert len(list((disk / "run").iterdir())) == len(kept)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True, capture_output=True)
        result = fit(model, data(), output_dir=disk / "run", **RUN)
        assert result.resumed_from == int(kept[0].name.removeprefix("checkpoint-"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
