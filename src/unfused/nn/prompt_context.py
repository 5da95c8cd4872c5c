"""Learned context in front of a class name: the text features of `<context> name` for a CLIP-like model.

The tokens of the context's initial words are looked up as usual and then replaced, in the output of the embedding, by learned
vectors; so any text tower works, and gradients reach the vectors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["context_encoder", "without_gradients"]


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the model's own weights; afterwards both are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in needed:
            parameter.requires_grad_(True)


def context_encoder(
    model: Any, tokenizer: Any, context: str, template: str, names: Sequence[str]
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The words of `context` as vectors, and a function from such vectors to unit text features of `names`.

    Parameters
    ----------
    model : PreTrainedModel
        With `get_text_features`.
    tokenizer : PreTrainedTokenizerBase
    context : str
        Initial words, "a photo of a"; as many vectors as it has tokens.
    template : str
        How context and name make a prompt: the first `{}` is the context, the second the name.
    names : sequence of str

    Returns
    -------
    vectors : Tensor of shape (n_context, width)
    encode : callable (Tensor (n_context, width)) -> Tensor (len(names), dim)

    Raises
    ------
    ValueError
        If the template has not two `{}`, or the context's tokens are not found in a prompt.
    """
    if template.count("{}") != 2:
        raise ValueError(f"template={template!r}: needs two {{}}, for the context and for the name")
    words = tokenizer(context, add_special_tokens=False)["input_ids"]
    count = len(words)
    if not count:
        raise ValueError(f"context={context!r}: give at least one word that the tokenizer knows")
    length = (
        {"padding": "max_length"} if model.config.model_type in ("siglip", "siglip2") else {"padding": True}
    )
    prompts = [template.format(context, name) for name in names]
    tokens = tokenizer(prompts, truncation=True, return_tensors="pt", **length)
    ids = tokens["input_ids"]
    where = (ids.unfold(1, count, 1) == torch.tensor(words)).all(-1)  # (names, places)
    if not where.any(1).all():
        raise ValueError(f"context={context!r}: its tokens do not stand together in {prompts[0]!r}")
    starts = where.int().argmax(1)
    if (starts != starts[0]).any():
        raise ValueError(f"template={template!r}: the context must stand before the name")
    start = int(starts[0])
    device = next(model.parameters()).device
    inputs = {
        name: value.to(device) for name, value in tokens.items() if name in ("input_ids", "attention_mask")
    }
    embedding = model.text_model.get_input_embeddings()

    def encode(vectors: torch.Tensor) -> torch.Tensor:
        def replace(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            middle = vectors.to(output).expand(len(output), -1, -1)
            return torch.cat([output[:, :start], middle, output[:, start + count :]], 1)

        handle = embedding.register_forward_hook(replace)
        try:
            output = model.get_text_features(**inputs)
        finally:
            handle.remove()
        return F.normalize(output if isinstance(output, torch.Tensor) else output.pooler_output, dim=-1)

    with torch.no_grad():
        vectors = embedding(torch.tensor(words, device=device)).clone().float()
    return vectors, encode
