"""`unfused adapt`, `label` and `predict` on texts and on rows of a table."""

from __future__ import annotations

import csv

import corpora
import pytest

TINY = corpora.TINY_WORDS


def test_texts_from_no_label_to_predictions(unfused, tmp_path):
    truth = dict(corpora.write_texts(tmp_path / "texts.csv", label=None))
    command = ("adapt", "texts.csv", "--text-column", "body", *TINY, "--queue", 6)
    code, out, err = unfused(*command)
    assert (code, out) == (0, "runs/texts\n") and "texts 24" in err and "to_label.csv" in err
    code, out, _ = unfused("label", "runs/texts", "-n", 3)
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and len(lines) == 3 and all(line[1] in truth for line in lines)
    queue = corpora.read_rows(tmp_path / "runs/texts/to_label.csv")
    corpora.fill_in(tmp_path / "runs/texts/to_label.csv", {row["path"]: truth[row["body"]] for row in queue})
    assert unfused(*command, "--quiet") == (0, "runs/texts\n", "")

    (tmp_path / "new.csv").write_text('id,body\na,engine wheel\nb,""\nc,kitten <b>milk</b>\n')
    code, out, err = unfused("predict", "runs/texts/model", "new.csv", "--csv", "out.csv")
    assert (code, out, err) == (0, "", "unfused: b: an empty text\n")
    rows = corpora.read_rows(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == ["a", "b", "c"] and rows[1]["label"] == ""
    assert {rows[0]["label"], rows[2]["label"]} <= set(corpora.WORDS)
    code, out, err = unfused("predict", "runs/texts", "new.csv", "new.csv")
    assert code == 0 and out.startswith("new.csv: a\t") and err.count("an empty text") == 1


def test_rows_of_a_table(unfused, tmp_path):
    corpora.write_rows(tmp_path / "flowers.csv")
    code, out, err = unfused("adapt", "flowers.csv", "--target", "species", *TINY, "--labels-per-class", 4)
    assert (code, out) == (0, "runs/flowers\n")
    assert "rows read 30 · rows 30" in err and "columns left out, the same in every row: 'unit'" in err
    code, out, err = unfused("adapt", "--config", "runs/flowers/config.yaml")
    assert code == 0 and "windows: done before, reused" in err
    code, out, err = unfused("predict", "runs/flowers", "flowers.csv", "--csv", "out.csv")
    assert (code, out, err) == (0, "", "")
    with open(tmp_path / "out.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"row {k}" for k in range(1, 31)]
    assert list(rows[0])[3:] == ["setosa", "versicolor", "virginica"]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["texts.csv", "--text-column", "text"],
            "has no column 'text'; its columns are 'body', 'topic', 'source'",
        ),
        (["flowers.csv", "--target", "kind"], "has no column 'kind'"),
        (["flowers.csv", "--target", "species", "--labels", "species"], "both say where the labels are"),
        (["gone.csv", "--text-column", "body"], "there is no such folder or manifest"),
        (["empty.csv", "--text-column", "body"], "'empty.csv' is empty"),
        (["mixed.csv"], "--text-column 'story'"),
        (
            ["texts.csv", "--modality", "video"],
            "modality='video': give 'auto', 'audio', 'image', 'text', 'table'",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(unfused, tmp_path, words, message):
    rows = corpora.write_texts(tmp_path / "texts.csv")
    corpora.write_rows(tmp_path / "flowers.csv")
    (tmp_path / "empty.csv").touch()
    corpora.write_labels(
        tmp_path / "mixed.csv",
        [(f"{text} to be told", k, k % 3) for k, (text, _) in enumerate(rows)],
        ("story", "a", "b"),
    )
    code, out, err = unfused("adapt", *words, *TINY, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("unfused: ") and err.count("\n") == 1 and message in err


def test_predict_of_what_is_no_table(unfused, tmp_path):
    corpora.write_rows(tmp_path / "flowers.csv")
    words = (
        "adapt",
        "flowers.csv",
        "--target",
        "species",
        *TINY,
        "--method",
        "scratch",
        "--teacher",
        "random",
        "-q",
    )
    assert unfused(*words)[0] == 0
    (tmp_path / "new.csv").write_text("length,width\n1,2\n")
    for file, message in (
        ("new.csv", "'new.csv' lacks the columns 'colour', 'found', 'site'"),
        ("gone.csv", "'gone.csv' cannot be read"),
        ("sound.wav", "'sound.wav': give a table"),
    ):
        code, out, err = unfused("predict", "runs/flowers", file)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
