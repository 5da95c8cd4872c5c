"""Every claim at smoke scale: does the machinery work. Every method: is it claimed, tested, documented."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from unfused.catalog import methods
from unfused.claims import _runner

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("claim", _runner.find(), ids=lambda claim: claim.slug)
def test_claim_runs_at_smoke_scale(claim):
    assert claim.sentence.endswith("."), "the docstring begins with the sentence under test"
    found, skipped = claim.run(scale="smoke")
    assert found or skipped
    for verdict in found:
        assert verdict.refuted_by and verdict.baselines
        for arm in (verdict.method, *verdict.baselines.values(), *verdict.differences.values()):
            assert np.isfinite(list(arm.values.values())).all() and len(arm.values) == len(
                verdict.method.values
            )
        assert json.loads(verdict.to_json())["holds"] in (True, False)
        assert verdict.tables()


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.slug)
def test_method_is_claimed_tested_and_documented(method):
    family, name = method.module.split(".")[1:]
    wanted = [
        REPOSITORY / "tests" / family / f"test_{name}.py",
        REPOSITORY / "docs" / "methods" / f"{method.slug}.md",
    ]
    if not method.reference.startswith("none"):  # a baseline promises nothing
        wanted.append(REPOSITORY / "src" / "unfused" / "claims" / f"{name}.py")
    missing = [path.relative_to(REPOSITORY).as_posix() for path in wanted if not path.is_file()]
    assert not missing, f"{method.slug} lacks {', '.join(missing)} (docs: run make docs)"
