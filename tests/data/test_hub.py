from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from unfused.data import hub
from unfused.data.features import read_features
from unfused.data.files import Quarantine
from unfused.data.manifest import read_manifest
from unfused.nn.log_mel import FrontEnd

datasets = pytest.importorskip("datasets")


def tone(pitch: float, how: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * np.sin(np.arange(4000) / 16000 * 6.28 * pitch), 16000, format=how)
    return buffer.getvalue()


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    outside = tmp_path / "outside.flac"
    outside.write_bytes(tone(700, "FLAC"))
    rows = {
        "audio": [
            {"bytes": tone(300), "path": "a.wav"},
            {"bytes": tone(400, "FLAC"), "path": None},
            {"bytes": None, "path": str(outside)},
            {"bytes": b"broken", "path": "b.mp3"},
            None,
        ],
        "label": [0, 1, 1, 0, -1],
        "speaker": ["ann", "bob", "ann", None, "eve"],
        "path": ["ignored"] * 5,
    }
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    plain = {"speaker": datasets.Value("string"), "path": datasets.Value("string")}
    features = datasets.Features({"audio": stored, "label": datasets.ClassLabel(names=["no", "yes"])} | plain)
    # Cast afterwards: an Audio column made from bytes asks for torchcodec.
    data = datasets.Dataset.from_dict(rows, features=features).cast_column("audio", datasets.Audio())
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "spoken words")
    return tmp_path / "spoken words"


def test_saved_recordings(spoken: Path, tmp_path: Path) -> None:
    manifest = read_manifest(spoken, group="speaker", export_to=tmp_path / "export")
    assert manifest.paths == [
        "train/000000.wav",
        "train/000001.flac",
        "train/000002.flac",
        "train/000003.mp3",
        "train/000004.bin",
        "test/000000.flac",
    ]
    assert manifest.labels == ["no", "yes", "yes", "no", None, "yes"]
    assert manifest.groups == ["ann", "bob", "ann", None, "eve", "bob"]
    assert manifest.split == ["train"] * 5 + ["test"]
    quarantine = Quarantine()
    read = read_features(manifest, FrontEnd(), tmp_path / "cache", quarantine)
    assert read.usable.tolist() == [True, True, True, False, False, True]
    assert [path for path, _ in quarantine.rows] == ["train/000003.mp3", "train/000004.bin"]


def test_export_happens_once_and_survives_an_interruption(spoken: Path, tmp_path: Path) -> None:
    path = hub.export(str(spoken), tmp_path / "export")
    first = path.parent / "train" / "000000.wav"
    time = first.stat().st_mtime_ns
    assert hub.export(str(spoken), tmp_path / "export") == path and first.stat().st_mtime_ns == time
    (path.parent / "export.json").unlink()
    first.write_bytes(b"half")
    hub.export(str(spoken), tmp_path / "export")
    assert first.read_bytes() == tone(300)


def test_saved_pictures_and_bare_arrays(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "PNG")
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": buffer.getvalue(), "path": None}], "category": ["red"]},
        features=datasets.Features({"image": datasets.Image(), "category": datasets.Value("string")}),
    )
    data.save_to_disk(tmp_path / "pictures")
    manifest = read_manifest(tmp_path / "pictures", export_to=tmp_path / "export")
    assert manifest.paths == ["all/000000.png"] and manifest.labels == ["red"]

    arrays = {"sound": [{"array": [0.0, 0.5, -0.5], "sampling_rate": 8000}], "label": ["x"]}
    datasets.Dataset.from_dict(arrays).save_to_disk(tmp_path / "arrays")
    manifest = read_manifest(tmp_path / "arrays", export_to=tmp_path / "export")
    samples, rate = soundfile.read(os.path.join(manifest.root, manifest.paths[0]))
    assert samples.tolist() == [0.0, 0.5, -0.5] and rate == 8000


def test_messages(spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is a data set: name a folder for its files with export_to"):
        read_manifest(spoken)
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(ValueError, match="has no Audio or Image column; its columns are text"):
        hub.export(str(tmp_path / "texts"), tmp_path / "export")
    (tmp_path / "texts" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded as a data set"):
        hub.export(str(tmp_path / "texts"), tmp_path / "export")

    def offline(name: str, split: str | None) -> None:
        raise ConnectionError(f"no network for {name}, {split}\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"is no folder here, and cannot .*: no network for owner/name, train\[:9\]$"
    ):
        read_manifest("owner/name:train[:9]", export_to=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'unfused\[hub\]'"):
        read_manifest(spoken, export_to=tmp_path)


def test_what_reads_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert hub.is_dataset("owner/name") and hub.is_dataset("owner/name-1.0:train+test[:10%]")
    for source in ("name", "here/name", "/owner/name", "a/b/c", "owner/na me", "../owner", "here"):
        assert not hub.is_dataset(source), source
