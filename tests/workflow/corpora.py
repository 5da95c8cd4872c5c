"""Small corpora and settings for tests of whole runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

RATE = 8000
CLASSES = ("high", "low", "mid")
TINY: dict[str, Any] = dict(
    width=4, pretrain_steps=3, distil_steps=3, fine_tune_steps=3, clusters=4, method="unfused,classic"
)

IMPORTS = """torch._dynamo transformers.modelcard sklearn.manifold unfused.train.engine unfused.nn.text_encoder
    unfused.workflow.adapt unfused.workflow.products unfused.workflow.unlabelled unfused.pretrain.contrastive
    unfused.pretrain.unfused unfused.finetune.classic unfused.finetune.fine_tune unfused.nn.table_model""".split()


def tone(kind: int, source: int, seconds: float = 0.4, seed: int = 0, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(rate * seconds)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, len(time))
    return 0.3 * np.sin(2 * np.pi * (200 * 2**kind + 13 * source) * time) + noise


def write_tones(
    folder: Path, count: int = 24, class_folders: bool = False, sources: int = 3, seconds: float = 0.4
) -> list[tuple[str, str]]:
    """`count` recordings, `NUMBER_sSOURCE.wav`, class after class; returns (path, label) of each."""
    rows = []
    for number in range(count):
        kind, source = number % len(CLASSES), number // len(CLASSES) % sources
        name = f"{number:02d}_s{source}.wav"
        path = folder / (CLASSES[kind] if class_folders else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(kind, source, seconds, number), RATE)
        rows.append((path.relative_to(folder).as_posix(), CLASSES[kind]))
    return rows


def write_pictures(folder: Path, count: int = 16) -> list[tuple[str, str]]:
    """Smooth red and blue pictures of several sizes in two class folders."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        kind = ("blue", "red")[number % 2]
        pixels = rng.integers(0, 90, (5, 5, 3), dtype=np.uint8)
        pixels[..., 2 if kind == "blue" else 0] += 150
        path = folder / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((40, 30 + number)).save(path)
        rows.append((path.relative_to(folder).as_posix(), kind))
    return rows


def write_labels(
    path: Path, rows: Iterable[Sequence[str]], columns: Sequence[str] = ("path", "label")
) -> Path:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def fill_in(path: Path, answers: dict[str, str]) -> None:
    """Do what a person does with `to_label.csv`."""
    rows = read_rows(path)
    for row in rows:
        row["label"] = answers.get(row["path"], row["label"])
    write_labels(path, [list(row.values()) for row in rows], list(rows[0]))


def computed(run_folder: Path) -> dict[str, int]:
    """When each stage was finished: equal before and after a command that reuses it."""
    stages = run_folder / "stages"
    return {
        done.parent.relative_to(stages).as_posix(): done.stat().st_mtime_ns
        for done in sorted(stages.rglob("done.json"))
        if (done.parent / "started.json").exists()
    }


def results(run_folder: Path) -> dict[str, Any]:
    """`metrics.json` without what the clock and the machine decide."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in ("seconds", "peak_mib")}
        return [without(v) for v in value] if isinstance(value, list) else value

    return without(json.loads((run_folder / "metrics.json").read_text()))


WORDS = {
    "cars": "engine wheel road driver fuel brake".split(),
    "cats": "purr whisker kitten milk claw tail".split(),
    "food": "bread soup apple cheese salt plate".split(),
}


def write_texts(
    path: Path, count: int = 24, label: str | None = "topic", ids: bool = False
) -> list[tuple[str, str]]:
    """`count` texts of six words of their topic, in a CSV; returns (text, topic) of each."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        kind = list(WORDS)[number % 3]
        rows.append((f"{' '.join(rng.choice(WORDS[kind], 6))} {number}", kind))
    columns = [*(["id"] if ids else []), "body", *([label] if label else []), "source"]
    table = [
        [*([f"t{k}"] if ids else []), text, *([kind] if label else []), f"s{k // 3 % 3}"]
        for k, (text, kind) in enumerate(rows)
    ]
    write_labels(path, table, columns)
    return rows


def write_rows(path: Path, count: int = 30, label: str | None = "species") -> list[dict[str, str]]:
    """`count` flowers of three species: two measurements, a colour and a date, with gaps, in a CSV."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        kind = number % 3
        row = {
            "length": f"{rng.normal(3 * kind, 0.5):.3f}" if number % 7 else "",
            "width": f"{rng.normal(-2 * kind, 0.5):.3f}",
            "colour": ["red", "blue", "white"][kind if number % 5 else 0],
            "found": f"2024-0{kind + 1}-{number % 27 + 1:02d}",
            "unit": "cm",
            "site": f"s{number // 3 % 3}",
        }
        if label:
            row[label] = ["setosa", "versicolor", "virginica"][kind]
        rows.append(row)
    write_labels(path, [list(row.values()) for row in rows], list(rows[0]))
    return rows
