"""One fixed vector for a picture, a text or a recording, from any pretrained model of transformers.

`describe(source)` says, from its config alone, what a model can read, and gives a fingerprint of all its files or weights;
`load(source)` gives the towers that read it. What the vector is, by default:

    image-text, audio-text   the projection into the space that both share (CLIP, SigLIP, CLAP, ...)
    image                    the model's pooled output where the pooling has no linear layer (ResNet, DINOv2, SigLIP's vision
                             tower); else the class token (ViT, DeiT: that linear layer belongs to another task); else the mean
    text                     the mean of the last states over the text's tokens, or what `modules.json` says in a folder of
                             sentence-transformers
    audio                    the mean over the time that the clip fills, see `unfused.nn.encoders`

Only safetensors are read, and no code from a model's folder is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unfused.data.files import digest
from unfused.nn.encoders import AUDIO_PART, TransformersAudioEncoder, _evaluating, load_teacher
from unfused.nn.fingerprint import fingerprint

__all__ = ["MODALITIES", "POOLINGS", "Frozen", "Source", "describe", "load"]

MODALITIES = ("image", "text", "audio")
POOLINGS = ("auto", "cls", "mean", "last", "pooler")
_PADDED_TO_THE_END = ("siglip", "siglip2")  # were trained so, and give other features otherwise
_SENTENCE_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Source:
    """What `describe` found.

    Attributes
    ----------
    modalities : tuple of str
        The first is the one that is meant where none is named; two for models such as CLIP.
    fingerprint : str
        Of weights, config and processors; empty where it is known only once the model is here (a hub id's first use).
    name : str
        For messages.
    """

    modalities: tuple[str, ...]
    fingerprint: str
    name: str
    path: str = ""
    model: Any = field(default=None, repr=False)
    processors: tuple[Any, ...] = ()
    sentence: Mapping[str, Any] | None = None


# -- what a source is --------------------------------------------------------------------------------------------------


def describe(source: Any, processor: Any = None) -> Source:
    """Find out what a model reads, without loading its weights.

    Parameters
    ----------
    source : str, Path or model
        A folder, a hub id, a model of transformers or of sentence-transformers, or one that `unfused.load` gave.
    processor : object or sequence of objects, optional
        For a model: tokenizer, image processor, feature extractor, or a processor that holds several.

    Raises
    ------
    ValueError
        No model is there, or it reads neither pictures, texts nor recordings.
    """
    if isinstance(source, str | os.PathLike):
        return _describe_path(source, processor)
    inner = source
    if not isinstance(source, nn.Module) and isinstance(
        getattr(source, "model", None), nn.Module
    ):  # unfused.load
        inner, processor = source.model, processor or getattr(source, "processor", None)
    if not isinstance(inner, nn.Module):
        raise TypeError(f"model={type(source).__name__}: give a folder, a hub id or a model of transformers")
    name = type(inner).__name__
    processors = _parts(processor)
    if _is_sentence_transformer(inner):
        return Source(("text",), _digest_of(inner, processors), name, model=inner)
    if not hasattr(inner, "config"):
        raise TypeError(f"model={name}: give a model of transformers, or of sentence-transformers")
    if not _dual(inner):
        inner = getattr(inner, "base_model", inner)
    modalities = _modalities(type(inner), name)
    path = str(getattr(inner.config, "_name_or_path", "") or "")
    return Source(modalities, _digest_of(inner, processors), name, path, inner, processors)


def _describe_path(source: str | os.PathLike[str], processor: Any) -> Source:
    from transformers import MODEL_MAPPING, AutoConfig

    from unfused.nn.register import register

    register()
    name, path = os.fspath(source), Path(source).expanduser()
    if (path / "model" / "config.json").is_file() and not (
        path / "config.json"
    ).is_file():  # a run of `unfused adapt`
        path = path / "model"
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir())
        if not {"config.json", "modules.json"} & set(found):
            raise ValueError(
                f"model={name!r}: no config.json, so not a model saved by save_pretrained; "
                f"the folder holds {', '.join(found[:8]) or 'nothing'}"
            )
        where = str(path)
    elif path.exists() or path.is_absolute() or name.startswith(("~", ".")) or name.count("/") > 1:
        raise ValueError(f"model={name!r}: there is no such folder")
    else:
        where = name
    content = _fingerprint(where)
    sentence = _sentence_modules(where)
    if sentence is not None:
        return Source(("text",), content, repr(name), where, processors=_parts(processor), sentence=sentence)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        found_class = MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else _by_name(config)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"model={name!r}: {_first_line(error)}") from error
    model_class = found_class[0] if isinstance(found_class, tuple) else found_class
    modalities = _modalities(model_class, repr(name))
    return Source(modalities, content, repr(name), where, processors=_parts(processor))


def _by_name(config: Any) -> Any:
    import transformers

    return getattr(transformers, (config.architectures or ["no architecture"])[0])


def _dual(model: Any) -> str:
    """ "image" or "audio" where the model reads that and texts into one space."""
    if not hasattr(model, "get_text_features"):
        return ""
    return next((kind for kind in ("image", "audio") if hasattr(model, f"get_{kind}_features")), "")


def _modalities(model: Any, name: str) -> tuple[str, ...]:
    if kind := _dual(model):
        return (kind, "text")
    main = getattr(model, "main_input_name", "")
    inputs = {
        "pixel_values": "image",
        "input_ids": "text",
        "input_values": "audio",
        "input_features": "audio",
    }
    if main not in inputs:
        raise ValueError(
            f"model={name}: reads {main or 'nothing known'}, neither pictures, texts nor recordings"
        )
    return (inputs[main],)


def _parts(processor: Any) -> tuple[Any, ...]:
    """A processor, or several, as single tools."""
    if processor is None:
        return ()
    if isinstance(processor, list | tuple):
        return tuple(part for one in processor for part in _parts(one))
    names = ("tokenizer", "image_processor", "feature_extractor")
    inside = tuple(part for name in names if (part := getattr(processor, name, None)) is not None)
    return inside or (processor,)


def _is_sentence_transformer(model: Any) -> bool:
    return any(base.__name__ == "SentenceTransformer" for base in type(model).__mro__)


def _sentence_modules(where: str) -> dict[str, Any] | None:
    """Of a sentence-transformers folder: `pooling`, `normalize`, `max_length`, and whether we can do without it."""
    modules = _read_json(where, "modules.json")
    if modules is None:
        return None
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    prompts = _read_json(where, "config_sentence_transformers.json") or {}
    found: dict[str, Any] = {"simple": False}
    if (
        kinds[:2] == ["Transformer", "Pooling"]
        and set(kinds) <= set(_SENTENCE_MODULES)
        and not modules[0]["path"]
    ):
        pooling = _read_json(where, f"{modules[1]['path']}/config.json") or {}
        modes = {
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_cls_token": "cls",
            "pooling_mode_lasttoken": "last",
        }
        on = [key for key, value in pooling.items() if key.startswith("pooling_mode") and value is True]
        mode = modes.get(on[0], "") if len(on) == 1 else str(pooling.get("pooling_mode", ""))
        settings = _read_json(where, "sentence_bert_config.json") or {}
        found = {
            "pooling": {"lasttoken": "last"}.get(mode, mode),
            "normalize": "Normalize" in kinds,
            "max_length": settings.get("max_seq_length"),
            "simple": mode in ("mean", "cls", "last", "lasttoken")
            and not prompts.get("default_prompt_name")
            and not settings.get("do_lower_case"),
        }
    return found


def _read_json(where: str, name: str) -> Any:
    if os.path.isdir(where):
        local = os.path.join(where, name)
        path = local if os.path.isfile(local) else None
    else:
        from transformers.utils import cached_file

        path = None
        with suppress(OSError, ValueError):
            path = cached_file(
                where,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


# -- fingerprints ------------------------------------------------------------------------------------------------------

_DIGESTS: dict[tuple[str, int, int], str] = {}


def _fingerprint(where: str) -> str:
    if not os.path.isdir(where):
        from huggingface_hub import try_to_load_from_cache

        path = None
        with suppress(Exception):  # no valid id, no cache: the loader will say it better
            path = try_to_load_from_cache(where, "config.json")
        return f"{where}@{Path(path).parent.name}" if isinstance(path, str) else ""
    total = hashlib.blake2b(digest_size=16)
    folder = Path(
        where
    )  # parts of a model lie in sub-folders in sentence-transformers alone; others' are old checkpoints
    for path in sorted(folder.rglob("*") if (folder / "modules.json").is_file() else folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".txt", ".model") and path.is_file():
            total.update(
                f"{path.relative_to(where)} {_file_digest(path)}\n".encode("utf-8", "surrogateescape")
            )
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    """Of the content; read again only where size or time of change differ."""
    status = path.stat()
    here = (str(path), status.st_size, status.st_mtime_ns)
    if here not in _DIGESTS:
        _DIGESTS[here] = digest(path)
    return _DIGESTS[here]


def _digest_of(model: Any, processors: Sequence[Any]) -> str:
    """Of a model in memory: its weights may have been trained since the last call, so they are read each time."""
    total = hashlib.blake2b(digest_size=16)
    total.update(type(model).__name__.encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        total.update(config.to_json_string().encode())
    total.update(fingerprint(model).encode())
    for part in processors:
        total.update(_describe_processor(part).encode())
    return total.hexdigest()


def _describe_processor(part: Any) -> str:
    if hasattr(part, "to_json_string"):
        return part.to_json_string()
    backend = getattr(part, "backend_tokenizer", None)
    if backend is None:
        return repr(part)
    settings = json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # left behind by the last call
        settings.pop(state, None)
    return f"{json.dumps(settings)} {part.model_max_length}"


# -- towers ------------------------------------------------------------------------------------------------------------


class Frozen:
    """The tower of one modality.

    Attributes
    ----------
    prepare : callable
        One picture (a PIL image), text or waveform to what `embed` takes; safe in threads.
    embed : callable (list of prepared items, batch_size, bf16) -> ndarray (n, d), float32
    sampling_rate : int
        Of waveforms; 0 for other modalities.
    logit_scale : float or None
        The model's own, exponentiated, where it has one.
    """

    sampling_rate = 0

    def __init__(self, model: Any) -> None:
        self.model = model
        scale = getattr(model, "logit_scale", None)
        if scale is None:
            scale = getattr(model, "logit_scale_a", None)  # CLAP
        self.logit_scale = None if scale is None else float(scale.detach().exp())

    def prepare(self, item: Any) -> Any:
        return item

    def embed(self, items: Sequence[Any], batch_size: int, bf16: bool) -> np.ndarray:
        if not items:
            raise ValueError("items is empty: give at least one")
        device = next(self.model.parameters()).device
        result: np.ndarray | None = None
        with (
            _evaluating(self.model),
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, bf16),
        ):
            for rows, inputs in self._batches(items, batch_size):
                output = self._run({name: value.to(device) for name, value in inputs.items()})
                found = output.float().flatten(1).cpu().numpy()
                if result is None:
                    result = np.empty((len(items), found.shape[1]), np.float32)
                result[rows] = found
        assert result is not None
        return result

    def _batches(self, items: Sequence[Any], batch_size: int) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        raise NotImplementedError

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError


class _Image(Frozen):
    def __init__(self, model: Any, processor: Any, pooling: str, missing: Sequence[str] = ()) -> None:
        super().__init__(model)
        self.processor, self.pooling = processor, pooling
        pooler = getattr(model, "pooler", None)
        linear = pooler is not None and any(isinstance(module, nn.Linear) for module in pooler.modules())
        self.trusted_pooler = not linear and not any("pooler" in name for name in missing)
        self.class_token = any(name.endswith("cls_token") for name, _ in model.named_parameters())

    def prepare(self, item: Any) -> dict[str, Tensor]:
        return {name: value for name, value in self.processor(images=[item], return_tensors="pt").items()}

    def _batches(self, items: Sequence[Any], batch_size: int) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        groups: dict[
            Any, list[int]
        ] = {}  # pictures of equal size come together; nearly always there is one group
        for row, item in enumerate(items):
            groups.setdefault(tuple(sorted((name, value.shape) for name, value in item.items())), []).append(
                row
            )
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                rows = group[start : start + batch_size]
                yield rows, {name: torch.cat([items[row][name] for row in rows]) for name in items[rows[0]]}

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        if _dual(self.model):
            return _pooled(self.model.get_image_features(**inputs))
        output = self.model(**inputs)
        pooled, states = getattr(output, "pooler_output", None), output[0]
        if self.pooling == "pooler":
            if pooled is None:
                raise ValueError(
                    f"pooling='pooler': {type(self.model).__name__} has no pooled output; use 'mean'"
                )
            return pooled
        if self.pooling == "auto" and pooled is not None and self.trusted_pooler:
            return pooled
        if states.ndim == 4:  # (batch, channels, height, width)
            return states.mean((2, 3))
        if self.pooling == "cls" or (self.pooling == "auto" and self.class_token):
            return states[:, 0]
        return states.mean(1)


class _Text(Frozen):
    def __init__(
        self, model: Any, tokenizer: Any, pooling: str, sentence: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(model)
        self.tokenizer, self.normalize = tokenizer, bool(sentence and sentence["normalize"])
        self.pooling = sentence["pooling"] if sentence and pooling == "auto" else pooling
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        longest = int(tokenizer.model_max_length)
        if longest > 1_000_000:  # the tokenizer does not know; RoBERTa's first position is 2
            longest = getattr(config, "max_position_embeddings", 514) - 2
        if sentence and sentence["max_length"]:
            longest = min(longest, int(sentence["max_length"]))
        self.longest, self.whole = longest, model.config.model_type in _PADDED_TO_THE_END
        self.padding = {"pad_token": tokenizer.eos_token} if tokenizer.pad_token is None else {}
        self.lock = threading.Lock()

    def _batches(self, items: Sequence[Any], batch_size: int) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        tokenizer = self.tokenizer
        with self.lock:  # a tokenizer keeps its truncation and padding as state
            tokenized = tokenizer(list(items), truncation=True, max_length=self.longest)
        lengths = [len(ids) for ids in tokenized["input_ids"]]
        order = sorted(
            range(len(items)), key=lengths.__getitem__, reverse=True
        )  # together with their like: less padding
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        fill = {"input_ids": int(pad or 0), "attention_mask": 0, "token_type_ids": 0}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = self.longest if self.whole else max(lengths[rows[0]], 1)
            inputs = {}
            for name in tokenized:
                if name in fill:
                    padded = np.full((len(rows), width), fill[name])
                    for place, row in enumerate(rows):
                        padded[place, : lengths[row]] = tokenized[name][row]
                    inputs[name] = torch.from_numpy(padded)
            yield rows, inputs

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(inputs["input_ids"])
        if _dual(self.model):
            return _pooled(self.model.get_text_features(**inputs))
        output = self.model(**inputs)
        states = output[0]
        if self.pooling == "pooler":
            if getattr(output, "pooler_output", None) is None:
                raise ValueError(
                    f"pooling='pooler': {type(self.model).__name__} has no pooled output; use 'mean'"
                )
            found = output.pooler_output
        elif self.pooling == "cls":
            found = states[:, 0]
        elif self.pooling == "last":
            found = states[torch.arange(len(states)), mask.sum(1).clamp(min=1) - 1]
        else:
            weight = mask[..., None].to(states)
            found = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
        return nn.functional.normalize(found.float(), dim=-1) if self.normalize else found


class _Sentence(Frozen):
    """A model of sentence-transformers that only that library can run."""

    def embed(self, items: Sequence[Any], batch_size: int, bf16: bool) -> np.ndarray:
        device = next(self.model.parameters()).device
        with _evaluating(self.model), torch.autocast(device.type, torch.bfloat16, bf16):
            found = self.model.encode(
                list(items), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False
            )
        return np.asarray(found, np.float32)


class _Audio(Frozen):
    def __init__(self, model: Any, encoder: TransformersAudioEncoder) -> None:
        super().__init__(model)
        self.encoder, self.sampling_rate = encoder, encoder.sampling_rate

    def embed(self, items: Sequence[Any], batch_size: int, bf16: bool) -> np.ndarray:
        return self.encoder.embed_waveforms(items, batch_size=batch_size, bf16=bf16)


class _ClapAudio(TransformersAudioEncoder):
    """CLAP's audio branch with its projection into the space that it shares with texts."""

    def __init__(self, model: Any, feature_extractor: Any) -> None:
        super().__init__(model.audio_model, feature_extractor)
        self.projection = model.audio_projection
        self.embedding_dim = model.config.projection_dim

    def embed(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return nn.functional.normalize(
            self.projection(super().embed(input_values, attention_mask)).float(), dim=-1
        )


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


# -- loading -----------------------------------------------------------------------------------------------------------


def load(
    source: Source, modality: str, pooling: str = "auto", max_seconds: float = 30.0, device: str | None = None
) -> Frozen:
    """The tower of `source` that reads `modality`.

    Parameters
    ----------
    source : Source
        What `describe` gave.
    modality : {"image", "text", "audio"}
    pooling : {"auto", "cls", "mean", "last", "pooler"}, default="auto"
        "last" is the text's last token.
    max_seconds : float, default=30.0
        Longer recordings are embedded in windows, averaged.
    device : str, optional
        By default a model in memory stays where it is, and one that is loaded goes to the GPU where there is one.

    Raises
    ------
    ValueError
        The model does not read this, a processor is missing, the checkpoint lacks weights, or a library does.
    """
    if modality not in source.modalities:
        raise ValueError(f"modality={modality!r}: {source.name} reads {' and '.join(source.modalities)}")
    if device is None and source.model is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = source.model
    missing: list[str] = []
    if source.sentence is not None and not source.sentence["simple"]:
        return _Sentence(_sentence_transformer(source).to(device))
    if model is None and source.modalities == ("audio",):
        try:
            teacher = load_teacher(source.path, max_seconds)
        except ValueError as error:
            raise ValueError(str(error).replace("teacher ", "model=", 1)) from error
        return _Audio(teacher.model, teacher.to(device))
    if model is None:
        model, missing = _from_pretrained(source)
        model.eval().requires_grad_(False)
    if device is not None:
        model.to(device)
    if _is_sentence_transformer(model):
        return _Sentence(model)
    if modality == "audio":
        extractor = _processor(source, "feature_extractor")
        if _dual(model):
            return _Audio(model, _ClapAudio(model, extractor))
        model = model.get_submodule(AUDIO_PART.get(type(model).__name__, ""))
        return _Audio(model, TransformersAudioEncoder(model, extractor, max_seconds))
    if modality == "image":
        return _Image(model, _processor(source, "image_processor"), pooling, missing)
    tokenizer = _processor(source, "tokenizer")
    if getattr(model.config, "is_encoder_decoder", False) and not _dual(model):
        model = model.get_encoder()
    return _Text(model, tokenizer, pooling, source.sentence)


def _sentence_transformer(source: Source) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            f"model={source.name} needs the sentence-transformers library: pip install 'unfused[sentence-transformers]'"
        ) from None
    return SentenceTransformer(source.path, trust_remote_code=False, model_kwargs={"use_safetensors": True})


def _from_pretrained(source: Source) -> tuple[Any, list[str]]:
    from transformers import MODEL_MAPPING, AutoConfig, AutoModel
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()  # its report of unused heads is no news here; missing weights are an error below
        logging.disable_progress_bar()
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        loader = AutoModel if type(config) in MODEL_MAPPING else _by_name(config)
        model, loading = loader.from_pretrained(
            source.path,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ValueError(f"model={source.name}: it cannot be loaded ({_first_line(error)})") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    missing = sorted(key for key in loading["missing_keys"] if not key.endswith("position_ids"))
    needed = [key for key in missing if "pooler" not in key and "mask_token" not in key]
    if needed:
        shown = ", ".join(needed[:5]) + (f" and {len(needed) - 5} more" if len(needed) > 5 else "")
        raise ValueError(
            f"model={source.name}: the checkpoint lacks {len(needed)} weights of {type(model).__name__}, "
            f"which would stay random: {shown}"
        )
    return model, missing


_KINDS: dict[str, tuple[str, str, Callable[[Any], bool]]] = {
    "tokenizer": ("tokenizer", "AutoTokenizer", lambda part: hasattr(part, "model_max_length")),
    "image_processor": ("image processor", "AutoImageProcessor", lambda part: hasattr(part, "image_mean")),
    "feature_extractor": (
        "feature extractor",
        "AutoFeatureExtractor",
        lambda part: hasattr(part, "sampling_rate"),
    ),
}


def _processor(source: Source, kind: str) -> Any:
    import transformers

    words, auto, fits = _KINDS[kind]
    for part in source.processors:
        if fits(part) or (kind == "image_processor" and "ImageProcessor" in type(part).__name__):
            return part
    if not source.path:
        raise ValueError(f"processor=None: {source.name} comes without its {words}; give it as processor=")
    # The one that uses Pillow gives the same features whether torchvision is installed or not.
    options = ({"backend": "pil"}, {}) if kind == "image_processor" else ({},)
    failure: Exception = ValueError("none was found")
    for option in options:
        try:
            tool = getattr(transformers, auto).from_pretrained(source.path, trust_remote_code=False, **option)
            if kind == "tokenizer" and len(tool) <= len(tool.all_special_tokens):
                raise ValueError(
                    "its files are missing: it knows no words"
                )  # transformers makes an empty one
            return tool
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            failure = error
    given = "" if source.model is None else "; give it as processor="
    raise ValueError(
        f"model={source.name}: its {words} cannot be loaded ({_first_line(failure)}){given}"
    ) from failure


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
