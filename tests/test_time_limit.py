"""Code that runs too long is ended, and code that does not never hears of it."""

import threading
import time

import pytest

from flexlora.time_limit import TimeIsUp, within


def spin(seconds: float) -> int:
    steps, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        steps += 1
    return steps


def test_a_loop_is_ended_soon_after_its_time() -> None:
    start = time.monotonic()
    with pytest.raises(TimeIsUp), within(0.1):
        spin(60)
    assert time.monotonic() - start < 20


def test_nothing_is_raised_after_the_block() -> None:
    for _ in range(3):
        with within(0.1):
            pass
        spin(0.5)
    with within(60):
        assert spin(0.3) > 0


def test_only_the_thread_whose_time_is_up_is_ended() -> None:
    ended: list[str] = []

    def work(seconds: float, name: str) -> None:
        try:
            with within(seconds):
                spin(2)
        except TimeIsUp:
            ended.append(name)

    threads = [threading.Thread(target=work, args=case) for case in ((0.1, "short"), (60.0, "long"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == ["short"]
