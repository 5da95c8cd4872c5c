from __future__ import annotations

from unfused.adapters import UniPtConfig

FORMS = {"clip": "pooled", "resnet": "conv"}


def config(kind: str, **options):
    return UniPtConfig(form=FORMS.get(kind, "sequence"), **options)


CASE = {
    "config": config,
    "kinds": ["bert", "gpt2", "llama", "vit", "ast", "clip", "resnet"],
    "refuses": {"plain": "form='sequence': Plain has no transformer blocks"},
    "identity_options": None,  # its states start random, the pooled form's near the backbone's, not at them
    "merge": "cannot be merged: its network runs beside the backbone",
    "compose": "activate one adapter at a time",
}
