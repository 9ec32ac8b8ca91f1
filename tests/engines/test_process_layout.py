import torch

from flexlora.engines import process_layout
from flexlora.engines.process_layout import choose_processes


def test_processes_follow_from_cores_threads_and_the_size_of_the_base(monkeypatch):
    monkeypatch.setattr(process_layout, "num_cores", lambda: 8)
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
