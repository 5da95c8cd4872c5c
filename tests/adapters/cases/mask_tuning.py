from __future__ import annotations

from unfused.adapters import MaskTuningConfig

TARGETS = {"plain": ["fc1", "fc2"], "resnet": "all"}


def config(kind: str, **options):
    """Without attention there is no default: name the weights."""
    if kind in TARGETS:
        options = {"target_modules": TARGETS[kind], **options}
    return MaskTuningConfig(**options)


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip", "resnet"],
    "identity_options": {},
    "merge": "",
    "merge_of_nan": False,  # a score that is no number switches its weight off: nothing broken can come of it
    "compose": True,
}
