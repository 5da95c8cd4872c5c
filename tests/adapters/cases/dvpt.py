from __future__ import annotations

from unfused.adapters import DvptConfig


def config(kind: str, **options):
    return DvptConfig(num_virtual_tokens=5, bottleneck_size=4, **options)


CASE = {
    "config": config,
    "kinds": ["vit", "ast", "clip"],
    "refuses": {kind: "no vision transformer" for kind in ("plain", "bert", "gpt2", "llama", "resnet")},
    "identity_options": None,  # random tokens change the frozen attention from the start, as in the paper
    "merge": "adds tokens",
    "compose": "one adapter at a time",
}
