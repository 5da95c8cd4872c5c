"""Peaks of resident memory, nested too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: a test process that has held gigabytes has freed pages to hand out again, and other threads.
PROGRAM = """
import numpy as np
from unfused.train.memory import PeakMemory

with PeakMemory() as outer:
    block = np.ones(10_000_000)  # 76 MiB
    del block
    with PeakMemory() as small:
        pass
    with PeakMemory() as large:
        block = np.ones(20_000_000)
        del block
with PeakMemory() as after:
    pass
print(outer.mib, small.mib, large.mib, after.mib, after.read())
"""


def high_water_mark_can_be_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(
    not high_water_mark_can_be_reset(), reason="this kernel does not reset its high-water mark"
)
def test_peaks_of_nested_stretches():
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    outer, small, large, after, read = map(float, ran.stdout.split())
    assert outer >= large > small + 100
    assert after < large - 100
    assert read >= after
