from __future__ import annotations

from unfused.label import ListConfig

TARGETS = {
    "plain": ["fc1", "fc2"],
    "vit": "all",
    "ast": "all",
}


def config(kind: str, **options):
    return ListConfig(**{"r": 4, "target_modules": TARGETS.get(kind), **options})


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast"],
    "identity_options": {"init_weights": "identity"},
    "merge": "",
    "compose": True,
}
