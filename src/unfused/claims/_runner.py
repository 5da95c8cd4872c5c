"""Finds the claims, runs them, records their verdicts and says which recorded ones are stale."""

from __future__ import annotations

import ast
import importlib
import json
import os
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import unfused
from unfused._lazy import public_modules
from unfused.catalog import FAMILIES, read_method
from unfused.data.files import atomic_write, digest

if TYPE_CHECKING:
    from rich.console import Console

    from unfused.claims.lab import Verdict

PACKAGE = Path(unfused.__file__).parent
RESULTS = PACKAGE / "claims" / "results"


@dataclass(frozen=True)
class Claim:
    """A claim that can be run.

    Attributes
    ----------
    slug : str
        The slug of its method, `delores-s`; the module's name with hyphens where there is no such method.
    name : str
        The method's display name.
    sentence : str
        What is claimed: the first paragraph of the module's docstring.
    path : Path
        Its module.
    sources : tuple of Path
        Files whose change makes a recorded result stale: the method's module and the claim's.
    """

    slug: str
    name: str
    sentence: str
    path: Path
    sources: tuple[Path, ...]

    def run(self, **lab: Any) -> tuple[list[Verdict], dict[str, str]]:
        """The verdicts, and the worlds left out with the reason."""
        from unfused.claims.lab import Absent, Lab

        bench = Lab(**lab, slug=self.slug, sentence=self.sentence)
        module = importlib.import_module(f"unfused.claims.{self.path.stem}")
        try:
            found = module.claim(bench)
        except Absent as reason:
            return [], {**bench.skipped, str(reason).split(":")[0]: str(reason)}
        return (found if isinstance(found, list) else [found]), bench.skipped

    def digests(self) -> dict[str, str]:
        """Hash of each source, by its path inside the package."""
        return {path.relative_to(PACKAGE).as_posix(): digest(path) for path in self.sources}

    def recorded(self, folder: Path | None = None) -> dict[str, Any] | None:
        """What `record` wrote, or None."""
        path = (folder or results_folder()) / f"{self.slug}.json"
        if not path.is_file():
            path = RESULTS / path.name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def find(slugs: Iterable[str] = ()) -> list[Claim]:
    """The claims with these slugs (module names do as well); all, without.

    Raises
    ------
    ValueError
        For a slug that is no claim.
    """
    methods = {path.stem: path for family in FAMILIES for path in public_modules(PACKAGE / family)}
    every: dict[str, Claim] = {}
    for path in public_modules(PACKAGE / "claims"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "claim" for node in tree.body):
            sentence = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
            slug, name, sources = path.stem.replace("_", "-"), path.stem, (path,)
            if source := methods.get(path.stem):
                method = read_method(source, source.parent.name)
                slug, name, sources = method.slug, method.name, (source, path)  # type: ignore[assignment]
            every[slug] = Claim(slug, name, sentence, path, sources)
    if not (wanted := [slug.replace("_", "-") for slug in slugs]):
        return list(every.values())
    if unknown := [slug for slug in wanted if slug not in every]:
        raise ValueError(
            f"no claim is called {', '.join(unknown)}: choose among {', '.join(every) or 'none'}"
        )
    return [every[slug] for slug in dict.fromkeys(wanted)]


def results_folder() -> Path:
    """Where results are recorded: inside a checkout's package, else `./claims-results`."""
    checkout = PACKAGE.parent.name == "src" and (PACKAGE.parent.parent / "pyproject.toml").is_file()
    return RESULTS if checkout and os.access(PACKAGE / "claims", os.W_OK) else Path("claims-results")


def record(
    claim: Claim, verdicts: Iterable[Verdict], folder: Path | None = None, *, complete: bool = False
) -> Path:
    """Write the verdicts into `<slug>.json`, a section for each scale, world and name.

    What was not run now is kept, each section with the hashes of its own sources; unless the run was `complete`, no
    world left out: then nothing else of its scale is.
    """
    folder = folder or results_folder()
    verdicts = list(verdicts)
    ran = {verdict.scale for verdict in verdicts} if complete else set()
    old = [s for s in (claim.recorded(folder) or {}).get("sections", []) if s["scale"] not in ran]
    sections = {(s["scale"], s["world"], s["name"]): s for s in old}
    for verdict in verdicts:
        section = {**verdict.to_dict(), "sources": claim.digests()}
        sections[verdict.scale, verdict.world, verdict.name] = section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{claim.slug}.json"
    with atomic_write(path) as file:
        json.dump(
            as_record(claim, list(sections.values())), file, ensure_ascii=False, indent=1, allow_nan=False
        )
        file.write("\n")
    return path


def as_record(claim: Claim, sections: list[dict[str, Any]]) -> dict[str, Any]:
    several = len({s["name"] for s in sections}) > 1
    words = [
        (f"{s['name']} " if several else "", "holds" if s["holds"] else "refuted", s["world"])
        for s in sections
    ]
    one = {word for _, word, _ in words}
    verdict = (
        one.pop() if len(one) == 1 else "; ".join(f"{name}{word} on {world}" for name, word, world in words)
    )
    return {
        "slug": claim.slug,
        "claim": claim.sentence,
        "verdict": verdict,
        "date": max(s["date"] for s in sections),
        "seconds": round(sum(s["seconds"] for s in sections), 1),
        "sections": sections,
    }


def stale(section: Mapping[str, Any]) -> list[str]:
    """The sources of a recorded section that have changed since, or are gone."""
    return [
        name
        for name, was in section["sources"].items()
        if not (PACKAGE / name).is_file() or digest(PACKAGE / name) != was
    ]


def run(
    slugs: Iterable[str] = (),
    *,
    scale: str = "desk",
    seeds: int | None = None,
    data_dir: str | Path | None = None,
    recording: bool | None = None,
    console: Console | None = None,
) -> tuple[list[Verdict], dict[str, str]]:
    """Run claims one after the other; one that fails does not stop the next.

    Parameters
    ----------
    slugs : iterable of str
        All claims, if empty.
    scale : {"desk", "smoke", "gpu"}
    seeds : int, optional
    data_dir : path, optional
    recording : bool, optional
        By default whatever was run with the usual number of seeds at desk or gpu scale. Smoke runs are no
        result and are never recorded.
    console : rich Console, optional
        Shows progress and verdicts.

    Returns
    -------
    verdicts : list of Verdict
    failures : dict of str to str
        Slug -> what went wrong.
    """
    from unfused.claims.lab import SCALES

    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: choose one of {', '.join(SCALES)}")
    if scale == "smoke" and recording:
        raise ValueError("record=True with scale='smoke': a smoke run is no result; use scale='desk'")
    keep = scale != "smoke" and (seeds is None if recording is None else recording)
    verdicts: list[Verdict] = []
    failures: dict[str, str] = {}
    for claim in find(slugs):
        if console:
            console.rule(claim.slug)
        try:
            found, skipped = claim.run(scale=scale, seeds=seeds, data_dir=data_dir, console=console)
        except Exception as error:  # the next claim must still run
            failures[claim.slug] = f"{type(error).__name__}: {error}"
            if console:
                console.print(traceback.format_exc(), markup=False, highlight=False)
            continue
        verdicts += found
        path = record(claim, found, complete=not skipped) if found and keep else None
        if console:
            for verdict in found:
                console.print(verdict.table())
            for reason in skipped.values():
                console.print(f"skipped {reason}", markup=False)
            if path:
                console.print(f"recorded in {path}", markup=False)
    return verdicts, failures
