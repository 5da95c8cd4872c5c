"""The engine: applies a method to one tensor (or a piece of it) after the other, in memory or from disk to disk.

From disk, while one piece is computed the next is read and the last written; what is resident is a few pieces of every input.
The result is made in a folder `.NAME.merging` beside the output, shard by shard, and appears under its name at once, when it is
whole. After a kill the same command goes on after the last whole shard, and ends with the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unfused.data.checkpoint_io import ShardWriter, fetch
from unfused.data.files import disk_errors, printable, read_json, write_json
from unfused.merge._adapters import merge_adapters
from unfused.merge._card import write_card
from unfused.merge._method import MergeMethod, find
from unfused.merge._plan import Item, Piece, Plan, make_plan, pieces
from unfused.merge._sources import FileSource, Source, is_adapter, open_source
from unfused.merge._vocabulary import Vocabulary, align, check_same

__all__ = ["merge", "merge_to_folder"]

Tensor = torch.Tensor
Parameters = Mapping[str, Any] | Callable[[str], Mapping[str, Any]]
Progress = Callable[[int, int], Any]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LARGE = 1 << 23
"""Elements of a piece above which inputs are read one after the other: only methods that see whole tensors have such."""

_NOT_KEPT = {
    "adapter_config.json",
    "all_results.json",
    "eval_results.json",
    "merge.json",
    "optimizer.json",
    "run.json",
    "train_results.json",
    "trainer_state.json",
}
_KEPT = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}


def merge(
    method: str | Callable[..., Any] | MergeMethod,
    base: Any,
    models: Sequence[Any],
    *,
    copy: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge state dicts, models or checkpoints to a state dict.

    Parameters
    ----------
    method : str or callable
        Slug, such as "breadcrumbs" or "ties", or the method's function.
    base : mapping of str to Tensor, nn.Module, path, hub id, or None
        The common ancestor. Methods that need none (linear, slerp, soups) leave it out; adapters are merged into it.
    models : sequence of the same
        PEFT LoRA adapters too: they are merged into the base on the fly.
    copy : sequence of str, optional
        Regular expressions; tensors whose name one of them finds are not merged but copied from the base, or from the first
        model that has them. Classification heads are a case for it.
    dtype : str or torch.dtype, optional
        Of floating tensors in the result; by default each as in the base (or first model). Sums are float32.
    **parameters
        Of the method.

    Returns
    -------
    dict of str to Tensor
        Integer tensors are those of the base (or first model).

    Raises
    ------
    ValueError
        One line naming input and tensor: other names or shapes, NaN or infinities, unknown or wrong parameters.

    Examples
    --------
    >>> base, a, b = ({"w": torch.tensor([x])} for x in (1.0, 2.0, 4.0))
    >>> merge("task-arithmetic", base, [a, b], scale=0.5)
    {'w': tensor([3.])}
    """
    chosen, bound = _bind(method, parameters, models, base)
    below, sources = _open(base, models)
    ancestor = below if chosen.base == "required" else None
    plan = make_plan(ancestor, sources, copy, _dtype(dtype))
    run = _Merge(*_weighed(chosen, below, sources, bound), ancestor, sources)
    out = {}
    for item in plan.items:
        tensor = torch.empty(item.numel, dtype=item.dtype)
        for piece in run.pieces(item):
            tensor[piece.start : piece.stop] = run.compute(item, piece, run.read(item, piece))
        out[item.name] = tensor.view(item.shape)
    return out


def merge_to_folder(
    method: str | Callable[..., Any] | MergeMethod,
    base: str | os.PathLike[str] | None,
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    copy: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    vocab: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    hashes: str = "sampled",
    progress: Progress | None = None,
    per_tensor: Callable[[str], Mapping[str, Any]] | None = None,
    rank: int | None = None,
    **parameters: Any,
) -> Path:
    """Merge checkpoints to a folder that `AutoModel.from_pretrained` loads, with a few pieces of tensors in memory at a time.

    Parameters
    ----------
    method, copy, dtype, **parameters
        As for `merge`.
    base, models : path or hub id
        Safetensors, one file or sharded; PEFT LoRA adapters; `CHECKPOINT+ADAPTER`. Where all models are adapters and no base
        is given, the result is an adapter.
    out : path
        A folder that does not exist yet, or is empty.
    vocab : {"base", "union"}, optional
        Match rows of embeddings by tokens: keep the base's vocabulary, or all tokens.
    max_shard_bytes : int, default=5_000_000_000
    hashes : {"sampled", "full"}, default="sampled"
        What the model card says of the inputs: BLAKE2b of headers and samples, or SHA-256 of all bytes (slower).
    progress : callable (bytes done, bytes in all), optional
    per_tensor : callable (name) -> parameters, optional
        Parameters that differ from tensor to tensor; they go over `parameters`.
    rank : int, optional
        Of a resulting adapter; by default the sum of the ranks, with which linear methods are exact.

    Returns
    -------
    Path
        `out`: shards with index, config, tokenizer, README.md (the model card) and merge.json.

    Raises
    ------
    ValueError
        As for `merge`, and for files that are wrong: one line, before anything is written where headers can tell.
    DiskFull

    Examples
    --------
    >>> import tempfile; from safetensors.torch import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, value in (("a", 1.0), ("b", 3.0)):
    ...     save_file({"w": torch.tensor([value])}, folder / f"{name}.safetensors")
    >>> done = merge_to_folder("linear", None, [folder / "a.safetensors", folder / "b.safetensors"], folder / "out")
    >>> from unfused.data.checkpoint_io import open_checkpoint
    >>> dict(open_checkpoint(done))
    {'w': tensor([2.])}
    """
    if hashes not in ("sampled", "full"):
        raise ValueError(f"hashes={hashes!r} must be 'sampled' or 'full'")
    chosen, bound = _bind(method, parameters, models, base)
    target = Path(os.path.realpath(out))
    adapters = base is None and all(is_adapter(model) for model in models)
    if adapters:
        below, sources = None, list[Source]()
        inputs = [fetch(model) for model in models]
    else:
        below, sources = _open(base, models)
        inputs = [path for source in (below, *sources) if source is not None for path in source.paths]
    for path in inputs:
        if target == Path(os.path.realpath(path)):
            raise ValueError(f"out={printable(out)} is the folder of an input: choose another")
    settings = {"copy": list(copy), "dtype": str(dtype or ""), "vocab": vocab, "rank": rank}
    everyone = [*([below] if below is not None else []), *sources]
    with _stage(target) as stage:
        if adapters:
            return merge_adapters(chosen, models, bound, stage, target, rank, _finished, _publish)
        recipe = {
            "unfused": 1,
            "method": chosen.slug,
            "parameters": _plain(bound),
            "per_tensor": getattr(per_tensor, "description", None),
            "base": None if below is None else _entry(below, hashes),
            "models": [_entry(source, hashes) for source in sources],
            "max_shard_bytes": max_shard_bytes,
            **settings,
        }
        if _finished(target, recipe):
            return target
        vocabulary: Vocabulary | None = None
        if vocab is not None:
            below, sources, vocabulary = align(below, sources, vocab)
        else:
            check_same(everyone)
        ancestor = below if chosen.base == "required" else None
        plan = make_plan(ancestor, sources, copy, _dtype(dtype))
        writer = ShardWriter(
            stage / "model",
            {item.name: (item.dtype, item.shape) for item in plan.items},
            max_shard_bytes,
            _stem(everyone[0]),
        )
        _resume(stage, recipe, writer)
        run = _Merge(*_weighed(chosen, below, sources, bound, stage, per_tensor), ancestor, sources)
        with torch.inference_mode():
            run.to_shards(plan, writer, progress)
        if (stage / "weights.json").is_file():
            plan.notes.append(f"weights found: {_shortened(read_json(stage / 'weights.json'))}")
        # The config must describe what is written: that of a model, where it has a head that the base lacks.
        fits = vocabulary is not None or (
            ancestor is not None and all(item.name in ancestor for item in plan.items)
        )
        home = everyone[0] if fits else sources[0]
        _keep(home, stage / "model", _dtype(dtype), vocabulary)
        write_json(stage / "model" / "merge.json", recipe)
        write_card(stage / "model" / "README.md", recipe, plan.notes, target.name, hashes)
        _publish(stage, target)
    return target


# ---- one tensor


class _Merge:
    def __init__(
        self, method: MergeMethod, parameters: Parameters, base: Source | None, models: Sequence[Source]
    ) -> None:
        self.method, self.base, self.models = method, base, models
        self._parameters = parameters

    def parameters(self, name: str) -> Mapping[str, Any]:
        return self._parameters(name) if callable(self._parameters) else self._parameters

    def pieces(self, item: Item) -> Iterator[Piece]:
        splits = "elements" if item.source is not None else self.method.split(self.parameters(item.name))
        return pieces(item.shape, splits)

    def read(self, item: Item, piece: Piece) -> Sequence[Tensor]:
        """The piece of every input that has a part in it, the base first; large ones are read when they are asked for."""
        if item.source is not None:
            wanted: list[Source] = [item.source]
        else:
            wanted = [*([self.base] if self.base is not None else []), *self.models]
        if item.source is None and piece.stop - piece.start > LARGE:
            return _OnDemand(wanted, item, piece)
        return [source.read(item.name, piece.start, piece.stop).view(piece.shape) for source in wanted]

    def compute(self, item: Item, piece: Piece, inputs: Sequence[Tensor]) -> Tensor:
        """The merged piece, flat, in the result's type."""
        if item.source is not None:
            return inputs[0].reshape(-1).to(item.dtype)
        # Where a method is elementwise, a NaN comes through it: one look at the result is enough.
        elementwise = self.method.split(self.parameters(item.name)) == "elements"
        lazy = isinstance(inputs, _OnDemand)  # which looks at each tensor as it is read
        if not elementwise and not lazy and not all(_finite(tensor) for tensor in inputs):
            return self._not_finite(item, inputs)
        try:
            base, tensors = (inputs[0], inputs[1:]) if self.base is not None else (None, inputs)
            found = self.method.call(item.name, base, tensors, self.parameters(item.name))
        except _NotFinite:
            sources = [*([self.base] if self.base is not None else []), *self.models]
            return self._not_finite(item, [source[item.name] for source in sources])
        if found.shape != piece.shape:
            raise ValueError(
                f"{self.method.slug} gave {tuple(found.shape)} for tensor {item.name!r} of {piece.shape}: a fault of the method"
            )
        out = found.reshape(-1).to(item.dtype)
        if not _finite(out):
            if not all(_finite(tensor) for tensor in inputs):
                return self._not_finite(item, inputs)
            raise ValueError(
                f"the merged tensor {item.name!r} is too large for {item.dtype}: choose dtype='float32' or a smaller scale"
            )
        return out

    def _not_finite(self, item: Item, inputs: Sequence[Tensor]) -> Tensor:
        sources = [*([self.base] if self.base is not None else []), *self.models]
        for source, tensor in zip(sources, inputs, strict=True):
            if bool(tensor.isnan().any()):
                raise ValueError(
                    f"{source.where(item.name)}: tensor {item.name!r} holds NaN: leave that model out"
                )
        if all(torch.equal(tensor, inputs[0]) for tensor in inputs[1:]):  # a mask of -inf, say
            return inputs[0].reshape(-1).to(item.dtype)
        odd = next(
            source
            for source, tensor in zip(sources, inputs, strict=True)
            if not bool(tensor.isfinite().all())
        )
        raise ValueError(
            f"{odd.where(item.name)}: tensor {item.name!r} holds infinities: leave that model out"
        )

    def to_shards(self, plan: Plan, writer: ShardWriter, progress: Progress | None) -> None:
        items = {item.name: item for item in plan.items}
        left = writer.pending()
        size = {name: item.numel * item.dtype.itemsize for name, item in items.items()}
        total = sum(size.values())
        done = total - sum(size[name] for shard in left for name in shard.tensors)
        if progress is not None:
            progress(done, total)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as disk:
            for shard in left:
                work = [(items[n], piece) for n in shard.tensors for piece in self.pieces(items[n])]
                with writer.open(shard) as stream:
                    ahead: Future[Sequence[Tensor]] | None = None
                    writing: Future[None] | None = None
                    for i, (item, piece) in enumerate(work):
                        inputs = self.read(item, piece) if ahead is None else ahead.result()
                        ahead = reader.submit(self.read, *work[i + 1]) if i + 1 < len(work) else None
                        out = self.compute(item, piece, inputs)
                        if writing is not None:
                            writing.result()
                        writing = disk.submit(stream.write, out)
                        done += out.nbytes
                        if progress is not None:
                            progress(done, total)
                    if writing is not None:
                        writing.result()
        writer.finish()


class _NotFinite(Exception):
    pass


class _OnDemand(Sequence[Tensor]):
    """Whole tensors of many entries, one in memory at a time where the method takes one after the other."""

    def __init__(self, sources: Sequence[Source], item: Item, piece: Piece) -> None:
        self.sources, self._item, self._piece = sources, item, piece
        self.dtypes = [source.layout[item.name][0] for source in sources]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _OnDemand(self.sources[index], self._item, self._piece)
        piece = self._piece
        tensor = self.sources[index].read(self._item.name, piece.start, piece.stop).view(piece.shape)
        if not _finite(tensor):
            raise _NotFinite
        return tensor


def _finite(tensor: Tensor) -> bool:
    # The sum of anything with a NaN or an infinity is none; a sum that overflows is looked at again.
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(float(tensor.sum(dtype=wide))) or bool(tensor.isfinite().all())


# ---- what goes in


def _bind(
    method: Any, parameters: Mapping[str, Any], models: Sequence[Any], base: Any
) -> tuple[MergeMethod, dict[str, Any]]:
    chosen = find(method)
    if isinstance(models, str | os.PathLike | Mapping | nn.Module):
        raise TypeError("models: give a list of models, not one")
    if not len(models):
        raise ValueError("models is empty: give at least one")
    bound = chosen.bind(parameters, len(models))
    if chosen.base == "required" and base is None and not all(is_adapter(model) for model in models):
        raise ValueError(f"{chosen.slug} needs the common base of the models: give base (--base)")
    return chosen, bound


def _open(base: Any, models: Sequence[Any]) -> tuple[Source | None, list[Source]]:
    below = None if base is None else open_source(base, "base")
    return below, [open_source(model, f"models[{i}]", below) for i, model in enumerate(models)]


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _weighed(
    method: MergeMethod,
    base: Source | None,
    models: Sequence[Source],
    bound: dict[str, Any],
    stage: Path | None = None,
    per_tensor: Callable[[str], Mapping[str, Any]] | None = None,
) -> tuple[MergeMethod, Parameters]:
    """The method that works on tensors, and its parameters; weights found before a kill are not looked for again."""
    if method.then is None:
        if per_tensor is None:
            return method, bound
        return method, lambda name: {**bound, **per_tensor(name)}
    then = find(method.then)
    saved = None if stage is None else stage / "weights.json"
    if saved is not None and saved.is_file():
        weights = read_json(saved)
    else:
        weights = method.function(base, models, **bound)
        if isinstance(weights, Mapping):
            weights = {name: [float(w) for w in row] for name, row in weights.items()}
        else:
            weights = [float(w) for w in weights]
        if saved is not None:
            write_json(saved, weights)
    if not isinstance(weights, dict):
        return then, then.bind({method.weights: weights}, len(models))
    plain = then.bind({}, len(models))
    return then, lambda name: {**plain, method.weights: weights[name]} if name in weights else plain


# ---- the folder


@contextmanager
def _stage(target: Path) -> Iterator[Path]:
    """A folder beside the output that one process has at a time; it stays after a failure, for the next attempt."""
    stage = target.parent / f".{target.name}.merging"
    with disk_errors(target.parent):
        stage.mkdir(parents=True, exist_ok=True)
        lock = os.open(stage / "lock", os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"out={printable(target)}: another process is merging to it") from None
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                if not (target / "merge.json").is_file():
                    shutil.rmtree(stage)
                    raise ValueError(
                        f"out={printable(target)} exists and is not empty: choose another folder"
                    )
            try:
                yield stage
            except BaseException:
                if not any((stage / "model").glob("*.safetensors")):
                    shutil.rmtree(stage, ignore_errors=True)  # nothing in it is worth resuming
                raise
        finally:
            os.close(lock)


def _finished(target: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the output is there from an earlier run of the same merge; what else is there is not overwritten."""
    if not (target / "merge.json").is_file():
        return False
    stage = target.parent / f".{target.name}.merging"
    shutil.rmtree(stage, ignore_errors=True)
    if read_json(target / "merge.json") != json.loads(json.dumps(recipe)):
        raise ValueError(f"out={printable(target)} holds the result of another merge: choose another folder")
    return True


def _resume(stage: Path, recipe: Mapping[str, Any], writer: ShardWriter) -> None:
    """Keep the whole shards of an earlier attempt at the same merge; remove everything else."""
    plan, model = stage / "plan.json", stage / "model"
    if plan.is_file() and read_json(plan) == json.loads(json.dumps(recipe)):
        whole = {shard.name for shard in writer.shards} - {shard.name for shard in writer.pending()}
        for path in model.glob("*") if model.is_dir() else ():
            if path.name not in whole:
                path.unlink() if path.is_file() else shutil.rmtree(path)
    else:
        shutil.rmtree(model, ignore_errors=True)
        (stage / "weights.json").unlink(missing_ok=True)
    model.mkdir(exist_ok=True)
    write_json(plan, recipe)


def _publish(stage: Path, target: Path) -> None:
    """Give the finished folder its name, in one step."""
    if target.is_dir():
        target.rmdir()  # empty: looked at before
    os.replace(stage / "model", target)
    shutil.rmtree(stage, ignore_errors=True)


def _entry(source: Source, hashes: str) -> dict[str, str]:
    return {"source": source.label, "hash": source.fingerprint(hashes == "full")}


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, str | int | float | bool) or value is None:
            return value
        if isinstance(value, Sequence):
            return [plain(v) for v in value]
        return getattr(value, "__qualname__", type(value).__name__)

    return {name: plain(value) for name, value in parameters.items()}


def _shortened(weights: Any) -> str:
    text = json.dumps(weights)
    return text if len(text) <= 500 else f"{len(weights)} rows, from {text[:200]} ..."


def _stem(source: Source) -> str:
    if isinstance(source, FileSource) and source.checkpoint.files[0].name.startswith(
        "diffusion_pytorch_model"
    ):
        return "diffusion_pytorch_model"
    return "model"


def _keep(home: Source, folder: Path, dtype: torch.dtype | None, vocabulary: Vocabulary | None) -> None:
    """Config, tokenizer, generation config and code of the base (or first model)."""
    if home.folder is None:
        return
    for path in sorted(home.folder.iterdir()):
        kept = path.suffix in _KEPT and path.name not in _NOT_KEPT and not path.name.endswith(".index.json")
        if kept and path.is_file():
            shutil.copyfile(path, folder / path.name)
    config = folder / "config.json"
    if dtype is not None and config.is_file():
        text = config.read_text(encoding="utf-8")
        name = str(dtype).removeprefix("torch.")
        config.write_text(
            re.sub(r'("(?:torch_)?dtype"\s*:\s*)"[^"]*"', rf'\1"{name}"', text), encoding="utf-8"
        )
    if vocabulary is not None:
        vocabulary.write(folder)
