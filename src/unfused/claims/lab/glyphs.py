"""Glyphs of matplotlib's fonts: a classifier of digits and, for the verifier in vision therapy, one that never saw a digit.

matplotlib is a dependency and ships DejaVu, STIX and Computer Modern; PIL renders 62 characters in 21 of them (ink is 1),
which a random affine map brings to 20 x 20. The *source* is clean digits. The *target* is turned by up to 25 degrees,
blurred, crossed by strokes, noisy, with an inverted patch; a second target is scikit-learn's handwritten digits, upsampled.

- `digit_model(lab, seed)`: a small CNN under cosine weights, as an image tower is under a text classifier, trained on clean
  digits alone.
- `letter_verifier(lab, seed)`: sees two examples and a query, says whether the query is what its sentence says. Trained
  episodically on letters of the target's corruption (half of each batch's turned by quarters or mirrored, each so a class
  of its own, since 44 letters are few); its classes exist in the examples only. It knows of the sentences
  whether the negative's is the query's. `auc` is on letters held out.

The corruption's strength was set by the digit model's accuracy alone, to about .63, the middle of the card's range (seed 100:
.74 at 0.5, .63 at 0.75, .51 at 1.0; .52 on handwritten digits).
"""

from __future__ import annotations

import functools
import math
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unfused.claims.lab.tuning import tune

if TYPE_CHECKING:
    from unfused.claims.lab import Lab

__all__ = [
    "DigitModel",
    "LetterVerifier",
    "corrupt",
    "cosine_logits",
    "digit_model",
    "features",
    "glyphs",
    "handwritten",
    "letter_verifier",
    "logits",
    "target_digits",
]

CHARACTERS = string.digits + string.ascii_lowercase + string.ascii_uppercase
FONTS = (
    *(
        f"DejaVu{kind}{style}"
        for kind in ("Sans", "SansMono")
        for style in ("", "-Bold", "-Oblique", "-BoldOblique")
    ),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *(f"cm{kind}10" for kind in ("r", "b", "ss", "tt", "ti")),
)
SIDE, DIM = 20, 64
TEMPERATURE = 0.07
STRENGTH = 0.75


@functools.cache
def _stencils() -> Tensor:
    """Every character in every font, (62, 21, 40, 40) of bytes."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = np.zeros((len(CHARACTERS), len(FONTS), 40, 40), np.uint8)
    for column, name in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 32)
        for row, character in enumerate(CHARACTERS):
            picture = Image.new("L", (40, 40))
            left, top, right, bottom = font.getbbox(character)
            ImageDraw.Draw(picture).text(
                (20 - (left + right) / 2, 20 - (top + bottom) / 2), character, fill=255, font=font
            )
            found[row, column] = np.asarray(picture)
    return torch.from_numpy(found)


def glyphs(labels: Tensor, seed: int, turn: float = 8.0) -> Tensor:
    """Clean pictures (n, 1, 20, 20) in 0..1 of the characters with these numbers ("0" is 0, "a" 10, "A" 36).

    Parameters
    ----------
    labels : tensor of int, shape (n,)
    seed : int
        Draws fonts and maps.
    turn : float, default=8.0
        Largest angle, in degrees.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(labels)
    fonts = torch.randint(len(FONTS), (n,), generator=generator)
    draw = 2 * torch.rand(n, 6, generator=generator) - 1
    angle, grow = draw[:, 0] * math.radians(turn), 1 + 0.1 * draw[:, 1:3]
    matrix = torch.stack(
        [
            torch.stack([angle.cos() * grow[:, 0], -angle.sin() + 0.1 * draw[:, 3], 0.08 * draw[:, 4]], 1),
            torch.stack([angle.sin(), angle.cos() * grow[:, 1], 0.08 * draw[:, 5]], 1),
        ],
        1,
    )  # (n, 2, 3)
    pieces = []
    for rows in torch.arange(n).split(2000):
        stencils = _stencils()[labels[rows], fonts[rows]][:, None].float() / 255
        grid = F.affine_grid(matrix[rows], list(stencils.shape), align_corners=False)
        pieces.append(F.avg_pool2d(F.grid_sample(stencils, grid, align_corners=False), 2))
    return torch.cat(pieces)


def corrupt(images: Tensor, seed: int, strength: float = STRENGTH) -> Tensor:
    """Blur, strokes, an inverted patch and noise, each picture its own."""
    generator = torch.Generator().manual_seed(seed + 15485863)
    n = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    weight = 0.9 * strength * uniform(n, 1, 1, 1)
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    blurred = F.conv2d(
        F.conv2d(images, kernel.view(1, 1, 1, 5), padding=(0, 2)), kernel.view(1, 1, 5, 1), padding=(2, 0)
    )
    x = images + weight.clamp(max=1) * (blurred - images)
    place = torch.stack(
        torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), -1
    ).float()  # (20, 20, 2)
    for _ in range(2):
        ends = SIDE * uniform(n, 2, 2)
        along = (ends[:, 1] - ends[:, 0])[:, None, None]
        offset = place - ends[:, None, None, 0]
        share = ((offset * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)).clamp(0, 1)
        distance = (offset - share[..., None] * along).norm(dim=-1)  # (n, 20, 20) to the segment
        ink = (1.4 - distance).clamp(0, 1) * strength * uniform(n, 1, 1)
        x = torch.maximum(x, ink[:, None])
    corner, size = (SIDE - 4) * uniform(n, 2), 3 + 7 * strength * uniform(n, 2)
    near = (place >= corner[:, None, None]) & (place < (corner + size)[:, None, None])  # (n, 20, 20, 2)
    inside = (near.all(-1) & (uniform(n, 1, 1) < 0.6))[:, None]
    x = torch.where(inside, 1 - x, x)
    return (x + 0.15 * strength * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def target_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Corrupted digits, each about equally often, and their labels."""
    labels = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % 10
    return corrupt(glyphs(labels, seed, turn=25.0), seed), labels


def handwritten(seed: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits at 20 x 20, shuffled."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = torch.from_numpy(data.images[order]).float()[:, None] / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    return F.pad(images, (2, 2, 2, 2)), torch.from_numpy(data.target[order]).long()


class _Encoder(nn.Sequential):
    """(n, 1, 20, 20) to (n, 64). Groups instead of batches are normalised: a pool's statistics would be a method more."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 1
        for out, stride in ((12, 1), (24, 2), (48, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(4, out), nn.ReLU()]
            channels = out
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * (SIDE // 4) ** 2, DIM))


class _Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Encoder()
        self.weights = nn.Parameter(torch.randn(10, DIM))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = cosine_logits(self.encoder(images), self.weights)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass(frozen=True, eq=False)
class DigitModel:
    """An encoder and the ten frozen weights that its features are compared with.

    Attributes
    ----------
    encoder : nn.Module
        Copy it before you train it.
    weights : tensor of shape (10, 64)
    source : float
        Accuracy on other clean digits.
    """

    encoder: nn.Module
    weights: Tensor
    source: float


def cosine_logits(z: Tensor, weights: Tensor) -> Tensor:
    """Scaled cosines (n, 10) of features with weights."""
    return F.normalize(z, dim=-1) @ F.normalize(weights, dim=-1).T / TEMPERATURE


def logits(encoder: nn.Module, weights: Tensor, images: Tensor) -> Tensor:
    """Scaled cosines (n, 10) of pictures, without gradients for the encoder."""
    return cosine_logits(features(encoder, images), weights)


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Unit features (n, 64)."""
    return F.normalize(torch.cat([encoder(piece) for piece in images.split(500)]), dim=-1)


def digit_model(lab: Lab, seed: int) -> DigitModel:
    """The CNN of this seed, kept by the lab."""
    steps, count = lab.pick(smoke=10, desk=400), lab.pick(smoke=100, desk=4000)

    def train() -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _Cosine()
        labels = torch.arange(count) % 10
        data = {"images": glyphs(labels, 1_000_000 + seed), "labels": labels}
        tune(model, data, lr=2e-3, steps=steps, seed=seed, batch_size=64, warmup=0.1)
        new = torch.arange(lab.pick(smoke=50, desk=1000)) % 10
        guess = logits(model.encoder, model.weights, glyphs(new, 2_000_000 + seed)).argmax(1)
        return {"state": model.state_dict(), "source": float((guess == new).float().mean())}

    found = lab.cached("glyph-digits", {"seed": seed, "steps": steps, "count": count}, train)
    model = _Cosine()
    model.load_state_dict(found["state"])
    model.eval().requires_grad_(False)
    lab.log(f"digit model {seed}: {found['source']:.3f} on clean digits")
    return DigitModel(model.encoder, model.weights.detach(), found["source"])


class LetterVerifier(nn.Module):
    """Three embeddings and one bit to the logit of "True".

    Attributes
    ----------
    encoder : nn.Module
        (n, 1, 20, 20) to (n, 64).
    auc : float
        On letters that it was not trained on.
    """

    auc = float("nan")

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Encoder()
        self.head = nn.Sequential(nn.Linear(5 * DIM + 1, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, negative: Tensor, positive: Tensor, query: Tensor, same: Tensor) -> Tensor:
        """Logits (n,) from embeddings (n, 64); `same` is 1 where the negative's sentence is the query's."""
        n, p, q = (math.sqrt(DIM) * F.normalize(z, dim=-1) for z in (negative, positive, query))
        pairs = [(q - p).abs(), (q - n).abs(), (p - n).abs(), q * p, q * n]
        return self.head(torch.cat([*pairs, same[:, None].float()], dim=1))[:, 0]


def _episodes(classes: int, each: int, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Row numbers of negative, positive, query in `classes x each` pictures, the bit, and the truth.

    Half are as in diagnosis (the negative is of another class, said to be the query's), half as in therapy (the negative
    is of the same class, said to be another); half of each are true. A false query is the negative's class half the time.
    """

    def whole(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    y = whole(classes)
    other = (y + 1 + whole(classes - 1)) % classes
    third = (y + 1 + whole(classes - 1)) % classes
    same, truth = whole(2), whole(2)
    wrong = torch.where((same == 1) & (whole(2) == 1), other, third)
    number = torch.rand(count, each, generator=generator).topk(3, dim=1).indices  # distinct pictures
    rows = [
        each * kind + column
        for kind, column in zip(
            (torch.where(same == 1, other, y), y, torch.where(truth == 1, y, wrong)),
            number.unbind(1),
            strict=True,
        )
    ]
    return (*rows, same, truth)


def letter_verifier(lab: Lab, seed: int) -> LetterVerifier:
    """The verifier of this seed, kept by the lab."""
    steps, pool = lab.pick(smoke=6, desk=1200), lab.pick(smoke=8, desk=300)
    classes, each, count = 24, 6, 768

    def train() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        letters = 10 + torch.randperm(52, generator=generator)
        known, unseen = letters[8:], letters[:8]

        def pictures(kinds: Tensor, many: int, number: int) -> Tensor:
            labels = kinds.repeat_interleave(many)
            return corrupt(glyphs(labels, number, turn=25.0), number).view(len(kinds), many, 1, SIDE, SIDE)

        data = pictures(known, pool, 3_000_000 + seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LetterVerifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            some = torch.randperm(len(known), generator=generator)[:classes]
            draw = torch.randint(pool, (classes, each), generator=generator)
            batch = data[some[:, None], draw]
            quarter, mirrored = torch.randint(4, (classes // 2,), generator=generator), classes // 4
            batch[:mirrored] = batch[:mirrored].flip(-1)
            for k in range(1, 4):
                batch[: classes // 2][quarter == k] = batch[: classes // 2][quarter == k].rot90(k, (-2, -1))
            z = model.encoder(batch.flatten(0, 1))
            *rows, same, truth = _episodes(classes, each, count, generator)
            loss = F.binary_cross_entropy_with_logits(model(*(z[row] for row in rows), same), truth.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        many = lab.pick(smoke=8, desk=100)
        with torch.no_grad():
            z = model.eval().encoder(pictures(unseen, many, 4_000_000 + seed).flatten(0, 1))
            *rows, same, truth = _episodes(len(unseen), many, 4000, generator)
            said = model(*(z[row] for row in rows), same)
        from sklearn.metrics import roc_auc_score

        return {"state": model.state_dict(), "auc": float(roc_auc_score(truth, said))}

    found = lab.cached(
        "glyph-verifier", {"seed": seed, "steps": steps, "pool": pool, "episodes": count}, train
    )
    model = LetterVerifier()
    model.load_state_dict(found["state"])
    model.auc = found["auc"]
    lab.log(f"verifier {seed}: AUC {found['auc']:.3f} on unseen letters")
    return model.eval().requires_grad_(False)
