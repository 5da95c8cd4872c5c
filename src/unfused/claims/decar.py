"""An encoder that predicts its own clusters (DECAR) makes a linear probe better on voices never heard.

The paper: linear evaluation on audio tasks beats a random encoder by far. Here: 5 labels a word on the
embedded sample, against the same probe on the untrained encoder and on log-mel statistics (see
`unfused.claims.lab.audio`). Refuted if the 95 % interval over seeds of the paired gain over either reaches
0.

The paper's optimiser (SGD, constant rate 0.05, weight decay 1e-5) and augmentation; 64 clusters for 480
clips, where it has 512 for a quarter of a million.
"""

from __future__ import annotations

from torch import nn

from unfused.claims.lab import Lab, Verdict
from unfused.claims.lab.audio import pretraining_claim
from unfused.nn.augment import AudioAugment
from unfused.pretrain.decar import DECAR

RECIPE = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-5, "schedule": "constant"}


def make(encoder: nn.Module, items: int, seed: int) -> nn.Module:
    return DECAR(encoder, items, num_clusters=min(64, items // 7), augment=AudioAugment("byola"), seed=seed)


def claim(lab: Lab) -> Verdict:
    return pretraining_claim(lab, "DECAR", make, RECIPE)
