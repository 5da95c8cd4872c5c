"""Files: atomic writes, content digests, and the list of inputs that were set aside.

Names of files are ``str`` as `os.fsdecode` gives them: bytes that are not UTF-8 live on as lone surrogates.
Everything written here (CSV, JSON) keeps them reversibly; `printable` shows a name on any terminal.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = [
    "BadFile",
    "DiskFull",
    "Quarantine",
    "atomic_write",
    "cache_root",
    "check_file",
    "digest",
    "disk_errors",
    "kind_of",
    "printable",
    "read_json",
    "write_csv",
    "write_json",
]


class BadFile(Exception):
    """An input file that cannot be used; ``reason`` says why in plain words."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class DiskFull(OSError):
    """A write failed for want of space; the message is the one line to show the user."""

    def __init__(self, folder: str | os.PathLike[str]):
        super().__init__(f"no space left on {printable(folder)}: free some and run the same command again")
        self.errno = errno.ENOSPC


@contextmanager
def disk_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded", from whatever library, into `DiskFull`."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or _mentions_full_disk(error):
            raise DiskFull(folder) from error
        raise


def _mentions_full_disk(error: Exception) -> bool:
    # sqlite3 and safetensors wrap the errno into a text.
    text = str(error).lower()
    return "no space left" in text or "disk is full" in text


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open `path` for writing so that readers see the old content or the new, never a part.

    The content goes to a temporary file in the same folder, is flushed to disk and renamed over `path`; after
    an exception or a kill the old file is untouched. Missing folders are made. Text is UTF-8.

    Parameters
    ----------
    path : path
        Where to write. A symbolic link is followed; a device such as ``/dev/stdout`` is written to directly.
    mode : {"w", "wb"}, default="w"
        Text or bytes.

    Raises
    ------
    DiskFull
        When the disk or quota is full.

    Examples
    --------
    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "note.txt")
    >>> with atomic_write(path) as file:
    ...     _ = file.write("whole or not at all")
    >>> open(path).read()
    'whole or not at all'
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode={mode!r} must be 'w' or 'wb'")
    text: dict[str, Any] = (
        {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    )
    target = Path(os.path.realpath(path))
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():  # a device or a pipe: nothing to rename over
            with open(path, mode, **text) as file:
                yield file
            return
        # Not derived from the name: that may already be as long as a name can be.
        temporary = target.parent / f".tmp-{secrets.token_hex(8)}"
        try:
            with open(temporary, mode.replace("w", "x"), **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as JSON, atomically; NaN and infinities are refused, as JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a broken one is a `ValueError` that names it."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{printable(path)} is not valid JSON: {error}") from None


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as CSV, atomically; `read_table` of `unfused.data.manifest` reads it back."""
    with atomic_write(path) as file:
        # Only with this line end does the writer put quotes around both "\r" and "\n".
        writer = csv.writer(_UnixLines(file), lineterminator="\r\n")
        writer.writerow(columns)
        writer.writerows(rows)


class _UnixLines:
    def __init__(self, file: IO[str]):
        self.file = file

    def write(self, row: str) -> int:
        return self.file.write(row.removesuffix("\r\n") + "\n")


def cache_root() -> Path:
    """Where features and the lab's units are kept: `$UNFUSED_CACHE`, or `~/.cache/unfused`."""
    return Path(os.environ.get("UNFUSED_CACHE") or Path.home() / ".cache" / "unfused")


def digest(path: str | os.PathLike[str]) -> str:
    """Hash the content of a file (BLAKE2b, 160 bits), in bounded memory.

    Returns
    -------
    str
        40 hexadecimal digits.
    """
    hasher = hashlib.blake2b(digest_size=20)
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def printable(path: str | os.PathLike[str]) -> str:
    r"""Show a name on one line that any terminal, log or page accepts.

    Examples
    --------
    >>> print(printable("caf\udce9\n.wav"))
    caf\udce9\n.wav
    """
    text = os.fsdecode(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_file(path: str | os.PathLike[str]) -> os.stat_result:
    """Raise `BadFile` unless `path` is a regular, readable file with something in it.

    Returns
    -------
    os.stat_result
        Of the file, links followed.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise BadFile("a folder, not a file")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise BadFile("not a regular file (a pipe, socket or device)")
        if status.st_size == 0:
            raise BadFile("empty file (zero bytes)")
        with open(path, "rb"):
            return status
    except OSError as error:
        raise BadFile(_reason(path, error)) from error
    except ValueError as error:  # a zero byte, or characters that no file name can hold
        raise BadFile("a name that no file can have") from error


def _reason(path: str | os.PathLike[str], error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "permission denied"
    if error.errno == errno.ELOOP:
        return "a symbolic link that leads in a circle"
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            return f"a dangling link to {printable(os.readlink(path))}"
        return "no such file (moved or deleted?)"
    return f"cannot be read: {error.strerror or error}"


_MAGIC = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"II*\x00", "a TIFF picture"),
    (b"MM\x00*", "a TIFF picture"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
    (b"0&\xb2u\x8ef\xcf\x11", "a Windows Media file"),
    (b"#!AMR", "an AMR recording"),
    (b"OggS", "an Ogg file"),
    (b"fLaC", "a FLAC recording"),
    (b"ID3", "an MP3 recording"),
    (b"RF64", "a WAV recording"),
    (b"FORM", "an AIFF recording"),
    (b"\x7fELF", "a program"),
)


def kind_of(path: str | os.PathLike[str]) -> str:
    """Say what a file seems to be by its first bytes: ``"a PNG picture"``, ``"text"`` ..."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:  # it may vanish at any moment
        return "unknown data"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF":
        return {b"WAVE": "a WAV recording", b"WEBP": "a WebP picture"}.get(head[8:12], "a RIFF file")
    if head[4:8] == b"ftyp":
        heif = head[8:12] in (b"heic", b"heix", b"mif1", b"msf1")
        return "a HEIC picture" if heif else "an MPEG-4 file (m4a, mp4)"
    if not head.strip(b"\x00"):
        return "nothing but zero bytes"
    # Cut at 512 bytes, the last character may be a part of one.
    if b"\x00" not in head and "\ufffd" not in head.decode("utf-8", "replace").rstrip("\ufffd"):
        return "a web page" if b"<html" in head.lower() or b"<!doctype" in head.lower() else "text"
    return "unknown data"


class Quarantine:
    """The input files that were set aside, each with its reason.

    Attributes
    ----------
    rows : list of (str, str)
        Path and reason, in order of path.

    Examples
    --------
    >>> quarantine = Quarantine()
    >>> quarantine.add("b.wav", "silent")
    >>> quarantine.add("a.wav", "empty file (zero bytes)")
    >>> len(quarantine), quarantine.rows[0]
    (2, ('a.wav', 'empty file (zero bytes)'))
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def add(self, path: str | os.PathLike[str], reason: str) -> None:
        """Set `path` aside; the first reason given for a path is kept."""
        self._reasons.setdefault(os.fsdecode(path), reason)

    @property
    def rows(self) -> list[tuple[str, str]]:
        return sorted(self._reasons.items())

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, path: object) -> bool:
        return path in self._reasons

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write ``path,reason`` as CSV, atomically (only the header when nothing was set aside)."""
        write_csv(path, ("path", "reason"), self.rows)
