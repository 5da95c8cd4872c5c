"""Contrast of recordings and of clusters (SLICER) makes a linear probe better on voices never heard.

The paper: linear evaluation from little unlabelled audio, ahead of DeLoRes and other self-supervision.
Here: 5 labels a word on the embedded sample, against the same probe on the untrained encoder and on log-mel
statistics (see `unfused.claims.lab.audio`). Refuted if the 95 % interval over seeds of the paired gain over
either reaches 0.

For 480 clips and a few hundred steps: a queue shorter than the set and momentum 0.99.
"""

from __future__ import annotations

from torch import nn

from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.audio import pretraining_claim
from unfused.nn.augment import AudioAugment
from unfused.pretrain.slicer import SLICER


def make(encoder: nn.Module, items: int, seed: int) -> nn.Module:
    return SLICER(encoder, AudioAugment("byola"), queue_size=max(32, items // 2), momentum=0.99)


def claim(lab: Lab) -> Verdict:
    return pretraining_claim(lab, "SLICER", make)
