"""The console summary fits one screen and shows names as they are."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from rich.console import Console

from unfused.workflow.report import ReportData
from unfused.workflow.summary import print_summary


def said(data: ReportData, folder: Path | None = None, width: int = 80) -> str:
    out = io.StringIO()
    print_summary(data, Console(file=out, width=width), folder)
    return out.getvalue()


def row(mean: float, half: float = 0.02) -> dict:
    return {
        "accuracy": {"mean": mean, "interval": [mean - half, mean + half], "seeds": [mean] * 5},
        "seconds": 92.0,
    }


READ = ReportData(
    title="birds",
    summary={"modality": "audio", "files": 1204, "usable": 1200, "labelled": 50, "classes": 10, "groups": 4},
    quarantine=[
        ("[red]a[/red].wav", "empty file"),
        ("b.wav", "not audio: text"),
        ("c.wav", "not audio: zip"),
    ],
)


def test_after_reading() -> None:
    text = said(READ)
    assert text.splitlines()[:2] == [
        "birds",
        "files 1,204 · recordings 1,200 · labels 50 · classes 10 · groups 4",
    ]
    assert "2 not audio, 1 empty file" in text and "accuracy" not in text


def test_at_the_end_it_is_one_screen(tmp_path: Path) -> None:
    names = ("unfused", "fine-tune", "linear-probe", "scratch", "classic", "ceiling")
    methods = {name: row(0.5 + 0.08 * i) for i, name in enumerate(names[::-1])}
    paired = [{"a": "unfused", "b": b, "mean": 0.1, "interval": [0.05, 0.15], "n": 5} for b in names[1:]]
    (tmp_path / "report.html").touch()
    text = said(dataclasses.replace(READ, methods=methods, paired=paired), tmp_path)
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, text.replace(str(tmp_path), "").splitlines())) <= 80
    order = [line.split()[0] for line in lines if "●" in line]
    assert order == ["ceiling", *names[:-1]]
    assert "0.900   0.880 to 0.920" in text
    assert "unfused is above scratch by 0.100 (0.050 to 0.150) over 5 paired draws" in text
    assert "report.html" in text and "to_label.csv" not in text.splitlines()[-1]


def test_without_labels_it_says_what_to_do() -> None:
    queue = [{"rank": i, "path": f"[b]{i}.wav", "reason": "uncertain"} for i in range(1, 51)]
    text = said(dataclasses.replace(READ, summary={**READ.summary, "labelled": 0}, to_label=queue))
    assert "No labels yet" in text and "[b]1.wav" in text and "and 45 more" in text


def test_equal_or_missing_numbers_do_no_harm() -> None:
    none = {"accuracy": {"mean": None, "interval": None, "seeds": []}, "seconds": None}
    assert "–" in said(dataclasses.replace(READ, methods={"unfused": none}))
    assert "●" in said(dataclasses.replace(READ, methods={"unfused": row(0.5, 0.0)}))
