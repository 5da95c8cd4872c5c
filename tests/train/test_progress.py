"""Progress: lines without a terminal, bars on one, and the time left."""

from __future__ import annotations

import io

import pytest

from unfused.train import progress as module
from unfused.train.progress import StageProgress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_line_every_ten_seconds(clock):
    out = io.StringIO()
    with StageProgress(out) as progress:
        with progress.stage("pretrain", total=800) as stage:
            for done in range(0, 201, 10):
                stage.update(done, loss=2.34567, K=32)
                clock.now += 1.0
        progress.print("a line [of its] own")
    assert out.getvalue().splitlines() == [
        "pretrain: 100 of 800 (12%), 1 min 10 s left, loss 2.35, K 32",
        "pretrain: 200 of 800 (25%), 1 min left, loss 2.35, K 32",
        "pretrain: done in 21 s, loss 2.35, K 32",
        "a line [of its] own",
    ]


def test_a_resumed_stage_knows_its_own_rate(clock):
    with StageProgress(io.StringIO()) as progress, progress.stage("distil") as stage:
        assert stage.seconds_left() is None
        stage(500, 1000, 1.0)
        assert stage.seconds_left() is None
        clock.now += 10
        stage(600, 1000, 1.0)
        assert stage.seconds_left() == pytest.approx(40)


def test_an_error_stops_the_stage(clock):
    out = io.StringIO()
    with pytest.raises(RuntimeError), StageProgress(out) as progress, progress.stage("read", 10) as stage:
        stage.update(3)
        raise RuntimeError
    assert out.getvalue() == "read: stopped in 0 s\n"


def test_unknown_total_and_double_close(clock):
    out = io.StringIO()
    with StageProgress(out, every=0) as progress, progress.stage("scan") as stage:
        stage.update(1234)
        stage.close()
    assert out.getvalue().splitlines() == ["scan: 1,234", "scan: done in 0 s"]


def test_bars_on_a_terminal():
    out = Terminal()
    with StageProgress(out) as progress, progress.stage("pre[bold]train", total=4) as stage:
        stage.update(2, loss=0.5)
        progress.print("[red]shown as it is")
    text = out.getvalue()
    assert "pre[bold]train" in text and "done in 0 s, loss 0.5" in text and "[red]shown as it is" in text


@pytest.mark.parametrize(
    "seconds, words",
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3599.7, "1 h"),
        (3600, "1 h"),
        (5430, "1 h 30 min"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words
