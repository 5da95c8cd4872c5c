"""How numbers and verdicts are worded: one place for the report, the model card and the console."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unfused.data.files import printable

Interval = Sequence[float]

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
_NOUNS = {
    "audio": ("recording", "recordings"),
    "image": ("picture", "pictures"),
    "text": ("text", "texts"),
    "table": ("row", "rows"),
}


def plural(count: int, one: str, many: str | None = None) -> str:
    """`count` and its noun.

    >>> plural(1, "clip"), plural(1200, "clip"), plural(2, "class", "classes")
    ('1 clip', '1,200 clips', '2 classes')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def items(count: int, modality: str) -> str:
    """`count` of what the folder holds: recordings, pictures, texts or rows (else: files)."""
    return plural(count, *_NOUNS.get(modality, ("file", "files")))


def noun(modality: str) -> str:
    return _NOUNS.get(modality, ("file", "files"))[1]


def units(modality: str) -> tuple[str, str]:
    """What the source is made of, one and several: files, or the rows of a table."""
    return ("row", "rows") if modality in ("text", "table") else ("file", "files")


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which "clip 9" comes before "clip 10".

    >>> sorted(["clip 10", "clip 9", "clip"], key=natural)
    ['clip', 'clip 9', 'clip 10']
    """
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part
    ]


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def score(value: float | None, digits: int = 3) -> str:
    """An accuracy, loss or difference with a true minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.{digits}f}".replace("-", MINUS)


def on_scale(value: float, width: float) -> str:
    """`value` to about a hundredth of the `width` of the scale that it is read on.

    >>> on_scale(4.6052, 5), on_scale(-0.0027, 2.3), on_scale(0.01234, 0.02), on_scale(1234.5, 900)
    ('4.61', '0.00', '0.0123', '1,234')
    """
    digits = 2 - math.floor(math.log10(width)) if width > 0 else 3
    digits = min(max(digits, 0), 8)
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", MINUS)


def percent(share: float | None) -> str:
    """
    >>> percent(0.8736), percent(1)
    ('87.4 %', '100.0 %')
    """
    return DASH if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them.

    >>> duration(0.0421), duration(12.34), duration(192), duration(4325), duration(200_000)
    ('0.04 s', '12.3 s', '3 min 12 s', '1 h 12 min', '56 h')
    """
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 24:
        return f"{round(seconds / 3600):,} h"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def memory(mib: float | None) -> str:
    """
    >>> memory(812.4), memory(2150), memory(0.25)
    ('812 MiB', '2.1 GiB', '0.2 MiB')
    """
    if mib is None or not math.isfinite(mib):
        return DASH
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def quantity(number: float | None) -> str:
    """A count of weights, three significant digits.

    >>> quantity(5_321_856), quantity(20_490), quantity(650), quantity(0)
    ('5.32 M', '20.5 k', '650', '0')
    """
    if number is None or not math.isfinite(number):
        return DASH
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return f"{number:.0f}"


def interval_of(interval: Interval | None) -> tuple[float, float] | None:
    """The two ends, or None where there is no interval (one draw, not a number)."""
    if interval is None or len(interval) != 2 or not all(is_number(end) for end in interval):
        return None
    low, high = sorted(float(end) for end in interval)
    return low, high


def accuracy_interval(row: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """The interval of a share, cut to 0..1: Student's t does not know that no share lies beyond.

    >>> accuracy_interval({"mean": 0.98, "interval": [0.73, 1.23]}), accuracy_interval(None)
    ((0.73, 1.0), None)
    """
    ends = interval_of((row or {}).get("interval"))
    return ends and (min(max(ends[0], 0.0), 1.0), min(max(ends[1], 0.0), 1.0))


def paired_interval(pair: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval of a difference of two shares, cut to -1..1."""
    ends = interval_of(pair.get("interval"))
    return ends and (max(ends[0], -1.0), min(ends[1], 1.0))


def span(interval: Interval | None, digits: int = 3) -> str:
    """
    >>> span([0.811, 0.8723]), span(None), span([-0.02, 0.04], 2)
    ('0.811 to 0.872', '–', '−0.02 to 0.04')
    """
    ends = interval_of(interval)
    return " to ".join(score(end, digits) for end in ends) if ends else DASH


def visible(text: object) -> str:
    """A name of anything, on one line: it can neither break the page nor turn its direction around."""
    return printable(str(text))


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def passage(text: str, most: int = 280) -> str:
    """The beginning of a text on one line, without what would turn the page's direction around.

    >>> passage("one\\n\\ttwo  three", 9)
    'one two …'
    """
    line = " ".join(_CONTROL.sub(" ", text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


BOUNDS = {"ceiling": "trained on all true labels: a bound, not a method"}


def ranked(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the methods by mean accuracy, best first, without the bounds; equal means keep their order."""

    def mean(name: str) -> float:
        value = methods[name]["accuracy"]["mean"]
        return value if is_number(value) else -math.inf

    return sorted((name for name in methods if name not in BOUNDS), key=mean, reverse=True)


def interval_note(draws: int, interval: str) -> str:
    """What the whiskers are.

    >>> interval_note(5, "t")
    '95 % t interval over 5 draws of the labels'
    """
    if interval == "bootstrap":
        return f"95 % bootstrap interval over the held-out items, {plural(draws, 'draw')} of the labels"
    if draws < 2:
        return "one draw of the labels: no interval"
    return f"95 % t interval over {draws} draws of the labels"


def paired_sentence(pair: Mapping[str, Any], draws: int | None = None) -> str:
    """A paired difference in words; never more than its interval allows.

    >>> paired_sentence({"a": "unfused", "b": "scratch", "mean": 0.05, "interval": [0.01, 0.09]}, 5)
    'unfused is above scratch by 0.050 (0.010 to 0.090) over 5 paired draws'
    >>> paired_sentence({"a": "unfused", "b": "fine-tune", "mean": -0.01, "interval": [-0.04, 0.02]}, 1)
    'unfused and fine-tune are not told apart: difference −0.010 (−0.040 to 0.020) on the same held-out items'
    """
    a, b, mean = visible(pair["a"]), visible(pair["b"]), float(pair["mean"])
    ends = paired_interval(pair)
    over = "" if not draws else f" over {draws} paired draws" if draws > 1 else " on the same held-out items"
    if ends is None:
        return f"{a} minus {b} is {score(mean)}: without an interval that is no verdict"
    if ends[0] > 0 or ends[1] < 0:
        low, high = sorted(abs(end) for end in ends)
        way = "above" if mean > 0 else "below"
        return f"{a} is {way} {b} by {score(abs(mean))} ({score(low)} to {score(high)}){over}"
    return f"{a} and {b} are not told apart: difference {score(mean)} ({span(ends)}){over}"


def pool_sentences(pool: str, modality: str) -> tuple[str, str]:
    """What was in the unlabelled pool, and what question the accuracies therefore answer."""
    things, place = noun(modality), "table" if units(modality)[0] == "row" else "folder"
    if pool == "inductive":
        return (
            f"Inductive: the held-out {things} were kept out of the unlabelled pool; nothing was trained on "
            "them, with labels or without.",
            f"The accuracies say how well the model does on {things} it has never met.",
        )
    return (
        f"Transductive: all {things} of the {place} were in the unlabelled pool, the held-out ones too, "
        "but never with their labels.",
        f"The accuracies say how well this {place}'s own {things} are labelled; on {things} from elsewhere "
        "expect less (--inductive measures that).",
    )


def headline(
    summary: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]], to_label: Iterable[Any]
) -> str:
    """The run in one sentence."""
    modality = str(summary.get("modality", ""))
    if order := ranked(methods):
        best = order[0]
        accuracy = methods[best]["accuracy"]
        ends = accuracy_interval(accuracy)
        # draws that agree to the last item give an interval of no width, which says nothing
        spread = (
            f" (95 % interval {percent(ends[0])} to {percent(ends[1])})" if ends and ends[0] < ends[1] else ""
        )
        right = f"{percent(accuracy['mean'])}{spread}"
        text = f"{visible(best)} labels {right} of the held-out {noun(modality)} correctly"
        if len(order) > 1:
            mean = percent(methods[order[1]]["accuracy"]["mean"])
            text += f"; next of {len(order)} methods is {visible(order[1])}, {mean}"
        return text + "."
    if labelled := sum((summary.get("per_class") or {}).values()) or summary.get("labelled"):
        trained = items(labelled, modality)
        return f"Trained on {trained} with labels. Nothing was held out, so no accuracy is known."
    queue = len(list(to_label))
    if not queue:
        return f"{items(summary.get('usable', 0), modality)} without labels."
    return (
        f"No labels yet. These are the {items(queue, modality)} most worth labelling: fill in the column "
        "“label” of to_label.csv and run the same command again; it goes on from there."
    )
