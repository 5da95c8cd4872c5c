"""The report's map of clusters: points placed, coloured and named, and the previews that fit in the page."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unfused.workflow.wording import is_number, natural, visible

if TYPE_CHECKING:
    from unfused.workflow.report import ReportData

COLOURS = 10  # categorical colours in report.css, told apart by colour-blind readers too
WIDTH = 800.0  # units of the view box


def cluster_map(data: ReportData, media_of: Mapping[str, int]) -> dict[str, Any] | None:
    """What the template draws and report.js brings to life; None without points."""
    import numpy as np

    points = [p for p in data.map if is_number(float(p["x"])) and is_number(float(p["y"]))]
    if not points:
        return None
    # Points with a label are drawn last, so that they lie on top.
    points.sort(key=lambda p: p.get("label") is not None)
    position = np.array([[float(p["x"]), float(p["y"])] for p in points])  # (points, 2)
    position -= position.min(axis=0)
    extent = np.maximum(position.max(axis=0), 1e-9)
    height = float(np.clip(WIDTH * extent[1] / extent[0], 460.0, 640.0))
    margin = 16.0
    scale = min((WIDTH - 2 * margin) / extent[0], (height - 2 * margin) / extent[1])
    position = position * scale + (np.array([WIDTH, height]) - extent * scale) / 2
    position[:, 1] = height - position[:, 1]  # y upwards

    clusters = [p.get("cluster") for p in points]
    names = sorted(
        {str(p[key]) for p in points for key in ("label", "predicted") if p.get(key) is not None}, key=natural
    )
    number = {name: index for index, name in enumerate(names)}
    label = [number.get(str(p["label"]), -1) if p.get("label") is not None else -1 for p in points]
    predicted = [
        number.get(str(p["predicted"]), -1) if p.get("predicted") is not None else -1 for p in points
    ]

    members: dict[Any, list[int]] = defaultdict(list)
    for index, cluster in enumerate(clusters):
        if cluster is not None:
            members[cluster].append(index)
    by_size = sorted(members, key=lambda cluster: (-len(members[cluster]), natural(str(cluster))))
    centre = {cluster: position[_central(position, members[cluster])] for cluster in by_size}
    above = np.array([0.0, -10.0])  # a caption stands above the point that it would hide
    cluster_colour = _spread_colours(by_size, [centre[cluster] for cluster in by_size])
    if len(names) <= COLOURS:
        name_colour = {name: index for index, name in enumerate(names)}
    else:
        places = []
        for index in range(len(names)):
            own = [
                i for i in range(len(points)) if label[i] == index or (label[i] < 0 and predicted[i] == index)
            ]
            places.append(position[own].mean(axis=0) if own else position.mean(axis=0))
        name_colour = _spread_colours(names, places)

    def captions(of: Sequence[int]) -> list[dict[str, Any]]:
        """Each cluster's most frequent name, at its middle."""
        found = []
        for cluster in by_size:
            common = Counter(of[i] for i in members[cluster] if of[i] >= 0).most_common(1)
            if common:
                found.append((visible(names[common[0][0]]), centre[cluster] + above))
        return _without_overlap(found, height)

    modes = (
        [("cluster", "cluster", _without_overlap([(f"{c}", centre[c] + above) for c in by_size], height))]
        if members
        else []
    )
    if any(i >= 0 for i in label):
        modes.append(("label", "label", captions(label)))
    if any(i >= 0 for i in predicted):
        modes.append(("predicted", "prediction", captions(predicted)))
    colour_of_cluster = [cluster_colour[c] if c is not None else -1 for c in clusters]
    colour_of_name = [name_colour[name] for name in names]
    colours = colour_of_cluster if members else [colour_of_name[i] if i >= 0 else -1 for i in predicted]
    labelled = sum(i >= 0 for i in label)
    rims = labelled <= len(points) / 2  # where nearly all have a label, a rim tells nothing
    wrong = [0 <= p != t >= 0 for t, p in zip(label, predicted, strict=True)]
    counts = {"label": Counter(label), "predicted": Counter(predicted)}
    ids = {cluster: index for index, cluster in enumerate(sorted(members, key=lambda c: natural(str(c))))}
    return {
        "width": WIDTH,
        "height": round(height, 1),
        "count": len(points),
        "unplaced": len(data.map) - len(points),
        "previews": sum(str(p["path"]) in media_of or bool(p.get("text")) for p in points),
        "circles": [
            (f"{x:.1f}", f"{y:.1f}", colour, rims and known >= 0)
            for (x, y), colour, known in zip(position.tolist(), colours, label, strict=True)
        ],
        "modes": modes,
        "labels": [(i, visible(n), counts["label"][i]) for i, n in enumerate(names) if counts["label"][i]],
        "predictions": [
            (i, visible(n), counts["predicted"][i]) for i, n in enumerate(names) if counts["predicted"][i]
        ],
        "clusters": [(index, visible(cluster), len(members[cluster])) for cluster, index in ids.items()],
        "cluster_ids": {str(cluster): index for cluster, index in ids.items()},
        "labelled": labelled,
        "rims": rims,
        "wrong": sum(wrong),
        "legend": [(visible(n), name_colour[n]) for n in names] if len(names) <= COLOURS else None,
        "index": {str(p["path"]): index for index, p in enumerate(points)},
        "points": {
            "x": [round(x, 1) for x in position[:, 0].tolist()],
            "y": [round(y, 1) for y in position[:, 1].tolist()],
            "name": [visible(p["path"]) for p in points],
            "cluster": [ids[c] if c is not None else -1 for c in clusters],
            "rims": rims,
            "label": label,
            "predicted": predicted,
            "media": [media_of.get(str(p["path"]), -1) for p in points],
            **({"text": [p.get("text") or "" for p in points]} if any(p.get("text") for p in points) else {}),
            "clusterColour": colour_of_cluster,
            "nameColour": colour_of_name,
            "names": [visible(n) for n in names],
            "clusterNames": [visible(cluster) for cluster in ids],
        },
    }


def _central(position: Any, members: Sequence[int]) -> int:
    """The member nearest to the middle: a point, where the mean of a bent cluster may lie outside of it."""
    import numpy as np

    own = position[list(members)]
    return members[int(np.square(own - np.median(own, axis=0)).sum(axis=1).argmin())]


def _spread_colours(names: Sequence[Any], places: Sequence[Any]) -> dict[Any, int]:
    """More groups than colours: each takes, in turn, the colour whose nearest user is farthest away."""
    import numpy as np

    used: dict[int, list[Any]] = {colour: [] for colour in range(COLOURS)}
    chosen: dict[Any, int] = {}
    for name, place in zip(names, places, strict=True):
        colour = max(
            used,
            key=lambda c: min((float(np.square(place - other).sum()) for other in used[c]), default=math.inf),
        )
        used[colour].append(place)
        chosen[name] = colour
    return chosen


def _without_overlap(captions: Sequence[tuple[str, Any]], height: float) -> list[dict[str, Any]]:
    """Captions that fit, most important first: `wide` on desktops, `narrow` on phones (type twice as big)."""
    placed: dict[str, list[tuple[float, float, float, float]]] = {"wide": [], "narrow": []}
    kept = []
    for text, (x, y) in captions:
        text = text if len(text) <= 16 else text[:15] + "…"
        fits = {}
        for name, size in (("wide", 13.0), ("narrow", 25.0)):
            half = (0.29 * len(text) + 0.3) * size
            centre = min(max(float(x), half), WIDTH - half)
            box = (centre - half, float(y) - 0.6 * size, centre + half, float(y) + 0.6 * size)
            fits[name] = all(
                box[2] < other[0] or other[2] < box[0] or box[3] < other[1] or other[3] < box[1]
                for other in placed[name]
            )
            if fits[name]:
                placed[name].append(box)
        if any(fits.values()):
            half = (0.29 * len(text) + 0.3) * 13.0
            kept.append(
                {
                    "text": text,
                    "x": f"{min(max(float(x), half), WIDTH - half):.1f}",
                    "y": f"{min(max(float(y), 12.0), height - 6.0):.1f}",
                    "wide": fits["wide"],
                    "narrow": fits["narrow"],
                }
            )
    return kept


def choose_previews(
    points: Sequence[Mapping[str, Any]], queue: Sequence[Mapping[str, Any]], max_preview_mib: float
) -> tuple[list[str], dict[str, int]]:
    """Data URIs that fit in the room there is, and which path has which.

    First the queue, then the three most central items of each cluster, then what has a label, then the rest
    from the middle of each cluster outwards.
    """
    from unfused.data.files import BadFile

    if not max_preview_mib >= 0:
        raise ValueError(f"max_preview_mib={max_preview_mib!r}: give a number of MiB, 0 or more")
    members: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for point in points:
        members[point.get("cluster")].append(point)
    wanted: list[tuple[tuple[int, int], Mapping[str, Any]]] = [((0, i), row) for i, row in enumerate(queue)]
    for own in members.values():
        x, y = (sorted(float(p[axis]) for p in own)[len(own) // 2] for axis in ("x", "y"))
        own.sort(key=lambda p: p.get("distance", (float(p["x"]) - x) ** 2 + (float(p["y"]) - y) ** 2))
        for rank, point in enumerate(own):
            wanted.append(((1 if rank < 3 else 2 if point.get("label") is not None else 3, rank), point))
    wanted.sort(key=lambda item: item[0])

    room = int(max_preview_mib * 2**20)
    media: list[str] = []
    media_of: dict[str, int] = {}
    misses = 0
    for _, item in wanted:
        path, preview = str(item["path"]), item.get("preview")
        if path in media_of or preview is None:
            continue
        if callable(preview):
            try:
                preview = preview()
            except (
                BadFile,
                OSError,
            ):  # the file has changed since it was read: a report is not to fail for that
                continue
            if preview is None:
                continue
        if not str(preview).startswith(("data:audio/", "data:image/")):
            raise ValueError(
                f"preview of {path!r} begins with {str(preview)[:20]!r}: give a data URI of audio or image"
            )
        if len(preview) > room:
            misses += 1
            if misses == 10:  # the page is full; making more previews would be for nothing
                break
            continue
        room -= len(preview)
        media_of[path] = len(media)
        media.append(str(preview))
    return media, media_of
