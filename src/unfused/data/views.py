"""Random views of pictures and their features: each view counts as a sample of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["encode_views", "random_view"]


def random_view(
    image: Any, rng: np.random.Generator, scale: tuple[float, float] = (0.5, 1.0), flip: bool = True
) -> Image.Image:
    """A crop of `scale` of the area, of an aspect ratio of 3/4 to 4/3, resized to the picture's size and flipped or not.

    Parameters
    ----------
    image : PIL image or uint8 array of shape (height, width[, 3])
    rng : numpy Generator
    scale : (float, float), default=(0.5, 1.0)
    flip : bool, default=True
        Mirror half of the views. False for characters and whatever else has a handedness.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    width, height = picture.size
    area = rng.uniform(*scale) * width * height
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide, high = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    view = picture.resize(picture.size, Image.Resampling.BICUBIC, box=(left, top, left + wide, top + high))
    if flip and rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view


def encode_views(
    images: Sequence[Any],
    encode: Callable[[list[Image.Image]], Any],
    n_views: int = 10,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: bool = True,
    random_state: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Features of `n_views` random views of every picture.

    Parameters
    ----------
    images : sequence of PIL images or uint8 arrays (height, width[, 3])
    encode : callable
        List of PIL images -> array (n, n_features): `FrozenEncoder(...).transform`, say.
    n_views : int, default=10
    scale, flip
        See `random_view`.
    random_state : int, default=0

    Returns
    -------
    features : ndarray of shape (n_views * n_images, n_features)
        View by view: the first `n_images` rows are the first view of each picture.
    source : ndarray of int, shape (n_views * n_images,)
        Which picture each row shows: `GDAClassifier.fit(features, y[source], groups=source)`.

    Examples
    --------
    >>> pictures = [np.full((8, 8, 3), shade, np.uint8) for shade in (0, 200)]
    >>> features, source = encode_views(pictures, lambda views: [np.asarray(v).mean((0, 1)) for v in views], n_views=3)
    >>> features[:, 0].tolist(), source.tolist()
    ([0.0, 200.0, 0.0, 200.0, 0.0, 200.0], [0, 1, 0, 1, 0, 1])
    """
    if not len(images) or n_views < 1:
        raise ValueError(f"{len(images)} images, n_views={n_views}: at least one of each is needed")
    rng = np.random.default_rng(random_state)
    rounds = [np.asarray(encode([random_view(i, rng, scale, flip) for i in images])) for _ in range(n_views)]
    return np.concatenate(rounds), np.tile(np.arange(len(images)), n_views)
