"""The bench that every claim works at: worlds, sizes, a cache on disk, and the verdict."""

from __future__ import annotations

import datetime
import inspect
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unfused.claims.lab import cache, worlds
from unfused.claims.lab.sources import code_hash
from unfused.claims.lab.verdict import Estimate, Values, Verdict, as_row, estimate, paired
from unfused.claims.lab.worlds import Absent, AudioWorld, ImageWorld
from unfused.data.files import cache_root

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Absent", "AudioWorld", "Estimate", "ImageWorld", "Lab", "Verdict", "estimate", "paired"]

SCALES = ("smoke", "desk", "gpu")
T = TypeVar("T")


class Lab:
    """What a claim is given: a scale, seeds, worlds, a cache.

    Parameters
    ----------
    scale : {"smoke", "desk", "gpu"}, default="smoke"
        Seconds (does the machinery work), minutes on two cores, or a machine with a GPU.
    seeds : int, optional
        How many seeds; by default 2 at smoke scale and 5 otherwise.
    data_dir : path, optional
        Folder with `audio/`, `images/`, `text/`; by default `$UNFUSED_DATA` or `../shared/data` beside a
        checkout.
    cache_dir : path, optional
        By default `$UNFUSED_CACHE/lab` or `~/.cache/unfused/lab`.
    threads : int, optional
        Of torch; by default unchanged.
    slug, sentence : str
        The claim at work; set by the runner.
    console : rich Console, optional
        Where `log` writes; silent without.

    Examples
    --------
    >>> lab = Lab("smoke", seeds=3)
    >>> list(lab.seeds), lab.pick(smoke=10, desk=1000)
    ([0, 1, 2], 10)
    >>> verdict = lab.verdict(
    ...     metric="accuracy",
    ...     method=[0.8, 0.9, 0.85],
    ...     baselines={"scratch": [0.7, 0.75, 0.72]},
    ...     rule="the paired 95 % interval of the gain reaches down to 0",
    ... )
    >>> verdict.holds
    True
    """

    def __init__(
        self,
        scale: str = "smoke",
        seeds: int | None = None,
        data_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        threads: int | None = None,
        *,
        slug: str = "",
        sentence: str = "",
        console: Console | None = None,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r}: choose one of {', '.join(SCALES)}")
        if seeds is not None and seeds < 1:
            raise ValueError(f"seeds={seeds}: at least 1 is needed")
        self.scale = scale
        self.seeds = range(seeds or self.pick(smoke=2, desk=5))
        self.data_dir = worlds.data_dir(data_dir)
        self.cache_dir = Path(cache_dir) if cache_dir is not None else cache_root() / "lab"
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.slug, self.sentence = slug, sentence
        self.skipped: dict[str, str] = {}
        self._console = console
        self._worlds: dict[str, AudioWorld | ImageWorld] = {}
        self._saved_seconds = 0.0
        self._counted: set[Path] = set()
        self._mark = self._clock()

    @property
    def device(self) -> str:
        """ "cuda" at gpu scale where there is one, else "cpu"."""
        if self.scale == "gpu":
            import torch

            return "cuda" if torch.cuda.is_available() else "cpu"
        return "cpu"

    def pick(self, *, smoke: T, desk: T, gpu: T | None = None) -> T:
        """The argument for this scale; `gpu` is `desk` where it is not given."""
        return {"smoke": smoke, "desk": desk, "gpu": desk if gpu is None else gpu}[self.scale]

    def world(self, name: str) -> Any:
        """A data set by name: "sample", "fsdd", "esc10" (`AudioWorld`) or "digits" (`ImageWorld`).

        Raises
        ------
        Absent
            Where the data are not on this machine. Ask `has(name)` first to go on without them.
        """
        if name not in self._worlds:
            self._worlds[name] = worlds.load(name, self)
        return self._worlds[name]

    def has(self, name: str) -> bool:
        """Whether the world is here; if not, the run's record says that it was skipped."""
        try:
            self.world(name)
        except Absent as reason:
            self.skipped[name] = str(reason)
            self.log(f"skipped {reason}")
            return False
        return True

    def cached(
        self, name: str, params: Mapping[str, Any], compute: Callable[[], T], uses: Sequence[Any] = ()
    ) -> T:
        """`compute()`, or what it gave when it was last called with these parameters and this code.

        Call it once per unit (seed, held-out group, arm) and a killed claim goes on where it stopped.

        Parameters
        ----------
        name : str
            Readable start of the file name.
        params : mapping
            Everything that the result depends on, JSON-able; of data, `world.fingerprint`. The code is added:
            the module that defines `compute` and all of `unfused` that this module imports, without comments
            and docstrings.
        compute : callable
            Gives a nest of dicts, lists, scalars, numpy arrays, tensors. Tuples come back as lists.
        uses : sequence of functions or classes, optional
            Handed to `compute` from elsewhere: their modules count as code too.
        """
        files = (inspect.getsourcefile(inspect.unwrap(used)) for used in (compute, *uses))
        code = " ".join(code_hash(file) for file in files if file)
        stem = self.cache_dir / cache.key(name, params, code)
        if (hit := cache.load(stem)) is None:
            start = self._clock()
            value = compute()
            cache.save(stem, value, self._clock() - start)
            hit = cache.load(stem)  # what a later run will see, so that the first run sees no other types
            assert hit is not None
        elif (
            stem not in self._counted
        ):  # what is read a second time would not have been computed a second time
            self._saved_seconds += hit[1]
        self._counted.add(stem)
        return hit[0]

    def paired(self, method: Values, baseline: Values | None = None, **how: str) -> Estimate:
        """Mean and 95 % interval of paired differences; see `unfused.claims.lab.paired`."""
        return paired(method, baseline, **how)

    def log(self, message: str) -> None:
        if self._console:
            self._console.print(
                f"[{self._clock() - self._mark:6.0f} s] {self.slug}: {message}", style="dim", markup=False
            )

    def verdict(
        self,
        *,
        metric: str,
        method: Values,
        baselines: Mapping[str, Values],
        rule: str,
        holds: bool | None = None,
        world: str = "",
        name: str = "",
        ablations: Mapping[str, Mapping[str, Any]] | None = None,
        notes: Sequence[str] = (),
        higher_is_better: bool = True,
        interval: str = "t",
        over: str = "units",
    ) -> Verdict:
        """Put the numbers together.

        Parameters
        ----------
        metric : str
            What the numbers are, "accuracy" say.
        method : values
            The method's numbers: one per seed, or `{group: one per seed}`.
        baselines : mapping of str to values
            On the same units as `method`.
        rule : str
            What would refute the claim, written before the run; completes "refuted if ...".
        holds : bool, optional
            By default: the interval of the paired gain lies above 0 for every baseline.
        world, name : str
            The data (several verdicts of one claim differ in it), and the method's display name.
        ablations : mapping, optional
            Title -> row -> values, or `{column: number or text}`.
        notes : sequence of str
            Whatever else the reader must know.
        higher_is_better : bool, default=True
        interval, over : str
            See `unfused.claims.lab.estimate`.
        """
        if not rule:
            raise ValueError("rule is empty: say what would refute the claim before it is run")
        sign = 1 if higher_is_better else -1
        ours = estimate(method, interval, over)
        arms = {arm: estimate(values, interval, over) for arm, values in baselines.items()}
        gains = {}
        for arm, theirs in arms.items():
            gain = paired(ours.values, theirs.values)
            gains[arm] = estimate({unit: sign * value for unit, value in gain.values.items()}, interval, over)
        if holds is None:
            holds = all(gain.above_zero for gain in gains.values())
        kind = "Student's t" if interval == "t" else "bootstrap percentiles (10,000 resamples)"
        paired_over = f"{'' if over == 'units' else over + ' of '}{len(ours.values)} paired units"
        seconds, self._mark = self._clock() - self._mark, self._clock()
        return Verdict(
            slug=self.slug,
            claim=self.sentence,
            world=world,
            metric=metric,
            name=name or self.slug or "method",
            method=ours,
            baselines=arms,
            differences=gains,
            interval=f"95 % intervals: {kind} over {paired_over}",
            holds=bool(holds),
            refuted_by=rule,
            higher_is_better=higher_is_better,
            ablations={
                title: {str(row): as_row(cells, interval, over) for row, cells in rows.items()}
                for title, rows in (ablations or {}).items()
            },
            notes=tuple(notes),
            scale=self.scale,
            seeds=self._repeats(ours),
            seconds=round(seconds, 1),
            date=datetime.date.today().isoformat(),
            versions=versions(),
        )

    def _repeats(self, numbers: Estimate) -> int:
        """How many seeds there are numbers of; a claim may need fewer than the lab has."""
        if groups := numbers.by_group():
            return len(numbers.values) // len(groups)
        return len(numbers.values) if all(unit.isdigit() for unit in numbers.values) else len(self.seeds)

    def _clock(self) -> float:
        """Seconds of work: this process's time plus what the cache saved it."""
        return time.perf_counter() + self._saved_seconds


def versions() -> dict[str, str]:
    """Of everything that can move a number."""
    from importlib.metadata import version

    import unfused

    found = {name: version(name) for name in ("torch", "transformers", "numpy", "scikit-learn")}
    return {
        "unfused": unfused.__version__,
        "python": platform.python_version(),
        **found,
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
