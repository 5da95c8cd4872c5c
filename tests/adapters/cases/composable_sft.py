from __future__ import annotations

from unfused.adapters import LtSftConfig


def config(kind: str, **options):
    return LtSftConfig(density=0.2, **options)


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip", "resnet"],
    "refuses": {},
    "identity_options": {},
    "merge": "",
    "compose": True,
    "prepare": None,
    "tolerance": 1e-5,
}
