"""Makes transformers' Auto classes and pipelines know our architectures, without importing transformers or torch.

`import unfused` has to stay light, yet `AutoModelForAudioClassification.from_pretrained` has to know our models after
it. transformers itself is lazy in the same way: its tables hold names of classes, which it looks up in
`transformers.models.NAME` on first use. So our names go into these tables, at once where the Auto classes are loaded
already and else right after they are, and `transformers.models.unfused_audio` resolves to `unfused.nn.audio_model`, and
`unfused_table` to `unfused.nn.table_model`.
(The public `AutoModel.register` takes classes: it would import torch and our models while transformers is in the
middle of importing its own modules.)
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

from unfused._import_hook import when_imported

__all__ = ["install_hook", "register"]

ALIAS, TABLE_ALIAS = "transformers.models.unfused_audio", "transformers.models.unfused_table"
ALIASES = {ALIAS: "audio_model", TABLE_ALIAS: "table_model"}
CONFIGS = {"unfused-audio": "UnfusedAudioConfig", "unfused-table": "UnfusedTableConfig"}
TABLES: dict[str, dict[str, dict[str, str]]] = {
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING": CONFIGS},
    "transformers.models.auto.feature_extraction_auto": {
        "FEATURE_EXTRACTOR_MAPPING": {"unfused-audio": "UnfusedFeatureExtractor"}
    },
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING": {"unfused-audio": "UnfusedAudioModel", "unfused-table": "UnfusedTableModel"},
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING": {"unfused-audio": "UnfusedAudioForClassification"},
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": {"unfused-table": "UnfusedTableForClassification"},
    },
}


def install_hook() -> None:
    """Register with the Auto classes, as soon as they are loaded. Safe to repeat; `import unfused` does it.

    Examples
    --------
    >>> install_hook()
    >>> from transformers import AutoConfig
    >>> AutoConfig.for_model("unfused-audio", width=32).width
    32
    """
    if not any(isinstance(finder, _Aliases) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Aliases())
        for name in TABLES:
            when_imported(name, partial(_fill, name))
    for name in TABLES:
        if name in sys.modules:
            _fill(name)


def register() -> None:
    """`install_hook`, and load the Auto classes now."""
    install_hook()
    for name in TABLES:
        importlib.import_module(name)


def _fill(name: str) -> None:
    module = sys.modules[name]
    for table, classes in TABLES[name].items():
        mapping = getattr(module, table, None)
        if mapping is None:  # the module is only half executed, and comes here again when it is done
            return
        for model_type, class_name in classes.items():
            getattr(module, f"{table}_NAMES")[model_type] = class_name
            if table != "CONFIG_MAPPING":  # made from CONFIG_MAPPING_NAMES, perhaps before our name was there
                mapping._reverse_config_mapping[CONFIGS[model_type]] = model_type


class _Aliases(importlib.abc.MetaPathFinder):
    """Finds the modules of `ALIASES`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(name, _AliasLoader()) if name in ALIASES else None


class _AliasLoader(importlib.abc.Loader):
    def exec_module(self, module: ModuleType) -> None:
        ours = importlib.import_module(f"unfused.nn.{ALIASES[module.__name__]}")
        module.__dict__.update({name: getattr(ours, name) for name in ours.__all__})
