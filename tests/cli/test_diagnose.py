"""`unfused diagnose`: the commands are found, run on folders, and write a page and numbers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from unfused.diagnose._report import commands


@pytest.fixture
def models(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {"layers.0.q_proj.weight": torch.diag(torch.arange(64.0, 0, -1)), "lm_head.weight": torch.eye(64)}
    new = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["layers.0.q_proj.weight"] += 200 * torch.outer(new, new.flip(0))
    for name, state in (("base", base), ("tuned<1>", tuned)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    return tmp_path


def test_every_command_has_help_and_options(unfused):
    code, out, _ = unfused("diagnose", "--help")
    assert code == 0 and all(slug in out for slug in commands())
    for slug, command in commands().items():
        code, out, _ = unfused("diagnose", slug, "--help")
        assert code == 0 and "--html" in out
        assert all(f"--{name.replace('_', '-')}" in out for name in command["arguments"]), slug


def test_functions_take_the_arguments_that_the_command_names():
    import importlib
    import inspect

    for slug, command in commands().items():
        function = getattr(importlib.import_module(command["module"]), command["function"])
        taken = inspect.signature(function).parameters.values()
        needed = {
            p.name
            for p in taken
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        assert needed <= {*command["arguments"], "progress"}, slug
        if not any(p.kind is p.VAR_KEYWORD for p in taken):
            assert set(command["arguments"]) <= {p.name for p in taken}, slug


def test_intruders_of_folders(unfused, models):
    code, out, err = unfused(
        "diagnose", "intruder-dimensions", "--base", "base", "--tuned", "tuned<1>", "--tuned", "base",
        "--k", 3, "--html", "page.html", "--json", "numbers.json",
    )  # fmt: skip
    assert code == 0, err
    assert "1 of the 3 leading directions" in out and "base: 0 of the 3" in out
    first, second = json.loads((models / "numbers.json").read_text())
    assert [row["n"] for row in first["per_matrix"]] == [1] and second["per_matrix"][0]["n"] == 0
    page = (models / "page.html").read_text()
    assert "tuned&lt;1&gt;" in page and "<1>" not in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tuned", "nowhere"), "nowhere: no such folder"),
        (("--tuned", "tuned<1>", "--eps", "7"), "eps=7"),
        (("--tuned", "tuned<1>", "--html", "base"), "--html base: a folder"),
        (("--tuned", "tuned<1>", "--include", "x"), "names no matrix"),
    ],
)
def test_a_user_error_is_one_line(unfused, models, words, message):
    code, out, err = unfused("diagnose", "intruder-dimensions", "--base", "base", *words)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
