from __future__ import annotations

import json

import pytest
import torch

from unfused.data.hidden_states import HiddenStates, HiddenStatesWriter, States


def write(folder, dtype="float32"):
    torch.manual_seed(0)
    writer = HiddenStatesWriter(folder, dtype)
    hidden = [torch.randn(3, 4, 2), torch.randn(3, 4, 5)]
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]])
    writer.append(States(hidden, mask))
    writer.append(States([h[:1, :2] for h in hidden]))
    return hidden, mask, writer


def test_items_come_back_in_any_order_without_padding(tmp_path):
    hidden, _, writer = write(tmp_path / "a")
    states = writer.close(place="here")
    assert len(states) == 4 and states.about == {"place": "here"} and states.shapes == [[2], [5]]
    batch = states.batch([3, 1, 2])
    assert batch.mask.tolist() == [[True, True], [True, True], [True, False]]
    for found, given in zip(batch.hidden, hidden, strict=True):
        assert torch.equal(found[0], given[0, :2]) and torch.equal(found[1], given[1, 2:])
        assert torch.equal(found[2, 0], given[2, 0]) and not found[2, 1].any()
    again = HiddenStates(tmp_path / "a").batch(torch.tensor([0]))
    assert torch.equal(again.hidden[1][0], hidden[1][0]) and again.anchor is None


def test_half_as_large_in_float16(tmp_path):
    sizes = []
    for dtype in ("float32", "float16"):
        states = write(tmp_path / dtype, dtype)[2].close()
        sizes.append((tmp_path / dtype / "layer-0.bin").stat().st_size)
        assert states.batch([0]).hidden[0].dtype == torch.float32
    assert sizes == [9 * 2 * 4, 9 * 2 * 2]


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype='int8'"):
        HiddenStatesWriter(tmp_path, "int8")
    with pytest.raises(ValueError, match="the dataset is empty"):
        HiddenStatesWriter(tmp_path / "none").close()
    _, _, writer = write(tmp_path / "a")
    with pytest.raises(ValueError, match="never finished"):
        HiddenStates(tmp_path / "a")
    with pytest.raises(ValueError, match="must have the same size"):
        writer.append(States([torch.zeros(1, 1, 3), torch.zeros(1, 1, 5)]))
    writer.close()
    with pytest.raises(ValueError, match="holds hidden states already"):
        HiddenStatesWriter(tmp_path / "a")


@pytest.mark.parametrize("damage", ["cut", "gone", "offsets"])
def test_damage_is_noticed(tmp_path, damage):
    write(tmp_path)[2].close()
    layer = tmp_path / "layer-1.bin"
    if damage == "cut":
        layer.write_bytes(layer.read_bytes()[:-1])
    elif damage == "gone":
        layer.unlink()
    else:
        index = json.loads((tmp_path / "index.json").read_text())
        offsets = tmp_path / "offsets.bin"
        offsets.write_bytes(offsets.read_bytes()[8:16] + offsets.read_bytes()[8:])
        assert index["items"] == 4
    with pytest.raises(ValueError, match="write the states anew"):
        HiddenStates(tmp_path)
