"""The model card: metadata that the hub reads, text that nothing in a name can break, code that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from unfused.workflow.model_card import model_card

METRICS: dict[str, Any] = {
    "methods": {
        "unfused": {
            "accuracy": {"mean": 0.87, "interval": [0.85, 0.89], "seeds": [0.86, 0.88]},
            "balanced_accuracy": {"mean": 0.86, "interval": [0.84, 0.88], "seeds": [0.85, 0.87]},
            "parameters": 1_320_000,
        },
        "scratch": {
            "accuracy": {"mean": 0.64, "interval": [0.6, 0.68], "seeds": [0.62, 0.66]},
            "parameters": 9000,
        },
        "ceiling": {"accuracy": {"mean": 0.95, "interval": None, "seeds": [0.95]}},
        "broken": {"accuracy": {"mean": None, "interval": None, "seeds": []}},
    },
    "data": {
        "source": "/home/somebody/private/birds",
        "usable": 1200,
        "quarantined": 3,
        "seconds_total": 3700.0,
        "labels_used": 50,
        "held_out": 240,
        "classes": ["owl", "wren"],
        "groups": 4,
        "protocol": "inductive",
    },
}
SETTINGS = {"teacher": "contrastive", "clusters": "auto", "seed": 0, "test": "0.2", "labels_per_class": 25}


def front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    assert found
    return yaml.safe_load(found.group(1))


def snippet(card: str) -> str:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]


@pytest.mark.parametrize("task", ["audio-classification", "image-classification"])
def test_the_hub_can_read_it(task: str) -> None:
    from huggingface_hub import ModelCard

    card = model_card("birds", task, "unfused", METRICS, SETTINGS, parameters=1_320_000)
    meta = front_matter(card)
    assert (
        meta["library_name"] == "transformers" and meta["pipeline_tag"] == task and "unfused" in meta["tags"]
    )
    read = ModelCard(card, ignore_metadata_errors=False).data
    assert read.model_name == "birds"
    assert [(r.task_type, r.metric_type, r.metric_value) for r in read.eval_results] == [
        (task, "accuracy", 0.87),
        (task, "balanced_accuracy", 0.86),
    ]
    assert "95 % interval 0.850 to 0.890, 2 draws" in read.eval_results[0].metric_name


def test_says_what_was_measured_and_how() -> None:
    card = model_card("birds", "audio-classification", "unfused", METRICS, SETTINGS)
    assert "It labels 87.0 % (95 % interval 85.0 % to 89.0 %) of the held-out recordings correctly." in card
    rows = re.findall(r"^\| (\S+).* \|$", card, flags=re.MULTILINE)
    assert rows == ["method", "ceiling", "unfused", "scratch"]
    assert "| unfused | 0.870 | 0.850 to 0.890 | 0.860 | 1.32 M |" in card
    for text in ("240 recordings", "held out by test = 0.2", "25 labels a class", "Inductive:", "2303.05668",
                 "Labels trained on: 50", "1 h 2 min", "no group is on both sides"):  # fmt: skip
        assert text in card, text


def test_literal_and_propagated_are_told_apart() -> None:
    propagated = model_card("b", "audio-classification", "unfused", METRICS, {"propagate": True})
    literal = model_card("b", "audio-classification", "unfused", METRICS, {"propagate": False})
    assert "an extension of the paper" in propagated and "as published" not in propagated
    assert "as published" in literal and "an extension" not in literal


def test_does_not_tell_where_the_files_lie() -> None:
    card = model_card("birds", "audio-classification", "unfused", METRICS, SETTINGS)
    assert "somebody" not in card and "Source: birds." in card
    assert "datasets" not in front_matter(card)


def test_a_hub_data_set_is_linked() -> None:
    metrics = {**METRICS, "data": {**METRICS["data"], "source": "owner/birds:train"}}
    meta = front_matter(model_card("birds", "audio-classification", "unfused", metrics, SETTINGS))
    assert meta["datasets"] == ["owner/birds"]
    assert meta["model-index"][0]["results"][0]["dataset"]["type"] == "owner/birds"


def test_nothing_held_out() -> None:
    metrics = {"methods": {}, "data": {"classes": ["owl", "wren"]}}
    card = model_card("birds", "audio-classification", "unfused", metrics, {})
    assert "Nothing was held out" in card and "model-index" not in front_matter(card)


def test_one_draw_is_called_one_draw() -> None:
    row = {"accuracy": {"mean": 0.8, "interval": [0.7, 0.9], "seeds": [0.8]}}
    card = model_card(
        "birds", "audio-classification", "unfused", {**METRICS, "methods": {"unfused": row}}, SETTINGS
    )
    assert "95 % bootstrap interval over the held-out items, 1 draw of the labels" in card
    assert "One draw of the labels:" in card


@pytest.mark.parametrize(
    "name", ["yes: [no", "---\nevil: true", "<script>alert(1)</script>", "a | b `c`", "caf\udce9"]
)
def test_names_cannot_break_it(name: str) -> None:
    metrics = {**METRICS, "methods": {name: METRICS["methods"]["unfused"]}}
    metrics["data"] = {**METRICS["data"], "classes": [name, "wren"], "source": name}
    card = model_card(name, "audio-classification", name, metrics, {"teacher": name, "test": name})
    card.encode("utf-8")
    meta = front_matter(card)
    assert "evil" not in meta and meta["pipeline_tag"] == "audio-classification"
    body = card.split("\n---\n", 1)[1]
    assert not re.search(r"(?<!\\)<script", body)
    table = [line for line in body.splitlines() if line.startswith("| ")]
    assert len(table) == 2 and all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in table)


def test_the_code_runs_for_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import soundfile

    from unfused.nn.audio_model import (
        UnfusedAudioConfig,
        UnfusedAudioForClassification,
        UnfusedFeatureExtractor,
    )
    from unfused.nn.register import register

    register()
    config = UnfusedAudioConfig(
        width=4, dim=8, id2label={0: "owl", 1: "wren"}, label2id={"owl": 0, "wren": 1}
    )
    UnfusedAudioForClassification(config).save_pretrained(tmp_path)
    UnfusedFeatureExtractor().save_pretrained(tmp_path)
    sound = np.random.default_rng(0).normal(0, 0.1, (12000, 2)).astype("float32")
    soundfile.write(tmp_path / "clip.wav", sound, 8000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    exec(snippet(model_card("birds", "audio-classification", "unfused", METRICS, SETTINGS)), {})
    assert "owl" in capsys.readouterr().out


def test_the_code_runs_for_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from PIL import Image
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=2
    )
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    exec(snippet(model_card("birds", "image-classification", "unfused", METRICS, SETTINGS)), {})
    assert "LABEL_0" in capsys.readouterr().out
