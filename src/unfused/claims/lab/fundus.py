"""Synthetic textures, a small ViT pretrained on them, and two medical tasks: drawn fundus photographs and real blood cells.

A fundus here is a disc with an optic disc, vessels and some small lesions; their number alone sets the grade, while brightness
and hue differ from picture to picture. Cells are crops of the public BCCD set (red cells, white cells, platelets), cut from
microscope pictures that are either for training or for testing, and are there only where `detection/bccd` is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import nn

from unfused.claims.lab.tuning import Batch, Task, TuningWorld, fresh_head, tune

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

    from unfused.claims.lab import Lab

__all__ = ["cells_world", "fundus", "fundus_world", "texture_backbone", "textures"]

SIDE, PATCH, WIDTH, DEPTH = 32, 8, 64, 6
TEXTURES = 12
LESIONS = torch.tensor([[0, 0], [1, 2], [3, 5], [6, 9], [10, 16]])  # fewest and most, by grade
CELLS = ("Platelets", "RBC", "WBC")


# -- pictures ----------------------------------------------------------------------------------------------------------


def _draw(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _grid(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates (N, S, S) in [-1, 1], turned and moved by chance."""
    axis = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle, moved = (
        _draw(generator, count, 1, 1, high=math.pi),
        _draw(generator, 2, count, 1, 1, low=-0.5, high=0.5),
    )
    x, y = x - moved[0], y - moved[1]
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _noise(
    count: int, generator: torch.Generator, exponent: float, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """Unit-variance noise (N, S, S) of spectrum f^-exponent between two shares of the highest frequency."""
    across, down = torch.fft.rfftfreq(SIDE), torch.fft.fftfreq(SIDE)
    frequency = 2 * (across[None] ** 2 + down[:, None] ** 2).sqrt()
    weight = (
        frequency.clamp_min(2 / SIDE) ** -exponent
        * (frequency >= low)
        * (frequency <= high)
        * (frequency > 0)
    )
    white = torch.fft.rfft2(torch.randn(count, SIDE, SIDE, generator=generator))
    field = torch.fft.irfft2(white * weight, s=(SIDE, SIDE))
    return field / field.std((1, 2), keepdim=True)


def textures(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, 32, 32) in [0, 1] of 12 kinds of pattern in two random colours, and the kinds (N,)."""
    labels = torch.randint(TEXTURES, (count,), generator=generator)
    x, y = _grid(count, generator)
    rate = _draw(generator, count, 1, 1, low=4, high=14)
    spots = _draw(generator, count, 6, 2, 1, 1, low=-0.9, high=0.9)
    axis = torch.linspace(-1, 1, SIDE)
    distance = (axis.view(1, 1, -1, 1) - spots[:, :, 0]) ** 2 + (axis.view(1, 1, 1, -1) - spots[:, :, 1]) ** 2
    smooth = _noise(count, generator, 2.0)
    radius = (x**2 + y**2).sqrt()
    patterns = torch.stack(
        [
            (rate * x).sin(),
            ((rate * x).sin() * (rate * y).sin()).sign(),
            (rate * x).cos() + (rate * y).cos() - 0.7,
            (1.5 * rate * radius).sin(),
            ((rate / 2).round() * torch.atan2(y, x)).sin(),
            smooth,
            _noise(count, generator, 1.0),
            _noise(count, generator, 0.0, 0.3, 0.5),
            2.5 * (-distance * 40).exp().sum(1) - 0.8,
            (rate * x + smooth).sin(),
            ((rate * x).sin() + (rate * y).sin()) / 1.4,
            (_noise(count, generator, 3.0, 0.05, 0.4) * 8).tanh(),
        ],
        1,
    )  # (N, 12, S, S)
    pattern = patterns[torch.arange(count), labels][:, None]
    dark, bright = _draw(generator, count, 3, 1, 1, high=0.6), _draw(generator, count, 3, 1, 1, low=0.3)
    share = (0.5 + 0.5 * pattern * _draw(generator, count, 1, 1, 1, low=0.5)).clamp(0, 1)
    pictures = dark + (bright - dark) * share
    return (pictures + 0.03 * torch.randn(pictures.shape, generator=generator)).clamp(0, 1), labels


def fundus(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, 32, 32) in [0, 1] of the back of an eye, and their grades (N,) from 0 to 4."""
    grades = torch.randint(len(LESIONS), (count,), generator=generator)
    fewest, most = LESIONS[grades].unbind(1)
    number = fewest + (_draw(generator, count) * (most - fewest + 1)).long()
    axis = torch.linspace(-1, 1, SIDE)
    down, across = axis.view(1, -1, 1), axis.view(1, 1, -1)
    radius = (down**2 + across**2).sqrt()  # (1, S, S)
    light = 1 - 0.4 * radius**2
    at = _draw(generator, 2, count, 1, 1, low=-0.5, high=0.5)
    light = light + 0.5 * (-((down - at[0]) ** 2 + (across - at[1]) ** 2) / 0.03).exp()  # the optic disc
    for _ in range(3):  # vessels: dark parabolas
        x, y = _grid(count, generator)
        bend, width = (
            _draw(generator, count, 1, 1, low=-1, high=1),
            _draw(generator, count, 1, 1, low=0.02, high=0.05),
        )
        light = light * (1 - 0.4 * (-(((y - bend * x**2) / width) ** 2)).exp())
    base = torch.tensor([0.75, 0.40, 0.20]) * _draw(generator, count, 3, low=0.65, high=1.35)  # hue
    brightness = _draw(generator, count, 1, 1, 1, low=0.5, high=1.1)
    pictures = base.view(count, 3, 1, 1) * brightness * light[:, None]
    place = _draw(generator, 2, count, int(LESIONS.max()), 1, 1)
    turn, far = 2 * math.pi * place[0], 0.85 * place[1].sqrt()
    size = _draw(generator, count, place.shape[2], 1, 1, low=0.06, high=0.09)
    spread = ((down - far * turn.sin()) ** 2 + (across - far * turn.cos()) ** 2) / size**2  # (N, 16, S, S)
    shown = (torch.arange(place.shape[2]) < number[:, None]).view(count, -1, 1, 1)
    spots = (-spread / 2).exp() * shown
    pale = (_draw(generator, count, place.shape[2], 1, 1) < 0.5).float()
    exudate, blood = (spots * pale).sum(1)[:, None], (spots * (1 - pale)).sum(1)[:, None]
    pictures = pictures + brightness * exudate.clamp(0, 1) * torch.tensor([0.4, 0.5, 0.3]).view(1, 3, 1, 1)
    pictures = pictures * (1 - blood.clamp(0, 1) * torch.tensor([0.6, 0.9, 0.9]).view(1, 3, 1, 1))
    pictures = pictures * (radius < 0.97) + 0.02 * torch.randn(pictures.shape, generator=generator)
    return pictures.clamp(0, 1), grades


def _cells(lab: Lab) -> dict[str, torch.Tensor]:
    """`images` (N, 3, 32, 32), `labels` (N,), `held_out` (N,): whether the microscope picture is one for testing."""
    from PIL import Image

    from unfused.claims.lab import Absent

    folder = lab.data_dir / "detection" / "bccd" if lab.data_dir else None
    if folder is None or not (folder / "Annotations").is_dir():
        raise Absent(f"bccd: {folder or 'no data folder'} is not here; give --data DIR or set UNFUSED_DATA")
    images, labels, held_out = [], [], []
    for number, file in enumerate(sorted((folder / "Annotations").glob("*.xml"))):
        picture = Image.open(folder / "JPEGImages" / f"{file.stem}.jpg").convert("RGB")
        for cell in ElementTree.parse(file).getroot().iter("object"):
            box = [int(cell.findtext(f"bndbox/{side}", "0")) for side in ("xmin", "ymin", "xmax", "ymax")]
            if box[2] - box[0] < 8 or box[3] - box[1] < 8:
                continue
            crop = picture.crop(tuple(box)).resize((SIDE, SIDE))  # type: ignore[arg-type]
            images.append(np.asarray(crop, np.float32).transpose(2, 0, 1) / 255)
            labels.append(CELLS.index(str(cell.findtext("name"))))
            held_out.append(number % 3 == 0)
    return {
        "images": torch.from_numpy(np.stack(images)),
        "labels": torch.tensor(labels),
        "held_out": torch.tensor(held_out),
    }


# -- backbone ----------------------------------------------------------------------------------------------------------


def _vit(num_labels: int) -> ViTForImageClassification:
    from transformers import ViTConfig, ViTForImageClassification

    settings: dict[str, Any] = {
        "num_labels": num_labels
    }  # a field that the config takes but does not declare
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            **settings,
        )
    )


def _batch(images: torch.Tensor, labels: torch.Tensor) -> Batch:
    return {"pixel_values": 2 * images - 1, "labels": labels}


def texture_backbone(lab: Lab, num_labels: int | None = None) -> ViTForImageClassification:
    """The ViT for textures (32 x 32, patches of 8, width 64, 6 blocks, 216,000 weights).

    Parameters
    ----------
    lab : Lab
    num_labels : int, optional
        With it, the head is a new one, drawn from torch's global generator; without, the pretrained one of 12 textures.
    """
    steps, count = lab.pick(smoke=10, desk=1200), lab.pick(smoke=200, desk=20000)

    def pretrain() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _vit(TEXTURES)
            data = _batch(*textures(count, torch.Generator().manual_seed(0)))
            tune(model, data, lr=2e-3, steps=steps, warmup=0.1)
        return model.state_dict()

    state = lab.cached("texture-vit", {"steps": steps, "count": count}, pretrain)
    return fresh_head(_vit, state, num_labels, TEXTURES)


# -- tasks -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _predict(model: nn.Module, part: Batch) -> tuple[np.ndarray, np.ndarray, float]:
    logits = torch.cat([model(pixel_values=pixels).logits for pixels in part["pixel_values"].split(512)])
    loss = nn.functional.cross_entropy(logits.float(), part["labels"])
    return part["labels"].numpy(), logits.argmax(-1).numpy(), float(loss)


def _kappa(model: nn.Module, task: Task) -> dict[str, float]:
    """Quadratic-weighted kappa."""
    from sklearn.metrics import cohen_kappa_score

    found = {}
    for part in ("valid", "test"):
        truth, guess, found[f"{part}_loss"] = _predict(model, getattr(task, part))
        kappa = cohen_kappa_score(truth, guess, weights="quadratic", labels=range(len(LESIONS)))
        found[part] = float(np.nan_to_num(kappa))
    return found


def _balanced_accuracy(model: nn.Module, task: Task) -> dict[str, float]:
    from sklearn.metrics import balanced_accuracy_score

    found = {}
    for part in ("valid", "test"):
        truth, guess, found[f"{part}_loss"] = _predict(model, getattr(task, part))
        found[part] = float(balanced_accuracy_score(truth, guess))
    return found


def fundus_world(lab: Lab, labels: int = 200) -> TuningWorld:
    """Grading by `labels` pictures of each seed's own, 200 more to validate, 1,000 to test; judged by kappa."""

    def task(seed: int) -> Task:
        images, grades = fundus(labels + 200, torch.Generator().manual_seed(1000 + seed))
        test = fundus(lab.pick(smoke=100, desk=1000), torch.Generator().manual_seed(1))
        return Task(
            _batch(images[:labels], grades[:labels]),
            _batch(images[labels:], grades[labels:]),
            _batch(*test),
            num_labels=len(LESIONS),
        )

    return TuningWorld(f"fundus {labels}", lambda n: texture_backbone(lab, n), task, _kappa)


def cells_world(lab: Lab, per_class: int = 20) -> TuningWorld:
    """Kinds of cell by `per_class` crops of each, 20 more to validate; judged by balanced accuracy on other pictures' cells.

    Raises
    ------
    Absent
        Where the BCCD set is not on this machine.
    """
    cells = _cells(lab)

    def task(seed: int) -> Task:
        order = torch.randperm(len(cells["labels"]), generator=torch.Generator().manual_seed(seed))
        known = order[~cells["held_out"][order]]
        by_class = [known[cells["labels"][known] == label] for label in range(len(CELLS))]
        parts = [torch.cat([rows[:per_class] for rows in by_class])]
        parts.append(torch.cat([rows[per_class : per_class + 20] for rows in by_class]))
        parts.append(cells["held_out"].nonzero()[:, 0])
        train, valid, test = (_batch(cells["images"][rows], cells["labels"][rows]) for rows in parts)
        return Task(train, valid, test, num_labels=len(CELLS))

    return TuningWorld(f"cells {per_class}", lambda n: texture_backbone(lab, n), task, _balanced_accuracy)
