"""Momentum contrast with decorrelation (DeLoRes-M) makes a linear probe better on voices never heard.

The paper: linear evaluation from little unlabelled audio, ahead of DeLoRes-S and other self-supervision.
Here: 5 labels a word on the embedded sample, against the same probe on the untrained encoder and on log-mel
statistics (see `unfused.claims.lab.audio`). Refuted if the 95 % interval over seeds of the paired gain over
either reaches 0.

For 480 clips and a few hundred steps: a queue shorter than the set, momentum 0.99, projectors of width 512
with the off-diagonal's weight as in the claim of DeLoRes-S.
"""

from __future__ import annotations

from torch import nn

from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.audio import pretraining_claim
from unfused.nn.augment import AudioAugment
from unfused.pretrain.delores_m import DeLoResM


def make(encoder: nn.Module, items: int, seed: int) -> nn.Module:
    return DeLoResM(
        encoder,
        AudioAugment("byola"),
        dims=(512, 512, 512),
        queue_size=max(32, items // 2),
        momentum=0.99,
        lambd=5e-5 * 16,
    )


def claim(lab: Lab) -> Verdict:
    return pretraining_claim(lab, "DeLoRes-M", make)
