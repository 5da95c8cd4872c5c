"""Photographs, a tiny ViT that has only learned which way up they are, and few labels for what they show.

CIFAR-10, as far as it is found: 5,000 pictures of its train part, without their labels, teach the ViT to tell by how many
quarter turns a picture was turned (RotNet); the labels of a task are drawn from the same part, half as many more validate,
and 1,000 pictures of the test part test.

Reference: Unsupervised Representation Learning by Predicting Image Rotations, ICLR 2018, arXiv:1803.07728.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from unfused.claims.lab.tuning import Batch, Task, TuningWorld, fresh_head, tune
from unfused.claims.lab.worlds import Absent

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

    from unfused.claims.lab import Lab

__all__ = ["photo_parts", "photos_backbone", "photos_world"]

SIZE = 32


def photo_parts(lab: Lab) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`train` and `test`: images (N, 3, 32, 32) in [-1, 1] and labels (N,).

    Raises
    ------
    Absent
        Where there is no `images/cifar10` in the lab's data folder.
    """
    folder = lab.data_dir / "images" / "cifar10" if lab.data_dir else None
    if folder is None or not folder.is_dir():
        raise Absent(
            f"cifar10: {folder or 'no data folder'} is not here; give --data DIR or set UNFUSED_DATA"
        )
    every = 100 if lab.scale == "smoke" else 1
    return {part: _read(folder / part, every) for part in ("train", "test")}


@cache
def _read(folder: Path, every: int) -> tuple[torch.Tensor, torch.Tensor]:
    from PIL import Image

    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    paths = [
        (path, label) for label, name in enumerate(classes) for path in sorted((folder / name).glob("*.jpg"))
    ]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in paths[::every]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(
        [k for _, k in paths[::every]]
    )


def photos_backbone(lab: Lab, num_labels: int | None = None) -> ViTForImageClassification:
    """The ViT for photographs (32 x 32, patches of 4, width 64, 4 blocks).

    Parameters
    ----------
    lab : Lab
    num_labels : int, optional
        With it, the head is a new one, drawn from torch's global generator; without, it is that of the four turns.
    """
    steps, views = lab.pick(smoke=3, desk=2500), lab.pick(smoke=1, desk=16)
    images = photo_parts(lab)["train"][0]

    def pretrain() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            turned, turns = _turned(images.repeat(views, 1, 1, 1), torch.Generator().manual_seed(0))
            model = _vit(4)
            tune(
                model,
                {"pixel_values": turned, "labels": turns},
                lr=1e-3,
                steps=steps,
                batch_size=128,
                warmup=0.05,
            )
        return model.state_dict()

    found = hashlib.blake2b(images.numpy().tobytes(), digest_size=8).hexdigest()
    state = lab.cached("photos-vit", {"steps": steps, "views": views, "images": found}, pretrain)
    return fresh_head(_vit, state, num_labels, 4)


def photos_world(lab: Lab, per_class: int = 20) -> TuningWorld:
    """What ten kinds of photographs show, by `per_class` labels each; half as many more validate.

    Parameters
    ----------
    lab : Lab
    per_class : int, default=20
        At most 300.
    """
    parts = photo_parts(lab)

    def task(seed: int) -> Task:
        images, labels = parts["train"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        few = min(per_class, int(labels.bincount().min()) * 2 // 3)
        of_class = [order[labels[order] == label] for label in labels.unique()]
        train = torch.cat([rows[:few] for rows in of_class])
        valid = torch.cat([rows[few : few + max(2, few // 2)] for rows in of_class])
        return Task(_rows(images, labels, train), _rows(images, labels, valid), _rows(*parts["test"]), 10)

    return TuningWorld(f"cifar10 {per_class}", lambda num_labels: photos_backbone(lab, num_labels), task)


def _rows(images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> Batch:
    return {"pixel_values": images[rows], "labels": labels[rows]}


def _turned(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Moved by up to 4 pixels, mirrored half of the time, turned by 0 to 3 quarters; the number of quarters, (N,)."""
    wide = nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    down, across, mirrored, turns = (
        torch.randint(high, (len(images),), generator=generator) for high in (9, 9, 2, 4)
    )
    rows, columns = (at.view(-1, 1) + torch.arange(SIZE) for at in (down, across))
    columns = torch.where(mirrored.view(-1, 1) == 1, columns.flip(1), columns)
    each = torch.arange(len(images)).view(-1, 1, 1)
    moved = wide.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )  # (N, 3, S, S)
    for quarter in (1, 2, 3):
        moved[turns == quarter] = moved[turns == quarter].rot90(quarter, (-2, -1))
    return moved, turns


def _vit(num_labels: int) -> ViTForImageClassification:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    config.num_labels = num_labels
    return ViTForImageClassification(config)
