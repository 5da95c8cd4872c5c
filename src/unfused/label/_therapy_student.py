"""The last stage of vision therapy: the image encoder learns the corrected labels under its frozen text classifier."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn
from torch.nn import functional as F

from unfused.nn.estimators import draw_seed

__all__ = ["TherapyStudent", "therapy_fine_tune", "therapy_loss"]


def therapy_loss(
    image_features: Tensor,
    text_weights: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    temperature: float = 0.07,
) -> Tensor:
    """Cross-entropy to the therapy's labels, and to the teacher's where there is none.

    Parameters
    ----------
    image_features : tensor of shape (n, n_features)
        Normalised here.
    text_weights : tensor of shape (n_classes, n_features)
        The frozen text classifier, normalised here.
    labels : tensor of int, shape (n,)
        `TherapyInfo.targets`; -1 takes the teacher's best class.
    teacher_logits : tensor of shape (n, n_classes), optional
        Not needed if no label is -1.
    temperature : float, default=0.07

    Returns
    -------
    tensor of shape ()

    Examples
    --------
    >>> x, W = torch.eye(3)[:2], torch.eye(3)
    >>> loss = therapy_loss(x, W, torch.tensor([0, -1]), teacher_logits=torch.tensor([[0, 9, 0], [0, 9, 0]]))
    >>> bool(loss < 1e-5)                                # the second's target is the teacher's class 1
    True
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: give a positive number")
    targets = labels.long()
    missing = targets < 0
    if teacher_logits is not None:
        targets = torch.where(missing, teacher_logits.argmax(-1), targets)
    elif missing.any():
        raise ValueError("teacher_logits=None: labels has -1, where the teacher decides")
    return F.cross_entropy(_cosines(image_features, text_weights) / temperature, targets)


def _cosines(features: Tensor, weights: Tensor) -> Tensor:
    if features.shape[-1] != weights.shape[-1]:
        raise ValueError(
            f"text_weights has {weights.shape[-1]} columns, the image features {features.shape[-1]}: one row a class is needed"
        )
    return F.normalize(features, dim=-1) @ F.normalize(weights.to(features), dim=-1).T


class TherapyStudent(nn.Module):
    """An image encoder under a frozen text classifier, and its frozen copy: an objective for any Trainer.

    Parameters
    ----------
    encoder : nn.Module
        Images to features (n, n_features), as a tensor or as `image_embeds` or `pooler_output`. It is trained in place.
    text_weights : array-like of shape (n_classes, n_features)
    temperature : float, default=0.07

    Attributes
    ----------
    encoder : nn.Module
        What one keeps.
    """

    def __init__(self, encoder: nn.Module, text_weights: Any, temperature: float = 0.07) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        self.teacher = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.register_buffer(
            "text_weights", torch.as_tensor(text_weights, dtype=torch.float32).detach().clone()
        )

    def train(self, mode: bool = True) -> TherapyStudent:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`{"loss", "logits"}`; labels of -1, or none at all, are the teacher's."""
        weights: Any = self.text_weights
        features = _embedding(self.encoder(pixel_values))
        with torch.no_grad():
            teacher = _cosines(_embedding(self.teacher(pixel_values)), weights)
        if labels is None:
            labels = teacher.argmax(-1)
        loss = therapy_loss(features, weights, labels, teacher, self.temperature)
        return {"loss": loss, "logits": _cosines(features, weights).detach() / self.temperature}


def _embedding(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    for name in ("image_embeds", "pooler_output"):
        if isinstance(found := getattr(out, name, None), Tensor):
            return found
    raise TypeError(
        f"encoder returned {type(out).__name__}: a tensor (n, n_features), image_embeds or pooler_output is needed"
    )


def therapy_fine_tune(
    encoder: nn.Module,
    text_weights: Any,
    images: Any,
    labels: Any = None,
    *,
    preprocess: Callable[[list[Any]], Tensor] | None = None,
    temperature: float = 0.07,
    epochs: int = 3,
    batch_size: int = 16,
    learning_rate: float = 5e-7,
    min_learning_rate: float = 5e-8,
    weight_decay: float = 5e-7,
    device: str | torch.device | None = None,
    random_state: Any = None,
) -> nn.Module:
    """Fine-tune a copy of an image encoder: Adam, a cosine from the first learning rate to the last, no warm-up.

    Parameters
    ----------
    encoder : nn.Module
        See `TherapyStudent`; itself left as it is. Of a CLIP, `CLIPVisionModelWithProjection`.
    text_weights : array-like of shape (n_classes, n_features)
    images : tensor or array of shape (n, ...), or sequence
        What the encoder takes, or what `preprocess` takes.
    labels : array-like of int, shape (n,), optional
        `TherapyInfo.targets`. None: the teacher's everywhere (self-training).
    preprocess : callable, optional
        List of images to a batch, such as `lambda images: processor(images, return_tensors="pt").pixel_values`.
    temperature : float, default=0.07
    epochs, batch_size : int, default=3, 16
    learning_rate, min_learning_rate, weight_decay : float, default=5e-7, 5e-8, 5e-7
        The paper's, for CLIP, whose knowledge a usual rate would wipe out under labels that are still noisy.
    device : str or torch.device, optional
        By default where the encoder is.
    random_state : int, RandomState instance or None, default=None
        Of the order.

    Returns
    -------
    nn.Module
        In eval mode, on the encoder's device.

    Raises
    ------
    ValueError
        For labels that fit neither images nor classes, settings out of range.
    FloatingPointError
        If the loss is not finite.

    Examples
    --------
    >>> encoder, x = torch.nn.Linear(4, 3), torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    >>> tuned = therapy_fine_tune(encoder, np.eye(3), x, np.zeros(20, int), learning_rate=0.1, epochs=30)
    >>> tuned(x).argmax(1).tolist() == [0] * 20
    True
    """
    if epochs < 1 or batch_size < 1 or not 0 <= min_learning_rate <= learning_rate:
        raise ValueError(
            f"epochs={epochs}, batch_size={batch_size}, learning_rate={learning_rate}, min_learning_rate="
            f"{min_learning_rate}: at least 1, at least 1, and a last rate between 0 and the first"
        )
    if not len(images):
        raise ValueError("images is empty: give at least one")
    targets = torch.full((len(images),), -1) if labels is None else torch.as_tensor(np.asarray(labels)).long()
    n_classes = len(text_weights)
    if targets.shape != (len(images),) or int(targets.max()) >= n_classes or int(targets.min()) < -1:
        raise ValueError(
            f"labels of shape {tuple(targets.shape)} in {int(targets.min())}..{int(targets.max())}: one of "
            f"-1..{n_classes - 1} is needed for each of {len(images)} images"
        )
    where = next(encoder.parameters()).device
    device = torch.device(where if device is None else device)
    student = TherapyStudent(copy.deepcopy(encoder), text_weights, temperature).to(device).train()
    trained = [parameter for parameter in student.encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, min_learning_rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(check_random_state(random_state)))
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(batch_size):
                if preprocess is not None:
                    batch = preprocess([images[row] for row in rows.tolist()])
                elif isinstance(images, Tensor):
                    batch = images[rows]
                else:
                    batch = torch.as_tensor(np.asarray(images[rows.numpy()]))
                loss = student(batch.to(device), targets[rows].to(device))["loss"]
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is {float(loss.detach())}: check the images, lower learning_rate={learning_rate}"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return student.encoder.to(where).eval()
