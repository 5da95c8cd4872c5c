"""Pictures of CIFAR-10 and Omniglot, and for each a small ResNet that SimCLR taught without their labels.

- "cifar10": 10 kinds of photographs; 5,000 of the train part teach and give labels, 1,000 of the test part test.
- "omniglot": 136 characters of 5 alphabets; what drawers 1-12 drew teaches and gives labels, that of 13-20 tests.

Reference: A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020, arXiv:2002.05709.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unfused.claims.lab.tuning import tune
from unfused.claims.lab.worlds import Absent

if TYPE_CHECKING:
    from unfused.claims.lab import Lab
    from unfused.data.frozen_encoder import FrozenEncoder

__all__ = ["Pictures", "picture_encoder", "pictures"]

SIDE, WIDTH, BATCH = 32, 16, 256
LAST_TEACHER = 12  # of Omniglot's 20 drawers
TEACHING: dict[str, dict[str, Any]] = {
    "cifar10": {"steps": 700, "views": {}},
    "omniglot": {
        "steps": 500,
        "views": {"scale": (0.6, 1.0), "flip": False, "rotation": 15.0, "hue": 0.0, "grayscale": 0.0},
    },
}
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Files in a fixed order.

    Attributes
    ----------
    paths : list of Path, length N
    labels : ndarray of str, shape (N,)
    test : ndarray of bool, shape (N,)
        Teach nothing and give no labels.
    """

    paths: list[Path]
    labels: np.ndarray
    test: np.ndarray


def pictures(lab: Lab, name: str) -> Pictures:
    """The files of "cifar10" or "omniglot", a few of them at smoke scale.

    Raises
    ------
    Absent
        Where the lab's data folder does not have them.
    """
    folder = lab.data_dir / "images" / name if lab.data_dir else None
    if folder is None or not folder.is_dir():
        raise Absent(f"{name}: {folder or 'no data folder'} is not here; give --data DIR or set UNFUSED_DATA")
    if name == "cifar10":
        paths = sorted(folder.glob("*/*/*.jpg"))[:: lab.pick(smoke=25, desk=1)]
        test = [path.parts[-3] == "test" for path in paths]
        labels = [path.parts[-2] for path in paths]
    else:
        kinds = sorted(folder.glob("*/*/*"))[:: lab.pick(smoke=17, desk=1)]
        paths = [path for kind in kinds for path in sorted(kind.glob("*.png"))]
        test = [int(path.stem.rpartition("_")[2]) > LAST_TEACHER for path in paths]
        labels = ["/".join(path.parts[-3:-1]) for path in paths]
    return Pictures(paths, np.array(labels), np.array(test))


def picture_encoder(lab: Lab, name: str) -> FrozenEncoder:
    """The ResNet for these pictures (32 x 32, widths 16 to 128), as a transformer of scikit-learn: paths to (n, 128)."""
    from unfused.data.frozen_encoder import FrozenEncoder
    from unfused.data.images import decode_image
    from unfused.nn.augment import ImageAugment
    from unfused.nn.encoders import ResNetEncoder, image_processor
    from unfused.pretrain.contrastive import Contrastive

    found = pictures(lab, name)
    images = np.stack([decode_image(found.paths[row], SIDE) for row in np.flatnonzero(~found.test)])
    steps, views = lab.pick(smoke=3, desk=TEACHING[name]["steps"]), TEACHING[name]["views"]
    depths = (1, 1, 1, 1)

    def teach() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            augment = ImageAugment(SIDE, mean=MEAN, std=STD, **views)
            objective = Contrastive(ResNetEncoder(WIDTH, depths), augment)
        data = {"input_values": torch.from_numpy(images)}
        tune(objective, data, lr=2e-3, steps=steps, batch_size=BATCH, warmup=0.05)
        return objective.encoder.model.state_dict()  # type: ignore[union-attr]

    content = hashlib.blake2b(images.tobytes(), digest_size=8).hexdigest()
    params = {"steps": steps, "views": views, "images": content}
    encoder = ResNetEncoder(WIDTH, depths)
    encoder.model.load_state_dict(lab.cached(f"{name}-simclr", params, teach))
    processor = image_processor(SIDE, MEAN, STD)
    return FrozenEncoder(
        encoder.model.eval(), processor=processor, bf16=False, cache_dir=lab.cache_dir / "features", workers=1
    )
