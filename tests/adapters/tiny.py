"""Tiny models with random weights, one per architecture, and a batch for each. Loaded by path, not imported by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
HEADS = {
    "plain": ["head"],
    "bert": ["classifier"],
    "vit": ["classifier"],
    "ast": ["classifier"],
    "resnet": ["classifier"],
}
TRANSFORMERS = ("bert", "gpt2", "llama", "vit", "ast", "clip", "resnet")


class Plain(nn.Module):
    """Not a transformers model: two linear maps, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.head(self.fc2(torch.relu(self.norm(self.fc1(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def make_model(kind: str, seed: int = 0) -> nn.Module:
    import transformers as hf

    torch.manual_seed(seed)
    no_drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "plain":
        model: nn.Module = Plain()
    elif kind == "bert":
        model = hf.BertForSequenceClassification(
            hf.BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **SIZES, **no_drop)
        )
    elif kind == "gpt2":
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=16,
                n_layer=2,
                n_head=2,
                vocab_size=40,
                n_positions=16,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
            )
        )
    elif kind == "llama":
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(vocab_size=40, max_position_embeddings=16, num_key_value_heads=2, **SIZES)
        )
    elif kind == "vit":
        model = hf.ViTForImageClassification(
            hf.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **SIZES, **no_drop)
        )
    elif kind == "ast":
        model = hf.ASTForAudioClassification(
            hf.ASTConfig(
                max_length=16,
                num_mel_bins=16,
                patch_size=8,
                frequency_stride=8,
                time_stride=8,
                num_labels=3,
                **SIZES,
            )
        )
    elif kind == "clip":
        model = hf.CLIPModel(
            hf.CLIPConfig(
                text_config={"vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 39, **SIZES},
                vision_config={"image_size": 8, "patch_size": 4, **SIZES},
                projection_dim=8,
            )
        )
    elif kind == "resnet":
        model = hf.ResNetForImageClassification(
            hf.ResNetConfig(
                num_channels=1,
                embedding_size=8,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_type="basic",
                num_labels=3,
            )
        )
    elif kind == "unet":
        from diffusers import UNet2DModel

        model = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    else:
        raise ValueError(kind)
    generator = torch.Generator().manual_seed(seed)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # random where transformers starts with ones, zeros, 0.02
        if (
            "norm" not in name.lower()
            and "ln_" not in name
            and "logit_scale" not in name
            and "rotary" not in name
        ):
            parameter.data.normal_(0, 0.15, generator=generator)
    return model.eval()


def make_batch(kind: str, seed: int = 0, items: int = 8) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(100 + seed)
    ids = torch.randint(1, 39, (items, 10), generator=draw)
    labels = torch.randint(0, 3, (items,), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    if kind == "plain":
        return {"x": torch.randn(items, 8, generator=draw), "labels": labels}
    if kind == "bert":
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if kind in ("gpt2", "llama"):
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if kind == "ast":
        return {"input_values": torch.randn(items, 16, 16, generator=draw), "labels": labels}
    if kind == "clip":
        ids = torch.cat([ids[:, :9], torch.full((items, 1), 39)], 1)
        pixels = torch.randn(items, 3, 8, 8, generator=draw)
        return {"input_ids": ids, "pixel_values": pixels, "return_loss": torch.tensor(True)}
    if kind == "unet":
        sample = torch.randn(items, 1, 8, 8, generator=draw)
        return {"sample": sample, "timestep": torch.randint(0, 100, (items,), generator=draw)}
    return {"pixel_values": torch.randn(items, 1, 8, 8, generator=draw), "labels": labels}


def output(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or whatever the model predicts."""
    out = model(**batch)
    for name in ("logits", "logits_per_image", "sample"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    raise AssertionError(type(out))


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(**batch)
    if getattr(out, "loss", None) is not None:
        return out.loss
    return (out.sample - batch["sample"]).square().mean()
