from __future__ import annotations

from unfused.adapters import AstAdapterConfig


def config(kind: str, **options):
    """The Conformer where its convolution has tokens to look at, in both directions; the bottleneck elsewhere."""
    if kind == "plain":
        options["target_modules"] = ["fc1", "fc2", "norm"]
    block = "bottleneck" if kind in ("plain", "gpt2", "llama") else "conformer"
    return AstAdapterConfig(block=block, reduction=4, kernel_size=3, **options)


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip"],
    "refuses": {"resnet": "no transformer blocks"},
    "merge": "nonlinear",
    "compose": True,
}
