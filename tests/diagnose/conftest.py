"""A tiny language model before and after fine-tuning, and its tokenizer of bytes."""

from __future__ import annotations

import copy

import pytest
import torch


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_llama(seed=0, vocab_size=258, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings | config)).eval()


def nudged(model, scale=0.1, seed=1):
    """Another model near by."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def llama():
    """Function that makes one."""
    return tiny_llama


@pytest.fixture
def nudge():
    """Function that makes another model near by."""
    return nudged


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory, tokenizer):
    """Folders of a pretrained and a tuned model."""
    root, base = tmp_path_factory.mktemp("pair"), tiny_llama()
    for name, model in (("base", base), ("tuned", nudged(base))):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "base", root / "tuned"
