"""One small pretrained encoder and what it became on several tasks under frozen heads: what merging starts from.

Two worlds of the same form. A state dict holds the encoder alone; a task's head never changes, as a text encoder's answers do
not, so that any mixture of the states can be judged on every task.

- `digit_domains`: one question (which digit) and one head; eight domains that change scikit-learn's digits (turned left or
  right, sheared, moved down or aside, negative, half of the pixels swapped, over a background). The base has seen all of them
  at up to 0.7 of their strength.
- `picture_tasks`: nine tasks of real pictures, where they are found: vehicles and animals of CIFAR-10, twelve characters
  of five of Omniglot's alphabets each, scikit-learn's digits, spectrograms of FSDD's spoken digits. Base and heads were
  trained jointly on a small part of each, the fine-tunings see another part (other drawers, other voices).

    world = digit_domains(lab)
    world.base, world.tuned("negative", seed=0)      # state dicts of the encoder: theta_0, theta_i
    world.task("negative", seed=0)                   # train / valid / test; the test does not depend on the seed
    world.judge("negative", state, seed=0)           # {"valid": .., "test": .., "valid_loss": .., "test_loss": ..}
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unfused.claims.lab.photos import photo_parts
from unfused.claims.lab.tuning import Task, classification, tune
from unfused.claims.lab.vision import augment, digit_parts, pixel_values
from unfused.claims.lab.worlds import Absent

if TYPE_CHECKING:
    from unfused.claims.lab import Lab

__all__ = [
    "DOMAINS",
    "Encoder",
    "FineTunings",
    "State",
    "change_digits",
    "digit_domains",
    "photo_task",
    "picture_tasks",
    "state_hash",
]

State = dict[str, Tensor]
Parts = dict[str, tuple[Tensor, Tensor]]
"""`pretrain`, `pool`, `test`: what the encoder takes and labels."""

DOMAINS = ("left", "right", "sheared", "down", "aside", "negative", "swapped", "background")
SIDE = 32
SEEN = 0.7
VEHICLES = (0, 1, 8, 9)  # of CIFAR-10's classes in the order of their names


class Encoder(nn.Module):
    """An encoder under one linear head on the first token, frozen; `model(pixel_values=, labels=)` gives loss and logits.

    Attributes
    ----------
    encoder : ViTModel
        Its `state_dict()` is what is merged.
    classifier : nn.Linear
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = head.requires_grad_(False)

    def features(self, pixel_values: Tensor) -> Tensor:
        """(N, dim)"""
        return self.encoder(pixel_values).last_hidden_state[:, 0]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = self.classifier(self.features(pixel_values))
        return SequenceClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits
        )


@dataclass(frozen=True, eq=False)
class FineTunings:
    """A base, its tasks, their frozen heads and their fine-tunings.

    Attributes
    ----------
    lab : Lab
    name : str
    tasks : tuple of str
    base : dict of str to Tensor
        The encoder's state dict, float32 parameters and no buffers.
    heads : dict of str to nn.Linear
        By task; the same object where they share one.
    parts : dict of str to Parts
        By task.
    steps, lr : int, float
        Of a fine-tuning: AdamW without decay, batches of 64, cosine to 0.
    views : int
        Of each training picture: itself and others a little turned, scaled and moved.
    """

    lab: Lab
    name: str
    tasks: tuple[str, ...]
    base: State
    heads: Mapping[str, nn.Linear]
    parts: Mapping[str, Parts]
    make: Callable[[], nn.Module] = field(repr=False)
    steps: int = 100
    lr: float = 1e-3
    views: int = 1

    def encoder(self, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A fresh ViT with this state, by default the base, in eval mode."""
        encoder = self.make()
        encoder.load_state_dict(dict(self.base if state is None else state))
        return encoder.eval()

    def model(self, task: str, state: Mapping[str, Tensor] | None = None) -> Encoder:
        """A fresh encoder under a copy of the task's frozen head."""
        return Encoder(self.encoder(state), copy.deepcopy(self.heads[task])).eval()

    def task(self, name: str, seed: int = 0, shots: int | None = None) -> Task:
        """Two thirds of the task's pool to train on and a third to validate, by seed; its test part, the same for all.

        Parameters
        ----------
        name : str
        seed : int
        shots : int, optional
            So many of the training pictures of each class, or as many as there are.
        """
        images, labels = self.parts[name]["pool"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        cut = len(order) * 2 // 3
        train, valid = order[:cut], order[cut:]
        if shots is not None:
            train = torch.cat([train[labels[train] == label][:shots] for label in labels.unique()])
        test = self.parts[name]["test"]
        return Task(
            _batch(images[train], labels[train]),
            _batch(images[valid], labels[valid]),
            _batch(*test),
            self.heads[name].out_features,
        )

    def tuned(self, task: str, seed: int = 0) -> State:
        """The encoder after fine-tuning on the task; kept by the lab."""

        def compute() -> State:
            model = self.model(task)
            train = self.task(task, seed).train
            views = [train["pixel_values"]]
            if self.views > 1:
                generator = torch.Generator().manual_seed(seed)
                views += [_view(views[0], generator) for _ in range(self.views - 1)]
            data = {"pixel_values": torch.cat(views), "labels": train["labels"].repeat(self.views)}
            tune(model, data, lr=self.lr, steps=self.steps, seed=seed)
            return dict(model.encoder.state_dict())

        params = {"task": task, "seed": seed, "steps": self.steps, "lr": self.lr, "views": self.views}
        params["base"] = self.fingerprint
        return self.lab.cached(f"tuned-{self.name}-{task}".replace(" ", "-"), params, compute)

    def judge(self, task: str, state: Mapping[str, Tensor], seed: int = 0) -> dict[str, float]:
        """Accuracy and cross-entropy of a state: `valid`, `valid_loss`, `test`, `test_loss`."""
        return classification(self.model(task, state), self.task(task, seed))

    @property
    def fingerprint(self) -> str:
        """Changes with the base, the heads and the pools."""
        heads = {f"{task}.weight": head.weight for task, head in self.heads.items()}
        pools = {task: parts["pool"][0] for task, parts in self.parts.items()}
        return state_hash(self.base | heads | pools)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Hash (16 hex digits) of a state dict's names and values."""
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


# -- domains of digits -------------------------------------------------------------------------------------------------


def change_digits(images: Tensor, domain: str, strength: Tensor | float = 1.0) -> Tensor:
    """Digits (N, 1, 8, 8) in [0, 1] of a domain; `strength` from 0 (as they are) to 1, one number or one for each."""
    s = torch.as_tensor(strength, dtype=images.dtype).expand(len(images))
    each = s.view(-1, 1, 1, 1)
    noise = torch.Generator().manual_seed(7)
    if domain == "negative":
        return images + each**3 * (1 - 2 * images)
    if domain == "background":
        return images + 0.7 * each * torch.randn(images.shape[1:], generator=noise)
    if domain == "swapped":  # every second pixel changes its place
        order = torch.arange(64)
        moved = torch.randperm(64, generator=noise)[:32]
        order[moved] = order[moved.roll(1)]
        return images + each * (images.flatten(1)[:, order].view_as(images) - images)
    if domain not in DOMAINS:
        raise ValueError(f"domain={domain!r}: choose one of {', '.join(DOMAINS)}")
    zero = torch.zeros_like(s)
    angle = s * (math.pi / 2) * {"left": 1.0, "right": -1.0}.get(domain, 0.0)
    shear = s if domain == "sheared" else zero
    down = -0.5 * s if domain == "down" else zero  # the picture is 2 wide: 2 of 8 pixels
    across = 0.5 * s if domain == "aside" else zero
    theta = torch.stack(
        [
            torch.stack([angle.cos(), shear - angle.sin(), across], 1),
            torch.stack([angle.sin(), angle.cos(), down], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def digit_domains(lab: Lab) -> FineTunings:
    """Eight domains of one question; see the module. Always there, and quick: 17 tokens of width 64, 4 blocks."""
    parts = digit_parts(lab)
    steps = lab.pick(smoke=20, desk=1500)

    def pretrain() -> dict[str, Any]:
        images, labels = parts["pretrain"]
        generator = torch.Generator().manual_seed(0)
        views = []
        for _ in range(lab.pick(smoke=1, desk=6)):
            for domain in DOMAINS:
                views.append(
                    change_digits(images, domain, SEEN * torch.rand(len(images), generator=generator))
                )
        data = _batch(pixel_values(torch.cat(views)), labels.repeat(len(views)))
        return _pretrain(lambda: _vit(8, 2, 1), {"digits": 10}, {"digits": data}, steps)

    found = lab.cached("fine-tunings-digits", {"steps": steps}, pretrain)
    head = _head(found["heads"]["digits"])
    domains = {
        domain: {
            part: (pixel_values(change_digits(parts[part][0], domain)), parts[part][1])
            for part in ("pretrain", "pool", "test")
        }
        for domain in DOMAINS
    }
    return FineTunings(
        lab,
        "digit domains",
        DOMAINS,
        found["encoder"],
        dict.fromkeys(DOMAINS, head),
        domains,
        lambda: _vit(8, 2, 1),
        lab.pick(smoke=3, desk=100),
    )


# -- tasks of real pictures --------------------------------------------------------------------------------------------


def picture_tasks(lab: Lab) -> FineTunings:
    """Nine tasks of real pictures, 32 x 32 in colour; see the module.

    Raises
    ------
    Absent
        Where CIFAR-10, Omniglot or FSDD is not in the lab's data folder.
    """
    parts = {**_photo_tasks(lab), **_alphabets(lab), "digits": _plain_digits(lab), "spoken": _spoken(lab)}
    steps = lab.pick(smoke=9, desk=1800)
    contents = state_hash({f"{task}.{part}": x for task, p in parts.items() for part, (x, _) in p.items()})
    sizes = {task: int(max(labels.max() for _, labels in p.values())) + 1 for task, p in parts.items()}

    def pretrain() -> dict[str, Any]:
        data = {task: _batch(*p["pretrain"]) for task, p in parts.items()}
        return _pretrain(lambda: _vit(SIDE, 8, 3), sizes, data, steps, views=True)

    found = lab.cached("fine-tunings-pictures", {"steps": steps, "data": contents}, pretrain)
    heads = {task: _head(found["heads"][task]) for task in parts}
    return FineTunings(
        lab,
        "picture tasks",
        tuple(parts),
        found["encoder"],
        heads,
        parts,
        lambda: _vit(SIDE, 8, 3),
        lab.pick(smoke=3, desk=240),
        views=4,
    )


def photo_task(lab: Lab, seed: int, per_class: int = 50) -> Task:
    """What ten kinds of photographs show, from the part of CIFAR-10 whose labels `picture_tasks`' base has not seen.

    Parameters
    ----------
    lab : Lab
    seed : int
    per_class : int, default=50
        So many train and as many others validate.
    """
    parts = _photo_tasks(lab)
    kinds = {
        "vehicles": torch.tensor(VEHICLES),
        "animals": torch.tensor(sorted(set(range(10)) - set(VEHICLES))),
    }
    joined = {
        part: (
            torch.cat([parts[name][part][0] for name in kinds]),
            torch.cat([kind[parts[name][part][1]] for name, kind in kinds.items()]),
        )
        for part in ("pool", "test")
    }
    images, labels = joined["pool"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    few = min(per_class, int(labels.bincount(minlength=10).min()) // 2)
    of_class = [order[labels[order] == label] for label in range(10)]
    train, valid = (torch.cat([rows[cut] for rows in of_class]) for cut in (slice(few), slice(few, 2 * few)))
    return Task(
        _batch(images[train], labels[train]),
        _batch(images[valid], labels[valid]),
        _batch(*joined["test"]),
        10,
    )


def _photo_tasks(lab: Lab) -> dict[str, Parts]:
    every = photo_parts(lab)
    order = torch.randperm(len(every["train"][1]), generator=torch.Generator().manual_seed(0))
    found: dict[str, Parts] = {}
    for name, chosen in {"vehicles": VEHICLES, "animals": tuple(set(range(10)) - set(VEHICLES))}.items():
        kinds = torch.tensor(sorted(chosen))
        rows = order[torch.isin(every["train"][1][order], kinds)]
        spans = {"pretrain": ("train", rows[: len(rows) // 5]), "pool": ("train", rows[len(rows) // 5 :])}
        spans["test"] = ("test", torch.isin(every["test"][1], kinds).nonzero()[:, 0])
        found[name] = {
            part: (every[source][0][keep], torch.searchsorted(kinds, every[source][1][keep]))
            for part, (source, keep) in spans.items()
        }
    return found


def _alphabets(lab: Lab) -> dict[str, Parts]:
    """Which character of an alphabet; drawings 1-4 pretrain, 5-15 are the pool, 16-20 test."""
    folder = lab.data_dir / "images" / "omniglot" / "images_background_small1" if lab.data_dir else None
    if folder is None or not folder.is_dir():
        raise Absent(
            f"omniglot: {folder or 'no data folder'} is not here; give --data DIR or set UNFUSED_DATA"
        )
    found: dict[str, Parts] = {}
    for name, (images, labels) in _drawings(folder, 3 if lab.scale == "smoke" else 12).items():
        drawer = torch.arange(len(labels)) % 20
        spans = {"pretrain": drawer < 4, "pool": (drawer >= 4) & (drawer < 15), "test": drawer >= 15}
        found[name.lower().replace("_", " ")] = {
            part: (images[keep], labels[keep]) for part, keep in spans.items()
        }
    return found


@cache
def _drawings(folder: Path, characters: int) -> dict[str, tuple[Tensor, Tensor]]:
    import numpy as np
    from PIL import Image

    found = {}
    for alphabet in sorted(path for path in folder.iterdir() if path.is_dir()):
        images, labels = [], []
        for label, character in enumerate(sorted(alphabet.iterdir())[:characters]):
            for path in sorted(character.glob("*.png"))[:20]:
                small = Image.open(path).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
                images.append(np.asarray(small))
                labels.append(label)
        ink = 1 - torch.from_numpy(np.stack(images)).float() / 255
        ink = (ink / ink.amax((1, 2), keepdim=True).clamp_min(1e-6))[:, None]
        found[alphabet.name] = (pixel_values(ink).repeat(1, 3, 1, 1), torch.tensor(labels))
    return found


def _plain_digits(lab: Lab) -> Parts:
    parts = digit_parts(lab)
    (first, first_labels), (pool, pool_labels) = parts["pretrain"], parts["pool"]
    spans = {
        "pretrain": (first[:150], first_labels[:150]),
        "pool": (torch.cat([first[150:], pool]), torch.cat([first_labels[150:], pool_labels])),
        "test": parts["test"],
    }
    return {
        part: (
            pixel_values(F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)).repeat(
                1, 3, 1, 1
            ),
            labels,
        )
        for part, (images, labels) in spans.items()
    }


def _spoken(lab: Lab) -> Parts:
    """Spectrograms of spoken digits: the first voice pretrains, two are the pool, the last tests."""
    from unfused.claims.lab.audio import word_front_end
    from unfused.nn.log_mel import fit_frames_many

    world = lab.world("fsdd")
    front_end = word_front_end()
    clips = torch.stack(
        [x.reshape(-1, *x.shape[-2:])[0] for x in fit_frames_many(world.log_mels(front_end), front_end)]
    )
    clips = F.interpolate(clips[:, None], (SIDE, SIDE), mode="bilinear", align_corners=False)
    low, high = (clips.flatten(1).quantile(q, 1).view(-1, 1, 1, 1) for q in (0.02, 0.98))
    images = pixel_values(((clips - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(world.labels)
    voices = sorted(set(world.groups))
    voice = torch.tensor([voices.index(group) for group in world.groups])
    every = 20 if lab.scale == "smoke" else 1
    spans = {
        "pretrain": voice == 0,
        "pool": (voice > 0) & (voice < len(voices) - 1),
        "test": voice == len(voices) - 1,
    }
    return {part: (images[keep][::every], labels[keep][::every]) for part, keep in spans.items()}


# -- what both share ---------------------------------------------------------------------------------------------------


def _batch(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": images, "labels": labels}


def _view(images: Tensor, generator: torch.Generator) -> Tensor:
    return pixel_values(augment((images + 1) / 2, generator))


def _head(state: Mapping[str, Tensor]) -> nn.Linear:
    head = nn.Linear(state["weight"].shape[1], len(state["bias"]))
    head.load_state_dict(dict(state))
    return head.requires_grad_(False)


class _Joint(nn.Module):
    """One encoder and several heads; a batch is one of the tasks', in turn."""

    def __init__(self, encoder: nn.Module, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.encoder = encoder
        width: int = encoder.config.hidden_size  # type: ignore[assignment,union-attr]
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, task: str, pixel_values: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.heads[task](self.encoder(pixel_values).last_hidden_state[:, 0]), labels)


def _pretrain(
    make: Callable[[], nn.Module],
    sizes: Mapping[str, int],
    data: Mapping[str, Mapping[str, Tensor]],
    steps: int,
    views: bool = False,
) -> dict[str, Any]:
    """Encoder and heads after AdamW at 1e-3, 5 % warm-up, cosine to 0, in batches of 64 of one task after another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Joint(make(), sizes).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        rise = max(1, steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps)),
        )
        names, generator = list(data), torch.Generator().manual_seed(0)
        for step in range(steps):
            batch = data[names[step % len(names)]]
            rows = torch.randint(len(batch["labels"]), (64,))
            images = batch["pixel_values"][rows]
            images = _view(images, generator) if views else images
            loss = model(names[step % len(names)], images, batch["labels"][rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        heads = {name: dict(head.state_dict()) for name, head in model.heads.items()}
        return {"encoder": dict(model.encoder.state_dict()), "heads": heads}


def _vit(size: int, patch: int, channels: int) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        num_channels=channels,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return ViTModel(config, add_pooling_layer=False)
