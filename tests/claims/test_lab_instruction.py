"""The bench of new string tasks: what is asked, what counts as right, the area of a trade-off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from unfused.claims.lab.instruction import (
    NEW_TASKS,
    frontier_area,
    new_task,
    rows_right,
    share_right,
    stacked,
)


@pytest.mark.parametrize("task", NEW_TASKS)
def test_answers_are_right(task):
    prompts, answers = new_task(task, 50, seed=3)
    assert (prompts, answers) == new_task(task, 50, seed=3)
    assert prompts != new_task(task, 50, seed=4)[0]
    for prompt, answer in zip(prompts, answers, strict=True):
        name, *word, arrow = prompt.split()
        said = answer.split()
        assert name == task and arrow == "->" and 2 <= len(word) <= 5
        expected = {
            "first": [word[0]],
            "last": [word[-1]],
            "double": list(np.repeat(word, 2)),
            "vowels": [str(sum(map("aeiou".count, word)))],
        }[task]
        assert said == expected


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match="task='copy'"):
        new_task("copy", 1, seed=0)


def test_stacked_pads_by_column():
    short = {
        "input_ids": torch.ones(1, 2, dtype=torch.long),
        "attention_mask": torch.ones(1, 2, dtype=torch.long),
        "labels": torch.ones(1, 2, dtype=torch.long),
        "task_type": torch.tensor([1]),
    }
    long = {name: column.repeat(1, 2) if column.ndim > 1 else column for name, column in short.items()}
    both = stacked([short, long])
    assert both["input_ids"][0].tolist() == [1, 1, 0, 0] and both["attention_mask"][0].tolist() == [
        1,
        1,
        0,
        0,
    ]
    assert both["labels"][0].tolist() == [1, 1, -100, -100] and both["task_type"].tolist() == [1, 1]


def test_a_row_is_right_where_each_answered_token_is():
    class Successor(nn.Module):
        def forward(self, input_ids, attention_mask):
            logits = nn.functional.one_hot((input_ids + 1) % 10, 10).float()
            return type("Output", (), {"logits": logits})

    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [7, 2, 3, 0]])
    labels = torch.tensor([[-100, -100, 3, 4], [-100, -100, 3, 5], [-100, -100, 3, -100]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    assert rows_right(Successor(), batch).tolist() == [True, False, True]
    assert share_right(Successor(), batch) == pytest.approx(2 / 3)


def test_frontier_area_is_the_area_dominated():
    points = [(0.2, 0.9), (0.6, 0.6), (0.9, 0.1), (0.5, 0.5)]
    grid = (np.stack(np.meshgrid(np.arange(1000), np.arange(1000)), -1) + 0.5) / 1000
    inside = np.any([(grid[..., 0] < x) & (grid[..., 1] < y) for x, y in points], axis=0)
    assert frontier_area(points) == pytest.approx(inside.mean(), abs=1e-3)
    assert frontier_area([(1.0, 1.0)]) == 1 and frontier_area([(0.0, 1.0)]) == 0
