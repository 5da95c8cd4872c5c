"""Encoders besides AudioNTT: small image models, and any pretrained audio model of transformers as a teacher.

All under one contract: ``forward(x) -> (frames (batch, T, D), [block features (batch, block_dims[i])])``,
``pool(frames)``, ``embed(x) -> (batch, embedding_dim)``, ``embedding_dim`` and ``block_dims``: all that the
methods here need of it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

__all__ = [
    "PretrainedImageEncoder",
    "ResNetEncoder",
    "TransformersAudioEncoder",
    "ViTEncoder",
    "embed_all",
    "image_processor",
    "load_teacher",
]

Progress = Callable[[int, int], None]

# Model types that are treated apart.
AST, CLAP, WHISPER, UNFUSED = "audio-spectrogram-transformer", "clap_audio_model", "whisper", "unfused-audio"
AUDIO_PART = {
    "ClapModel": "audio_model",
    "ClapAudioModelWithProjection": "audio_model",
    "WhisperModel": "encoder",
}
FIXED_WINDOW = (AST, CLAP, WHISPER)  # the extractor fills every clip up to the same length


# Pictures


class _ImageEncoder(nn.Module):
    """What the image encoders share: a transformers model and the way to its classifier."""

    classifier_class: type[PreTrainedModel]
    model: PreTrainedModel
    block_dims: list[int]
    embedding_dim: int

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        raise NotImplementedError

    def pool(self, frames: Tensor) -> Tensor:
        raise NotImplementedError

    def embed(self, x: Tensor) -> Tensor:
        """Normalised pictures (batch, 3, side, side) to embeddings (batch, embedding_dim)."""
        return self.pool(self(x)[0])

    def to_classifier(
        self, num_labels: int | Mapping[int, str], id2label: Mapping[int, str] | None = None
    ) -> Any:
        """A transformers classifier around THIS encoder (shared, not copied), a new head on ``embed(x)``.

        Parameters
        ----------
        num_labels : int, or the names themselves
        id2label : mapping of class index to name, optional

        Examples
        --------
        >>> model = ResNetEncoder(width=4).to_classifier({0: "cat", 1: "dog"}).eval()
        >>> model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape, type(model).__name__
        (torch.Size([1, 2]), 'ResNetForImageClassification')
        """
        if isinstance(num_labels, Mapping):
            id2label, num_labels = num_labels, len(num_labels)
        config = copy.deepcopy(self.model.config)
        config.num_labels = num_labels
        if id2label is not None:
            if num_labels != len(id2label):
                raise ValueError(f"num_labels={num_labels}, but id2label names {len(id2label)} classes")
            config.id2label = dict(id2label)
            config.label2id = {name: index for index, name in id2label.items()}
        classifier = self.classifier_class(config)
        setattr(classifier, classifier.base_model_prefix, self.model)
        return classifier.train(self.training)

    @staticmethod
    def load_head(classifier: Any, head: nn.Linear) -> None:
        """Copy a head trained on ``embed(x)`` into a classifier made by :meth:`to_classifier`."""
        (target,) = (module for module in classifier.classifier.modules() if isinstance(module, nn.Linear))
        target.load_state_dict(head.state_dict())


class ResNetEncoder(_ImageEncoder):
    """A small ResNet of transformers: basic blocks, four stages, three of them with block features.

    Its stem (7x7 convolution and pooling) divides the side by 4 and the stages by 8 more, and a saved model
    must keep it to be loadable without us. Enlarging 32-pixel pictures to 64 makes a step 2.5 times as long;
    on CIFAR-10 (2,000 labels, one seed) it gave .43 for .41 at equal steps, and .43 for .48 at equal time.

    Parameters
    ----------
    width : int, default=32
        Channels of stem and first stage, doubled by each further stage. With 64 and the default depths it is
        ResNet-18.
    depths : sequence of 4 int, default=(2, 2, 2, 2)
        Blocks of each stage.

    References
    ----------
    Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385.

    Examples
    --------
    >>> encoder = ResNetEncoder(width=8)
    >>> frames, blocks = encoder(torch.zeros(2, 3, 64, 64))
    >>> frames.shape, [block.shape[1] for block in blocks], encoder.embed(torch.zeros(2, 3, 64, 64)).shape
    (torch.Size([2, 4, 64]), [8, 16, 32], torch.Size([2, 64]))
    """

    classifier_class = ResNetForImageClassification

    def __init__(self, width: int = 32, depths: Sequence[int] = (2, 2, 2, 2)) -> None:
        super().__init__()
        if len(depths) != 4:
            raise ValueError(f"depths={tuple(depths)}: give the number of blocks of 4 stages")
        sizes = [width * 2**stage for stage in range(4)]
        self.model = ResNetModel(
            ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=list(depths), layer_type="basic")
        )
        self.block_dims, self.embedding_dim = sizes[:3], sizes[3]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures (batch, 3, side, side) to places (batch, (side / 32)^2, 8 width) and the stages' means."""
        out = self.model(x, output_hidden_states=True)
        _, *stages = out.hidden_states
        return out.last_hidden_state.flatten(2).mT, [stage.mean((2, 3)) for stage in stages[:3]]

    def pool(self, frames: Tensor) -> Tensor:
        return frames.mean(1)


class ViTEncoder(_ImageEncoder):
    """A small vision transformer of transformers; block features after one, two and three quarters of its
    depth.

    Parameters
    ----------
    image_size : int, default=64
    patch_size : int, default=8
    dim : int, default=192
    depth : int, default=6
    heads : int, default=3

    References
    ----------
    An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929.

    Examples
    --------
    >>> encoder = ViTEncoder(image_size=32, dim=24, depth=4)
    >>> frames, blocks = encoder(torch.zeros(2, 3, 32, 32))
    >>> frames.shape, [block.shape[1] for block in blocks], encoder.embed(torch.zeros(2, 3, 32, 32)).shape
    (torch.Size([2, 17, 24]), [24, 24, 24], torch.Size([2, 24]))
    """

    classifier_class = ViTForImageClassification

    def __init__(
        self, image_size: int = 64, patch_size: int = 8, dim: int = 192, depth: int = 6, heads: int = 3
    ) -> None:
        super().__init__()
        if image_size % patch_size or dim % heads:
            raise ValueError(
                f"image_size={image_size} must be a multiple of patch_size={patch_size}, "
                f"dim={dim} of heads={heads}"
            )
        config = ViTConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=dim,
            intermediate_size=4 * dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
        )
        self.model = ViTModel(config, add_pooling_layer=False)
        self.block_dims, self.embedding_dim = [dim] * 3, dim

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures (batch, 3, image_size, image_size) to class token and patches (batch, 1 + n, dim)."""
        out = self.model(x, output_hidden_states=True)
        return out.last_hidden_state, [state.mean(1) for state in _quarters(out.hidden_states)]

    def pool(self, frames: Tensor) -> Tensor:
        return frames[:, 0]


def _quarters(hidden_states: Sequence[Tensor]) -> list[Tensor]:
    """The states after 1/4, 2/4 and 3/4 of the layers; the first state is the layers' input."""
    return [hidden_states[i] for i in _quarter_indices(len(hidden_states) - 1)]


def _quarter_indices(depth: int) -> list[int]:
    return [math.ceil(depth * quarter / 4) for quarter in (1, 2, 3)]


def image_processor(size: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    """transformers' image processor for pictures prepared as :func:`unfused.data.images.decode_image` does.

    Shorter side to ``size`` (bicubic), centre crop, 0..1, normalise. It needs Pillow only; saved beside a
    model it is what ``pipeline("image-classification", model=folder)`` loads, with torchvision or without.

    Parameters
    ----------
    size : int
        Pixels.
    mean, std : sequence of 3 floats
        Of RGB in 0..1.

    Examples
    --------
    >>> processor = image_processor(64, mean=[0.5] * 3, std=[0.25] * 3)
    >>> processor(np.zeros((80, 100, 3), np.uint8), return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 3, 64, 64])
    """
    from transformers.image_utils import PILImageResampling
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(
        do_convert_rgb=True,
        resample=PILImageResampling.BICUBIC,
        size={"shortest_edge": size},
        do_center_crop=True,
        crop_size={"height": size, "width": size},
        image_mean=list(mean),
        image_std=list(std),
    )


# Pretrained audio models


class PretrainedImageEncoder(nn.Module):
    """An image tower of `unfused.nn.frozen`, with gradients: what a pretrained model is fine-tuned as.

    Parameters
    ----------
    tower : Frozen
        What `unfused.nn.frozen.load(source, "image")` gives.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.model = tower.model.requires_grad_(True)
        self._tower = [tower]  # in a list: not a part of this module
        grey = np.full((64, 64, 3), 128, np.uint8)
        with torch.no_grad():
            self.embedding_dim = self.eval().embed(**self.prepare([grey])).flatten(1).shape[1]

    def prepare(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        """PIL pictures or arrays to the arguments of `embed`.

        Raises
        ------
        ValueError
            The model's processor leaves them at unequal sizes.
        """
        (tower,) = self._tower
        batches = list(tower._batches([tower.prepare(picture) for picture in pictures], len(pictures)))
        if len(batches) > 1:
            raise ValueError(
                "teacher: this model's processor keeps pictures at unequal sizes; it can only be frozen"
            )
        [(_, inputs)] = batches
        return {"input_values": inputs.pop("pixel_values"), **inputs}

    def embed(self, input_values: Tensor, **inputs: Tensor) -> Tensor:
        (tower,) = self._tower
        return tower._run({"pixel_values": input_values, **inputs}).flatten(1)


class TransformersAudioEncoder(nn.Module):
    """A pretrained audio model of transformers as a teacher, or as an encoder to fine-tune.

    The embedding is the mean over the time that the clip fills (padding does not count). Models tested: AST,
    wav2vec 2.0, HuBERT, WavLM, CLAP, Whisper's encoder, and our own, whose own pooling is used.

    Parameters
    ----------
    model : PreTrainedModel
        The bare model, without a head. SpecAugment inside of it is switched off: it needs long clips, and
        augmentation is the caller's.
    feature_extractor : SequenceFeatureExtractor
    max_seconds : float, default=30.0
        Longer clips are embedded in equal windows, averaged. Models with a window of their own (AST, CLAP,
        Whisper) use that; ours cuts by itself.

    Attributes
    ----------
    sampling_rate : int
        Of the waveforms, Hz.
    embedding_dim : int
    block_dims : list of int
        Of the states after 1/4, 2/4, 3/4 of the layers (ours: of its blocks), mean over time.

    Examples
    --------
    >>> from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model
    >>> tiny = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    >>> config = Wav2Vec2Config(**tiny, conv_dim=[8] * 7, num_conv_pos_embedding_groups=2)
    >>> teacher = TransformersAudioEncoder(Wav2Vec2Model(config).eval(), Wav2Vec2FeatureExtractor())
    >>> teacher.embed_waveforms([np.ones(8000, np.float32), np.zeros(12000, np.float32)]).shape
    (2, 16)
    """

    model: Any

    def __init__(self, model: PreTrainedModel, feature_extractor: Any, max_seconds: float = 30.0) -> None:
        super().__init__()
        self.model, self.feature_extractor, config = model, feature_extractor, model.config
        self.kind: str = config.model_type
        self.sampling_rate = int(feature_extractor.sampling_rate)
        self.input_name = feature_extractor.model_input_names[0]
        self.masks = (
            bool(getattr(feature_extractor, "return_attention_mask", False))
            and "attention_mask" in inspect.signature(model.forward).parameters
        )
        if hasattr(config, "apply_spec_augment"):
            config.apply_spec_augment = False
        self.window: int | None = int(max_seconds * self.sampling_rate)  # samples
        width = getattr(config, "hidden_size", 0)
        self.block_dims, self.embedding_dim = [width] * 3, width
        if self.kind == AST:
            self.window = 400 + 160 * (feature_extractor.max_length - 1)
        elif self.kind == WHISPER:
            self.window = feature_extractor.n_samples
        elif self.kind == CLAP:
            self.window = feature_extractor.nb_max_samples
            widths = [config.patch_embeds_hidden_size * 2**stage for stage in range(len(config.depths))]
            self.block_dims = [[*widths, widths[-1]][i] for i in _quarter_indices(len(widths))]
            self.embedding_dim = widths[-1]
        elif self.kind == UNFUSED:
            self.window = None
            encoder = self.model.encoder
            self.block_dims, self.embedding_dim = list(encoder.block_dims), encoder.embedding_dim

    def prepare(self, waveforms: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Waveforms (n,) at ``sampling_rate`` to the arguments of :meth:`forward` and :meth:`embed`.

        ``input_values``, and except for CLAP ``attention_mask`` (batch, steps), in steps of the extractor:
        samples, spectrogram frames or windows.
        """
        options: dict[str, Any] = {"sampling_rate": self.sampling_rate, "return_tensors": "pt"}
        if self.kind == WHISPER:
            options |= {"return_attention_mask": True}
        elif self.kind not in FIXED_WINDOW:
            options |= {"padding": True, "return_attention_mask": True}
        inputs = self.feature_extractor(list(waveforms), **options)
        batch = {"input_values": inputs[self.input_name]}
        if self.kind == AST:
            frames = torch.tensor([1 + (len(waveform) - 400) // 160 for waveform in waveforms])
            steps = torch.arange(batch["input_values"].shape[1])
            batch["attention_mask"] = (steps < frames[:, None]).long()
        elif "attention_mask" in inputs:
            batch["attention_mask"] = inputs["attention_mask"]
        return batch

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """What :meth:`prepare` returns, to frames (batch, T, D) and block features."""
        out = self._run(input_values, attention_mask, output_hidden_states=True)
        frames = self._frames(out.last_hidden_state)
        states = out.hidden_states if self.kind == UNFUSED else _quarters(out.hidden_states)
        blocks = []
        for state in states:
            if state.ndim == 4:  # CLAP: (batch, channels, height, width)
                state = state.mean((2, 3))
            elif state.ndim == 3:
                state = self.pool(self._frames(state), attention_mask)
            blocks.append(state)
        return frames, blocks

    def pool(self, frames: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean of the frames (batch, T, D) that the clip fills: (batch, D). Ours pools in its own way."""
        if self.kind == UNFUSED:
            mask = frames.new_ones(len(frames), 1) if attention_mask is None else attention_mask.to(frames)
            windows = frames.unflatten(1, (mask.shape[1], -1))
            pooled = self.model.encoder.pool(windows.flatten(0, 1)).unflatten(0, mask.shape)
            return (pooled * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if attention_mask is None:
            return frames.mean(1)
        total, steps = frames.shape[1], attention_mask.sum(1)
        if hasattr(self.model, "_get_feat_extract_output_lengths"):
            filled = self.model._get_feat_extract_output_lengths(steps)
        else:
            filled = (steps * total / attention_mask.shape[1]).ceil()
        mask = torch.arange(total, device=frames.device) < filled.clamp(1, total)[:, None]
        return frames.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)

    def embed(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What :meth:`prepare` returns, to embeddings (batch, embedding_dim)."""
        out = self._run(input_values, attention_mask)
        if self.kind == UNFUSED:
            return out.pooler_output
        return self.pool(self._frames(out.last_hidden_state), attention_mask)

    def embed_waveforms(
        self,
        waveforms: Sequence[np.ndarray],
        batch_size: int = 16,
        bf16: bool = False,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Embed whole clips, in eval mode and without gradients; the result does not depend on the batches.

        Models that cannot mask padding (wav2vec 2.0 base and HuBERT base normalise over time) only get clips
        of equal length together.

        Parameters
        ----------
        waveforms : sequence of float arrays (n,)
            Mono, at ``sampling_rate``, any length.
        batch_size : int, default=16
        bf16 : bool, default=False
            Autocast to bfloat16.
        progress : callable (done, total), optional

        Returns
        -------
        ndarray (len(waveforms), embedding_dim), float32
        """
        pieces: list[tuple[int, np.ndarray]] = []
        for index, waveform in enumerate(waveforms):
            waveform = np.asarray(waveform, np.float32)
            if waveform.ndim != 1 or not len(waveform):
                raise ValueError(f"waveforms[{index}] has shape {waveform.shape}: give mono samples (n,)")
            pieces += [(index, piece) for piece in self._cut(waveform)]
        pieces.sort(key=lambda piece: -len(piece[1]))  # what needs most memory fails first, not after an hour
        sums = np.zeros((len(waveforms), self.embedding_dim), np.float32)
        device = next(self.parameters()).device
        done = 0
        with _evaluating(self), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, bf16):
            for batch in self._batches(pieces, batch_size):
                inputs = self.prepare([piece for _, piece in batch])
                embedded = self.embed(**{name: value.to(device) for name, value in inputs.items()})
                np.add.at(sums, [index for index, _ in batch], embedded.float().cpu().numpy())
                done += len(batch)
                if progress:
                    progress(done, len(pieces))
        counts = np.bincount([index for index, _ in pieces], minlength=len(waveforms))
        return sums / counts[:, None].astype(np.float32)

    def _cut(self, waveform: np.ndarray) -> list[np.ndarray]:
        if self.window is None:
            return [waveform]
        # A tenth of a second fills at least one frame of every model.
        waveform = np.pad(waveform, (0, max(0, self.sampling_rate // 10 - len(waveform))))
        return np.array_split(waveform, math.ceil(len(waveform) / self.window))

    def _batches(self, pieces: list, batch_size: int) -> Iterator[list]:
        # Waveform models without a mask: any padding would enter their normalisation over time.
        equal = not self.masks and self.kind not in FIXED_WINDOW
        batch: list = []
        for piece in pieces:
            if batch and (len(batch) == batch_size or (equal and len(piece[1]) != len(batch[0][1]))):
                yield batch
                batch = []
            batch.append(piece)
        if batch:
            yield batch

    def _run(self, input_values: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        if self.masks and attention_mask is not None:
            options["attention_mask"] = attention_mask
        if self.kind == CLAP:
            # The extractor calls a random clip of the batch long; windows never are.
            options["is_longer"] = input_values.new_zeros(len(input_values), 1, dtype=torch.bool)
        return self.model(**{self.input_name: input_values}, **options)

    def _frames(self, state: Tensor) -> Tensor:
        """A state of the model as (batch, time, D)."""
        if self.kind == CLAP:
            return state.mean(2).mT
        if self.kind == AST:  # two class tokens, then patches by frequency
            grid = self.model.embeddings.get_shape(self.model.config)
            return state[:, 2:].unflatten(1, grid).mean(1)
        return state


def load_teacher(source: str | Path, max_seconds: float = 30.0) -> TransformersAudioEncoder:
    """A pretrained audio model, from a folder or the Hugging Face hub, in eval mode.

    Parameters
    ----------
    source : path or hub id
        Of a model saved by ``save_pretrained`` with its feature extractor; with a head or without. Of CLAP
        the audio branch is taken, of Whisper the encoder. Only safetensors are read; code in it never runs.
    max_seconds : float, default=30.0
        Longer clips are embedded in windows.

    Raises
    ------
    ValueError
        The folder is missing, or has no config, feature extractor or safetensors; the model does not hear;
        the checkpoint lacks weights, which would leave that part of the teacher random.
    """
    import transformers
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    from unfused.nn.register import register

    register()
    name, path = str(source), Path(source).expanduser()
    if path.is_dir():
        _check_folder(path)
        name = str(path)
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"teacher {name!r}: there is no such folder")
    safe = {"trust_remote_code": False}  # unset, transformers asks at the terminal
    where = "" if path.is_dir() else "no such folder here, and from the hub "
    try:
        what = "no feature extractor can be loaded"
        feature_extractor = AutoFeatureExtractor.from_pretrained(name, **safe)
        what = "the model cannot be loaded"
        config, loader = AutoConfig.from_pretrained(name, **safe), AutoModel
        if config.model_type == CLAP:  # not known to AutoModel
            loader = getattr(transformers, (config.architectures or ["ClapAudioModel"])[0])
        model, loading = loader.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **safe
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"teacher {name!r}: {where}{what} ({reason})") from error
    part = AUDIO_PART.get(type(model).__name__, "")
    audio = model.get_submodule(part)
    if audio.main_input_name not in ("input_values", "input_features"):
        raise ValueError(f"teacher {name!r}: {type(model).__name__} is not an audio encoder")
    # The mask's embedding is used by SpecAugment only, which is off.
    missing = sorted(
        key
        for key in loading["missing_keys"]
        if key.startswith(part) and not key.endswith("masked_spec_embed")
    )
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"teacher {name!r}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, "
            f"which would stay random: {shown}"
        )
    return TransformersAudioEncoder(audio, feature_extractor, max_seconds).eval()


def _check_folder(path: Path) -> None:
    found = sorted(file.name for file in path.iterdir())
    if "config.json" not in found:
        raise ValueError(
            f"teacher {str(path)!r}: no config.json, so not a model saved by save_pretrained; "
            f"the folder holds {', '.join(found[:8]) or 'nothing'}"
        )
    if not any(name.endswith(".safetensors") for name in found):
        raise ValueError(
            f"teacher {str(path)!r}: no weights in *.safetensors (pickled .bin files are not read; load such "
            f"a model where you trust it and save it again with save_pretrained)"
        )


# A whole corpus


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every submodule is in the mode it was in."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    for root in modules:
        root.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def embed_all(
    encoder: nn.Module,
    data: Any,
    batch_size: int = 256,
    bf16: bool = False,
    transform: nn.Module | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Embed a whole corpus, in eval mode and without gradients, a batch in memory at a time.

    Parameters
    ----------
    encoder : nn.Module
        With ``embed`` and ``embedding_dim``. Its train/eval modes are restored afterwards.
    data : array, memory map or tensor (N, ...), or a Dataset of dicts
        Of a dict, ``input_values`` (or ``pixel_values``) is embedded, with ``attention_mask`` where there is
        one.
    batch_size : int, default=256
    bf16 : bool, default=False
        Autocast to bfloat16.
    transform : nn.Module, optional
        Applied to each batch in eval mode, for example an ``ImageAugment``, which normalises raw pictures.
    progress : callable (done, total), optional

    Returns
    -------
    ndarray (N, embedding_dim), float32

    Examples
    --------
    >>> embed_all(ResNetEncoder(width=4), np.zeros((5, 3, 32, 32), np.float32), batch_size=2).shape
    (5, 32)
    """
    device = next(encoder.parameters()).device
    total = len(data)
    dim: int = encoder.embedding_dim  # type: ignore[assignment]
    out = np.empty((total, dim), np.float32)
    roots = (encoder,) if transform is None else (encoder, transform)
    with _evaluating(*roots), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, bf16):
        for start in range(0, total, batch_size):
            stop = min(start + batch_size, total)
            inputs, options = _batch(data, start, stop, device)
            if transform is not None:
                inputs = transform(inputs)
            if inputs.is_floating_point():
                inputs = inputs.float()
            elif not getattr(encoder, "takes_ids", False):
                raise ValueError(f"data is {inputs.dtype}: give normalised floats, or a transform to them")
            embedded = encoder.embed(inputs, **options)  # type: ignore[operator]
            out[start:stop] = embedded.float().cpu().numpy()
            if progress:
                progress(stop, total)
    return out


def _batch(data: Any, start: int, stop: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    if isinstance(data, Tensor):
        return data[start:stop].to(device), {}
    if isinstance(data, np.ndarray):
        return torch.from_numpy(np.array(data[start:stop])).to(device), {}
    indices = list(range(start, stop))
    rows = data.__getitems__(indices) if hasattr(data, "__getitems__") else [data[i] for i in indices]
    batch = rows if isinstance(rows, Mapping) else torch.utils.data.default_collate(rows)
    inputs = batch["input_values"] if "input_values" in batch else batch["pixel_values"]
    mask = batch.get("attention_mask")
    return inputs.to(device), {} if mask is None else {"attention_mask": mask.to(device)}
