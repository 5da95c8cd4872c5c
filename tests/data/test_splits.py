from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.data.manifest import Manifest
from unfused.data.splits import few_shot, hold_out, validation_split

few_examples = settings(max_examples=60, deadline=None)

labels = st.lists(st.sampled_from(["dog", "cat", "owl", None]), min_size=4, max_size=60)
grouped = st.lists(
    st.tuples(st.sampled_from(["dog", "cat", None]), st.sampled_from([*"abcdefgh", None])),
    min_size=4,
    max_size=60,
)
fractions = st.floats(0.05, 0.95)
seeds = st.integers(0, 2**31)


def corpus(labels: list, groups: list | None = None, split: list | None = None) -> Manifest:
    n = len(labels)
    paths = [f"{k:03d}.wav" for k in range(n)]
    return Manifest(Path("/data"), paths, labels, groups or [None] * n, split or [None] * n)


@few_examples
@given(labels, fractions, seeds)
def test_a_fraction_of_each_class(labels: list, fraction: float, seed: int) -> None:
    manifest = corpus(labels)
    sizes = Counter(label for label in labels if label is not None)
    try:
        chosen = hold_out(manifest, fraction, seed)
    except ValueError:
        # Nothing may be taken where all classes are single, or where the fraction rounds to no file.
        assert max(sizes.values(), default=0) <= 1 or round(fraction * sizes.total()) == 0
        return
    taken = Counter(label for label, c in zip(labels, chosen, strict=True) if c)
    assert None not in taken
    for name, size in sizes.items():
        # a whole one more where classes of a single file, which cannot give theirs, leave the total short
        assert abs(taken[name] - fraction * size) <= 1 + 1e-9 and taken[name] < size
    room = sum(size > 1 for size in sizes.values())
    if room == len(sizes) and all(fraction * size <= size - 1 for size in sizes.values()):
        assert taken.total() == round(fraction * sizes.total())


@few_examples
@given(labels, fractions, seeds, st.randoms())
def test_neither_order_nor_repetition_matters(labels: list, fraction: float, seed: int, random) -> None:
    manifest = corpus(labels)
    order = list(range(len(labels)))
    random.shuffle(order)
    try:
        chosen = hold_out(manifest, fraction, seed)
    except ValueError:
        return
    assert np.array_equal(hold_out(manifest, str(fraction), seed), chosen)
    assert np.array_equal(hold_out(manifest.select(np.array(order)), fraction, seed), chosen[order])


@few_examples
@given(grouped, fractions, seeds, st.randoms())
def test_no_group_is_on_both_sides(rows: list, fraction: float, seed: int, random) -> None:
    labels, groups = [row[0] for row in rows], [row[1] for row in rows]
    if all(group is None for group in groups):
        return
    manifest = corpus(labels, groups)
    try:
        chosen = hold_out(manifest, fraction, seed)
    except ValueError:
        return
    held = {group for group, c in zip(groups, chosen, strict=True) if c} - {None}
    left = {group for group, c in zip(groups, chosen, strict=True) if not c} - {None}
    assert not held & left
    # Something to test on, and of every class something to learn from.
    assert any(label is not None for label, c in zip(labels, chosen, strict=True) if c)
    assert {label for label, c in zip(labels, chosen, strict=True) if not c} >= set(labels) - {None}
    order = list(range(len(rows)))
    random.shuffle(order)
    assert np.array_equal(hold_out(manifest.select(np.array(order)), fraction, seed), chosen[order])


def test_groups_come_close_to_the_fraction_and_balance() -> None:
    generator = np.random.default_rng(0)
    groups = [f"g{k}" for k in generator.integers(40, size=2000)]
    labels = [("dog", "cat", "owl")[k] for k in generator.choice(3, 2000, p=[0.6, 0.3, 0.1])]
    for seed in range(5):
        chosen = hold_out(corpus(labels, groups), 0.2, seed)
        assert abs(chosen.mean() - 0.2) < 0.02
        for name in ("dog", "cat", "owl"):
            assert abs(chosen[np.array(labels) == name].mean() - 0.2) < 0.06
    assert not np.array_equal(chosen, hold_out(corpus(labels, groups), 0.2, 0))


def test_a_group_per_class_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="without taking all labels of a class with it"):
        hold_out(corpus(["dog", "dog", "cat", "cat"], ["a", "a", "b", "b"]), 0.5)


def test_a_file_that_is_added_moves_few_others() -> None:
    labels = ["dog", "cat"] * 100
    before = hold_out(corpus(labels), 0.2)
    after = hold_out(corpus([*labels, "dog"]), 0.2)[:200]
    assert (before != after).sum() <= 2


def test_by_name() -> None:
    manifest = corpus(["x", "y", "x", "y"], ["ann", "bob", "a,b", None], ["train", "test", None, "train"])
    assert hold_out(manifest, "speaker=ann").tolist() == [True, False, False, False]
    assert hold_out(manifest, "anything=ann,bob").tolist() == [True, True, False, False]
    assert hold_out(manifest, "speaker = a,b").tolist() == [False, False, True, False]
    assert hold_out(manifest, "Split=test").tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="no file has speaker 'eve'; there are 'a,b', 'ann', 'bob'"):
        hold_out(manifest, "speaker=eve")
    with pytest.raises(ValueError, match="no groups are named; give group="):
        hold_out(corpus(["x", "y"]), "speaker=ann")
    with pytest.raises(ValueError, match="the data comes with no split"):
        hold_out(corpus(["x", "y"]), "split=test")


def test_by_list(tmp_path: Path) -> None:
    manifest = corpus(["x", "y", "x", "y"], ["a", "a", "b", None])
    (tmp_path / "test.txt").write_text("002.wav\r\n\n003.wav\n")
    assert hold_out(manifest, tmp_path / "test.txt").tolist() == [False, False, True, True]
    (tmp_path / "test.csv").write_text("label,Filename\nx,000.wav\ny,/data/001.wav\n")
    assert hold_out(manifest, str(tmp_path / "test.csv")).tolist() == [True, True, False, False]
    (tmp_path / "test.txt").write_text("000.wav\n")
    with pytest.raises(ValueError, match="divides 1 groups, such as 'a': list all of their files"):
        hold_out(manifest, tmp_path / "test.txt")
    (tmp_path / "test.txt").write_text("9.wav\n")
    with pytest.raises(ValueError, match="name no file"):
        hold_out(manifest, tmp_path / "test.txt")


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (1.5, "a fraction must lie between 0 and 1"),
        ("0", "a fraction must lie between 0 and 1"),
        ("nan", "a fraction must lie between 0 and 1"),
        ("speaker", "is no fraction, no file and not GROUP=VALUE"),
        (0.01, "no file would be held out"),
        ("split=train", "no file would be left to learn from"),
    ],
)
def test_messages(test: float | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hold_out(corpus(["x", "y", "x", "y"], split=["train"] * 4), test)
    with pytest.raises(ValueError, match="there are no labels"):
        hold_out(corpus([None, None]), 0.5)


@few_examples
@given(labels, st.integers(1, 9), seeds)
def test_few_shot(labels: list, per_class: int, seed: int) -> None:
    eligible = np.arange(len(labels)) % 3 > 0
    chosen = few_shot(labels, per_class, seed, eligible)
    there = Counter(label for label, e in zip(labels, eligible, strict=True) if e and label is not None)
    taken = Counter(label for label, c in zip(labels, chosen, strict=True) if c)
    assert taken == {name: min(per_class, count) for name, count in there.items()}
    assert not (chosen & ~eligible).any()
    assert np.array_equal(chosen, few_shot(labels, per_class, seed, eligible))
    assert not (chosen & ~few_shot(labels, per_class + 1, seed, eligible)).any()
    renamed = ["zebra" if label is None else label for label in labels]
    others = few_shot(renamed, per_class, seed, eligible) & (np.array(renamed) != "zebra")
    assert np.array_equal(others, chosen)


def test_few_shot_is_uniform() -> None:
    counts = sum(few_shot(["dog"] * 20, 5, seed) for seed in range(2000))
    assert (np.abs(counts / 2000 - 0.25) < 0.04).all()
    with pytest.raises(ValueError, match="per_class=0"):
        few_shot(["dog"], 0)


@few_examples
@given(grouped, st.floats(0, 0.9), seeds)
def test_validation_split(rows: list, fraction: float, seed: int) -> None:
    rows = [row for row in rows if row[0] is not None]
    labels, groups = [row[0] for row in rows], [row[1] for row in rows]
    chosen = validation_split(labels, groups, fraction, seed)
    assert chosen.shape == (len(rows),) and chosen.dtype == bool
    assert {label for label, c in zip(labels, chosen, strict=True) if not c} == set(labels)
    assert np.array_equal(chosen, validation_split(labels, groups, fraction, seed))


def test_validation_takes_whole_groups_where_it_can() -> None:
    labels = ["dog", "cat"] * 15
    groups = [f"g{k % 5}" for k in range(30)]
    chosen = validation_split(labels, groups, 0.2)
    assert chosen.sum() == 6 and len({g for g, c in zip(groups, chosen, strict=True) if c}) == 1
    # A single group cannot be divided whole: then the classes are.
    assert validation_split(labels, ["one"] * 30, 0.2).sum() == 6
    with pytest.raises(ValueError, match="fraction=1 must be"):
        validation_split(labels, groups, 1)
