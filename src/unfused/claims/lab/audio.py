"""What the claims about sound share: words as an encoder's input, and the test of a pretraining objective.

The test. Words of voices that are held out are to be told apart from k labels a word, by the same multinomial
logistic regression (penalty chosen on the labelled points) on three kinds of features of the same log-mels:

- the embedding of an encoder pretrained by the objective on the other voices' clips, without labels;
- the embedding of that encoder untrained, its batch norms set to the same clips' statistics;
- mean and deviation of each mel bin over the four parts of the clip that the encoder averages over, too.

Each seed draws the held-out voices, the labels and the initial weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from unfused.claims.lab import AudioWorld, Lab, Verdict
from unfused.data.splits import few_shot, hold_out
from unfused.finetune.linear_probe import fit_linear_probe
from unfused.nn.audio_model import AudioNTT
from unfused.nn.encoders import embed_all
from unfused.nn.log_mel import FrontEnd, fit_frames_many
from unfused.train.data import ArrayDataset
from unfused.train.engine import fit

MakeObjective = Callable[[nn.Module, int, int], nn.Module]
"""(encoder, number of clips, seed) -> objective."""

RULE = (
    "the 95 % interval of the paired gain over the untrained encoder or over the log-mel statistics "
    "reaches down to 0"
)


def word_front_end(sampling_rate: int = 16000) -> FrontEnd:
    """For isolated words: silence trimmed, 40 mel bins every 8 ms, the clip stretched to 32 frames."""
    return FrontEnd(
        sampling_rate,
        n_fft=sampling_rate // 32,
        hop_length=sampling_rate // 125,
        n_mels=40,
        f_min=50,
        f_max=min(7600, sampling_rate / 2),
        trim_db=30,
        frames=32,
        fit="stretch",
    )


@dataclass(frozen=True)
class Words:
    """Inputs (N, 1, 40, 32), normalised by the pool, and the masks of one draw.

    `pool`: clips that may be looked at without labels; `labelled`: those of the pool whose label is known.
    """

    inputs: np.ndarray
    pool: np.ndarray
    labelled: np.ndarray


def draw_words(world: AudioWorld, seed: int, per_class: int, held_out: float = 1 / 3) -> Words:
    """One draw of held-out groups and labels."""
    front_end = word_front_end(8000 if world.name == "fsdd" else 16000)
    windows = fit_frames_many(world.log_mels(front_end), replace(front_end, mean=0.0, std=1.0))
    inputs = torch.stack(windows).numpy()  # (N, 1, 40, 32)
    pool = ~hold_out(world.manifest, held_out, seed)
    labelled = few_shot(world.manifest.labels, per_class, seed, eligible=pool)
    return Words((inputs - inputs[pool].mean()) / inputs[pool].std(), pool, labelled)


def pretrain_encoder(
    make_encoder: Callable[[], nn.Module],
    make_objective: MakeObjective,
    inputs: np.ndarray,
    seed: int,
    steps: int,
    **recipe: Any,
) -> nn.Module:
    """An encoder trained by an objective on inputs (N, 1, mels, frames) without labels; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = make_encoder()
        objective = make_objective(encoder, len(inputs), seed)
    columns = {"input_values": inputs}
    if hasattr(objective, "reassign"):  # objectives that cluster the set between epochs
        from unfused.pretrain.decar import Reassign

        columns["index"] = np.arange(len(inputs))
        recipe |= {"callbacks": [Reassign(objective)], "sampler": objective.draw}  # type: ignore[arg-type]
    fit(objective, ArrayDataset(**columns), steps=steps, seed=seed, **recipe)
    return encoder.eval()


def untrained_encoder(make_encoder: Callable[[], nn.Module], inputs: np.ndarray, seed: int) -> nn.Module:
    """Random weights, and batch norms that know the inputs' statistics: all that no training can give."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        encoder = make_encoder()
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # a plain mean over the batches
        for start in range(0, len(inputs), 256):
            encoder.train()(torch.from_numpy(inputs[start : start + 256]))
    return encoder.eval()


def log_mel_statistics(inputs: np.ndarray, parts: int = 4) -> np.ndarray:
    """Mean and deviation of each mel bin over equal parts of the clip: (N, 2 * parts * mels)."""
    split = inputs.reshape(*inputs.shape[:3], parts, -1)  # (N, 1, mels, parts, frames)
    return np.concatenate([split.mean(-1), split.std(-1)], -1).reshape(len(inputs), -1)


def probe_accuracy(world: AudioWorld, words: Words, features: np.ndarray, seed: int) -> float:
    """Accuracy on the held-out groups of a linear probe fitted to the labelled clips."""
    known = words.labelled
    probe = fit_linear_probe(features[known], world.labels[known], seed, groups=world.groups[known])
    return float((probe.predict(features[~words.pool]) == world.labels[~words.pool]).mean())


def pretraining_claim(
    lab: Lab, name: str, make_objective: MakeObjective, recipe: Mapping[str, Any] | None = None
) -> Verdict:
    """Run the test above on the embedded sample for one objective.

    Parameters
    ----------
    lab : Lab
    name : str
        Of the objective, for the tables.
    make_objective : callable (encoder, number of clips, seed) -> nn.Module
        A function of the claim's module, whose code the results are cached by.
    recipe : mapping, optional
        Arguments of `unfused.train.fit` other than steps and seed.
    """
    world = lab.world("sample")
    if lab.scale == "smoke":
        world = world.select(np.isin(world.groups, np.unique(world.groups)[::6]))
    per_class = lab.pick(smoke=3, desk=5)
    steps = lab.pick(smoke=12, desk=500, gpu=3000)
    width, dim = lab.pick(smoke=(4, 16), desk=(16, 256), gpu=(64, 2048))
    recipe = {"batch_size": lab.pick(smoke=16, desk=64, gpu=256), **(recipe or {})}

    def make_encoder() -> AudioNTT:
        return AudioNTT(40, width, dim, pooling="segments")

    arms: dict[str, list[float]] = {name: [], "untrained encoder": [], "log-mel statistics": []}
    for seed in lab.seeds:
        params = {"world": world.fingerprint, "seed": seed, "per_class": per_class, "size": [width, dim]}
        training = {"objective": name, "steps": steps, **recipe}

        def compare(seed: int = seed) -> dict[str, float]:
            words = draw_words(world, seed, per_class)
            untrained = untrained_encoder(make_encoder, words.inputs[words.pool], seed)
            features = {
                "untrained encoder": embed_all(untrained, words.inputs),
                "log-mel statistics": log_mel_statistics(words.inputs),
            }
            return {arm: probe_accuracy(world, words, x, seed) for arm, x in features.items()}

        def pretrain(seed: int = seed) -> float:
            words = draw_words(world, seed, per_class)
            pool = words.inputs[words.pool]
            encoder = pretrain_encoder(make_encoder, make_objective, pool, seed, steps, **recipe)
            return probe_accuracy(world, words, embed_all(encoder, words.inputs), seed)

        for arm, value in lab.cached("probe-baselines", params, compare).items():
            arms[arm].append(value)
        trained = lab.cached("probe-pretrained", params | training, pretrain, uses=[make_objective])
        arms[name].append(trained)
        lab.log(f"seed {seed}: " + ", ".join(f"{arm} {values[-1]:.3f}" for arm, values in arms.items()))
    return lab.verdict(
        world="sample",
        name=name,
        metric="accuracy on unheard voices",
        method=arms.pop(name),
        baselines=arms,
        rule=RULE,
        notes=[
            f"{per_class} labels a word, {len(world.classes)} words; a third of the {len(set(world.groups))} "
            f"voices held out, from pretraining too; {steps} steps; one logistic regression for all arms",
        ],
    )
