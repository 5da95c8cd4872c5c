"""The model card of a merge: sources, method, parameters and hashes, and nothing that differs from run to run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unfused.data.files import atomic_write, printable

__all__ = ["write_card"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def write_card(path: Path, recipe: Mapping[str, Any], notes: Sequence[str], name: str, hashes: str) -> None:
    """Write README.md.

    Parameters
    ----------
    path : Path
    recipe : mapping
        What merge.json holds.
    notes : sequence of str
    name : str
        Of the result.
    hashes : {"sampled", "full"}
    """
    entries = [*([recipe["base"]] if recipe["base"] else []), *recipe["models"]]
    hub = [e["source"] for e in entries if _HUB_ID.fullmatch(e["source"]) and not Path(e["source"]).exists()]
    lines = ["---", "library_name: transformers", "tags:", "- merge", "- unfused"]
    if hub:
        lines += ["base_model:", *(f"- {source}" for source in dict.fromkeys(hub))]
    lines += ["---", "", f"# {_cell(name)}", ""]
    lines += [f"A merge of {len(recipe['models'])} models by `{recipe['method']}`, made with unfused.", ""]
    kind = "SHA-256" if hashes == "full" else "BLAKE2b of headers and samples"
    lines += [f"| role | source | {kind} |", "|---|---|---|"]
    if recipe["base"]:
        lines.append(f"| base | {_cell(recipe['base']['source'])} | `{recipe['base']['hash']}` |")
    lines += [f"| model | {_cell(entry['source'])} | `{entry['hash']}` |" for entry in recipe["models"]]
    lines += ["", "| parameter | value |", "|---|---|"]
    lines += [f"| {key} | {_cell(json.dumps(value))} |" for key, value in recipe["parameters"].items()]
    for key in ("copy", "dtype", "vocab", "rank"):
        if recipe.get(key):
            lines.append(f"| {key} | {_cell(json.dumps(recipe[key]))} |")
    if recipe.get("per_tensor"):
        lines += ["", "Parameters that differ from tensor to tensor:", "", "```json"]
        lines += [json.dumps(recipe["per_tensor"], indent=1), "```"]
    if notes:
        lines += ["", *(f"- {_cell(note)}" for note in notes[:50])]
        if len(notes) > 50:
            lines.append(f"- and {len(notes) - 50} more of this kind")
    with atomic_write(path) as file:
        file.write("\n".join(lines) + "\n")


def _cell(text: str) -> str:
    return re.sub(r"([|`<>\[\]*_\\])", r"\\\1", printable(text))
