"""Throughput of `unfused.train.fit` beside a bare PyTorch loop: the same model, batch, rule and precision.

Run `python benchmarks/bench_train.py`. Rounds alternate between the two, so that what else the machine does
hits both; the ratio is that of the medians. Aim: at least 0.80.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from unfused.nn.audio_model import AudioNTT
from unfused.train import ArrayDataset, fit, supports_bf16


class Classifier(nn.Module):
    def __init__(self, width: int = 32, dim: int = 1024, classes: int = 32) -> None:
        super().__init__()
        self.encoder = AudioNTT(n_mels=40, width=width, dim=dim)
        self.head = nn.Linear(self.encoder.embedding_dim, classes)

    def forward(self, input_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = F.cross_entropy(self.head(self.encoder.embed(input_values)).float(), labels)
        return {"loss": loss}


def bare_loop(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, batch: int, bf16: bool) -> None:
    """What one would write by hand: shuffle, slice, autocast, AdamW, one-cycle."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.15)
    model.train()
    step = 0
    while step < steps:
        order = torch.randperm(len(x))
        for start in range(0, len(x) - batch + 1, batch):
            rows = order[start : start + batch]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(x[rows], y[rows])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == steps:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    x, y = torch.randn(1500, 1, 40, 32), torch.randint(0, 32, (1500,))
    data = ArrayDataset(input_values=x, labels=y)
    print(
        f"{torch.get_num_threads()} thread(s), {options.batch} clips a batch, {options.steps} steps a round"
    )
    for bf16 in [False, True] if supports_bf16() else [False]:
        runs = {
            "bare loop": lambda m, steps, bf16=bf16: bare_loop(m, x, y, steps, options.batch, bf16),
            "fit": lambda m, steps, bf16=bf16: fit(m, data, steps=steps, batch_size=options.batch, bf16=bf16),
        }
        for clock, now in (("wall", time.perf_counter), ("CPU", time.process_time)):
            times: dict[str, list[float]] = {name: [] for name in runs}
            setups: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(options.rounds):
                for name, run in runs.items():
                    model = Classifier().to(memory_format=torch.channels_last)
                    start = now()
                    run(model, 1)
                    middle = now()
                    run(model, options.steps + 1)
                    setups[name].append(middle - start)
                    times[name].append((now() - middle - (middle - start)) / options.steps * 1e3)
            bare, ours = (statistics.median(times[name]) for name in runs)
            print(
                f"{'bf16' if bf16 else 'fp32'}, {clock} time of a step: bare loop {bare:.1f} ms, fit {ours:.1f} ms: "
                f"fit has {bare / ours:.2f} of the bare loop's throughput (aim 0.80); "
                f"its set-up and first step take {statistics.median(setups['fit']):.2f} s"
            )


if __name__ == "__main__":
    main()
