import os

import pytest
import torch

from flexlora.engines import process_layout
from flexlora.engines.process_layout import choose_processes


def test_processes_follow_from_cores_threads_and_the_size_of_the_base(monkeypatch):
    monkeypatch.setattr(process_layout, "_num_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    small, large = 10**6, 10**9
    assert choose_processes("cpu", small, None, None) == (["cpu"] * 7, 1)
    assert choose_processes("cpu", small, None, 4) == (["cpu"], 4)
    assert choose_processes("cpu", small, 3, None) == (["cpu"] * 2, 1)
    assert choose_processes("cpu", small, 1, None) == ([], 1)
    assert choose_processes("cpu", large, None, None) == ([], 8)
    assert choose_processes("cpu", large, 2, None) == (["cpu"], 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert choose_processes("cuda", large, None, None) == (["cuda:1", "cuda:2"], 2)
    assert choose_processes("cuda:1", large, None, None) == ([], 8)
    assert choose_processes("cuda:1", large, 2, 1) == (["cuda:1"], 1)


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("", 8)])
def test_a_containers_quota_counts_as_its_cores(text, cores, monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text(text, encoding="ascii")
    monkeypatch.setattr(process_layout, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert process_layout._num_cores() == cores
