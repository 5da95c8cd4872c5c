from __future__ import annotations

from unfused.adapters import S2ftConfig


def config(kind: str, **options):
    if kind == "plain":
        return S2ftConfig(target_modules=["fc1", "fc2"], ratio=0.25, **options)
    return S2ftConfig(ratio={"attention_out": 0.3, "mlp_out": 0.1}, **options)


CASE = {
    "config": config,
    "kinds": ["plain", "bert", "gpt2", "llama", "vit", "ast", "clip"],
    "refuses": {"resnet": "the model has no 'attention_out' that we know"},
    "identity_options": {},
    "merge": "",
    "compose": True,
}
