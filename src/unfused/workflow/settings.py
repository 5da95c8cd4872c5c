"""The settings of a run: checked once, written to `config.yaml`, enough to repeat it."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from unfused.data.files import atomic_write

METHODS = (
    "unfused",
    "unfused-literal",
    "unfused-propagate",
    "fine-tune",
    "linear-probe",
    "scratch",
    "classic",
    "ceiling",
)
LABEL_METHODS = (  # classifiers on frozen features, see `label_arms`
    "zero-shot",
    "gda-clip",
    "tfup",
    "tfup-t",
    "ogen",
    "latent-label-shift",
    "list",
)
NOT_HERE = {  # of the label family, and why
    "caps-adapter": "needs a captioner and a generator of pictures: `unfused.label.MAdapterClassifier` takes them",
    "tabular-ncd": "finds classes that nobody has named: use `unfused.label.PBN` or `HiddenClassSearchCV`",
    "unsupervised-prompt": "asks a black box, which is a function of yours: use `unfused.label.BlackBoxPromptLearner`",
    "vision-therapy": "needs a second model that verifies: use `unfused.label.VisionTherapy`",
}
CLASSES_ALONE = ("gda-clip", "tfup", "zero-shot")  # the default methods where class names are given
TEACHERS = ("contrastive", "decar", "delores-s", "delores-m", "slicer", "random")
MODALITIES = ("auto", "audio", "image", "text", "table")
NUMBERS = (
    "labels_per_class",
    "seed",
    "seeds",
    "width",
    "pretrain_steps",
    "distil_steps",
    "fine_tune_steps",
    "queue",
)


@dataclass
class Settings:
    """Everything that decides the result of `adapt`; see there for the meaning of each field."""

    source: str
    labels: str | None = None
    name: str = "run"
    output: str = "runs"
    modality: str = "auto"
    text_column: str | None = None
    target: str | None = None
    classes: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    method: tuple[str, ...] = ("unfused", "classic")
    teacher: str = "contrastive"
    clusters: str = "auto"
    propagate: bool = True
    group: str | None = None
    test: str | None = None
    labels_per_class: int | None = None
    inductive: bool = False
    seed: int = 0
    seeds: int = 1
    width: int = 32
    pretrain_steps: int | None = None
    distil_steps: int | None = None
    fine_tune_steps: int | None = None
    queue: int = 50

    def __post_init__(self) -> None:
        parts = self.method.split(",") if isinstance(self.method, str) else self.method
        self.method = tuple(dict.fromkeys(name for part in parts if (name := str(part).strip())))
        self._check_classes()
        # YAML and Python callers may give numbers and paths: one spelling, one fingerprint
        self.clusters = str(self.clusters)
        for name in ("labels", "test", "teacher", "output", "text_column", "target"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, os.fspath(value) if isinstance(value, os.PathLike) else str(value))
        for name in ("inductive", "propagate"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}={value!r} must be true or false")
        for name in NUMBERS:
            if (value := getattr(self, name)) is not None:
                if isinstance(value, bool) or not isinstance(value, Integral):
                    raise TypeError(f"{name}={value!r} must be a whole number")
                least = 0 if name == "seed" or (name == "labels_per_class" and self.classes) else 1
                if value < least:
                    raise ValueError(f"{name}={value} must be at least {least}")
                setattr(self, name, int(value))
        for name in self.method:
            if name in NOT_HERE:
                raise ValueError(f"method={name!r} {NOT_HERE[name]}")
            if name not in METHODS + LABEL_METHODS:
                known = ", ".join(METHODS + LABEL_METHODS)
                raise ValueError(f"method={name!r} is not known: give one or more of {known}")
        if not self.method:
            raise ValueError(f"method is empty: give one or more of {', '.join(METHODS + LABEL_METHODS)}")
        if self.clusters != "auto":
            try:
                count = int(self.clusters)
            except ValueError:
                count = 0
            if count < 2:
                raise ValueError(f"clusters={self.clusters!r}: give 'auto' or a number of at least 2")
        if self.modality not in MODALITIES:
            raise ValueError(f"modality={self.modality!r}: give {', '.join(map(repr, MODALITIES))}")
        if not re.fullmatch(r"[\w .+=@-]+", self.name) or self.name.strip(". ") == "":
            raise ValueError(f"name={self.name!r}: letters, digits, '.', '_' and '-' make a folder's name")

    def _check_classes(self) -> None:
        for name in ("classes", "templates"):
            value = getattr(self, name)
            if value is None:
                continue
            # names on the command line are separated by commas; a sentence may hold one
            parts = (
                (value.split(",") if name == "classes" else [value])
                if isinstance(value, str)
                else list(value)
            )
            if not all(isinstance(part, str) for part in parts):
                raise TypeError(f"{name}={value!r}: give texts")
            parts = [part.strip() for part in parts]
            if not all(parts) or len(set(parts)) < len(parts):
                raise ValueError(f"{name}={value!r}: each must be there once, and none may be empty")
            setattr(self, name, tuple(parts))
        if self.classes is not None and len(self.classes) < 2:
            raise ValueError(f"classes={list(self.classes)}: give at least two names, separated by commas")
        for template in self.templates or ():
            if "{}" not in template:
                raise ValueError(f"templates: {template!r} needs a {{}} where the name of the class goes")

    def to_dict(self) -> dict[str, Any]:
        """As in `config.yaml`; what only some runs have is left out of others."""
        rare = ("text_column", "target", "classes", "templates")
        given = {k: v for k, v in asdict(self).items() if v is not None or k not in rare}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}

    def write(self, path: Path) -> None:
        import yaml

        with atomic_write(path) as file:
            file.write("# `unfused adapt --config THIS_FILE` repeats the run\n")
            yaml.safe_dump(self.to_dict(), file, sort_keys=False, allow_unicode=True)

    @classmethod
    def read(cls, path: str | Path) -> Settings:
        """Settings of an earlier run's `config.yaml`; an unknown field is a `ValueError` that names it."""
        import yaml

        with open(path, encoding="utf-8") as file:
            try:
                values = yaml.safe_load(file)
            except yaml.YAMLError as error:
                raise ValueError(f"config={str(path)!r} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"config={str(path)!r} does not hold settings, one `name: value` a line")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known - {"resolved"}):
            raise ValueError(
                f"config={str(path)!r} has unknown settings {unknown}; there are {sorted(known)}"
            )
        if "source" not in values:
            raise ValueError(f"config={str(path)!r} has no `source`: the folder or manifest to adapt to")
        return cls(**{name: value for name, value in values.items() if name in known and value is not None})
