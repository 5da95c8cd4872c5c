"""Embeddings of different vocabularies: rows are matched by their tokens, not by their places.

Target rows are those of the reference (the base, or the first model), with "union" followed by the tokens that only others
have. A row that an input lacks is taken from the base, so that its change is zero; one that the base lacks too is the mean of
the models that have it. Padding rows, which no token has, are matched by place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unfused.data.files import digest, printable
from unfused.merge._plan import EMBEDDING
from unfused.merge._sources import Source

__all__ = ["Vocabulary", "align", "check_same"]


class Vocabulary:
    """The tokens of the result: the reference's tokenizer and what is added to it."""

    def __init__(self, folder: Path, added: list[str], rows: int) -> None:
        self.folder, self.added, self.rows = folder, added, rows

    def write(self, folder: Path) -> None:
        """Write the tokenizer, where tokens were added, and the size into config.json."""
        if self.added:
            tokenizer = _tokenizer(self.folder)
            tokenizer.add_tokens(self.added)
            tokenizer.save_pretrained(folder)
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        (config["text_config"] if "vocab_size" not in config else config)["vocab_size"] = self.rows
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class _Rows(Source):
    """A source whose embeddings have the target's rows."""

    def __init__(self, source: Source, names: Sequence[str], index: torch.Tensor, others: _Reference) -> None:
        self.source, self.label, self.folder = source, source.label, source.folder
        self._names, self.index, self._reference = set(names), index, others
        self.layout = {
            name: (dtype, (len(index), *shape[1:]) if name in self._names else shape)
            for name, (dtype, shape) in source.layout.items()
        }

    @property
    def paths(self) -> list[Path]:
        return self.source.paths

    def where(self, name: str) -> str:
        return self.source.where(name)

    def fingerprint(self, full: bool = False) -> str:
        return self.source.fingerprint(full)

    def own(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Its own values for target rows (n,), zero where it has none."""
        entries = math.prod(self.shape(name)[1:])
        index = self.index[rows]
        known = index[index >= 0]
        if not len(known):
            return torch.zeros(len(rows), entries)
        low, high = int(known.min()), int(known.max()) + 1
        table = self.source.read(name, low * entries, high * entries).view(-1, entries)
        out = torch.zeros(len(rows), entries, dtype=table.dtype)
        out[index >= 0] = table[known - low]
        return out

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if name not in self._names:
            return self.source.read(name, start, stop)
        entries = math.prod(self.shape(name)[1:])
        rows = torch.arange(start // entries, len(self.index) if stop is None else stop // entries)
        out = self.own(name, rows)
        missing = self.index[rows] < 0
        if missing.any():
            out = out.float()
            out[missing] = self._reference.values(name, rows[missing])
        return out.view(-1)


class _Reference:
    """Values for rows that somebody lacks."""

    base: _Rows | None
    models: list[_Rows]

    def values(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        have = [(model.index[rows] >= 0).float()[:, None] for model in self.models]
        total = sum(m.own(name, rows).float() for m in self.models)
        mean = total / sum(have).clamp(min=1)  # type: ignore[union-attr,operator,arg-type]
        if self.base is None:
            return mean
        known = (self.base.index[rows] >= 0)[:, None]
        return torch.where(known, self.base.own(name, rows).float(), mean)


def align(
    base: Source | None, models: Sequence[Source], mode: str
) -> tuple[Source | None, list[Source], Vocabulary]:
    """Give all inputs the same rows.

    Parameters
    ----------
    mode : {"base", "union"}

    Raises
    ------
    ValueError
        If an input has no tokenizer or no `vocab_size` in its config.
    """
    if mode not in ("base", "union"):
        raise ValueError(f"vocab={mode!r} must be 'base' or 'union'")
    everyone = [*([base] if base is not None else []), *models]
    sizes = [_size(source) for source in everyone]
    vocabularies = [_vocabulary(source) for source in everyone]
    target = dict(vocabularies[0])
    added: list[str] = []
    if mode == "union":
        found = {token for vocabulary in vocabularies[1:] for token in vocabulary} - set(target)
        ranks = [sorted(vocabulary, key=vocabulary.__getitem__) for vocabulary in vocabularies[1:]]
        added = list(dict.fromkeys(token for tokens in ranks for token in tokens if token in found))
        if added:
            tokenizer = _tokenizer(everyone[0].folder)  # type: ignore[arg-type]
            tokenizer.add_tokens(added)
            target = tokenizer.get_vocab()
    rows = max([sizes[0], *(i + 1 for i in target.values())])
    token_of = {i: token for token, i in target.items()}
    names = [
        name
        for name in everyone[0]
        if EMBEDDING.search(name)
        and all(
            name in source and source.shape(name)[:1] == (size,)
            for source, size in zip(everyone, sizes, strict=True)
        )
    ]
    reference = _Reference()
    aligned: list[_Rows] = []
    for source, size, vocabulary in zip(everyone, sizes, vocabularies, strict=True):
        index = torch.full((rows,), -1, dtype=torch.long)
        for row in range(rows):
            place = row if row not in token_of else vocabulary.get(token_of[row], -1)
            index[row] = place if place < size else -1
        aligned.append(_Rows(source, names, index, reference))
    reference.base = aligned[0] if base is not None else None
    reference.models = aligned[1:] if base is not None else aligned
    assert everyone[0].folder is not None
    return (
        reference.base,
        list(reference.models),
        Vocabulary(everyone[0].folder, added, rows),
    )


def check_same(everyone: Sequence[Source]) -> None:
    """Refuse inputs in which one token has different rows, where tokenizers can tell."""
    files = [source.folder / "tokenizer.json" for source in everyone if source.folder is not None]
    distinct: dict[str, Path] = {}
    for file in files:
        if file.is_file():
            distinct.setdefault(digest(file), file)
    if len(distinct) < 2:
        return
    first, *others = distinct.values()
    rows = _read(first)
    for other in others:
        for token, row in _read(other).items():
            if rows.get(token, row) != row:
                raise ValueError(
                    f"token {token!r} is row {rows[token]} by {printable(first)} and row {row} by {printable(other)}: "
                    "vocab='base' or 'union' (--vocab) matches tokens"
                )


def _read(file: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    try:
        return dict(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{printable(file)} is no tokenizer: {' '.join(str(error).split())}") from None


def _vocabulary(source: Source) -> dict[str, int]:
    if source.folder is not None and (source.folder / "tokenizer.json").is_file():
        return _read(source.folder / "tokenizer.json")
    return dict(_tokenizer(source.folder).get_vocab()) if source.folder else {}


def _tokenizer(folder: Path | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{printable(folder or '')} has no tokenizer, which vocab (--vocab) needs: {reason}"
        ) from None


def _size(source: Source) -> int:
    config = source.config
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int):
        raise ValueError(
            f"{printable(source.label)} has no vocab_size in its config.json, which vocab (--vocab) needs"
        )
    return size
