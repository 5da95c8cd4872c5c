from __future__ import annotations

from unfused.adapters import BottleneckConfig


def config(kind: str, **options):
    if kind == "plain":
        options["target_modules"] = ["fc1", "fc2"]
    return BottleneckConfig.preset("lora", bottleneck_dim=4, **options)


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip"],
    "merge": "",
    "compose": True,
}
