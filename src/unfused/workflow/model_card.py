"""The model card: README.md of a saved model, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from unfused.workflow import wording
from unfused.workflow.wording import visible

__all__ = ["model_card"]

_AUDIO = """\
import soundfile
import soxr
from transformers import pipeline

classify = pipeline("audio-classification", model=".", trust_remote_code=True)  # this folder, or the hub id
sound, rate = soundfile.read("clip.wav", dtype="float32", always_2d=True)  # (samples, channels)
sound = soxr.resample(sound.mean(axis=1), rate, classify.feature_extractor.sampling_rate)
print(classify(sound))
"""
_IMAGE = """\
from transformers import pipeline

classify = pipeline("image-classification", model=".")  # this folder, or the hub id
print(classify("picture.jpg"))
"""
_TEXT = """\
from transformers import pipeline

classify = pipeline("text-classification", model=".")  # this folder, or the hub id
print(classify("A text."))
"""
_TABLE = """\
import pandas
import torch
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(".", trust_remote_code=True)
rows = pandas.read_csv("new.csv")  # with the columns that the config describes
with torch.inference_mode():
    probabilities = model(model.encode(rows)).logits.softmax(-1)
print([model.config.id2label[index] for index in probabilities.argmax(-1).tolist()])
"""
_MODALITY = {
    "audio-classification": "audio",
    "image-classification": "image",
    "text-classification": "text",
    "tabular-classification": "table",
}
_ELSEWHERE = {
    "text": "other sources, times or ways of writing",
    "table": "other places, times or ways of measuring",
}
_METHODS = {
    "unfused": "an encoder is trained on the pool without labels; the labels are spread over the pool along "
    "neighbours in its features, and the class-level targets that this gives are distilled into a freshly "
    "initialised student, which is then fine-tuned on the labels (UnFuSeD with `--propagate`, an extension "
    "of the paper)",
    "unfused-literal": "an encoder is trained on the pool without labels; its features are clustered, and "
    "the cluster ids are distilled into a freshly initialised student, which is then fine-tuned on the "
    "labels (UnFuSeD as published)",
    "fine-tune": "an encoder is trained on the pool without labels and then fine-tuned on the labels",
    "scratch": "an encoder is trained on the labels alone, from random weights",
    "zero-shot": "each item has the class whose name is nearest to it in the space that the encoder shares with texts",
    "gda-clip": "Gaussians with one covariance on frozen features, weighed against the names of the classes where the encoder "
    "reads them; without labels by expectation-maximisation from the names (GDA-CLIP, arXiv:2402.04087)",
    "tfup": "a cache of the unlabelled items that are surest and most central votes together with the names or the means of "
    "the classes, without training (TFUP, arXiv:2404.16339)",
    "tfup-t": "two small adapters trained on the labels that such a cache gives (TFUP-T, arXiv:2404.16339)",
    "ogen": "a small adapter on frozen features, regularised by synthetic features of unknown classes (OGEN, arXiv:2401.15914)",
    "latent-label-shift": "classes found by how their shares differ between groups, named by the labels "
    "(DDFA, arXiv:2207.13179)",
    "ceiling": "the student is trained on all true labels of the training items: a bound, not a method",
}
_METHODS["unfused-propagate"] = _METHODS["unfused"]
_CITATION = """\
@inproceedings{seth2023unfused,
  title     = {{UNFUSED}: {UN}supervised Finetuning Using {SE}lf supervised Distillation},
  author    = {Seth, Ashish and Ghosh, Sreyan and Umesh, S. and Manocha, Dinesh},
  booktitle = {ICASSP Workshop on Self-supervision in Audio, Speech and Beyond},
  year      = {2023},
  note      = {arXiv:2303.05668}
}
"""


def model_card(
    name: str,
    task: str,
    method: str,
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    parameters: int | None = None,
    version: str | None = None,
    network: bool = True,
) -> str:
    """The text of README.md.

    Parameters
    ----------
    name : str
        Of the model.
    task : {"audio-classification", "image-classification", "text-classification", "tabular-classification"}
        The pipeline it works in (the last is one of the hub's only).
    method : str
        Which of `metrics["methods"]` the saved model is of.
    metrics : dict
        As in `metrics.json`: `methods` and `data`.
    settings : dict
        As in `config.yaml`.
    parameters : int, optional
        Number of weights.
    version : str, optional
        Of `unfused`; default: the one that runs.
    network : bool, default=True
        Whether the model is a network of transformers; else an estimator on frozen features.

    Examples
    --------
    >>> metrics = {"data": {"classes": ["owl", "wren"]}}
    >>> card = model_card("birds", "audio-classification", "unfused", metrics, {})
    >>> card.splitlines()[:2]
    ['---', 'library_name: transformers']
    """
    if version is None:
        from unfused import __version__ as version
    data, methods = metrics.get("data", {}), metrics.get("methods", {})
    if method == "unfused" and settings.get("propagate") is False:
        method_text = _METHODS["unfused-literal"]
    else:
        method_text = _METHODS.get(method, "")
    modality = _MODALITY[task]
    things = wording.noun(modality)
    sections = [
        _front_matter(name, task, method, data, methods, settings, network),
        f"# {_escape(name)}",
        f"A classifier of {things} into {_classes(data)}, made by `unfused adapt` {version}"
        + _headline(methods.get(method), things),
        _section("Use", _use(task) if network else _use_estimator(modality)),
        _section("Data", _data(data, things, modality)),
        _section("Method", _method(method, method_text, settings, parameters)),
        _section("Evaluation", _evaluation(data, methods, settings, things, modality)),
        _section("Limits", _limits(data, methods.get(method), things, modality)),
        _section("Citation", f"```bibtex\n{_CITATION}```"),
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _classes(data: Mapping[str, Any]) -> str:
    return wording.plural(len(data.get("classes", ())), "class", "classes")


def _escape(text: object) -> str:
    """A name in Markdown: shown as it is, whatever it contains."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", visible(text))


def _front_matter(
    name: str,
    task: str,
    method: str,
    data: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    network: bool,
) -> str:
    import yaml

    source = str(data.get("source", name))
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) is not None and not os.path.exists(source)
    dataset = source.split(":")[0] if on_hub else visible(name)
    meta: dict[str, Any] = {
        "library_name": "transformers" if network else "unfused",
        "pipeline_tag": task,
        "license": "unknown",  # of the data and so of the model: whoever publishes it knows
        "tags": ["unfused", "self-supervised-learning", "few-shot", task],
        "metrics": ["accuracy"],
    }
    if on_hub:
        meta["datasets"] = [dataset]
    results = [
        {
            "type": key,
            "value": round(float(methods[method][key]["mean"]), 4),
            "name": _metric_name(key, row, settings),
        }
        for key in ("accuracy", "balanced_accuracy")
        if method in methods and wording.is_number((row := methods[method].get(key) or {}).get("mean"))
    ]
    if results:
        meta["model-index"] = [
            {
                "name": visible(name),
                "results": [
                    {
                        "task": {"type": task},
                        "dataset": {"type": dataset, "name": dataset, "split": "held out"},
                        "metrics": results,
                    }
                ],
            }
        ]
    return f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---"


def _metric_name(key: str, row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    text = key.replace("_", " ")
    if ends := wording.accuracy_interval(row):
        text += f" (95 % interval {wording.span(ends)}, {wording.plural(_draws(row), 'draw')} of the labels)"
    return text


def _draws(row: Mapping[str, Any]) -> int:
    return max(1, len(row.get("seeds") or ()))


def _headline(row: Mapping[str, Any] | None, things: str) -> str:
    accuracy = (row or {}).get("accuracy") or {}
    if not wording.is_number(accuracy.get("mean")):
        return "."
    ends = wording.accuracy_interval(accuracy)
    spread = f" (95 % interval {wording.percent(ends[0])} to {wording.percent(ends[1])})" if ends else ""
    return f". It labels {wording.percent(accuracy['mean'])}{spread} of the held-out {things} correctly."


def _use(task: str) -> str:
    if task.startswith("image"):
        return f"```python\n{_IMAGE}```\n\nOn many files: `unfused predict MODEL *.jpg --csv out.csv`."
    if task.startswith("text"):
        return (
            f"```python\n{_TEXT}```\n\nOn a table of texts, long ones cut into windows: "
            "`unfused predict MODEL new.csv --csv out.csv`."
        )
    if task.startswith("tabular"):
        return (
            f"```python\n{_TABLE}```\n\nThe architecture's code lies in this folder, hence `trust_remote_code=True`; after "
            "`import unfused` it is not needed. On a table: `unfused predict MODEL new.csv --csv out.csv`."
        )
    return (
        f"```python\n{_AUDIO}```\n\n"
        "The architecture's code lies in this folder, hence `trust_remote_code=True`; after `import "
        "unfused` it is not needed. On many files of any rate and length: "
        "`unfused predict MODEL *.wav --csv out.csv`."
    )


def _use_estimator(modality: str) -> str:
    what = {"text": '["A text."]', "table": '"new.csv"', "image": '["picture.jpg"]', "audio": '["clip.wav"]'}[
        modality
    ]
    return (
        f'```python\nimport unfused\n\nprint(unfused.load(".").predict({what}))  # this folder\n```\n\nThe classifier lies in '
        "`estimator.json` and safetensors, without a pickle; `unfused.label.load` gives it as a scikit-learn estimator on "
        "features. On many items: `unfused predict MODEL ... --csv out.csv`."
    )


def _data(data: Mapping[str, Any], things: str, modality: str) -> str:
    if not data:
        return ""
    seconds = data.get("seconds_total")
    lines = [
        f"- {data.get('usable', 0):,} {things}"
        + (f", {wording.duration(seconds)} in all" if seconds else "")
        + (
            f"; {wording.plural(data['quarantined'], wording.units(modality)[0])} set aside as unusable"
            if data.get("quarantined")
            else ""
        )
        + "."
    ]
    if source := data.get("source"):
        # only its name: the rest of a path on somebody's machine is nobody's business
        lines.insert(0, f"- Source: {_escape(PurePath(str(source)).name)}.")
    if classes := list(data.get("classes", ())):
        shown = ", ".join(map(_escape, classes[:100])) + (", …" if len(classes) > 100 else "")
        lines.append(f"- Classes: {shown}.")
    if "labels_used" in data:
        lines.append(f"- Labels trained on: {data['labels_used']:,}.")
    if data.get("groups"):
        lines.append(f"- {wording.plural(data['groups'], 'group')}; no group is on both sides of the split.")
    return "\n".join(lines)


def _method(method: str, text: str, settings: Mapping[str, Any], parameters: int | None) -> str:
    rows = [f"{_escape(method)}: {text}." if text else f"{_escape(method)}."]
    details = [
        f"{name.replace('_', ' ')} {_escape(settings[name])}"
        for name in ("teacher", "clusters", "width", "seed")
        if settings.get(name) is not None
    ]
    if parameters is not None:
        details.append(f"{wording.quantity(parameters)} weights")
    if details:
        text = ", ".join(details)
        rows.append(f"{text[0].upper()}{text[1:]}.")
    return "\n\n".join(rows)


def _evaluation(
    data: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    things: str,
    modality: str,
) -> str:
    scored = {
        name: row
        for name, row in methods.items()
        if wording.is_number((row.get("accuracy") or {}).get("mean"))
    }
    if not scored:
        return "Nothing was held out, so no accuracy is known."
    held_out = f"{data['held_out']:,} {things}" if data.get("held_out") else f"the held-out {things}"
    split = [f"On {held_out}"]
    if settings.get("test") is not None:
        split.append(f"held out by test = {_escape(settings['test'])}")
    if settings.get("labels_per_class") is not None:
        split.append(f"with {wording.plural(settings['labels_per_class'], 'label')} a class")
    order = [name for name in scored if name in wording.BOUNDS] + wording.ranked(scored)
    draws = max(_draws(row["accuracy"]) for row in scored.values())
    note = wording.interval_note(draws, "t" if draws > 1 else "bootstrap")
    table = ["| method | accuracy | 95 % interval | balanced accuracy | weights |", "|---|--:|--:|--:|--:|"]
    for name in order:
        row = scored[name]
        balanced = (row.get("balanced_accuracy") or {}).get("mean")
        cells: Sequence[str] = (
            _escape(name) + (" (bound)" if name in wording.BOUNDS else ""),
            wording.score(row["accuracy"]["mean"]),
            wording.span(wording.accuracy_interval(row["accuracy"])),
            wording.score(balanced),
            wording.quantity(row.get("parameters")),
        )
        table.append(f"| {' | '.join(cells)} |")
    pool = wording.pool_sentences(str(data.get("protocol", "transductive")), modality)
    return f"{', '.join(split)}; {note}.\n\n" + "\n".join(table) + f"\n\n{pool[0]} {pool[1]}"


def _limits(data: Mapping[str, Any], row: Mapping[str, Any] | None, things: str, modality: str) -> str:
    noise = "" if modality in _ELSEWHERE else ", silence and noise included"
    lines = [
        f"- It knows {_classes(data)} and gives one of them to anything{noise}; its probabilities are not calibrated.",
        f"- It was trained on one collection of {things}; "
        f"{_ELSEWHERE.get(modality, 'other microphones, cameras, places or speakers')} lower its accuracy.",
        "- Whatever bias the collection and its labels have, the model has learnt.",
    ]
    accuracy = (row or {}).get("accuracy") or {}
    if wording.is_number(accuracy.get("mean")) and _draws(accuracy) < 2:
        lines.append(
            "- One draw of the labels: the interval does not show how much another draw would change it."
        )
    return "\n".join(lines)
