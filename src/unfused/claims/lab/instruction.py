"""What a decoder that knows facts is taught, and what it keeps: new string tasks, and one number for a trade-off.

The tasks are none of those that the decoder was pretrained on:

    last b a t -> t           first b a t -> b           double b a -> b b a a           vowels b a t -> 1
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from unfused.claims.lab.tuning import Batch

__all__ = ["NEW_TASKS", "frontier_area", "new_task", "rows_right", "share_right", "stacked"]

NEW_TASKS = ("last", "first", "double", "vowels")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def new_task(
    task: str, count: int, seed: int, letters: tuple[int, int] = (2, 5)
) -> tuple[list[str], list[str]]:
    """Prompts and answers of one of `NEW_TASKS` on spelled words of random letters.

    Examples
    --------
    >>> new_task("last", 1, seed=0)
    (['last d a q z v ->'], [' v'])
    """
    if task not in NEW_TASKS:
        raise ValueError(f"task={task!r}: choose one of {', '.join(NEW_TASKS)}")
    generator = np.random.default_rng([seed, NEW_TASKS.index(task), 7])
    prompts, answers = [], []
    for length in generator.integers(letters[0], letters[1] + 1, count):
        word = [LETTERS[i] for i in generator.integers(26, size=length)]
        answer = {
            "last": word[-1:],
            "first": word[:1],
            "double": [letter for letter in word for _ in range(2)],
            "vowels": [str(sum(letter in "aeiou" for letter in word))],
        }[task]
        prompts.append(f"{task} {' '.join(word)} ->")
        answers.append(f" {' '.join(answer)}")
    return prompts, answers


def stacked(parts: Sequence[Batch], pad: int = 0) -> Batch:
    """Batches below each other, padded at the right to one length (`labels` with -100); they have the same columns."""
    length = max(part["input_ids"].shape[1] for part in parts)

    def widened(name: str, column: torch.Tensor) -> torch.Tensor:
        if column.ndim < 2:
            return column
        value = {"labels": -100, "input_ids": pad}.get(name, 0)
        return nn.functional.pad(column, (0, length - column.shape[1]), value=value)

    return {name: torch.cat([widened(name, part[name]) for part in parts]) for name in parts[0]}


@torch.inference_mode()
def rows_right(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Which rows greedy decoding answers exactly, the end included: (rows,) of bool."""
    right = []
    for start in range(0, len(batch["labels"]), 256):
        part = {name: batch[name][start : start + 256] for name in ("input_ids", "attention_mask", "labels")}
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        labels = part["labels"][:, 1:]
        right.append(((logits[:, :-1].argmax(-1) == labels) | (labels == -100)).all(1))
    return torch.cat(right)


def share_right(model: nn.Module, batch: Batch) -> float:
    """Share of the rows that `rows_right` finds right."""
    return float(rows_right(model, batch).float().mean())


def frontier_area(points: Sequence[tuple[float, float]]) -> float:
    """Area of the part of the unit square in which some point is at least as good in both: 1 is perfect.

    Of (task accuracy, recall) at several learning rates, it says how good a trade-off one can choose from.

    Examples
    --------
    >>> frontier_area([(0.5, 1.0), (1.0, 0.5), (0.4, 0.4)])
    0.75
    """
    area, reached = 0.0, 0.0
    for x, y in sorted(points, reverse=True):
        area += x * max(0.0, y - reached)
        reached = max(reached, y)
    return area
