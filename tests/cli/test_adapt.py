"""`unfused adapt` and `unfused predict` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import corpora
import pytest

TINY = corpora.TINY_WORDS


@pytest.fixture
def tones(tmp_path) -> Path:
    folder = tmp_path / "recordings"
    corpora.write_labels(tmp_path / "labels.csv", corpora.write_tones(folder))
    return folder


def test_labels_class_by_class_then_predict(unfused, tones, tmp_path):
    code, out, err = unfused("adapt", "recordings", "--labels", "labels.csv", *TINY, "--labels-per-class", 2)
    assert (code, out) == (0, "runs/recordings\n")
    for said in ("recordings 24", "unfused", "classic", "report.html", "pretrain: done"):
        assert said in err, err
    assert "Traceback" not in err and "shards" not in err
    metrics = json.loads((tmp_path / "runs/recordings/metrics.json").read_text())
    assert set(metrics["methods"]) == {"unfused", "classic"} and metrics["data"]["labels_used"] == 6

    code, out, err = unfused("adapt", "--config", "runs/recordings/config.yaml")
    assert (code, out) == (0, "runs/recordings\n")
    assert "pretrain: done before, reused" in err
    assert json.loads((tmp_path / "runs/recordings/metrics.json").read_text()) == metrics

    (tmp_path / "text.wav").write_text("hello")
    files = [tones / "00_s0.wav", tmp_path / "text.wav", tones / "01_s0.wav"]
    code, out, err = unfused("predict", "runs/recordings/model", *files, "--csv", "out.csv")
    assert (code, out) == (0, "")
    assert err == f"unfused: {tmp_path / 'text.wav'}: not audio: text\n"
    rows = corpora.read_rows(tmp_path / "out.csv")
    assert list(rows[0]) == ["path", "label", "confidence", "high", "low", "mid"]
    assert [row["path"] for row in rows] == [str(file) for file in files]
    assert rows[1]["label"] == rows[1]["high"] == ""
    for row in (rows[0], rows[2]):
        shares = {name: float(row[name]) for name in corpora.CLASSES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert row["label"] == max(shares, key=shares.__getitem__)
        assert float(row["confidence"]) == pytest.approx(max(shares.values()), abs=1e-4)

    code, out, err = unfused("predict", "runs/recordings", tones / "00_s0.wav")
    assert (code, err) == (0, "")
    assert out.split("\t")[:2] == [str(tones / "00_s0.wav"), rows[0]["label"]]
    code, out, err = unfused("predict", "runs/recordings", tmp_path / "text.wav")
    assert (code, out) == (1, "") and "not audio: text" in err


def test_no_labels_then_the_column_is_filled_in(unfused, tones, tmp_path):
    command = ("adapt", "recordings", *TINY, "--queue", 6)
    code, out, err = unfused(*command)
    assert (code, out) == (0, "runs/recordings\n")
    assert "to_label.csv" in err and "distil: done" in err
    queue = corpora.read_rows(tmp_path / "runs/recordings/to_label.csv")
    assert len(queue) == 6
    code, _, err = unfused("predict", "runs/recordings", tones / "00_s0.wav")
    assert code == 2 and err.startswith("unfused: ") and err.count("\n") == 1
    truth = {row["path"]: row["label"] for row in corpora.read_rows(tmp_path / "labels.csv")}
    corpora.fill_in(tmp_path / "runs/recordings/to_label.csv", truth)
    code, out, err = unfused(*command)
    assert code == 0
    for stage in ("windows", "pretrain", "cluster"):
        assert f"{stage}: done before, reused" in err
    assert (tmp_path / "runs/recordings/model/model.safetensors").exists()


def test_quiet(unfused, tones):
    assert unfused("adapt", "recordings", *TINY, "--quiet", "--threads", 1) == (0, "runs/recordings\n", "")


def test_every_option_arrives(unfused, tones, tmp_path):
    words = (
        "--labels labels.csv --name one --output out --modality audio --method classic,linear-probe --teacher random "
        "--literal --group _(s\\d) --test s=s1 --labels-per-class 2 --inductive --seed 3 --seeds 2 --queue 4 --quiet"
    )
    code, out, err = unfused("adapt", "recordings", *TINY, *words.split(), "--cache", tmp_path / "cache")
    assert (code, out) == (0, "out/one\n"), err
    import yaml

    config = yaml.safe_load((tmp_path / "out/one/config.yaml").read_text())
    assert config == {
        "source": "recordings",
        "labels": "labels.csv",
        "name": "one",
        "output": "out",
        "modality": "audio",
        "method": ["classic", "linear-probe"],
        "teacher": "random",
        "clusters": "4",
        "propagate": False,
        "group": "_(s\\d)",
        "test": "s=s1",
        "labels_per_class": 2,
        "inductive": True,
        "seed": 3,
        "seeds": 2,
        "width": 4,
        "pretrain_steps": 3,
        "distil_steps": 3,
        "fine_tune_steps": 3,
        "queue": 4,
    }
    assert (tmp_path / "cache" / "features").is_dir()
    metrics = json.loads((tmp_path / "out/one/metrics.json").read_text())
    assert len(metrics["methods"]["classic"]["accuracy"]["seeds"]) == 2
    assert metrics["data"]["protocol"] == "inductive"


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "there is no such folder or manifest"),
        (["recordings", "--method", "svm"], "method='svm' is not known"),
        (["recordings", "--labels", "gone.csv"], "'gone.csv' cannot be read"),
        (["recordings", "--labels", "columns.csv"], "has no column 'label'"),
        (["recordings", "--labels", "one.csv"], "all 2 labels are 'a'"),
        (["recordings", "--labels", "single.csv"], "there is a single label, 'a'"),
        (["recordings", "--labels", "missing.csv"], "1 of its 2 rows name no file"),
        (["twice.csv"], "lists 'recordings/00_s0.wav' twice"),
        (["recordings", "--group", "("], "no regular expression"),
        (["recordings", "--threads", "0"], "threads=0"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["recordings", "--teacher", "./nowhere"], "there is no such folder"),
        (["recordings", "--name", "a/b"], "name='a/b'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(unfused, tones, tmp_path, words, message):
    corpora.write_labels(tmp_path / "columns.csv", [("a", "b")], ("name", "answer"))
    corpora.write_labels(tmp_path / "one.csv", [("00_s0.wav", "a"), ("01_s0.wav", "a")])
    corpora.write_labels(tmp_path / "single.csv", [("00_s0.wav", "a")])
    corpora.write_labels(tmp_path / "missing.csv", [("00_s0.wav", "a"), ("gone.wav", "b")])
    corpora.write_labels(
        tmp_path / "twice.csv", [("recordings/00_s0.wav", "a"), ("recordings/00_s0.wav", "b")]
    )
    code, out, err = unfused("adapt", *words, *TINY, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("unfused: ") and err.count("\n") == 1 and message in err


def test_a_full_disk_is_one_line_and_exit_code_2(unfused, tones, monkeypatch):
    import errno

    from unfused.workflow import unlabelled

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(unlabelled, "write_windows", full)
        code, out, err = unfused("adapt", "recordings", *TINY, "--quiet")
    assert (code, out) == (2, "")
    assert err == "unfused: no space left on runs/recordings: free some and run the same command again\n"
    assert unfused("adapt", "recordings", *TINY, "--quiet")[0] == 0


def test_warnings_are_one_line_too(unfused, tones):
    code, _, err = unfused(
        "adapt",
        "recordings",
        "--labels",
        "labels.csv",
        *TINY,
        "--group",
        r"\.(wav)",
        "--method",
        "classic",
        "-q",
    )
    assert code == 0
    assert err.startswith("unfused: nothing is held out") and err.count("\n") == 1


def test_an_error_of_ours_is_not_hidden(unfused, tones, monkeypatch):
    from unfused.workflow import unlabelled

    def broken(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(unlabelled, "write_windows", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        unfused("adapt", "recordings", *TINY, "-q")


def test_predict_needs_a_model(unfused, tones, tmp_path):
    code, out, err = unfused("predict", tmp_path, tones / "00_s0.wav")
    assert (code, out) == (2, "") and "holds no config.json" in err and err.count("\n") == 1


def test_help_names_the_options(unfused):
    code, out, _ = unfused("adapt", "--help")
    assert code == 0
    for option in (
        "--labels",
        "--method",
        "--teacher",
        "--clusters",
        "--propagate",
        "--literal",
        "--group",
        "--test",
        "--seeds",
    ):
        assert option in out
