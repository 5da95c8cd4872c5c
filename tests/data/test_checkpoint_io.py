"""Reading and writing safetensors checkpoints: against the library, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from unfused.data.checkpoint_io import ShardWriter, open_checkpoint, read_header

TENSORS = {
    "layer.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "layer.half": torch.randn(7, dtype=torch.float32).to(torch.bfloat16),
    "scale": torch.tensor(2.5, dtype=torch.float16),
    "ids": torch.arange(4),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
}


def layout(tensors):
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write(folder, tensors, **options):
    writer = ShardWriter(folder, layout(tensors), **options)
    for shard in writer.pending():
        with writer.open(shard) as stream:
            for name in shard.tensors:
                stream.write(tensors[name])
    writer.finish()
    return writer


def same(found, tensors):
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("size", [10_000, 40, 1])
def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path, size):
    writer = write(tmp_path, TENSORS, max_shard_bytes=size)
    with open_checkpoint(tmp_path) as checkpoint:
        same(checkpoint, TENSORS)
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.nbytes == writer.nbytes == sum(t.nbytes for t in TENSORS.values())
        assert (checkpoint.index is not None) == (len(writer.shards) > 1)
    same({k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}, TENSORS)
    assert not writer.pending()
    if size == 1:
        places = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert list(places["weight_map"]) == list(TENSORS)
        assert places["metadata"]["total_size"] == writer.nbytes


def test_reads_what_the_library_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        same(checkpoint, TENSORS)
        assert torch.equal(checkpoint.read("layer.weight", 4, 9), TENSORS["layer.weight"].view(-1)[4:9])
        with pytest.raises(KeyError, match=r"has no tensor 'other'"):
            checkpoint["other"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    st.integers(1, 200),
    st.data(),
)
def test_any_layout_survives(tmp_path_factory, shapes, size, data):
    types = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
    tensors = {f"t{i}": torch.ones(s).to(data.draw(types)) for i, s in enumerate(shapes)}
    folder = tmp_path_factory.mktemp("any")
    writer = write(folder, tensors, max_shard_bytes=size)
    with open_checkpoint(folder) as checkpoint:
        same(checkpoint, tensors)
        assert all(info.offset % info.dtype.itemsize == 0 for info in checkpoint.infos.values() if info.numel)
    for shard in writer.shards:
        kept = sum(tensors[name].nbytes for name in shard.tensors)
        assert kept <= size or len(shard.tensors) == 1


def test_only_what_is_missing_is_written_again(tmp_path):
    writer = write(tmp_path, TENSORS, max_shard_bytes=40)
    lost = writer.shards[1]
    path = tmp_path / lost.name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert writer.pending() == [lost]
    path.write_bytes(content.replace(b"F32", b"I32"))
    assert writer.pending() == ([lost] if b"F32" in content else [])
    path.unlink()
    assert writer.pending() == [lost]


def test_a_shard_that_gets_too_little_does_not_appear(tmp_path):
    writer = ShardWriter(tmp_path, layout(TENSORS))
    with pytest.raises(ValueError, match=r"model\.safetensors: 60 bytes were written of"):
        with writer.open(writer.shards[0]) as stream:
            stream.write(TENSORS["layer.weight"])
    assert not list(tmp_path.iterdir())


def test_fingerprints_tell_checkpoints_apart(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        save_file({"w": torch.full((8,), value)}, tmp_path / f"{name}.safetensors")
    a, b, c = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in "abc")
    for full in (False, True):
        assert a.fingerprint(full) == b.fingerprint(full) != c.fingerprint(full)


# ---- faults: each is one line that names the file, and the tensor where one is at fault


def damaged(tmp_path, change):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(2, 2)}, path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    new = change(header, body)
    if not isinstance(new, bytes):
        text = json.dumps(new[0]).encode()
        new = struct.pack("<Q", len(text)) + text + new[1]
    path.write_bytes(new)
    return path


def moved(header, name, **fields):
    header[name] |= fields
    return header


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda h, b: (h, b[:-3]), r"tensor 'b' is cut: 3 bytes are missing"),
        (lambda h, b: (h, b + b"xx"), r"has 2 bytes after its last tensor"),
        (lambda h, b: struct.pack("<Q", 10**6) + b, r"its header claims 1,000,000 bytes and the file has 40"),
        (lambda h, b: struct.pack("<Q", 8) + b"nonsense" + b, r"its header is not JSON"),
        (lambda h, b: struct.pack("<Q", 2) + b"[]" + b, r"its header is not a JSON object"),
        (lambda h, b: b"\x01\x02", r"it has only 2 bytes"),
        (lambda h, b: b"", r"empty file"),
        (lambda h, b: (moved(h, "a", dtype="F4"), b), r"tensor 'a' is of type 'F4'"),
        (lambda h, b: (moved(h, "a", shape=[5]), b), r"tensor 'a' of 20 bytes is placed at 0 to 16"),
        (lambda h, b: (moved(h, "a", shape=[-4]), b), r"tensor 'a' has the shape \[-4\]"),
        (lambda h, b: (moved(h, "b", data_offsets=[8, 24]), b), r"tensor 'b' of 16 bytes is placed at 8"),
        (lambda h, b: ({"a": 3}, b), r"does not say where the tensors are"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, change, line):
    path = damaged(tmp_path, change)
    with pytest.raises(ValueError, match=line) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_indexes_that_lie(tmp_path):
    write(tmp_path, TENSORS, max_shard_bytes=40)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    good = dict(places["weight_map"])

    def expect(line, **changed):
        index.write_text(json.dumps({"weight_map": good | changed}))
        with pytest.raises(ValueError, match=line) as error:
            open_checkpoint(tmp_path)
        assert str(index) in str(error.value)

    expect("places tensor 'ghost' in gone.safetensors, which is missing", ghost="gone.safetensors")
    expect("places tensor 'ghost' in .*, which lacks it", ghost=good["scale"])
    expect("outside its folder", ghost="../model.safetensors")
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        open_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        open_checkpoint(tmp_path)


def test_shards_without_an_index(tmp_path):
    writer = write(tmp_path, TENSORS, max_shard_bytes=40)
    (tmp_path / "model.safetensors.index.json").unlink()
    with open_checkpoint(tmp_path) as checkpoint:
        same(checkpoint, TENSORS)
    (tmp_path / writer.shards[1].name).unlink()
    with pytest.raises(ValueError, match="lacks shard 2 of"):
        open_checkpoint(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has several models: name one of"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    for i in (1, 2):
        save_file({"w": torch.ones(1)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(ValueError, match="both hold tensor 'w'"):
        open_checkpoint(tmp_path)


def test_pickles_are_refused_with_how_to_convert(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path)
    for source in (tmp_path, path):
        with pytest.raises(ValueError, match=r"is a pickle.*save_pretrained"):
            open_checkpoint(source)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no such folder or file"):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(ValueError, match="nobody/nothing: no such folder here, and the hub does not give it"):
        open_checkpoint("nobody/nothing")


def test_a_file_cut_while_in_use(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, 500)
        with pytest.raises(ValueError, match="ends inside tensor 'w'"):
            checkpoint["w"]


def test_headers_keep_their_order(tmp_path):
    write(tmp_path, {"z": torch.ones(1), "a": torch.ones(1)})
    assert list(read_header(tmp_path / "model.safetensors")[0]) == ["z", "a"]
