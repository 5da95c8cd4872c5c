"""The catalogue: what it reads, what it refuses, and that every method module here conforms."""

from __future__ import annotations

import pytest

from unfused import catalog
from unfused._lazy import exported_names, public_modules
from unfused.catalog import FAMILIES, ROOT, methods, read_method

MODULE = '''"""GDA-CLIP: a training-free classifier
on frozen features.

    w_k = S^-1 mu_k

Reference: A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation,
ICLR 2024, arXiv:2402.04087.
Needs: few labels, a text encoder.
"""

raise SystemExit("the catalogue imported a method")
'''


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty house; returns a function that writes a method module into it."""
    monkeypatch.setattr(catalog, "ROOT", tmp_path)
    (tmp_path / "claims" / "results").mkdir(parents=True)
    for family in FAMILIES:
        (tmp_path / family).mkdir()

    def write(name, text=MODULE):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_reads_the_docstring_without_importing(house):
    house("label/gda_clip.py")
    (method,) = methods()
    assert (method.slug, method.name, method.family) == ("gda-clip", "GDA-CLIP", "label")
    assert method.summary == "a training-free classifier on frozen features."
    assert method.reference.endswith("Adaptation, ICLR 2024, arXiv:2402.04087.")
    assert method.needs == ("few labels", "a text encoder")
    assert method.module == "unfused.label.gda_clip"
    assert method.claim is None


def test_claim_is_read_from_the_recorded_result(house):
    house("label/gda_clip.py")
    house("claims/results/gda-clip.json", '{"verdict": "refuted", "metric": "accuracy"}')
    assert methods()[0].claim == {"verdict": "refuted", "metric": "accuracy"}


def test_slug_line_and_private_modules(house):
    house("label/listwise.py", MODULE.replace("Needs:", "Slug: list.\nNeeds:"))
    house("label/_shared.py", "")
    assert [m.slug for m in methods()] == ["list"]
    assert catalog.method("list").module == "unfused.label.listwise"


@pytest.mark.parametrize(
    ("needs", "found"),
    [
        ("labels", ["a"]),
        ("LABELS", ["a"]),
        ("data", ["b"]),
        ("no labels", ["b"]),
        ("no labels, no data", []),
        (["gradients", "labels"], ["a"]),
        ("", ["a", "b"]),
    ],
)
def test_needs_match_whole_words(house, needs, found):
    house("label/a.py", MODULE.replace("few labels, a text encoder", "few labels, gradients"))
    house("merge/b.py", MODULE.replace("few labels, a text encoder", "unlabelled data"))
    assert [m.slug for m in methods(needs=needs)] == found


def test_family_filter_and_user_errors(house):
    house("label/a.py")
    assert methods("label") and not methods("merge")
    with pytest.raises(ValueError, match=r"family='labels' is unknown: choose one of pretrain, "):
        methods("labels")
    with pytest.raises(
        ValueError, match=r"'money' matches no method: known needs are a text encoder, few labels"
    ):
        methods(needs="money")
    with pytest.raises(ValueError, match=r"'b' is unknown: choose one of a"):
        catalog.method("b")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must begin with `Name: what it does.`"),
        ('"""No colon here."""', "must begin with"),
        (MODULE.replace("Reference:", "Paper:"), "needs a line `Reference: ...`"),
        (MODULE.replace("Needs: few labels, a text encoder.", ""), "needs a line `Needs: ...`"),
    ],
)
def test_a_module_without_its_lines_is_named(house, text, complaint):
    path = house("label/a.py", text)
    with pytest.raises(ValueError, match=complaint) as error:
        read_method(path, "label")
    assert str(path) in str(error.value)


MODULES = [(family, path) for family in FAMILIES for path in public_modules(ROOT / family)]


@pytest.mark.parametrize(("family", "path"), MODULES, ids=[f"{f}/{p.stem}" for f, p in MODULES])
def test_every_method_module_conforms(family, path):
    method = read_method(path, family)
    assert method.summary.endswith("."), "the first line is a sentence"
    assert method.needs
    assert exported_names(path), "a method module has a literal __all__"


def test_slugs_are_unique():
    slugs = [m.slug for m in methods()]
    assert len(slugs) == len(set(slugs))
