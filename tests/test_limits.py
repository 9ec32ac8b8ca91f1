"""Cores and memory are those that this process may use."""

import os

import psutil
import pytest

from flexlora import limits


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("", 8)])
def test_a_containers_quota_counts_as_its_cores(text, cores, monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text(text, encoding="ascii")
    monkeypatch.setattr(limits, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert limits.num_cores() == cores


def test_the_memory_of_this_machine_is_that_which_psutil_reports_or_what_a_container_may_use() -> None:
    assert 0 < limits.memory_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(("text", "share"), [("max", 1.0), ("1000000\n", None), ("", 1.0)])
def test_a_containers_limit_counts_as_its_memory(text, share, monkeypatch, tmp_path):
    whole = psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text(text, encoding="ascii")
    monkeypatch.setattr(limits, "_MEMORY_LIMIT", tmp_path / "memory.max")
    assert limits.memory_bytes() == (1_000_000 if share is None else pytest.approx(whole, rel=1e-3))
