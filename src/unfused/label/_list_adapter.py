"""LiST's adapter: a linear residual map behind a dense layer, and the language model's head beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from unfused.nn.tuner import TunerConfig, TunerLayer, TunerModel

__all__ = ["ListConfig", "ListModel"]

BERTS = ("bert", "camembert", "deberta", "deberta-v2", "electra", "mpnet", "roberta", "xlm-roberta")
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class ListConfig(TunerConfig):
    """Configuration of LiST's adapter: `h <- h + U V h` behind each chosen dense layer, without bias or non-linearity.

    Parameters
    ----------
    r : int, default=128
        Rows of V: D -> r and columns of U: r -> D.
    target_modules : list of str or str, optional
        By default the output layers of attention and feed-forward block, before dropout, residual and norm.
    init_weights : {"normal", "identity"}, default="normal"
        "normal", the paper's: both factors from N(0, init_std^2), which is almost the identity and no dead end. "identity":
        U = 0 and V from N(0, 1/D).
    init_std : float, default=2e-4
    train_head : bool, default=True
        Of a language model also the layers between backbone and vocabulary, and the vocabulary's bias, are trained and
        saved; the matrix over the vocabulary, tied to the embeddings, stays. No effect on models without such a head.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from transformers import BertConfig, BertForMaskedLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = get_peft_model(BertForMaskedLM(BertConfig(vocab_size=50, **sizes)), ListConfig(r=4))
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 2 * 2 * (2 * 16 * 4) + head (16 * 16 + 3 * 16 + 50)
    866
    >>> type(model.merge_and_unload()).__name__
    'BertForMaskedLM'
    """

    r: int = field(default=128, metadata={"help": "Rank of the residual map."})
    init_weights: str = field(default="normal", metadata={"help": "'normal' (the paper's) or 'identity'."})
    init_std: float = field(default=2e-4, metadata={"help": "Of both factors at first."})
    train_head: bool = field(
        default=True, metadata={"help": "Train a language model's head, the vocabulary's matrix apart."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.r >= 1, f"r={self.r}: at least 1 is needed")
        self.require(
            self.init_std > 0, f"init_std={self.init_std}: it must be positive, or nothing can be learned"
        )
        self.require(
            self.init_weights in ("normal", "identity"),
            f"init_weights={self.init_weights!r}: choose 'normal' or 'identity'",
        )


class ListLayer(TunerLayer):
    """A dense layer followed by `h + U V h`."""

    adapter_parameters = ("unfused_list_down", "unfused_list_up")

    def update_layer(self, adapter_name: str, config: ListConfig) -> None:
        base = self.get_base_layer()
        width = base.weight.shape[-1] if isinstance(base, Conv1D) else base.weight.shape[0]
        down, up = torch.randn(config.r, width), torch.randn(width, config.r)
        if config.init_weights == "identity":
            down, up = down / width**0.5, torch.zeros_like(up)
        else:
            down, up = config.init_std * down, config.init_std * up
        self.unfused_list_down[adapter_name] = nn.Parameter(down)  # V: (r, D)
        self.unfused_list_up[adapter_name] = nn.Parameter(up)  # U: (D, r)

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        h = self.base_layer(*args, **kwargs)
        for name in names:
            down, up = self.unfused_list_down[name], self.unfused_list_up[name]
            h = h + F.linear(F.linear(h.to(down.dtype), down), up).to(h.dtype)
        return h

    def merged_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        down, up = self.unfused_list_down[name], self.unfused_list_up[name]
        rows = weight if isinstance(self.get_base_layer(), Conv1D) else weight.T  # (inputs, D)
        rows = rows + F.linear(F.linear(rows.to(down.dtype), down), up).to(rows.dtype)
        if bias is not None:
            bias = bias + F.linear(F.linear(bias.to(down.dtype), down), up).to(bias.dtype)
        return (rows if isinstance(self.get_base_layer(), Conv1D) else rows.T.contiguous()), bias


class ListHeadLayer(TunerLayer):
    """The layer over the vocabulary with a trained change of its bias alone."""

    adapter_parameters = ("unfused_list_bias",)

    def update_layer(self, adapter_name: str, config: ListConfig) -> None:
        self.unfused_list_bias[adapter_name] = nn.Parameter(torch.zeros(len(self.get_base_layer().bias)))

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = self.base_layer(*args, **kwargs)
        for name in names:
            logits = logits + self.unfused_list_bias[name].to(logits.dtype)
        return logits

    def merged_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert bias is not None
        return weight, bias + self.unfused_list_bias[name].to(bias.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        first, bias = self._unmerged is None, self.get_base_layer().bias.data
        super().merge(safe_merge, adapter_names)
        if first and self._unmerged is not None:
            self._unmerged = (self._unmerged[0], bias)

    def _set_weights(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """In place: transformers ties this bias to another module's name, under which it is saved."""
        assert bias is not None
        self.get_base_layer().bias.data = bias.detach()


class ListModel(TunerModel):
    """Puts `ListLayer`s into a model, and a `ListHeadLayer` over its vocabulary."""

    tuner_layer_cls = TunerLayer
    layer_types = (((nn.Linear, Conv1D), ListLayer),)
    target_module_mapping = (
        {name: ["attention.output.dense", "output.dense"] for name in BERTS}
        | {name: ["o_proj", "down_proj"] for name in LLAMAS}
        | {
            "albert": ["attention.dense", "ffn_output"],
            "distilbert": ["attention.out_lin", "ffn.lin2"],
            "gpt2": ["c_proj"],
            "modernbert": ["attn.Wo", "mlp.Wo"],
        }
    )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        decoder, others = self._language_head()
        if peft_config.train_head and decoder:
            peft_config.modules_to_save = list(dict.fromkeys([*(peft_config.modules_to_save or ()), *others]))
            targets = peft_config.target_modules
            if isinstance(targets, str):
                whole = re.escape(decoder)
                peft_config.target_modules = targets if whole in targets else f"(?:{targets})|{whole}"
            else:
                peft_config.target_modules = {*targets, decoder}
        return peft_config

    def make_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        if config.train_head and key == self._language_head()[0]:
            return ListHeadLayer(target, adapter_name)
        return super().make_layer(config, adapter_name, target, key)

    def _language_head(self) -> tuple[str, list[str]]:
        """Name of the layer over the vocabulary, if it has a bias, and of the other parts of the head."""
        model: Any = self.model
        decoder = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        decoder = decoder.base_layer if isinstance(decoder, TunerLayer) else decoder
        names = {id(module): name.removesuffix(".base_layer") for name, module in model.named_modules()}
        name = names.get(id(decoder), "") if getattr(decoder, "bias", None) is not None else ""
        if not name:
            return "", []
        parent = name.rpartition(".")[0]
        start = f"{parent}." if parent else ""
        others = [
            start + child
            for child, module in model.get_submodule(parent).named_children()
            if start + child not in (name, getattr(model, "base_model_prefix", ""))
            and any(True for _ in module.parameters())
        ]
        return name, others
