"""What all our PEFT tuners share: config, layer, model.

A tuner is three small classes on top of these. The layer says what it learns and how it changes its module:

    class SsfLayer(TunerLayer):
        adapter_parameters = ("unfused_ssf_scale", "unfused_ssf_shift")   # one entry per adapter name
        def update_layer(self, adapter_name, config): ...                 # makes the entries
        def adapted(self, names, x): ...                                  # forward with the active adapters
        def merged_weights(self, name, weight, bias): ...                 # the same, folded into the weights

and the model which modules it can wrap (`layer_types`). Injection, saving, several adapters, switching, merging come from
PEFT; hostile adapter files, exact unmerging, `target_modules="all"` and the hooks of scheduled methods from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.peft_model import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

from unfused.nn.peft_register import peft_type

__all__ = ["TunerConfig", "TunerLayer", "TunerModel", "tuner_layers"]

HEADS = ("classifier", "score", "lm_head", "qa_outputs", "cls", "head", "heads", "proj_out")
"""Names of modules that `target_modules="all"` leaves alone, with all that is inside."""


@dataclass
class TunerConfig(PeftConfig):
    """Fields of every tuner here; PEFT's names and meanings.

    Parameters
    ----------
    target_modules : list of str, str or None
        Suffixes of module names, or a regular expression, "all-linear", or "all" (every module of a kind that the method
        can adapt, outside the head). None takes the method's own choice for known architectures.
    exclude_modules : list of str or str, optional
    modules_to_save : list of str, optional
        Modules trained as they are and saved with the adapter, the new head say.
    layers_to_transform : list of int or int, optional
    layers_pattern : list of str or str, optional
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module name suffixes, a regular expression, 'all-linear' or 'all'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module name suffixes or a regular expression to leave out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained as they are and saved with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, where it is unusual."}
    )

    method: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.method)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform: say which layers")

    def require(self, condition: bool, message: str) -> None:
        """Raise ValueError(f"{class name}: {message}") unless the condition holds."""
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")


class TunerLayer(nn.Module, BaseTunerLayer):
    """A wrapped module with, per adapter name, parameters, modules, buffers (saved) and settings (not saved).

    Subclasses name these containers; each name begins with the prefix of the tuner. `__init__` makes them empty.
    """

    adapter_parameters: ClassVar[tuple[str, ...]] = ()
    adapter_modules: ClassVar[tuple[str, ...]] = ()
    adapter_buffers: ClassVar[tuple[str, ...]] = ()
    adapter_settings: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = (*cls.adapter_parameters, *cls.adapter_modules)
        cls.other_param_names = (*cls.adapter_buffers, *cls.adapter_settings)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_parameters:
            setattr(self, name, nn.ParameterDict())
        for name in self.adapter_modules:
            setattr(self, name, nn.ModuleDict())
        for name in self.adapter_buffers:
            setattr(self, name, BufferDict({}, persistent=True))
        for name in self.adapter_settings:
            setattr(self, name, {})
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._unmerged: tuple[torch.Tensor, torch.Tensor | None] | None = None

    if TYPE_CHECKING:  # the containers, which have a name of their own in every method

        def __getattr__(self, name: str) -> Any: ...
        def get_base_layer(self) -> Any: ...

    # -- what a method writes ----------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Make the entries of a new adapter."""
        raise NotImplementedError

    def adapted(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Forward with these adapters, all of which this layer has, in activation order; not disabled, not merged."""
        raise NotImplementedError

    def merged_weights(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """New tensors that hold an adapter's change of `weight` and `bias`; by default `weight + get_delta_weight`."""
        return weight + self.get_delta_weight(name).to(weight.dtype), bias

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The change of the weight, where it does not depend on the weight."""
        raise NotImplementedError

    def regularization_loss(self, name: str) -> torch.Tensor | None:
        """A term that this layer adds to the loss for one active adapter."""
        return None

    def prepare_load(self, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Give entries whose shapes depend on data the shapes of a checkpoint, and check its values.

        `state` holds this layer's entries, without the adapter's name (`{"unfused_ssf_scale": tensor}`). Raise ValueError
        for what cannot be; nothing has been loaded yet.
        """

    # -- what PEFT calls ---------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether this layer holds anything of the adapter."""
        return any(
            name in getattr(self, kind) for kind in (*self.adapter_layer_names, *self.other_param_names)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        names = [name for name in self.active_adapters if self.has(name)]
        if self.merged or not names:
            return self.base_layer(*args, **kwargs)
        return self.adapted(names, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base layer's weights; the original tensors are kept for an exact `unmerge`."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        if not names:
            return
        base = self.get_base_layer()
        bias_now = getattr(base, "bias", None)
        weight, bias = base.weight.data, None if bias_now is None else bias_now.data
        original = (base.weight, bias_now)
        with torch.no_grad():
            for name in names:
                weight, bias = self.merged_weights(name, weight, bias)
                if safe_merge and not all(t.isfinite().all() for t in (weight, bias) if t is not None):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                    )
        self._unmerged = self._unmerged or original
        self._set_weights(weight, bias)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the base layer its original tensors back."""
        if self._unmerged is not None:
            self._set_weights(*self._unmerged)
            self._unmerged = None
        self.merged_adapters.clear()

    def _set_weights(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """As new parameters, so that a module tied to this one (an output layer to its embedding) stays as it is."""
        base = self.get_base_layer()
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            if value is not None or getattr(base, name, None) is not None:
                setattr(base, name, value)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """Of a wrapped block, too, which has no `weight`."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        first = next(base_layer.parameters(), None) if device is None else None
        return (device, dtype) if first is None else (first.device, first.dtype)


class TunerModel(BaseTuner):
    """Injects `TunerLayer`s.

    Attributes
    ----------
    layer_types : tuple of (type or tuple of types, TunerLayer subclass)
        What can be wrapped, and by what; the first match counts.
    heads : tuple of str
        Names of modules that `target_modules="all"` leaves alone, with all that is inside.
    not_mergeable : str
        Why `merge_and_unload` is impossible; empty where it is possible.
    """

    prefix: str = ""
    tuner_layer_cls = TunerLayer
    target_module_mapping: dict[str, Any] = {}
    layer_types: ClassVar[tuple[tuple[Any, type[TunerLayer]], ...]] = ()
    heads: ClassVar[tuple[str, ...]] = HEADS
    not_mergeable: ClassVar[str] = ""

    # -- scheduled and regularised methods ---------------------------------------------------------------------------

    def regularization_loss(self) -> torch.Tensor:
        """What the active adapters add to the loss (0 where nothing); see `unfused.train.peft.RegularizedTrainer`."""
        terms = [
            term
            for layer in tuner_layers(self.model)
            for name in layer.active_adapters
            if layer.has(name) and (term := layer.regularization_loss(name)) is not None
        ]
        return torch.stack(terms).sum() if terms else next(self.model.parameters()).new_zeros(())

    def begin_training(self, total_steps: int) -> None:
        """Called once before the first step, for schedules that are fractions of the run."""

    def update_and_allocate(self, global_step: int) -> list[nn.Parameter]:
        """Called after each optimiser step; returns parameters whose optimiser state is to be dropped."""
        return []

    # -- injection ---------------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if "_trainable_before" not in self.__dict__:
            self.__dict__["_trainable_before"] = [p for p in model.parameters() if p.requires_grad]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        chosen = peft_config.target_modules in (None, "all")
        if peft_config.target_modules is None:
            peft_config.target_modules = self.default_targets(peft_config, model_config)
        if peft_config.target_modules == "all":
            peft_config.target_modules = set(self._all_targets(peft_config))
        if chosen and isinstance(peft_config.target_modules, set):
            peft_config.target_modules = self._in_chosen_layers(peft_config, peft_config.target_modules)
        return peft_config

    def _in_chosen_layers(self, config: Any, names: set[str]) -> set[str]:
        """PEFT applies `layers_to_transform` to suffixes alone, not to the full names that we put for the user."""
        if config.layers_to_transform is None:
            return names
        wanted, lists = config.layers_to_transform, config.layers_pattern or r"[^.\d][^.]*"
        wanted = [wanted] if isinstance(wanted, int) else wanted
        lists = [lists] if isinstance(lists, str) else lists
        whole = {name for name, _ in self.model.named_modules()}
        pattern = re.compile(rf"(?:^|\.)(?:{'|'.join(lists)})\.(\d+)(?=\.|$)")
        indices = {name: pattern.search(name) for name in names & whole}
        return (names - whole) | {n for n, found in indices.items() if found and int(found[1]) in wanted}

    def default_targets(self, config: Any, model_config: dict) -> Any:
        """Targets where the user names none: by `model_type`; override to look at the model."""
        kind = model_config.get("model_type")
        found = self.target_module_mapping.get(str(kind))
        if found is None:
            raise ValueError(
                f"target_modules is not given, and {type(config).__name__} has no default for model type {kind!r}: name the "
                'modules to adapt, or give target_modules="all"'
            )
        return found if isinstance(found, str) else set(found)

    def _all_targets(self, config: Any) -> Iterator[str]:
        outside = {*self.heads, *(config.modules_to_save or ())}
        kinds = tuple(
            kind
            for types, _ in self.layer_types
            for kind in (types if isinstance(types, tuple) else (types,))
        )
        inside_tuner: list[str] = []
        for name, module in self.model.named_modules():
            if outside & set(name.split(".")) or any(name.startswith(f"{outer}.") for outer in inside_tuner):
                continue
            if isinstance(module, TunerLayer):
                inside_tuner.append(name)
                yield name
            elif isinstance(module, kinds):
                yield name

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = (
            target
            if isinstance(target, TunerLayer)
            else self.make_layer(peft_config, adapter_name, target, current_key)
        )
        self.extend_layer(layer, adapter_name, peft_config, current_key)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def make_layer(self, config: Any, adapter_name: str, target: nn.Module, key: str) -> TunerLayer:
        """Wrap a module; override where the wrapper needs to know more than the module."""
        for types, layer_type in self.layer_types:
            if isinstance(target, types):
                return layer_type(target, adapter_name)
        known = [
            kind.__name__
            for types, _ in self.layer_types
            for kind in (types if isinstance(types, tuple) else (types,))
        ]
        raise ValueError(
            f"target_modules: {key!r} is a {type(target).__name__}; {type(config).__name__} adapts {', '.join(known)}"
        )

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """PEFT's own copies `weight` over, which a wrapped block or a head of several layers does not have."""
        setattr(parent, child_name, new_module)

    def extend_layer(self, layer: TunerLayer, adapter_name: str, config: Any, key: str) -> None:
        """Add an adapter to a layer; override where the layer needs to know more than the config."""
        layer.update_layer(adapter_name, config)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT lifts half-precision parameters to float32; running statistics of a module have to go with them."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in tuner_layers(self.model) if autocast_adapter_dtype else ():
            for modules in (getattr(layer, kind) for kind in layer.adapter_modules):
                for buffer in modules[adapter_name].buffers() if adapter_name in modules else ():
                    if buffer.dtype in (torch.float16, torch.bfloat16):
                        buffer.data = buffer.data.float()

    def _check_merge_allowed(self) -> None:
        if self.not_mergeable:
            raise ValueError(
                f"{type(self).__name__.removesuffix('Model')} cannot be merged: {self.not_mergeable}"
            )
        super()._check_merge_allowed()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge_allowed()
        super().merge_adapter(adapter_names, safe_merge)

    # -- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Of modules that have parts of their own, too: PEFT's looks for the name at the end of the key."""
        return re.sub(rf"(\.{cls.prefix}\w+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)

    @classmethod
    def unpack_file(cls, config: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The layers' entries from a file's, where `_get_adapter_state_dict` packs them; ValueError for what cannot be."""
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's hook, with a check of the file before any weight is touched; a bad one leaves the model as it was."""
        try:
            state_dict = cls.unpack_file(config, state_dict)
            for name, layer in model.named_modules():
                if isinstance(layer, TunerLayer):
                    starts = (f"{name}.", f"base_model.model.{name}.")
                    local = {
                        key[len(start) :]: value
                        for key, value in state_dict.items()
                        for start in starts
                        if key.startswith(start)
                    }
                    layer.prepare_load(adapter_name, local)
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            _check(cls.prefix, model, adapter_name, remapped)
        except ValueError as reason:
            _withdraw(model, adapter_name)
            raise ValueError(f"the adapter file does not fit this model: {reason}") from None
        return remapped


def tuner_layers(model: nn.Module) -> Iterator[TunerLayer]:
    """All wrapped modules, outermost first."""
    return (module for module in model.modules() if isinstance(module, TunerLayer))


def _check(prefix: str, model: nn.Module, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
    def ours(key: str) -> bool:
        return prefix in key and f".{adapter_name}" in key

    known = model.state_dict()
    names = {key.removeprefix("base_model.model."): key for key in known}
    loaded = {}
    for key, value in state.items():
        at = key if key in known else names.get(key.removeprefix("base_model.model."))
        if at is None:
            raise ValueError(f"it has {key!r}, which the model lacks")
        if known[at].shape != value.shape:
            raise ValueError(f"{key!r} has shape {tuple(value.shape)}, the model {tuple(known[at].shape)}")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{key!r} holds NaN or infinite values")
        loaded[at] = value
    if missing := [key for key in known if ours(key) and key not in loaded]:
        raise ValueError(
            f"it lacks {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter that could not be loaded off again."""
    if not isinstance(model, PeftModel):
        return
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
        return
    tuner: Any = model.base_model
    before = tuner.__dict__.get("_trainable_before", [])
    tuner.unload()
    for parameter in before:
        parameter.requires_grad_(True)
