from __future__ import annotations

from unfused.adapters import HstConfig

STAGES = {"hidden_sizes": [4, 8], "num_heads": [1, 2]}  # the tiny models have two blocks
NO_VIT = "HST goes beside one plain vision transformer"


def config(kind: str, **options):
    return HstConfig(**STAGES, **options)


CASE = {
    "config": config,
    "kinds": ["vit", "ast"],
    "refuses": {
        "plain": NO_VIT,
        "bert": NO_VIT,
        "gpt2": NO_VIT,
        "llama": NO_VIT,
        "resnet": NO_VIT,
        "clip": "adapt the vision model",
    },
    "identity_options": None,  # the side network has a head of its own: before training its logits are random
    "merge": "cannot be merged: its side network",
    "compose": "activate one adapter at a time",
}
