"""What may go wrong with a run: kills, full disks, spoilt corpora. It ends well, or says in one line why not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import corpora
import killing
import numpy as np
import pytest
import soundfile

from unfused.data.files import DiskFull

METHODS = "unfused,unfused-literal,classic"
STAGES = (
    "read",
    "windows",
    "pretrain",
    "cluster",
    "distil",
    "unfused/0",
    "unfused-literal/0",
    "classic/0",
    "products",
)
IMPORTS = """torch._dynamo transformers.modelcard sklearn.manifold unfused.train.engine unfused.nn.audio_model
    unfused.workflow.adapt unfused.workflow.products unfused.workflow.unlabelled unfused.pretrain.contrastive
    unfused.pretrain.unfused unfused.finetune.classic unfused.finetune.fine_tune""".split()


def whole_run(source: str, folder: str) -> None:
    """A run with a checkpoint after each step, in `folder/runs`, its cache in `folder/cache`."""
    import torch

    from unfused import adapt
    from unfused.train.engine import Engine

    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # what a killed process has written, the system keeps
    Engine._save_is_due = lambda self, now, record: True  # type: ignore[method-assign]
    adapt(
        source,
        os.path.join(os.path.dirname(source), "labels.csv"),
        output=os.path.join(folder, "runs"),
        cache=os.path.join(folder, "cache"),
        **corpora.TINY | {"method": METHODS},
    )


def place_of(path: str, folder: str) -> str:
    """The stage that a file below `folder` is written in."""
    run = Path(folder, "runs", "recordings")
    for stage in STAGES:
        if path.startswith(f"{run / 'stages' / stage}{os.sep}"):
            return stage
    return "products" if (run / "stages" / STAGES[-2] / "done.json").exists() else "read"


def dying_in(stage: str, change: int, source: str, folder: str) -> None:
    """`whole_run`, dead at the `change`-th change of a file that `stage` makes."""
    left = change

    def changed(path: str) -> None:
        nonlocal left
        if place_of(path, folder) == stage:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), 9)

    killing.watch_changes(folder, changed)
    whole_run(source, folder)


def counted(source: str, folder: str, report: str) -> None:
    counts = dict.fromkeys(STAGES, 0)

    def changed(path: str) -> None:
        counts[place_of(path, folder)] += 1

    killing.watch_changes(folder, changed)
    whole_run(source, folder)
    Path(report).write_text(json.dumps(counts))


def outcome(folder: Path) -> dict[str, Any]:
    """All that must come out the same, killed or not."""
    run = folder / "runs" / "recordings"
    kept = (
        "model.safetensors",
        "encoder.safetensors",
        "head.safetensors",
        "pseudo_labels.csv",
        "to_label.csv",
    )
    files = sorted(path for path in run.rglob("*") if path.name in kept or path.suffix == ".npy")
    return {
        **{path.relative_to(run).as_posix(): path.read_bytes() for path in files},
        "metrics": corpora.results(run),
        "leftovers": [
            p.name for p in folder.rglob("*") if p.name.startswith((".tmp-", ".writing-", ".model"))
        ],
    }


@pytest.fixture(scope="module")
def forks() -> killing.Forks:
    return killing.Forks(IMPORTS)


@pytest.fixture(scope="module")
def reference(tones, forks, tmp_path_factory) -> tuple[dict[str, Any], dict[str, int]]:
    """An uninterrupted run: its outcome, and how many changes of files each stage makes."""
    folder = tmp_path_factory.mktemp("reference")
    forks.run(counted, str(tones), str(folder), str(folder / "counts.json"), timeout=600)
    counts = json.loads((folder / "counts.json").read_text())
    (folder / "counts.json").unlink()
    return outcome(folder), counts


def test_every_stage_changes_files(reference):
    assert all(count >= 3 for count in reference[1].values()), reference[1]
    assert reference[0]["leftovers"] == []


def test_killed_in_every_stage(tones, forks, reference, tmp_path):
    """Dead at changes of files: two in each stage, of the products four more. 22 kills of one run."""
    expected, counts = reference
    generator, deaths = random.Random(0), 0
    for stage in STAGES:
        # a stage that is taken up again has fewer changes to make, but never less than to write its `done.json`
        changes = [generator.randint(1, max(1, counts[stage] // 2)), generator.randint(1, 2)]
        if stage == "products":  # all written each time
            changes = sorted(generator.sample(range(1, counts[stage] + 1), 6))
        for change in changes:
            deaths += forks.died(dying_in, stage, change, str(tones), str(tmp_path), timeout=600)
    forks.run(whole_run, str(tones), str(tmp_path), timeout=600)
    assert deaths == 22
    assert outcome(tmp_path) == expected


def test_killed_at_random_moments(tones, forks, reference, tmp_path):
    """A random moment after the start of each stage."""
    expected, _ = reference
    generator, hits = random.Random(1), 0
    for stage in STAGES[1:-1]:
        started = tmp_path / "runs" / "recordings" / "stages" / stage / "started.json"
        delay = generator.uniform(0, 0.15)
        hits += forks.kill(
            whole_run, str(tones), str(tmp_path), delay=delay, ready=started.exists, timeout=600
        )
    forks.run(whole_run, str(tones), str(tmp_path), timeout=600)
    assert hits >= 4  # a fast machine may be through before the last ones
    assert outcome(tmp_path) == expected


def test_answers_are_never_lost_to_a_kill(tones, tmp_path):
    """Killed anywhere between reading the answers and the new queue: they are in one file or the other."""
    from unfused.workflow.run_folder import RunFolder

    corpora.write_labels(tmp_path / "to_label.csv", [("a.wav", "x"), ("b.wav", "y")])
    replace, calls = os.replace, []

    class Killed(BaseException):
        pass

    for step in range(4):
        with pytest.MonkeyPatch.context() as patch:

            def dying(*args: Any, step: int = step, **kwargs: Any) -> None:
                calls.append(step)
                if step % 2 == 0:
                    raise Killed
                replace(*args, **kwargs)
                raise Killed

            patch.setattr(os, "replace", dying)
            with pytest.raises(Killed):
                RunFolder(tmp_path).collect_answers()
        assert RunFolder(tmp_path).collect_answers() == {"a.wav": "x", "b.wav": "y"}
        (tmp_path / "labels.csv").unlink()
    assert calls == [0, 1, 2, 3]


# --- full disk -------------------------------------------------------------------------------------------


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, stage: str, change: int) -> Iterator[None]:
    """The disk is full from the `change`-th opening of a file for writing in `stage` on."""
    import builtins
    import io

    left, true_open = change, io.open

    def failing(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if isinstance(file, str | os.PathLike) and set(mode) & set("wxa+"):
            if (
                os.fspath(file).startswith(f"{folder}{os.sep}")
                and place_of(os.fspath(file), str(folder)) == stage
            ):
                left -= 1
                if left <= 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(file))
        return true_open(file, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", failing)
        patch.setattr(io, "open", failing)
        yield


def test_disk_full_in_every_stage(tones, reference, tmp_path, monkeypatch):
    """17 full disks in one run: each is one clear line, and in the end the outcome is the same."""
    faults = 0
    for stage in STAGES:
        for change in (1,) if stage == "read" else (1, 2, 3) if stage == "products" else (1, 2):
            with full_disk(monkeypatch, tmp_path, stage, change):
                try:
                    whole_run(str(tones), str(tmp_path))
                except DiskFull as error:
                    faults += 1
                    assert str(error).startswith(f"no space left on {tmp_path}")
                    assert str(error).endswith("free some and run the same command again")
    assert faults >= 14
    whole_run(str(tones), str(tmp_path))
    assert outcome(tmp_path) == reference[0]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 48 MiB, where this process may mount one."""
    import subprocess

    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if sys.platform != "linux" or not mount or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(tones, reference, small_disk, forks):
    """Room for a little more each time; a memory-mapped array that outgrows the disk would kill the process."""
    faults = 0
    for free in (4_000, 60_000, 150_000, 250_000, 400_000, 1_500_000):
        stats = os.statvfs(small_disk)
        with open(small_disk / "ballast", "wb") as file:
            file.write(bytes(max(0, stats.f_bavail * stats.f_frsize - free)))
        try:
            forks.run(whole_run_on_a_full_disk, str(tones), str(small_disk), timeout=600)
            faults += 1
        finally:
            (small_disk / "ballast").unlink()
    forks.run(whole_run, str(tones), str(small_disk), timeout=600)
    assert outcome(small_disk) == reference[0]


def whole_run_on_a_full_disk(source: str, folder: str) -> None:
    try:
        whole_run(source, folder)
    except DiskFull as error:
        assert "free some and run the same command again" in str(error)
    else:
        raise AssertionError("the disk was not full")


# --- spoilt corpora --------------------------------------------------------------------------------------


def spoilt_corpus(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Bad files with a part of the reason for each, and good ones that are odd."""
    rows = corpora.write_tones(folder, 12)
    good = (folder / rows[0][0]).read_bytes()
    wave = corpora.tone(1, 1)

    def write(name: str, samples: np.ndarray, rate: int = corpora.RATE, **how: str) -> None:
        with open(folder / name, "wb") as file:
            soundfile.write(file, samples, rate, **{"format": "WAV"} | how)

    spoilt = np.where(np.arange(len(wave)) == 99, np.nan, wave)
    bad = {
        "zero bytes.wav": "empty file",
        "truncated.wav": "truncated",
        "text.wav": "not audio: text",
        "picture.mp3": "not audio: a PNG picture",
        "nan.wav": "NaN or infinite samples",
        "inf.wav": "NaN or infinite samples",
        "silence.wav": "silent",
        "one sample.wav": "too short: 1 sample",
        "dangling.wav": "a dangling link",
        "circle.wav": "a symbolic link that leads in a circle",
        "pipe.wav": "not a regular file",
        "phone.m4a": "convert it to WAV",
    }
    (folder / "zero bytes.wav").touch()
    (folder / "truncated.wav").write_bytes(good[: len(good) // 2])
    (folder / "text.wav").write_text("path,label\n" * 20)
    (folder / "picture.mp3").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    write("nan.wav", spoilt, subtype="FLOAT")
    write("inf.wav", np.where(np.isnan(spoilt), np.inf, wave), subtype="FLOAT")
    write("silence.wav", np.zeros(4000))
    write("one sample.wav", np.array([0.5]))
    (folder / "dangling.wav").symlink_to("nowhere.wav")
    (folder / "circle.wav").symlink_to("circle.wav")
    os.mkfifo(folder / "pipe.wav")
    (folder / "phone.m4a").write_bytes(b"\x00\x00\x00\x20ftypM4A \x00\x00\x00\x00" + bytes(500))
    if os.geteuid() != 0:  # nothing is forbidden to root
        (folder / "secret.wav").write_bytes(good)
        (folder / "secret.wav").chmod(0)
        bad["secret.wav"] = "permission denied"
    odd = [
        "8 channels.wav",
        "192 kHz.wav",
        "really flac.wav",
        "with 'quotes', \"commas\" & more.wav",
        "new\nline.wav",
        "größe 音.wav",
        os.fsdecode(b"latin1 \xe9\xff.wav"),
        "-rf.wav",
        "=cmd().wav",
        "<script>alert('x')<" + chr(0x2215) + "script>.wav",
        "<img src=x onerror=alert(1)>.wav",
    ]
    write(odd[0], np.repeat(wave[:, None], 8, 1))
    write(odd[1], corpora.tone(2, 0, rate=192000), 192000)
    write(odd[2], wave, format="FLAC")
    for number, name in enumerate(odd[3:]):
        write(name, corpora.tone(number % 3, 2, seed=50 + number))
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to(folder)
    write("sub/inside.wav", corpora.tone(0, 1, seed=70))
    return bad, [*odd, "sub/inside.wav"]


def test_spoilt_corpus(tmp_path, adapt_tiny):
    folder = tmp_path / "spoilt"
    bad, odd = spoilt_corpus(folder)
    good = [f"{k:02d}_s{k // 3 % 3}.wav" for k in range(12)] + odd
    labels = [(name, corpora.CLASSES[k % 3]) for k, name in enumerate(good)]
    labels.append(("nan.wav", "low"))  # a label for a file that turns out to be bad is no mistake
    run = adapt_tiny(folder, corpora.write_labels(tmp_path / "labels.csv", labels), group=r"^(.)")
    quarantined = {row["path"]: row["reason"] for row in corpora.read_rows(run.path / "quarantine.csv")}
    assert set(quarantined) == set(bad)
    for name, reason in bad.items():
        assert reason in quarantined[name], name
    rows = corpora.read_rows(run.path / "pseudo_labels.csv")
    assert [row["path"] for row in rows] == sorted(good)
    assert {row["path"]: row["label"] for row in rows} == dict(labels[:-1])
    data = run.metrics["data"]
    assert (data["files"], data["usable"], data["quarantined"]) == (len(good) + len(bad), len(good), len(bad))
    page = (run.path / "report.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(" in page or "\\u003cscript" in page
    assert run.model.predict([folder / name for name in odd])
    assert adapt_tiny(folder, tmp_path / "labels.csv", group=r"^(.)").metrics == run.metrics


def test_spoilt_corpus_without_labels(tmp_path, adapt_tiny):
    folder = tmp_path / "spoilt"
    bad, odd = spoilt_corpus(folder)
    run = adapt_tiny(folder)
    queue = corpora.read_rows(run.path / "to_label.csv")
    assert {row["path"] for row in queue} >= set(odd) and not {row["path"] for row in queue} & set(bad)
    corpora.fill_in(run.path / "to_label.csv", {name: "ab"[k % 2] for k, name in enumerate(odd)})
    again = adapt_tiny(folder)
    assert again.metrics["data"]["labelled"] == len(odd)
    assert {row["path"] for row in corpora.read_rows(run.path / "labels.csv")} == set(odd)


def test_odd_labels(tones, tmp_path, adapt_tiny):
    names = ["<script>alert(1)</script>", "größe 音", 'a "b", c', os.fsdecode(b"\xe9"), "0", "None"]
    rows = [(path.name, names[k % len(names)]) for k, path in enumerate(sorted(tones.iterdir()))]
    run = adapt_tiny(tones, corpora.write_labels(tmp_path / "labels.csv", rows))
    assert run.model.classes == sorted(names)
    assert "<script>alert(1)" not in (run.path / "report.html").read_text()
    assert json.loads((run.path / "metrics.json").read_text())["data"]["classes"] == sorted(names)


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_no_usable_file(tmp_path, adapt_tiny, content):
    folder = tmp_path / "bad"
    folder.mkdir()
    for k in range(3):
        (folder / f"{k}.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"no usable file: 3 set aside, reasons in .*quarantine\.csv"):
        adapt_tiny(folder)
    assert len(corpora.read_rows(tmp_path / "runs" / "bad" / "quarantine.csv")) == 3


def test_spoilt_pictures(tmp_path, adapt_tiny):
    folder = tmp_path / "pictures"
    rows = corpora.write_pictures(folder, 12)
    good = (folder / rows[0][0]).read_bytes()
    (folder / "red" / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "red" / "text.jpg").write_text("hello")
    (folder / "blue" / "empty.png").touch()
    (folder / "blue" / "sound.wav").write_bytes(b"RIFF")
    os.mkfifo(folder / "blue" / "pipe.png")
    (folder / "blue" / "really png.jpg").write_bytes(good)
    run = adapt_tiny(folder)
    quarantined = {row["path"]: row["reason"] for row in corpora.read_rows(run.path / "quarantine.csv")}
    assert set(quarantined) == {
        "red/cut.png",
        "red/text.jpg",
        "blue/empty.png",
        "blue/pipe.png",
        "blue/sound.wav",
    }
    assert quarantined["blue/sound.wav"] == "not image: most files of this folder are; see modality"
    assert run.metrics["data"]["usable"] == 13


def test_ten_thousand_names_in_one_folder(tmp_path, adapt_tiny):
    """All but twelve are empty: the run is about these, and names the others."""
    folder = tmp_path / "many"
    corpora.write_tones(folder, 12)
    for k in range(10_000):
        (folder / f"empty {k:05d}.wav").touch()
    run = adapt_tiny(folder)
    assert len(corpora.read_rows(run.path / "quarantine.csv")) == 10_000
    assert run.metrics["data"]["usable"] == 12


def test_a_file_that_vanishes_while_it_runs(tmp_path, adapt_tiny, monkeypatch):
    """What was read is in the cache; the report does without its sound."""
    from unfused.workflow import unlabelled

    folder = tmp_path / "recordings"
    corpora.write_tones(folder, 12)
    pretrain = unlabelled.pretrain

    def vanish(*args: Any) -> Any:
        (folder / "00_s0.wav").unlink()
        return pretrain(*args)

    monkeypatch.setattr(unlabelled, "pretrain", vanish)
    run = adapt_tiny(folder)
    assert "00_s0.wav" in (run.path / "pseudo_labels.csv").read_text()
    assert "00_s0.wav" in (run.path / "report.html").read_text()
