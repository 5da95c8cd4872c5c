"""A run that uses every source of state, for tests that kill it."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from unfused.train import ArrayDataset, fit


class Noisy(nn.Module):
    """Dropout, batch norm, three noises, an average, a queue, tied weights: all must come back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)
        )
        self.body[0].to(memory_format=torch.channels_last)
        self.head = nn.Linear(4 * 16, 3)
        self.tied = self.head  # shared weights
        self.register_buffer("average", torch.zeros(3, 64))
        self.register_buffer("queue", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def on_train_begin(self, steps: int) -> None:
        self.steps = steps
        self.average.copy_(self.head.weight.detach())
        self.queue.normal_()

    def on_step_end(self) -> None:
        self.average.lerp_(self.head.weight.detach(), 0.1)
        self.queue = self.queue.roll(1)
        self.queue[0] = self.head.bias.detach().sum()
        self.count += 1

    def forward(self, input_values: torch.Tensor, labels: torch.Tensor) -> dict:
        noise = 0.1 * (random.random() + np.random.rand() + torch.rand(()).item())  # noqa: NPY002
        logits = self.head(self.body(input_values + noise))
        loss = F.cross_entropy(logits.float(), labels) + 1e-3 * self.queue.mean()
        return {"loss": loss, "terms": {"noise": noise}}


class NoisyData(ArrayDataset):
    """Draws noise when a batch is fetched."""

    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        batch["input_values"] = batch["input_values"] + 0.1 * torch.randn(())
        return batch


def data() -> NoisyData:
    generator = torch.Generator().manual_seed(1)
    return NoisyData(
        input_values=torch.randn(50, 1, 6, 6, generator=generator),
        labels=torch.randint(0, 3, (50,), generator=generator),
    )


def train(folder: str, steps: int = 20, save_seconds: float = 0.0, optimizer: str = "adamw") -> None:
    torch.manual_seed(3)
    torch.set_num_threads(1)
    fit(
        Noisy(),
        data(),
        steps=steps,
        batch_size=8,  # six batches an epoch: most checkpoints lie in the middle of one
        optimizer=optimizer,
        lr=1e-2,
        output_dir=folder,
        save_seconds=save_seconds,
        eval_fn=lambda model: {"bias": model.head.bias.sum().item(), "noise": torch.rand(()).item()},
        bf16=False,
    )
