"""Two processes under `accelerate launch` train as one does on the same global batch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from unfused.train import ArrayDataset, fit


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x, y):
        loss = nn.functional.cross_entropy(self.net(x), y)
        return {"loss": loss, "terms": {"twice": 2 * loss}}


def run(folder: str, **changes):
    generator = torch.Generator().manual_seed(1)
    data = ArrayDataset(
        x=torch.randn(30, 6, generator=generator), y=torch.randint(0, 3, (30,), generator=generator)
    )
    return fit(Plain(), data, steps=12, batch_size=8, lr=1e-2, bf16=False, output_dir=folder, **changes)


def test_two_processes_equal_one(tmp_path):
    one = run(str(tmp_path / "one"))
    # `--cpu` alone starts one process (more need MPI): `--multi_gpu` is accelerate's name for torchrun.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [*command, "--main_process_port", "0", __file__, str(tmp_path)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # the two may print into one line
    assert sorted(re.findall(r"rank \d resumed from \d", done.stdout)) == [
        "rank 0 resumed from 7",
        "rank 1 resumed from 7",
    ]
    two = tmp_path / "two"
    assert sorted(p.name for p in two.iterdir()) == ["done.json", "history.json", "model.safetensors"]
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for run_of_two in ("two", "through"):
        found = load_file(tmp_path / run_of_two / "model.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    whole, resumed = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("through", "two")]
    assert whole == resumed
    history = json.loads((two / "history.json").read_text())
    assert [r["step"] for r in history] == [r["step"] for r in one.history]
    for a, b in zip(history, one.history, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and a["learning_rate"] == b["learning_rate"]


def main(folder: Path) -> None:
    """In each of the two processes: one run straight through, one stopped after its seventh step and resumed."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    run(str(folder / "through"))
    try:
        run(str(folder / "two"), save_seconds=0, callbacks=[Stop()])
    except KeyboardInterrupt:
        pass
    result = run(str(folder / "two"), save_seconds=0)
    print(f"rank {os.environ['RANK']} resumed from {result.resumed_from}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
