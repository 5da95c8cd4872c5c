"""Small checkpoints on disk: states, and folders that hold them."""

from __future__ import annotations

import json

import torch

from unfused.data.checkpoint_io import ShardWriter

SHAPES = {
    "model.embed_tokens.weight": (20, 6),
    "model.layers.0.fc.weight": (8, 6),
    "model.layers.0.fc.bias": (8,),
    "model.layers.1.conv.weight": (4, 3, 3, 3),
    "model.norm.weight": (6,),
    "model.scale": (),
    "model.empty": (0, 6),
}


def state(seed, dtype=torch.float32, like=None, spread=0.1):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator)
        out[name] = (noise if like is None else like[name].float() + spread * noise).to(dtype)
    out["model.position_ids"] = torch.arange(5)
    return out


def save(folder, tensors, shard_bytes=10**9, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, {n: (t.dtype, t.shape) for n, t in tensors.items()}, shard_bytes)
    for shard in writer.pending():
        with writer.open(shard) as stream:
            for name in shard.tensors:
                stream.write(tensors[name])
    writer.finish()
    text = {"model_type": "tiny", "vocab_size": 20, "dtype": "float32"} | (config or {})
    (folder / "config.json").write_text(json.dumps(text))
    (folder / "generation_config.json").write_text('{"max_length": 7}')
    return folder
