"""A CLIP in small: an image encoder for digits and one frozen text feature a class, trained together.

There is no text tower: ten class names need ten features, which are learned while the encoder is pretrained and fixed
from then on, as CLIP's are for whoever adapts it. Classes are told apart by the cosine between image and text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.modeling_outputs import SequenceClassifierOutput

from unfused.claims.lab.tuning import Batch, Task, tune
from unfused.claims.lab.vision import augment, digit_parts, pixel_values, shift_digits, shifted_digits

if TYPE_CHECKING:
    from unfused.claims.lab import Lab

__all__ = ["MiniClip", "base_classes", "mini_clip", "new_classes"]

DIM = 64


class MiniClip(nn.Module):
    """`model(pixel_values, labels).logits`: scaled cosines of the image with the text features of `classes`.

    Attributes
    ----------
    classes : list of int
        The digits to choose among; all ten at first. Label i is digit `classes[i]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                projection_dim=DIM,
            )
        )
        self.text_features = nn.Parameter(torch.randn(10, DIM))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.classes = list(range(10))

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        images = F.normalize(self.vision(pixel_values=pixel_values).image_embeds, dim=-1)  # (N, DIM)
        logits = self.logit_scale.exp() * images @ F.normalize(self.text_features[self.classes], dim=-1).T
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def mini_clip(lab: Lab) -> MiniClip:
    """The pretrained model, text features and scale frozen; about 99 % zero-shot on unseen clean digits."""
    steps = lab.pick(smoke=20, desk=1500)

    def pretrain() -> dict[str, torch.Tensor]:
        images, labels = digit_parts(lab)["pretrain"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            views = torch.cat([augment(images, generator) for _ in range(lab.pick(smoke=1, desk=40))])
            model = MiniClip()
            data = {"pixel_values": pixel_values(views), "labels": labels.repeat(len(views) // len(labels))}
            tune(model, data, lr=2e-3, steps=steps, warmup=0.05)
        return model.state_dict()

    model = MiniClip()
    model.load_state_dict(lab.cached("mini-clip", {"steps": steps}, pretrain))
    model.text_features.requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    return model.eval()


def base_classes(lab: Lab, seed: int, per_class: int = 10) -> Task:
    """Shifted digits 0 to 4 alone."""
    task = shifted_digits(lab, seed, per_class)
    return Task(_only(task.train, 0), _only(task.valid, 0), _only(task.test, 0), num_labels=5)


def new_classes(lab: Lab) -> dict[str, Batch]:
    """The unseen digits 5 to 9, labels 0 to 4, `shifted` and `clean`."""
    images, labels = digit_parts(lab)["test"]
    parts = {"shifted": shift_digits(images), "clean": images}
    return {name: _only({"pixel_values": pixel_values(x), "labels": labels}, 5) for name, x in parts.items()}


def _only(part: Batch, first: int) -> Batch:
    """Digits `first` to `first + 4`, labels from 0."""
    rows = (part["labels"] >= first) & (part["labels"] < first + 5)
    return {"pixel_values": part["pixel_values"][rows], "labels": part["labels"][rows] - first}
