"""Pictures of one shape with a sentence about it, and a small CLIP that has learned which belongs to which.

A picture is 28 x 28 RGB: one of 8 shapes in one of 8 colours on one of 5 backgrounds in one of 2 sizes, at a jittered
place, turn and shade. The 64 classes are shape and colour: class `8 * shape + colour`, named "red circle" and so on; what
else varies is domain. A caption says what a picture shows but leaves any attribute out at random. `world(lab, seed)` holds a
`transformers.CLIPModel` (projection 64; one layer of text; an image tower whose one "patch" is the whole picture, read by
convolutions) trained by InfoNCE on 12,000 such pairs, kept by the lab; seeds are different pairs and different weights.
(Cut into patches of 4, a ViT learned the colours but in 900 steps no more than .22 of the shapes.) A target domain is
`shift`ed pictures. Nothing here uses a label of a target domain.

    clip = world(lab, seed)                                   # clip.model, clip.tokenizer, clip.logit_scale
    pool = draw(6000, seed=10 + seed)                         # pool.images, pool.labels, pool.attributes
    images = shift(pool.images, 0.5, seed=0)
    X = clip.features(images)                                 # (6000, 64) float32 numpy, unit rows
    W = clip.class_features(class_names())                    # (64, 64) unit rows, mean over templates
    accuracy((X @ W.T).argmax(1), pool.labels)

or, images rendered, encoded and kept by the lab:

    parts = domain(lab, seed, 0.5, {"pool": 6000, "valid": 1000, "test": 3000})
    X, y = parts["test"]                                      # features, labels, numpy
    rows = support(y_pool, shots=4, seed=draw_number)         # row numbers, 4 of each class

All randomness is by the `seed` given; the same seed gives the same pictures at every call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from unfused.claims.lab.tuning import tune

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

    from unfused.claims.lab import Lab

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "INVENTED",
    "SHAPES",
    "SIZES",
    "TEMPLATES",
    "Attributes",
    "ImageText",
    "Pool",
    "accuracy",
    "attributes_of",
    "captions",
    "class_names",
    "domain",
    "draw",
    "features",
    "misread",
    "render",
    "shift",
    "support",
    "views",
    "world",
    "zipf",
]

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "bar")
COLOURS = ("red", "green", "blue", "yellow", "pink", "cyan", "orange", "purple")
BACKGROUNDS = ("black", "gray", "white", "navy", "brown")
SIZES = ("small", "large")
INVENTED = tuple(
    "blicket dax wug toma fep zib modi gazzer plonk kiv rudge sarn tulver bime corp yast nolp quim drell hask".split()
)
"""Words that the tokenizer knows and no caption contains: names that mean nothing to the text tower."""
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a drawing of a {}", "a {}")

_RGB = torch.tensor(
    [
        [0.85, 0.10, 0.10],
        [0.10, 0.70, 0.15],
        [0.15, 0.30, 0.95],
        [0.95, 0.90, 0.15],
        [0.98, 0.55, 0.75],
        [0.20, 0.85, 0.90],
        [0.98, 0.55, 0.05],
        [0.55, 0.15, 0.75],
    ]
)
_GROUND = torch.tensor(
    [[0.05, 0.05, 0.05], [0.50, 0.50, 0.50], [0.95, 0.95, 0.95], [0.05, 0.08, 0.35], [0.38, 0.24, 0.12]]
)
_SIDE = 28
_OPENINGS = ("a photo of a", "a picture of a", "a drawing of a", "a")
_SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")


class Attributes(NamedTuple):
    """Of N pictures, what each shows: four columns (N,) of indices into SHAPES, COLOURS, BACKGROUNDS, SIZES."""

    shapes: torch.Tensor
    colours: torch.Tensor
    backgrounds: torch.Tensor
    sizes: torch.Tensor


class Pool(NamedTuple):
    """Pictures (N, 3, 28, 28) of bytes, their classes (N,) and all that they show."""

    images: torch.Tensor
    labels: torch.Tensor
    attributes: Attributes


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw(
    count: int,
    seed: int,
    *,
    classes: Sequence[float] | np.ndarray | None = None,
    backgrounds: Sequence[float] | None = None,
    sizes: Sequence[float] | None = None,
) -> Pool:
    """Draw `count` pictures at random.

    Parameters
    ----------
    count, seed : int
    classes : array-like of shape (64,), optional
        Weights of the classes, see `zipf`; by default each class equally often, up to one.
    backgrounds, sizes : sequence of float, optional
        Weights; by default equal.

    Examples
    --------
    >>> pool = draw(3, seed=0)
    >>> tuple(pool.images.shape), pool.images.dtype, tuple(pool.labels.shape)
    ((3, 3, 28, 28), torch.uint8, (3,))
    """
    generator = torch.Generator().manual_seed(seed)
    if classes is None:
        total = len(SHAPES) * len(COLOURS)
        labels = torch.cat(
            [torch.randperm(total, generator=generator) for _ in range(math.ceil(count / total))]
        )
        labels = labels[:count]
    else:
        labels = _choose(count, classes, generator)
    attributes = Attributes(
        labels // len(COLOURS),
        labels % len(COLOURS),
        _choose(count, backgrounds or [1.0] * len(BACKGROUNDS), generator),
        _choose(count, sizes or [1.0] * len(SIZES), generator),
    )
    return Pool(render(attributes, seed=seed), labels, attributes)


def _choose(count: int, weights: Any, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(torch.as_tensor(weights, dtype=torch.float64), count, True, generator=generator)


def render(attributes: Attributes, seed: int) -> torch.Tensor:
    """Pictures (N, 3, 28, 28) of bytes; `seed` draws place, turn, exact size, shade and grain."""
    generator = torch.Generator().manual_seed(seed + 7919)
    pieces = zip(*(column.split(2000) for column in attributes), strict=True)
    return torch.cat([_render(Attributes(*piece), generator) for piece in pieces])


def _render(attributes: Attributes, generator: torch.Generator) -> torch.Tensor:
    count = len(attributes.shapes)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1)), generator=generator)

    down, across = torch.meshgrid(*[torch.arange(_SIDE) + 0.5 - _SIDE / 2] * 2, indexing="ij")
    large = (attributes.sizes == 1)[:, None, None]
    size = torch.where(large, uniform(8.5, 10.5), uniform(5.0, 6.5))
    room = torch.where(large, 3.0, 6.0)
    x, y, turn = uniform(-1, 1) * room, uniform(-1, 1) * room, uniform(-0.25, 0.25)
    a = ((across - x) * turn.cos() + (down - y) * turn.sin()) / size  # (N, 28, 28)
    b = ((down - y) * turn.cos() - (across - x) * turn.sin()) / size
    depth = torch.empty(count, _SIDE, _SIDE)
    for index in range(len(SHAPES)):
        rows = attributes.shapes == index
        depth[rows] = _depth(index, a[rows], b[rows])
    inside = torch.sigmoid(4 * depth * size)[:, None]  # about a pixel of soft edge
    ink = _RGB[attributes.colours] + uniform(-0.06, 0.06, 3)
    ground = _GROUND[attributes.backgrounds] + uniform(-0.06, 0.06, 3)
    images = inside * ink[:, :, None, None] + (1 - inside) * ground[:, :, None, None]
    images += 0.03 * torch.randn(images.shape, generator=generator)
    return _bytes(images)


def _depth(shape: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How far inside the shape a point is, about; negative outside. Coordinates in which the shape is about 1 in radius."""
    radius = (a.square() + b.square()).sqrt()
    square = 0.8 - torch.maximum(a.abs(), b.abs())
    if shape == 0:
        return 0.9 - radius
    if shape == 1:
        return square
    if shape == 2:
        return torch.minimum(0.7 - b, (b + 1 - 2 * a.abs()) / 2.24)
    if shape == 3:
        return (1 - a.abs() - b.abs()) / 1.41
    if shape == 4:
        return torch.minimum(0.27 - torch.minimum(a.abs(), b.abs()), 0.95 - torch.maximum(a.abs(), b.abs()))
    if shape == 5:
        return torch.minimum(0.95 - radius, radius - 0.5)
    if shape == 6:
        return 0.68 + 0.32 * (5 * torch.atan2(a, -b)).cos() - radius
    return torch.minimum(1 - a.abs(), 0.35 - b.abs())


def _bytes(images: torch.Tensor) -> torch.Tensor:
    return (255 * images.clamp(0, 1)).round().byte()


def shift(images: torch.Tensor, strength: float, seed: int = 0) -> torch.Tensor:
    """Another domain: colours mixed by a matrix that `seed` draws, and grain, both in proportion to `strength`.

    Channels become `((1 - s) I + s R) rgb` with R three rows of weights that sum to 1, then noise of deviation 0.1 s is
    added. At 0 the pictures stay as they are. Zero-shot on 64 classes, seed 0 (five mixes each): .98 at 0, .96 at 0.2, .81
    (.74 to .87) at 0.35, .45 (.28 to .57) at 0.5.
    """
    if not strength:
        return images
    generator = torch.Generator().manual_seed(seed + 104729)
    mix = torch.distributions.Exponential(1.0).icdf(torch.rand(3, 3, generator=generator))
    mix = (1 - strength) * torch.eye(3) + strength * mix / mix.sum(1, keepdim=True)
    noise = 0.1 * strength
    pieces = [
        torch.einsum("oc,nchw->nohw", mix, piece.float() / 255)
        + noise * torch.randn(piece.shape, generator=generator)
        for piece in images.split(2000)
    ]
    return torch.cat([_bytes(piece) for piece in pieces])


def views(images: torch.Tensor, seed: int, scale: tuple[float, float] = (0.5, 1.0)) -> torch.Tensor:
    """One random view of each picture: a crop of `scale` of its area, resized, and a flip half the time."""
    generator = torch.Generator().manual_seed(seed + 15485863)
    count = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    area, ratio = uniform(*scale), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    flip = (torch.rand(count, generator=generator) < 0.5).float() * 2 - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = wide * flip, uniform(-1, 1) * (1 - wide)
    theta[:, 1, 1], theta[:, 1, 2] = high, uniform(-1, 1) * (1 - high)
    found = []
    for piece, part in zip(images.split(2000), theta.split(2000), strict=True):
        grid = F.affine_grid(part, list(piece.shape), align_corners=False)
        found.append(
            _bytes(F.grid_sample(piece.float() / 255, grid, padding_mode="border", align_corners=False))
        )
    return torch.cat(found)


# -- words -------------------------------------------------------------------------------------------------------------


def class_names() -> list[str]:
    """The 64 classes: "red circle", ... in the order of the labels."""
    return [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]


def attributes_of(labels: torch.Tensor | np.ndarray, seed: int) -> Attributes:
    """Attributes of pictures of the given classes, background and size drawn evenly: what `render` needs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(labels)
    backgrounds = torch.randint(len(BACKGROUNDS), labels.shape, generator=generator)
    sizes = torch.randint(len(SIZES), labels.shape, generator=generator)
    return Attributes(labels // len(COLOURS), labels % len(COLOURS), backgrounds, sizes)


def captions(attributes: Attributes, seed: int, omit: Sequence[float] = (0.1, 0.1, 0.5, 0.5)) -> list[str]:
    """A sentence for each picture, "a photo of a small red circle on a black background".

    Parameters
    ----------
    attributes : Attributes
    seed : int
        Draws the opening and what is left out.
    omit : sequence of 4 floats, default=(0.1, 0.1, 0.5, 0.5)
        How often shape ("thing" in its place), colour, background and size go unsaid.
    """
    generator = torch.Generator().manual_seed(seed + 32452843)
    count = len(attributes.shapes)
    said = torch.rand(count, 4, generator=generator) >= torch.tensor(omit)
    openings = torch.randint(len(_OPENINGS), (count,), generator=generator).tolist()
    rows = zip(openings, said.tolist(), torch.stack(attributes, 1).tolist(), strict=True)
    return [_sentence(opening, row, *shown) for opening, row, shown in rows]


def _sentence(opening: int, said: list[bool], shape: int, colour: int, background: int, size: int) -> str:
    words = [_OPENINGS[opening]]
    words += [SIZES[size]] * said[3] + [COLOURS[colour]] * said[1]
    words += [SHAPES[shape] if said[0] else "thing"]
    words += [f"on a {BACKGROUNDS[background]} background"] * said[2]
    return " ".join(words)


def misread(attributes: Attributes, error: float, seed: int) -> Attributes:
    """What a faulty reader sees: each attribute is another one, drawn evenly, with probability `error`."""
    generator = torch.Generator().manual_seed(seed + 49979687)
    columns = []
    for column, values in zip(attributes, (SHAPES, COLOURS, BACKGROUNDS, SIZES), strict=True):
        other = (column + torch.randint(1, len(values), column.shape, generator=generator)) % len(values)
        wrong = torch.rand(column.shape, generator=generator) < error
        columns.append(torch.where(wrong, other, column))
    return Attributes(*columns)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    """One token a word, `<start>` before and `<end>` after, as CLIP has it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    grammar = "a photo picture drawing of on background thing".split()
    words = [*_SPECIAL, *grammar, *SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *INVENTED]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=32,
    )


# -- the model ---------------------------------------------------------------------------------------------------------


def _config(width: int, layers: int) -> CLIPConfig:
    from transformers import CLIPConfig

    return CLIPConfig(
        text_config={
            "vocab_size": len(_tokenizer()),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "projection_dim": 64,
        },
        vision_config={
            "image_size": _SIDE,
            "patch_size": _SIDE,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "projection_dim": 64,
        },
        projection_dim=64,
    )


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """What the image tower takes: -1 to 1."""
    return images.float() / 127.5 - 1


class _Stem(nn.Sequential):
    """The whole picture to one feature, in place of cutting it into patches."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for out, kernel, stride in ((width // 2, 5, 2), (width, 3, 1), (width, 3, 2), (width, 3, 1)):
            layers += [
                nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            channels = out
        super().__init__(*layers, nn.Conv2d(channels, width, _SIDE // 4, bias=False))

    @property
    def weight(self) -> torch.Tensor:
        """Asked for its dtype by CLIP's embeddings."""
        first: Any = self[0]
        return first.weight


def _untrained(width: int, layers: int) -> CLIPModel:
    from transformers import CLIPModel

    model = CLIPModel(_config(width, layers))
    model.vision_model.embeddings.patch_embedding = _Stem(width)
    return model


class _Pairs(nn.Module):
    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, **text: torch.Tensor) -> Any:
        return self.model(pixel_values=pixel_values(images), return_loss=True, **text)


@dataclass(frozen=True, eq=False)
class ImageText:
    """A trained CLIP and what goes with it.

    Attributes
    ----------
    model : CLIPModel
        Frozen, in eval mode. Copy it before you train it.
    tokenizer : PreTrainedTokenizerBase
    zero_shot : float
        Accuracy on 64 classes, new pictures of the domain it was trained on.
    """

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    zero_shot: float

    @property
    def logit_scale(self) -> float:
        """The model's own, about 20; CLIP's is 100."""
        return float(self.model.logit_scale.detach().exp())

    def features(self, images: torch.Tensor, batch_size: int = 500) -> np.ndarray:
        """Unit image features, (N, 64) float32."""
        with torch.inference_mode():
            rows = [
                self.model.get_image_features(pixel_values(piece)).pooler_output
                for piece in images.split(batch_size)
            ]
        return F.normalize(torch.cat(rows), dim=-1).numpy().copy()

    def text_features(self, texts: Sequence[str], batch_size: int = 1000) -> np.ndarray:
        """Unit text features of whole sentences, (N, 64) float32."""
        rows = []
        with torch.inference_mode():
            for start in range(0, len(texts), batch_size):
                tokens = self.tokenizer(
                    list(texts[start : start + batch_size]), padding=True, return_tensors="pt"
                )
                rows.append(
                    self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
                )
        return F.normalize(torch.cat(rows), dim=-1).numpy().copy()

    def class_features(self, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> np.ndarray:
        """The text classifier: unit mean over templates of unit text features, (len(names), 64) float32."""
        each = self.text_features([template.format(name) for name in names for template in templates])
        mean = each.reshape(len(names), len(templates), -1).mean(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)


_TRAINED: dict[tuple[str, str, int], ImageText] = {}


def world(lab: Lab, seed: int) -> ImageText:
    """The trained CLIP of this seed; a few core-minutes when first asked for at desk scale."""
    here = (str(lab.cache_dir), lab.scale, seed)
    if here not in _TRAINED:
        _TRAINED[here] = _world(lab, seed)
    return _TRAINED[here]


def _world(lab: Lab, seed: int) -> ImageText:
    steps, count = lab.pick(smoke=8, desk=900), lab.pick(smoke=256, desk=12_000)
    width, layers = lab.pick(smoke=(32, 1), desk=(64, 1))

    def pretrain() -> dict[str, Any]:
        pool = draw(count, seed=1_000_000 + seed)
        text = _tokenizer()(captions(pool.attributes, seed=seed), padding=True, return_tensors="pt")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _untrained(width, layers)
            data = {
                "images": pool.images,
                "input_ids": text["input_ids"],
                "attention_mask": text["attention_mask"],
            }
            tune(_Pairs(model), data, lr=2e-3, steps=steps, seed=seed, batch_size=128, warmup=0.1)
        new = draw(lab.pick(smoke=64, desk=2000), seed=2_000_000 + seed)
        clip = ImageText(model.eval(), _tokenizer(), 0.0)
        logits = clip.features(new.images) @ clip.class_features(class_names()).T
        return {"weights": model.state_dict(), "zero_shot": accuracy(logits.argmax(1), new.labels)}

    sizes = {"seed": seed, "steps": steps, "count": count, "width": width, "layers": layers}
    found = lab.cached("image-text-clip", sizes, pretrain)
    model = _untrained(width, layers)
    model.load_state_dict(found["weights"])
    lab.log(f"small CLIP {seed}: zero-shot {found['zero_shot']:.3f} on 64 classes of its own domain")
    return ImageText(model.eval().requires_grad_(False), _tokenizer(), found["zero_shot"])


# -- what claims need --------------------------------------------------------------------------------------------------


def features(lab: Lab, seed: int, images: torch.Tensor) -> np.ndarray:
    """`world(lab, seed).features(images)`."""
    return world(lab, seed).features(images)


def domain(
    lab: Lab,
    seed: int,
    strength: float,
    counts: Mapping[str, int],
    *,
    shift_seed: int | None = None,
    **biases: Any,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Parts of one shifted domain, no picture in two of them: name -> unit features (N, 64), labels (N,). Kept by the lab.

    Parameters
    ----------
    lab : Lab
    seed : int
        Of the model and of the pictures.
    strength : float
        Of the shift.
    counts : mapping of str to int
        How many pictures each part has.
    shift_seed : int, optional
        Draws the colours' mix; by default `seed`.
    **biases
        `classes`, `backgrounds`, `sizes` of `draw`; for all parts alike.
    """
    clip = world(lab, seed)
    mix = seed if shift_seed is None else shift_seed
    plain = {name: np.asarray(value).tolist() for name, value in biases.items()}

    def encode() -> dict[str, Any]:
        found = {}
        for index, (name, count) in enumerate(counts.items()):
            pool = draw(count, seed=3_000_000 + 100 * seed + index, **plain)
            found[name] = [clip.features(shift(pool.images, strength, mix)), pool.labels.numpy()]
        return found

    params = {
        "seed": seed,
        "strength": strength,
        "counts": list(counts.items()),
        "mix": mix,
        "scale": lab.scale,
    }
    found = lab.cached("image-text-domain", {**params, "biases": plain}, encode)
    return {name: (part[0], part[1]) for name, part in found.items()}


def support(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Row numbers of `shots` samples of each class that occurs, at random, class by class.

    Examples
    --------
    >>> rows = support(np.array([0, 1, 0, 1, 1, 0]), shots=2, seed=0)
    >>> np.array([0, 1, 0, 1, 1, 0])[rows]
    array([0, 0, 1, 1])
    """
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    if count.min() < shots:
        raise ValueError(f"shots={shots}: a class has {count.min()} samples; draw more")
    return order[(first[:, None] + np.arange(shots)).ravel()]


def zipf(seed: int, exponent: float = 1.0, classes: int = 64) -> np.ndarray:
    """Weights of classes that fall as 1 / rank ** exponent, in an order that `seed` draws; they sum to 1."""
    weights = 1 / np.arange(1, classes + 1) ** exponent
    return np.random.default_rng(seed).permutation(weights / weights.sum())


def accuracy(predicted: Any, labels: Any) -> float:
    """Share of rows that are right."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))
