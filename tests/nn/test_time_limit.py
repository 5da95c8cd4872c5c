"""A call in its own thread: its value, its error, or a timeout that leaves it behind."""

import threading

import pytest

from unfused.nn.time_limit import in_thread


def test_value_and_error_come_through():
    assert in_thread(lambda: [1, 2]) == [1, 2]
    assert in_thread(lambda: None, seconds=5) is None
    with pytest.raises(KeyError, match="missing"):
        in_thread(lambda: {}["missing"], seconds=5)
    with pytest.raises(SystemExit):  # would end the thread unheard, and nobody would be answered
        in_thread(lambda: (_ for _ in ()).throw(SystemExit(3)))


def test_what_hangs_is_left_behind():
    leave = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        in_thread(lambda: leave.wait(30), seconds=0.05)
    leave.set()


def test_grace_is_waited_beyond_the_limit():
    pause = threading.Event()
    assert in_thread(lambda: pause.wait(0.05), seconds=0.001, grace=20) is False
