"""Checkpoints in safetensors, read tensor by tensor and written shard by shard, so that none is ever in memory whole.

A safetensors file is eight bytes (the header's length N), N bytes of JSON (for each tensor its type, shape and place) and the
tensors, one after the other. Headers are checked when a checkpoint is opened: a file cut short, a header that lies or an
index that names a missing file is found before anything is computed. Pieces are read with `pread`, not through a memory map:
what is resident is what was asked for, and a file that shrinks meanwhile is an error and no crash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from unfused.data.files import BadFile as _BadFile
from unfused.data.files import atomic_write, check_file, printable, read_json, write_json

__all__ = ["Checkpoint", "Shard", "ShardWriter", "TensorInfo", "fetch", "open_checkpoint"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes
    ----------
    file : Path
    dtype : torch.dtype
    shape : tuple of int
    offset : int
        Of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Checkpoint(Mapping[str, torch.Tensor]):
    """A mapping name -> tensor that reads a tensor when it is asked for.

    Attributes
    ----------
    source : str
        As the user named it.
    folder : Path
    files : list of Path
        The safetensors files.
    index : Path or None
        The index of a sharded checkpoint.
    infos : dict of str to TensorInfo
        In the order of the files.
    metadata : dict of str to str
        Of the files' headers, together.

    Examples
    --------
    >>> import tempfile; from safetensors.torch import save_file
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_file({"weight": torch.arange(6.0).view(3, 2)}, path)
    >>> with open_checkpoint(path) as checkpoint:
    ...     checkpoint.infos["weight"].shape, checkpoint["weight"].sum().item(), checkpoint.read("weight", 4, 6)
    ((3, 2), 15.0, tensor([4., 5.]))
    """

    def __init__(self, source: str, folder: Path, files: Sequence[Path], index: Path | None = None) -> None:
        self.source, self.folder, self.files, self.index = source, folder, list(files), index
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._descriptors: dict[Path, int] = {}
        for file in self.files:
            infos, metadata = read_header(file)
            for name, info in infos.items():
                if name in self.infos:
                    raise ValueError(
                        f"{printable(file)} and {printable(self.infos[name].file)} both hold tensor {name!r}: "
                        "remove the file that is not of this checkpoint"
                    )
                self.infos[name] = info
            self.metadata |= metadata

    @property
    def names(self) -> list[str]:
        return list(self.infos)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`, empty where there is none."""
        path = self.folder / "config.json"
        return dict(read_json(path)) if path.is_file() else {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name).view(self.info(name).shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor; `KeyError` names the checkpoint if it has none of that name."""
        if name not in self.infos:
            raise KeyError(f"{printable(self.source)} has no tensor {name!r}")
        return self.infos[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `start` to `stop` of a tensor, row-major.

        Parameters
        ----------
        name : str
        start, stop : int
            By default all.

        Returns
        -------
        Tensor (stop - start,)
            Of the stored type, in memory of its own.

        Raises
        ------
        ValueError
            If the file has become shorter since it was opened.
        """
        info = self.info(name)
        stop = info.numel if stop is None else stop
        size = info.dtype.itemsize
        out = torch.empty(max(stop - start, 0) * size, dtype=torch.uint8)
        view, at = out.numpy().data, info.offset + start * size
        while view:
            count = _read_into(view[: 1 << 30], self._descriptor(info.file), at)
            if count == 0:
                raise ValueError(
                    f"{printable(info.file)} ends inside tensor {name!r}: it was cut while in use"
                )
            view, at = view[count:], at + count
        return out.view(info.dtype)

    def fingerprint(self, full: bool = False) -> str:
        """A hash of the files, hexadecimal.

        Parameters
        ----------
        full : bool, default=False
            SHA-256 of all bytes; by default BLAKE2b of headers, sizes and 64 blocks of 16 KiB spread over each file, which
            tells checkpoints apart without reading them.
        """
        hasher = hashlib.sha256() if full else hashlib.blake2b(digest_size=20)
        for file in self.files:
            descriptor = self._descriptor(file)
            size = os.fstat(descriptor).st_size
            if full:
                block, at = 1 << 22, 0
                while data := os.pread(descriptor, block, at):
                    hasher.update(data)
                    at += len(data)
                continue
            (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
            hasher.update(f"{size} ".encode() + os.pread(descriptor, length, 8))
            for block in range(64):
                at = 8 + length + (size - 8 - length) * block // 64
                hasher.update(os.pread(descriptor, 1 << 14, at))
        return hasher.hexdigest()

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self)} tensors, {self.nbytes:,} bytes)"


def _read_into(view: memoryview, descriptor: int, at: int) -> int:
    if hasattr(os, "preadv"):  # not on macOS
        return os.preadv(descriptor, [view], at)
    data = os.pread(descriptor, len(view), at)
    view[: len(data)] = data
    return len(data)


# ---- opening


def fetch(source: str | os.PathLike[str]) -> Path:
    """The local folder (or file) of a checkpoint: itself, or the hub's snapshot, without its pickles.

    Parameters
    ----------
    source : path or str
        `owner/name` or `owner/name@revision` where no such path exists.

    Raises
    ------
    ValueError
        If it is neither here nor on the hub.
    """
    path = Path(source)
    if path.exists():
        return path
    name = os.fspath(source)
    if not _HUB_ID.fullmatch(name) or (path.parent.is_dir() and name.startswith((".", "/", "~"))):
        raise ValueError(f"{printable(source)}: no such folder or file")
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # whatever the network or the hub gives
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{name}: no such folder here, and the hub does not give it: {reason}") from error


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Parameters
    ----------
    source : path or str
        A safetensors file, a folder that holds one or shards with an index, or a hub id `owner/name[@revision]`.

    Raises
    ------
    ValueError
        One line that names the file (and tensor): no safetensors here (pickles are refused), an index that names a missing
        file or tensor, a wrong header, a file cut short.
    """
    path = fetch(source)
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _indexed(os.fspath(source), path.parent, path)
        return Checkpoint(os.fspath(source), path.parent, [path])
    for stem in ("model", "diffusion_pytorch_model", "adapter_model"):
        if (path / f"{stem}.safetensors").is_file():
            return Checkpoint(os.fspath(source), path, [path / f"{stem}.safetensors"])
    if indexes := sorted(path.glob("*.safetensors.index.json")):
        if len(indexes) > 1:
            raise ValueError(f"{printable(path)} has several indexes: name one of {_listed(indexes)}")
        return _indexed(os.fspath(source), path, indexes[0])
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        files = _complete(path, files)
    if not files:
        if pickles := [file for pattern in _PICKLES for file in sorted(path.glob(pattern))]:
            raise ValueError(_pickle(pickles[0]))
        raise ValueError(f"{printable(path)} holds no *.safetensors: give the folder of a saved model")
    return Checkpoint(os.fspath(source), path, files)


def _indexed(source: str, folder: Path, index: Path) -> Checkpoint:
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{printable(index)} has no weight_map: download it again")
    for name, file in places.items():
        if os.path.basename(file) != file:
            raise ValueError(f"{printable(index)} places tensor {name!r} in {file!r}, outside its folder")
        if not (folder / file).is_file():
            raise ValueError(
                f"{printable(index)} places tensor {name!r} in {printable(file)}, which is missing"
            )
    checkpoint = Checkpoint(source, folder, [folder / file for file in sorted(set(places.values()))], index)
    for name, file in places.items():
        if name not in checkpoint or checkpoint.infos[name].file.name != file:
            raise ValueError(
                f"{printable(index)} places tensor {name!r} in {printable(file)}, which lacks it: download both again"
            )
    return checkpoint


def _complete(folder: Path, files: list[Path]) -> list[Path]:
    """Shards without an index, if they are all of one model."""
    parts = [_SHARD.fullmatch(file.name) for file in files]
    if None in parts or len({(part[1], part[3]) for part in parts if part}) > 1:
        raise ValueError(f"{printable(folder)} has several models: name one of {_listed(files)}")
    found = {int(part[2]) for part in parts if part}
    count = int(parts[0][3])  # type: ignore[index]
    if missing := sorted(set(range(1, count + 1)) - found):
        raise ValueError(f"{printable(folder)} lacks shard {missing[0]} of {count}: download it again")
    return files


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(printable(file.name) for file in files[:4]) + (" ..." if len(files) > 4 else "")


def _pickle(file: Path) -> str:
    return (
        f"{printable(file)} is a pickle, which can run code when it is read: convert it where you trust it with "
        "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW), which writes safetensors"
    )


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file, checked against the file's size.

    Raises
    ------
    ValueError
        One line that names the file, and the tensor where one is at fault.
    """
    where = printable(file)
    try:
        size = check_file(file).st_size
    except _BadFile as error:
        raise ValueError(f"{where}: {error.reason}") from None
    with open(file, "rb") as stream:
        start = stream.read(8)
        if file.suffix != ".safetensors" and (start[:2] in (b"PK", b"\x80\x02") or start[:1] == b"\x80"):
            raise ValueError(_pickle(file))
        if len(start) < 8:
            raise ValueError(f"{where} is no safetensors file: it has only {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"{where}: its header claims {length:,} bytes and the file has {size:,}: cut short, or no safetensors file"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise ValueError(f"{where}: its header is not JSON: damaged, or no safetensors file") from None
    if not isinstance(header, dict):
        raise ValueError(f"{where}: its header is not a JSON object: damaged")
    metadata = header.pop("__metadata__", None) or {}
    infos, end = {}, 0
    try:
        entries = sorted((tuple(entry["data_offsets"]), name, entry) for name, entry in header.items())
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{where}: its header does not say where the tensors are: damaged") from None
    for (first, last), name, entry in entries:
        dtype, shape = _DTYPES.get(entry.get("dtype")), entry.get("shape")
        if dtype is None:
            raise ValueError(
                f"{where}: tensor {name!r} is of type {entry.get('dtype')!r}, which is not read here"
            )
        if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"{where}: tensor {name!r} has the shape {shape!r}: a damaged header")
        info = TensorInfo(file, dtype, tuple(shape), 8 + length + first)
        if first != end or last - first != info.nbytes:
            raise ValueError(
                f"{where}: tensor {name!r} of {info.nbytes:,} bytes is placed at {first:,} to {last:,}: a damaged header"
            )
        end = last
        if 8 + length + end > size:
            raise ValueError(
                f"{where}: tensor {name!r} is cut: {8 + length + end - size:,} bytes are missing; get the file again"
            )
        infos[name] = info
    if 8 + length + end != size:
        raise ValueError(
            f"{where} has {size - 8 - length - end:,} bytes after its last tensor: a damaged header"
        )
    # In the order of the header, as whoever wrote it had it.
    return {name: infos[name] for name in header}, {str(k): str(v) for k, v in metadata.items()}


# ---- writing


@dataclass(frozen=True)
class Shard:
    """One file to be: its name and its tensors, in the order they are written."""

    name: str
    tensors: tuple[str, ...]


class _Stream:
    """Takes a shard's tensors, whole or in pieces, in the order of the shard."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.written = 0

    def write(self, tensor: torch.Tensor) -> None:
        """Append the elements, row-major."""
        if tensor.numel():
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            self._file.write(data)
            self.written += len(data)


class ShardWriter:
    """Writes tensors of known types and shapes to shards, each atomically; what is whole is not written again.

    Parameters
    ----------
    folder : path
    layout : mapping of str to (torch.dtype, shape)
        All tensors, in their order.
    max_shard_bytes : int, default=5_000_000_000
        A larger tensor gets a shard of its own.
    stem : str, default="model"
        The files are `STEM.safetensors`, or `STEM-00001-of-00003.safetensors` ... with `STEM.safetensors.index.json`.
    metadata : mapping of str to str, default={"format": "pt"}

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> writer = ShardWriter(folder, {"a": (torch.float32, (2,)), "b": (torch.int64, ())})
    >>> for shard in writer.pending():
    ...     with writer.open(shard) as stream:
    ...         for name in shard.tensors:
    ...             stream.write({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}[name])
    >>> writer.finish()
    >>> {name: tensor.tolist() for name, tensor in open_checkpoint(folder).items()}
    {'b': 3, 'a': [1.0, 2.0]}
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        max_shard_bytes: int = 5_000_000_000,
        stem: str = "model",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
        self.folder, self.stem = Path(folder), stem
        self._layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in layout.items()}
        self._metadata = {"format": "pt"} if metadata is None else dict(metadata)
        for name, (dtype, _) in self._layout.items():
            if dtype not in _NAMES:
                raise ValueError(f"tensor {name!r}: safetensors has no type for {dtype}")
        groups: list[list[str]] = [[]]
        filled = 0
        for name in self._layout:
            if groups[-1] and filled + self._size(name) > max_shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += self._size(name)
        # The widest types first: every tensor then begins at a multiple of its element's size.
        for group in groups:
            group.sort(key=lambda name: -self._layout[name][0].itemsize)
        count = len(groups)
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = [f"{stem}.safetensors"]
        self.shards = [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]

    def _size(self, name: str) -> int:
        dtype, shape = self._layout[name]
        return math.prod(shape) * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return sum(self._size(name) for name in self._layout)

    def pending(self) -> list[Shard]:
        """The shards that are not there yet, whole and with the right header."""
        return [shard for shard in self.shards if not self._whole(shard)]

    def _whole(self, shard: Shard) -> bool:
        path, header = self.folder / shard.name, self._header(shard)
        size = len(header) + sum(self._size(name) for name in shard.tensors)
        if not path.is_file() or path.stat().st_size != size:
            return False
        with open(path, "rb") as file:
            return file.read(len(header)) == header

    def _header(self, shard: Shard) -> bytes:
        entries: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        at = 0
        for name in shard.tensors:
            dtype, shape = self._layout[name]
            entries[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [at, at + self._size(name)],
            }
            at += self._size(name)
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @contextmanager
    def open(self, shard: Shard) -> Iterator[_Stream]:
        """A stream for the shard's tensors in order; the file appears when the block ends well.

        Raises
        ------
        ValueError
            If fewer or more bytes were written than the shard holds.
        DiskFull
        """
        with atomic_write(self.folder / shard.name, "wb") as file:
            file.write(self._header(shard))
            stream = _Stream(file)
            yield stream
            wanted = sum(self._size(name) for name in shard.tensors)
            if stream.written != wanted:
                raise ValueError(f"{shard.name}: {stream.written:,} bytes were written of {wanted:,}")

    def finish(self) -> None:
        """Write the index, where there are several shards."""
        if len(self.shards) > 1:
            places = {name: shard.name for shard in self.shards for name in shard.tensors}
            write_json(
                self.folder / f"{self.stem}.safetensors.index.json",
                {
                    "metadata": {"total_size": self.nbytes},
                    "weight_map": {name: places[name] for name in self._layout},
                },
            )
