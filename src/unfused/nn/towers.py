"""Around the blocks of a transformer: its embeddings, its class tokens, its final norm, by the names of transformers 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from unfused.nn.blocks import Block, transformer_blocks

__all__ = ["Tower", "final_norms", "find_tower"]

CLASS_TOKENS = ("cls_token", "class_embedding", "distillation_token")
FINAL_NORMS = ("layernorm", "post_layernorm", "final_layer_norm", "layer_norm", "ln_f", "norm")


@dataclass(frozen=True)
class Tower:
    """A transformer that puts learned class tokens before its patches: ViT, DeiT, DINO, AST, CLIP's vision tower.

    Attributes
    ----------
    blocks : list of Block
    embeddings, norm : str
        Full names of the module that puts class tokens and patches together, and of the final norm.
    class_tokens : int
        How many there are, the first of the sequence.
    """

    blocks: list[Block]
    embeddings: str
    norm: str
    class_tokens: int


def find_tower(model: nn.Module) -> Tower | None:
    """The first such transformer inside a model, or None.

    Examples
    --------
    >>> from transformers import ASTConfig, ASTModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    >>> tower = find_tower(ASTModel(ASTConfig(max_length=16, num_mel_bins=16, **sizes)))
    >>> tower.embeddings, tower.norm, tower.class_tokens
    ('embeddings', 'layernorm', 2)
    """
    blocks = transformer_blocks(model)
    for name, module in model.named_modules():
        start = f"{name}." if name else ""
        embeddings = getattr(module, "embeddings", None)
        embeddings = getattr(embeddings, "base_layer", embeddings)
        count = sum(hasattr(embeddings, token) for token in CLASS_TOKENS)
        own = [block for block in blocks if block.name.startswith(start)]
        if count and own and (norms := final_norms(model, own)):
            return Tower(own, f"{start}embeddings", norms[0], count)
    return None


def final_norms(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    """Names of the norms that stand beside the lists of these blocks, or one level further out: one per list, at most."""
    found = []
    for around in dict.fromkeys(block.name.rpartition(".")[0].rpartition(".")[0] for block in blocks):
        for outer in (around, around.rpartition(".")[0]):
            module = model.get_submodule(outer)
            if norm := next((n for n in FINAL_NORMS if isinstance(getattr(module, n, None), nn.Module)), ""):
                found.append(f"{outer}.{norm}" if outer else norm)
                break
    return list(dict.fromkeys(found))
