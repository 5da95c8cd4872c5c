"""What each choice in `unfused adapt` is worth on spoken digits: one change at a time, into docs/adapt-ablation.md.

    python tools/ablate_unfused.py ../shared/data/audio/fsdd [--draws 2] [--speakers NAME ...] [--only VARIANT ...]

Each of the FSDD speakers (all four, or those of --speakers) is held out in turn and unseen. The draws of 5 labels are not
those of the recorded claim (seed 100 on), so this table repeats no number that anything was chosen by. The parts that are
exchanged are not settings of `adapt`: they are patched here, in this process. What exists is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from unfused.nn import augment as augmentations
from unfused.nn.audio_model import AudioNTT
from unfused.pretrain.unfused import UnFuSeD
from unfused.workflow.adapt import adapt
from unfused.workflow.modality import Audio

SPEAKERS = ("jackson", "nicolas", "theo", "yweweler")
PROPAGATE, LITERAL = "unfused-propagate", "unfused-literal"


@contextmanager
def pooled(kind: str) -> Iterator[None]:
    def encoder(self: Audio) -> AudioNTT:
        return AudioNTT(self.front_end.n_mels, self.width, 16 * self.width, kind, cepstra=13)

    with patch.object(Audio, "encoder", encoder):
        yield


@contextmanager
def augmented(**strengths: Any) -> Iterator[None]:
    def augment(self: Audio, normaliser: dict[str, Any]) -> torch.nn.Module:
        return augmentations.AudioAugment(
            "voice", **{"frequency": 0.1, "tilt": 0.2, "time_bend": 0.05, "cepstra": 14} | strengths
        )

    with patch.object(Audio, "augment", augment):
        yield


@contextmanager
def weighted(**weights: float) -> Iterator[None]:
    with patch("unfused.pretrain.unfused.UnFuSeD", partial(UnFuSeD, **weights)):
        yield


@contextmanager
def warm() -> Iterator[None]:
    """The student begins as a copy of the teacher instead of fresh."""
    from unfused.workflow import arms, unlabelled

    def started(make: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(make)  # a stage is known by the name of what computes it
        def run(bench: Any, *rest: Any) -> Any:
            copy = bench.teacher()

            def encoder(self: Audio) -> Any:
                fresh = plain(self)
                fresh.load_state_dict(copy.state_dict())
                return fresh

            plain = Audio.encoder
            with patch.object(Audio, "encoder", encoder):
                return make(bench, *rest)

        return run

    with (
        patch.object(arms, "unfused_propagate", started(arms.unfused_propagate)),
        patch.object(unlabelled, "distil", started(unlabelled.distil)),
    ):
        yield


TEACHERS = ("decar", "delores-s", "delores-m", "slicer", "random")
NO_HEADS = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "student starts from the teacher": {"with": [warm], "same": ("pretrain", "cluster")},
    "no auxiliary heads (alpha = beta = gamma = 0)": {
        "with": [partial(weighted, **NO_HEADS)],
        "same": ("pretrain", "cluster"),
    },
    **{
        f"K = {k}": {"clusters": str(k), "method": (LITERAL,), "same": ("pretrain",)}
        for k in (10, 30, 120, 256)
    },
    **{f"teacher {name}": {"teacher": name} for name in TEACHERS},
    "pooling max-mean": {"with": [partial(pooled, "max-mean")], "method": (PROPAGATE,)},
    "stronger warp and tilt (.15, .5)": {
        "with": [partial(augmented, frequency=0.15, tilt=0.5)],
        "method": (PROPAGATE,),
    },
    "no warp, no tilt": {"with": [partial(augmented, frequency=0.0, tilt=0.0)], "method": (PROPAGATE,)},
    "distillation half as long (350)": {"distil_steps": 350, "same": ("pretrain", "cluster")},
    "distillation twice as long (1400)": {
        "distil_steps": 1400,
        "same": ("pretrain", "cluster"),
        "method": (PROPAGATE,),
    },
}
"""`same`: stages that the variant shares with the run as it is, and that are copied from it."""


def measure(
    variant: str, data: Path, output: Path, draws: int, speakers: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Accuracy of every draw: method -> speaker -> values."""
    options = dict(VARIANTS[variant])
    contexts, shared = options.pop("with", []), ("windows", *options.pop("same", ()))
    found: dict[str, dict[str, list[float]]] = {}
    for speaker in speakers:
        name = f"{variant.translate(str.maketrans('(),/', '    ')).replace(' ', '-')}-{speaker}"
        for stage in shared:
            done, mine = (output / folder / "stages" / stage for folder in (f"as-it-is-{speaker}", name))
            if (done / "done.json").exists() and not mine.exists():
                shutil.copytree(done, mine)
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            run = adapt(
                str(data),
                **{
                    "method": (PROPAGATE, LITERAL),
                    "group": r"_([a-z]+)_\d+\.wav$",
                    "test": f"speaker={speaker}",
                    "labels_per_class": 5,
                    "inductive": True,
                    "pretrain_steps": 400,
                    "distil_steps": 700,
                    "fine_tune_steps": 100,
                    "seed": 100,
                    "seeds": draws,
                    "name": name,
                    "output": str(output),
                    **options,
                },
            )
        for method, values in run.metrics["methods"].items():
            found.setdefault(method, {})[speaker] = values["accuracy"]["seeds"]
    return found


def table(results: dict[str, Any], draws: int, speakers: Sequence[str]) -> str:
    def mean(result: dict[str, Any], method: str) -> str:
        if method not in result:
            return ""
        return f"{np.mean([np.mean(v) for v in result[method].values()]):.3f}"

    rows = [f"| {name} | {mean(r, PROPAGATE)} | {mean(r, LITERAL)} |" for name, r in results.items()]
    return "\n".join(
        [
            "# What each choice is worth",
            "",
            "Made by `python tools/ablate_unfused.py`. Accuracy on a spoken-digit speaker who was never heard, 5 labels a",
            f"digit from the other three, mean over {' and '.join(speakers)}, {draws} draw(s) each (not the claim's). One",
            "thing is changed at a time; differences under 0.03 mean nothing at so few draws. `propagate` sees the teacher",
            "only through the graph, and where the visible labels choose the graph of classic features, not at all.",
            "",
            "| | propagate | literal |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--speakers", nargs="+", default=list(SPEAKERS))
    parser.add_argument("--only", nargs="*", choices=VARIANTS)
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    arguments = parser.parse_args()
    record = arguments.output / "results.json"
    results = json.loads(record.read_text()) if record.exists() else {}
    for variant in arguments.only or VARIANTS:
        if variant not in results:
            results[variant] = measure(
                variant, arguments.data.resolve(), arguments.output, arguments.draws, arguments.speakers
            )
            arguments.output.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(results, indent=1))
        print(
            variant,
            {
                m: round(float(np.mean([np.mean(v) for v in r.values()])), 4)
                for m, r in results[variant].items()
            },
            flush=True,
        )
    page = Path(__file__).parents[1] / "docs" / "adapt-ablation.md"
    ordered = {name: results[name] for name in VARIANTS if name in results}
    page.write_text(table(ordered, arguments.draws, arguments.speakers), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
