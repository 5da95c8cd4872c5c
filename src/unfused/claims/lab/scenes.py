"""Drawn scenes: two to five textured shapes on textured ground, and a tiny ViT that has learned to name them.

Six shapes, six textures. The ViT was trained on scenes of one look: to name, from its class token, shape and texture of the
object in the middle, and from each patch those at its centre. (The middle alone taught it nothing in the minutes there are:
a probe of it stayed at chance.) Tasks are drawn in another look: other textures (their drawing rules, not their colours
alone), other colours. Asked is the shape in the middle, or the shape at every pixel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from unfused.claims.lab.tuning import Batch, Task, tune

if TYPE_CHECKING:
    from transformers import ViTConfig, ViTModel

    from unfused.claims.lab import Lab

__all__ = [
    "SHAPES",
    "SIZE",
    "Scenes",
    "draw_scenes",
    "scene_config",
    "scene_task",
    "scenes_accuracy",
    "scenes_backbone",
    "shape_of",
]

SIZE = 64
SHAPES = ("disc", "square", "triangle", "cross", "ring", "bar")
LOOKS = ("pretraining", "task")


class Scenes(NamedTuple):
    """Pictures (N, 3, 64, 64) of bytes; of the middle object its shape and texture (N,); what is at each pixel, 0 for the
    ground or 1 + 6 * shape + texture, (N, 64, 64) of bytes."""

    images: torch.Tensor
    shapes: torch.Tensor
    textures: torch.Tensor
    codes: torch.Tensor


def draw_scenes(count: int, seed: int, look: str = "pretraining") -> Scenes:
    """Draw `count` scenes.

    Examples
    --------
    >>> scenes = draw_scenes(2, seed=0)
    >>> [(tuple(column.shape), column.dtype) for column in (scenes.images, scenes.codes)]
    [((2, 3, 64, 64), torch.uint8), ((2, 64, 64), torch.uint8)]
    """
    if look not in LOOKS:
        raise ValueError(f"look={look!r}: choose one of {', '.join(LOOKS)}")
    generator = torch.Generator().manual_seed(2 * seed + LOOKS.index(look))
    parts = [_draw(min(1000, count - start), look, generator) for start in range(0, count, 1000)]
    return Scenes(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _draw(count: int, look: str, generator: torch.Generator) -> Scenes:
    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    def choice(n: int) -> torch.Tensor:
        return torch.randint(n, (count,), generator=generator)

    down, across = torch.meshgrid(*[torch.arange(SIZE) + 0.5 - SIZE / 2] * 2, indexing="ij")
    colours = _colours(look)

    def paint(texture: torch.Tensor, contrast: float) -> torch.Tensor:
        angle, pitch, phase = uniform(0, math.pi), uniform(4, 7), uniform(0, 6)
        u = (across * angle.cos() + down * angle.sin()) / pitch + phase
        v = (down * angle.cos() - across * angle.sin()) / pitch + phase
        ink = torch.empty(count, SIZE, SIZE)
        for index in range(6):
            rows = texture == index
            ink[rows] = _ink(look, index, u[rows], v[rows])
        first, second = colours[choice(len(colours))], colours[choice(len(colours))]
        ink = (contrast * ink)[:, None]
        return first[:, :, None, None] * (1 - ink) + second[:, :, None, None] * ink

    images = 0.5 + 0.4 * (paint(choice(6), 0.5) - 0.5)
    codes = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    others = 1 + choice(4)
    for place in range(5):
        shape, texture = choice(6), choice(6)
        middle = place == 4
        x, y = (uniform(-3, 3), uniform(-3, 3)) if middle else (uniform(-26, 26), uniform(-26, 26))
        turn, size = uniform(0, 2 * math.pi), uniform(9, 14)
        a = ((across - x) * turn.cos() + (down - y) * turn.sin()) / size
        b = ((down - y) * turn.cos() - (across - x) * turn.sin()) / size
        inside = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
        for index in range(6):
            rows = shape == index
            inside[rows] = _inside(index, a[rows], b[rows])
        inside &= (others > place)[:, None, None] | middle
        images = torch.where(inside[:, None], paint(texture, 1.0), images)
        codes = torch.where(inside, (1 + 6 * shape + texture)[:, None, None], codes)
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    return Scenes((255 * images.clamp(0, 1)).round().byte(), shape, texture, codes.byte())


def _inside(shape: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where a shape is, in its own coordinates, about 1 in radius."""
    radius = (a.square() + b.square()).sqrt()
    return (
        radius < 0.9,
        torch.maximum(a.abs(), b.abs()) < 0.8,
        (b < 0.6) & (b > 1.8 * a.abs() - 1.1),
        (torch.minimum(a.abs(), b.abs()) < 0.3) & (torch.maximum(a.abs(), b.abs()) < 1),
        (radius < 1) & (radius > 0.55),
        (a.abs() < 1.1) & (b.abs() < 0.4),
    )[shape]


def _ink(look: str, texture: int, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """How much of the second colour is where, 0 to 1; a period is 1 long."""
    wave_u, wave_v = (2 * math.pi * u).sin(), (2 * math.pi * v).sin()
    if look == "pretraining":
        found = (
            wave_u > 0,  # stripes
            (wave_u > 0) ^ (wave_v > 0),  # chequers
            wave_u.square() + wave_v.square() < 0.7,  # dots
            (u % 1 < 0.25) | (v % 1 < 0.25),  # a grid
            (u % 2 < 0.4),  # thin lines, far apart
            0.5 + 0.5 * (wave_u / 3),  # nearly plain
        )[texture]
    else:
        found = (
            (2 * math.pi * (u + 0.3 * wave_v)).sin() > 0,  # waves
            (v + 2 * (u % 1 - 0.5).abs()) % 1 < 0.5,  # zigzags
            0.5 + 0.25 * (wave_u + wave_v),  # soft plaid
            ((u + 0.5 * (v // 1 % 2)) % 1 < 0.2) | (v % 1 < 0.2),  # bricks
            wave_u * wave_v > 0.5,  # small islands
            (u % 1),  # ramps
        )[texture]
    return found.float()


def _colours(look: str) -> torch.Tensor:
    """Eight colours, (8, 3)."""
    hues = torch.arange(8) / 8 + (0.0 if look == "pretraining" else 1 / 16)
    waves = 0.5 + 0.5 * (2 * math.pi * (hues[:, None] + torch.tensor([0, 1 / 3, 2 / 3]))).cos()
    light = torch.tensor([1.0, 0.6]).repeat(4)[:, None]
    return waves * light if look == "pretraining" else 1 - 0.7 * waves.flip(0) * light


# -- the backbone ------------------------------------------------------------------------------------------------------


def scene_config(**more: Any) -> ViTConfig:
    """A ViT of width 64, 8 blocks, patches of 8 pixels: 285,000 weights."""
    from transformers import ViTConfig

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
    }
    return ViTConfig(image_size=SIZE, patch_size=8, **sizes, **more)


class _Naming(nn.Module):
    """Shape and texture, or neither, from every token of the ViT."""

    def __init__(self, vit: ViTModel) -> None:
        super().__init__()
        self.vit, self.classifier = vit, nn.Linear(64, 14)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        scores = self.classifier(self.vit(_pixel_values(pixel_values)).last_hidden_state)
        logits = scores.unflatten(-1, (2, 7)).permute(0, 3, 1, 2)  # (N, 7, tokens, 2)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _names(scenes: Scenes) -> torch.Tensor:
    """For the class token and the centre of each patch: 1 + shape and 1 + texture, or 0 (N, tokens, 2)."""
    codes = scenes.codes[:, 4::8, 4::8].flatten(1).long()
    codes = torch.cat([(1 + 6 * scenes.shapes + scenes.textures)[:, None], codes], 1)
    return torch.stack([shape_of(codes), torch.where(codes > 0, (codes - 1) % 6 + 1, 0)], -1)


def shape_of(codes: torch.Tensor) -> torch.Tensor:
    """0 for the ground, 1 + the shape elsewhere."""
    return (codes + 5) // 6


def scenes_backbone(lab: Lab) -> ViTModel:
    """The ViT, pretrained on 10,000 scenes and their mirror images; `scenes_accuracy` says how well."""
    from transformers import ViTModel

    model = ViTModel(scene_config(), add_pooling_layer=False)
    model.load_state_dict(_pretrained(lab)["weights"])
    return model.eval()


def scenes_accuracy(lab: Lab) -> dict[str, float]:
    """How often the pretrained ViT names the middle's shape and texture right, in new scenes of its own look."""
    return _pretrained(lab)["accuracy"]


def _pretrained(lab: Lab) -> dict[str, Any]:
    from transformers import ViTModel

    steps, count = lab.pick(smoke=1, desk=1500), lab.pick(smoke=16, desk=10_000)

    def pretrain() -> dict[str, Any]:
        scenes, new = draw_scenes(count, seed=0), draw_scenes(lab.pick(smoke=4, desk=500), seed=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _Naming(ViTModel(scene_config(), add_pooling_layer=False))
            mirrored = Scenes(scenes.images.flip(3), scenes.shapes, scenes.textures, scenes.codes.flip(2))
            data = {
                "pixel_values": torch.cat([scenes.images, mirrored.images]),
                "labels": torch.cat([_names(scenes), _names(mirrored)]),
            }
            tune(model, data, lr=1e-3, steps=steps, batch_size=32, warmup=0.1)
        with torch.inference_mode():
            said = model(new.images).logits[:, :, 0].argmax(1)  # (N, 2)
        right = (said == _names(new)[:, 0]).float().mean(0)
        lab.log(f"pretrained ViT: right on shapes {right[0]:.3f}, on textures {right[1]:.3f} of new scenes")
        return {
            "weights": model.vit.state_dict(),
            "accuracy": {"shape": float(right[0]), "texture": float(right[1])},
        }

    return lab.cached("scenes-vit", {"steps": steps, "count": count}, pretrain)


def scene_task(lab: Lab, seed: int, kind: str) -> Task:
    """In the other look: 500 pictures with the shape in the middle, or 100 with the shape at every pixel; as many as a fifth,
    or half, of that to choose by; 500, or 300, others to test on.

    Parameters
    ----------
    lab : Lab
    seed : int
    kind : {"classes", "pixels"}
    """
    if kind not in ("classes", "pixels"):
        raise ValueError(f"kind={kind!r}: choose 'classes' or 'pixels'")
    desk = (500, 100, 500) if kind == "classes" else (100, 50, 300)
    sizes = lab.pick(smoke=(6, 4, 4), desk=desk)
    scenes = draw_scenes(sum(sizes[:2]), seed=1000 + seed, look="task")
    test = draw_scenes(sizes[2], seed=1, look="task")

    def batch(part: Scenes) -> Batch:
        labels = part.shapes if kind == "classes" else shape_of(part.codes.long())
        return {"pixel_values": _pixel_values(part.images), "labels": labels}

    parts = zip(*(column.split(list(sizes[:2])) for column in scenes), strict=True)
    train, valid = (Scenes(*columns) for columns in parts)
    return Task(batch(train), batch(valid), batch(test), num_labels=6 if kind == "classes" else 7)


def _pixel_values(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1
