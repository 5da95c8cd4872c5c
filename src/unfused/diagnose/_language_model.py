"""Causal language models in pairs: loading, log-probabilities of texts, next tokens with a cache that follows its rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = [
    "NextToken",
    "adapter_off",
    "greedy_answers",
    "load_pair",
    "padded",
    "start_token",
    "token_logprobs",
]

POSITIONS = 2048
"""Positions whose logits are held at once: with 128,000 tokens a gigabyte in float32."""


def load_pair(base: str, tuned: str, device: str = "cpu") -> tuple[Any, Any, Any]:
    """Pretrained model, tuned model and tokenizer, from folders or hub ids; safetensors only.

    A `tuned` folder that holds a PEFT adapter is put on `base`: then the first is None, which stands for the second with its
    adapter off.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, dtype="auto")

    tokenizer = AutoTokenizer.from_pretrained(base)
    if os.path.isfile(os.path.join(tuned, "adapter_config.json")):
        from peft import PeftModel

        if not (Path(tuned) / "adapter_model.safetensors").is_file():
            raise ValueError(
                f"{tuned}: no adapter_model.safetensors; save the adapter with safe_serialization=True"
            )
        return None, PeftModel.from_pretrained(load(base), tuned).to(device).eval(), tokenizer
    try:
        other = AutoTokenizer.from_pretrained(tuned).get_vocab()
    except (OSError, ValueError):  # a checkpoint saved without one
        other = None
    known = tokenizer.get_vocab()
    if other is not None and (odd := next((t for t, i in known.items() if other.get(t, i) != i), None)):
        raise ValueError(
            f"tuned={tuned!r} has another tokenizer than base={base!r} (token {odd!r}): give a pair of one base"
        )
    return load(base).to(device).eval(), load(tuned).to(device).eval(), tokenizer


def adapter_off(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The PEFT model without its adapter.

    Raises
    ------
    TypeError
        If the model has no adapter to switch off.
    """
    if not hasattr(model, "disable_adapter"):
        raise TypeError(
            f"pretrained=None, but {type(model).__name__} has no adapter to switch off: give the pretrained model"
        )
    return model.disable_adapter()  # type: ignore[operator]


def start_token(tokenizer: Any) -> int:
    """BOS, or what the tokenizer puts before an empty text, or EOS."""
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    ids = tokenizer("")["input_ids"]
    found = ids[0] if len(ids) else getattr(tokenizer, "cls_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        raise ValueError("tokenizer has neither BOS nor EOS: set tokenizer.bos_token")
    return int(found)


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (N, longest); padding is 0 and masked."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


@torch.inference_mode()
def token_logprobs(
    model: nn.Module, rows: Sequence[Sequence[int]], batch_size: int = 32
) -> list[torch.Tensor]:
    """Of each row of ids: log p of every token but the first given those before, float32 on the CPU.

    The log-softmax is taken in float32, in pieces of positions, whatever the model computes in.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of like length waste no padding
    found: list[torch.Tensor] = [torch.zeros(0)] * len(rows)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = padded([rows[i] for i in chosen])
        ids, mask = ids.to(device), mask.to(device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        flat, wanted = logits.flatten(0, 1), ids[:, 1:].flatten()  # (N * (T - 1), V)
        pieces = [
            flat[a : a + POSITIONS].float().log_softmax(-1).gather(1, wanted[a : a + POSITIONS, None])
            for a in range(0, len(flat), POSITIONS)
        ]
        values = torch.cat(pieces).view(len(chosen), -1).cpu() if pieces else torch.zeros(len(chosen), 0)
        for row, i in enumerate(chosen):
            found[i] = values[row, : max(0, len(rows[i]) - 1)]
    return found


class NextToken:
    """Log-probabilities of the next token, float32 (rows, V), of rows of ids without padding that grow by one a call.

    Rows may change places, be dropped and be repeated between calls, as beams are: each is found among the last ones by its
    ids and takes over their keys and values. Models that keep no cache that can be reordered are run on the whole rows.

    Parameters
    ----------
    model : nn.Module
        `model(input_ids=...)` gives `logits`.
    context : callable () -> context manager, optional
        Entered around every pass: switches an adapter off, say.
    """

    def __init__(self, model: nn.Module, context: Callable[[], Any] = contextlib.nullcontext) -> None:
        self.model, self.context = model, context
        self.ids: torch.Tensor | None = None
        self.cache: Any = None

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(next(self.model.parameters()).device)
        places = self._places(ids)
        with self.context():
            if places is None:
                out = self.model(input_ids=ids, use_cache=True)
            else:
                if not torch.equal(places, torch.arange(len(self.ids), device=places.device)):  # type: ignore[arg-type]
                    self.cache.reorder_cache(places)
                out = self.model(input_ids=ids[:, -1:], past_key_values=self.cache, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        self.cache = cache if hasattr(cache, "reorder_cache") else None
        self.ids = ids
        return out.logits[:, -1].float().log_softmax(-1)

    def _places(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Of each row, which of the last ones it continues; None where the cache serves nothing."""
        if self.cache is None or self.ids is None or self.ids.shape[1] + 1 != ids.shape[1]:
            return None
        before, old = ids[:, :-1], self.ids
        if before.shape == old.shape and torch.equal(before, old):
            return torch.arange(len(old), device=ids.device)
        _, number = torch.unique(torch.cat([old, before]), dim=0, return_inverse=True)
        place = torch.full((int(number.max()) + 1,), -1, device=ids.device)
        place[number[: len(old)]] = torch.arange(len(old), device=ids.device)
        found = place[number[len(old) :]]
        return None if (found < 0).any() else found


def greedy_answers(
    model: nn.Module, tokenizer: Any, max_new_tokens: int = 10, batch_size: int = 32
) -> Callable[[Sequence[str]], list[str]]:
    """A function of prompts that gives the greedy continuations as texts, cut before the first EOS."""
    start, eos = start_token(tokenizer), tokenizer.eos_token_id

    @torch.inference_mode()
    def answer(prompts: Sequence[str]) -> list[str]:
        answers: list[str] = [""] * len(prompts)
        rows = [[start, *ids] for ids in _ids(tokenizer, prompts)]
        for chosen in _equal_lengths(rows, batch_size):  # so that no model needs to understand padding
            ids = torch.tensor([rows[i] for i in chosen], device=next(model.parameters()).device)
            width, next_token = ids.shape[1], NextToken(model)
            for _ in range(max_new_tokens):
                ids = torch.cat([ids, next_token(ids).argmax(-1, keepdim=True).to(ids.device)], 1)
                if eos is not None and (ids[:, width:] == eos).any(1).all():
                    break
            for i, new in zip(chosen, ids[:, width:].tolist(), strict=True):
                new = new[: new.index(eos)] if eos in new else new
                answers[i] = tokenizer.decode(new, skip_special_tokens=True)
        return answers

    return answer


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def _equal_lengths(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Numbers of rows of one length, at most `batch_size` together."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(len(row), []).append(i)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
