"""Peaks of resident memory, nested too."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from unfused.train import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark can be reset on Linux only")
def test_peaks_of_nested_stretches():
    with PeakMemory() as outer:
        block = np.ones(10_000_000)  # 76 MiB
        del block
        with PeakMemory() as small:
            pass
        with PeakMemory() as large:
            block = np.ones(20_000_000)
            del block
    assert outer.mib >= large.mib > small.mib + 100
    with PeakMemory() as after:
        pass
    assert after.mib < large.mib - 100 and after.read() >= after.mib
