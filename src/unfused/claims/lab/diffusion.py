"""A small diffusion model of digits, a style that it has never drawn, and what it keeps when it learns that style.

The model draws 8 x 8 digits of all ten classes. A task shows it 20 digits of the classes 0 to 4, bold and negative. Judged are
the fit, how close its drawings of 0 to 4 come to such digits that it has not seen, and the prior, whether its drawings of 5
to 9 can still be read, in either style.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from unfused.claims.lab.tuning import Task, TuningWorld, tune
from unfused.claims.lab.vision import augment, digit_parts

if TYPE_CHECKING:
    from unfused.claims.lab import Lab

__all__ = ["Denoiser", "bold", "denoiser", "draw", "frechet", "quality", "reader", "style_world"]

STEPS = 100
"""Of the noise schedule."""


class Denoiser(nn.Module):
    """Predicts the noise in pictures of a class: residual MLP blocks under the sum of picture, time and class.

    Parameters
    ----------
    width, depth : int
        The default has 8 blocks with two matrices of 128 x 256 each, 0.58 million weights in all.
    """

    def __init__(self, width: int = 128, depth: int = 8) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(64, width), nn.Linear(width, 64)
        self.time, self.kind = nn.Embedding(STEPS, width), nn.Embedding(10, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        angle = torch.arange(STEPS)[:, None] * torch.exp(
            -math.log(STEPS) * torch.arange(width // 2) / (width // 2)
        )
        self.time.weight.data = torch.cat([angle.sin(), angle.cos()], 1)

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor, timesteps: torch.Tensor | None = None
    ) -> Any:
        """Loss on clean `images` (N, 64) in [-1, 1] at random times; or, given `timesteps`, the noise in noisy ones."""
        if timesteps is None:
            timesteps, noise = torch.randint(STEPS, (len(images),)), torch.randn_like(images)
            signal = signal_share()[timesteps, None]
            found = self._noise(signal.sqrt() * images + (1 - signal).sqrt() * noise, labels, timesteps)
            return ModelOutput(loss=(found - noise).square().mean(), sample=found)
        return ModelOutput(sample=self._noise(images, labels, timesteps))

    def _noise(self, x: torch.Tensor, labels: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        condition = self.time(timesteps) + self.kind(labels)
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.leave(self.norm(hidden))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return hidden + self.fc2(nn.functional.gelu(self.fc1(self.norm(hidden + condition))))


@functools.cache
def signal_share() -> torch.Tensor:
    """Of the variance at each time, (STEPS,): the cosine schedule."""
    at = (torch.arange(STEPS) + 1) / STEPS
    return torch.cos((at * 0.98 + 0.008) / 1.008 * math.pi / 2).square()


def denoiser(lab: Lab) -> Denoiser:
    """Pretrained on 900 digits of all classes."""
    steps = lab.pick(smoke=4, desk=3000)

    def pretrain() -> dict[str, torch.Tensor]:
        images, labels = digit_parts(lab)["pretrain"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Denoiser()
            tune(
                model,
                {"images": _flat(images), "labels": labels},
                lr=1e-3,
                steps=steps,
                batch_size=128,
                warmup=0.05,
            )
        return model.state_dict()

    model = Denoiser()
    model.load_state_dict(lab.cached("digits-denoiser", {"steps": steps}, pretrain))
    return model.eval()


@torch.no_grad()
def draw(model: nn.Module, labels: torch.Tensor, seed: int = 0, steps: int = 25) -> torch.Tensor:
    """Pictures (N, 64) in [-1, 1] of the classes `labels`: DDIM from seeded noise."""
    x = torch.randn(len(labels), 64, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(STEPS - 1, 0, steps).round().long()
    for now, after in zip(times, [*times[1:], None], strict=True):
        signal = signal_share()[now]
        noise = model(x, labels, now.expand(len(x))).sample
        clean = ((x - (1 - signal).sqrt() * noise) / signal.sqrt()).clamp(-1, 1)
        if after is None:
            return clean
        noise = (x - signal.sqrt() * clean) / (1 - signal).sqrt()
        x = signal_share()[after].sqrt() * clean + (1 - signal_share()[after]).sqrt() * noise
    raise AssertionError


def bold(images: torch.Tensor) -> torch.Tensor:
    """Strokes a pixel wider, black on white; (N, 1, 8, 8) in [0, 1]."""
    return 1 - nn.functional.max_pool2d(nn.functional.pad(images, (0, 1, 0, 1)), 2, stride=1)


def _flat(images: torch.Tensor) -> torch.Tensor:
    return 2 * images.flatten(1) - 1


# -- judging -----------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A small convolutional classifier of digits; its features are those before the last map."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * 16, 32),
            nn.ReLU(),
        )
        self.last = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.last(self.features(images.view(-1, 1, 8, 8)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ModelOutput(loss=loss, logits=logits)


def reader(lab: Lab) -> Reader:
    """A classifier trained on the digits in both styles, so that it can read whatever the model draws."""
    steps = lab.pick(smoke=4, desk=600)

    def train() -> dict[str, torch.Tensor]:
        images, labels = digit_parts(lab)["pretrain"]
        generator = torch.Generator().manual_seed(0)
        views = [augment(x, generator) for _ in range(4) for x in (images, bold(images))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Reader()
            data = {"images": _flat(torch.cat(views)), "labels": labels.repeat(len(views))}
            tune(model, data, lr=2e-3, steps=steps, batch_size=64)
        return model.state_dict()

    model = Reader()
    model.load_state_dict(lab.cached("digits-reader", {"steps": steps}, train))
    return model.eval()


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of two sets of features (N, D) as Gaussians: means and covariances.

    Examples
    --------
    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> round(frechet(x, x), 3), round(frechet(x, x + 2), 3)
    (0.0, 12.0)
    """
    a, b = a.double(), b.double()
    one, other = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + one.trace() + other.trace() - 2 * cross)


@torch.no_grad()
def quality(
    model: nn.Module, task: Task, judge: Reader, start: float | None = None, count: int = 60
) -> dict[str, float]:
    """`distance` of drawings of 0 to 4 to the style, `prior` (share of 5 to 9 that can be read), their `diversity`.

    With the distance that the pretrained model starts from also `fit`, the part of it that has gone, 0 to 1.
    """
    labels = torch.arange(10).repeat_interleave(count)
    features = judge.features(draw(model, labels).view(-1, 1, 8, 8))
    learned = labels < 5
    wanted = judge.features(task.test["images"].view(-1, 1, 8, 8))
    found = {
        "distance": frechet(features[learned], wanted),
        "prior": float((judge.last(features).argmax(1) == labels)[~learned].float().mean()),
        "diversity": float(torch.cov(features[~learned].T).trace()),
    }
    return found if start is None else {**found, "fit": max(0.0, 1 - found["distance"] / start)}


def style_world(lab: Lab) -> TuningWorld:
    """20 bold digits of the classes 0 to 4, and some 220 others of these to compare with."""

    def task(seed: int) -> Task:
        parts = digit_parts(lab)
        images, labels = parts["pool"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        shown = torch.cat([order[labels[order] == kind][:4] for kind in range(5)])
        train = {"images": _flat(bold(images[shown])), "labels": labels[shown]}
        unseen, kinds = parts["test"]
        keep = kinds < 5
        return Task(train, {}, {"images": _flat(bold(unseen[keep])), "labels": kinds[keep]})

    judge, count = reader(lab), lab.pick(smoke=10, desk=60)
    start = quality(denoiser(lab), task(0), judge, count=count)["distance"]
    evaluate = functools.partial(quality, judge=judge, start=start, count=count)
    return TuningWorld("bold digits", lambda _: denoiser(lab), task, evaluate)
