from __future__ import annotations

from unfused.adapters import BottleneckConfig


def config(kind: str, **options):
    if kind == "plain":
        options["target_modules"] = ["fc1", "fc2"]
    return BottleneckConfig.preset("scaled_parallel", bottleneck_dim=4, **options)


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip"],
    "merge": "Bottleneck cannot be merged: a bottleneck with a nonlinearity is no change of a weight",
    "compose": True,
}
