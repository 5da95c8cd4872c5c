from __future__ import annotations

from unfused.adapters import MosaConfig


def config(kind: str, **options):
    if kind == "plain":
        options |= {"target_modules": ["fc1", "fc2"], "style": "pfeiffer"}
    return MosaConfig(bottleneck_dim=4, num_experts=2, scaling=1.0, dropout=0.0, **options)


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip"],
    "merge": "Mosa cannot be merged: a bottleneck with a nonlinearity is no change of a weight",
    "compose": True,
    "saved_as": "unfused_bottleneck_",  # the merged adapter is a plain bottleneck
}
