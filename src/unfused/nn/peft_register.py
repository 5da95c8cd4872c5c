"""Makes PEFT know our tuners: `get_peft_model`, `PeftModel.from_pretrained`, `model.add_adapter`.

PEFT looks a tuner up by the `peft_type` in `adapter_config.json`, in tables keyed by the enum `PeftType`, which nobody can
subclass. So each tuner adds its own member to the enum. `import unfused` imports no tuner (it has to stay light): it puts
a stand-in for each into PEFT's tables, as soon as PEFT is there, and the first look-up imports the tuner's module.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unfused._import_hook import when_imported
from unfused._lazy import public_modules

__all__ = ["announce", "peft_type", "register"]


def register(method: str, config_class: type, model_class: Any) -> None:
    """Register a tuner with PEFT. Called at the end of its module; safe to repeat.

    Parameters
    ----------
    method : str
        Lower case with underscores, such as "ssf": the enum member is `UNFUSED_SSF`, the prefix of the adapter's
        attributes on its layers `unfused_ssf_`.
    config_class : type
        A `TunerConfig`; its attribute `method` is set.
    model_class : type
        A `TunerModel`; its attribute `prefix` is set.
    """
    from peft import mapping
    from peft.utils.peft_types import register_peft_method

    name = f"unfused_{method}"
    member = peft_type(method)
    config_class.method = method  # type: ignore[attr-defined]
    model_class.prefix = f"{name}_"
    tables = (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    )
    for table in tables:  # a stand-in, or this same tuner when its module is reloaded
        table.pop(member, None)
    register_peft_method(name=name, config_cls=config_class, model_cls=model_class)


def peft_type(method: str) -> Any:
    """The member of `PeftType` for one of our methods, made on first use.

    Examples
    --------
    >>> str(peft_type("ssf").value)
    'UNFUSED_SSF'
    """
    from peft.utils.peft_types import PeftType

    name = f"unfused_{method}".upper()
    if name not in PeftType.__members__:
        member: Any = str.__new__(PeftType, name)
        member._name_, member._value_, member._sort_order_ = name, name, len(PeftType.__members__)
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


def announce(package: str, folder: str | Path) -> None:
    """Make PEFT know the tuners of a family's modules, without importing them, as soon as PEFT itself is imported."""

    def put_stand_ins() -> None:
        from peft import mapping

        configs: Any = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
        tuners: Any = mapping.PEFT_TYPE_TO_TUNER_MAPPING
        for file in public_modules(Path(folder)):
            for method, config_name, model_name in _registrations(file):
                member, module = peft_type(method), f"{package}.{file.stem}"
                mapping.PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(member, f"unfused_{method}_")
                configs.setdefault(member, _StandIn(module, config_name))
                tuners.setdefault(member, _StandIn(module, model_name))

    when_imported("peft", put_stand_ins)


def _registrations(file: Path) -> Iterator[tuple[str, str, str]]:
    """The calls `register("method", Config, Model)` at the top level of a module."""
    source = file.read_text(encoding="utf-8")
    if "\nregister(" not in source:  # most modules: not worth parsing
        return
    for node in ast.parse(source, filename=str(file)).body:
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register":
            method, *names = call.args
            if isinstance(method, ast.Constant) and all(isinstance(name, ast.Name) for name in names):
                config_name, model_name = (name.id for name in names if isinstance(name, ast.Name))
                yield str(method.value), config_name, model_name


class _StandIn:
    """A class of ours that is imported on first use; `register` then puts the class itself into the tables."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _class(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._class()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._class(), name)
