"""The bench: estimates, verdicts, the cache, the worlds."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unfused.claims.lab import Lab, Verdict, estimate, paired
from unfused.claims.lab.sources import PACKAGE, code_hash
from unfused.claims.lab.worlds import Absent
from unfused.nn.log_mel import FrontEnd


@pytest.fixture
def lab(tmp_path):
    return Lab("smoke", cache_dir=tmp_path / "cache", slug="some-method", sentence="It is better.")


# --- numbers ---------------------------------------------------------------------------------------------


def test_t_interval_is_scipys():
    values = [0.61, 0.72, 0.55, 0.8]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(estimate(values).interval, [expected.low, expected.high])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
@settings(max_examples=30, deadline=None)
def test_intervals_hold_the_mean(values):
    for method in ("t", "bootstrap"):
        found = estimate(values, method)
        assert found.interval[0] - 1e-9 <= found.mean <= found.interval[1] + 1e-9


def test_bootstrap_is_reproducible_and_close_to_t():
    values = np.random.default_rng(0).normal(size=200)
    one, two = estimate(values, "bootstrap"), estimate(values, "bootstrap")
    assert one.interval == two.interval
    np.testing.assert_allclose(one.interval, estimate(values).interval, atol=0.02)


def test_a_single_number_has_no_interval():
    assert estimate([0.5]).interval is None and estimate(0.5).mean == 0.5
    assert str(estimate([0.5])) == "0.500"


def test_over_groups_or_seeds_averages_first():
    values = {"ann": [0.1, 0.2, 0.3], "bob": [0.7, 0.8, 0.9]}
    assert estimate(values).by_group() == pytest.approx({"ann": 0.2, "bob": 0.8})
    np.testing.assert_allclose(estimate(values, over="groups").interval, estimate([0.2, 0.8]).interval)
    np.testing.assert_allclose(estimate(values, over="seeds").interval, estimate([0.4, 0.5, 0.6]).interval)
    assert estimate(values, over="seeds").mean == pytest.approx(0.5)


def test_pairing_takes_out_what_units_have_in_common():
    hard, easy = np.array([0.1, 0.5, 0.9]), np.array([0.12, 0.52, 0.92])
    gain = paired(easy, hard)
    assert gain.mean == pytest.approx(0.02) and gain.interval[0] > 0.019
    with pytest.raises(ValueError, match="not paired"):
        paired({"ann": [0.1]}, {"bob": [0.1]})


@pytest.mark.parametrize(
    ("values", "how", "message"),
    [
        ([], {}, "empty"),
        ([0.1, float("nan")], {}, "not finite at \\['1'\\]"),
        ([0.1, 0.2], {"method": "z"}, "method='z'"),
        ([0.1, 0.2], {"over": "days"}, "over='days'"),
    ],
)
def test_mistakes_in_numbers_are_named(values, how, message):
    with pytest.raises(ValueError, match=message):
        estimate(values, **how)


# --- verdicts --------------------------------------------------------------------------------------------


def verdict_of(lab, **changes):
    options = {
        "metric": "accuracy",
        "method": {"ann": [0.8, 0.82], "bob": [0.7, 0.73]},
        "baselines": {
            "scratch": {"ann": [0.6, 0.63], "bob": [0.5, 0.52]},
            "probe": {"ann": [0.7, 0.8], "bob": [0.71, 0.7]},
        },
        "rule": "the interval of the gain over any baseline reaches 0",
        "world": "fsdd",
        "name": "Some Method",
        "ablations": {
            "clusters": {"K = 10": [0.5, 0.6], "K = 32": {"ann": [0.7, 0.7], "bob": [0.6, 0.6]}},
            "cost": {"student": {"weights": 5321856, "seconds": 3.5, "kept": "yes"}},
        },
        "notes": ["one note"],
    }
    return lab.verdict(**(options | changes))


def test_verdict_holds_only_above_every_baseline(lab):
    assert not verdict_of(lab).holds
    assert verdict_of(lab, baselines={"scratch": {"ann": [0.6, 0.63], "bob": [0.5, 0.52]}}).holds
    assert verdict_of(lab, holds=True).holds


def test_lower_is_better_turns_the_gain_round(lab):
    verdict = lab.verdict(
        metric="loss", method=[1.0, 1.1], baselines={"b": [2.0, 2.1]}, rule="r", higher_is_better=False
    )
    assert verdict.differences["b"].mean == pytest.approx(1.0) and verdict.holds


def test_verdict_survives_json(lab):
    verdict = verdict_of(lab)
    assert Verdict.from_dict(json.loads(verdict.to_json())) == verdict
    assert verdict.slug == "some-method" and verdict.claim == "It is better." and verdict.versions["torch"]


def test_tables_show_arms_groups_and_ablations(lab):
    from rich.console import Console

    verdict = verdict_of(lab)
    arms, clusters, cost = verdict.tables()
    assert arms[1][3:] == ["ann", "bob"] and arms[2][0][0] == "Some Method"
    assert clusters[2][1] == ["K = 32", "0.650 [0.558, 0.742]"]
    assert cost[1:] == (["", "weights", "seconds", "kept"], [["student", "5,321,856", "3.500", "yes"]])
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(verdict.table())
    text = console.export_text()
    assert "some-method (Some Method) on fsdd: it runs; a smoke run is no result" in text
    assert (
        "REFUTED (desk" in replace(verdict, scale="desk").summary()
        and "refuted if the interval" in text
        and "one note" in text
    )


def test_a_rule_is_asked_for(lab):
    with pytest.raises(ValueError, match="rule is empty"):
        verdict_of(lab, rule="")


# --- lab -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "seeds"),
    [([0.5, 0.6, 0.7], 3), ({"a": [0.5, 0.6], "b": [0.7, 0.8]}, 2), ({"a": 0.5, "b": 0.6}, 5)],
)
def test_a_verdict_counts_the_seeds_it_has(tmp_path, values, seeds):
    lab = Lab("desk", cache_dir=tmp_path)
    assert (
        lab.verdict(metric="accuracy", method=values, baselines={}, rule="never", holds=True).seeds == seeds
    )


def test_sizes_seeds_and_mistakes(tmp_path):
    assert Lab("desk").pick(smoke=1, desk=2) == 2 and Lab("gpu").pick(smoke=1, desk=2) == 2
    assert list(Lab("desk").seeds) == [0, 1, 2, 3, 4] and list(Lab("desk", seeds=2).seeds) == [0, 1]
    assert Lab("desk").device == "cpu"
    for bad, message in (
        ({"scale": "huge"}, "scale='huge'"),
        ({"seeds": 0}, "seeds=0"),
        ({"data_dir": "/no/such"}, "data="),
    ):
        with pytest.raises(ValueError, match=message):
            Lab(**bad)


def test_cached_computes_once_and_returns_what_it_saved(lab):
    calls = []

    def compute():
        calls.append(1)
        return {
            "tensor": torch.ones(2, dtype=torch.bfloat16),
            "array": np.arange(6).reshape(2, 3)[:, ::2],
            "list": (1, 2.5, None, "word", True, np.float32(0.5)),
        }

    for _ in range(2):
        value = lab.cached("thing", {"seed": 1, "names": ["a"]}, compute)
        assert value["tensor"].dtype == torch.bfloat16 and value["array"].tolist() == [[0, 2], [3, 5]]
        assert value["list"] == [1, 2.5, None, "word", True, 0.5]
    assert len(calls) == 1
    lab.cached("thing", {"seed": 2, "names": ["a"]}, compute)
    assert len(calls) == 2


def test_a_damaged_cache_file_is_computed_again(lab):
    assert lab.cached("thing", {}, lambda: np.ones(3)).sum() == 3
    (file,) = lab.cache_dir.glob("thing-*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    assert lab.cached("thing", {}, lambda: np.zeros(3)).sum() == 0


def test_time_taken_from_the_cache_counts(lab, monkeypatch):
    from unfused.claims import lab as module

    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def slow():
        now[0] += 100
        return 1

    for _ in range(2):
        fresh = Lab("smoke", cache_dir=lab.cache_dir)
        fresh.cached("slow", {}, slow)
        assert 100 <= fresh.verdict(metric="m", method=[1.0], baselines={}, rule="r").seconds < 200


def test_params_must_be_plain(lab):
    with pytest.raises(TypeError, match="params of 'thing'"):
        lab.cached("thing", {"model": torch.nn.Linear(1, 1)}, lambda: 1)
    with pytest.raises(TypeError, match="neither JSON nor an array"):
        lab.cached("thing", {}, lambda: object())


def test_code_hash_follows_imports_and_ignores_comments(tmp_path):
    one, two, three, four = (tmp_path / f"{n}.py" for n in range(4))
    one.write_text('"""Doc."""\nx = 1  # a comment\n')
    two.write_text('"""Other doc."""\n\nx = 1\n')
    three.write_text("x = 2\n")
    four.write_text("def f():\n    from unfused.pretrain import UnFuSeD\nx = 1\n")
    assert code_hash(one) == code_hash(two) != code_hash(three)
    from unfused.claims.lab.sources import _imports

    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    assert code_hash(broken) not in (code_hash(one), code_hash(three))
    assert PACKAGE / "pretrain" / "unfused.py" in _imports(four)
    assert PACKAGE / "nn" / "losses.py" in _imports(PACKAGE / "pretrain" / "unfused.py")


# --- worlds ----------------------------------------------------------------------------------------------


def test_sample_and_digits_are_everywhere(lab):
    sample, digits = lab.world("sample"), lab.world("digits")
    assert (len(sample), len(sample.classes), len(set(sample.groups))) == (720, 10, 36)
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.max() == 1
    few = sample.select(np.arange(6))
    mels = few.log_mels(FrontEnd(n_mels=40, trim_db=30))
    assert len(mels) == 6 and all(mel.shape[0] == 40 for mel in mels)


def test_absent_worlds_are_skipped_with_a_reason(tmp_path):
    lab = Lab("smoke", data_dir=tmp_path, cache_dir=tmp_path)
    assert not lab.has("fsdd") and str(tmp_path) in lab.skipped["fsdd"]
    with pytest.raises(Absent, match="UNFUSED_DATA"):
        lab.world("esc10")
    with pytest.raises(ValueError, match="world='mars'"):
        lab.world("mars")


@pytest.mark.parametrize(("name", "clips", "groups"), [("fsdd", 2000, 4), ("esc10", 320, 4)])
def test_real_worlds(lab, name, clips, groups):
    if not lab.has(name):
        pytest.skip(lab.skipped[name])
    world = lab.world(name)
    assert (len(world), len(world.classes), len(set(world.groups))) == (clips, 10, groups)
