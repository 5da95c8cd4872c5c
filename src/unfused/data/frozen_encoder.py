"""FrozenEncoder: pictures, texts or recordings to features of a pretrained model, as a scikit-learn transformer."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin

from unfused.data.files import BadFile, cache_root, printable
from unfused.data.object_cache import ObjectCache, stack
from unfused.nn.zero_shot import unit_rows

if TYPE_CHECKING:
    from PIL import Image

    from unfused.nn.frozen import Frozen, Source

__all__ = ["FrozenEncoder"]

_VERSION = 1
_TEMPLATES = {"image": ("a photo of a {}.",), "audio": ("this is a sound of {}.",), "text": ("{}",)}
_CHUNK = 256
_LOADED: weakref.WeakValueDictionary[tuple[Any, ...], Frozen] = weakref.WeakValueDictionary()
"""Clones of one encoder (a search over a pipeline makes dozens) share the weights as long as one of them lives."""


class FrozenEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features of a pretrained model that is not trained: paths, pictures, arrays or strings in, (n, d) out.

    `fit` learns nothing but the number of features; `transform` works without it. Features are kept on disk by the content
    of each item, the fingerprint of the model and the settings, so that a second call, another fold or another program
    computes nothing, and need not even load the model. The cache only grows; delete its folder at any time.

    Parameters
    ----------
    model : str, path or model
        A folder or a hub id of any transformers model for pictures, texts or recordings, of one that reads two of them into
        one space (CLIP, SigLIP, CLAP), of a sentence-transformers model, or of one that `unfused adapt` made (its `model`
        folder or its run's). Or such a model in memory, which is shared by clones, not copied. Only safetensors are read, and
        no code of the folder runs.
    processor : object or sequence of objects, optional
        For a model in memory: its tokenizer, image processor, feature extractor, or a processor that holds them.
    modality : {"image", "text", "audio"}, optional
        What `transform` is given; to be named only for texts of an image-text model.
    pooling : {"auto", "cls", "mean", "last", "pooler"}, default="auto"
        How an image or text model's states become one vector. "auto": the projection of models with a shared space;
        for texts the mean over tokens, or what a sentence-transformers folder says; for pictures the pooled output where
        that has no linear layer, else the class token, else the mean. "last" (texts) is the last token.
        Recordings: always the mean over the time that the clip fills.
    normalize : bool, default=False
        Scale each row to length 1.
    batch_size : int, default=32
    bf16 : bool, optional
        bfloat16 autocast; by default where the processor has instructions for it. Features then have 3 digits.
    sampling_rate : int, optional
        Of waveforms given as arrays, Hz; by default the model's own. (Files know theirs.)
    max_seconds : float, default=30.0
        Longer recordings are embedded in windows, averaged; models with a window of their own use that.
    errors : {"raise", "nan"}, default="raise"
        What to do about items that cannot be read: name the first and say how many, or give rows of NaN and a warning.
    cache_dir : path or None, default="auto"
        "auto" is `$UNFUSED_CACHE/features` or `~/.cache/unfused/features`; None keeps nothing.
    device : str, optional
        By default the GPU where there is one; a model in memory stays where it is.
    workers : int, optional
        Threads that read and prepare; by default one per processor.
    progress : bool, optional
        A bar on standard error; by default where that is a terminal.

    Raises
    ------
    TypeError, ValueError
        From `fit` and `transform`, each one line: no such model, a checkpoint that lacks weights, a missing tokenizer or
        library, a modality that the model does not read, items of the wrong type, files that cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import ViTConfig, ViTModel
    >>> from unfused.nn.encoders import image_processor
    >>> sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    >>> vit = ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes))
    >>> encoder = FrozenEncoder(vit, processor=image_processor(32, [0.5] * 3, [0.5] * 3), cache_dir=tempfile.mkdtemp())
    >>> pictures = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3), np.uint8)
    >>> encoder.fit_transform(pictures).shape
    (5, 16)
    >>> encoder.get_feature_names_out()[:2].tolist()
    ['frozenencoder0', 'frozenencoder1']
    """

    def __init__(
        self,
        model: Any,
        *,
        processor: Any = None,
        modality: str | None = None,
        pooling: str = "auto",
        normalize: bool = False,
        batch_size: int = 32,
        bf16: bool | None = None,
        sampling_rate: int | None = None,
        max_seconds: float = 30.0,
        errors: str = "raise",
        cache_dir: str | os.PathLike[str] | None = "auto",
        device: str | None = None,
        workers: int | None = None,
        progress: bool | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.modality = modality
        self.pooling = pooling
        self.normalize = normalize
        self.batch_size = batch_size
        self.bf16 = bf16
        self.sampling_rate = sampling_rate
        self.max_seconds = max_seconds
        self.errors = errors
        self.cache_dir = cache_dir
        self.device = device
        self.workers = workers
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> FrozenEncoder:
        """Check the settings and the kind of `X`, and find out the number of features.

        Parameters
        ----------
        X : array-like of length n
            See `transform`.
        y : ignored

        Returns
        -------
        self
        """
        source, modality = self._source()
        _items(X, modality)
        self._n_features_out = self._width(source, modality)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Encode.

        Parameters
        ----------
        X : array-like of length n, or a frame or array with one column
            Pictures: paths, PIL images, or arrays (h, w), (h, w, 3) or (3, h, w) of bytes or of floats in 0..1.
            Texts: strings. Recordings: paths, or waveforms (samples,), or dicts with `array` and `sampling_rate`.

        Returns
        -------
        ndarray of shape (n, d), float32
        """
        source, modality = self._source()
        return self._encode(_items(X, modality), source, modality, "nan" if self.errors == "nan" else None)

    def encode_classes(
        self,
        names: Sequence[str],
        templates: str | Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """The text classifier of an image-text (audio-text, text) model: a unit vector for each class.

        Parameters
        ----------
        names : sequence of str, or mapping of str to sequence of str
            Class names; or of each class its own sentences, to which no template is applied.
        templates : str or sequence of str, optional
            Each with a `{}` for the name; the class's vector is the mean of the unit vectors, scaled to length 1. Default:
            "a photo of a {}.", "this is a sound of {}." or, for a text model, "{}".
        batch_size : int, optional
            By default the encoder's.

        Returns
        -------
        ndarray of shape (len(names), d), float32
            In the order of `names`: what the estimators of `unfused.label` take as `text_features`.
        """
        source, _ = self._source()
        if "text" not in source.modalities:
            raise ValueError(f"model={source.name} reads no texts: give an image-text model such as CLIP")
        if (
            isinstance(names, str)
            or not len(names)
            or not all(isinstance(name, str) and name.strip() for name in names)
        ):
            raise ValueError(
                f"names={names!r}: give at least one class name, each a string that is not empty"
            )
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if list(names).count(name) > 1})
            raise ValueError(f"names has {twice[0]!r} more than once: class names must differ")
        if isinstance(names, Mapping):
            sentences = [[texts] if isinstance(texts, str) else list(texts) for texts in names.values()]
            if not all(sentences):
                raise ValueError("names: a class has no sentences; give each at least one")
        else:
            chosen = _TEMPLATES[source.modalities[0]] if templates is None else templates
            chosen = [chosen] if isinstance(chosen, str) else list(chosen)
            if not chosen or not all("{}" in template for template in chosen):
                raise ValueError(f"templates={chosen!r}: each needs a {{}} where the name goes")
            sentences = [[template.replace("{}", name) for template in chosen] for name in names]
        texts = [text for each in sentences for text in each]
        rows = unit_rows(self._encode(texts, source, "text", None, batch_size))
        first = np.cumsum([0, *map(len, sentences[:-1])])
        return unit_rows(np.add.reduceat(rows, first, axis=0))

    @property
    def logit_scale(self) -> float:
        """The model's own factor on cosines of image and text, 100 for most CLIPs."""
        source, modality = self._source()
        scale = self._tower(source, modality).logit_scale
        if scale is None:
            raise ValueError(f"model={source.name} has no logit scale: it is no image-text model")
        return scale

    # -- inside --------------------------------------------------------------------------------------------------------

    def _source(self) -> tuple[Source, str]:
        from unfused.nn.frozen import MODALITIES, POOLINGS, describe

        for name, value, allowed in (
            ("modality", self.modality, (None, *MODALITIES)),
            ("pooling", self.pooling, POOLINGS),
            ("errors", self.errors, ("raise", "nan")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(str(one) for one in allowed)}")
        if not isinstance(self.batch_size, int | np.integer) or self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r}: give a whole number, at least 1")
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds={self.max_seconds!r}: give more than 0")
        source = describe(self.model, self.processor)
        modality = self.modality or source.modalities[0]
        if modality not in source.modalities:
            raise ValueError(f"modality={modality!r}: {source.name} reads {' and '.join(source.modalities)}")
        return source, modality

    def _tower(self, source: Source, modality: str) -> Frozen:
        from unfused.nn.frozen import load

        settings = (modality, self.pooling, self.max_seconds, self.device)
        owner = id(source.model) if source.model is not None else source.path
        key = (owner, source.fingerprint, tuple(map(id, source.processors)), *settings)
        tower = _LOADED.get(key)
        if tower is None:
            tower = _LOADED[key] = load(source, *settings)
        self.__dict__.setdefault("_towers", {})[modality] = tower  # keeps it alive
        return tower

    def _encode(
        self,
        items: list[Any],
        source: Source,
        modality: str,
        on_error: str | None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        if not items:
            raise ValueError("X is empty: give at least one item")
        if not source.fingerprint:  # a hub id that has never been here: load it, then it has one
            from unfused.nn.frozen import describe

            self._tower(source, modality)
            source = describe(self.model, self.processor)
        work = _Work(self, source, modality, batch_size or self.batch_size)
        is_path = np.array([modality != "text" and isinstance(item, str | os.PathLike) for item in items])
        rows: np.ndarray | None = None
        reasons: dict[int, str] = {}
        with _bar(self.progress, len(items), modality) as advance:
            for paths in (True, False):
                chosen = np.flatnonzero(is_path == paths)
                if len(chosen):
                    found, bad = work.run([items[index] for index in chosen], paths, advance)
                    if rows is None or rows.shape[1] == 0:
                        rows = np.full((len(items), found.shape[1]), np.nan, np.float32)
                    if found.shape[1]:
                        rows[chosen] = found
                    reasons |= {int(chosen[index]): reason for index, reason in bad.items()}
        assert rows is not None
        if reasons:
            self._complain(items, reasons, on_error)
        if not rows.shape[1]:  # nothing could be read, so nothing says how many features there are
            rows = np.full((len(items), self._width(source, modality)), np.nan, np.float32)
        return unit_rows(rows) if self.normalize else rows

    def _width(self, source: Source, modality: str) -> int:
        probe: Any = "a"
        if modality == "image":
            probe = np.full((32, 32, 3), 128, np.uint8)
        elif modality == "audio":
            probe = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
        return self._encode([probe], source, modality, None).shape[1]

    def _complain(self, items: list[Any], reasons: dict[int, str], on_error: str | None) -> None:
        first = min(reasons)
        item = items[first]
        name = printable(item) if isinstance(item, str | os.PathLike) else type(item).__name__
        message = f"X[{first}]={name}: {reasons[first]}"
        if len(reasons) > 1:
            message += f" ({len(reasons)} of {len(items)} items cannot be used)"
        if on_error is None:
            raise ValueError(f"{message}; errors='nan' gives rows of NaN instead")
        warnings.warn(f"{message}; NaN in their place", UserWarning, stacklevel=4)

    def __sklearn_clone__(self) -> FrozenEncoder:
        """The model in memory is frozen: clones share it."""
        copy = type(self)(**self.get_params(deep=False))
        if "_towers" in self.__dict__:
            copy._towers = dict(self._towers)
        if hasattr(self, "_sklearn_output_config"):
            copy._sklearn_output_config = dict(self._sklearn_output_config)
        return copy

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_towers"}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []
        return tags


class _Work:
    """One call of `transform`: how an item is read, and how many are encoded."""

    def __init__(self, encoder: FrozenEncoder, source: Source, modality: str, batch_size: int) -> None:
        from transformers import __version__ as version

        from unfused.train.engine import supports_bf16

        self.encoder, self.source, self.modality, self.batch_size = encoder, source, modality, batch_size
        self.bf16 = supports_bf16() if encoder.bf16 is None else bool(encoder.bf16)
        settings = (source.fingerprint, modality, encoder.pooling, encoder.max_seconds, self.bf16, version)
        self.key = " ".join(map(str, ("frozen", _VERSION, *settings)))
        self.lock = threading.Lock()
        self.failure: Exception | None = None
        self.loaded: Frozen | None = None

    @property
    def tower(self) -> Frozen:
        """Loaded when the first item is missing in the cache."""
        with self.lock:
            if self.failure is not None:
                raise self.failure
            if self.loaded is None:
                try:
                    self.loaded = self.encoder._tower(self.source, self.modality)
                except Exception as error:  # in a thread, where the cache would take it for the file's fault
                    self.failure = error
                    raise
            return self.loaded

    def run(
        self, items: list[Any], paths: bool, advance: Callable[[int], None]
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Rows (n, d), d = 0 where none can be read, and why some cannot."""
        before = 0

        def progress(done: int, total: int) -> None:
            nonlocal before
            advance(done - before)
            before = done

        folder = self.encoder.cache_dir
        read = self.read_path if paths else self.read_object
        if folder is None:
            return self._uncached(items, read, progress)
        if folder == "auto":
            folder = cache_root() / "features"
        cache = ObjectCache(folder, self.key, shape=(-1,))
        how: dict[str, Any] = {"workers": self.encoder.workers, "progress": progress}
        try:
            if paths:
                found = cache.get(items, read, self.embed, **how)
            else:
                found = cache.get_objects(items, self.digest, read, self.embed, **how)
        finally:
            if self.failure is not None:
                raise self.failure
        return stack(found, int(found.sizes[found.usable].max(initial=0))), found.reasons

    def _uncached(
        self, items: list[Any], read: Callable[[Any], Any], progress: Callable[[int, int], None]
    ) -> tuple[np.ndarray, dict[int, str]]:
        def attempt(item: Any) -> Any:
            try:
                return read(item)
            except BadFile as error:
                return error

        rows: np.ndarray = np.empty((len(items), 0), np.float32)
        reasons: dict[int, str] = {}
        chunk = max(_CHUNK // self.batch_size, 1) * self.batch_size
        _ = self.tower  # what is wrong with it is said before any thread starts
        with ThreadPoolExecutor(self.encoder.workers) as threads:
            ready = list(threads.map(attempt, items[:chunk]))
            for start in range(0, len(items), chunk):
                following = [
                    threads.submit(attempt, item) for item in items[start + chunk : start + 2 * chunk]
                ]
                good = [index for index, item in enumerate(ready) if not isinstance(item, BadFile)]
                found = (
                    dict(zip(good, self.embed([ready[index] for index in good]), strict=True)) if good else {}
                )
                for index, item in enumerate(ready):
                    outcome = found.get(index, item)
                    if isinstance(outcome, BadFile):
                        reasons[start + index] = outcome.reason
                    else:
                        if not rows.shape[1]:
                            rows = np.full((len(items), len(outcome)), np.nan, np.float32)
                        rows[start + index] = outcome
                progress(start + len(ready), len(items))
                ready = [future.result() for future in following]
        return rows, reasons

    def embed(self, prepared: list[Any]) -> list[Any]:
        """As many rows, or a reason instead of one."""
        rows = self.tower.embed(prepared, self.batch_size, self.bf16)
        finite = np.isfinite(rows).all(1)
        return [
            row if good else BadFile("the model gave NaN or infinity")
            for row, good in zip(rows, finite, strict=True)
        ]

    def read_path(self, path: str | os.PathLike[str]) -> Any:
        """Raises BadFile."""
        if self.modality == "image":
            from unfused.data.images import open_rgb

            return self.tower.prepare(open_rgb(path))
        from unfused.data.audio import decode

        return self.tower.prepare(decode(path, self.tower.sampling_rate))

    def read_object(self, item: Any) -> Any:
        """Raises BadFile."""
        if self.modality == "text":
            if not isinstance(item, str):
                raise BadFile(f"not a string but {type(item).__name__}")
            return self.tower.prepare(item)
        if self.modality == "image":
            return self.tower.prepare(_picture(item))
        waveform, rate = _waveform(item, self.encoder.sampling_rate)
        own = self.tower.sampling_rate
        if rate is not None and rate != own:
            import soxr

            waveform = soxr.resample(waveform, rate, own)
        return self.tower.prepare(waveform)

    def digest(self, item: Any) -> bytes:
        """Of an item's content, whatever it is: what cannot be used is found out when it is read."""
        total = hashlib.blake2b(digest_size=32)
        if isinstance(item, str):
            total.update(b"text" + item.encode("utf-8", "surrogatepass"))
            return total.digest()
        if isinstance(item, Mapping):
            total.update(str(item.get("sampling_rate")).encode())
            item = item.get("array")
        elif self.modality == "audio":
            total.update(str(self.encoder.sampling_rate).encode())
        if hasattr(item, "getexif"):  # a PIL image; its palette and its orientation count
            item = _picture(item)
        try:
            array = np.ascontiguousarray(item)
        except ValueError:  # a ragged list
            array = np.asarray(repr(item))
        total.update(f"{array.dtype} {array.shape} ".encode())
        total.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
        return total.digest()


# -- items -------------------------------------------------------------------------------------------------------------


def _items(X: Any, modality: str) -> list[Any]:
    """The items of `X`, or a TypeError that says what to give."""
    wanted = {
        "image": "paths, PIL images or arrays of pixels",
        "text": "strings",
        "audio": "paths or waveforms",
    }[modality]
    if isinstance(X, str | os.PathLike | bytes | Mapping) or hasattr(X, "getexif"):
        raise TypeError(f"X is one {type(X).__name__}: give a list of {wanted}")
    if hasattr(X, "columns"):
        if len(X.columns) != 1:
            raise ValueError(f"X has {len(X.columns)} columns: give the one that holds {wanted}")
        X = X[X.columns[0]]
    if not isinstance(X, Iterable):
        raise TypeError(f"X is a {type(X).__name__}: give a list of {wanted}")
    if hasattr(X, "detach"):
        X = X.detach().cpu().numpy()
    if isinstance(X, np.ndarray):
        if X.dtype.kind in "OUT" and X.ndim == 2 and X.shape[1] == 1:
            X = X[:, 0]
        plain = X.dtype.kind in "OUT"
        axes = {"image": (3, 4), "text": (), "audio": (2,)}[modality]
        if (plain and X.ndim != 1) or (not plain and X.ndim not in axes):
            raise TypeError(f"X is an array of shape {X.shape} and {X.dtype}: give a list of {wanted}")
    return list(X)


def _picture(item: Any) -> Image.Image:
    """A picture in memory as an RGB image of PIL."""
    from PIL import Image, ImageOps

    from unfused.data.images import _rgb

    if isinstance(item, Image.Image):
        return _rgb(ImageOps.exif_transpose(item))
    if hasattr(item, "detach"):
        item = item.detach().cpu().numpy()
    try:
        array = np.asarray(item)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "buif":
        raise BadFile(f"not a picture: {type(item).__name__}")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise BadFile(f"an array of shape {array.shape} is no picture: give (h, w), (h, w, 3) or (3, h, w)")
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            raise BadFile("floating-point pixels outside of 0..1: scale them, or give bytes")
        array = np.round(array * 255)
    elif array.dtype.kind == "b":
        array = array * np.uint8(255)
    elif array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 255):
        raise BadFile("whole-number pixels outside of 0..255")
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return _rgb(Image.fromarray(np.ascontiguousarray(array, np.uint8)))


def _waveform(item: Any, rate: int | None) -> tuple[np.ndarray, int | None]:
    """Mono samples and their rate, None for the model's own."""
    if isinstance(item, Mapping):
        if item.get("array") is None:
            raise BadFile("not a recording: a dict needs 'array' and 'sampling_rate'")
        item, rate = item["array"], int(item.get("sampling_rate") or rate or 0) or None
    if hasattr(item, "detach"):
        item = item.detach().cpu().numpy()
    try:
        waveform = np.asarray(item, np.float32)
    except (TypeError, ValueError):
        raise BadFile(f"not a recording: {type(item).__name__}") from None
    if np.asarray(item).dtype.kind in "iu":
        raise BadFile("whole-number samples: scale them to floats in -1..1")
    if waveform.ndim != 1 or not len(waveform):
        raise BadFile(f"an array of shape {waveform.shape} is no mono recording: give (samples,)")
    if not np.isfinite(waveform).all():
        raise BadFile("NaN or infinite samples")
    return waveform, rate


@contextmanager
def _bar(progress: bool | None, total: int, modality: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal if progress is None else progress):
        yield lambda count: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=console.is_terminal) as bars:
        task = bars.add_task(f"encoding {modality}s", total=total)
        yield lambda count: bars.advance(task, count)
