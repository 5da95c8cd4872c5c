"""Cloze prompts: a template around the text, a word for each class, and scores where the mask is.

A classifier without a new head: the text is put into a sentence with one gap, and each class has a word that would fill it.
What the language model thinks of these words at the gap are the logits.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PromptTemplate", "logits_at", "word_ids"]


class PromptTemplate:
    """A template with one gap and a verbalizer.

    Parameters
    ----------
    template : str
        With `{mask}` once and at least one field, a column of the rows: `"{text_a} ? {mask} , {text_b}"`.
    verbalizer : mapping of label to str
        The word of each class, in the order of the logits. Where `{mask}` follows a space the word's token with its leading
        space is meant (byte-level and sentence-piece vocabularies have both). Each must be one token of the vocabulary.

    Attributes
    ----------
    labels : list
        Keys of the verbalizer: class c is `labels[c]`.
    fields : list of str

    Raises
    ------
    ValueError
        If the template has no field or not one `{mask}`, if there are fewer than two classes or two have one word; when it
        meets a tokenizer: if that has no mask, or a word is no single token of it.

    Examples
    --------
    >>> template = PromptTemplate("{text} It was {mask}.", verbalizer={0: "terrible", 1: "great"})
    >>> template.fields, template.labels
    (['text'], [0, 1])
    """

    def __init__(self, template: str, verbalizer: Mapping[Hashable, str]) -> None:
        self.template, self.verbalizer = template, dict(verbalizer)
        self.labels = list(self.verbalizer)
        self.parts: list[tuple[str, str]] = []  # (fixed text before, field), the last with field ""
        for text, name, _, _ in string.Formatter().parse(template):
            if name == "":
                raise ValueError(f"template={template!r}: a field has no name; write {{text}}, say")
            self.parts.append((text, name or ""))
        names = [name for _, name in self.parts if name]
        self.fields = [name for name in dict.fromkeys(names) if name != "mask"]
        if names.count("mask") != 1 or not self.fields:
            raise ValueError(
                f"template={template!r} needs {{mask}} once and a field for the text, as in '{{text}} It was {{mask}}.'"
            )
        words = list(self.verbalizer.values())
        if len(words) < 2:
            raise ValueError(f"verbalizer={self.verbalizer!r}: at least two classes are needed")
        if len(set(words)) < len(words):
            raise ValueError(f"verbalizer={self.verbalizer!r}: two classes have the same word")

    def __repr__(self) -> str:
        return f"PromptTemplate({self.template!r}, verbalizer={self.verbalizer!r})"

    def token_ids(self, tokenizer: Any) -> list[int]:
        """The token of each class's word."""
        before = next(text for text, name in self.parts if name == "mask")
        return word_ids(tokenizer, list(self.verbalizer.values()), before[-1:].isspace(), "verbalizer")

    def encode(
        self,
        tokenizer: Any,
        rows: Sequence[Any],
        max_length: int = 128,
        label_column: str | None = "label",
    ) -> dict[str, Tensor]:
        """A batch for a masked language model.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase
        rows : sequence of mapping, or of str where the template has one field
            N rows.
        max_length : int, default=128
            Tokens; the longest fields are cut, never the template.
        label_column : str, optional
            Where the first row has it, every row's label becomes its class.

        Returns
        -------
        dict
            `input_ids` and `attention_mask` (N, T), `mask_position` (N,), and `labels` (N,) where there are some.

        Raises
        ------
        ValueError
            For a row without a field or of an unknown label, or if `max_length` has no room for the template.
        """
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "the tokenizer has no mask token: a template needs a masked language model's tokenizer"
            )
        head, tail = _special(tokenizer)
        fixed: list[list[int]] = []
        texts: list[list[list[int]]] = []  # of each part that is a field: the rows' tokens
        for text, name in self.parts:
            space = text[len(text.rstrip()) :] if name else ""
            kept = text.rstrip() if name else text
            fixed.append(_ids(tokenizer, [kept])[0] if kept else [])
            if name and name != "mask":
                texts.append(_ids(tokenizer, [space + self._value(row, name) for row in rows]))
        room = max_length - len(head) - len(tail) - sum(map(len, fixed)) - 1
        if room < len(texts):
            raise ValueError(
                f"max_length={max_length}: the template alone needs {max_length - room}; give more"
            )
        ids, positions = [], []
        for columns in zip(*texts, strict=True):
            lengths = iter(_fit([len(column) for column in columns], room))
            row, parts = [*head], iter(columns)
            for before, (_, name) in zip(fixed, self.parts, strict=True):
                row += before
                if name == "mask":
                    positions.append(len(row))
                    row.append(tokenizer.mask_token_id)
                elif name:
                    row += next(parts)[: next(lengths)]
            ids.append(row + tail)
        longest = max(map(len, ids))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        batch = {
            "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
            "mask_position": torch.tensor(positions),
        }
        if label_column and isinstance(rows[0], Mapping) and label_column in rows[0]:
            batch["labels"] = torch.tensor([self._class(row.get(label_column)) for row in rows])
        return batch

    def collator(
        self, tokenizer: Any, max_length: int = 128, label_column: str | None = "label"
    ) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """`encode` as a Trainer's `data_collator`."""

        def collate(rows: Sequence[Any]) -> dict[str, Tensor]:
            return self.encode(tokenizer, rows, max_length, label_column)

        return collate

    def _value(self, row: Any, name: str) -> str:
        if isinstance(row, str) and len(self.fields) == 1:
            return row
        if not isinstance(row, Mapping) or not isinstance(row.get(name), str):
            raise ValueError(f"a row has no text in {name!r}, which {self.template!r} asks for: {row!r:.80}")
        return row[name]

    def _class(self, label: Any) -> int:
        if label not in self.verbalizer:
            raise ValueError(f"label {label!r} is none of the verbalizer's {self.labels}")
        return self.labels.index(label)


def word_ids(
    tokenizer: Any, words: Sequence[str], leading_space: bool = True, argument: str = "words"
) -> list[int]:
    """The one token of each word.

    Raises
    ------
    ValueError
        If a word is not one token, or is unknown, or if two are the same.
    """
    found: list[int] = []
    for word, ids in zip(
        words, _ids(tokenizer, [f"{' ' * leading_space}{word}" for word in words]), strict=True
    ):
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"{argument}: {word!r} is {pieces} to this tokenizer; choose a word that is one known token"
            )
        if ids[0] in found:
            raise ValueError(f"{argument}: {word!r} and {words[found.index(ids[0])]!r} are the same token")
        found += ids
    return found


def logits_at(model: nn.Module, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """A language model's logits at one position of each row, (N, vocabulary).

    The head sees these positions alone: a hook takes them out of what the backbone returns, in any transformers model that
    is a backbone under a head, inside PEFT or DDP too. Other models compute all logits first.

    Parameters
    ----------
    model : nn.Module
    inputs : mapping
        What its forward takes, rows first.
    positions : Tensor of int, shape (N,)
    """
    rows = torch.arange(len(positions), device=positions.device)
    backbone = _backbone(model)
    if backbone is None:
        return model(**inputs).logits[rows, positions]

    def keep(module: nn.Module, arguments: Any, output: Any) -> Any:
        kept = output[0][rows, positions][:, None]  # (N, 1, D)
        if isinstance(output, tuple):
            return (kept, *output[1:])
        output.last_hidden_state = kept
        return output

    handle = backbone.register_forward_hook(keep)
    try:
        return model(**inputs).logits[:, 0]
    finally:
        handle.remove()


def _backbone(model: nn.Module) -> nn.Module | None:
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        else:
            break
    found = getattr(inner, "base_model", None)
    return found if isinstance(found, nn.Module) and found is not inner else None


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare, whole = _ids(tokenizer, ["a"])[0], list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _fit(lengths: Sequence[int], room: int) -> list[int]:
    """Lengths that fit into `room` together, the longest cut first."""
    kept, left = [0] * len(lengths), room
    for rank, i in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        kept[i] = min(lengths[i], left // (len(lengths) - rank))
        left -= kept[i]
    return kept
