"""The generator of docs/."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from unfused.catalog import methods
from unfused.claims import _runner
from unfused.claims.lab import Lab

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", REPOSITORY / "tools" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_docs"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record():
    lab = Lab("desk", slug="some", sentence="It is better.")
    verdict = lab.verdict(
        metric="accuracy",
        method={"ann": [0.8, 0.82], "bob": [0.7, 0.73]},
        baselines={
            "a | b": {"ann": [0.6, 0.63], "bob": [0.5, 0.52]},
            "probe": {"ann": [0.7, 0.8], "bob": [0.71, 0.7]},
        },
        rule="it is not",
        world="fsdd",
        ablations={"clusters": {"K = 10": [0.5, 0.6]}},
    )
    section = {**verdict.to_dict(), "sources": {"catalog.py": "0" * 40}}
    return {"slug": "some", "claim": "It is better.", "verdict": "refuted", "sections": [section]}


def test_writes_a_page_a_method_and_says_when_they_are_out_of_date(make_docs, tmp_path, capsys):
    out = tmp_path / "docs"
    assert make_docs.main(["--out", str(out), "--check"]) == 1
    (out / "methods").mkdir(parents=True)
    (out / "methods" / "gone.md").write_text(make_docs.MARK + "# Gone\n")
    (out / "methods" / "kept.md").write_text("# By hand\n")
    (tmp_path / "README.md").write_text(
        "before\n<!-- claims:begin -->\nOUTDATED TEXT\n<!-- claims:end -->\nafter\n"
    )
    assert make_docs.main(["--out", str(out)]) == 0
    assert {p.stem for p in (out / "methods").glob("*.md")} == {m.slug for m in methods()} | {"kept"}
    assert (out / "claims.md").is_file() and (out / "index.md").is_file()
    readme = (tmp_path / "README.md").read_text()
    assert (
        readme.startswith("before\n<!-- claims:begin -->\n")
        and "OUTDATED TEXT" not in readme
        and readme.endswith("after\n")
    )
    assert make_docs.main(["--out", str(out), "--check"]) == 0
    (out / "index.md").write_text("changed")
    assert make_docs.main(["--out", str(out), "--check"]) == 1
    assert "index.md: not up to date" in capsys.readouterr().err


def test_method_page_holds_the_docstring_and_the_interface(make_docs):
    (method,) = [m for m in methods() if m.slug == "linear-probe"]
    page = make_docs.method_page(method, None)
    assert page.startswith("# Linear probe\n") and "None: a baseline." in page
    assert (
        "```python\nfit_linear_probe(features: Any, labels: Any, seed: int=0, groups: Any=None)\n```" in page
    )
    assert "- `features`: array of shape (n, d)\n  Standardised here, per dimension." in page
    assert "---\n" not in page.replace("| --- ", "")  # no underlined headings are left


def test_claims_are_shown_with_rule_numbers_and_staleness(make_docs, record):
    text = "\n\n".join(make_docs.verdict_text(record))
    assert "> It is better." in text and "some is **refuted** on fsdd. Refuted if it is not." in text
    assert "| arm | accuracy | gain of the method over it | ann | bob |" in text
    assert "a \\| b" in text and "**clusters**" in text and "| K = 10 | 0.550" in text
    assert "**stale**: catalog.py changed since" in text
    line = make_docs.summary_table({"some": record}, "methods/").splitlines()[-1]
    assert (
        line.startswith("| [some](methods/some.md) | fsdd | **refuted** (stale) | 0.763")
        and "| probe " in line
    )


def test_every_recorded_result_can_be_shown(make_docs):
    for claim in _runner.find():
        if record := claim.recorded(_runner.RESULTS):
            assert make_docs.verdict_text(record)


def test_prose_and_numpydoc(make_docs):
    text = make_docs.prose("As Bayes says:\n    w = 1\n    b = 2\nand so on.\n\n1. One\n   two\n    code")
    assert (
        text
        == "As Bayes says:\n\n```text\nw = 1\nb = 2\n```\nand so on.\n\n1. One\n   two\n\n```text\ncode\n```"
    )
    assert (
        make_docs.numpydoc("Does.\n\nRaises\n------\nValueError\n    Always.")
        == "Does.\n\n**Raises**\n\n- `ValueError`\n  Always.\n"
    )
    assert (
        make_docs.link_arxiv("X, arXiv:2303.05668.")
        == "X, [arXiv:2303.05668](https://arxiv.org/abs/2303.05668)."
    )
