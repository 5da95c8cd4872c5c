"""The resident-memory peak of a stretch of a program."""

from __future__ import annotations

import sys
from pathlib import Path

_active: list[PeakMemory] = []


class PeakMemory:
    """Context manager: `.mib` is the process's resident-set peak in MiB between entering and leaving.

    On Linux the kernel's high-water mark is reset on entering (`/proc/self/clear_refs`), and nested uses
    report correctly. Where that is not possible, the peak is that of the whole process so far.

    Examples
    --------
    >>> with PeakMemory() as memory:
    ...     block = bytearray(1 << 20)
    >>> memory.mib > 1
    True
    """

    def __init__(self) -> None:
        self.mib = 0.0

    def __enter__(self) -> PeakMemory:
        self._credit()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        _active.append(self)
        return self

    def read(self) -> float:
        """The peak so far, in MiB."""
        self._credit()
        return self.mib

    def __exit__(self, *exc: object) -> None:
        self._credit()
        _active.remove(self)

    @staticmethod
    def _credit() -> None:
        """Credit the peak so far to all that measure, since a reset would hide it from those outside."""
        peak = _high_water_mib()
        for one in _active:
            one.mib = max(one.mib, peak)


def _high_water_mib() -> float:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
