from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.nn.queue import MemoryQueue


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_it_holds_the_last_keys_whatever_the_batch_sizes(size, batches):
    queue = MemoryQueue(dim=3, size=size)
    seen = F.normalize(queue.keys.clone(), dim=1)
    for batch in batches:
        keys = torch.randn(batch, 3)
        queue.enqueue(keys)
        seen = torch.cat([seen, F.normalize(keys, dim=1)])
    position = int(queue.position)
    oldest_first = torch.cat([queue.keys[position:], queue.keys[:position]])
    torch.testing.assert_close(oldest_first, seen[-size:])


def test_state_is_persistent():
    queue, other = MemoryQueue(2, 4), MemoryQueue(2, 4)
    queue.enqueue(torch.randn(3, 2))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(queue.keys, other.keys) and other.position == 3


def test_enqueueing_does_not_disturb_a_pending_backward_pass():
    queue = MemoryQueue(2, 4)
    query = torch.randn(3, 2, requires_grad=True)
    loss = (query @ queue.negatives().T).logsumexp(1).sum()
    queue.enqueue(query)
    loss.backward()
    assert query.grad is not None and not queue.keys.requires_grad


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="size"):
        MemoryQueue(2, 0)
