"""The catalogue of methods, read from the family modules' docstrings: nothing is imported, no list is kept.

A method module's docstring begins with `Name: what it does.` and has, each at the start of a line,

    Reference: Title, venue year, arXiv:number.
    Needs: unlabelled data, gradients.
    Slug: only where the file is not named after the slug.

A field may go on over the next lines and ends at a blank line or at the next field.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unfused._lazy import public_modules

__all__ = ["FAMILIES", "Method", "method", "methods"]

FAMILIES = (
    "pretrain",
    "finetune",
    "posttrain",
    "embed",
    "adapters",
    "label",
    "curate",
    "merge",
    "unlearn",
    "diagnose",
    "generate",
    "control",
)

ROOT = Path(__file__).parent
_FIELD = re.compile(r"^(Reference|Needs|Slug):(.*?)(?=^\s*$|^(?:Reference|Needs|Slug):|\Z)", re.M | re.S)


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes
    ----------
    slug : str
        The name on the command line and of the recorded claim, such as `gda-clip`.
    name, summary : str
        The two halves of the docstring's first line.
    family : str
        One of `FAMILIES`.
    reference : str
    needs : tuple of str
        What the user must have, such as `unlabelled data` or `a text encoder`.
    module : str
        Full name of the module.
    claim : dict or None
        The recorded result of the method's claim (`claims/results/<slug>.json`), None where it never ran.
    """

    slug: str
    name: str
    summary: str
    family: str
    reference: str
    needs: tuple[str, ...]
    module: str
    claim: dict[str, Any] | None

    def needs_all(self, terms: tuple[str, ...] | list[str]) -> bool:
        """Whether every term is needed; `no X` asks that X is not. X matches by whole words: `labels` matches
        the need `few labels`, not `unlabelled data`."""
        return all(
            not self._needs(term.removeprefix("no ")) if term.startswith("no ") else self._needs(term)
            for term in terms
        )

    def _needs(self, term: str) -> bool:
        return any(set(term.lower().split()) <= set(need.lower().split()) for need in self.needs)


def read_method(path: Path, family: str) -> Method:
    """The method that the module `path` documents.

    Raises
    ------
    ValueError
        If the docstring lacks the first line or a field.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))) or ""
    head = " ".join(docstring.split("\n\n", 1)[0].split())
    name, colon, summary = head.partition(": ")
    fields = {key: " ".join(text.split()) for key, text in _FIELD.findall(docstring)}
    if not colon:
        raise ValueError(f"{path}: the docstring must begin with `Name: what it does.`")
    for key in ("Reference", "Needs"):
        if not fields.get(key):
            raise ValueError(f"{path}: the docstring needs a line `{key}: ...` (see CONTRIBUTING.md)")
    slug = fields.get("Slug", path.stem.replace("_", "-")).rstrip(".")
    return Method(
        slug=slug,
        name=name,
        summary=summary,
        family=family,
        reference=fields["Reference"],
        needs=tuple(need.strip() for need in fields["Needs"].rstrip(".").split(",") if need.strip()),
        module=f"unfused.{family}.{path.stem}",
        claim=_claim(slug),
    )


def _claim(slug: str) -> dict[str, Any] | None:
    path = ROOT / "claims" / "results" / f"{slug}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def methods(family: str | None = None, needs: str | tuple[str, ...] | list[str] = ()) -> list[Method]:
    """Every method, by family and slug.

    Parameters
    ----------
    family : str, optional
        Only this family.
    needs : str or sequence of str, optional
        Only methods that need all of these, such as `labels`; `no labels` turns it round. A string is split
        at commas.

    Raises
    ------
    ValueError
        If there is no such family, or no method at all has such a need.

    Examples
    --------
    >>> from unfused.catalog import methods
    >>> "linear-probe" in [m.slug for m in methods("finetune", needs="labels")]
    True
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown: choose one of {', '.join(FAMILIES)}")
    every = [read_method(path, name) for name in FAMILIES for path in public_modules(ROOT / name)]
    terms = [term.strip() for term in (needs.split(",") if isinstance(needs, str) else needs) if term.strip()]
    for term in terms:
        if not any(m._needs(term.removeprefix("no ")) for m in every):
            known = sorted({need for m in every for need in m.needs})
            raise ValueError(f"needs={term!r} matches no method: known needs are {', '.join(known)}")
    return [m for m in every if family in (None, m.family) and m.needs_all(terms)]


def method(slug: str) -> Method:
    """The method called `slug`.

    Raises
    ------
    ValueError
        If there is none; the message lists those that exist.
    """
    every = {m.slug: m for m in methods()}
    if slug not in every:
        raise ValueError(f"method {slug!r} is unknown: choose one of {', '.join(sorted(every))}")
    return every[slug]
