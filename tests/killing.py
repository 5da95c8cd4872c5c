"""Kill a run and start it again until it is through: `run_killed` for commands, `Forks` for functions.

    import killing
    hits = killing.run_killed([sys.executable, "-m", "unfused", "adapt", ...], delays=[0.7, 2.1, 1.3])

A kill is SIGKILL to the whole process group: no handler, no `finally`, no flush.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any


def random_delays(count: int, longest: float, seed: int = 0) -> list[float]:
    """Seconds to wait before each kill, uniform in [0, longest]."""
    generator = random.Random(seed)
    return [generator.uniform(0, longest) for _ in range(count)]


def run_killed(
    command: Sequence[str],
    delays: Iterable[float],
    ready: Callable[[], bool] = lambda: True,
    timeout: float = 300,
    **popen: Any,
) -> int:
    """Run `command`, killed once per delay (seconds after `ready()` first holds), and at last let it finish.

    Returns the number of kills that met a living process; raises if the last run fails.
    """
    hits = 0
    for delay in delays:
        process = subprocess.Popen(command, start_new_session=True, **popen)
        hits += _kill(process.pid, process.poll, process.wait, delay, ready, timeout)
    subprocess.run(command, check=True, timeout=timeout, **popen)
    return hits


class Forks:
    """Runs functions in fresh processes that are forked from one with the heavy imports done.

    Parameters
    ----------
    modules : sequence of str
        What that one process imports (once).
    """

    def __init__(self, modules: Sequence[str] = ("unfused.train.engine",)) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # it would not find them otherwise
        forkserver.ensure_running()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> float:
        """Run to the end; returns its seconds."""
        process = self._context.Process(target=function, args=args)
        start = time.monotonic()
        process.start()
        process.join(timeout)
        if process.exitcode != 0:
            process.kill()
            raise RuntimeError(f"{function.__name__} ended with {process.exitcode}")
        return time.monotonic() - start

    def run_killed(
        self,
        function: Callable[..., Any],
        *args: Any,
        delays: Iterable[float],
        ready: Callable[[], bool] = lambda: True,
        timeout: float = 120,
    ) -> int:
        """As the module's `run_killed`, for a function."""
        hits = sum(self.kill(function, *args, delay=d, ready=ready, timeout=timeout) for d in delays)
        self.run(function, *args, timeout=timeout)
        return hits

    def kill(
        self,
        function: Callable[..., Any],
        *args: Any,
        delay: float,
        ready: Callable[[], bool] = lambda: True,
        timeout: float = 120,
    ) -> bool:
        """Run, killed `delay` seconds after `ready()` first holds; whether it was still running."""
        process = self._context.Process(target=_own_group, args=(function, *args))
        process.start()
        assert process.pid is not None
        return _kill(process.pid, lambda: process.exitcode, process.join, delay, ready, timeout)

    def died(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> bool:
        """Run a function that may kill itself; whether it did."""
        process = self._context.Process(target=function, args=args)
        process.start()
        process.join(timeout)
        if process.exitcode not in (0, -signal.SIGKILL):
            process.kill()
            raise RuntimeError(f"{function.__name__} ended with {process.exitcode}")
        return process.exitcode != 0

    def run_until_event(self, function: Callable[..., Any], *args: Any, folder: Path, events: int) -> bool:
        """Run, dying at the `events`-th change of a file under `folder`; whether it died before its end."""
        return self.died(_dying, str(folder), events, function, *args)


def _kill(
    pid: int,
    poll: Callable[[], int | None],
    wait: Callable[[], Any],
    delay: float,
    ready: Callable[[], bool],
    timeout: float,
) -> bool:
    end = time.monotonic() + timeout
    while poll() is None and not ready() and time.monotonic() < end:
        time.sleep(0.005)
    end = time.monotonic() + delay
    while poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    alive = poll() is None
    if alive:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # not yet the leader of its group
            os.kill(pid, signal.SIGKILL)
    wait()
    return alive


def _own_group(function: Callable[..., Any], *args: Any) -> None:
    os.setsid()
    function(*args)


_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate", "os.link"}


def watch_changes(folder: str, changed: Callable[[str], Any]) -> None:
    """Call `changed(path)` before each change of a file under `folder`, until this process ends."""

    def watch(event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(details[1], str) and any(c in details[1] for c in "wxa+")
        if (writes or event in _CHANGES) and str(details[0]).startswith(folder):
            changed(str(details[0]))

    sys.addaudithook(watch)


def _dying(folder: str, events: int, function: Callable[..., Any], *args: Any) -> None:
    left = events

    def changed(path: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_changes(folder, changed)
    function(*args)
