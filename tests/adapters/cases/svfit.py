from __future__ import annotations

from unfused.adapters import SvFitConfig

TARGETS = {
    "plain": ["fc1", "fc2"],
    "resnet": r".*layer\.\d+\.convolution",
    "unet": r".*(conv1|conv2|to_q|to_v)",
}


def config(kind: str, **options):
    """r=3 of each matrix; attention projections by default, convolutions where there are no others."""
    if kind in TARGETS:
        options.setdefault("target_modules", TARGETS[kind])
    return SvFitConfig(**{"r": 3, **options})


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
