from __future__ import annotations

from unfused.adapters import BottleneckConfig


def config(kind: str, **options):
    return BottleneckConfig.preset("prefix", prefix_length=3, prefix_hidden=0, prefix_dropout=0.0, **options)


CASE = {
    "config": config,
    "kinds": ["bert", "gpt2", "llama", "vit"],
    "refuses": {"plain": "no transformer blocks"},
    "identity_options": None,  # a prefix takes some of the attention from the first step on
    "merge": "Bottleneck cannot be merged: prefixes and heads' corrections depend on the input",
    "compose": True,
}
