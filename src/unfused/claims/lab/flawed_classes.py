"""Small, imbalanced classes with planted flaws, and encoders that were pretrained on more or less fitting data.

*Digits*: 90 images of 3, 60 of 8, 14 of 5; of these 164, 15 are flawed: five have a wrong label, five lack their lower half,
five are blends of two classes. The encoder is a perceptron of four layers of 96, pretrained by denoising on nothing, on
digits whose pixels are permuted (general), on digits (domain), or on half of each (mixed). Test images are in none of them.

*Sentences*: the same numbers from three areas of the standard library (`unfused.claims.lab.text`): wrong labels, halves of
sentences, two sentences spliced; the encoder is the lab's BERT, or the same without pretraining.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from unfused.claims.lab import text
from unfused.claims.lab.tuning import Batch, tune

if TYPE_CHECKING:
    from unfused.claims.lab import Lab

__all__ = [
    "FLAWS",
    "PRETRAINED",
    "SIZES",
    "Course",
    "digit_encoder",
    "digits_with_flaws",
    "fine_tune",
    "sentences_with_flaws",
]

SIZES = (90, 60, 14)
FLAWS = ("label", "half", "blend")
PRETRAINED = ("none", "general", "domain", "mixed")
PER_FLAW = 5
CLASSES = (3, 8, 5)


@dataclass(frozen=True, eq=False)
class Flawed:
    """Training samples, `flaw` (164,) of each ("" where there is none), and test samples."""

    train: Batch
    flaw: np.ndarray
    test: Batch


def _plant(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    flaw = np.full(len(labels), "", dtype="<U5")
    chosen = rng.choice(len(labels), PER_FLAW * len(FLAWS), replace=False)
    for i, kind in enumerate(FLAWS):
        flaw[chosen[i * PER_FLAW : (i + 1) * PER_FLAW]] = kind
    return flaw


# -- digits ------------------------------------------------------------------------------------------------------------


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.data / 16).astype(np.float32), data.target


def _split(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each class the rows to train on, and those to test on."""
    rng, target = np.random.default_rng([seed, 41]), _digits()[1]
    rows = [rng.permutation(np.flatnonzero(target == c)) for c in CLASSES]
    return [r[:n] for r, n in zip(rows, SIZES, strict=True)], [
        r[n:] for r, n in zip(rows, SIZES, strict=True)
    ]


def digits_with_flaws(seed: int) -> Flawed:
    """Columns `x` (n, 64) and `labels`."""
    images, _ = _digits()
    train, test = _split(seed)
    rng = np.random.default_rng([seed, 43])
    x = images[np.concatenate(train)].copy()
    y = np.repeat(np.arange(3), SIZES)
    flaw = _plant(y, rng)
    clean = y.copy()
    for i in np.flatnonzero(flaw):
        if flaw[i] == "label":
            y[i] = (y[i] + rng.integers(1, 3)) % 3
        elif flaw[i] == "half":
            x[i].reshape(8, 8)[4:] = 0
        else:
            other = rng.choice(np.flatnonzero((clean != clean[i]) & (flaw == "")))
            x[i] = (x[i] + x[other]) / 2
    rows = np.concatenate(test)
    labels = np.repeat(np.arange(3), [len(r) for r in test])
    return Flawed(_batch(x, y), flaw, _batch(images[rows], labels))


def _batch(x: np.ndarray, y: np.ndarray) -> Batch:
    return {"x": torch.from_numpy(x), "labels": torch.from_numpy(y).long()}


class DigitEncoder(nn.Module):
    """Four layers and a head for three classes, or for the pixels."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64 if i == 0 else 96, 96), nn.ReLU()) for i in range(4)
        )
        self.classifier = nn.Linear(96, outputs)

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None, clean: torch.Tensor | None = None
    ) -> Any:
        from transformers.modeling_outputs import ModelOutput

        for layer in self.layers:
            x = layer(x)
        logits = self.classifier(x)
        loss = None
        if clean is not None:
            loss = (logits - clean).square().mean()
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return ModelOutput(loss=loss, logits=logits)


def digit_encoder(lab: Lab, seed: int, pretrained: str) -> DigitEncoder:
    """With a new head, the layers pretrained on one of `PRETRAINED`."""
    steps = lab.pick(smoke=5, desk=1500)

    def pretrain() -> dict[str, torch.Tensor]:
        images, _ = _digits()
        kept = np.setdiff1d(np.arange(len(images)), np.concatenate(_split(seed)[1]))
        rng = np.random.default_rng([seed, 47])
        domain = images[rng.permutation(kept)]
        general = domain[:, np.random.default_rng(49).permutation(64)]
        half = len(domain) // 2
        chosen = {
            "general": general,
            "domain": domain,
            "mixed": np.concatenate([domain[:half], general[half:]]),
        }[pretrained]
        clean = np.tile(chosen, (4, 1))
        noisy = clean * (rng.random(clean.shape) > 0.3) + 0.2 * rng.normal(size=clean.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DigitEncoder(64)
            data = {"x": torch.from_numpy(noisy).float(), "clean": torch.from_numpy(clean).float()}
            tune(model, data, lr=1e-3, steps=steps, seed=seed)
        return dict(model.layers.state_dict())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 + seed)
        model = DigitEncoder()
    if pretrained != "none":
        key = {"seed": seed, "on": pretrained, "steps": steps}
        model.layers.load_state_dict(lab.cached("flawed-digits-encoder", key, pretrain))
    return model.eval()


# -- sentences ---------------------------------------------------------------------------------------------------------


def sentences_with_flaws(lab: Lab, seed: int) -> Flawed:
    """Three areas; `input_ids`, `attention_mask`, `labels`."""
    texts, areas, test_texts, test_areas = text._area_sentences(lab)
    rng, words = np.random.default_rng([seed, 53]), text.tokenizer(lab)
    chosen = [rng.permutation(np.flatnonzero(areas == c))[:n] for c, n in zip((2, 5, 6), SIZES, strict=True)]
    said = [texts[i] for rows in chosen for i in rows]
    y = np.repeat(np.arange(3), [len(rows) for rows in chosen])
    flaw, clean = _plant(y, rng), y.copy()
    original = list(said)
    for i in np.flatnonzero(flaw):
        halves = original[i].split()
        if flaw[i] == "label":
            y[i] = (y[i] + rng.integers(1, 3)) % 3
        elif flaw[i] == "half":
            said[i] = " ".join(halves[: max(1, len(halves) // 3)])
        else:
            other = original[rng.choice(np.flatnonzero((clean != clean[i]) & (flaw == "")))].split()
            said[i] = " ".join(halves[: len(halves) // 2] + other[len(other) // 2 :])
    rows = [i for c in (2, 5, 6) for i in np.flatnonzero(test_areas == c)[: lab.pick(smoke=10, desk=120)]]
    labels = np.array([(2, 5, 6).index(int(test_areas[i])) for i in rows])
    return Flawed(
        {**text.encode(words, said), "labels": torch.from_numpy(y)},
        flaw,
        {**text.encode(words, [test_texts[i] for i in rows]), "labels": torch.from_numpy(labels)},
    )


# -- fine-tuning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Course:
    """One fine-tuning: the model at its end, copies of it at some epochs, and by epoch the training samples' logits (E, N, C)
    and the test samples' predictions (E, M)."""

    model: nn.Module
    checkpoints: dict[float, nn.Module]
    logits: np.ndarray
    predicted: np.ndarray


def fine_tune(
    model: nn.Module, data: Flawed, epochs: int, lr: float, seed: int, keep: tuple[int, ...] = ()
) -> Course:
    """AdamW, decay 0.01, batches of 8 with all classes alike often, warm-up over a fifth, norm clipped at 1."""
    model = copy.deepcopy(model)
    labels = data.train["labels"]
    generator = torch.Generator().manual_seed(seed)
    chance = 1 / torch.bincount(labels, minlength=3).clamp_min(1).float()[labels]
    steps = len(labels) // 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    rise = max(1, round(0.2 * epochs * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / rise))
    kept: dict[float, nn.Module] = {}
    logits, predicted = [], []
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.multinomial(chance, steps * 8, replacement=True, generator=generator).view(
            steps, 8
        ):
            loss = model(**{name: column[rows] for name, column in data.train.items()}).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        logits.append(_logits(model, data.train))
        predicted.append(_logits(model, data.test).argmax(1))
        if epoch in keep:
            kept[float(epoch)] = copy.deepcopy(model)
    return Course(model, kept, np.stack(logits), np.stack(predicted))


@torch.inference_mode()
def _logits(model: nn.Module, batch: Batch) -> np.ndarray:
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    size = len(batch["labels"])
    return torch.cat(
        [model(**{n: c[i : i + 128] for n, c in inputs.items()}).logits for i in range(0, size, 128)]
    ).numpy()
