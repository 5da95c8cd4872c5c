from __future__ import annotations

import importlib.util
from pathlib import Path

from unfused.adapters import SptConfig, allocate_spt

spec = importlib.util.spec_from_file_location("tiny_for_spt", Path(__file__).parents[1] / "tiny.py")
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def config(kind: str, **options):
    """Needs a plan: of the tiny model itself."""
    targets = ["fc1", "fc2"] if kind == "plain" else None
    config = SptConfig(
        target_modules=targets,
        budget=100 if kind == "plain" else 1000,
        r=2,
        dropout=0,
        drop_path=0,
        **options,
    )
    allocate_spt(tiny.make_model(kind), config, [tiny.make_batch(kind)])
    return config


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip"],
    "refuses": {"resnet": "names no matrix of this ResNet"},
    "identity_options": {},
    "merge": "",
    "compose": True,
}
