"""Where the parts of a transformer are: attention, MLP, projections, norms, by the names of transformers 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Block", "attention_heads", "linear_shape", "module_at", "transformer_blocks"]

ATTENTION = ("attention", "self_attn", "attn", "self_attention")
MLP = ("mlp", "feed_forward", "ffn")
QUERY, KEY, VALUE = ("q_proj", "query", "q"), ("k_proj", "key", "k"), ("v_proj", "value", "v")
FUSED_QKV = ("c_attn", "qkv", "query_key_value")
ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "output.dense", "proj", "dense")
MLP_IN = ("fc1", "c_fc", "up_proj", "intermediate_dense", "wi", "dense_h_to_4h", "intermediate.dense")
MLP_OUT = ("fc2", "c_proj", "down_proj", "output_dense", "wo", "dense_4h_to_h", "output.dense")
MLP_GATE = ("gate_proj",)
NORM1 = (
    "layernorm_before",
    "ln_1",
    "input_layernorm",
    "layer_norm1",
    "norm1",
    "attention.output.LayerNorm",
    "self_attn_layer_norm",
    "layer_norm",
)
NORM2 = (
    "layernorm_after",
    "ln_2",
    "post_attention_layernorm",
    "layer_norm2",
    "norm2",
    "output.LayerNorm",
    "final_layer_norm",
)
POST_NORM = (  # blocks with the names of pre-norm ones whose norms come after the residual sums all the same
    "BartEncoderLayer",
    "BartDecoderLayer",
    "MarianEncoderLayer",
    "MarianDecoderLayer",
    "Wav2Vec2EncoderLayer",
    "HubertEncoderLayer",
    "WavLMEncoderLayer",
)


@dataclass(frozen=True)
class Block:
    """Full names (relative to the model) of the parts of one transformer block; empty where there is none.

    Attributes
    ----------
    name : str
        Of the block.
    attention, mlp : str
        The whole sublayers. BERT's MLP is two siblings, `intermediate` and `output`: `mlp` is empty there.
    query, key, value, fused_qkv, attention_out, mlp_in, mlp_gate, mlp_out : str
        The linear maps.
    norm1, norm2 : str
        Norms of attention and MLP, before or after them.
    post_norm : bool
        Whether the norms come after the residual sums (BERT, BART, wav2vec 2.0 base).
    """

    name: str
    attention: str
    mlp: str
    query: str
    key: str
    value: str
    fused_qkv: str
    attention_out: str
    mlp_in: str
    mlp_gate: str
    mlp_out: str
    norm1: str
    norm2: str
    post_norm: bool


def transformer_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a transformer, in order: BERT, GPT-2, Llama, ViT, AST, CLIP (both towers), wav2vec 2.0 and their kin.

    Modules that PEFT has wrapped already are seen through. Empty where the model has no blocks that we know.

    Examples
    --------
    >>> from transformers import ViTConfig, ViTModel
    >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    >>> [block.mlp_out for block in transformer_blocks(vit)]
    ['layers.0.mlp.fc2']
    """
    blocks = []
    for list_name, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList):
            for index, module in enumerate(modules):
                if block := _block(f"{list_name}.{index}" if list_name else str(index), module):
                    blocks.append(block)
    return blocks


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module of a `Block`'s name, PEFT's wrapping on the way to it and around it taken off."""
    found = _find(model, (name,))[1]
    if found is None:
        raise ValueError(f"{type(model).__name__} has no module {name!r}")
    return found


def attention_heads(model: nn.Module, block: Block) -> int:
    """Number of (query) heads of a block, by its attention module or that module's config.

    Raises
    ------
    ValueError
        Where neither says.

    Examples
    --------
    >>> from transformers import ViTConfig, ViTModel
    >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    >>> attention_heads(vit, transformer_blocks(vit)[0])
    2
    """
    attention = module_at(model, block.attention)
    for module in (attention, getattr(attention, "self", None)):
        for source in (module, getattr(module, "config", None)):
            for name in ("num_attention_heads", "num_heads", "n_head"):
                if isinstance(heads := getattr(source, name, None), int):
                    return heads
    raise ValueError(f"the number of heads of {block.attention!r} is unknown")


def linear_shape(linear: Any) -> tuple[int, int]:
    """(out, in) of a Linear or Conv1D.

    Examples
    --------
    >>> linear_shape(nn.Linear(2, 3)), linear_shape(Conv1D(3, 2))
    ((3, 2), (3, 2))
    """
    first, second = linear.weight.shape
    return (second, first) if isinstance(linear, Conv1D) else (first, second)


def _block(name: str, module: nn.Module) -> Block | None:
    attention, inside_attention = _find(module, ATTENTION)
    mlp, inside_mlp = _find(module, MLP)
    if attention is None or not (mlp or _find(module, MLP_IN)[0]):
        return None
    if (inner := getattr(inside_attention, "self", None)) is not None:  # BERT: projections one level down
        attention_name, projections = f"{attention}.self", inner
    else:
        attention_name, projections = attention, inside_attention
    around_mlp = inside_mlp if mlp else module

    def full(*parts: str | None) -> str:
        return ".".join((name, *(part for part in parts if part))) if parts[-1] else ""

    def at(outer: str | None, inside: nn.Module | None, names: Sequence[str]) -> str:
        return full(outer, _find(inside, names)[0])

    return Block(
        name=name,
        attention=full(attention),
        mlp=full(mlp),
        query=at(attention_name, projections, QUERY),
        key=at(attention_name, projections, KEY),
        value=at(attention_name, projections, VALUE),
        fused_qkv=at(attention_name, projections, FUSED_QKV),
        attention_out=at(attention, inside_attention, ATTENTION_OUT),
        mlp_in=at(mlp, around_mlp, MLP_IN),
        mlp_gate=at(mlp, around_mlp, MLP_GATE),
        mlp_out=at(mlp, around_mlp, MLP_OUT),
        norm1=at(None, module, NORM1),
        norm2=at(None, module, NORM2),
        post_norm=_find(module, ("attention.output.LayerNorm",))[0] is not None
        or type(module).__name__ in POST_NORM,
    )


def _find(module: nn.Module | None, names: Sequence[str]) -> tuple[str | None, nn.Module | None]:
    """The first of these (dotted) names that the module has, and what is there, PEFT's wrapping taken off."""
    for name in names:
        found: nn.Module | None = module
        for part in name.split("."):
            found = getattr(found, "base_layer", found)
            found = getattr(found, part, None)
        if isinstance(found, nn.Module):
            return name, getattr(found, "base_layer", found)
    return None, None
