from __future__ import annotations

from unfused.adapters import DseeConfig


def config(kind: str, **options):
    targets = ["fc1", "fc2"] if kind == "plain" else None
    return DseeConfig(r=2, lora_alpha=4, num_sparse=8, target_modules=targets, **options)


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip"],
    "refuses": {"resnet": "has no transformer blocks that are known here"},
    "identity_options": {},
    "merge": "",
    "compose": True,
}
