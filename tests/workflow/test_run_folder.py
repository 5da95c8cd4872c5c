"""A run folder: stages computed once, one user at a time, settings that repeat the run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import corpora
import numpy as np
import pytest

from unfused.workflow.run_folder import RunFolder, fingerprint
from unfused.workflow.settings import Settings


def counting(calls: list[str]):
    def compute(folder: Path) -> dict:
        calls.append(folder.name)
        np.save(folder / "x.npy", np.arange(3))
        return {"found": 3}

    return compute


# --- stages ----------------------------------------------------------------------------------------------


def test_a_stage_is_computed_once_for_each_dependence(tmp_path):
    calls: list[str] = []
    first = RunFolder(tmp_path).stage("cluster", {"k": 4}, counting(calls))
    assert (first.reused, first.info["found"], calls) == (False, 3, ["cluster"])
    assert first.info["seconds"] >= 0
    again = RunFolder(tmp_path).stage("cluster", {"k": 4}, counting(calls))
    assert (again.reused, again.info, calls) == (True, first.info, ["cluster"])
    other = RunFolder(tmp_path).stage("cluster", {"k": 5}, counting(calls))
    assert not other.reused and other.key != first.key and len(calls) == 2
    assert (
        not RunFolder(tmp_path).stage("cluster", {"k": 4}, counting(calls)).reused
    )  # the latest is kept, no other


def test_an_interrupted_stage_finds_its_files_and_a_stale_one_does_not(tmp_path):
    def interrupted(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path).stage("a/0", {"lr": 1}, interrupted)
    seen = {}

    def look(folder: Path) -> None:
        seen["files"] = sorted(path.name for path in folder.iterdir())

    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path).stage("a/0", {"lr": 1}, interrupted)
    RunFolder(tmp_path).stage("a/0", {"lr": 1}, look)
    assert seen["files"] == ["half.txt", "started.json"]
    RunFolder(tmp_path).stage("a/0", {"lr": 2}, look)
    assert seen["files"] == ["started.json"]


def test_stages_are_announced(tmp_path):
    said = []
    run = RunFolder(tmp_path, lambda name, reused: said.append((name, reused)))
    run.stage("a", 1, lambda folder: None)
    run.stage("a", 1, lambda folder: None)
    assert said == [("a", False), ("a", True)]
    assert [result.name for result in run.results] == ["a", "a"]


def test_fingerprints():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert len({fingerprint(x) for x in (None, [], {}, "", 0, os.fsdecode(b"\xff"))}) == 6


# --- answers ---------------------------------------------------------------------------------------------


def test_no_answers(tmp_path):
    assert RunFolder(tmp_path).collect_answers() == {}
    corpora.write_labels(tmp_path / "to_label.csv", [("a.wav", " "), ("b.wav", "")])
    assert RunFolder(tmp_path).collect_answers() == {}
    assert not (tmp_path / "labels.csv").exists()


def test_answers_are_kept_and_the_newest_counts(tmp_path):
    odd = os.fsdecode(b'new\nline, "\xff.wav')
    corpora.write_labels(tmp_path / "to_label.csv", [("a.wav", "x"), (odd, " y "), ("c.wav", "")])
    assert RunFolder(tmp_path).collect_answers() == {"a.wav": "x", odd: "y"}
    corpora.write_labels(tmp_path / "to_label.csv", [("a.wav", "z")])
    assert RunFolder(tmp_path).collect_answers() == {"a.wav": "z", odd: "y"}
    (tmp_path / "to_label.csv").unlink()
    assert RunFolder(tmp_path).collect_answers() == {"a.wav": "z", odd: "y"}


# --- a whole run -----------------------------------------------------------------------------------------


def test_the_same_command_twice(tones, adapt_tiny):
    labels = tones.parent / "labels.csv"
    run = adapt_tiny(tones, labels, seeds=2)
    stamps = corpora.computed(run.path)
    before = {
        name: (run.path / name).read_bytes() for name in ("metrics.json", "pseudo_labels.csv", "to_label.csv")
    }
    model = (run.path / "model" / "model.safetensors").read_bytes()
    again = adapt_tiny(tones, labels, seeds=2)
    assert corpora.computed(run.path) == stamps
    assert {name: (run.path / name).read_bytes() for name in before} == before
    assert (run.path / "model" / "model.safetensors").read_bytes() == model
    assert again.metrics == run.metrics


def test_the_config_repeats_the_run(tones, adapt_tiny, tmp_path):
    from unfused import adapt

    run = adapt_tiny(tones, tones.parent / "labels.csv", seed=3, labels_per_class=2, group=r"_(s\d)")
    stamps = corpora.computed(run.path)
    again = adapt(config=run.path / "config.yaml")
    assert again.path == run.path and corpora.computed(run.path) == stamps
    elsewhere = adapt(config=run.path / "config.yaml", output=tmp_path / "elsewhere")
    assert corpora.results(elsewhere.path) == corpora.results(run.path)
    for stage in ("unfused/0", "classic/0"):
        name = f"stages/{stage.replace('0', '3')}/probabilities.npy"
        assert (elsewhere.path / name).read_bytes() == (run.path / name).read_bytes()


def test_same_seed_same_metrics_to_the_last_digit(tones, adapt_tiny):
    labels = tones.parent / "labels.csv"
    methods = "unfused,unfused-literal,linear-probe,classic"
    first, second = (adapt_tiny(tones, labels, name=name, method=methods) for name in "ab")
    assert corpora.results(first.path) == corpora.results(second.path)
    assert (first.path / "to_label.csv").read_bytes() == (second.path / "to_label.csv").read_bytes()
    other = adapt_tiny(tones, labels, name="c", method="unfused", seed=1)
    weights = [(run.path / "model" / "model.safetensors").read_bytes() for run in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]


def test_only_what_depends_on_a_setting_is_computed_again(tones, adapt_tiny):
    labels = tones.parent / "labels.csv"
    run = adapt_tiny(tones, labels)
    stamps = corpora.computed(run.path)

    def changed(**options) -> set[str]:
        nonlocal stamps
        before, stamps = stamps, corpora.computed(adapt_tiny(tones, labels, **options).path)
        return {name for name in stamps if before.get(name) != stamps[name]}

    assert changed(clusters=5) == {"cluster"}
    assert changed(clusters=5, queue=3) == set()
    assert changed(clusters=5, fine_tune_steps=2) == {"unfused/0", "classic/0"}
    assert changed(clusters=5, fine_tune_steps=2, labels_per_class=1) == {"unfused/0", "classic/0"}
    assert changed(clusters=5, fine_tune_steps=2, labels_per_class=1, pretrain_steps=2) == {
        "pretrain",
        "cluster",
        "unfused/0",
    }
    everything = {"windows", "pretrain", "cluster", "unfused/0", "classic/0"}
    assert changed(clusters=5, fine_tune_steps=2, labels_per_class=1, pretrain_steps=2, width=5) == everything


def test_changed_file_is_read_again(tmp_path, adapt_tiny):
    folder = tmp_path / "recordings"
    corpora.write_tones(folder, 12)
    run = adapt_tiny(folder)
    stamps = corpora.computed(run.path)
    (folder / "00_s0.wav").write_bytes((folder / "01_s0.wav").read_bytes())
    adapt_tiny(folder)
    assert all(corpora.computed(run.path)[name] != stamp for name, stamp in stamps.items())


def test_another_source_is_refused(tones, tmp_path, adapt_tiny):
    corpora.write_tones(tmp_path / "recordings", 6)
    run = adapt_tiny(tones)
    config = (run.path / "config.yaml").read_bytes()
    with pytest.raises(
        ValueError, match=rf"name='recordings': .* already holds a run on {tones}; give another name"
    ):
        adapt_tiny(tmp_path / "recordings")
    assert (run.path / "config.yaml").read_bytes() == config
    assert adapt_tiny(tmp_path / "recordings", name="other").path.name == "other"


def test_the_same_source_by_another_spelling(tones, adapt_tiny, monkeypatch):
    run = adapt_tiny(tones)
    stamps = corpora.computed(run.path)
    monkeypatch.chdir(tones.parent)
    assert corpora.computed(adapt_tiny(f"./{tones.name}/").path) == stamps


def test_a_second_process_is_told_to_wait(tones, adapt_tiny):
    import fcntl

    run = adapt_tiny(tones)
    config = (run.path / "config.yaml").read_bytes()
    descriptor = os.open(run.path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(
            ValueError, match=r"name='recordings': another process is working in .*; wait for it"
        ):
            adapt_tiny(tones, queue=2)
    finally:
        os.close(descriptor)
    assert (run.path / "config.yaml").read_bytes() == config
    adapt_tiny(tones, queue=2)


# --- settings --------------------------------------------------------------------------------------------


def test_settings_survive_their_file(tmp_path):
    odd = os.fsdecode(b"rec \xff 'x': {y}\n.csv")
    settings = Settings(
        odd,
        labels="größe.csv",
        method=("classic", "unfused"),
        clusters="12",
        group=r"_(s\d)\.",
        test="a=b",
        seeds=2,
    )
    settings.write(tmp_path / "config.yaml")
    assert Settings.read(tmp_path / "config.yaml") == settings


def test_settings_as_people_write_them(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("source: x\nclusters: 12\ntest: 0.2\nmethod: classic, unfused\nseeds: null\n")
    settings = Settings.read(path)
    assert (settings.clusters, settings.test, settings.method, settings.seeds) == (
        "12",
        "0.2",
        ("classic", "unfused"),
        1,
    )
    assert settings == Settings("x", clusters=12, test=0.2, method=["classic", "unfused"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, message",
    [
        ("source: x\nlearning_rate: 1\n", "unknown settings .'learning_rate'.; there are"),
        ("labels: x\n", "has no `source`"),
        ("- a\n", "does not hold settings"),
        ("a: [1\n", "is not YAML"),
    ],
)
def test_settings_that_are_none(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Settings.read(tmp_path / "config.yaml")


def test_what_a_run_folder_holds(tones, adapt_tiny):
    run = adapt_tiny(tones, tones.parent / "labels.csv")
    names = sorted(path.name for path in run.path.iterdir())
    products = ["config.yaml", "metrics.json", "model", "pseudo_labels.csv", "quarantine.csv", "report.html"]
    assert names == [*products, "stages", "to_label.csv"]
    assert corpora.read_rows(run.path / "quarantine.csv") == []
    model = sorted(path.name for path in (run.path / "model").iterdir())
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(model)
    assert all(
        path.suffix in (".json", ".safetensors", ".npy") for path in (run.path / "stages").rglob("*.*")
    )
    assert json.loads((run.path / "model" / "config.json").read_text())["id2label"] == {
        "0": "high",
        "1": "low",
        "2": "mid",
    }
