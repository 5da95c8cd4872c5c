"""What `VisionTherapy` asks: any callable, guarded; and image-text-to-text models of transformers.

A verifier sees three images, a sentence about each and the answers to the first two; it says how likely the third's answer
is "True". `Asker` calls it one by one or in batches and turns whatever goes wrong into a written reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from unfused.nn.time_limit import in_thread

__all__ = ["Asker", "Question", "TransformersVerifier"]

IMAGE = "<img>"  # where a sentence has its picture


class Question(NamedTuple):
    """Two examples and a query; `about` says where it came from."""

    images: list[Any]
    captions: list[str]
    answers: list[str | None]
    about: dict[str, Any]


class Asker:
    """Calls a verifier and survives it.

    A batch that fails is asked again one by one: a single picture may be at fault, or the verifier takes no batches, in
    which case later batches are half as large. What fails by itself is written to `failures`. After `max_failures` failures
    in a row nothing is asked any more and `stopped` says why.

    Parameters
    ----------
    verifier : callable
    batch_size : int or None
        None: one question a call, as three lists. A number: three lists of lists.
    timeout : float or None
        Seconds a call may take. A call that takes longer is left to itself in its thread.
    max_failures : int
    """

    def __init__(
        self, verifier: Callable[..., Any], batch_size: int | None, timeout: float | None, max_failures: int
    ) -> None:
        self.verifier, self.batched = verifier, batch_size is not None
        self.size, self.timeout, self.max_failures = batch_size or 1, timeout, max_failures
        self.failures: list[dict[str, Any]] = []
        self.in_a_row = 0
        self.stopped = ""

    def __call__(self, questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of "True", NaN where there is no usable answer; and which questions were asked at all."""
        found, asked = np.full(len(questions), np.nan), np.zeros(len(questions), bool)
        start = 0
        while start < len(questions) and not self.stopped:
            rows = slice(start, start + self.size)
            found[rows], asked[rows] = self._some(questions[rows])
            start = rows.stop
        return found, asked

    def _some(self, questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
        nothing = np.full(len(questions), np.nan)
        if self.stopped:
            return nothing, np.zeros(len(questions), bool)
        try:
            if self.timeout is None:
                found = self._call(questions)
            else:
                found = in_thread(lambda: self._call(questions), self.timeout)
            reason = ""
        except Exception as error:  # whatever it raises costs this answer, not the run
            first_line = (str(error).strip() or "no message").splitlines()[0]
            found, reason = nothing, f"{type(error).__name__}: {first_line}"
        if reason and len(questions) > 1:
            parts = [self._some([question]) for question in questions]
            found, asked = (np.concatenate(column) for column in zip(*parts, strict=True))
            if np.isfinite(found).all():
                self.size = max(1, len(questions) // 2)
            return found, asked
        good = np.isfinite(found) & (found >= 0) & (found <= 1)
        for question, value, fine in zip(questions, found, good, strict=True):
            if not fine:
                why = reason or f"it returned {value}: a probability between 0 and 1 is needed"
                self.failures.append({**question.about, "reason": why})
                self.in_a_row += 1
                if self.in_a_row >= self.max_failures and not self.stopped:
                    self.stopped = why
            else:
                self.in_a_row = 0
        return np.where(good, found, np.nan), np.ones(len(questions), bool)

    def _call(self, questions: Sequence[Question]) -> np.ndarray:
        if self.batched:
            columns = zip(*(question[:3] for question in questions), strict=True)
            raw = self.verifier(*(list(column) for column in columns))
        else:
            raw = self.verifier(*questions[0][:3])
        if hasattr(raw, "detach"):
            raw = raw.detach().float().cpu().numpy()
        try:
            values = np.asarray(raw, np.float64).reshape(-1)
        except (TypeError, ValueError):
            raise TypeError(f"it returned {raw!r:.60}: a probability between 0 and 1 is needed") from None
        if len(values) != len(questions):
            raise ValueError(f"it returned {len(values)} numbers for {len(questions)} questions")
        return values


class TransformersVerifier:
    """An image-text-to-text model as verifier: the softmax of the logits of its two answers, nothing is parsed.

    With a chat template the two examples are turns of a conversation (question, answer), else one text. The model makes one
    step of `generate`; of an answer in several tokens the first decides, found in its place behind the prompt.

    Parameters
    ----------
    model : str, path or model
        Hub id, folder or a model of `transformers.AutoModelForImageTextToText`'s kind, which must take several images a
        prompt. Not trained.
    processor : optional
        Of a model in memory.
    answers : (str, str), default=("True", "False")
        The affirmative one first; the examples' answers are written so too.
    chat : bool, optional
        Whether to use the chat template; by default if there is one.
    batch_size : int, default=8
        Questions a step, each with three images.
    device : str, optional
        By default that of the model; "cuda" for one that is loaded, where there is one.
    dtype : str, default="auto"
        Of a model that is loaded.

    Examples
    --------
    >>> verifier = TransformersVerifier("HuggingFaceTB/SmolVLM-256M-Instruct")                       # doctest: +SKIP
    >>> VisionTherapy(verifier).fit(images, y, probs).relabel(target_images, target_probs)           # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        answers: tuple[str, str] = ("True", "False"),
        chat: bool | None = None,
        batch_size: int = 8,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        if len(answers) != 2 or not all(isinstance(word, str) and word.strip() for word in answers):
            raise ValueError(f"answers={answers!r}: give two words, the affirmative one first")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        if isinstance(model, str | os.PathLike):
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor

            processor = AutoProcessor.from_pretrained(model) if processor is None else processor
            model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if getattr(processor, "tokenizer", None) is None:
            raise ValueError(
                f"processor={type(processor).__name__}: a model in memory needs its processor, with a tokenizer"
            )
        if chat and not getattr(processor, "chat_template", None):
            raise ValueError("chat=True: the processor has no chat template; set one or chat=False")
        self.model = model.eval() if device is None else model.to(device).eval()
        self.processor, self.answers, self.batch_size = processor, tuple(answers), batch_size
        self.chat = bool(getattr(processor, "chat_template", None)) if chat is None else chat
        self._tokens: list[int] | None = None

    def __call__(self, images: list[Any], captions: list[Any], answers: list[Any]) -> Any:
        """Probability of the affirmative answer.

        Parameters
        ----------
        images, captions, answers : list of 3, or list of lists of 3
            Pictures (paths, PIL, arrays of bytes), sentences with `<img>` where their picture goes (else it goes in front),
            and "True", "False" or None.

        Returns
        -------
        float, or ndarray of shape (n,)
        """
        import torch

        if isinstance(captions[0], str):
            return float(self([images], [captions], [answers])[0])
        prompts = [self._prompt(*row) for row in zip(captions, answers, strict=True)]
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        begins = tokenizer.bos_token is not None and prompts[0].startswith(tokenizer.bos_token)
        inputs = self.processor(
            text=prompts,
            images=[[_picture(image) for image in row] for row in images],
            padding=True,
            padding_side="left",  # the last position is the answer's in every row
            add_special_tokens=not begins,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        two = out.logits[0].float()[:, self._answer_tokens(prompts[0])]  # (n, 2), before any processing
        return two.softmax(-1)[:, 0].cpu().numpy()

    def _prompt(self, captions: Sequence[str], answers: Sequence[str | None]) -> str:
        words = {"True": self.answers[0], "False": self.answers[1]}
        parts = [caption.split(IMAGE, 1) if IMAGE in caption else ["", caption] for caption in captions]
        said = [None if answer is None else words.get(answer, answer) for answer in answers]
        if not self.chat:
            token = getattr(self.processor, "image_token", None) or getattr(
                self.processor.tokenizer, "image_token", "<image>"
            )
            lines = [f"{before}{token}{after}" for before, after in parts]
            return "\n".join(
                line if word is None else f"{line} {word}" for line, word in zip(lines, said, strict=True)
            )
        turns = []
        for (before, after), word in zip(parts, said, strict=True):
            content: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": after}]
            if before.strip():
                content.insert(0, {"type": "text", "text": before})
            turns.append({"role": "user", "content": content})
            if word is not None:
                turns.append({"role": "assistant", "content": [{"type": "text", "text": word}]})
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def _answer_tokens(self, prompt: str) -> list[int]:
        """The first token of either answer where it would stand: "True" may be another token behind a space."""
        if self._tokens is None:
            ids: Callable[[str], list[int]] = lambda text: self.processor.tokenizer(  # noqa: E731
                text, add_special_tokens=False
            )["input_ids"]
            whole = getattr(self.model.config, "is_encoder_decoder", False)
            before = [] if whole else ids(prompt)
            found = []
            for word in self.answers:
                after = ids(word if whole else prompt + ("" if self.chat else " ") + word)
                same = next(
                    (i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]),
                    len(before),
                )
                found.append(after[same])
            if found[0] == found[1]:
                raise ValueError(f"answers={self.answers!r} begin with the same token: choose other words")
            self._tokens = found
        return self._tokens


def _picture(image: Any) -> Any:
    from PIL import Image, ImageOps

    if isinstance(image, str | os.PathLike):
        with Image.open(image) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = Image.fromarray(image)
    return image.convert("RGB") if isinstance(image, Image.Image) else image
