"""Finding, running and recording claims, and the command."""

from __future__ import annotations

import json
import textwrap
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from unfused.claims import _runner
from unfused.claims.lab import Lab
from unfused.cli.main import make_app

CLAIM = '''
"""Toy learning beats no learning
by a good deal."""


def claim(lab):
    numbers = [lab.cached("toy", {"seed": seed}, lambda: 0.8 + seed / 100) for seed in lab.seeds]
    lab.has("fsdd")
    return [
        lab.verdict(metric="m", method=numbers, baselines={"none": [b for _ in numbers]}, rule="r", world=w)
        for w, b in (("one", 0.1), ("two", 0.9))
    ]
'''


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A package with one claim, `toy_method`, one that fails, and its method."""
    package = tmp_path / "src" / "unfused"
    for folder in ("claims", "label"):
        (package / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    (package / "claims" / "toy_method.py").write_text(CLAIM)
    (package / "claims" / "sick.py").write_text(
        '"""It breaks."""\ndef claim(lab):\n    raise RuntimeError("no luck")\n'
    )
    (package / "claims" / "helper.py").write_text('"""No claim."""\n')
    (package / "label" / "toy_method.py").write_text(
        textwrap.dedent('"""Toy: it plays.\n\nReference: Somebody, 2020.\nNeeds: labels.\n"""')
    )
    monkeypatch.setattr(_runner, "PACKAGE", package)
    monkeypatch.setattr(_runner, "RESULTS", package / "claims" / "results")
    monkeypatch.setenv("UNFUSED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNFUSED_DATA", str(tmp_path / "nothing"))

    def load(name):
        scope = {}
        path = package / "claims" / f"{name.rpartition('.')[2]}.py"
        exec(compile(path.read_text(), str(path), "exec"), scope)
        return SimpleNamespace(claim=scope["claim"])

    monkeypatch.setattr(_runner, "importlib", SimpleNamespace(import_module=load))
    return package


def test_finds_claims_and_their_methods(house):
    sick, toy = _runner.find()
    assert (toy.slug, toy.name, toy.sentence) == (
        "toy-method",
        "Toy",
        "Toy learning beats no learning by a good deal.",
    )
    assert list(toy.digests()) == ["label/toy_method.py", "claims/toy_method.py"]
    assert (sick.slug, list(sick.digests())) == ("sick", ["claims/sick.py"])
    assert _runner.find(["toy_method"]) == _runner.find(["toy-method"]) == [toy]
    with pytest.raises(ValueError, match="no claim is called nope: choose among sick, toy-method"):
        _runner.find(["nope"])


def test_records_desk_runs_and_says_when_they_are_stale(house):
    verdicts, failures = _runner.run(["toy-method"])
    assert [v.holds for v in verdicts] == [True, False] and not failures
    (toy,) = _runner.find(["toy-method"])
    record = toy.recorded()
    assert record["verdict"] == "holds on one; refuted on two" and len(record["sections"]) == 2
    assert record["sections"][0]["method"]["values"] == pytest.approx(
        {str(i): 0.8 + i / 100 for i in range(5)}
    )
    assert [_runner.stale(s) for s in record["sections"]] == [[], []]
    source = house / "label" / "toy_method.py"
    source.write_text(source.read_text() + "\nx = 1\n")
    assert _runner.stale(record["sections"][0]) == ["label/toy_method.py"]
    source.unlink()
    assert _runner.stale(record["sections"][0]) == ["label/toy_method.py"]


def test_sections_that_were_not_run_are_kept(house):
    (toy,) = _runner.find(["toy-method"])
    _runner.run(["toy-method"])
    gpu = Lab("gpu", seeds=2, slug="toy-method").verdict(
        metric="m", method=[1.0], baselines={}, rule="r", world="one"
    )
    path = _runner.record(toy, [gpu])
    sections = json.loads(path.read_text())["sections"]
    assert [(s["scale"], s["world"]) for s in sections] == [("desk", "one"), ("desk", "two"), ("gpu", "one")]


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"scale": "smoke"}, False),
        ({"seeds": 3}, False),
        ({"recording": False}, False),
        ({"seeds": 3, "recording": True}, True),
    ],
)
def test_what_is_recorded(house, options, recorded):
    _runner.run(["toy-method"], **options)
    assert (house / "claims" / "results" / "toy-method.json").exists() == recorded


def test_results_go_to_the_working_folder_outside_a_checkout(house, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").unlink()
    monkeypatch.chdir(tmp_path)
    _runner.run(["toy-method"])
    assert (tmp_path / "claims-results" / "toy-method.json").is_file()
    assert _runner.find(["toy-method"])[0].recorded()["slug"] == "toy-method"


def test_a_failing_claim_does_not_stop_the_next(house):
    verdicts, failures = _runner.run(scale="smoke")
    assert len(verdicts) == 2 and failures == {"sick": "RuntimeError: no luck"}


def test_a_claim_whose_world_is_absent_is_skipped(house):
    (house / "claims" / "away.py").write_text(
        '"""Needs data."""\ndef claim(lab):\n    return lab.world("fsdd")\n'
    )
    found, skipped = _runner.find(["away"])[0].run(scale="smoke")
    assert found == [] and "UNFUSED_DATA" in skipped["fsdd"]


def test_command_runs_lists_and_fails(house):
    app, cli = make_app(), CliRunner()
    done = cli.invoke(app, ["claims", "toy_method", "--scale", "smoke", "--seeds", "3", "--json"])
    assert done.exit_code == 0 and [v["world"] for v in json.loads(done.stdout)] == ["one", "two"]
    listed = cli.invoke(app, ["claims", "--list", "--json"])
    assert {row["slug"]: row["verdict"] for row in json.loads(listed.stdout)} == {
        "sick": "not run",
        "toy-method": "not run",
    }
    done = cli.invoke(app, ["claims"])
    assert done.exit_code == 1 and "toy-method on two: REFUTED (desk, 5 seeds" in done.stdout
    assert "claim sick did not finish: RuntimeError: no luck" in done.stderr
    listed = cli.invoke(app, ["claims", "--list"])
    assert "toy-method" in listed.stdout and "refuted" in listed.stdout
    (house / "claims" / "toy_method.py").write_text(CLAIM + "\n")
    assert "stale: claims/toy_method.py changed since" in cli.invoke(app, ["claims", "--list"]).stdout


def test_user_mistakes(house):
    with pytest.raises(ValueError, match="scale='big'"):
        _runner.run(scale="big")
    with pytest.raises(ValueError, match="smoke run is no result"):
        _runner.run(scale="smoke", recording=True)
