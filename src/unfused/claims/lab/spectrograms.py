"""A tiny AST pretrained to tell sounds apart, and tasks near to that (real sound events) and far from it (spoken words).

Its world of sounds: twelve kinds of synthetic ones (tones, chirps, noises, clicks), and where ESC-10 is found, two of its
folds. Words and digits are those of voices that no label was given for. Every input is 40 mel bins by 32 frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from unfused.claims.lab.audio import word_front_end
from unfused.claims.lab.tuning import Batch, Task, TuningWorld, fresh_head, tune
from unfused.data.splits import few_shot
from unfused.nn.log_mel import FrontEnd, fit_frames_many, log_mel_many

if TYPE_CHECKING:
    from transformers import ASTForAudioClassification

    from unfused.claims.lab import AudioWorld, Lab

__all__ = ["events_world", "mfcc_accuracy", "sound_backbone", "sounds", "words_world"]

MELS, FRAMES, RATE = 40, 32, 16000
SAMPLES = 20480  # 1.28 s
KINDS = 12
PRETRAIN_FOLDS, TRAIN_FOLDS = ("1", "2"), ("3",)  # of ESC-10; the others test
WINDOWS = 3  # the loudest of a clip


def sound_front_end() -> FrontEnd:
    """Windows of 1.28 s: 32 frames every 40 ms."""
    return FrontEnd(RATE, n_fft=1024, hop_length=640, n_mels=MELS, f_min=50, f_max=7600, frames=FRAMES)


# -- sounds ------------------------------------------------------------------------------------------------------------


def sounds(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms (N, 20480) of 12 kinds, with a beginning, an end and background noise of their own, and the kinds (N,)."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    kinds = torch.randint(KINDS, (count,), generator=generator)
    t = torch.arange(SAMPLES).view(1, -1) / RATE  # (1, samples)
    white = torch.randn(count, SAMPLES, generator=generator)
    pitch, rate, span = 200 * 2 ** uniform(0, 4), uniform(3, 9), uniform(1.5, 3)
    waves = torch.empty_like(white)
    for kind in range(KINDS):
        rows = kinds == kind
        if rows.any():
            waves[rows] = _wave(kind, t, pitch[rows], rate[rows], span[rows], white[rows])
    begin, end = uniform(0, 0.4), uniform(0.8, 1.3)
    waves = waves / waves.square().mean(1, keepdim=True).sqrt() * ((t >= begin) & (t < end))
    return waves + uniform(0.01, 0.2) * torch.randn(waves.shape, generator=generator), kinds


def _wave(
    kind: int,
    t: torch.Tensor,
    pitch: torch.Tensor,
    rate: torch.Tensor,
    span: torch.Tensor,
    white: torch.Tensor,
) -> torch.Tensor:
    """One kind of sound: (n, samples) of times (1, samples), pitches, beats per second, spans of a sweep and noise."""
    phase, beat = 2 * math.pi * pitch * t, (2 * math.pi * rate * t).sin()
    if kind in (0, 1):
        return (
            sum(((k * phase / 2).sin() / k for k in range(1, 7)), start=torch.zeros(()))
            if kind
            else phase.sin()
        )
    if kind in (2, 3):
        sweep = (2 * math.pi * pitch * t.max() * (span ** (t / t.max()) - 1) / span.log()).sin()
        return sweep if kind == 2 else sweep.flip(1)
    if kind in (4, 5, 6):
        smooth = nn.functional.avg_pool1d(white[:, None], 9, 1, 4)[:, 0]
        return (white, smooth, white - smooth)[kind - 4]
    if kind == 7:
        return white * (0.5 + 0.5 * beat) ** 2
    if kind == 8:
        return white * (-80 * ((t * rate) % 1) / rate).exp()  # clicks
    if kind == 9:
        return white * (-t * 8).exp()
    if kind == 10:
        return (phase * torch.where(beat > 0, 1.0, 1.5)).sin()
    return (phase + 0.06 * pitch / rate * beat).sin()


def _loudest_windows(world: AudioWorld) -> torch.Tensor:
    """(clips, WINDOWS, FRAMES, MELS): windows of highest mean level, in time's order."""
    every = fit_frames_many(world.log_mels(sound_front_end()), sound_front_end())
    chosen = [clip[clip.mean((1, 2)).topk(WINDOWS).indices.sort().values] for clip in every]
    return torch.stack(chosen).mT


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean()) / x.std()


# -- backbone ----------------------------------------------------------------------------------------------------------


def _ast(num_labels: int) -> ASTForAudioClassification:
    from transformers import ASTConfig, ASTForAudioClassification
    from transformers.modeling_outputs import SequenceClassifierOutput

    class MeanPooledAst(ASTForAudioClassification):
        """The head sees the mean of all tokens, as in the paper on AST's adapters, for every way of tuning alike."""

        def forward(
            self, input_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
        ) -> Any:
            tokens = self.audio_spectrogram_transformer(input_values).last_hidden_state
            logits = self.classifier(tokens.mean(1))
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    settings: dict[str, Any] = {
        "num_labels": num_labels
    }  # a field that the config takes but does not declare
    return MeanPooledAst(
        ASTConfig(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=96,
            patch_size=8,
            frequency_stride=8,
            time_stride=4,
            max_length=FRAMES,
            num_mel_bins=MELS,
            **settings,
        )
    )


def sound_backbone(lab: Lab, num_labels: int | None = None) -> ASTForAudioClassification:
    """The AST for sounds (5 by 7 patches of 8 by 8, width 48, 4 blocks, 79,000 weights).

    Parameters
    ----------
    lab : Lab
    num_labels : int, optional
        With it, the head is a new one, drawn from torch's global generator; without, the pretrained one.
    """
    steps, count = lab.pick(smoke=5, desk=1500), lab.pick(smoke=60, desk=6000)
    esc = lab.scale != "smoke" and lab.has("esc10")
    classes = KINDS + (10 if esc else 0)

    def pretrain() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            waves, labels = sounds(count, torch.Generator().manual_seed(0))
            mels = torch.stack([m[:, :FRAMES] for m in log_mel_many(list(waves.numpy()), sound_front_end())])
            inputs = _normalised(mels.mT)
            if esc:
                world = lab.world("esc10")
                rows = np.isin(world.groups, PRETRAIN_FOLDS)
                windows = _normalised(_loudest_windows(world))[rows].flatten(0, 1)
                events = torch.from_numpy(world.labels[rows]).repeat_interleave(WINDOWS) + KINDS
                inputs = torch.cat([inputs, windows.repeat(4, 1, 1)])
                labels = torch.cat([labels, events.repeat(4)])
            model = _ast(classes)
            tune(model, {"input_values": inputs, "labels": labels}, lr=2e-3, steps=steps, warmup=0.1)
        return model.state_dict()

    params = {"steps": steps, "count": count, "esc": lab.world("esc10").fingerprint if esc else None}
    state = lab.cached("sound-ast", params, pretrain)
    return fresh_head(_ast, state, num_labels, classes)


# -- tasks -------------------------------------------------------------------------------------------------------------


def _few(world: AudioWorld, eligible: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a label, and half as many others that validate."""
    train = few_shot(world.manifest.labels, per_class, seed, eligible=eligible)
    valid = few_shot(world.manifest.labels, max(2, per_class // 2), seed + 1000, eligible=eligible & ~train)
    return train, valid


def _words(lab: Lab, name: str) -> tuple[AudioWorld, torch.Tensor]:
    world = lab.world(name)
    if lab.scale == "smoke":
        world = world.select(np.isin(world.groups, np.unique(world.groups)[::6]))
    front_end = word_front_end(8000 if name == "fsdd" else RATE)
    windows = fit_frames_many(world.log_mels(front_end), replace(front_end, mean=0.0, std=1.0))
    return world, torch.stack([w[0] for w in windows]).mT  # (N, FRAMES, MELS)


def _held_out(world: AudioWorld, seed: int) -> np.ndarray:
    """Voices whose clips test: one in turn of few speakers, a third of many."""
    voices = np.unique(world.groups)
    if len(voices) <= 6:
        return world.groups == voices[seed % len(voices)]
    chosen = np.random.default_rng(seed).permutation(voices)[: len(voices) // 3]
    return np.isin(world.groups, chosen)


def words_world(lab: Lab, name: str = "fsdd", per_class: int = 20) -> TuningWorld:
    """Far from sound events: digits or words by `per_class` labels each, tested on voices that gave none.

    Parameters
    ----------
    lab : Lab
    name : {"fsdd", "sample"}, default="fsdd"
    per_class : int, default=20
        Half as many more, of the same voices, validate.
    """
    world, inputs = _words(lab, name)
    inputs, labels = _normalised(inputs), torch.from_numpy(world.labels)

    def task(seed: int) -> Task:
        test = _held_out(world, seed)
        train, valid = _few(world, ~test, per_class, seed)
        parts = [_rows(inputs[mask], labels[mask]) for mask in (train, valid, test)]
        return Task(parts[0], parts[1], parts[2], len(world.classes))

    return TuningWorld(f"{name} {per_class}", _fresh(lab), task)


def events_world(lab: Lab, per_class: int = 5) -> TuningWorld:
    """Near: ESC-10's events, by `per_class` clips each of one fold, tested on another that the backbone never heard either."""
    world = lab.world("esc10")
    inputs = _normalised(_loudest_windows(world))  # (clips, WINDOWS, FRAMES, MELS)
    labels = torch.from_numpy(world.labels)

    def task(seed: int) -> Task:
        known = np.isin(world.groups, TRAIN_FOLDS)
        train, valid = _few(world, known, per_class, seed)
        test = ~known & ~np.isin(world.groups, PRETRAIN_FOLDS)
        windows = labels.repeat_interleave(WINDOWS).view(-1, WINDOWS)
        parts = [_rows(inputs[mask].flatten(0, 1), windows[mask].flatten()) for mask in (train, valid, test)]
        return Task(parts[0], parts[1], parts[2], len(world.classes))

    return TuningWorld(f"esc10 {per_class}", _fresh(lab), task)


def _rows(inputs: torch.Tensor, labels: torch.Tensor) -> Batch:
    return {"input_values": inputs, "labels": labels}


def _fresh(lab: Lab) -> Callable[[int], nn.Module]:
    return lambda num_labels: sound_backbone(lab, num_labels)


def mfcc_accuracy(task: Task) -> float:
    """What 13 cepstral coefficients a frame and logistic regression reach: an adapted model below it has failed."""
    from scipy.fft import dct
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def features(part: Batch) -> np.ndarray:
        return dct(part["input_values"].numpy(), axis=2, norm="ortho")[:, :, :13].reshape(
            len(part["labels"]), -1
        )

    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    fitted.fit(features(task.train), task.train["labels"])
    return float(fitted.score(features(task.test), task.test["labels"]))
