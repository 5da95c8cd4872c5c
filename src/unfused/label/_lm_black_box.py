"""A transformers language model behind the door of an API: queries in, class probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["LMBlackBox", "Query"]


class Query(NamedTuple):
    """What a black box is asked.

    Attributes
    ----------
    text : str
    prompt : tuple of str
        Tokens of the prompt, words or phrases.
    demos : tuple of (str, int)
        Demonstrations, the last nearest to the text: texts and indices of their classes.
    """

    text: str
    prompt: tuple[str, ...] = ()
    demos: tuple[tuple[str, int], ...] = ()


class LMBlackBox:
    """Class probabilities by a causal or masked language model, in batches, without gradients.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    class_words : list of str
        A word for each class. A masked model needs words of one token; of several a causal model multiplies the
        probabilities.
    template : str, default="{prompt} {demos} {x} It was"
        `{prompt}`, `{demos}`, then the text `{x}` and what leads to the class word; a masked model's has `{mask}` for it. A
        demonstration is the part from `{x}` on with its word in place.
    separator : str, default=" "
        Between demonstrations, and after them.
    batch_size : int, default=32
    max_length : int, default=512
        Tokens. What is longer loses its first demonstrations, then the end of its text.

    Raises
    ------
    ValueError
        For a template without a part, or class words that do not fit the tokenizer.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    >>> words = {w: i for i, w in enumerate("[UNK] It was good bad a film".split())}
    >>> tokens = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    >>> tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=1, n_positions=32))
    >>> box = LMBlackBox(model, PreTrainedTokenizerFast(tokenizer_object=tokens), ["bad", "good"])
    >>> box.render(Query("a film", ("film",), (("good film", 1),)))
    'film good film It was good a film It was'
    >>> box([Query("a film"), Query("film")]).shape
    (2, 2)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        class_words: Sequence[str],
        template: str = "{prompt} {demos} {x} It was",
        separator: str = " ",
        batch_size: int = 32,
        max_length: int = 512,
    ) -> None:
        head, found, last = template.partition("{demos}")
        self.before_x, x, self.after_x = last.partition("{x}")
        self.before_prompt, prompt, self.after_prompt = head.partition("{prompt}")
        if not (found and x and prompt):
            raise ValueError(
                f"template={template!r} must have {{prompt}}, {{demos}} and {{x}}, in this order"
            )
        if len(class_words) < 2:
            raise ValueError(f"class_words={list(class_words)!r}: at least two are needed")
        self.masked = "{mask}" in self.after_x
        self.model, self.tokenizer, self.class_words = model, tokenizer, list(class_words)
        self.template, self.separator = template, separator
        self.batch_size, self.max_length = batch_size, max_length
        if self.masked:
            from unfused.nn.prompt_template import word_ids

            if tokenizer.mask_token_id is None:
                raise ValueError("template has {mask}, but the tokenizer has no mask token")
            space = self.after_x.partition("{mask}")[0][-1:].isspace()
            self.word_ids = [[i] for i in word_ids(tokenizer, self.class_words, space, "class_words")]
        else:
            texts = [f" {word}" for word in self.class_words]
            self.word_ids = [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
            empty = [w for w, ids in zip(self.class_words, self.word_ids, strict=True) if not ids]
            unknown = [ids for ids in self.word_ids if tokenizer.unk_token_id in ids]
            if empty or unknown or len({tuple(ids) for ids in self.word_ids}) < len(self.word_ids):
                raise ValueError(
                    f"class_words={self.class_words}: two are the same to the tokenizer, or one is unknown to it"
                )

    def __sklearn_clone__(self) -> LMBlackBox:
        """It learns nothing: a cloned estimator asks the same model."""
        return self

    def render(self, query: Query, skip: int = 0) -> str:
        """The text that the model reads, without the first `skip` demonstrations."""
        gap = self.tokenizer.mask_token if self.masked else ""
        demos = [
            self._shown(text, self.class_words[label]) + self.separator for text, label in query.demos[skip:]
        ]
        parts = [
            self.before_prompt + " ".join(query.prompt) + self.after_prompt if query.prompt else "",
            "".join(demos),
            self._shown(query.text, gap),
        ]
        return "".join(
            part if part[-1:].isspace() or i == 2 else f"{part} "
            for i, part in enumerate(parts)
            if part.strip()
        ).strip()

    def _shown(self, text: str, word: str) -> str:
        after = self.after_x.replace("{mask}", word) if self.masked else f"{self.after_x} {word}"
        return (self.before_x + text + after).strip()

    def _encode(self, queries: Sequence[Query]) -> list[list[int]]:
        room = self.max_length - (0 if self.masked else max(map(len, self.word_ids)))
        rows = [self._ids(self.render(query)) for query in queries]
        for i, query in enumerate(queries):
            skip, text = 0, query.text
            while len(rows[i]) > room and (skip < len(query.demos) or len(text) > 1):
                if skip < len(query.demos):
                    skip += 1
                else:
                    text = text[: min(len(text) - 1, len(text) * room // len(rows[i]))]
                rows[i] = self._ids(self.render(query._replace(text=text), skip))
        return rows

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        return ids[:-1] if not self.masked and len(ids) > 1 and ids[-1] in ends else ids

    def __call__(self, queries: Sequence[Query]) -> np.ndarray:
        """Probabilities, (n, classes)."""
        import torch

        rows, scores = self._encode(queries), []
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding in a batch
        self.model.eval()
        with torch.inference_mode():
            for start in range(0, len(rows), self.batch_size):
                scores.append(self._scores([rows[i] for i in order[start : start + self.batch_size]]))
        found = torch.cat(scores).softmax(-1).double().cpu().numpy()
        return found[np.argsort(order)]

    def _scores(self, rows: list[list[int]]) -> Any:
        import torch

        from unfused.nn.prompt_template import logits_at

        device = next(self.model.parameters()).device
        if self.masked or all(len(ids) == 1 for ids in self.word_ids):
            inputs = self._pad(rows, device)
            if self.masked:
                at = (inputs["input_ids"] == self.tokenizer.mask_token_id).int().argmax(1)
            else:
                at = inputs["attention_mask"].sum(1) - 1
            words = [ids[0] for ids in self.word_ids]
            return logits_at(self.model, inputs, at)[:, words].float()
        whole = [row + ids for row in rows for ids in self.word_ids]  # (B * C)
        inputs = self._pad(whole, device)
        log_p = self.model(**inputs).logits[:, :-1].float().log_softmax(-1)
        said = log_p.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]  # (B * C, T - 1)
        place = torch.arange(1, inputs["input_ids"].shape[1], device=device)
        start = torch.tensor([len(row) for row in rows for _ in self.word_ids], device=device)[:, None]
        end = torch.tensor([len(row) for row in whole], device=device)[:, None]
        return (said * ((place >= start) & (place < end))).sum(1).view(len(rows), -1)

    def _pad(self, rows: list[list[int]], device: Any) -> dict[str, Any]:
        import torch

        longest, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        return {"input_ids": ids, "attention_mask": mask}
