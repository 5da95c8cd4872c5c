"""`unfused.adapt` from a source in every form to metrics, tables and a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import corpora
import numpy as np
import pytest

from unfused.workflow.settings import METHODS, TEACHERS

SPEAKER = r"_(s\d)"
SEVERAL = "unfused,unfused-literal,linear-probe,classic"
CHEAP = dict(method="classic", teacher="random")


def fresh(folder: Path, rows: list[tuple[str, str]]) -> Path:
    return corpora.write_labels(folder / "labels.csv", rows)


# --- no labels, then some --------------------------------------------------------------------------------


def test_without_labels_it_stops_after_distilling(tones, adapt_tiny):
    run = adapt_tiny(tones)
    assert run.metrics["methods"] == {}
    assert list(run.metrics["stages"]) == ["windows", "pretrain", "cluster", "distil"]
    assert not (run.path / "model").exists()
    with pytest.raises(ValueError, match=r"no model yet: it had no labels. Fill in .*to_label\.csv"):
        _ = run.model
    queue = corpora.read_rows(run.path / "to_label.csv")
    assert list(queue[0]) == ["path", "label", "cluster", "reason"]
    assert sorted(row["path"] for row in queue) == sorted(path.name for path in tones.iterdir())
    reasons = [row["reason"].split()[0] for row in queue]
    assert reasons == ["middle"] * 4 + ["uncertain"] * 20
    assert {row["cluster"] for row in queue[:4]} == {"0", "1", "2", "3"}
    assert [row["path"] for row in run.to_label] == [row["path"] for row in queue]
    assert [row["rank"] for row in run.to_label] == list(range(1, 25))


def test_filled_in_column_goes_on_and_asks_for_others(tones, adapt_tiny):
    run = adapt_tiny(tones, queue=8)
    stamps = corpora.computed(run.path)
    assert set(stamps) == {"windows", "pretrain", "cluster", "distil"}
    truth = dict(corpora.write_tones(tones.parent / "again"))
    asked = [row["path"] for row in run.to_label]
    assert len(asked) == 8
    corpora.fill_in(run.path / "to_label.csv", {path: truth[path] for path in asked})
    second = adapt_tiny(tones, queue=8)
    assert {name: corpora.computed(run.path)[name] for name in stamps} == stamps
    assert set(second.metrics["methods"]) == {"unfused", "classic"}
    assert second.metrics["data"]["labels_used"] == 8
    assert {row["path"]: row["label"] for row in corpora.read_rows(run.path / "labels.csv")} == {
        path: truth[path] for path in asked
    }
    queue = corpora.read_rows(run.path / "to_label.csv")
    assert len(queue) == 8 and not {row["path"] for row in queue} & set(asked)
    assert all(row["label"] == "" for row in queue)
    assert second.model.predict([tones / asked[0]])[0] in corpora.CLASSES


def test_answers_survive_every_spelling_and_a_second_round(tones, adapt_tiny):
    """A spreadsheet may write semicolons, a byte-order mark and UTF-16; corrections win over earlier answers."""
    run = adapt_tiny(tones)
    asked = [row["path"] for row in run.to_label]
    file = run.path / "to_label.csv"
    file.write_text(
        "Path;Label;cluster;reason\n" + "".join(f"{p};{'ab'[i % 2]};0;x\n" for i, p in enumerate(asked[:6])),
        encoding="utf-16",
    )
    assert adapt_tiny(tones).metrics["data"]["labels_used"] == 6
    corpora.fill_in(file, {asked[6]: " b ", asked[7]: ""})
    corpora.write_labels(run.path / "labels.csv", [(p, "ba"[i % 2]) for i, p in enumerate(asked[:6])])
    third = adapt_tiny(tones)
    assert third.metrics["data"]["labels_used"] == 7
    labels = {row["path"]: row["label"] for row in corpora.read_rows(run.path / "labels.csv")}
    assert labels == {**{p: "ba"[i % 2] for i, p in enumerate(asked[:6])}, asked[6]: "b"}


def test_answers_typed_while_it_runs_are_kept(tones, adapt_tiny, monkeypatch):
    from unfused.workflow import arms

    run = adapt_tiny(tones)
    first, second, third, *_ = (row["path"] for row in run.to_label)
    corpora.fill_in(run.path / "to_label.csv", {first: "a", second: "b"})
    classic = arms.classic

    def typing(*args):
        corpora.fill_in(run.path / "to_label.csv", {third: "a"})
        return classic(*args)

    monkeypatch.setattr(arms, "classic", typing)
    adapt_tiny(tones)
    assert {row["path"]: row["label"] for row in corpora.read_rows(run.path / "labels.csv")} == {
        first: "a",
        second: "b",
        third: "a",
    }
    queue = {row["path"]: row["label"] for row in corpora.read_rows(run.path / "to_label.csv")}
    assert queue[third] == "a" and first not in queue
    assert adapt_tiny(tones).metrics["data"]["labels_used"] == 3


def test_broken_answers_are_not_overwritten(tones, adapt_tiny):
    run = adapt_tiny(tones)
    text = "name,answer\n00_s0.wav,a\n"
    (run.path / "to_label.csv").write_text(text)
    with pytest.raises(
        ValueError, match=r"to_label\.csv' has no column 'path'.* its columns are 'name', 'answer'"
    ):
        adapt_tiny(tones)
    assert (run.path / "to_label.csv").read_text() == text


def test_answers_for_files_that_are_gone(tmp_path, adapt_tiny):
    folder = tmp_path / "recordings"
    corpora.write_tones(folder)
    run = adapt_tiny(folder)
    first, second, third, *_ = (row["path"] for row in run.to_label)
    corpora.fill_in(run.path / "to_label.csv", {first: "a", second: "b", third: "a"})
    (folder / third).unlink()
    with pytest.warns(
        UserWarning, match=f"1 labelled files of .*labels.csv are gone or set aside, first {third}"
    ):
        second_run = adapt_tiny(folder)
    assert second_run.metrics["data"]["labels_used"] == 2
    assert len(corpora.read_rows(run.path / "labels.csv")) == 3


# --- sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "class folders", "csv", "jsonl", "pictures"])
def test_every_form_of_source(tmp_path, adapt_tiny, form):
    folder, options = tmp_path / "corpus", {}
    rows = (
        corpora.write_pictures(folder)
        if form == "pictures"
        else corpora.write_tones(folder, class_folders=form == "class folders")
    )
    source: Path = folder
    if form == "folder":
        options["labels"] = fresh(tmp_path, rows[:20])
    elif form == "csv":
        rows[3] = (rows[3][0], "")
        source = corpora.write_labels(folder / "list.csv", rows, ("file", "category"))
    elif form == "jsonl":
        source = folder / "list.jsonl"
        source.write_text("".join(json.dumps({"audio": path, "label": label}) + "\n" for path, label in rows))
    run = adapt_tiny(source, **options)
    labelled = {"folder": 20, "csv": 23, "pictures": 16}.get(form, 24)
    data = run.metrics["data"]
    assert (data["usable"], data["labelled"]) == (len(rows), labelled)
    assert data["modality"] == ("image" if form == "pictures" else "audio")
    assert data["classes"] == (["blue", "red"] if form == "pictures" else list(corpora.CLASSES))
    assert run.path.name == ("list" if form in ("csv", "jsonl") else "corpus")
    assert run.metrics["methods"]["classic"]["accuracy"]["mean"] == 1.0
    assert set(run.model.predict([folder / rows[0][0], folder / rows[1][0]])) <= set(data["classes"])
    pseudo = corpora.read_rows(run.path / "pseudo_labels.csv")
    assert [row["path"] for row in pseudo] == (
        [path for path, _ in rows] if form in ("csv", "jsonl") else sorted(path for path, _ in rows)
    )
    assert all(row["predicted"] in data["classes"] and 0 < float(row["confidence"]) <= 1 for row in pseudo)


def test_saved_data_set(tmp_path, tones, adapt_tiny):
    datasets = pytest.importorskip("datasets")
    names = sorted(tones.iterdir())
    table = {
        "audio": [{"array": corpora.tone(k % 3, 0, seed=k), "sampling_rate": 8000} for k in range(12)],
        "label": [k % 3 for k in range(12)],
    }
    features = datasets.Features(
        audio={
            "array": datasets.Sequence(datasets.Value("float32")),
            "sampling_rate": datasets.Value("int64"),
        },
        label=datasets.ClassLabel(names=["low", "mid", "high"]),
    )
    assert names
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "saved")
    run = adapt_tiny(tmp_path / "saved", method="classic")
    assert run.metrics["data"]["classes"] == ["high", "low", "mid"]
    assert run.metrics["data"]["labelled"] == 12


def test_without_a_source_it_is_the_sample(adapt_tiny):
    run = adapt_tiny(method="classic", teacher="random")
    data = run.metrics["data"]
    assert (run.path.name, data["usable"], data["groups"], len(data["classes"])) == ("sample", 720, 36, 10)
    assert data["labels_used"] == 50 and 100 < data["held_out"] < 200
    assert run.metrics["methods"]["classic"]["accuracy"]["mean"] > 0.2


# --- metrics ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tones, tmp_path_factory):
    """All methods, two draws of two labels a class, sources never divided."""
    from unfused import adapt

    return adapt(
        tones,
        tones.parent / "labels.csv",
        output=tmp_path_factory.mktemp("compared"),
        **corpora.TINY | dict(method=METHODS, labels_per_class=2, seeds=2, group=SPEAKER, test="s=s1"),
    )


def test_schema_of_metrics(compared):
    metrics = json.loads((compared.path / "metrics.json").read_text())
    assert metrics == compared.metrics
    assert {"methods", "stages", "data"} <= set(metrics)
    assert list(metrics["methods"]) == list(METHODS)
    for row in metrics["methods"].values():
        accuracy = row["accuracy"]
        assert set(accuracy) == {"mean", "interval", "seeds"}
        low, high = accuracy["interval"]
        assert 0 <= low <= accuracy["mean"] <= high <= 1
        assert len(accuracy["seeds"]) == 2
        assert accuracy["mean"] == pytest.approx(np.mean(accuracy["seeds"]))
        assert row["seconds"] > 0 and row["peak_mib"] >= 0 and row["parameters"] >= 0
    networks = {"unfused", "unfused-literal", "unfused-propagate", "fine-tune", "scratch", "ceiling"}
    for name in networks:
        assert metrics["methods"][name]["parameters"] > 0 and metrics["methods"][name]["peak_mib"] > 0
    assert {"windows", "pretrain", "cluster", "distil", "unfused/0", "classic/1"} <= set(metrics["stages"])
    assert all(stage["seconds"] >= 0 for stage in metrics["stages"].values())
    assert [row["b"] for row in metrics["paired"]] == list(METHODS[1:])
    assert all(row["a"] == "unfused" and row["n"] == 2 for row in metrics["paired"])
    assert (
        metrics["data"] | {"labels_used": 6, "held_out": 9, "groups": 3, "pool": 24, "clusters": 4}
        == metrics["data"]
    )
    assert metrics["data"]["protocol"] == "transductive"


def test_unfused_is_the_arm_that_propagates(compared):
    both = [
        compared.path / "stages" / name / "0" / "probabilities.npy"
        for name in ("unfused", "unfused-propagate")
    ]
    assert both[0].read_bytes() == both[1].read_bytes()
    literal = compared.path / "stages" / "unfused-literal" / "0" / "probabilities.npy"
    assert both[0].read_bytes() != literal.read_bytes()


def test_literal_makes_unfused_the_papers(tones, compared, tmp_path):
    from unfused import adapt

    folder = tmp_path / "runs" / compared.path.name
    shutil.copytree(compared.path, folder)
    stamps = corpora.computed(folder)
    run = adapt(**{**compared.settings.to_dict(), "output": folder.parent, "propagate": False})
    changed = {name for name, stamp in corpora.computed(folder).items() if stamp != stamps[name]}
    assert changed == {"unfused/0", "unfused/1"}
    assert (
        run.metrics["methods"]["unfused"]["accuracy"] == run.metrics["methods"]["unfused-literal"]["accuracy"]
    )


def test_no_group_on_both_sides(compared):
    """What is visible lies in other groups than what is held out, in every draw."""
    for seed in range(2):
        started = json.loads((compared.path / "stages" / "classic" / str(seed) / "started.json").read_text())
        rows = corpora.read_rows(compared.path / "pseudo_labels.csv")
        visible = {
            row["path"].split("_")[1]
            for row, k in zip(rows, started["depends_on"]["labels"], strict=True)
            if k >= 0
        }
        assert visible and "s1.wav" not in visible
        counts = np.bincount([k for k in started["depends_on"]["labels"] if k >= 0])
        assert counts.tolist() == [2, 2, 2]


def test_seeds_draw_other_labels(compared):
    first, second = (
        json.loads((compared.path / "stages" / "classic" / seed / "started.json").read_text())["depends_on"][
            "labels"
        ]
        for seed in "01"
    )
    assert first != second


def test_a_method_more_leaves_the_others(tones, adapt_tiny):
    labels = tones.parent / "labels.csv"
    run = adapt_tiny(tones, labels)
    stamps = corpora.computed(run.path)
    more = adapt_tiny(tones, labels, method="classic,unfused,unfused-literal")
    assert {name: corpora.computed(run.path)[name] for name in stamps} == stamps
    assert list(more.metrics["methods"]) == ["classic", "unfused", "unfused-literal"]
    assert more.model.predict([tones / "00_s0.wav"])[0] in corpora.CLASSES


def test_without_a_network_there_is_no_model(tones, adapt_tiny):
    run = adapt_tiny(tones, tones.parent / "labels.csv")
    assert (run.path / "model").exists()
    run = adapt_tiny(tones, tones.parent / "labels.csv", method="classic,linear-probe")
    assert not (run.path / "model").exists()  # the one of before is not this run's
    with pytest.raises(ValueError, match=r"none of .*classic.* is a network of ours"):
        _ = run.model


# --- splits ----------------------------------------------------------------------------------------------


def test_test_as_fraction_file_and_group(tones, tmp_path, adapt_tiny):
    labels = tones.parent / "labels.csv"
    held = ["00_s0.wav", "01_s0.wav", "05_s1.wav"]
    (tmp_path / "held.txt").write_text("\n".join(held))
    for test, group, expected in (
        ("0.25", None, 6),
        (0.5, None, 12),
        (tmp_path / "held.txt", None, 3),
        ("s=s2", SPEAKER, 6),
    ):
        run = adapt_tiny(tones, labels, test=test, group=group, **CHEAP)
        assert run.metrics["data"]["held_out"] == expected, test
        assert run.metrics["data"]["labels_used"] == 24 - expected
    rows = corpora.read_rows(
        corpora.write_labels(
            tmp_path / "wide.csv",
            [(p.name, p.name[:2], p.stem[3:]) for p in tones.iterdir()],
            ("path", "x", "speaker"),
        )
    )
    assert rows
    manifest = corpora.write_labels(
        tones / "wide.csv",
        [(r["path"], corpora.CLASSES[int(r["x"]) % 3], r["speaker"]) for r in rows],
        ("path", "label", "speaker"),
    )
    try:
        run = adapt_tiny(manifest, group="speaker", test="speaker=s0,s1", **CHEAP)
    finally:
        manifest.unlink()
    assert (run.metrics["data"]["groups"], run.metrics["data"]["held_out"]) == (3, 18)


def test_inductive_keeps_held_out_files_out_of_the_pool(tones, adapt_tiny):
    run = adapt_tiny(tones, tones.parent / "labels.csv", test="0.25", inductive=True, **CHEAP)
    assert run.metrics["data"]["protocol"] == "inductive"
    assert run.metrics["data"]["pool"] == 18
    rows = corpora.read_rows(run.path / "pseudo_labels.csv")
    assert sum(row["cluster"] == "" for row in rows) == 6
    assert "inductive" in (run.path / "report.html").read_text()
    ids = np.load(run.path / "stages" / "cluster" / "ids.npy")
    assert len(ids) == 18
    values = np.load(run.path / "stages" / "windows" / "inputs.npy")
    inside = np.array([row["cluster"] != "" for row in rows])
    assert values[inside].mean() == pytest.approx(0, abs=1e-5) and values[inside].std() == pytest.approx(
        1, abs=1e-4
    )
    assert abs(values.mean()) + abs(values.std() - 1) > 1e-4


def test_split_that_comes_with_the_data(tones, tmp_path, adapt_tiny):
    rows = [
        (
            str(p),
            corpora.CLASSES[int(p.name[:2]) % 3],
            "train" if int(p.name[:2]) < 18 else "test",
            p.stem[3:],
        )
        for p in sorted(tones.iterdir())
    ]
    manifest = corpora.write_labels(tmp_path / "list.csv", rows, ("path", "label", "split", "speaker"))
    assert adapt_tiny(manifest, **CHEAP).metrics["data"]["held_out"] == 6
    with pytest.raises(ValueError, match="the split that comes with the data divides 2 groups, such as 's0'"):
        adapt_tiny(manifest, **CHEAP, group="speaker")


def test_groups_that_cannot_be_divided_do_not_stop_a_run(tones, adapt_tiny):
    with pytest.warns(UserWarning, match="nothing is held out, and accuracy will not be known"):
        run = adapt_tiny(tones, tones.parent / "labels.csv", group=r"\.(wav)", **CHEAP)
    assert run.metrics["methods"]["classic"]["accuracy"] == {"mean": None, "interval": None, "seeds": []}


# --- teachers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_teacher(tones, adapt_tiny, teacher):
    run = adapt_tiny(
        tones, tones.parent / "labels.csv", teacher=teacher, method="linear-probe,fine-tune", clusters="auto"
    )
    assert run.metrics["methods"]["fine-tune"]["accuracy"]["mean"] is not None
    assert (
        run.metrics["stages"]["pretrain"]["dim"] == run.model.config.dim
        or run.metrics["stages"]["pretrain"]["dim"] > 0
    )


@pytest.mark.parametrize("teacher", [name for name in TEACHERS if name != "contrastive"])
def test_every_teacher_of_pictures(tmp_path, adapt_tiny, teacher):
    corpora.write_pictures(tmp_path / "pictures")
    run = adapt_tiny(tmp_path / "pictures", teacher=teacher, method="fine-tune")
    assert run.metrics["methods"]["fine-tune"]["accuracy"]["mean"] is not None
    assert run.model.predict([tmp_path / "pictures" / "red" / "1.png"])[0] in ("blue", "red")


def test_teacher_of_another_kind(tmp_path, adapt_tiny, wav2vec):
    corpora.write_pictures(tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"teacher=.*reads audio"):
        adapt_tiny(tmp_path / "pictures", teacher=wav2vec)


@pytest.fixture(scope="module")
def wav2vec(tmp_path_factory) -> Path:
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    folder = tmp_path_factory.mktemp("teacher") / "wav2vec"
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = Wav2Vec2Config(
        **small, conv_dim=[8] * 7, num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=16
    )
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def test_foreign_teacher(tones, adapt_tiny, wav2vec):
    labels = tones.parent / "labels.csv"
    methods = "unfused,unfused-literal,fine-tune,linear-probe"
    run = adapt_tiny(tones, labels, teacher=wav2vec, method=methods)
    assert run.metrics["stages"]["pretrain"]["dim"] == 16
    assert list(run.metrics["methods"]) == methods.split(",")
    assert all(row["accuracy"]["mean"] is not None for row in run.metrics["methods"].values())
    assert run.model.predict([tones / "00_s0.wav"])[0] in corpora.CLASSES
    stamps = corpora.computed(run.path)
    assert corpora.computed(adapt_tiny(tones, labels, teacher=wav2vec, method=methods).path) == stamps


def test_a_file_that_vanishes_before_a_foreign_teacher_hears_it(tmp_path, adapt_tiny, wav2vec, monkeypatch):
    from unfused.workflow import unlabelled

    corpora.write_tones(tmp_path / "recordings", 8)
    pretrain = unlabelled.pretrain

    def vanish(*args):
        (tmp_path / "recordings" / "03_s1.wav").unlink()
        return pretrain(*args)

    monkeypatch.setattr(unlabelled, "pretrain", vanish)
    with pytest.raises(ValueError, match=r"03_s1\.wav: no such file .*; run the same command again"):
        adapt_tiny(tmp_path / "recordings", teacher=wav2vec)
    monkeypatch.setattr(unlabelled, "pretrain", pretrain)
    assert adapt_tiny(tmp_path / "recordings", teacher=wav2vec).metrics["data"]["usable"] == 7


def test_our_own_model_as_teacher(tones, adapt_tiny):
    model = adapt_tiny(tones, tones.parent / "labels.csv", name="teacher").path / "model"
    run = adapt_tiny(
        tones, tones.parent / "labels.csv", teacher=model, method="unfused,fine-tune", clusters="auto"
    )
    assert run.metrics["methods"]["unfused"]["accuracy"]["mean"] is not None


@pytest.mark.parametrize(
    "teacher, message", [("nowhere/at/all", "there is no such folder"), (".", "no config.json")]
)
def test_teacher_that_is_none(tones, adapt_tiny, teacher, message):
    with pytest.raises(ValueError, match=message):
        adapt_tiny(tones, teacher=teacher)


# --- small and odd corpora -------------------------------------------------------------------------------


def test_all_recordings_identical(tmp_path, adapt_tiny):
    folder = tmp_path / "same"
    corpora.write_tones(folder, 8)
    for path in folder.iterdir():
        shutil.copy(folder / "00_s0.wav", path) if path.name != "00_s0.wav" else None
    with pytest.raises(ValueError, match="the features of all 8 items are the same"):
        adapt_tiny(folder)


@pytest.mark.parametrize("labels", [0, 2, 4])
def test_four_recordings(tmp_path, adapt_tiny, labels):
    rows = corpora.write_tones(tmp_path / "four", 4)
    given = [(path, "ab"[k % 2]) for k, (path, _) in enumerate(rows[:labels])]
    run = adapt_tiny(
        tmp_path / "four",
        fresh(tmp_path, given) if given else None,
        method="unfused,classic,unfused-literal",
        clusters="auto",
    )
    assert len(run.to_label) == 4 - labels
    assert bool(run.metrics["methods"]) == bool(labels)


def test_three_recordings_are_too_few(tmp_path, adapt_tiny):
    corpora.write_tones(tmp_path / "three", 3)
    with pytest.raises(ValueError, match="has 3 usable files: at least 4 are needed"):
        adapt_tiny(tmp_path / "three")


def test_one_label_a_class_in_two_of_three_classes(tones, tmp_path, adapt_tiny):
    run = adapt_tiny(tones, fresh(tmp_path, [("00_s0.wav", "high"), ("01_s0.wav", "low")]), method=SEVERAL)
    assert run.metrics["data"]["held_out"] == 0
    assert run.metrics["methods"]["unfused"]["accuracy"]["mean"] is None
    assert run.metrics["paired"] == []
    assert run.model.classes == ["high", "low"]


def test_class_with_a_single_clip(tones, tmp_path, adapt_tiny):
    rows = [
        (p.name, "rare" if p.name == "00_s0.wav" else corpora.CLASSES[int(p.name[:2]) % 3])
        for p in tones.iterdir()
    ]
    labels = fresh(tmp_path, rows)
    assert adapt_tiny(tones, labels).metrics["data"]["held_out"] == 0  # one label cannot be on both sides
    run = adapt_tiny(tones, labels, test="0.25", method=SEVERAL)
    assert run.metrics["data"]["held_out"] == 6
    assert run.model.classes == ["high", "low", "mid", "rare"]


def test_recordings_longer_than_a_window(tmp_path, adapt_tiny):
    rows = corpora.write_tones(tmp_path / "long", 8, seconds=4.0)
    run = adapt_tiny(tmp_path / "long", fresh(tmp_path, rows), method="unfused,fine-tune")
    assert run.metrics["stages"]["windows"]["windows"] > 8


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, message",
    [
        ([("00_s0.wav", "a"), ("01_s0.wav", "a")], "all 2 labels are 'a'"),
        ([("00_s0.wav", "a")], "there is a single label, 'a'"),
        ([("00_s0.wav", "a"), ("00_s0.wav", "b")], "labels '00_s0.wav' both 'a' and 'b'"),
        ([("00_s0.wav", "a"), ("gone.wav", "b")], "1 of its 2 rows name no file .*'gone.wav'"),
    ],
)
def test_labels_that_make_no_classifier(tones, tmp_path, adapt_tiny, rows, message):
    with pytest.raises(ValueError, match=message):
        adapt_tiny(tones, fresh(tmp_path, rows))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(methods="unfused"), "unknown option 'methods'"),
        (dict(method="unfused,svm"), "method='svm' is not known"),
        (dict(method=" , "), "method is empty"),
        (dict(clusters=1), "clusters='1'"),
        (dict(clusters=24), "clusters=24: the pool has 24 clips"),
        (dict(seeds=0), "seeds=0 must be at least 1"),
        (dict(seed=-1), "seed=-1 must be at least 0"),
        (dict(modality="text"), "modality='text'"),
        (dict(name="a/b"), "name='a/b'"),
        (dict(name=".."), "name='..'"),
        (dict(labels_per_class=2), "labels_per_class needs labels"),
        (dict(test="0.2"), "test=0.2: there are no labels"),
        (dict(test="s=s9", group=SPEAKER), "no file has s 's9'; there are 's0', 's1', 's2'"),
        (
            dict(group="speaker"),
            "group='speaker' is no column, and as a regular expression it matches no path",
        ),
        (dict(modality="image"), "no file with extension"),
        (dict(teacher="contrastiv"), "contrastiv"),
    ],
)
def test_settings_that_cannot_be(tones, adapt_tiny, options, message):
    with pytest.raises(ValueError, match=message):
        adapt_tiny(tones, **options)


@pytest.mark.parametrize(
    "name, value", [("seeds", "3"), ("width", 2.5), ("queue", True), ("inductive", "no")]
)
def test_settings_of_another_type(tones, adapt_tiny, name, value):
    with pytest.raises(TypeError, match=f"{name}={value!r} must be"):
        adapt_tiny(tones, **{name: value})


def test_held_out_class(tones, tmp_path, adapt_tiny):
    (tmp_path / "held.txt").write_text("\n".join(p.name for p in tones.iterdir() if int(p.name[:2]) % 3 == 0))
    with pytest.raises(ValueError, match="holds out every label of 'high'"):
        adapt_tiny(tones, tones.parent / "labels.csv", test=tmp_path / "held.txt")


def test_source_that_is_not_there(adapt_tiny):
    with pytest.raises(ValueError, match="there is no such folder or manifest"):
        adapt_tiny("no/such/folder")


def test_progress_is_called_for_every_stage_that_is_computed(tones, adapt_tiny):
    calls = []
    adapt_tiny(tones, tones.parent / "labels.csv", progress=lambda *call: calls.append(call))
    assert {name for name, _, _ in calls} >= {"read", "pretrain", "unfused/0"}
    assert all(0 <= done <= total for _, done, total in calls)
    assert ("read", 24, 24) in calls and ("pretrain", 3, 3) in calls
