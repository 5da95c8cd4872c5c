"""Decorrelating an embedding without labels (DeLoRes-S) makes a linear probe better on voices never heard.

The paper: linear evaluation from little unlabelled audio, ahead of earlier self-supervision. Here: 5 labels
a word on the embedded sample, against the same probe on the untrained encoder and on log-mel statistics
(see `unfused.claims.lab.audio`). Refuted if the 95 % interval over seeds of the paired gain over either
reaches 0.

Projector of width 512 where the paper has 2048; the off-diagonal's weight grows by the square of their
ratio, so that the two halves of the loss keep their balance.
"""

from __future__ import annotations

from torch import nn

from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.audio import pretraining_claim
from unfused.nn.augment import AudioAugment
from unfused.pretrain.delores_s import DeLoResS


def make(encoder: nn.Module, items: int, seed: int) -> nn.Module:
    return DeLoResS(encoder, AudioAugment("byola"), dims=(512, 512, 512), lambd=5e-5 * 16)


def claim(lab: Lab) -> Verdict:
    return pretraining_claim(lab, "DeLoRes-S", make)
