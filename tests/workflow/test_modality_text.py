"""`adapt` on texts: sources, what is set aside, products, a pretrained encoder, kill and resume, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import corpora
import numpy as np
import pytest

from unfused.data.files import Quarantine
from unfused.data.records import read_records
from unfused.workflow.modality_text import Text

COLUMNS = dict(text_column="body", target="topic")


@pytest.fixture
def source(tmp_path) -> Path:
    corpora.write_texts(tmp_path / "texts.csv")
    return tmp_path / "texts.csv"


# --- from a source to a model ----------------------------------------------------------------------------


def test_labels_in_a_column(source, adapt_tiny):
    run = adapt_tiny(source, **COLUMNS, group="source", method="unfused,linear-probe,classic")
    data = run.metrics["data"]
    assert (data["modality"], data["usable"], data["labelled"], data["groups"]) == ("text", 24, 24, 3)
    assert data["classes"] == ["cars", "cats", "food"] and run.path.name == "texts"
    assert run.metrics["methods"]["classic"]["accuracy"]["mean"] >= 0.8
    rows = corpora.read_rows(run.path / "pseudo_labels.csv")
    assert [row["path"] for row in rows] == [f"row {k}" for k in range(1, 25)]
    assert run.model.kind == "text" and run.model.config.text_column == "body"
    texts = ["engine wheel road", "soup " * 300, "Größe 🦊 <b>"]
    assert set(run.model.predict(texts)) <= set(data["classes"])
    by_file = run.model.predict_proba(source)
    np.testing.assert_allclose(by_file.max(1), [float(row["confidence"]) for row in rows], atol=2e-4)
    assert (
        adapt_tiny(source, **COLUMNS, group="source", method="unfused,linear-probe,classic").metrics
        == run.metrics
    )
    page = (run.path / "report.html").read_text()
    assert "rows read" in page and "24 texts" in page
    payload = json.loads(page.split('id="payload">')[1].split("</script>")[0])
    assert len(payload["points"]["text"]) == 24 and all(payload["points"]["text"])
    card = (run.path / "model" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "24 texts" in card and "microphones" not in card


def test_the_model_works_in_a_pipeline_of_transformers_alone(source, adapt_tiny):
    from transformers import pipeline

    run = adapt_tiny(source, **COLUMNS, method="scratch")
    texts = [text for text, _ in corpora.write_texts(source)][:5]
    answers = pipeline("text-classification", model=str(run.path / "model"))(texts)
    ours = run.model.predict_proba(texts)
    assert [answer["label"] for answer in answers] == run.model.predict(texts)
    np.testing.assert_allclose([answer["score"] for answer in answers], ours.max(1), atol=1e-4)
    assert json.loads((run.path / "model" / "config.json").read_text())["model_type"] == "modernbert"


def test_no_labels_then_answers_follow_their_text(tmp_path, adapt_tiny):
    """The text stands beside the row's number, and an answer stays with its text when rows come in above it."""
    source = tmp_path / "texts.csv"
    truth = dict(corpora.write_texts(source, label=None))
    run = adapt_tiny(source, text_column="body", queue=6)
    queue = corpora.read_rows(run.path / "to_label.csv")
    assert list(queue[0]) == ["path", "label", "body", "cluster", "reason"] and len(queue) == 6
    assert all(row["body"] in truth for row in queue)
    assert run.metrics["methods"] == {} and not (run.path / "model").exists()
    answers = {row["path"]: truth[row["body"]] for row in queue}
    corpora.fill_in(run.path / "to_label.csv", answers)

    lines = source.read_text().splitlines()
    source.write_text("\n".join([lines[0], "a new text on top,s9", *lines[1:]]) + "\n")
    second = adapt_tiny(source, text_column="body", queue=6)
    kept = corpora.read_rows(run.path / "labels.csv")
    assert {row["path"]: row["label"] for row in kept} == {
        f"row {int(path.split()[1]) + 1}": label for path, label in answers.items()
    }
    assert all(truth[row["body"]] == row["label"] for row in kept)
    assert second.metrics["data"]["labels_used"] == 6 and "unfused" in second.metrics["methods"]
    assert not {row["body"] for row in corpora.read_rows(run.path / "to_label.csv")} & {
        row["body"] for row in kept
    }


@pytest.mark.parametrize("form", ["tsv", "jsonl", "parquet", "labels file", "split", "data set"])
def test_every_form_of_source(tmp_path, adapt_tiny, form):
    rows = corpora.write_texts(tmp_path / "t.csv", ids=True)
    table = corpora.read_rows(tmp_path / "t.csv")
    source, options = tmp_path / "t.csv", dict(COLUMNS)
    if form == "tsv":
        source = tmp_path / "t.tsv"
        source.write_text("body\tclass\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
        options = {}
    elif form == "jsonl":
        source = tmp_path / "t.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif form == "parquet":
        import pandas

        source = tmp_path / "t.parquet"
        pandas.DataFrame(table).to_parquet(source)
    elif form == "labels file":
        corpora.write_labels(
            tmp_path / "l.csv", [(f"t{k}", label) for k, (_, label) in enumerate(rows)], ("id", "label")
        )
        options = dict(text_column="body", labels=tmp_path / "l.csv")
    elif form == "split":
        for k, row in enumerate(table):
            row["split"] = "test" if k < 6 else "train"
        corpora.write_labels(source, [list(row.values()) for row in table], list(table[0]))
    elif form == "data set":
        datasets = pytest.importorskip("datasets")
        source = tmp_path / "saved"
        datasets.Dataset.from_dict(
            {
                "text": [text for text, _ in rows],
                "label": [list(corpora.WORDS).index(label) for _, label in rows],
            },
            features=datasets.Features(
                text=datasets.Value("string"), label=datasets.ClassLabel(names=list(corpora.WORDS))
            ),
        ).save_to_disk(source)
        options = {}
    run = adapt_tiny(source, **options, method="classic", teacher="random")
    data = run.metrics["data"]
    assert (data["modality"], data["usable"], data["labelled"], data["classes"]) == (
        "text",
        24,
        24,
        list(corpora.WORDS),
    )
    assert data["held_out"] == (6 if form == "split" else 5)
    first = corpora.read_rows(run.path / "pseudo_labels.csv")[0]["path"]
    assert first == ("row 1" if form in ("tsv", "data set") else "t0")


def test_inductive_vocabulary_does_not_know_held_out_texts(tmp_path):
    rows = [["common words here again and again", "a"]] * 1
    rows += [[f"common words here again number {k}", "a"] for k in range(8)] + [
        ["zyzzyva zyzzyva zyzzyva", "b"]
    ]
    corpora.write_labels(tmp_path / "t.csv", rows, ("body", "label"))
    records = read_records(tmp_path / "t.csv", Quarantine())
    vocabularies = []
    for pool in (np.ones(10, bool), np.arange(10) < 9):
        modality = Text(records, "body", 4)
        corpus = modality.read(records.manifest()[0], tmp_path, Quarantine())
        folder = tmp_path / str(pool.sum())
        folder.mkdir()
        inputs = modality.inputs(corpus, pool, folder)
        modality.attach(folder, pool)
        vocabularies.append(set(modality.tokenizer.get_vocab()))
        assert inputs.values.shape == (10, modality.length) and inputs.values.dtype == np.int32
        assert modality.classic_features(corpus).shape[0] == 10
    assert any("zy" in token for token in vocabularies[0] - vocabularies[1])


def test_long_texts_are_cut_and_pooled(tmp_path, adapt_tiny):
    rows = [(f"{' '.join(corpora.WORDS[kind] * 60)} {k}", kind) for k in range(4) for kind in corpora.WORDS]
    corpora.write_labels(tmp_path / "t.csv", rows, ("body", "label"))
    run = adapt_tiny(tmp_path / "t.csv", text_column="body", method="unfused")
    assert run.metrics["stages"]["windows"]["windows"] > 24
    assert run.model.config.window == 128


# --- what is set aside -----------------------------------------------------------------------------------


def test_spoilt_texts(tmp_path, adapt_tiny):
    rows = corpora.write_texts(tmp_path / "t.csv")
    good = [[text, label] for text, label in rows]
    odd = [
        ["<script>alert(1)</script> purr", "cats"],
        ['=cmd() "quoted", with\nnew lines', "food"],
        ["größe 音 🦊", "cars"],
        ["\u202eabc", "cars"],
    ]
    bad = [["", "cars"], ["   ", ""], ["NaN", "cats"], [rows[0][0], "cars"], [f" {rows[1][0]} ", "food"]]
    corpora.write_labels(tmp_path / "t.csv", [*good, *odd, *bad], ("body", "label"))
    with open(tmp_path / "t.csv", "ab") as file:
        file.write(b"bad \xff bytes,cats\none,two,three\n")
    run = adapt_tiny(tmp_path / "t.csv", text_column="body")
    aside = {row["path"]: row["reason"] for row in corpora.read_rows(run.path / "quarantine.csv")}
    assert aside == {
        "row 29": "an empty text",
        "row 30": "an empty row",
        "row 31": "no text: 'NaN'",
        "row 32": "a copy of another text: row 1",
        "row 33": "a copy of another text: row 2, which is labelled 'cats' and not 'food'",
        "row 34": "bytes that are not UTF-8 in column 'body'",
        "row 35": "3 cells, but the header has 2: put quotes around what contains the separator",
    }
    data = run.metrics["data"]
    assert (data["files"], data["usable"], data["quarantined"]) == (35, 28, 7)
    page = (run.path / "report.html").read_text()
    assert "<script>alert" not in page and "\\u003cscript\\u003ealert(1)" in page and "\u202e" not in page
    assert "7 rows were of no use" in page


def test_of_copies_a_labelled_one_stays(tmp_path):
    corpora.write_labels(tmp_path / "t.csv", [("same", ""), ("same", "a"), ("other", "b")], ("body", "label"))
    records, quarantine = read_records(tmp_path / "t.csv", Quarantine()), Quarantine()
    corpus = Text(records, "body").read(records.manifest()[0], tmp_path, quarantine)
    assert corpus.manifest.paths == ["row 2", "row 3"] and quarantine.rows == [
        ("row 1", "a copy of another text: row 2")
    ]


@pytest.mark.parametrize(
    "content, options, message",
    [
        (
            "body,topic\na b,x\n",
            dict(text_column="text"),
            "has no column 'text'; its columns are 'body', 'topic'",
        ),
        (
            "body,topic\n,x\n ,y\nNaN,x\n",
            dict(text_column="body"),
            "has no usable row: 3 set aside, reasons in .*quarantine",
        ),
        ("body,topic\na b,x\nc d,x\n", dict(text_column="body"), "has 2 usable rows: at least 4 are needed"),
        ("body,topic\n", dict(text_column="body"), "has no row below its header"),
        ("", dict(text_column="body"), "is empty"),
        (None, dict(target="kind"), "has no column 'kind'"),
        (None, dict(COLUMNS, modality="table"), "contradict each other"),
        (None, dict(COLUMNS, group="author"), "group='author' is no column"),
        (
            None,
            dict(COLUMNS, teacher="no/such/model/here"),
            "teacher='no/such/model/here': there is no such folder",
        ),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, adapt_tiny, content, options, message):
    source = tmp_path / "t.csv"
    if content is None:
        corpora.write_texts(source)
    else:
        source.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        adapt_tiny(source, **options)
    assert "\n" not in str(error.value)


def test_one_class(tmp_path, adapt_tiny):
    rows = [(text, "all") for text, _ in corpora.write_texts(tmp_path / "t.csv")]
    corpora.write_labels(tmp_path / "t.csv", rows, ("body", "label"))
    with pytest.raises(ValueError, match="all 24 labels are 'all'"):
        adapt_tiny(tmp_path / "t.csv", text_column="body")


def test_which_column_is_meant(tmp_path, adapt_tiny):
    """A single column of texts is taken; where several or others could be meant, an option is named."""
    long = [f"{text} and some more words" for text, _ in corpora.write_texts(tmp_path / "t.csv")]
    names = [label for _, label in corpora.write_texts(tmp_path / "t.csv")]

    def table(**columns: list[str]) -> Path:
        corpora.write_labels(tmp_path / "t.csv", zip(*columns.values(), strict=True), list(columns))
        return tmp_path / "t.csv"

    def modality(source: Path, **options: str) -> str:
        from unfused.workflow.settings import Settings
        from unfused.workflow.sources import open_source

        return open_source(Settings(str(source), **options), Quarantine(), tmp_path)[0].name

    numbers = [str(k) for k in range(24)]
    assert modality(table(remark=long, label=names)) == "text"
    assert modality(table(id=numbers, x=names, y=names)) == "table"
    assert modality(table(remark=long, price=numbers, size=names), target="size") == "table"
    assert modality(table(remark=long, size=names), target="size") == "text"
    assert modality(table(a=names), modality="text") == "text"
    with pytest.raises(ValueError, match=r"--text-column 'remark'\).*with target \(--target NAME\)"):
        modality(table(remark=long, price=numbers, size=names))
    with pytest.raises(ValueError, match=r"2 columns of texts \('remark', 'answer'\).*--text-column"):
        modality(table(remark=long, answer=long, label=names))
    with pytest.raises(ValueError, match=r"which column .* holds the texts"):
        modality(table(a=names, b=names), modality="text")
    (tmp_path / "a.wav").touch()
    files = ["a.wav", *(f"{k}.wav" for k in range(1, 24))]
    assert modality(table(file=files, x=names, label=names)) == "audio"
    assert modality(table(file=files, x=names, label=names), modality="table") == "table"
    with pytest.raises(ValueError, match=r"column 'sound' of .* names files: call it 'path'"):
        modality(table(sound=["a.wav"] * 12 + ["b.wav"] * 12, label=names))


# --- a pretrained encoder --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    from unfused.nn.text_encoder import train_tokenizer

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=400, **sizes)).save_pretrained(folder)
    train_tokenizer([" ".join(words) for words in corpora.WORDS.values()], 400).save_pretrained(folder)
    return folder


def test_pretrained_encoder(source, adapt_tiny, bert):
    run = adapt_tiny(source, **COLUMNS, encoder=bert, method="unfused,fine-tune,linear-probe")
    assert run.metrics["stages"]["pretrain"]["dim"] == 16
    assert all(row["accuracy"]["mean"] is not None for row in run.metrics["methods"].values())
    assert run.model.kind == "text"  # the student; the encoder is not ours to keep
    with pytest.raises(ValueError, match="two words for one"):
        adapt_tiny(source, **COLUMNS, encoder=bert, teacher="random")


@pytest.mark.parametrize("teacher", ["decar", "delores-s", "delores-m", "slicer"])
def test_every_objective(source, adapt_tiny, teacher):
    run = adapt_tiny(source, **COLUMNS, teacher=teacher, method="linear-probe")
    assert run.metrics["methods"]["linear-probe"]["accuracy"]["mean"] is not None


def test_clusters_auto_and_the_literal_student(source, adapt_tiny):
    run = adapt_tiny(
        source,
        **COLUMNS,
        clusters="auto",
        method="unfused-literal,scratch,ceiling",
        labels_per_class=2,
        seeds=2,
    )
    assert run.metrics["data"]["labels_used"] == 6 and run.metrics["data"]["clusters"] >= 2
    assert all(len(row["accuracy"]["seeds"]) == 2 for row in run.metrics["methods"].values())


# --- kill and resume -------------------------------------------------------------------------------------


def test_killed_and_resumed(source, tmp_path):
    corpora.assert_resumes(source, tmp_path, COLUMNS | dict(method="unfused"))
