"""The report: what it shows, that nothing in a name can act, and that any part of it may be missing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unfused.data.files import BadFile
from unfused.workflow import report
from unfused.workflow.report import ReportData, render_report, write_report
from unfused.workflow.report_map import COLOURS, _spread_colours, choose_previews
from unfused.workflow.report_views import CURVE_POINTS, _Axis, _thin

VOID = {"br", "hr", "img", "input", "meta", "link"}
SOUND = "data:audio/wav;base64," + base64.b64encode(b"RIFF" + bytes(60)).decode()
NASTY = [
    "<script>alert(1)</script>.wav",
    '"><img src=x onerror=alert(1)>.wav',
    "</script><script>alert(1)</script>",
    "{{ 7 * 7 }} & 'quoted'\n.wav",
    "gnp\u202e\u2028.wav",
    "not-utf-8-\udce9.wav",
]


class Page(HTMLParser):
    """Checks that tags nest, and keeps them, the texts and the script data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.ids: dict[str, str] = {}
        self.payload = ""
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if values.get("id"):
            assert values["id"] not in self.ids, f"id {values['id']} twice"
            self.ids[values["id"]] = tag
        assert not any(name.startswith("on") for name in values), f"inline handler in {tag}: {attrs}"
        if tag not in VOID:
            self.open.append(tag if values.get("id") != "payload" else "payload")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        expected = self.open.pop()
        assert tag == expected or (tag, expected) == ("script", "payload"), f"</{tag}> closes <{expected}>"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "payload":
            self.payload += data
        elif not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def shown(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def method(*seeds: float, half: float = 0.02) -> dict:
    mean = sum(seeds) / len(seeds)
    return {
        "accuracy": {"mean": mean, "interval": [mean - half, mean + half], "seeds": list(seeds)},
        "balanced_accuracy": {"mean": mean - 0.01, "interval": None, "seeds": []},
        "seconds": 92.0,
        "peak_mib": 1480.0,
        "parameters": 1_320_000,
    }


def example(names: list[str] | None = None, count: int = 24) -> ReportData:
    """A whole run in small: 3 clusters, 2 classes, the given names among the files."""
    paths = [*(names or []), *(f"clips/{i}.wav" for i in range(count))][:count]
    points = [
        {
            "x": (i % 3) * 10.0 + i % 2,
            "y": (i % 3) * 5.0 + i / 10,
            "cluster": i % 3,
            "label": ("owl", "wren")[i % 2] if i < 8 else None,
            "predicted": ("owl", "wren")[i % 5 == 0],
            "path": path,
            "preview": SOUND,
        }
        for i, path in enumerate(paths)
    ]
    queue = [
        {"rank": i + 1, "path": p["path"], "cluster": p["cluster"], "reason": "uncertain", "preview": SOUND}
        for i, p in enumerate(points)
    ]
    return ReportData(
        title="birds",
        created="2025-03-02 14:05",
        version="0.1.0",
        command="unfused adapt clips",
        config={"seed": 0, "method": ["unfused", "scratch"]},
        summary={"modality": "audio", "files": 26, "usable": 24, "labelled": 8, "held_out": 6, "classes": 2,
                 "per_class": {"owl": 5, "wren": 3}, "seconds_total": 75.0,
                 "duration_s": {"min": 0.5, "median": 3.0, "max": 9.0}},
        quarantine=[(path, "empty file") for path in paths[:2]],
        stages=[{"name": "pretrain", "seconds": 192.0, "peak_mib": 812.0, "parameters": 5_321_856},
                {"name": "unfused/0", "seconds": 10.0, "reused": True},
                {"name": "unfused/1", "seconds": 20.0, "reused": True}],
        curves={"pretrain": [{"step": i, "loss": 5 - i / 30, "lr": 0.1} for i in range(60)]},
        methods={"scratch": method(0.62, 0.66), "unfused": method(0.86, 0.88), "ceiling": method(0.95, 0.97)},
        paired=[{"a": "unfused", "b": "scratch", "mean": 0.23, "interval": [0.18, 0.28]}],
        groups={"unfused": {"site a": 0.9, "site b": 0.8}, "scratch": {"site a": 0.6, "site b": 0.7}},
        confusion={"labels": ["owl", "wren"], "matrix": [[7, 1], [0, 8]], "method": "unfused"},
        map=points,
        to_label=queue,
        pseudo_label_summary=[{"cluster": c, "size": 8, "purity": 0.75, "label": "owl"} for c in range(3)],
    )  # fmt: skip


def without_labels(data: ReportData) -> ReportData:
    return dataclasses.replace(
        data,
        methods={},
        paired=[],
        groups={},
        confusion=None,
        summary={"modality": "audio", "files": 26, "usable": 24, "labelled": 0},
        map=[{**point, "label": None, "predicted": None} for point in data.map],
        pseudo_label_summary=[{"cluster": c, "size": 8, "purity": None, "label": None} for c in range(3)],
    )


def test_shows_everything_and_is_well_formed() -> None:
    page = Page(render_report(example()))
    for text in (
        "unfused labels 87.0 % (95 % interval 85.0 % to 89.0 %) of the held-out recordings correctly",
        "next of 2 methods is scratch, 64.0 %",
        "0.850 to 0.890",
        "95 % t interval over 2 draws of the labels",
        "unfused is above scratch by 0.230 (0.180 to 0.280) over 2 paired draws",
        "Transductive: all recordings of the folder",
        "Guessing at random: 0.500",
        "15 of 16 held-out recordings are labelled correctly",
        "owl taken for wren",
        "3 min 12 s",
        "2 draws",
        "5.32 M",
        "empty file",
        "unfused adapt clips",
    ):
        assert text in page.shown, text
    assert page.tags.count("circle") > 24


def test_ranks_by_mean_and_does_not_rank_a_bound() -> None:
    page = render_report(example())
    rows = re.findall(r'scope="row" class="name"><bdi>(.*?)</bdi>', page)
    assert rows == ["ceiling", "unfused", "scratch"]
    assert "Accuracy of 2 methods" in page
    assert "a bound, not a method" in page


def test_says_which_pool() -> None:
    assert "Inductive: the held-out" in render_report(dataclasses.replace(example(), pool="inductive"))
    with pytest.raises(ValueError, match="pool='both'"):
        dataclasses.replace(example(), pool="both")
    with pytest.raises(ValueError, match="interval='guess'"):
        dataclasses.replace(example(), interval="guess")


def test_no_labels_puts_the_queue_first() -> None:
    text = render_report(without_labels(example()))
    page = Page(text)
    assert "No labels yet. These are the 24 recordings most worth labelling" in page.shown
    assert text.index('id="to-label"') < text.index('id="map"')
    assert "comparison" not in page.ids and "confusion" not in page.ids
    assert "Transductive" not in page.shown


EMPTY = {
    **{key: {} for key in ("curves", "methods", "groups", "summary", "config")},
    **dict.fromkeys(("stages", "map", "to_label", "pseudo_label_summary", "quarantine", "paired"), ()),
    "confusion": None,
}


@pytest.mark.parametrize("missing", [*EMPTY, "all"])
def test_any_part_may_be_missing(missing: str) -> None:
    parts = EMPTY if missing == "all" else {missing: EMPTY[missing]}
    Page(render_report(dataclasses.replace(example(), **parts)))


def test_numbers_that_are_none_show_as_dashes() -> None:
    data = example()
    row = {"accuracy": {"mean": float("nan"), "interval": None, "seeds": []}, "seconds": None}
    data = dataclasses.replace(
        data,
        methods={
            "unfused": row,
            "scratch": {"accuracy": {"mean": 0.5, "interval": [float("nan")] * 2, "seeds": [0.5]}},
        },
        paired=[],
        stages=[{"name": "read", "seconds": None}],
        map=[{**data.map[0], "x": float("nan")}, *data.map[1:]],
    )
    text = render_report(data)
    assert "NaN" not in text and ">nan" not in text
    assert "1 without a place are left out" in Page(text).shown
    assert "One draw of the labels: no interval" in Page(text).shown


# --- nothing in a name can act ----------------------------------------------------------------------------


def test_names_are_shown_not_run() -> None:
    data = dataclasses.replace(example(NASTY), title=NASTY[0], command=NASTY[1], config={NASTY[2]: NASTY[5]})
    text = render_report(data)
    page = Page(text)
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert page.ids["payload"] == "script"
    names = json.loads(page.payload)["points"]["name"]
    assert NASTY[0] in names and NASTY[2] in names
    assert NASTY[0] in page.shown
    assert "gnp\\u202e\\u2028.wav" in page.shown and "\u202e" not in text and "\u2028" not in text
    assert "{{ 7 * 7 }}" in page.shown and "not-utf-8-\\udce9.wav" in page.shown
    text.encode("utf-8")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=4, unique=True))
def test_a_name_never_changes_the_structure(names: list[str]) -> None:
    tags = Page(render_report(example(names))).tags
    assert tags == Page(render_report(example([f"file {i}" for i in range(len(names))]))).tags


def test_labels_and_groups_are_escaped_too() -> None:
    data = example()
    bad = "</td><script>alert(1)</script>"
    data = dataclasses.replace(
        data,
        methods={bad: method(0.5, 0.6)},
        groups={bad: {bad: 0.5}},
        confusion={"labels": [bad, "wren"], "matrix": [[1, 2], [3, 4]]},
        map=[{**point, "label": bad, "cluster": bad} for point in data.map],
        stages=[{"name": bad, "seconds": 1.0, "detail": bad}],
        curves={bad: [{"step": 0, bad: 1.0}, {"step": 1, bad: 2.0}]},
        summary={"modality": bad, "classes": 2, bad: bad, "per_class": {bad: 2, "wren": 1}},
    )
    assert Page(render_report(data)).tags.count("script") == 2


def test_asks_the_network_for_nothing() -> None:
    text = render_report(example())
    assert not re.search(r"https?://|@import|url\(", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and "default-src 'none'" in policy.group(1)
    script = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy.group(1)


# --- previews ---------------------------------------------------------------------------------------------


def test_previews_are_thinned_and_points_are_not() -> None:
    data = without_labels(example(count=60))
    data = dataclasses.replace(data, to_label=data.to_label[-5:])
    room = 12 * len(SOUND)
    page = Page(render_report(data, max_preview_mib=room / 2**20))
    payload = json.loads(page.payload)
    assert len(payload["media"]) == 12
    assert len(payload["points"]["x"]) == 60
    with_sound = {
        name for name, m in zip(payload["points"]["name"], payload["points"]["media"], strict=True) if m >= 0
    }
    assert {row["path"] for row in data.to_label} <= with_sound
    assert "12 of 60 carry their preview" in page.shown


def test_the_middle_of_each_cluster_comes_before_labels() -> None:
    points = [
        {"x": float(i), "y": 0.0, "cluster": i // 10, "path": str(i), "preview": SOUND} for i in range(30)
    ]
    for point in points[::10]:
        point["label"] = "owl"
    _, chosen = choose_previews(points, [], 9 * len(SOUND) / 2**20)
    assert sorted(map(int, chosen)) == [4, 5, 6, 14, 15, 16, 24, 25, 26]
    _, chosen = choose_previews(points, [], 12 * len(SOUND) / 2**20)
    assert {"0", "10", "20"} <= set(chosen)


def test_previews_are_made_only_while_there_is_room() -> None:
    made = []

    def make() -> str:
        made.append(1)
        return SOUND

    def gone() -> str:
        raise BadFile("gone")

    points = [{"x": 0.0, "y": 0.0, "cluster": 0, "path": str(i), "preview": make} for i in range(500)]
    points.append({"x": 0.0, "y": 0.0, "cluster": 1, "path": "gone", "preview": gone})
    media, chosen = choose_previews(points, [], 20 * len(SOUND) / 2**20)
    assert len(media) == 20 and len(made) <= 31 and "gone" not in chosen


def test_a_preview_is_sound_or_picture() -> None:
    point = {"x": 0.0, "y": 0.0, "cluster": 0, "path": "a.wav", "preview": "https://example.org/a.wav"}
    with pytest.raises(ValueError, match=r"preview of 'a\.wav'"):
        choose_previews([point], [], 1.0)
    with pytest.raises(ValueError, match="max_preview_mib=-1"):
        choose_previews([], [], -1)


# --- charts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.5], [0.0, 1.0], [0.123, 0.124], [-0.2, 0.3], [1e-9, 1e-8], [3, 3000]])
def test_axis_has_round_ticks_inside(values: list[float]) -> None:
    axis = _Axis.around(values)
    assert all(3 <= axis(v) <= 97 for v in values)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert all(0 <= tick["x"] <= 100 for tick in ticks)
    assert len({tick["text"] for tick in ticks}) == len(ticks)


def test_thinning_a_curve_keeps_its_ends_and_spikes() -> None:
    xy = [(float(i), 1.0) for i in range(5000)]
    xy[2345] = (2345.0, 99.0)
    thin = _thin(xy)
    assert len(thin) <= CURVE_POINTS + 2
    assert thin[0] == xy[0] and thin[-1] == xy[-1] and (2345.0, 99.0) in thin


def test_neighbouring_clusters_differ_in_colour() -> None:
    import numpy as np

    places = [np.array([float(i), 0.0]) for i in range(3 * COLOURS)]
    chosen = _spread_colours(range(3 * COLOURS), places)
    assert all(chosen[i] != chosen[i + 1] for i in range(3 * COLOURS - 1))


def test_confusion_needs_a_square() -> None:
    with pytest.raises(ValueError, match="2 labels need a 2 x 2 matrix"):
        render_report(dataclasses.replace(example(), confusion={"labels": ["a", "b"], "matrix": [[1, 2]]}))


def test_many_classes_become_lists() -> None:
    n = 60
    matrix = [[5 if i == j else int(j == 0) for j in range(n)] for i in range(n)]
    data = dataclasses.replace(
        example(), confusion={"labels": [f"class {i}" for i in range(n)], "matrix": matrix}
    )
    page = Page(render_report(data))
    assert "hardest classes" in page.shown and page.tags.count("td") < 200


def test_writes_the_whole_file_and_the_same_one_again(tmp_path) -> None:
    path = tmp_path / "runs" / "report.html"
    path.parent.mkdir()
    data = example(NASTY)
    write_report(path, data)
    first = path.read_bytes()
    assert first.decode("utf-8") == render_report(data)
    write_report(path, data)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


# --- in a browser -----------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


ACTIONS = """
{
  const circles = [...document.querySelectorAll("#points circle")];
  const name = () => document.getElementById("card-name").textContent;
  const found = {};
  document.querySelector("input[value=predicted]").click();
  found.colours = new Set(circles.map((circle) => circle.getAttribute("class").split(" ")[0])).size;
  found.captions = document.querySelector(".captions:not([hidden])").dataset.mode;
  const select = document.querySelector("select");
  select.value = "cluster:1";
  select.dispatchEvent(new Event("change", { bubbles: true }));
  found.shown = circles.filter((circle) => !circle.classList.contains("off")).length;
  const plot = document.getElementById("plot"), box = plot.getBoundingClientRect();
  const scale = box.width / plot.viewBox.baseVal.width;
  const target = circles.find((circle) => !circle.classList.contains("off"));
  plot.dispatchEvent(new MouseEvent("click", {
    clientX: box.left + target.cx.baseVal.value * scale,
    clientY: box.top + target.cy.baseVal.value * scale,
  }));
  found.clicked = name();
  found.playing = document.querySelectorAll(".playing").length;
  plot.dispatchEvent(new KeyboardEvent("keydown", { key: "n" }));
  found.next = name();
  document.querySelector("[data-row]").click();
  found.row = name();
  found.width = document.documentElement.scrollWidth - window.innerWidth;
  document.documentElement.dataset.found = JSON.stringify(found);
}
"""


def browse(path: Path, width: int = 1280) -> tuple[Page, str]:
    """The page after its script has run, and what the console said."""
    profile = path.with_suffix(".profile")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", f"--user-data-dir={profile}", "--enable-logging=stderr",
        f"--window-size={width},800", "--virtual-time-budget=2000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if not done.stdout.strip():
        pytest.skip(f"chromium does not start here: {done.stderr[-300:]}")
    assert 'data-ready="yes"' in done.stdout
    # What a script logs, what it fails at and what the policy refuses are all console messages.
    assert "CONSOLE" not in done.stderr, done.stderr
    return Page(done.stdout), done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser_it_runs_its_own_script_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, example(NASTY))
    page, _ = browse(path)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert NASTY[0] in page.shown


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])  # headless chromium makes no narrower window
def test_in_a_browser_the_map_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    asset = report._asset
    monkeypatch.setattr(report, "_asset", lambda name: asset(name) + (ACTIONS if name == "report.js" else ""))
    path = tmp_path / "report.html"
    write_report(path, example())
    _, text = browse(path, width)
    found = json.loads(html.unescape(re.search('data-found="([^"]*)"', text).group(1)))  # type: ignore[union-attr]
    members = {f"clips/{i}.wav" for i in range(24) if i % 3 == 1}
    assert found["colours"] == 2 and found["captions"] == "predicted" and found["shown"] == 8
    assert {found["clicked"], found["next"]} <= members and found["clicked"] != found["next"]
    assert found["playing"] and found["row"] == "clips/0.wav" and found["width"] <= 0
