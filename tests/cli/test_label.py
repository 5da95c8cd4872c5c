from __future__ import annotations

import pytest
from typer.testing import CliRunner

from unfused.cli.main import make_app
from unfused.data.files import write_csv


@pytest.fixture
def run(tmp_path):
    rows = [
        ("a b.wav", "", 3, "middle of a cluster of 9"),
        ("b.wav", "dog", 1, "uncertain"),
        ("c.wav", "", 2, "uncertain"),
    ]
    write_csv(tmp_path / "to_label.csv", ("path", "label", "cluster", "reason"), rows)
    return tmp_path


def test_shows_what_is_still_unlabelled_in_order(run):
    result = CliRunner().invoke(make_app(), ["label", str(run)])
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if "\t" in line]
    assert lines == ["a b.wav\tmiddle of a cluster of 9", "c.wav\tuncertain"]


def test_count(run):
    result = CliRunner().invoke(make_app(), ["label", str(run), "-n", "1"])
    assert [line for line in result.stdout.splitlines() if "\t" in line] == [
        "a b.wav\tmiddle of a cluster of 9"
    ]


def test_a_folder_without_a_queue_is_named(tmp_path):
    result = CliRunner().invoke(make_app(), ["label", str(tmp_path)])
    assert isinstance(result.exception, ValueError) and "to_label.csv" in str(result.exception)
