"""Pictures that ship with scikit-learn, a tiny ViT pretrained on them, and tasks that it was not trained for.

The 1,797 digits are split once: 900 pretrain the ViT, 447 are every task's test, and the other 450 are the pool that each
seed draws its few labels from. A task changes the pictures (a turn by 90 degrees, negative, over a fixed background; blur)
or the question (the parity of two digits' sum).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from unfused.claims.lab.tuning import Batch, Task, TuningWorld, fresh_head, tune

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

    from unfused.claims.lab import Lab

__all__ = [
    "augment",
    "blur_digits",
    "blurred_digits",
    "digit_parts",
    "digits_backbone",
    "digits_world",
    "pasted_digits",
    "pixel_values",
    "shift_digits",
    "shifted_digits",
]

PRETRAIN, POOL = 900, 450
VALID_PER_CLASS = 4


def digit_parts(lab: Lab) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`pretrain`, `pool` and `test`: images (N, 1, 8, 8) in [0, 1] and labels (N,)."""
    world = lab.world("digits")
    order = torch.randperm(len(world.labels), generator=torch.Generator().manual_seed(0))
    rows = dict(
        zip(
            ("pretrain", "pool", "test"),
            order.split([PRETRAIN, POOL, len(order) - PRETRAIN - POOL]),
            strict=True,
        )
    )
    images, labels = torch.from_numpy(world.images), torch.from_numpy(world.labels)
    return {part: (images[chosen], labels[chosen]) for part, chosen in rows.items()}


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """What the ViT takes: [0, 1] becomes [-1, 1]."""
    return 2 * images - 1


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turned by up to 10 degrees, scaled by up to 10 %, moved by up to half a pixel, with noise; a draw for each image."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    angle, scale = uniform(-math.pi / 18, math.pi / 18), uniform(0.9, 1.1)
    across, down = uniform(-0.125, 0.125), uniform(-0.125, 0.125)  # the picture is 2 wide: a pixel is 0.25
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, align_corners=False)
    return moved + 0.1 * torch.randn(moved.shape, generator=generator)


def digits_backbone(lab: Lab, num_labels: int | None = None) -> ViTForImageClassification:
    """The ViT for digits (8 x 8, patches of 2, width 64, 4 blocks, 136,000 weights), about 99 % right on unseen ones.

    Parameters
    ----------
    lab : Lab
    num_labels : int, optional
        With it, the head is a new one, drawn from torch's global generator; without, it is the pretrained one of 10 digits.
    """
    steps = lab.pick(smoke=30, desk=3000)

    def pretrain() -> dict[str, torch.Tensor]:
        images, labels = digit_parts(lab)["pretrain"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            views = torch.cat([augment(images, generator) for _ in range(lab.pick(smoke=2, desk=40))])
            model = _vit(10)
            tune(
                model,
                {"pixel_values": pixel_values(views), "labels": labels.repeat(len(views) // len(labels))},
                lr=1e-3,
                steps=steps,
                warmup=0.05,
            )
        return model.state_dict()

    state = lab.cached("digits-vit", {"steps": steps}, pretrain)
    return fresh_head(_vit, state, num_labels, 10)


def _vit(num_labels: int) -> ViTForImageClassification:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    config.num_labels = num_labels
    return ViTForImageClassification(config)


# -- tasks -------------------------------------------------------------------------------------------------------------


def shift_digits(images: torch.Tensor) -> torch.Tensor:
    """Turned by 90 degrees, negative, and 0.3 of one normal noise picture added, the same for all: (N, 1, 8, 8)."""
    background = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0))
    return 1 - images.rot90(1, (-2, -1)) + 0.3 * background


def blur_digits(images: torch.Tensor, sigma: float = 1.5) -> torch.Tensor:
    """Gaussian blur; at 1.5 pixels of 8, little more than the digit's rough shape is left."""
    at = torch.arange(-4, 5, dtype=images.dtype)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    wide = nn.functional.pad(images, (4, 4, 4, 4), mode="replicate")
    across = nn.functional.conv2d(wide, kernel.view(1, 1, 1, -1))
    return nn.functional.conv2d(across, kernel.view(1, 1, -1, 1))


def shifted_digits(lab: Lab, seed: int, per_class: int = 10) -> Task:
    """The same ten digits, shifted (`shift_digits`): `per_class` labels and 4 more for validation, 447 unseen."""
    return _digits_task(lab, seed, per_class, shift_digits)


def blurred_digits(lab: Lab, seed: int, per_class: int = 10) -> Task:
    """The same ten digits, blurred (`blur_digits`)."""
    return _digits_task(lab, seed, per_class, blur_digits)


def pasted_digits(lab: Lab, seed: int, per_class: int = 10) -> Task:
    """Two half-size digits side by side: is their sum even or odd?"""
    parts = digit_parts(lab)
    generator = torch.Generator().manual_seed(seed)
    train, valid = _draw(
        *_paste(*parts["pool"], 20 * (per_class + VALID_PER_CLASS), generator), seed, per_class
    )
    images, labels = _paste(*parts["test"], 1000, torch.Generator().manual_seed(0))
    return Task(train, valid, {"pixel_values": pixel_values(images), "labels": labels}, num_labels=2)


def digits_world(lab: Lab, kind: str = "shifted", per_class: int = 10) -> TuningWorld:
    """The ViT and one of the tasks, for `unfused.claims.lab.tuning.compare`.

    Parameters
    ----------
    lab : Lab
    kind : {"shifted", "blurred", "pasted"}, default="shifted"
    per_class : int, default=10
    """
    makers: dict[str, Callable[[Lab, int, int], Task]] = {
        "shifted": shifted_digits,
        "blurred": blurred_digits,
        "pasted": pasted_digits,
    }
    if kind not in makers:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(makers)}")
    make = makers[kind]
    return TuningWorld(
        f"{kind} digits",
        lambda num_labels: digits_backbone(lab, num_labels),
        lambda seed: make(lab, seed, per_class),
    )


def _digits_task(lab: Lab, seed: int, per_class: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Task:
    parts = digit_parts(lab)
    images, labels = parts["pool"]
    train, valid = _draw(change(images), labels, seed, per_class)
    images, labels = parts["test"]
    return Task(train, valid, {"pixel_values": pixel_values(change(images)), "labels": labels}, num_labels=10)


def _draw(images: torch.Tensor, labels: torch.Tensor, seed: int, per_class: int) -> tuple[Batch, Batch]:
    """`per_class` images of each class, and `VALID_PER_CLASS` others."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, valid = [], []
    for label in labels.unique():
        rows = order[labels[order] == label]
        if len(rows) < per_class + VALID_PER_CLASS:
            raise ValueError(
                f"per_class={per_class}: class {label} has {len(rows)} images, {VALID_PER_CLASS} validate"
            )
        train.append(rows[:per_class])
        valid.append(rows[per_class : per_class + VALID_PER_CLASS])

    def batch(rows: list[torch.Tensor]) -> Batch:
        chosen = torch.cat(rows)
        return {"pixel_values": pixel_values(images[chosen]), "labels": labels[chosen]}

    return batch(train), batch(valid)


def _paste(
    images: torch.Tensor, labels: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` pictures of two digits of 4 x 4 at random heights, and the parity of their sum."""
    small = nn.functional.avg_pool2d(images, 2)  # (N, 1, 4, 4)
    pairs = torch.randint(len(images), (count, 2), generator=generator)
    heights = torch.randint(5, (count, 2), generator=generator)
    rows = torch.arange(8).view(1, 8, 1) - heights.view(
        count, 1, 2
    )  # of the small digit, at each row of the picture
    inside = (rows >= 0) & (rows < 4)
    each, side = torch.arange(count).view(-1, 1, 1), torch.arange(2).view(1, 1, 2)
    halves = small[pairs][:, :, 0][each, side, rows.clamp(0, 3)] * inside[..., None]  # (count, 8, 2, 4)
    return halves.reshape(count, 1, 8, 8), labels[pairs].sum(1) % 2
