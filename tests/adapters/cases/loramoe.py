from __future__ import annotations

from unfused.adapters import LoraMoeConfig


def config(kind: str, **options):
    """Four experts of rank 2 in each feed-forward matrix, without dropout: the suite compares forward passes in training."""
    if kind == "plain":
        options.setdefault("target_modules", ["fc1", "fc2"])
    return LoraMoeConfig(**{"num_experts": 4, "r": 2, "lora_dropout": 0.0, **options})


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip"],
    "refuses": {"resnet": "target_modules is not given"},
    "identity_options": {},
    "merge": "cannot be merged: the router weighs its experts anew",
    "compose": True,
    "prepare": None,
    "tolerance": 1e-5,
}
