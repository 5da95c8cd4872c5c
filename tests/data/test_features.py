from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unfused.data import audio
from unfused.data.features import read_features, read_images
from unfused.data.files import Quarantine
from unfused.data.images import IMAGE_EXTENSIONS, decode_image
from unfused.data.manifest import read_manifest
from unfused.data.tables import read_table
from unfused.nn.log_mel import FrontEnd, log_mel_many

FRONT_END = FrontEnd(n_mels=40, trim_db=40)


def test_a_bad_corpus_is_read_and_each_bad_file_named(
    bad_recordings: tuple[Path, dict[str, str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reasons = bad_recordings
    manifest = read_manifest(folder)
    quarantine = Quarantine()
    calls: list[tuple[int, int]] = []
    features, usable, seconds = read_features(
        manifest, FRONT_END, tmp_path / "cache", quarantine, progress=lambda *call: calls.append(call)
    )
    bad = {name for name, reason in reasons.items() if reason is not None}
    assert {path for path, _ in quarantine.rows} == bad
    assert all(str(reasons[path]) in reason for path, reason in quarantine.rows)
    assert [path for path, u in zip(manifest.paths, usable, strict=True) if u] == sorted(set(reasons) - bad)
    assert calls[-1] == (len(manifest), len(manifest))
    np.testing.assert_allclose(seconds, 0.3, atol=1e-4)
    for path, feature in zip(manifest.select(usable).paths, features, strict=True):
        (alone,) = log_mel_many([audio.decode(folder / path, 16000)], FRONT_END)
        assert np.array_equal(feature, alone) and np.isfinite(feature).all()

    quarantine.write(tmp_path / "quarantine.csv")
    assert [tuple(row) for row in read_table(tmp_path / "quarantine.csv").rows] == quarantine.rows

    monkeypatch.setattr(audio, "decode", lambda *_, **__: pytest.fail("decoded again"))
    again = Quarantine()
    second = read_features(manifest, FRONT_END, tmp_path / "cache", again)
    assert again.rows == quarantine.rows and np.array_equal(second.usable, usable)
    assert all(np.array_equal(a, b) for a, b in zip(second.features, features, strict=True))
    assert np.array_equal(second.seconds, seconds)


def test_what_is_cached_does_not_depend_on_windows_or_statistics(tmp_path: Path, make_tone) -> None:
    make_tone("a.wav", tmp_path / "corpus")
    manifest = read_manifest(tmp_path / "corpus")
    for front_end, files in [
        (FRONT_END, 1),
        (FrontEnd(n_mels=40, trim_db=40, frames=32, fit="stretch", mean=3.0, std=2.0), 1),
        (FrontEnd(n_mels=40, trim_db=30), 2),
        (FrontEnd(n_mels=32, trim_db=40), 3),
    ]:
        features = read_features(manifest, front_end, tmp_path / "cache", Quarantine()).features
        assert features[0].shape[0] == front_end.n_mels
        assert len(list((tmp_path / "cache").glob("*.data"))) == files


def test_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"")
    quarantine = Quarantine()
    features, usable, seconds = read_features(
        read_manifest(tmp_path), FRONT_END, tmp_path / "cache", quarantine
    )
    assert len(features) == len(seconds) == usable.sum() == 0 and len(quarantine) == 1


def test_a_second_run_is_much_faster(tmp_path: Path, make_tone) -> None:
    for k in range(300):
        make_tone(f"{k}.wav", tmp_path / "corpus", seconds=0.5, rate=22050, pitch=200 + k)
    time.sleep(0.06)
    manifest = read_manifest(tmp_path / "corpus")
    spent = []
    for _ in range(4):
        start = time.process_time()
        read_features(manifest, FRONT_END, tmp_path / "cache", Quarantine(), workers=1)
        spent.append(time.process_time() - start)
    assert spent[0] > 5 * min(spent[1:])  # the benchmark wants 10; a busy machine gets some slack here


def test_images(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for k, name in enumerate(("cat/a.png", "cat/b.jpg", "dog/c d.png")):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 255, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).save(corpus / name)
    (corpus / "dog" / "bad.png").write_bytes(b"no picture")
    (corpus / "dog" / "cut.jpg").write_bytes((corpus / "cat" / "b.jpg").read_bytes()[:1000])
    manifest = read_manifest(corpus, extensions=IMAGE_EXTENSIONS)
    for _ in range(2):
        quarantine = Quarantine()
        pixels, usable, seconds = read_images(manifest, 32, tmp_path / "cache", quarantine)
        assert usable.tolist() == [True, True, False, True, False]
        assert [path for path, _ in quarantine.rows] == ["dog/bad.png", "dog/cut.jpg"]
        assert not seconds.any()
        for path, item in zip(manifest.select(usable).paths, pixels, strict=True):
            assert item.dtype == np.uint8 and np.array_equal(item, decode_image(corpus / path, 32))
    assert read_images(manifest, 16, tmp_path / "cache", Quarantine()).features[0].shape == (3, 16, 16)
