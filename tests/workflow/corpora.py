"""Small corpora and settings for tests of whole runs."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import killing
import numpy as np
import soundfile
from PIL import Image

RATE = 8000
CLASSES = ("high", "low", "mid")
TINY: dict[str, Any] = dict(
    width=4, pretrain_steps=3, distil_steps=3, fine_tune_steps=3, clusters=4, method="unfused,classic"
)

TINY_WORDS = "--width 4 --pretrain-steps 3 --distil-steps 3 --fine-tune-steps 3 --clusters 4".split()
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


def whole_run(source: str, folder: str, options: dict[str, Any], place: str = "", change: int = 0) -> None:
    """A run in `folder/runs` with a checkpoint after each step; dead at a change of a file below `place` of its folder."""
    import torch

    from unfused import adapt
    from unfused.train.engine import Engine

    left = change

    def changed(path: str) -> None:
        nonlocal left
        below = path.removeprefix(os.path.join(folder, "runs", Path(source).stem, ""))
        if below.startswith((place, f".{place}")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), 9)

    if place:
        killing.watch_changes(folder, changed)
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # what a killed process has written, the system keeps
    Engine._save_is_due = lambda self, now, record: True  # type: ignore[method-assign]
    adapt(source, output=os.path.join(folder, "runs"), **TINY | options)


def assert_resumes(source: Path, folder: Path, options: dict[str, Any]) -> None:
    """Dead at changes of files all through the run; in the end every bit is as if nothing had been."""
    forks = killing.Forks(IMPORTS)
    forks.run(whole_run, str(source), str(folder / "whole"), options, timeout=600)
    generator = random.Random(0)
    for place in ("stages/windows", "stages/pretrain", "stages/unfused", "model"):
        assert forks.died(
            whole_run,
            str(source),
            str(folder / "killed"),
            options,
            place,
            generator.randint(1, 2),
            timeout=600,
        )
    forks.run(whole_run, str(source), str(folder / "killed"), options, timeout=600)
    whole, killed = (_outcome(folder / name / "runs" / source.stem) for name in ("whole", "killed"))
    assert whole == killed and any(name.endswith("model.safetensors") for name in whole)


def _outcome(run: Path) -> dict[str, Any]:
    suffixes = (".safetensors", ".npy", "columns.json", "tokenizer.json", "pseudo_labels.csv")
    files = sorted(path for path in run.rglob("*") if path.name.endswith(suffixes))
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in files} | {"metrics": results(run)}
