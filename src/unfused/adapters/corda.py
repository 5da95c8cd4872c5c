"""CorDA: LoRA that starts from the directions which matter least to what must stay, or most to what is to be learned.

PEFT has the initialiser (`LoraConfig(init_lora_weights="corda")`); this is the door to it and what it leaves out. Each
layer's input X, sequence by sequence divided by its largest |x|, gives a covariance `C = sum X^T X / sequences`, damped to
C'. With the thin decomposition `W C' = U diag(S) V^T` and `V^T <- V^T C'^-1`, W is `U diag(S) V^T` still, and r
components of it become the trained factors, the rest the frozen weight:

    B = U_r diag(sqrt(S_r)),   A = diag(sqrt(S_r)) V_r^T,   W_res = W - B A

Knowledge-preserved mode ("kpm", calibrated on what must not be forgotten) trains the last r components,
instruction-previewed mode ("ipm", calibrated on the new task) the first. `export_as_lora` turns the trained adapter into
`[B, -B0] [A; A0]`, an ordinary LoRA of rank 2r for the untouched base model.

Reference: CorDA: Context-Oriented Decomposition Adaptation of Large Language Models, NeurIPS 2024, arXiv:2406.05223.
Needs: unlabelled data, gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["calibrate_corda", "collect_covariances", "export_as_lora"]

INITIAL = "_unfused_corda_initial"  # on each calibrated layer: U, S, V as the adapter started


@torch.no_grad()
def calibrate_corda(
    model: nn.Module,
    config: LoraConfig,
    dataloader: Iterable[Any] | None = None,
    *,
    covariances: Mapping[str, torch.Tensor] | None = None,
    layers_per_pass: int | None = None,
) -> None:
    """Prepare a model for `get_peft_model(model, config)`, which then starts LoRA the CorDA way.

    PEFT's `preprocess_corda` with batches, padding, "all-linear" and bounded memory: a covariance has `in * in` numbers a
    layer.

    Parameters
    ----------
    model : nn.Module
        Without adapters. Its weights are not changed yet: `get_peft_model` subtracts the trained components.
    config : LoraConfig
        With `init_lora_weights="corda"` and a `CordaConfig(corda_method="kpm" or "ipm")`. `target_modules=None` and
        "all-linear" are replaced by the names that they stand for.
    dataloader : iterable of batches, optional
        Mappings go to `model(**batch)`, anything else to `model(batch)`. Positions where `attention_mask` (or
        `decoder_attention_mask`) is 0 do not count. About 256 sequences are enough, or 128 * in / tokens of a sequence.
    covariances : mapping of str to Tensor (in, in), optional
        What `collect_covariances` gave, in place of the data: several ranks, or both modes, from one pass.
    layers_per_pass : int, optional
        Go through the data once for every so many layers, and hold only their covariances. By default all at once.

    Raises
    ------
    ValueError
        Where a layer sees no input, or only zeros, or values that are not finite; where `r` is above a layer's size.

    Examples
    --------
    >>> from peft import LoraConfig, get_peft_model
    >>> from peft.tuners.lora.config import CordaConfig
    >>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> x = torch.randn(16, 8)
    >>> before = base(x)
    >>> config = LoraConfig(
    ...     r=2,
    ...     lora_alpha=2,
    ...     target_modules=["0", "2"],
    ...     init_lora_weights="corda",
    ...     corda_config=CordaConfig(corda_method="kpm"),
    ... )
    >>> calibrate_corda(base, config, [x])
    >>> model = get_peft_model(base, config)
    >>> bool(torch.allclose(model(x), before, atol=1e-5))
    True
    """
    targets = _targets(model, config)
    if (dataloader is None) == (covariances is None):
        raise ValueError("dataloader and covariances: give one of the two")
    patterns = config.rank_pattern or {}
    ranks = {name: patterns.get(get_pattern_key(list(patterns), name), config.r) for name in targets}
    for name, module in targets.items():
        if ranks[name] > min(module.weight.shape):
            raise ValueError(
                f"r={ranks[name]} is above the {min(module.weight.shape)} components of {name!r}: "
                "lower r, or give the layer its own in rank_pattern"
            )
    names = list(targets)
    size = layers_per_pass or len(names)
    if size < 1:
        raise ValueError(f"layers_per_pass={layers_per_pass}: at least 1")
    if size < len(names) and isinstance(dataloader, Iterator):
        raise ValueError(
            "dataloader can be read only once: give a DataLoader or a list, or leave layers_per_pass out"
        )
    for start in range(0, len(names), size):
        group = {name: targets[name] for name in names[start : start + size]}
        found = _covariances(model, group, dataloader) if covariances is None else covariances  # type: ignore[arg-type]
        for name, module in group.items():
            if name not in found:
                raise ValueError(f"covariances lack {name!r}")
            _decompose(name, module, found[name], ranks[name], config)


@torch.no_grad()
def collect_covariances(
    model: nn.Module, config: LoraConfig, dataloader: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """Covariance of each target layer's input, (in, in) in float32, by layer name; see `calibrate_corda`.

    They can be kept with `safetensors.torch.save_file`.
    """
    return _covariances(model, _targets(model, config), dataloader)


@torch.no_grad()
def export_as_lora(
    model: PeftModel,
    directory: str | Path,
    adapter_name: str = "default",
    initial: str | Path | None = None,
) -> None:
    """Save a trained CorDA adapter as a LoRA of rank 2r that loads on the untouched base model.

    Parameters
    ----------
    model : PeftModel
        The output of `get_peft_model` after `calibrate_corda`, trained.
    directory : path
        Gets `adapter_config.json` and `adapter_model.safetensors`.
    adapter_name : str, default="default"
    initial : path, optional
        Folder of `model.save_pretrained(...)` from before training. Needed where training went on in another process than
        the calibration's, which forgets how the adapter began.
    """
    config = copy.deepcopy(model.peft_config[adapter_name])
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "corda":
        raise ValueError(f"adapter {adapter_name!r} was not made with init_lora_weights='corda'")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    kept = load_file(Path(initial) / "adapter_model.safetensors") if initial is not None else None
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        a, b = (f"base_model.model.{name}.lora_{which}.weight" for which in "AB")
        a0, b0 = (kept[a], kept[b]) if kept is not None else _initial(name, layer, adapter_name)
        if a0.shape != state[a].shape or b0.shape != state[b].shape:
            raise ValueError(f"initial={str(initial)!r}: {name!r} has another rank there")
        state[a] = torch.cat([state[a].cpu(), a0.to(state[a].dtype).cpu()])
        state[b] = torch.cat([state[b].cpu(), -b0.to(state[b].dtype).cpu()], dim=1)
    grown = 2**0.5 if config.use_rslora else 2  # the scaling stays: alpha / r, or alpha / sqrt(r)
    config.r *= 2
    config.rank_pattern = {key: 2 * r for key, r in (config.rank_pattern or {}).items()}
    config.lora_alpha = config.lora_alpha * grown  # type: ignore[assignment]
    config.alpha_pattern = {key: alpha * grown for key, alpha in (config.alpha_pattern or {}).items()}
    config.init_lora_weights, config.corda_config, config.inference_mode = True, None, True
    Path(directory).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    save_file(
        {key: value.contiguous() for key, value in state.items()},
        Path(directory) / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def _targets(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "corda":
        raise ValueError('config must be a LoraConfig with init_lora_weights="corda"')
    corda: Any = config.corda_config
    if corda.corda_method not in ("ipm", "kpm"):
        raise ValueError(f"corda_method={corda.corda_method!r}: choose 'kpm' or 'ipm'")
    if corda.cache_file or corda.covariance_file:
        raise ValueError(
            "cache_file and covariance_file of CordaConfig are pickles: keep covariances with collect_covariances"
        )
    if corda.use_float16_for_covariance:
        raise ValueError("use_float16_for_covariance loses the start: save memory with layers_per_pass")
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        known: Any = LoraModel.target_module_mapping.get(str(kind))
        if known is None:
            raise ValueError(f"target_modules is not given, and PEFT has no default for model type {kind!r}")
        config.target_modules = known if isinstance(known, str) else set(known)  # type: ignore[assignment]
    _maybe_include_all_linear_layers(config, model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and LoraModel._check_target_module_exists(config, name)
    }
    if found:
        return found
    raise ValueError(
        f"target_modules={config.target_modules!r} names no Linear or Conv1D: calibrate before get_peft_model"
    )


def _covariances(
    model: nn.Module, targets: Mapping[str, Any], dataloader: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """One pass over the data."""
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(targets, 0)
    masks: list[torch.Tensor] = []
    size = 1

    def record(name: str, x: torch.Tensor) -> None:
        x = x.detach().float()
        parts = size if x.shape[:-1].numel() % size == 0 else 1
        x = x.reshape(parts, -1, x.shape[-1])  # (sequences, tokens, in), whatever the model made of its batch
        for mask in masks:
            if mask.shape == x.shape[:2]:
                x = torch.where(mask.to(x.device).unsqueeze(-1) > 0, x, 0.0)
        x = (x / x.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)).flatten(0, 1)
        if name not in sums:
            sums[name] = x.new_zeros(x.shape[1], x.shape[1])
        sums[name].addmm_(x.T, x)
        counts[name] += parts

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]))  # type: ignore[misc]
        for name, module in targets.items()
    ]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for batch in dataloader:
            if isinstance(batch, Mapping):
                batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
                masks = [batch[k] for k in ("attention_mask", "decoder_attention_mask") if k in batch]
                size = next((len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim), 1)
                model(**batch)
            else:
                masks, size = [], len(batch)
                model(batch.to(device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not any(counts.values()):
        raise ValueError("dataloader is empty: give about 256 sequences")
    for name in targets:
        if not counts[name]:
            raise ValueError(f"{name!r} saw no input in the calibration data: take it out of target_modules")
    return {name: total / counts[name] for name, total in sums.items()}


def _decompose(name: str, module: Any, covariance: torch.Tensor, r: int, config: LoraConfig) -> None:
    """Leave the r components on the layer where `get_peft_model` looks for them."""
    weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).float()  # (out, in)
    size = weight.shape[1]
    if covariance.shape != (size, size):
        raise ValueError(f"covariances: {name!r} has shape {tuple(covariance.shape)}, not {(size, size)}")
    if not covariance.isfinite().all() or not covariance.diagonal().sum() > 0:
        raise ValueError(f"covariances: {name!r} is zero or not finite; look at the calibration data")
    covariance = covariance.to(weight.device).float()
    eye, damp = torch.eye(size, device=weight.device), 0.01
    while True:
        damped = covariance + damp * covariance.diagonal().mean() * eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damp *= 2
    u, s, v = torch.linalg.svd(weight @ damped, full_matrices=False)
    corda: Any = config.corda_config
    chosen = slice(0, r) if corda.corda_method == "ipm" else slice(len(s) - r, None)
    u, s, v = u[:, chosen].clone(), s[chosen].clone(), (v[chosen] @ inverse).T  # (out, r), (r,), (in, r)
    module.eigens = SimpleNamespace(U_WC=u, S_WC=s, V_WC=v)
    setattr(module, INITIAL, (u.cpu(), s.cpu().clone(), v.cpu()))  # PEFT divides its s in place


def _initial(name: str, layer: LoraLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 and B0, as PEFT makes them from the decomposition."""
    kept = getattr(layer.get_base_layer(), INITIAL, None)
    if kept is None:
        raise ValueError(
            f"{name!r} does not know how its adapter began: give initial=, the folder of a save_pretrained from before training"
        )
    u, s, v = kept
    root = (s / layer.scaling[adapter_name]).sqrt()
    return v.T * root[:, None], u * root
