"""The report of a run: one self-contained HTML page to open, mail and print, which never asks the network.

`render_report` turns `ReportData` into the page. What each section shows is computed in
`report_views` and `report_map`; the template only lays it out, with autoescape on. A content security policy
lets the page's one script run and nothing else.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from unfused.workflow import report_views as views
from unfused.workflow import wording
from unfused.workflow.report_map import choose_previews, cluster_map

__all__ = ["ReportData", "render_report", "write_report"]


@dataclass
class ReportData:
    """All that a run has to say; whatever is empty is left out of the report.

    Parameters
    ----------
    title, created, version, command : str
        Name of the run, when it ended (as it is to be read), version of `unfused`, the command line.
    config : dict
        The resolved settings.
    pool : {"transductive", "inductive"}
        Whether the unlabelled pool held the held-out items.
    summary : dict
        `modality` ("audio", "image", ...), `files`, `usable`, `quarantined`, `labelled`, `held_out`,
        `classes`, `groups` (counts), `seconds_total` (of sound), `duration_s` ({"min", "median", "max"}),
        `per_class` ({label: number of labels trained on}). Other numbers and strings are shown by their key.
    quarantine : list of (path, reason)
    stages : list of dict
        `name`, `seconds`, `peak_mib`, `parameters`, `detail` (a few words), `reused` (bool), in order.
    curves : dict
        Stage -> [{"step": int, "loss": float, ...}]; other numbers than the loss get a panel of their own.
    methods : dict
        Name -> {"accuracy": {"mean", "interval": [low, high] or None, "seeds": [...]}, "balanced_accuracy"
        (the same or a number), "seconds", "peak_mib", "parameters"}. "ceiling" is shown but not ranked.
    interval : {"t", "bootstrap"}
        What `interval` is: of the mean over draws of the labels, or a bootstrap over the held-out items.
    paired : list of dict
        `a`, `b`, `mean` (a minus b), `interval`, optionally `n` (draws).
    groups : dict
        Method -> {group: accuracy}.
    confusion : dict, optional
        `labels`, `matrix` (rows: truth, columns: predicted; counts), optionally `method`.
    map : list of dict
        `x`, `y`, `cluster`, `label` (or None), `predicted` (or None), `path`, `preview`; optionally
        `distance` (to the centroid; says which come first when previews must be thinned) and `text` (what is read where
        there is nothing to play or look at). A preview is a data URI of sound or picture, None, or a function that makes
        one, called only while there is room.
    to_label : list of dict
        `rank`, `path`, `cluster`, `reason`, `preview`, optionally `text`.
    pseudo_label_summary : list of dict
        `cluster`, `size`, `label` (the most frequent among its labelled members, or None), `purity` (that
        label's share of them, or None), optionally `labelled` (how many they are).
    """

    title: str
    created: str = ""
    version: str = ""
    command: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    pool: str = "transductive"
    summary: Mapping[str, Any] = field(default_factory=dict)
    quarantine: Sequence[tuple[str, str]] = ()
    stages: Sequence[Mapping[str, Any]] = ()
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    interval: str = "t"
    paired: Sequence[Mapping[str, Any]] = ()
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    confusion: Mapping[str, Any] | None = None
    map: Sequence[Mapping[str, Any]] = ()
    to_label: Sequence[Mapping[str, Any]] = ()
    pseudo_label_summary: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if self.pool not in ("transductive", "inductive"):
            raise ValueError(f"pool={self.pool!r}: give 'transductive' or 'inductive'")
        if self.interval not in ("t", "bootstrap"):
            raise ValueError(f"interval={self.interval!r}: give 't' or 'bootstrap'")


def render_report(data: ReportData, max_preview_mib: float = 6.0) -> str:
    """The page as one string of HTML.

    Parameters
    ----------
    data : ReportData
    max_preview_mib : float, default 6.0
        Room for sounds and pictures, in MiB of page. When they need more, the queue of items to label, the
        middle of each cluster and the labelled items keep theirs; every point stays on the map.

    Examples
    --------
    >>> page = render_report(ReportData(title="birds", summary={"modality": "audio", "files": 3}))
    >>> page.startswith("<!doctype html>"), "birds" in page
    (True, True)
    """
    from markupsafe import Markup

    media, media_of = choose_previews(data.map, data.to_label[: views.QUEUE_MOST], max_preview_mib)
    chart = cluster_map(data, media_of)
    script, style = _asset("report.js"), _asset("report.css")
    page = _template().render(
        data=data,
        noun=wording.noun(str(data.summary.get("modality", ""))),
        unit=wording.units(str(data.summary.get("modality", "")))[0],
        units=wording.units(str(data.summary.get("modality", "")))[1],
        headline=wording.headline(data.summary, data.methods, data.to_label),
        pool=wording.pool_sentences(data.pool, str(data.summary.get("modality", ""))),
        facts=views.facts(data),
        per_class=views.per_class(data.summary.get("per_class") or {}),
        comparison=views.comparison(data),
        groups=views.groups(data),
        confusion=views.confusion(data.confusion),
        map=chart,
        clusters=views.clusters(data.pseudo_label_summary),
        queue=views.queue(data.to_label, media_of, chart),
        queue_open=views.QUEUE_OPEN,
        curves=views.curves(data.curves),
        stages=views.stages(data.stages),
        quarantine=views.quarantine(data.quarantine),
        config=_yaml(data.config),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        payload=Markup(_json({"points": chart and chart["points"], "media": media})),
    )
    # What is left are bytes of file names that are no UTF-8 and came in elsewhere than as a name.
    return page.lstrip().encode("utf-8", "backslashreplace").decode("utf-8")


def write_report(path: str | Path, data: ReportData, max_preview_mib: float = 6.0) -> None:
    """Render and write atomically: the file is the old report or the new one, never half of one."""
    from unfused.data.files import atomic_write

    page = render_report(data, max_preview_mib)
    with atomic_write(Path(path), "wb") as file:
        file.write(page.encode("utf-8"))


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("unfused.workflow"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "visible": wording.visible,
        "pc": lambda value: f"{value:.2f}%",
        "score": wording.score,
    }
    return environment.get_template("report.html.j2")


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("unfused.workflow") / "templates" / name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    """JSON that can stand inside <script>: no tag, comment or entity can begin in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    plain = json.loads(json.dumps(config, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip() if plain else ""
