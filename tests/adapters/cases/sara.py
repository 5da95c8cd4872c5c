from __future__ import annotations

from unfused.adapters import SaraConfig


def config(kind: str, **options):
    return SaraConfig(density=0.2, reselect_at=1, nuclear_weight=1e-3, nuclear_min_dim=4, **options)


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip", "resnet", "unet"],
    "refuses": {},
    "identity_options": {},
    "merge": "",
    "compose": True,
    "prepare": None,
    "tolerance": 1e-5,
}
