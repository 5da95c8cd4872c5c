"""The audio encoder AudioNTT, and the classifier around it in Hugging Face form.

This file and `log_mel.py` are copied into every saved model folder, so that `trust_remote_code=True` loads a model where
`unfused` is not installed: it imports nothing else of this package.

Reference: BYOL for Audio: Self-Supervised Learning for General-Purpose Audio Representation, IJCNN 2021,
arXiv:2103.06695 (the encoder); UNFUSED: UNsupervised Finetuning Using SElf supervised Distillation, 2023,
arXiv:2303.05668 (block features for self-distillation).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, SequenceFeatureExtractor
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .log_mel import FrontEnd, fit_frames_many, log_mel_many

__all__ = [
    "AudioNTT",
    "UnfusedAudioConfig",
    "UnfusedAudioForClassification",
    "UnfusedAudioModel",
    "UnfusedFeatureExtractor",
]

POOLINGS = ("max-mean", "mean", "segments")


class AudioNTT(nn.Module):
    """Three convolution blocks over the log-mel, then an MLP per frame.

    Each block is `Conv3x3 - BatchNorm - ReLU - MaxPool2`; what is left of channels and mel bins is flattened per frame
    and goes through `Linear - ReLU - Dropout - Linear - ReLU`.

    Parameters
    ----------
    n_mels : int, default=64
        Mel bins of the input, 8 or more; what does not divide by 8 is cut off by the pooling.
    width : int, default=64
        Channels of the three blocks.
    dim : int, default=2048
        Width of the MLP.
    pooling : {"max-mean", "mean", "segments"}, default="max-mean"
        How frames become one embedding: maximum plus mean over time, mean, or the means of `segments` equal parts of
        the clip one after the other, which keeps the order of the sounds of a word.
    segments : int, default=4
        Parts for `pooling="segments"`.
    dropout : float, default=0.3
        In the MLP.
    cepstra : int, default=0
        Cepstral coefficients of the input that join each frame beside the MLP's output (0: none, the published encoder).
        They are what makes a linear classifier on MFCC strong where labels are few. While training, each of the two
        parts is left out of a quarter of the items, so that both learn to do without the other.

    Attributes
    ----------
    embedding_dim : int
        `frame_dim`, or `frame_dim * segments` for `pooling="segments"`.
    frame_dim : int
        Width of a frame: `dim + 8 * cepstra`.
    block_dims : list of int
        Width of each block's feature vector.

    References
    ----------
    Niizumi et al., BYOL for Audio, IJCNN 2021, arXiv:2103.06695. 5,321,856 weights with the defaults.

    Examples
    --------
    >>> encoder = AudioNTT(width=64, dim=2048)
    >>> frames, blocks = encoder(torch.zeros(2, 1, 64, 96))
    >>> frames.shape, [block.shape[1] for block in blocks]
    (torch.Size([2, 12, 2048]), [2048, 1024, 512])
    >>> encoder.embed(torch.zeros(2, 1, 64, 96)).shape
    torch.Size([2, 2048])
    """

    dct: torch.Tensor

    def __init__(
        self,
        n_mels: int = 64,
        width: int = 64,
        dim: int = 2048,
        pooling: str = "max-mean",
        segments: int = 4,
        dropout: float = 0.3,
        cepstra: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= cepstra <= n_mels:
            raise ValueError(f"cepstra={cepstra}: give a number from 0 to n_mels={n_mels}")
        if n_mels < 8:
            raise ValueError(f"n_mels={n_mels}: three halvings need at least 8 mel bins")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}: give one of {POOLINGS}")
        self.n_mels, self.width, self.dim = n_mels, width, dim
        self.pooling, self.segments, self.dropout = pooling, segments, dropout
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)
            )
            for channels in (1, width, width)
        )
        self.block_dims = [width * (n_mels // 2**depth) for depth in (1, 2, 3)]
        self.mlp = nn.Sequential(
            nn.Linear(self.block_dims[-1], dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(dim, dim),
            nn.ReLU(),
        )
        self.cepstra = cepstra
        if cepstra:
            orders, bins = torch.arange(cepstra)[:, None], torch.arange(n_mels) + 0.5
            self.register_buffer("dct", torch.cos(math.pi / n_mels * orders * bins) * math.sqrt(2 / n_mels))
            self.cepstra_norm = nn.BatchNorm1d(8 * cepstra)
        self.frame_dim = dim + 8 * cepstra
        self.embedding_dim = self.frame_dim * segments if pooling == "segments" else self.frame_dim

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Frames and block features.

        Parameters
        ----------
        x : torch.Tensor of shape (batch, 1, n_mels, T), T >= 8

        Returns
        -------
        frames : torch.Tensor of shape (batch, T // 8, frame_dim)
        blocks : list of torch.Tensor
            Per block, channel and mel bin flattened, mean over time: (batch, block_dims[i]).
        """
        if x.ndim != 4 or x.shape[1] != 1 or x.shape[2] != self.n_mels or x.shape[3] < 8:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: give (batch, 1, {self.n_mels}, T) with T >= 8"
            )
        features, spectrum = [], x
        for block in self.blocks:
            x = block(x)  # (batch, width, mels, time)
            features.append(x.mean(-1).flatten(1))
        frames = x.permute(0, 3, 2, 1).flatten(2)  # (batch, time, mels * width): no copy in channels_last
        frames = self.mlp(frames)
        return (self._join(frames, spectrum) if self.cepstra else frames), features

    def _join(self, frames: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
        """Frames (batch, T, dim) and the cepstra of the 8 input frames under each: (batch, T, frame_dim)."""
        batch, count, _ = frames.shape
        with torch.autocast(spectrum.device.type, enabled=False):
            cepstra = self.dct @ spectrum[:, 0, :, : 8 * count].to(self.dct.dtype)  # (batch, cepstra, 8 T)
            cepstra = (
                cepstra.unflatten(2, (count, 8)).permute(0, 1, 3, 2).flatten(1, 2)
            )  # (batch, 8 cepstra, T)
            cepstra = self.cepstra_norm(cepstra).transpose(1, 2)
        if self.training:
            draw = torch.rand(batch, 1, 1, device=frames.device)
            frames, cepstra = frames * (draw > 0.25), cepstra * (draw < 0.75)
        return torch.cat([frames, cepstra.to(frames.dtype)], -1)

    def pool(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (batch, T, dim) to embeddings (batch, embedding_dim)."""
        if self.pooling == "segments":
            return F.adaptive_avg_pool1d(frames.transpose(1, 2), self.segments).transpose(1, 2).flatten(1)
        mean = frames.mean(1)
        return mean if self.pooling == "mean" else mean + frames.amax(1)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs (batch, 1, n_mels, T) to embeddings (batch, embedding_dim)."""
        return self.pool(self(x)[0])

    def to_classifier(self, id2label: dict[int, str]) -> UnfusedAudioForClassification:
        """A classifier around THIS encoder (shared, not copied), with a new linear head."""
        config = UnfusedAudioConfig(
            n_mels=self.n_mels,
            width=self.width,
            dim=self.dim,
            pooling=self.pooling,
            segments=self.segments,
            dropout=self.dropout,
            cepstra=self.cepstra,
            id2label=id2label,
            label2id={label: i for i, label in id2label.items()},
        )
        model = UnfusedAudioForClassification(config)
        model.encoder = self
        return model.train(self.training)


class UnfusedAudioConfig(PreTrainedConfig):
    """Configuration of `UnfusedAudioModel` and `UnfusedAudioForClassification`: the parameters of `AudioNTT`.

    Examples
    --------
    >>> UnfusedAudioConfig(n_mels=40, width=32, dim=256, pooling="segments", num_labels=10).num_labels
    10
    """

    model_type = "unfused-audio"

    n_mels: int = 64
    width: int = 64
    dim: int = 2048
    pooling: str = "max-mean"
    segments: int = 4
    dropout: float = 0.3
    cepstra: int = 0

    def encoder(self) -> AudioNTT:
        """A new encoder with these settings."""
        return AudioNTT(
            self.n_mels, self.width, self.dim, self.pooling, self.segments, self.dropout, self.cepstra
        )


class _UnfusedAudioPreTrainedModel(PreTrainedModel):
    config: UnfusedAudioConfig
    config_class = UnfusedAudioConfig
    base_model_prefix = "unfused_audio"
    main_input_name = "input_values"
    input_modalities = ("audio",)  # type: ignore[assignment]
    _no_split_modules = ["AudioNTT"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation of these layers, through the functions that spare weights already loaded."""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    def _windows(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Valid windows (N, 1, n_mels, T), and the mask (batch, windows) of where they belong."""
        if input_values.ndim == 3:
            input_values = input_values.unsqueeze(1)
        if input_values.ndim != 4:
            raise ValueError(
                f"input_values of shape {tuple(input_values.shape)}: give (batch, windows, n_mels, T) or (batch, n_mels, T)"
            )
        shape = input_values.shape[:2]
        if attention_mask is None or shape[1] == 1:
            mask = torch.ones(shape, dtype=torch.bool, device=input_values.device)
            return input_values.flatten(0, 1).unsqueeze(1), mask
        if attention_mask.shape != shape:
            raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}: give {tuple(shape)}")
        mask = attention_mask.bool()
        if not mask.any(1).all():
            raise ValueError("attention_mask: every clip needs at least one valid window")
        # padding is left out, not just masked: it must not enter the batch norm's statistics
        return input_values[mask].unsqueeze(1), mask


class UnfusedAudioModel(_UnfusedAudioPreTrainedModel):
    """The encoder alone, for `AutoModel`.

    Examples
    --------
    >>> model = UnfusedAudioModel(UnfusedAudioConfig(width=4, dim=16)).eval()
    >>> model(torch.zeros(2, 3, 64, 96)).pooler_output.shape
    torch.Size([2, 16])
    """

    def __init__(self, config: UnfusedAudioConfig) -> None:
        super().__init__(config)
        self.encoder = config.encoder()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Embeddings of clips.

        Parameters
        ----------
        input_values : torch.Tensor of shape (batch, windows, n_mels, T) or (batch, n_mels, T)
        attention_mask : torch.Tensor of shape (batch, windows), optional
            1 for windows that count, 0 for padding.
        output_hidden_states : bool, optional
            Also return the block features, each averaged over the windows: (batch, block_dims[i]).

        Returns
        -------
        BaseModelOutputWithPooling
            `last_hidden_state` (batch, windows * (T // 8), frame_dim), 0 in windows that are padding; `pooler_output`
            (batch, embedding_dim), the mean of the windows' embeddings.
        """
        x, mask = self._windows(input_values, attention_mask)
        frames, blocks = self.encoder(x)
        hidden = frames.new_zeros(*mask.shape, *frames.shape[1:])
        hidden[mask] = frames
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden.flatten(1, 2),
            pooler_output=_mean_of_windows(self.encoder.pool(frames), mask),
            hidden_states=tuple(_mean_of_windows(block, mask) for block in blocks)
            if output_hidden_states
            else None,
        )


class UnfusedAudioForClassification(_UnfusedAudioPreTrainedModel):
    """The encoder with a linear head, for `AutoModelForAudioClassification` and `pipeline("audio-classification")`.

    A clip of several windows gets the mean of its windows' class probabilities.

    Notes
    -----
    `transformers.pipeline` decodes file paths with the program ffmpeg and resamples `{"array", "sampling_rate"}` inputs
    of another rate with torchaudio, and asks for them where they are missing. Arrays, and dicts at the model's own rate,
    need neither; `unfused predict` reads and resamples files itself.

    Examples
    --------
    >>> model = UnfusedAudioForClassification(UnfusedAudioConfig(width=4, dim=16, num_labels=3)).eval()
    >>> windows = torch.randn(2, 3, 64, 96)
    >>> out = model(windows, attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]), labels=torch.tensor([0, 2]))
    >>> out.logits.shape, out.loss.shape
    (torch.Size([2, 3]), torch.Size([]))
    """

    def __init__(self, config: UnfusedAudioConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = config.encoder()
        self.classifier = nn.Linear(self.encoder.embedding_dim, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Class logits, and the cross-entropy when labels are given.

        Parameters
        ----------
        input_values : torch.Tensor of shape (batch, windows, n_mels, T) or (batch, n_mels, T)
        attention_mask : torch.Tensor of shape (batch, windows), optional
            1 for windows that count, 0 for padding. A clip's only window always counts.
        labels : torch.Tensor of shape (batch,), int, or (batch, num_labels), class probabilities; optional
        output_hidden_states : bool, optional
            Also return the block features, each averaged over the windows: (batch, block_dims[i]).

        Returns
        -------
        SequenceClassifierOutput
            `logits` (batch, num_labels): the head's output where there is one window, else the logarithm of the mean
            over valid windows of the softmax.
        """
        x, mask = self._windows(input_values, attention_mask)
        frames, blocks = self.encoder(x)
        logits = self.classifier(self.encoder.pool(frames))
        if mask.shape[1] > 1:
            log_probs = logits.float().log_softmax(-1)
            padded = log_probs.new_full((*mask.shape, logits.shape[-1]), -math.inf)
            padded[mask] = log_probs
            logits = padded.logsumexp(1) - mask.sum(1, keepdim=True).log()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return SequenceClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=tuple(_mean_of_windows(block, mask) for block in blocks)
            if output_hidden_states
            else None,
        )


def _mean_of_windows(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Vectors of valid windows (N, d) to their means per clip (batch, d)."""
    padded = x.new_zeros(*mask.shape, x.shape[1])
    padded[mask] = x
    return padded.sum(1) / mask.sum(1, keepdim=True)


class UnfusedFeatureExtractor(SequenceFeatureExtractor):
    """Waveforms to normalised log-mel windows, for `AutoFeatureExtractor`.

    Parameters
    ----------
    **kwargs
        The fields of `FrontEnd` (same names, same defaults), and what `SequenceFeatureExtractor` takes.

    Examples
    --------
    >>> extractor = UnfusedFeatureExtractor(sampling_rate=8000, f_max=4000)
    >>> batch = extractor([np.ones(8000), np.ones(24000)], sampling_rate=8000, return_tensors="pt")
    >>> batch["input_values"].shape, batch["attention_mask"].tolist()
    (torch.Size([2, 3, 64, 96]), [[1, 0, 0], [1, 1, 1]])
    """

    model_input_names = ["input_values", "attention_mask"]

    def __init__(self, **kwargs: Any) -> None:
        names = [field.name for field in dataclasses.fields(FrontEnd)]
        fields = FrontEnd.from_dict({name: kwargs.pop(name) for name in names if name in kwargs}).to_dict()
        for name in ("feature_size", "padding_value"):  # written by save_pretrained, decided by the front end
            kwargs.pop(name, None)
        super().__init__(
            feature_size=fields["n_mels"], sampling_rate=fields["sampling_rate"], padding_value=0.0, **kwargs
        )
        for name, value in fields.items():
            setattr(self, name, value)

    @property
    def front_end(self) -> FrontEnd:
        """The settings as a `FrontEnd`."""
        return FrontEnd(**{field.name: getattr(self, field.name) for field in dataclasses.fields(FrontEnd)})

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Extract features.

        Parameters
        ----------
        raw_speech : array of shape (n,), or a list of such arrays, or an array of shape (batch, n)
            One channel each, at the front end's sampling rate.
        sampling_rate : int, optional
            The rate of `raw_speech` in Hz; given, it is checked.
        return_tensors : {"pt", "np"}, optional
        **kwargs
            Ignored: options of other extractors, such as `padding`; here windows are always padded to the longest clip's.

        Returns
        -------
        BatchFeature
            `input_values` (batch, windows, n_mels, frames), float32, zero where a clip has fewer windows than the
            longest, and `attention_mask` (batch, windows), int64.

        Raises
        ------
        ValueError
            If the rate is another, or a clip is empty, not one channel, or not finite.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate={sampling_rate}: this model hears {self.sampling_rate} Hz; resample first, for example "
                f"soxr.resample(x, {sampling_rate}, {self.sampling_rate})"
            )
        if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
            clips = [raw_speech] if raw_speech.ndim == 1 else list(raw_speech)
        else:
            clips = [raw_speech] if len(raw_speech) and np.isscalar(raw_speech[0]) else list(raw_speech)
        front_end = self.front_end
        windows = [x.numpy() for x in fit_frames_many(log_mel_many(clips, front_end), front_end)]
        width = max((len(x) for x in windows), default=0)
        values = np.zeros((len(windows), width, front_end.n_mels, front_end.frames), np.float32)
        mask = np.zeros((len(windows), width), np.int64)
        for i, x in enumerate(windows):
            values[i, : len(x)], mask[i, : len(x)] = x, 1
        return BatchFeature({"input_values": values, "attention_mask": mask}, tensor_type=return_tensors)


# Set here, so that save_pretrained writes this code into the folder however the class was reached.
UnfusedAudioConfig.register_for_auto_class("AutoConfig")
UnfusedAudioModel.register_for_auto_class("AutoModel")
UnfusedAudioForClassification.register_for_auto_class("AutoModelForAudioClassification")
UnfusedFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
